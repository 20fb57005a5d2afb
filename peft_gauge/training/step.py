"""The measured training step: the same code for every method and device.

A step is a forward pass, a backward pass and an optimizer update. Gradients are cleared at its start: so the memory
between two steps is persistent, and a peak can be taken over whole steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_gauge._internals.distributed import local_of
from peft_gauge._internals.transformers import attention_of
from peft_gauge.errors import GaugeError, one_line
from peft_gauge.training.settings import OPTIMIZERS, StepSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def build_optimizer(
    parameters: Sequence[nn.Parameter], settings: StepSettings, model: nn.Module | None = None
) -> torch.optim.Optimizer:
    """The optimizer over ``parameters``. AdamW uses torch's default implementation unless the name selects another.

    ``model``: for optimizers of transformers that read it. Raises `GaugeError` if the optimizer's library is missing.
    """
    rate = settings.learning_rate
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate)
    if settings.optimizer in ("adamw8bit", "paged-adamw8bit"):
        import bitsandbytes

        kind = bitsandbytes.optim.AdamW8bit if settings.optimizer == "adamw8bit" else bitsandbytes.optim.PagedAdamW8bit
        return kind(parameters, lr=rate)
    if settings.optimizer not in OPTIMIZERS:
        return _transformers_optimizer(parameters, settings, model)
    fused = True if settings.optimizer == "adamw-fused" else None
    foreach = False if settings.optimizer == "adamw-foreach-off" else None
    return torch.optim.AdamW(parameters, lr=rate, fused=fused, foreach=foreach)


def _transformers_optimizer(
    parameters: Sequence[nn.Parameter], settings: StepSettings, model: nn.Module | None
) -> torch.optim.Optimizer:
    from transformers import Trainer, TrainingArguments

    name = settings.optimizer
    try:
        arguments = TrainingArguments("unused", optim=name, learning_rate=settings.learning_rate, use_cpu=True)
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        found: torch.optim.Optimizer = kind(parameters, **options)
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        raise GaugeError(f"optimizer {name} cannot be built: {one_line(error)}") from error
    return found


class TrainingJob:
    """A model in training. ``step()`` takes a whole step; its three phases can also be called one by one.

    Args:
        batches: dictionaries of tensors on the model's device, with at least ``input_ids`` and ``labels`` of shape
            (batch, seq). They are used in turn, in the same order for every method.
        optimizer: over the trainable parameters (default: built from ``settings``).
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Tensor]],
        settings: StepSettings,
        *,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        if not batches:
            raise GaugeError("there is no batch to train on")
        self.model = model
        self.batches = batches
        self.settings = settings
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = optimizer or build_optimizer(self.trainable, settings, model)
        self.losses: list[float] = []
        self.loss: Tensor | None = None
        self._micro_batches = 0
        self._at_start: list[Tensor] = []
        self.scaler = _scaler(self.trainable, settings)

    def train_on(self, batches: Sequence[Mapping[str, Tensor]], settings: StepSettings) -> None:
        """Continue with other ``batches``, which may have another shape; the optimizer keeps its state."""
        if not batches:
            raise GaugeError("there is no batch to train on")
        self.batches, self.settings, self._micro_batches = batches, settings, 0

    def forward(self) -> Tensor:
        """Run the model on the next batch and return its loss: a scalar with an autograd graph."""
        batch = self.batches[self._micro_batches % len(self.batches)]
        self._micro_batches += 1
        self.loss = self._outputs(batch).loss
        return self.loss

    def _outputs(self, batch: Mapping[str, Tensor]) -> Any:
        with self._autocast():
            # Without use_cache=False the output holds the key-value cache, which then lives as long as the logits.
            outputs = self.model(**batch, use_cache=False)
        if self.settings.float32_outputs:
            from accelerate.utils import convert_to_fp32

            return convert_to_fp32(outputs)
        return outputs

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = AUTOCAST_DTYPES.get(self.settings.mixed_precision)
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.trainable[0].device.type, dtype)

    def backward(self) -> None:
        """Add the gradients of the last `forward` to the trainable parameters, and free its graph."""
        assert self.loss is not None, "call forward before backward"
        loss = self.loss / self.settings.grad_accumulation
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        loss.backward()
        self.loss = self.loss.detach()

    def optimizer_step(self) -> None:
        """Clip the gradients if ``clip_grad_norm`` is set, and update the trainable parameters."""
        if self.settings.clip_grad_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.trainable, self.settings.clip_grad_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def clear(self) -> None:
        """Free gradients and graph: the state between two steps."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = None

    def step(self) -> None:
        """Take one whole training step."""
        self.clear()
        for _ in range(self.settings.grad_accumulation):
            self.forward()
            self.backward()
        self.optimizer_step()

    def close(self) -> None:
        """End what the job has begun in this process beyond its tensors: nothing here."""

    def warm_up(self, steps: int = 2) -> None:
        """Take ``steps`` steps, after which the optimizer's state exists; the starting weights are kept for `learned`.

        Appends the loss of each step to ``losses``.
        """
        self._at_start = [_digest(parameter) for parameter in self.trainable]
        for _ in range(steps):
            self.step()
            assert self.loss is not None
            self.losses.append(float(self.loss))
        self.clear()

    def learned(self) -> bool:
        """Whether every trainable parameter has changed since `warm_up` began, apart from updates lost to rounding.

        An AdamW update is about as large as the learning rate. Near 1, 16-bit numbers are further apart than twice that
        (0.0039 to 0.0078 in bfloat16): the norms of an untrained model, which are all ones, never change. A 16-bit
        parameter counts as learned if the optimizer holds an average of its gradients that is not all zeros.
        """
        if not self._at_start:
            raise GaugeError("learned() compares with the weights before warm_up(); call warm_up() first")
        return all(
            not torch.equal(before, _digest(parameter)) or self._was_rounded_away(parameter)
            for before, parameter in zip(self._at_start, self.trainable, strict=True)
        )

    def _was_rounded_away(self, parameter: Tensor) -> bool:
        """Whether ``parameter`` is 16-bit and had an update from the optimizer; false for SGD, which keeps no state."""
        state = self.optimizer.state.get(parameter, {})
        # bitsandbytes keeps the average of a small tensor in float32, and others as 8-bit codes with block scales.
        average = next((state[name] for name in ("exp_avg", "absmax1", "state1") if name in state), None)
        return parameter.dtype.itemsize < 4 and average is not None and bool(torch.count_nonzero(average))

    def effective_settings(self) -> dict[str, Any]:
        """The settings in effect, for the record: optimizer and its implementation, attention, checkpointing."""
        group = self.optimizer.param_groups[0]
        config = getattr(self.model, "config", None)
        return {
            "batch": self.settings.batch,
            "seq": self.settings.seq,
            "optimizer": type(self.optimizer).__name__,
            "optimizer_foreach": group.get("foreach"),
            "optimizer_fused": group.get("fused"),
            "learning_rate": group["lr"],
            "grad_accumulation": self.settings.grad_accumulation,
            "clip_grad_norm": self.settings.clip_grad_norm,
            "grad_checkpointing": self.settings.grad_checkpointing,
            "mixed_precision": self.settings.mixed_precision,
            "float32_outputs": self.settings.float32_outputs,
            "attention": attention_of(config),
        }


def _scaler(trainable: Sequence[nn.Parameter], settings: StepSettings) -> torch.amp.GradScaler | None:
    """The loss scaler: without it, small gradients underflow to 0 in float16. bfloat16 does not need it."""
    if settings.mixed_precision != "fp16":
        return None
    check_scalable(settings, trainable)
    return torch.amp.GradScaler(trainable[0].device.type)


def check_scalable(settings: StepSettings, parameters: Iterable[nn.Parameter]) -> None:
    """Raise `GaugeError` if ``settings`` scale losses and a trained parameter is in float16."""
    if settings.mixed_precision == "fp16" and any(
        parameter.requires_grad and parameter.dtype == torch.float16 for parameter in parameters
    ):
        raise GaugeError(
            "mixed precision fp16 needs trainable weights in float32, since their gradients are unscaled; "
            "choose --dtype float32, or adapters in float32"
        )


def _digest(parameter: Tensor) -> Tensor:
    """Two sums that change when the parameter does: they need less memory than a copy of the model."""
    values = local_of(parameter.detach()).reshape(-1)
    sums = torch.zeros(2, device=values.device, dtype=torch.float64)
    for start in range(0, values.numel(), 2**20):  # a copy of all values in float64 could be the peak of memory
        part = values[start : start + 2**20].to(torch.float64)
        weights = torch.arange(start + 1, start + 1 + part.numel(), device=values.device, dtype=torch.float64)
        sums += torch.stack((part.sum(), torch.dot(part, weights)))
    return sums
