"""Trace a step of `transformers.Trainer`, storage by storage: its ``train()`` runs unmodified on the planned model."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from peft_gauge._internals import moved
from peft_gauge._internals.accelerate import scale_losses, without_collection
from peft_gauge._internals.liger import has_liger, liger_on_fakes
from peft_gauge._internals.torch import (
    is_fake,
    moves_fakes,
    scaler_tensors,
    unset_fake_temporarily,
    without_modes,
    without_overflow,
)
from peft_gauge._internals.transformers import MASK_SKIPPED, has_mask_skipped
from peft_gauge._internals.trl import fused_head_on_fakes, has_offloading, lacks_fused_head, offloading_on_fakes
from peft_gauge.collector import no_collector
from peft_gauge.errors import GaugeError
from peft_gauge.fingerprint.module_attribution import ModuleAttribution
from peft_gauge.memory.categories import FORWARD, INPUTS, OPTIMIZER, OPTIMIZER_STATE
from peft_gauge.plan import fakes, policies
from peft_gauge.plan.addresses import Addresses
from peft_gauge.plan.reserve import OFFLOADING_BYTES, OFFLOADING_ORIGIN
from peft_gauge.plan.traced_step import (
    Trace,
    adopt_model,
    adopt_state,
    name_residents,
    new_tracker,
    note_uncounted,
)
from peft_gauge.training import trainers
from peft_gauge.training.step import check_scalable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer
    from transformers import Trainer

    from peft_gauge.counting import ParameterCount
    from peft_gauge.memory.ledger import Snapshot
    from peft_gauge.memory.tracker import StorageTracker
    from peft_gauge.plan.record import PlanRequest

TRACED_MICRO_BATCHES = 2
"""Accumulated micro-batches after the second are equal to it: the first creates the gradients, the second adds."""

_EXPECTED = frozenset(
    {
        "accelerate.data_loader.__iter__",  # a seed
        "bitsandbytes.functional.as_dict",  # for a state dict, which accelerate makes and drops before it shards
        "transformers.trainer._run_epoch",  # is the loss a number?
        "transformers.trainer._inner_training_loop",  # the same before transformers 5
        "transformers.trainer._finalize_training",
        "transformers.trainer._get_learning_rate",  # a tensor with torchao's optimizers
        "trl.trainer.sft_trainer.compute_loss",  # metrics: entropy, accuracy, number of tokens
        # The number of tokens with a label, and whether the loss's own gradient is 1.
        "liger_kernel.ops.fused_linear_cross_entropy.fused_linear_cross_entropy_forward",
        "liger_kernel.ops.fused_linear_cross_entropy.fused_linear_cross_entropy_backward",
        "liger_kernel.ops.cross_entropy.cross_entropy_forward",
        "liger_kernel.ops.cross_entropy.cross_entropy_backward",
        # The tokens with a label, which here are all.
        "trl.trainer.utils._fused_forward",
        "peft_gauge._internals.deepspeed.read_or_zero",  # did gradients overflow, and do ranks agree?
        "cut_cross_entropy.utils._build_flat_valids",
    }
)
"""Callers that read values on which no allocation depends, or that a plan knows."""


def unexpected(warnings: Iterable[str]) -> Iterator[str]:
    """The warnings on values that a step reads, less those without an effect."""
    return (each for each in warnings if each.partition(" reads ")[0] not in _EXPECTED)


def follow_trainer(
    request: PlanRequest,
    model: nn.Module,
    base: Sequence[Tensor],
    counted: ParameterCount,
    notes: list[str],
    *,
    located: bool = False,
) -> Trace:
    """Trace a steady step of ``model`` by the request's loop; as `peft_gauge.plan.traced_step.follow` else."""
    places = ModuleAttribution(model, fold=False) if located else None
    tracker = new_tracker(request, places)
    listener = _Steps(tracker, functools.partial(_sort, request, model, notes, places))
    fake = any(map(is_fake, model.parameters()))
    with ExitStack() as stack:
        folder = stack.enter_context(trainers.alone())
        if fake:
            stack.enter_context(moves_fakes())
            if _uses_liger(request):
                stack.enter_context(liger_on_fakes())
        trainers.mark_quantized(model, request.method)
        offloaded = (
            stack.enter_context(offloading_on_fakes(Addresses(tracker).of)) if fake and _offloads(request) else None
        )
        with unset_fake_temporarily():
            settings = trainers.arguments(request.loop, _arguments(request, notes), folder)
            trainer = trainers.build(request.loop, model, settings, steps=1, seq=request.settings.seq)
            listener.scaler = _scaler(request, trainer)
            trainer.create_optimizer()  # now, since 8-bit ones compute code books from values
        adopt_model(tracker, model, base)  # a trainer may have cast adapters
        notes += _unreplaced(request)
        if request.loop == "sft":
            stack.enter_context(fused_head_on_fakes() if fake else contextlib.nullcontext())
        trainer.data_collator = _Batches(request, model, tracker, trainer.data_collator, fake=fake)
        stack.enter_context(no_collector())
        stack.enter_context(without_collection())
        stack.enter_context(places or contextlib.nullcontext())
        stack.enter_context(tracker)
        with contextlib.suppress(_Traced):
            trainers.run(trainer, listener)
    tracker.close()
    assert listener.found is not None, "the trainer ended before its step did"
    if offloaded is not None:
        notes.append(
            f"activation offloading: at most {offloaded.peak_bytes / 1e9:.2f} GB of activations in pinned host memory; "
            f"{OFFLOADING_BYTES / 1e6:.0f} MB of the device's memory are for it, {OFFLOADING_ORIGIN}"
        )
    note_uncounted(tracker, notes)
    done = listener.found
    traced = traced_micro_batches(request)
    return Trace(
        tracker=tracker,
        made_after_update=frozenset(),
        counted=counted,
        peak=done.peak,
        resident=done.resident,
        live_outputs_bytes=done.updated.bytes,
        saved_activation_bytes=done.saved_activation_bytes,
        flops=tracker.flops // traced * request.settings.grad_accumulation,
        offloads=offloaded is not None,
    )


def _uses_liger(request: PlanRequest) -> bool:
    """Whether the request's trainer replaces parts of the model by Liger's, and they can be planned here."""
    return bool(dict(request.trainer_arguments).get("use_liger_kernel")) and has_liger()


def _offloads(request: PlanRequest) -> bool:
    """Whether the request's trainer keeps activations in host memory. Raises `GaugeError` if this cannot be planned."""
    if request.loop != "sft" or not dict(request.trainer_arguments).get("activation_offloading"):
        return False
    if not has_offloading():
        raise GaugeError("activation offloading of this TRL cannot be planned; install trl 1.16")
    return True


def _unreplaced(request: PlanRequest) -> Iterator[str]:
    """A note on each part of a library that the step on fakes needs replaced, and that this release has moved."""
    if not request.padded and not has_mask_skipped():
        yield moved("transformers", f"masking_utils.{MASK_SKIPPED}")
    if request.loop == "sft" and lacks_fused_head():
        yield moved("trl", "kernel of its fused output projection")


class _Traced(Exception):
    """The traced step is over; it ends the trainer's run."""


@dataclass(frozen=True)
class _Found:
    peak: Snapshot
    updated: Snapshot
    resident: Snapshot
    saved_activation_bytes: int


class _Steps:
    """Follows a trainer (`trainers.Listener`): phases of the log, and snapshots of its step."""

    def __init__(self, tracker: StorageTracker, prepare: Callable[[StorageTracker, Optimizer], None]) -> None:
        self.found: _Found | None = None
        self.scaler: torch.amp.GradScaler | None = None
        self._tracker = tracker
        self._prepare = prepare
        self._step = ExitStack()
        self._updated: Snapshot | None = None

    def phase(self, name: str) -> AbstractContextManager[None]:
        return self._tracker.phase(name)

    def loss_computed(self, loss: Tensor) -> None:
        pass

    def step_begins(self, number: int, optimizer: Optimizer) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        fakes.prime(optimizer)
        self._prepare(self._tracker, optimizer)
        if self.scaler is not None:
            self.scaler.scale(torch.zeros(()))  # creates the scale
            self._tracker.adopt(scaler_tensors(self.scaler), OPTIMIZER_STATE)
        self._tracker.start_over()
        # Clipping, the update, and the rest of the trainer's work outside forward and backward.
        self._step.enter_context(self._tracker.phase(OPTIMIZER))

    def updated(self, number: int) -> None:
        self._updated = self._tracker.live(blocks=True)

    def step_ended(self, number: int) -> None:
        self._step.close()
        assert self._updated is not None
        tracker = self._tracker
        resident = tracker.live(blocks=True)
        self.found = _Found(tracker.peak(blocks=True), self._updated, resident, tracker.kept_bytes(FORWARD))
        tracker.close()
        raise _Traced


def _sort(
    request: PlanRequest,
    model: nn.Module,
    notes: list[str],
    places: ModuleAttribution | None,
    tracker: StorageTracker,
    optimizer: Optimizer,
) -> None:
    """Sort the optimizer's state by category, and what exists before the traced step by module."""
    adopt_state(optimizer, tracker, request.settings, notes)
    if places is not None:
        name_residents(tracker, model, optimizer)


class _Batches:
    """A collator around the trainer's own: its batch on the model's device, as after the copy from the host."""

    def __init__(
        self, request: PlanRequest, model: nn.Module, tracker: StorageTracker, collator: Any, *, fake: bool
    ) -> None:
        self._request = request
        self._model = model
        self._tracker = tracker
        self._collator = collator
        self._fake = fake
        self._untraced: list[dict[str, Any]] = []

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        batch = self._copied(rows)
        if not self._untraced:
            # A trainer fetches all micro-batches of a step before the first; some of them are not traced.
            more = self._request.settings.grad_accumulation - traced_micro_batches(self._request)
            self._untraced = [self._copied(rows) for _ in range(more)]
        return batch

    def _copied(self, rows: list[Any]) -> dict[str, Any]:
        with without_modes():
            collated = self._collator(rows)
        if self._request.padded and "attention_mask" not in collated:
            collated["attention_mask"] = collated["input_ids"]
        batch = {
            name: self._on_device(value) if isinstance(value, torch.Tensor) else value
            for name, value in collated.items()
        }
        batch |= policies.extra_inputs(self._model, self._request.settings.batch, self._request.settings.seq)
        self._tracker.adopt((each for each in batch.values() if isinstance(each, torch.Tensor)), INPUTS)
        return batch

    def _on_device(self, collated: Tensor) -> Tensor:
        return torch.empty_like(collated) if self._fake else collated.clone()


def traced_micro_batches(request: PlanRequest) -> int:
    return min(request.settings.grad_accumulation, TRACED_MICRO_BATCHES)


def _arguments(request: PlanRequest, notes: list[str]) -> dict[str, Any]:
    """The trainer's arguments for the request's settings, and the request's further ones; adds a note for each that is
    not planned."""
    settings = request.settings
    further = dict(request.trainer_arguments)
    for name, why in trainers.NOT_PLANNED.items():
        if name in trainers.OF_LIGER and _uses_liger(request):
            continue
        if further.pop(name, None):
            notes.append(f"{name} is left out of this plan: {why}")
    kwargs = further.get("gradient_checkpointing_kwargs") or {}
    if request.checkpoint_reentrant is not None:
        kwargs = {**kwargs, "use_reentrant": request.checkpoint_reentrant}
    return {
        **further,
        "per_device_train_batch_size": settings.batch,
        "gradient_accumulation_steps": traced_micro_batches(request),
        "gradient_checkpointing": settings.grad_checkpointing,
        "gradient_checkpointing_kwargs": kwargs or None,
        "bf16": settings.mixed_precision == "bf16",
        "fp16": settings.mixed_precision == "fp16",
        "optim": trainers.OPTIM.get(settings.optimizer, settings.optimizer),
        "max_grad_norm": settings.clip_grad_norm or 0.0,
        "learning_rate": settings.learning_rate,
    }


def _scaler(request: PlanRequest, trainer: Trainer) -> torch.amp.GradScaler | None:
    if request.settings.mixed_precision != "fp16":
        return None
    check_scalable(request.settings, trainer.model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    without_overflow(scaler)
    scale_losses(trainer.accelerator, scaler)
    return scaler
