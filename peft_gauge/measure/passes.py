"""Measure one case in this process: load, prepare, warm up; then the fingerprint, the memory pass and the time pass.

The fingerprint comes first, since its losses are those of the first steps: the first creates the optimizer's state, the
second is checked for its gradients, and the fingerprint records the third. A measured process takes no step twice: on a
CPU the second step is metered for the memory pass, and the third gives it the memory by category. The time pass comes
last, since it builds a second base model as its control.
"""

from __future__ import annotations

import gc
import logging
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_gauge import counting, isolation, meters
from peft_gauge.clock.peak_throughput import measure_peak_throughput
from peft_gauge.clock.rounds import StoppingRule, WarmUp
from peft_gauge.fingerprint import record_step
from peft_gauge.measure import IMPORTS, memory, speed, trace
from peft_gauge.training import cases, methods, models

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from peft_gauge.measure import Pass
    from peft_gauge.memory.tracker import StorageTracker
    from peft_gauge.meters import Phases
    from peft_gauge.training.cases import Case
    from peft_gauge.training.models import ModelRecord
    from peft_gauge.training.step import TrainingJob


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
            job.warm_up(1)
        # On a GPU, the memory pass first empties the allocator's cache and takes steps of its own.
        on_host = setup.case.device == "cpu"
        gradients, seconds = _second_step(job, phases if on_host else meters.Phases([]))
        found: dict[str, Any] = {
            "described": cases.described(setup.case, job),
            "gradients": gradients,
            "counted": _counted(setup.case, job),
        }
        tracked: memory.Tracked | None = None
        if "fingerprint" in setup.passes:

            def use(tracker: StorageTracker, seconds: float) -> None:
                nonlocal tracked
                storages = memory.of_tracker(tracker, job, trains_base(setup.case))
                tracked = None if storages is None else (seconds, storages)

            isolation.note(phase="fingerprint")
            found["fingerprint"] = record_step(
                job,
                job.losses,
                adapter_bytes=found["counted"]["adapter_disk_bytes"],
                micro_batches=setup.case.settings.grad_accumulation,
                use=use,
            )
        earlier_seconds = [seconds] if on_host else []
        if "memory" in setup.passes:
            seconds, record = memory.memory_pass(
                job,
                phases,
                setup.stream,
                setup.shapes,
                trains_base=trains_base(setup.case),
                metered_seconds=seconds if on_host else None,
                tracked=tracked,
            )
            earlier_seconds = [seconds]
            found["memory"] = {"naive_after_loading_bytes": naive_bytes, **record}
            if setup.trace is not None:
                found["memory"]["trace"] = trace.trace_step(setup.case, job, setup.trace, found["memory"])
    if "speed" in setup.passes:
        isolation.note(phase="timing")
        found["speed"] = speed.speed_pass(job, setup.rule, setup.warm_up, _control_base(setup), earlier_seconds)
        if "memory" in found:
            memory.compare_cost(found["memory"], seconds, found["speed"]["samples"]["step_seconds"])
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


def _second_step(job: TrainingJob, phases: Phases) -> tuple[dict[str, list[str]], float]:
    """Take the second step, the first with the optimizer's state; returns its missing and non-finite gradients, and its
    seconds."""
    import torch

    bad: dict[str, list[str]] = {"missing": [], "not_finite": []}

    def check() -> None:
        names = {parameter: name for name, parameter in job.model.named_parameters()}
        for each in job.trainable:
            if each.grad is None:
                bad["missing"].append(names[each])
            elif not bool(torch.isfinite(each.grad).all()):
                bad["not_finite"].append(names[each])
        assert job.loss is not None
        job.losses.append(float(job.loss))

    seconds = memory.metered_step(job, phases, before_clear=check)
    return bad, seconds


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
