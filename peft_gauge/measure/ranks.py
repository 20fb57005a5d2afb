"""Measure a step that several processes share, one per GPU: started by torchrun's launcher, sharded as by accelerate.

Each rank trains on data of its own. Its memory is followed storage by storage, as the planner follows its rank, and on
CUDA also read from the allocator; steps are timed between barriers, so that each takes as long as the slowest rank.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from peft_gauge import __version__, machine
from peft_gauge._internals.distributed import gathered, group_of_one_rank, mesh_of
from peft_gauge.collector import no_collector
from peft_gauge.counting import quantization_constants
from peft_gauge.errors import GaugeError, one_line
from peft_gauge.measure.memory import empty_cache, tracked_step
from peft_gauge.measure.passes import quiet, trains_base
from peft_gauge.memory.categories import (
    ADAPTER_WEIGHTS,
    BACKWARD,
    BASE_WEIGHTS,
    FORWARD,
    GATHERED_WEIGHTS,
    QUANTIZATION_CONSTANTS,
)
from peft_gauge.memory.sharded_tracker import ROUNDS, ShardedTracker
from peft_gauge.training import cases, methods, models
from peft_gauge.training.sharding import compute_dtype, packed_dtype, shard

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from peft_gauge.training.cases import Case
    from peft_gauge.training.models import ModelRecord
    from peft_gauge.training.sharding import Sharding
    from peft_gauge.training.step import TrainingJob

WARM_UP_STEPS = 2
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
STEP_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "deepspeed")
COMMUNICATION = ("nccl", "gloo:")
"""Beginnings of the names of a profiler's events for collectives: of kernels, and of a CPU's backend."""


REFUSED = f"{GaugeError.__name__}: "
"""Beginning of the message of a rank that refuses its work."""


@dataclass(frozen=True)
class SharedCase:
    """The work of all ranks.

    Fields:
        case: the case; its batch is that of each rank.
        base: the source of the base weights (`models.stored`).
        stream: token ids, int64 of one dimension: `cases.BATCHES` batches for each rank.
        sharding: ``None`` for one process, which others are compared with.
        rounds: timed steps.
        limit_seconds: how long a collective may wait for other ranks.
        port: of the ranks' rendezvous; 0 is a free one.
    """

    case: Case
    base: ModelRecord
    stream: Tensor
    sharding: Sharding | None
    rounds: int
    limit_seconds: float
    port: int = 0

    @property
    def ranks(self) -> int:
        return 1 if self.sharding is None else self.sharding.ranks

    @property
    def replicas(self) -> int:
        return 1 if self.sharding is None else self.sharding.replicas


def launch(shared: SharedCase) -> list[dict[str, Any]]:
    """Run the ranks of ``shared``, and return the record of each (`rank`), in their order.

    When a rank fails, the launcher ends the others. Raises `RuntimeError` with the rank and the reason, and
    `GaugeError` before any rank starts if they cannot share a step here (`check`); a time limit is the caller's
    (`peft_gauge.isolation.run`).
    """
    check(shared.case.device, shared.ranks, shared.port)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=shared.ranks,
        # c10d finds free ports; the ranks of static meet at the given one.
        rdzv_backend="static" if shared.port else "c10d",
        rdzv_endpoint=f"localhost:{shared.port}",
        rdzv_configs={"rank": 0} if shared.port else {},
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
    )
    try:
        found: dict[int, dict[str, Any]] = elastic_launch(config, rank)(shared)
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        signal = failure.signal_name() if failure.exitcode < 0 else ""
        message = _message(failure)
        if message.startswith(REFUSED):
            raise GaugeError(message.removeprefix(REFUSED)) from None
        reason = f"killed by {signal}" if signal and signal != "<N/A>" else one_line(message, 300)
        raise RuntimeError(f"rank {number} of {shared.ranks}: {reason}") from None
    return [found[number] for number in sorted(found)]


def check(device: str, ranks: int, port: int) -> None:
    """Raise `GaugeError` if ``ranks`` processes on ``device`` cannot share a step on this machine.

    Without this, a port in use makes each rank wait for a minute for a server that is not the launcher's, and a rank
    without a GPU ends with CUDA's "invalid device ordinal".
    """
    import torch
    import torch.distributed as dist

    backend = BACKENDS[device]
    if not dist.is_available() or not dist.is_backend_available(backend):
        raise GaugeError(
            f"torch {torch.__version__} has no backend {backend}, by which ranks on {device} communicate; install a "
            "build of torch with it (for nccl: one for CUDA on Linux)"
        )
    if device == "cuda" and ranks > torch.cuda.device_count():
        raise GaugeError(
            f"{ranks} ranks need as many GPUs, and torch sees {torch.cuda.device_count()}; use fewer --gpus"
        )
    if not 0 <= port < 2**16:
        raise GaugeError(f"--rank-port must be from 0 (a free one) to 65535, got {port}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the launcher's server: no wait after a run
        try:
            probe.bind(("", port))
        except OSError as error:
            raise GaugeError(
                f"the ranks cannot meet at port {port}: {error.strerror or error}; choose another --rank-port, or 0"
            ) from error


def versions() -> dict[str, str]:
    """The versions of this process that change a step, by name."""
    found = {"peft-gauge": __version__, **{name: machine.installed_version(name) for name in STEP_LIBRARIES}}
    return {name: version or "not installed" for name, version in found.items()}


def check_same(by_rank: list[dict[str, str]]) -> None:
    """Raise `GaugeError` if ranks have different `versions`: their steps, and the bytes that they expect of each
    other, would differ."""
    for name in by_rank[0]:
        found = [each.get(name) for each in by_rank]
        other = next((rank for rank, version in enumerate(found) if version != found[0]), None)
        if other is not None:
            raise GaugeError(
                f"ranks have different versions of {name}: {found[0]} on rank 0, {found[other]} on rank {other}; "
                "install the same everywhere"
            )


def _message(failure: Any) -> str:
    message = failure.message
    return str(message["message"] if isinstance(message, dict) else message)


def rank(shared: SharedCase) -> dict[str, Any]:
    """The record of this process, one of ``shared.ranks`` that a launcher has started.

    ``rank``; ``losses`` of the warm-up; ``step_seconds`` by round; ``communication_seconds`` of one step (kernels on
    CUDA; on a CPU the time in the backend), and ``communication_seconds_by_collective`` (gloo computes a reduce-scatter
    as an all-reduce, and its time is under that name); ``peak_bytes``, ``peak_by_category``, ``resident_bytes`` and
    ``communication`` of a followed step (`peft_gauge.plan.record.Plan`); on CUDA ``allocated_peak_bytes`` and
    ``reserved_peak_bytes`` of an unmodified one. Raises as a step does; see `launch`.
    """
    from torch.distributed.elastic.multiprocessing.errors import record

    recorded: Any = record(_rank)  # the launcher gets the message of an exception from a file
    found: dict[str, Any] = recorded(shared)
    return found


def _rank(shared: SharedCase) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    quiet()
    number, device = int(os.environ["LOCAL_RANK"]), shared.case.device
    if device == "cuda":
        torch.cuda.set_device(number)
    dist.init_process_group(BACKENDS[device], timeout=timedelta(seconds=shared.limit_seconds))
    try:
        everyone: list[dict[str, str]] = [{}] * shared.ranks
        dist.all_gather_object(everyone, versions())
        check_same(everyone)
        with ExitStack() as stack:
            if shared.sharding is not None and shared.sharding.is_zero:
                job, followed = _followed_from_the_start(shared, stack)
                found = {**_timed(shared, job), **followed}
            else:
                job, constants = _prepared(shared, mesh_of(device, shared.ranks, shared.replicas))
                found = {**_timed(shared, job), **_followed(shared, job, constants)}
            job.close()
        return {"rank": dist.get_rank(), **found}
    finally:
        dist.destroy_process_group()


def lone(shared: SharedCase) -> dict[str, Any]:
    """The memory of rank 0 of ``shared``, on a device without the other ranks: as `rank`, but no losses and no times.

    Collectives return at once and move no data, so that gathered weights, and all that is computed from them, are
    arbitrary. Memory does not depend on values.
    """
    quiet()
    with group_of_one_rank(shared.ranks, shared.case.device, shared.replicas) as mesh:
        job, constants = _prepared(shared, mesh)
        job.warm_up(WARM_UP_STEPS)
        found = {"rank": 0, **_allocated(shared, job), **_followed(shared, job, constants)}
        job.close()
        return found


def _allocated(shared: SharedCase, job: TrainingJob) -> dict[str, int]:
    """The allocator's peaks in one step; nothing on a CPU."""
    if shared.case.device != "cuda":
        return {}
    import torch

    empty_cache()
    torch.cuda.reset_peak_memory_stats()
    job.step()
    job.clear()
    return {
        "allocated_peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_peak_bytes": torch.cuda.max_memory_reserved(),
    }


def _timed(shared: SharedCase, job: TrainingJob) -> dict[str, Any]:
    import torch.distributed as dist

    job.warm_up(WARM_UP_STEPS)
    found: dict[str, Any] = {"losses": job.losses}
    found |= _allocated(shared, job)
    seconds = []
    for _ in range(shared.rounds):
        dist.barrier()
        _synchronize(shared.case.device)
        begin = time.perf_counter()
        job.step()
        _synchronize(shared.case.device)
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
        job.clear()
    found["step_seconds"] = seconds
    by_collective = _communication_seconds(job, shared.case.device)
    found["communication_seconds"] = sum(by_collective.values())
    found["communication_seconds_by_collective"] = by_collective
    return found


def _prepared(shared: SharedCase, mesh: Any) -> tuple[TrainingJob, list[Tensor]]:
    """This rank's job by FSDP2 or DDP, or that of a process alone; otherwise as `_job`."""
    from peft_gauge.training.step import TrainingJob

    def make(model: nn.Module, batches: list[dict[str, Tensor]]) -> TrainingJob:
        settings, sharding = shared.case.settings, shared.sharding
        return TrainingJob(model if sharding is None else shard(model, sharding, settings, mesh), batches, settings)

    return _job(shared, make)


def _followed_from_the_start(shared: SharedCase, stack: ExitStack) -> tuple[TrainingJob, dict[str, Any]]:
    """This rank's job by DeepSpeed's ZeRO, and the metrics of its third step, in which every storage is tracked.

    The engine keeps tensors that only the tracker can find, from when it creates them on. It ends with ``stack``.
    """
    import torch.distributed as dist

    from peft_gauge._internals.deepspeed import bucket_elements
    from peft_gauge.training import zero

    case, sharding = shared.case, shared.sharding
    assert sharding is not None
    tracker = _tracker(shared)
    dtype = compute_dtype(case.dtype, case.settings.mixed_precision)

    def make(model: nn.Module, batches: list[dict[str, Tensor]]) -> TrainingJob:
        zero.cast(model, dtype)
        tracker.bucket_elements = bucket_elements()
        engine = zero.zero_job(
            model,
            batches,
            case.settings,
            sharding=sharding,
            dtype=dtype,
            rank=dist.get_rank(),
            device=case.device,
        )
        with tracker:
            job = stack.enter_context(engine)
        zero.adopt_engine(tracker, model, job.engine, sharding, category_of)
        return job

    def category_of(name: str, parameter: nn.Parameter) -> str:
        return BASE_WEIGHTS if trains_base(case) or not parameter.requires_grad else ADAPTER_WEIGHTS

    with tracker.resizing():
        job, constants = _job(shared, make)
        tracker.adopt(constants, QUANTIZATION_CONSTANTS)
        for _ in range(zero.STEPS_BEFORE):
            with tracker:
                for _ in range(case.settings.grad_accumulation):
                    with tracker.phase(FORWARD):
                        job.forward()
                    with tracker.phase(BACKWARD):
                        job.backward()
                    job.clear()
                job.optimizer_step()
        with no_collector():
            found = tracked_step(job, trains_base(case), tracker)[1]
    return job, {**found, "communication": _communication(tracker)}


def _job(
    shared: SharedCase, make: Callable[[nn.Module, list[dict[str, Tensor]]], TrainingJob]
) -> tuple[TrainingJob, list[Tensor]]:
    """This rank's job, and the constants of its packed weights, which lose them when they are sharded."""
    import torch.distributed as dist

    case, sharding = shared.case, shared.sharding
    base = models.build(shared.base, dtype=case.dtype, attn_implementation=case.attention)
    storage = packed_dtype(sharding, case.dtype, case.settings.mixed_precision)
    base = methods.prepare_base(base, case.method, device=case.device, storage=storage)
    constants = [tensor for parameter in base.parameters() for tensor in quantization_constants(parameter)]
    own = cases.BATCHES * case.settings.batch * case.settings.seq
    stream = shared.stream[dist.get_rank() * own :][:own].clone()  # without the other ranks' data
    return cases.build_job(case, base=base, prepared=True, stream=stream, make=make), constants


def _synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def collective_of(event: str) -> str | None:
    """The collective of a profiler's event, as a plan names it, or "other"; ``None`` for no communication.

    Examples: ``gloo:all_gather``, ``ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)``.
    """
    name = event.lower()
    if not name.startswith(COMMUNICATION):
        return None
    letters = name.replace("_", "")
    return next((each for each in ROUNDS if each.replace("_", "") in letters), "other")


def _communication_seconds(job: TrainingJob, device: str) -> dict[str, float]:
    """Of one step, by collective: the time of its kernels, or, on a CPU, in the backend."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        job.step()
    job.clear()
    microseconds: dict[str, float] = {}
    for event in profiler.key_averages():
        collective = collective_of(event.key)
        if collective is not None:
            own = event.device_time_total if device == "cuda" else event.cpu_time_total
            microseconds[collective] = microseconds.get(collective, 0.0) + own
    return {collective: total / 1e6 for collective, total in microseconds.items()}


def _followed(shared: SharedCase, job: TrainingJob, constants: list[Tensor]) -> dict[str, Any]:
    """The metrics of one step in which every storage is tracked."""
    sharding = shared.sharding
    if sharding is None:
        return tracked_step(job, trains_base(shared.case))[1]
    tracker = _tracker(shared)
    tracker.adopt(constants, QUANTIZATION_CONSTANTS)
    tracker.adopt(gathered(job.model), GATHERED_WEIGHTS)
    with tracker.resizing(), no_collector():
        found = tracked_step(job, trains_base(shared.case), tracker)[1]
    return {**found, "communication": _communication(tracker)}


def _tracker(shared: SharedCase) -> ShardedTracker:
    sharding = shared.sharding
    assert sharding is not None
    return ShardedTracker(
        ranks=sharding.ranks,
        replicas=sharding.replicas,
        reduces=sharding.shards_weights,
        gathers_in_place=sharding.strategy == "zero3",
        vocabulary=shared.case.model.vocab_size,
        device_type=shared.case.device if sharding.is_zero else None,  # DeepSpeed also makes tensors on meta
    )


def _communication(tracker: ShardedTracker) -> dict[str, dict[str, int]]:
    return {name: {"calls": calls, "sent_bytes": tracker.sent_bytes[name]} for name, calls in tracker.calls.items()}


def summary(records: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Metrics over all ranks: ``tokens`` are those of one rank's step.

    Peaks and sent bytes are of a step whose storages are followed; ``rank_communication_seconds`` is the longest time
    of a rank in collectives, in one step.
    """
    if not records:
        raise GaugeError("there is no rank to summarize")
    peaks = [each["peak_bytes"] for each in records]
    seconds = statistics.median(map(max, zip(*(each["step_seconds"] for each in records), strict=True)))
    return {
        "ranks": len(records),
        "rank_peak_bytes": max(peaks),
        "rank_peak_bytes_sum": sum(peaks),
        "imbalance": max(peaks) / statistics.mean(peaks) - 1,
        "rank_sent_bytes": max(sum(one["sent_bytes"] for one in each["communication"].values()) for each in records),
        "rank_communication_seconds": max(each["communication_seconds"] for each in records),
        "rank_step_seconds": seconds,
        "ranks_tokens_per_second": tokens * len(records) / seconds,
    }
