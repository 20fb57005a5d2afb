"""Record the CUDA allocator's log of one step after the memory pass; it shows where a plan is wrong."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_gauge import isolation
from peft_gauge.errors import one_line
from peft_gauge.traces import recorder
from peft_gauge.training import models

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peft_gauge.training.cases import Case
    from peft_gauge.training.step import TrainingJob

PHASE = "trace"
NO_LOG = "the CPU allocator keeps no log; a trace needs --device cuda"


def trace_step(case: Case, job: TrainingJob, folder: Path, metrics: Mapping[str, Any]) -> dict[str, str]:
    """Record a step of ``job``, which is warmed up, in a file in ``folder``; returns ``{"file": name}``, or
    ``{"skipped": reason}``: a trace that fails does not affect the case otherwise.

    ``metrics``: the memory pass's metrics, which are complete by then.
    """
    if case.device != "cuda":
        return {"skipped": NO_LOG}
    isolation.note(phase=PHASE)
    name = f"{case.id}_{datetime.now(UTC):%Y%m%d_%H%M%S}.json.gz"
    try:
        recorded = recorder.record_step(job, case.device)
        recorder.write(folder / name, recorded, settings_of(case, job), about(metrics))
    except Exception as error:  # out of memory, a torch with other names, a full disk
        job.clear()
        return {"skipped": one_line(f"{type(error).__name__}: {error}")}
    return {"file": name}


def settings_of(case: Case, job: TrainingJob) -> dict[str, Any]:
    """Settings by which ``peft-gauge trace`` plans the case, named as the options of ``peft-gauge plan``."""
    settings = case.settings
    attention = job.effective_settings()["attention"]
    return {
        "model": case.model.name,
        "method": case.method.name,
        "dtype": case.dtype,
        "batch": settings.batch,
        "seq": settings.seq,
        "optimizer": settings.optimizer,
        "grad_checkpointing": settings.grad_checkpointing,
        "grad_accumulation": settings.grad_accumulation,
        "clip_grad_norm": settings.clip_grad_norm,
        "mixed_precision": settings.mixed_precision,
        "float32_outputs": settings.float32_outputs,
        "attention": attention if attention in models.ATTENTIONS else None,
        "loop": case.loop,
        "trainer_arguments": dict(case.trainer_arguments),
    }


def about(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The GPU, library versions, and the peak that the allocator reported in a step without a log."""
    import torch

    from peft_gauge.machine import LIBRARIES, installed_version

    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "versions": {name: installed_version(name) for name in LIBRARIES},
        "recorded_on": f"{datetime.now(UTC):%Y-%m-%d}",
    }
    if "allocated_peak_bytes" in metrics:
        found["allocated_peak_bytes"] = metrics["allocated_peak_bytes"]
    return found
