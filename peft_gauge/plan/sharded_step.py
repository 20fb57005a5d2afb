"""Trace one rank's part of a step that FSDP2, DDP or DeepSpeed's ZeRO splits over several GPUs.

The libraries' own code runs on fake tensors in a process group of one real rank, whose collectives return at once
(`peft_gauge._internals.distributed`): which blocks are gathered when, prefetching, casts, padding and buckets are
theirs. The first step creates what they create lazily; the second one is traced.
"""

from __future__ import annotations

import contextlib
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import is_tensor

from peft_gauge._internals.bitsandbytes import quant_states_of_modules
from peft_gauge._internals.deepspeed import bucket_elements, host_buffers, release, zero_on_fakes
from peft_gauge._internals.distributed import ddp_on_fakes, gathered, group_of_one_rank
from peft_gauge._internals.torch import is_fake, unset_fake_temporarily
from peft_gauge.collector import no_collector
from peft_gauge.counting import quantization_constants
from peft_gauge.fingerprint.module_attribution import ModuleAttribution
from peft_gauge.memory.categories import (
    ADAPTER_WEIGHTS,
    BACKWARD,
    BASE_WEIGHTS,
    FORWARD,
    GATHERED_WEIGHTS,
    HOST,
    QUANTIZATION_CONSTANTS,
)
from peft_gauge.memory.sharded_tracker import ALL_REDUCE, ShardedTracker
from peft_gauge.plan.record import Collective
from peft_gauge.plan.traced_step import (
    TRACED_MICRO_BATCHES,
    Trace,
    adopt_model,
    adopt_state,
    call_of,
    inputs_of,
    job_of,
    name_residents,
    new_tracker,
    note_uncounted,
    prime,
    trace_step,
)
from peft_gauge.training import sharding, zero

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator

    from torch import Tensor, nn

    from peft_gauge.counting import ParameterCount
    from peft_gauge.plan.call import ModelCall
    from peft_gauge.plan.record import PlanRequest
    from peft_gauge.training.step import TrainingJob


def follow_sharded(
    request: PlanRequest,
    model: nn.Module,
    base: Iterable[Tensor],
    counted: ParameterCount,
    notes: list[str],
    *,
    located: bool = False,
    mesh: Any = None,
) -> Trace:
    """Trace a steady step of one rank of ``request.sharding``; otherwise as `peft_gauge.plan.traced_step.follow`.

    ``mesh``: a real group's, for real tensors.
    """
    assert request.sharding is not None, "the planner calls this for sharded steps only"
    known = set(map(id, base))
    constants = [tensor for parameter in model.parameters() for tensor in quantization_constants(parameter)]
    base_names = {name for name, parameter in model.named_parameters() if id(parameter) in known}
    with ExitStack() as stack:
        on_fakes = mesh is None
        if on_fakes:
            with unset_fake_temporarily():
                mesh = stack.enter_context(
                    group_of_one_rank(request.sharding.ranks, replicas=request.sharding.replicas)
                )
        if on_fakes and request.method.quantization is not None:
            stack.enter_context(quant_states_of_modules())
        places = ModuleAttribution(model, fold=False) if located else None
        tracker = new_tracker(request, places)
        assert isinstance(tracker, ShardedTracker)
        if request.sharding.strategy == "ddp" and on_fakes:
            stack.enter_context(ddp_on_fakes(lambda bucket: tracker.note_collective(ALL_REDUCE, [bucket])))
        stack.enter_context(tracker.resizing())
        if request.sharding.is_zero:
            job, call = stack.enter_context(_zero_job(request, model, base_names, tracker, mesh.get_rank(), notes))
        else:
            job, call = _prepared_job(request, model, base_names, tracker, mesh, notes)
        tracker.adopt(constants, QUANTIZATION_CONSTANTS)  # of weights that no longer have them: each rank holds all
        stack.enter_context(no_collector())
        stack.enter_context(places or contextlib.nullcontext())
        if not request.sharding.is_zero:
            if request.sharding.offload:
                _offload(job, model, tracker)
            _first_step(job, call, tracker)
        tracker.adopt(gathered(model), GATHERED_WEIGHTS)
        if places is not None:
            name_residents(tracker, model, job.optimizer)
        trace = trace_step(job, call, tracker, request, counted, [])
        tracker.close()
    note_uncounted(tracker, notes)
    notes += _remarks(request, model)
    return replace(
        trace,
        host_bytes=tracker.host_peak_bytes() if request.sharding.offload else None,
        communication={
            name: Collective(calls, tracker.sent_bytes[name]) for name, calls in sorted(tracker.calls.items())
        },
    )


def _prepared_job(
    request: PlanRequest,
    model: nn.Module,
    base_names: Container[str],
    tracker: ShardedTracker,
    mesh: Any,
    notes: list[str],
) -> tuple[TrainingJob, ModelCall]:
    """The job of a rank under FSDP2 or DDP, with the optimizer's state."""
    assert request.sharding is not None
    # DDP allocates its buckets here. FSDP2 copies its shards out of whole weights, which a run then frees.
    with tracker if request.sharding.strategy == "ddp" else contextlib.nullcontext():
        prepared = sharding.shard(model, request.sharding, request.settings, mesh)
    adopt_model(tracker, model, [p for name, p in model.named_parameters() if name in base_names])
    job, call = job_of(request, prepared, tracker)
    prime(job, tracker, request.settings, notes)
    return job, call


def _offload(job: TrainingJob, model: nn.Module, tracker: ShardedTracker) -> None:
    """Move this rank's shards and the optimizer's state to host memory, as `CPUOffloadPolicy` has it.

    The policy itself would do nothing here: the fakes are on the CPU already.
    """
    tracker.adopt(model.parameters(), HOST)
    _offload_state(job, tracker)
    tracker.offloads_shards = tracker.offloads_gradients = tracker.offloads_update = True


def _offload_state(job: TrainingJob, tracker: ShardedTracker) -> None:
    for state in job.optimizer.state.values():
        tracker.adopt((value for value in state.values() if is_tensor(value)), HOST)


def _first_step(job: TrainingJob, call: ModelCall, tracker: ShardedTracker) -> None:
    with tracker:
        with tracker.phase(FORWARD):
            job.forward()
        with tracker.phase(BACKWARD):
            job.backward()
        job.clear()
        call.let_go()


@contextlib.contextmanager
def _zero_job(
    request: PlanRequest,
    model: nn.Module,
    base_names: Container[str],
    tracker: ShardedTracker,
    rank: int,
    notes: list[str],
) -> Iterator[tuple[TrainingJob, ModelCall]]:
    """The job of a rank under ZeRO, with the optimizer's state, after `zero.STEPS_BEFORE` steps."""
    assert request.sharding is not None
    settings = replace(
        request.settings, grad_accumulation=min(request.settings.grad_accumulation, TRACED_MICRO_BATCHES)
    )
    dtype = sharding.compute_dtype(request.dtype, settings.mixed_precision)
    zero.cast(model, dtype)
    batch = inputs_of(request, model, tracker)
    with ExitStack() as stack:
        if any(map(is_fake, model.parameters())):
            stack.enter_context(zero_on_fakes())
        tracker.bucket_elements = bucket_elements()
        with tracker:
            job = stack.enter_context(
                zero.zero_job(
                    model,
                    [batch],
                    settings,
                    sharding=request.sharding,
                    dtype=dtype,
                    rank=rank,
                    wrapped=partial(call_of, request),
                )
            )
            call = cast("ModelCall", job.model)
        zero.adopt_engine(
            tracker,
            model,
            job.engine,
            request.sharding,
            lambda name, _: BASE_WEIGHTS if name in base_names else ADAPTER_WEIGHTS,
        )
        tracker.offloads_shards = request.sharding.offloads_shards
        tracker.offloads_update = request.sharding.offloads_update
        for _ in range(zero.STEPS_BEFORE):
            for _ in range(settings.grad_accumulation):
                _first_step(job, call, tracker)
            with tracker:
                job.optimizer_step()
        adopt_state(job.optimizer, tracker, settings, notes)
        if request.sharding.offloads_update:
            _offload_state(job, tracker)
            tracker.adopt(host_buffers(job.engine), HOST)  # some are made in the first step
        yield job, call


def _remarks(request: PlanRequest, model: nn.Module) -> Iterator[str]:
    assert request.sharding is not None
    owner = "FSDP" if request.sharding.strategy == "fsdp2" else "the library"
    yield (
        f"each rank's memory; NCCL's own buffers (outside the allocator) are not counted, and {owner}'s streams, each "
        "with a pool of its own, can raise the reserved memory"
    )
    if request.sharding.is_zero:
        dtype = sharding.compute_dtype(request.dtype, request.settings.mixed_precision)
        nbytes, name = bucket_elements() * dtype.itemsize, str(dtype).removeprefix("torch.")
        yield (
            f"{release()} with accelerate's defaults: all weights in {name}, and gradients are reduced in buckets of "
            f"{nbytes / 1e9:g} GB whatever the model's size (reduce_bucket_size); a smaller size saves the difference"
        )
    if request.sharding.offload:
        parts = {
            "shards of weights": request.sharding.offloads_shards,
            "gradients, and the update with its state": request.sharding.offloads_update,
        }
        gathers = "; each gather copies one shard to the GPU" if request.sharding.offloads_shards else ""
        yield (
            f"offloaded by analysis: {' and '.join(part for part, is_there in parts.items() if is_there)} are counted "
            f"in host memory{gathers}"
        )
    if request.sharding.strategy == "fsdp2":
        blocks = len(sharding.units(model))
        yield f"FSDP2 gathers {blocks} units, as accelerate's transformer-based wrapping makes them"
