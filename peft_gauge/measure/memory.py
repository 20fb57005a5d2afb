"""The memory pass: the memory of a step by every meter of the device, phase by phase and at several shapes.

Allocator, driver and operating system are read over unmodified steps; the tensor tracker, which slows a step, follows
every storage of a separate step.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from peft_gauge import isolation, meters
from peft_gauge.clock import timed
from peft_gauge.counting import quantization_constants
from peft_gauge.memory.categories import (
    ACTIVATIONS,
    ADAPTER_WEIGHTS,
    BASE_WEIGHTS,
    BUFFERS,
    FORWARD,
    HOST,
    INPUTS,
    LOGITS_AND_LOSS,
    OPTIMIZER_STATE,
    QUANTIZATION_CONSTANTS,
)
from peft_gauge.memory.tracker import StorageTracker
from peft_gauge.meters.cuda import CudaMeter
from peft_gauge.meters.host import HostMeter
from peft_gauge.meters.nvml import NvmlMeter
from peft_gauge.meters.tensors import TensorMeter
from peft_gauge.training.batches import cut

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peft_gauge.meters import Meter, Phases
    from peft_gauge.training.step import TrainingJob

STEPS = {"cuda": 2, "cpu": 1}
"""Number of metered steps; the greatest peak counts, since CUDA's allocator can still split segments after the first.
"""

BEFORE = "before"
"""The phase before anything is built."""

# meter's name -> its metric in a whole step -> the metric's name in the record
SUMMARY = {
    "cuda allocator": {
        "allocated_peak_bytes": "allocated_peak_bytes",
        "reserved_peak_bytes": "reserved_peak_bytes",
        "fragmented_peak_bytes": "fragmented_peak_bytes",
    },
    "nvml": {"device_peak_bytes": "device_peak_bytes", "process_peak_bytes": "process_peak_bytes"},
    "host": {"rss_peak_bytes": "rss_peak_bytes"},
}


def meters_of(device: str) -> list[Meter]:
    """The meters for a step on ``device``, except the tensor tracker."""
    return [HostMeter(), CudaMeter(), NvmlMeter()] if device == "cuda" else [HostMeter()]


@contextlib.contextmanager
def watched(device: str) -> Iterator[Phases]:
    """Meters over the block; present readings are noted regularly in case the process dies."""
    phases = meters.Phases(meters_of(device))
    with phases.phase(BEFORE):  # memory of other processes on the GPU
        pass
    with isolation.watch(lambda: present(device)):
        yield phases


def present(device: str) -> dict[str, int | None]:
    """Present readings that reset no meter's peak, for a process that may die."""
    if device != "cuda":
        import psutil

        return {"rss_peak_bytes": psutil.Process().memory_info().rss}
    if not torch.cuda.is_initialized():
        return {}
    stats = torch.cuda.memory_stats()
    return {
        "allocated_peak_bytes": stats.get("allocated_bytes.all.peak"),
        "reserved_peak_bytes": stats.get("reserved_bytes.all.peak"),
    }


def allocated_bytes(model: nn.Module) -> int:
    """The reading directly after loading: the allocator's on CUDA, otherwise the bytes of the model's storages."""
    parameter = next(model.parameters())
    if parameter.is_cuda:
        return torch.cuda.memory_allocated(parameter.device)
    constants = [tensor for each in model.parameters() for tensor in quantization_constants(each)]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers(), *constants)
    }
    return sum(storages.values())


def room_for(nbytes: int, device: str) -> bool:
    """Whether 1.5 times ``nbytes`` are free on ``device``."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
    else:
        import psutil

        free = psutil.virtual_memory().available
    return nbytes * 3 // 2 < free


Tracked = tuple[float, dict[str, Any]]
"""The seconds and the metrics of a step in which every storage is tracked (`tracked_step`)."""


def memory_pass(
    job: TrainingJob,
    phases: Phases,
    stream: Tensor,
    shapes: Sequence[tuple[int, int]],
    *,
    trains_base: bool,
    metered_seconds: float | None = None,
    tracked: Tracked | None = None,
) -> tuple[float, dict[str, Any]]:
    """The seconds of a step of ``job`` that is not tracked, and its record: its peaks by phase and meter, then those at
    each of ``shapes``. ``job`` is warmed up.

    ``stream``: token ids for the other shapes. ``trains_base``: whether the trainable weights are the base's own.
    ``metered_seconds``: of a step that ``phases`` metered already (`metered_step`), and ``tracked``: a step that was
    tracked already (`of_tracker`); without them, the pass takes its own.

    The record: ``phases`` (phase -> meter -> metric), the metrics of the whole step, ``tensors`` (the tracked step:
    exact peak, resident bytes, by category), ``shapes`` (a peak each), each meter's coverage, resolution and cost, and
    why a meter of the device was unavailable. Bytes; an unavailable reading is absent.
    """
    own = (job.batches, job.settings)
    plain_seconds = metered_seconds
    if plain_seconds is None:
        empty_cache()
        plain_seconds = min(metered_step(job, phases) for _ in range(STEPS[_device(job)]))
    whole = phases.peaks().get(meters.WHOLE_STEP, {})
    found: dict[str, Any] = {
        name: whole[meter][metric]
        for meter, metrics in SUMMARY.items()
        for metric, name in metrics.items()
        if metric in whole.get(meter, {})
    }
    found |= _own_device_peak(phases, found)
    counts = _counts(phases)
    tracked_seconds, storages = tracked or tracked_step(job, trains_base)
    found |= {"tensor_peak_bytes": storages["peak_bytes"], "resident_bytes": storages["resident_bytes"]}
    points = [{"batch": own[1].batch, "seq": own[1].seq, **_peak_names(found)}]
    for batch, seq in shapes:
        isolation.note(phase=f"step of {batch}×{seq}")
        points.append({"batch": batch, "seq": seq, **_at_shape(job, stream, batch, seq, trains_base)})
    job.train_on(*own)
    empty_cache()
    return plain_seconds, {
        **found,
        **counts,
        "saved_activation_bytes_per_token": storages["saved_activation_bytes"] / (own[1].batch * own[1].seq),
        "peak_by_category": storages["peak_by_category"],
        "resident_by_category": storages["resident_by_category"],
        "phase_of_peak": storages["phase_of_peak"],
        "phases": phases.peaks(),
        "shapes": points,
        "meters": _about(phases, meters_of(_device(job)), tracked_seconds / plain_seconds),
        "unavailable": phases.unavailable,
    }


def _device(job: TrainingJob) -> str:
    return job.trainable[0].device.type


def metered_step(job: TrainingJob, phases: Phases, *, before_clear: Callable[[], object] = lambda: None) -> float:
    """The seconds of a step of ``job`` metered by ``phases``. ``before_clear``: called after the step, while gradients
    and loss are still there."""
    isolation.note(phase=meters.WHOLE_STEP)

    def step() -> None:
        with phases.phase(meters.WHOLE_STEP):
            job.clear()
            for _ in range(job.settings.grad_accumulation):
                with phases.phase(meters.FORWARD):
                    job.forward()
                with phases.phase(meters.BACKWARD):
                    job.backward()
            with phases.phase(meters.OPTIMIZER):
                job.optimizer_step()

    seconds = timed(step)
    before_clear()
    job.clear()
    return seconds


def _own_device_peak(phases: Phases, found: dict[str, Any]) -> dict[str, int]:
    """The driver's count for this process; if unavailable, the growth of the GPU's memory since before it."""
    if "process_peak_bytes" in found:
        return {"own_device_peak_bytes": found["process_peak_bytes"]}
    before = phases.peaks().get(BEFORE, {}).get("nvml", {}).get("device_peak_bytes")
    if before is None or "device_peak_bytes" not in found:
        return {}
    return {"own_device_peak_bytes": found["device_peak_bytes"] - before}


def _counts(phases: Phases) -> dict[str, int]:
    """How often, over all steps so far, the allocator had to empty its cache, and ran out of memory."""
    steps = [reading for reading in phases.readings if reading.phase == meters.WHOLE_STEP]
    counts: dict[str, int] = {}
    for reading in steps:
        for name in ("alloc_retries", "ooms"):
            value = reading.by_meter.get("cuda allocator", {}).get(name)
            if value is not None:
                counts[name] = counts.get(name, 0) + value
    return counts


def tracked_step(job: TrainingJob, trains_base: bool, tracker: StorageTracker | None = None) -> Tracked:
    """The seconds and the metrics of one step in which every storage is tracked, by ``tracker`` if there is one."""
    gc.collect()
    if tracker is None:
        tracker = StorageTracker(vocabulary=_vocabulary(job))
    _adopt(tracker, job, trains_base)
    meter = TensorMeter(tracker)
    driver = meters.Phases([meter])

    def step() -> None:
        with driver.phase(meters.WHOLE_STEP):
            for _ in range(job.settings.grad_accumulation):
                with driver.phase(meters.FORWARD):
                    tracker.label(job.forward(), LOGITS_AND_LOSS)
                with driver.phase(meters.BACKWARD):
                    job.backward()
            with driver.phase(meters.OPTIMIZER):
                job.optimizer_step()
            job.clear()

    seconds = timed(step)
    found = _metrics_of(tracker)
    tracker.close()
    return seconds, found


def of_tracker(tracker: StorageTracker, job: TrainingJob, trains_base: bool) -> dict[str, Any] | None:
    """The metrics of `tracked_step` from the ``tracker`` of another step, which ``job`` has just taken.

    ``None`` if they could differ: where the tracker looked for logits of another width, or where the step left a tensor
    of the batch unused, which counts only if it is known beforehand.
    """
    known = len(tracker.records)
    _adopt(tracker, job, trains_base)  # categories apply to past events too
    if len(tracker.records) != known or tracker.vocabulary != _vocabulary(job):
        return None
    return _metrics_of(tracker)


def compare_cost(record: dict[str, Any], plain_seconds: float, step_seconds: Sequence[float]) -> None:
    """Restate the tracker's cost in a ``record`` of `memory_pass` as a multiple of the median of ``step_seconds``.

    The pass compares with a step of ``plain_seconds``, which may be a job's second: that can take twice as long as
    later ones, since it touches new memory.
    """
    about = record["meters"][TensorMeter.name]
    about["overhead_times_a_step"] *= plain_seconds / statistics.median(step_seconds)


def _vocabulary(job: TrainingJob) -> int:
    embeddings: Any = job.model.get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.num_embeddings)


def _metrics_of(tracker: StorageTracker) -> dict[str, Any]:
    peak, resident = tracker.peak(), tracker.live()
    saved = tracker.kept_bytes(FORWARD, (ACTIVATIONS,))
    return {
        "peak_bytes": peak.bytes,
        "phase_of_peak": peak.phase,
        "peak_by_category": _without_host(peak.by_category),
        "resident_bytes": resident.bytes,
        "resident_by_category": _without_host(resident.by_category),
        "saved_activation_bytes": saved,
    }


def _without_host(by_category: Any) -> dict[str, int]:
    return {name: nbytes for name, nbytes in by_category.items() if nbytes and name != HOST}


def _adopt(tracker: StorageTracker, job: TrainingJob, trains_base: bool) -> None:
    tracker.adopt(job.model.buffers(), BUFFERS)
    for parameter in job.model.parameters():
        is_base = trains_base or not parameter.requires_grad
        tracker.adopt(parameter, BASE_WEIGHTS if is_base else ADAPTER_WEIGHTS)
        tracker.adopt(quantization_constants(parameter), QUANTIZATION_CONSTANTS)
    for state in job.optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                # torch keeps the step counter of an unfused AdamW on the host, whatever the parameter's device.
                on_host = name == "step" and not value.is_cuda
                tracker.adopt(value, HOST if on_host else OPTIMIZER_STATE)
    for batch in job.batches[:1]:  # the planned step has one batch on the device
        tracker.adopt(batch.values(), INPUTS)


def _at_shape(job: TrainingJob, stream: Tensor, batch: int, seq: int, trains_base: bool) -> dict[str, int]:
    """Peaks of a step of ``batch`` × ``seq`` tokens, by the meters whose readings do not depend on earlier shapes."""
    device = _device(job)
    shape = replace(job.settings, batch=batch, seq=seq)
    job.train_on(cut(stream, batch=batch, seq=seq, device=device), shape)
    found: dict[str, int] = {}
    if device == "cuda":
        job.step()  # creates workspaces and loads kernels for this shape
        job.clear()
        empty_cache()
        phases = meters.Phases([CudaMeter()])
        for _ in range(STEPS[device]):
            metered_step(job, phases)
        whole = phases.peaks()[meters.WHOLE_STEP].get("cuda allocator", {})
        found |= {name: whole[name] for name in ("allocated_peak_bytes", "reserved_peak_bytes") if name in whole}
    _, tracked = tracked_step(job, trains_base)
    return {**found, "tensor_peak_bytes": tracked["peak_bytes"]}


def _peak_names(found: dict[str, Any]) -> dict[str, int]:
    names = ("allocated_peak_bytes", "reserved_peak_bytes", "tensor_peak_bytes")
    return {name: found[name] for name in names if name in found}


def empty_cache() -> None:
    """Empty the allocator's cache: plans model steps, not loading, so segments used only by loading have to go."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _about(phases: Phases, used: Sequence[Meter], tracked_over_plain: float) -> dict[str, dict[str, Any]]:
    """Each meter's coverage, resolution and cost: in seconds per phase, or as a multiple of a step's time."""
    about: dict[str, dict[str, Any]] = {}
    for meter in used:
        if meter.name not in phases.unavailable:
            cost = meters.overhead_seconds(meter)
            about[meter.name] = {"sees": meter.sees, "resolution": meter.resolution, "overhead_seconds_per_phase": cost}
    about[TensorMeter.name] = {
        "sees": TensorMeter.sees,
        "resolution": TensorMeter.resolution,
        "overhead_times_a_step": tracked_over_plain,
    }
    return about
