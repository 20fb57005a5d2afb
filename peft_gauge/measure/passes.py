"""Measure one case in this process: load, prepare, warm up; then the fingerprint, the memory pass and the time pass.

The fingerprint comes first, since its losses are those of the first steps: the warm-up takes two, and the fingerprint
records the third. Memory is next, since the time pass builds a second base model as its control.
"""

from __future__ import annotations

import gc
import logging
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft_gauge import counting, isolation, meters
from peft_gauge.clock.peak_throughput import measure_peak_throughput
from peft_gauge.clock.rounds import StoppingRule, WarmUp
from peft_gauge.fingerprint import record_step
from peft_gauge.measure import memory, speed, trace
from peft_gauge.training import cases, methods, models

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from peft_gauge.training.cases import Case
    from peft_gauge.training.models import ModelRecord
    from peft_gauge.training.step import TrainingJob

Pass = Literal["memory", "speed", "fingerprint"]

IMPORTS = "imports"
"""The phase that finds out whether this machine can use a library."""


@dataclass(frozen=True)
class CaseSetup:
    """The work of one process.

    Fields:
        case: the case to build.
        base: the source of the base weights: the case's model, or a copy that loads faster (`models.stored`).
        stream: token ids to train on, int64 of one dimension, enough for `cases.BATCHES` batches of the largest shape.
        passes: the passes to run.
        shapes: further (batch, seq) at which the memory pass measures a peak.
        rule, warm_up: stopping rule and warm-up of the time pass.
        trace: folder in which the memory pass saves the allocator's log of one step; ``None`` records none.
    """

    case: Case
    base: ModelRecord
    stream: Tensor
    passes: tuple[Pass, ...] = ("memory", "speed")
    shapes: tuple[tuple[int, int], ...] = ()
    rule: StoppingRule = field(default_factory=StoppingRule)
    warm_up: WarmUp = field(default_factory=WarmUp)
    trace: Path | None = None


def measure(setup: CaseSetup) -> dict[str, Any]:
    """The metrics of ``setup``'s passes, as JSON.

    ``described`` (`cases.described`), ``gradients`` (names of trainable tensors without a finite gradient),
    ``counted``, ``learned`` (whether every trainable tensor changed), ``work_seconds`` (all of this except imports and
    the CUDA context), and a record for each pass under its name.

    Raises `GaugeError` for a case that cannot be built; torch's out-of-memory error is not caught.
    """
    quiet()
    with memory.watched(setup.case.device) as phases:
        isolation.note(phase=IMPORTS)
        _import_libraries(setup.case)
        started = time.perf_counter()
        isolation.note(phase=meters.LOAD)
        with phases.phase(meters.LOAD):
            base = _prepared_base(setup)
        naive_bytes = memory.allocated_bytes(base)
        isolation.note(phase=meters.PREPARE)
        with phases.phase(meters.PREPARE):
            job = cases.build_job(setup.case, base=base, prepared=True, stream=setup.stream)
        isolation.note(phase=meters.WARM_UP)
        with phases.phase(meters.WARM_UP):
            gradients = _warm_up(job)
        found: dict[str, Any] = {
            "described": cases.described(setup.case, job),
            "gradients": gradients,
            "counted": _counted(setup.case, job),
        }
        if "fingerprint" in setup.passes:
            isolation.note(phase="fingerprint")
            found["fingerprint"] = record_step(
                job,
                job.losses,
                adapter_bytes=found["counted"]["adapter_disk_bytes"],
                micro_batches=setup.case.settings.grad_accumulation,
            )
        earlier_seconds: list[float] = []
        if "memory" in setup.passes:
            seconds, record = memory.memory_pass(
                job, phases, setup.stream, setup.shapes, trains_base=trains_base(setup.case)
            )
            earlier_seconds = [seconds]
            found["memory"] = {"naive_after_loading_bytes": naive_bytes, **record}
            if setup.trace is not None:
                found["memory"]["trace"] = trace.trace_step(setup.case, job, setup.trace, found["memory"])
    if "speed" in setup.passes:
        isolation.note(phase="timing")
        found["speed"] = speed.speed_pass(job, setup.rule, setup.warm_up, _control_base(setup), earlier_seconds)
    found["learned"] = job.learned()
    job.close()
    found["work_seconds"] = time.perf_counter() - started
    return found


def peak_throughput(device: str, dtype: str) -> dict[str, Any]:
    """`peft_gauge.clock.peak_throughput.PeakThroughput` of this process's device, as JSON."""
    return measure_peak_throughput(device, dtype).as_json()


def _import_libraries(case: Case) -> None:
    """One-time costs of a process, before its work: the libraries and the CUDA context.

    Imported objects are not garbage: the collections of this case need not go through them.
    """
    from peft_gauge.training.quantization import import_peft, load_bitsandbytes

    import_peft()
    import torch
    import transformers

    models.hf_config(case.model)
    if case.method.quantization is not None:
        load_bitsandbytes(case.device)
    if case.device == "cuda":
        torch.zeros(1, device="cuda")
    del transformers
    gc.freeze()


def _base(setup: CaseSetup) -> PreTrainedModel:
    case = setup.case
    return models.build(setup.base, dtype=case.dtype, attn_implementation=case.attention)


def _prepared_base(setup: CaseSetup) -> PreTrainedModel:
    return methods.prepare_base(_base(setup), setup.case.method, device=setup.case.device)


def trains_base(case: Case) -> bool:
    """Whether the trainable weights are the base's own."""
    return case.method.kind == "full"


def _control_base(setup: CaseSetup) -> PreTrainedModel | None:
    """A bare base model next to the job, if there is memory for it."""
    gc.collect()
    case = setup.case
    if not memory.room_for(models.logical_params(case.model) * models.torch_dtype(case.dtype).itemsize, case.device):
        return None
    return _base(setup).to(case.device)


def _warm_up(job: TrainingJob) -> dict[str, list[str]]:
    """Take two steps, which create the optimizer's state; returns missing and non-finite gradients of the second."""
    import torch

    job.warm_up(1)
    for _ in range(job.settings.grad_accumulation):
        job.forward()
        job.backward()
    names = {parameter: name for name, parameter in job.model.named_parameters()}
    missing = [names[each] for each in job.trainable if each.grad is None]
    not_finite = [
        names[each] for each in job.trainable if each.grad is not None and not bool(torch.isfinite(each.grad).all())
    ]
    job.optimizer_step()
    assert job.loss is not None
    job.losses.append(float(job.loss))
    job.clear()
    return {"missing": missing, "not_finite": not_finite}


def _counted(case: Case, job: TrainingJob) -> dict[str, Any]:
    """Parameters and bytes of the built model, and the size of the saved adapter.

    A fully trained model is as large on disk as its weights and is not saved to find out.
    """
    counted = counting.count(job.model)
    with tempfile.TemporaryDirectory(prefix="peft-gauge-") as folder:
        full = case.method.kind == "full"
        disk_bytes = counted.weight_bytes if full else methods.save(job.model, case.method, Path(folder))
    return {
        "trainable_params": counted.trainable_params,
        "total_params": counted.total_params,
        "percent_of_base": counted.percent_of_base(models.logical_params(case.model)),
        "trainable_bytes": counted.trainable_bytes,
        "weight_bytes": counted.weight_bytes,
        "adapter_disk_bytes": disk_bytes,
    }


def quiet() -> None:
    """Silence the libraries' advice on training: it would look like the last output of a process that dies."""
    warnings.simplefilter("ignore")
    for name in ("bitsandbytes", "transformers", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
