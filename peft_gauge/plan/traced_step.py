"""Trace one steady training step, storage by storage, on tensors with or without data."""

from __future__ import annotations

import contextlib
import functools
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from peft_gauge._internals.torch import scaler_tensors, unset_fake_temporarily, without_overflow
from peft_gauge.collector import no_collector
from peft_gauge.counting import ParameterCount, constant_buffers, quantization_constants
from peft_gauge.fingerprint.module_attribution import UNKNOWN, ModuleAttribution
from peft_gauge.memory.categories import (
    ACTIVATIONS,
    ADAPTER_WEIGHTS,
    BACKWARD,
    BASE_WEIGHTS,
    BUFFERS,
    DEQUANTIZED_TEMPORARIES,
    FORWARD,
    HOST,
    INPUTS,
    LOGITS_AND_LOSS,
    OPERATOR_CATEGORY,
    OPTIMIZER,
    OPTIMIZER_STATE,
    QUANTIZATION_CONSTANTS,
)
from peft_gauge.memory.ledger import Snapshot, rounded
from peft_gauge.memory.tracker import StorageTracker
from peft_gauge.plan import fakes, kernels, policies
from peft_gauge.plan.call import ModelCall
from peft_gauge.traces.sites import site_here
from peft_gauge.training import stored_layers
from peft_gauge.training.step import TrainingJob

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from peft_gauge.plan.record import Collective, PlanRequest
    from peft_gauge.training.settings import StepSettings

TRACED_MICRO_BATCHES = 3
"""Accumulated micro-batches after the second are all equal: the first creates the gradients, the second adds to them,
and the third shows that the second was steady."""

ELEMENTWISE = (
    *OPERATOR_CATEGORY,
    stored_layers.DEQUANTIZE,
    "bitsandbytes::optimizer_",
    "bitsandbytes::int8_vectorwise_quant",
)
"""Names, or prefixes of names, of library operators without matrix products."""

PAGED_FROM_ELEMENTS = 100_000  # bitsandbytes: smaller states are not paged (optim/optimizer.py, get_state_buffer)


@dataclass(frozen=True)
class Trace:
    """One steady step: its log, and the allocated memory at the moments that a plan reports.

    ``made_after_update``: storages (`Event.storage`) that a run creates once, right after its first update.
    ``offloads``: whether activations were kept in host memory. ``host_bytes``: the most that a sharded step keeps
    there.
    """

    tracker: StorageTracker
    made_after_update: frozenset[int]
    counted: ParameterCount
    peak: Snapshot
    resident: Snapshot
    live_outputs_bytes: int
    saved_activation_bytes: int
    flops: int
    communication: Mapping[str, Collective] = field(default_factory=dict)
    offloads: bool = False
    host_bytes: int | None = None


def follow(
    request: PlanRequest,
    model: nn.Module,
    base: Iterable[Tensor],
    counted: ParameterCount,
    notes: list[str],
    *,
    located: bool = False,
) -> Trace:
    """Trace one steady step of ``model``, adapted as in ``request``; ``base`` are its parameters before adaptation.

    The tensors may be fake (inside a fake mode) or real. Adds to ``notes`` what the trace cannot see. ``located``:
    also record the module and the Python function that created each storage, which takes longer.
    """
    places = ModuleAttribution(model, fold=False) if located else None
    tracker = new_tracker(request, places)
    adopt_model(tracker, model, base)
    job, call = job_of(request, model, tracker)
    prime(job, tracker, request.settings, notes)
    importance = _prime_importance(job, model, tracker, notes)
    if places is not None:
        name_residents(tracker, model, job.optimizer)
    with no_collector(), places or contextlib.nullcontext():
        trace = trace_step(job, call, tracker, request, counted, importance)
    tracker.close()
    note_uncounted(tracker, notes)
    return trace


def new_tracker(request: PlanRequest, places: ModuleAttribution | None = None) -> StorageTracker:
    """A tracker for ``request``'s step, which also records where each storage was created if there are ``places``."""
    options: dict[str, Any] = {
        "vocabulary": request.model.vocab_size,
        "operator_categories": {**OPERATOR_CATEGORY, stored_layers.DEQUANTIZE: DEQUANTIZED_TEMPORARIES},
        "workspaces": kernels.CUDA_WORKSPACES,
        "where": None if places is None else functools.partial(_where, places),
    }
    if request.sharding is None:
        return StorageTracker(**options)
    from peft_gauge.memory.sharded_tracker import ShardedTracker

    if request.sharding.is_zero:  # DeepSpeed also makes tensors on meta
        options["device_type"] = "cpu"
    return ShardedTracker(
        ranks=request.sharding.ranks,
        replicas=request.sharding.replicas,
        reduces=request.sharding.shards_weights,
        gathers_in_place=request.sharding.strategy == "zero3",
        **options,
    )


def note_uncounted(tracker: StorageTracker, notes: list[str]) -> None:
    """Add a note for each operator of a library whose operations are not counted."""
    uncounted = sorted(name for name in tracker.operators_without_flops if not name.startswith(ELEMENTWISE))
    notes += [f"{name}: its operations are not in flops_per_step" for name in uncounted]


def _where(places: ModuleAttribution) -> tuple[str, str]:
    module = places.now
    return "" if module == UNKNOWN else module, site_here(sys._getframe(1))


def name_residents(tracker: StorageTracker, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Assign the storages that exist before the step to the module of their parameter."""
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {}).values()
        held = [parameter, *quantization_constants(parameter), *(t for t in state if isinstance(t, torch.Tensor))]
        for number in tracker.storages(held):
            tracker.records[number].module = name.rpartition(".")[0]


def adopt_model(tracker: StorageTracker, model: nn.Module, base: Iterable[Tensor]) -> None:
    """Track the model's tensors, by category; ``base`` are the parameters that are not the adapter's."""
    tracker.adopt(model.buffers(), BUFFERS)
    tracker.adopt(constant_buffers(model), QUANTIZATION_CONSTANTS)
    tracker.adopt(fakes.plain_tensors(model), BUFFERS)
    known = set(map(id, base))
    for parameter in model.parameters():
        tracker.adopt(parameter, BASE_WEIGHTS if id(parameter) in known else ADAPTER_WEIGHTS)
        tracker.adopt(quantization_constants(parameter), QUANTIZATION_CONSTANTS)


def job_of(request: PlanRequest, model: nn.Module, tracker: StorageTracker) -> tuple[TrainingJob, ModelCall]:
    batch = inputs_of(request, model, tracker)
    call = call_of(request, model)
    with unset_fake_temporarily():  # 8-bit optimizers have code books that are computed from values
        job = TrainingJob(call, [batch], request.settings)
    return job, call


def inputs_of(request: PlanRequest, model: nn.Module, tracker: StorageTracker) -> dict[str, Tensor]:
    """A batch for ``model``, tracked as the step's inputs."""
    settings = request.settings
    tokens = torch.zeros(settings.batch, settings.seq, dtype=torch.long)
    batch = {"input_ids": tokens, "labels": tokens}
    batch |= policies.extra_inputs(model, settings.batch, settings.seq)
    if request.padded:
        batch["attention_mask"] = torch.ones_like(tokens)
    tracker.adopt(batch.values(), INPUTS)
    return batch


def call_of(request: PlanRequest, model: nn.Module) -> ModelCall:
    return ModelCall(model, use_cache=request.use_cache, hold_outputs=request.hold_outputs or request.use_cache)


def prime(job: TrainingJob, tracker: StorageTracker, settings: StepSettings, notes: list[str]) -> None:
    """Create the optimizer's state, as after the first step of a run, and mark the part that the device holds."""
    fakes.prime(job.optimizer)
    if job.scaler is not None:
        without_overflow(job.scaler)
        job.scaler.scale(torch.zeros(()))
        tracker.adopt(scaler_tensors(job.scaler), OPTIMIZER_STATE)
    adopt_state(job.optimizer, tracker, settings, notes)


def adopt_state(
    optimizer: torch.optim.Optimizer, tracker: StorageTracker, settings: StepSettings, notes: list[str]
) -> None:
    """Track the optimizer's state; the part that a GPU does not hold as the host's."""
    fused = optimizer.param_groups[0].get("fused")
    rates = (group.get("lr") for group in optimizer.param_groups)
    tracker.adopt((rate for rate in rates if isinstance(rate, torch.Tensor)), HOST)  # torchao's, on the CPU
    paged = 0
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                continue
            on_host = name == "step" and not fused  # torch has the counter of an unfused AdamW on the CPU
            if settings.optimizer.startswith("paged") and name in ("state1", "state2"):
                on_host = parameter.numel() >= PAGED_FROM_ELEMENTS
                paged += value.nbytes if on_host else 0
            tracker.adopt(value, HOST if on_host else OPTIMIZER_STATE)
    if paged:
        notes.append(
            f"paged optimizer: {paged} bytes of its state are managed memory, outside the allocator; they move to the "
            f"device during an update, as far as there is room, and are not counted"
        )


def _prime_importance(job: TrainingJob, model: nn.Module, tracker: StorageTracker, notes: list[str]) -> list[Tensor]:
    """Create and return the importance statistics that AdaLoRA and AdaMSS keep between steps. A training loop
    does it through ``update_and_allocate``, which `TrainingJob` leaves out because it reads values."""
    if not policies.keeps_importance(model):
        return []
    known = set(map(id, fakes.plain_tensors(model)))
    for parameter in job.trainable:
        parameter.grad = torch.empty_like(parameter)
    policies.update_importance(model)
    job.clear()
    made = [tensor for tensor in fakes.plain_tensors(model) if id(tensor) not in known]
    if made:
        tracker.adopt(made, BUFFERS)
        notes.append("importance of each weight: its buffers are counted; their update after a step is not traced")
    return made


def trace_step(
    job: TrainingJob,
    call: ModelCall,
    tracker: StorageTracker,
    request: PlanRequest,
    counted: ParameterCount,
    importance: Iterable[Tensor],
) -> Trace:
    """Run one step as in `TrainingJob.step`, with its phases marked, and take snapshots after it."""
    micro_batches = request.settings.grad_accumulation
    traced = min(micro_batches, TRACED_MICRO_BATCHES)
    tracker.start_over()
    made_after_update = tracker.storages(importance)
    with tracker:
        for _ in range(traced):
            with tracker.phase(FORWARD):
                tracker.label(job.forward(), LOGITS_AND_LOSS)
            with tracker.phase(BACKWARD):
                job.backward()
        with tracker.phase(OPTIMIZER):
            job.optimizer_step()
        after = tracker.live(blocks=True)
        job.clear()
        call.let_go()
        resident = tracker.live(blocks=True)
    held = 0 if call.hold_outputs else sum(map(rounded, call.output_bytes))
    return Trace(
        tracker=tracker,
        made_after_update=made_after_update,
        counted=counted,
        peak=tracker.peak(blocks=True),
        resident=resident,
        live_outputs_bytes=after.bytes + held,
        saved_activation_bytes=tracker.kept_bytes(FORWARD, (ACTIVATIONS,)),
        flops=tracker.flops // traced * micro_batches,
    )
