"""Trace one rank's part of a step that FSDP2 or DDP splits over several GPUs.

The libraries' own code runs on fake tensors in a process group of one real rank, whose collectives return at once
(`peft_gauge._internals.distributed`): which blocks are gathered when, prefetching, casts, padding and buckets are
theirs. The first step creates what they create lazily; the second one is traced.
"""

from __future__ import annotations

import contextlib
import dataclasses
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from peft_gauge._internals.bitsandbytes import quant_states_of_modules
from peft_gauge._internals.distributed import ddp_on_fakes, gathered, group_of_one_rank
from peft_gauge._internals.torch import unset_fake_temporarily
from peft_gauge.counting import quantization_constants
from peft_gauge.fingerprint.module_attribution import ModuleAttribution
from peft_gauge.memory.categories import BACKWARD, FORWARD, GATHERED_WEIGHTS, QUANTIZATION_CONSTANTS
from peft_gauge.memory.sharded_tracker import ALL_REDUCE, ShardedTracker
from peft_gauge.memory.tracker import no_collector
from peft_gauge.plan.record import Collective
from peft_gauge.plan.traced_step import (
    Trace,
    adopt_model,
    job_of,
    name_residents,
    new_tracker,
    note_uncounted,
    prime,
    trace_step,
)
from peft_gauge.training import sharding

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor, nn

    from peft_gauge.counting import ParameterCount
    from peft_gauge.plan.record import PlanRequest


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
                mesh = stack.enter_context(group_of_one_rank(request.sharding.ranks))
        if on_fakes and request.method.quantization is not None:
            stack.enter_context(quant_states_of_modules())
        places = ModuleAttribution(model, fold=False) if located else None
        tracker = new_tracker(request, places)
        assert isinstance(tracker, ShardedTracker)
        if request.sharding.strategy == "ddp" and on_fakes:
            stack.enter_context(ddp_on_fakes(lambda bucket: tracker.note_collective(ALL_REDUCE, [bucket])))
        stack.enter_context(tracker.resizing())
        # DDP allocates its buckets here. FSDP2 copies its shards out of whole weights, which a run then frees.
        with tracker if request.sharding.strategy == "ddp" else contextlib.nullcontext():
            prepared = sharding.shard(model, request.sharding, request.settings, mesh)
        adopt_model(tracker, model, [p for name, p in model.named_parameters() if name in base_names])
        tracker.adopt(constants, QUANTIZATION_CONSTANTS)  # of weights that no longer have them: each rank holds all
        job, call = job_of(request, prepared, tracker)
        prime(job, tracker, request.settings, notes)
        stack.enter_context(no_collector())
        stack.enter_context(places or contextlib.nullcontext())
        with tracker:
            with tracker.phase(FORWARD):
                job.forward()
            with tracker.phase(BACKWARD):
                job.backward()
            job.clear()
            call.let_go()
        tracker.adopt(gathered(model), GATHERED_WEIGHTS)
        if places is not None:
            name_residents(tracker, model, job.optimizer)
        trace = trace_step(job, call, tracker, request, counted, [])
        tracker.close()
    note_uncounted(tracker, notes)
    notes += _remarks(request, model)
    return dataclasses.replace(
        trace,
        communication={
            name: Collective(calls, tracker.sent_bytes[name]) for name, calls in sorted(tracker.calls.items())
        },
    )


def _remarks(request: PlanRequest, model: nn.Module) -> Iterator[str]:
    assert request.sharding is not None
    yield (
        "each rank's memory; NCCL's own buffers (outside the allocator) are not counted, and FSDP's streams, each with "
        "a pool of its own, can raise the reserved memory"
    )
    if request.sharding.strategy == "fsdp2":
        blocks = len(sharding.units(model))
        yield f"FSDP2 gathers {blocks} units, as accelerate's transformer-based wrapping makes them"
