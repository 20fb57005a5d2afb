"""The settings of a training step. torch is not needed for them."""

from __future__ import annotations

from dataclasses import dataclass

from peft_gauge.errors import GaugeError, unknown
from peft_gauge.training.precision import MixedPrecision, check_mixed_precision

OPTIMIZERS = ("adamw", "adamw-fused", "adamw-foreach-off", "adamw8bit", "paged-adamw8bit", "sgd")
"""This suite's own names. The names of ``TrainingArguments.optim`` are accepted, too."""


@dataclass(frozen=True)
class StepSettings:
    """Settings of a training step. Every field changes the outcome, so all of them are stored with a result.

    Attributes:
        batch: micro-batch size.
        seq: sequence length in tokens.
        optimizer: one of `OPTIMIZERS`, or a name of ``TrainingArguments.optim``.
        grad_checkpointing: of the non-reentrant kind.
        grad_accumulation: micro-batches per optimizer update.
        clip_grad_norm: the maximum norm; ``None`` turns clipping off.
        mixed_precision: one of `peft_gauge.training.precision.MIXED_PRECISIONS`; forward runs under autocast, with
            `torch.amp.GradScaler` for fp16.
        float32_outputs: copy 16-bit outputs of forward to float32, as accelerate does.
    """

    batch: int
    seq: int
    learning_rate: float = 1e-4
    optimizer: str = "adamw"
    grad_checkpointing: bool = False
    grad_accumulation: int = 1
    clip_grad_norm: float | None = None
    mixed_precision: MixedPrecision = "no"
    float32_outputs: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "seq", "grad_accumulation"):
            if getattr(self, name) < 1:
                raise GaugeError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_optimizer(self.optimizer)
        check_mixed_precision(self.mixed_precision)

    @property
    def tokens(self) -> int:
        """Tokens per optimizer update."""
        return self.batch * self.seq * self.grad_accumulation


def check_optimizer(name: str) -> None:
    """Raise `GaugeError` unless ``name`` is an optimizer's, ours or transformers'."""
    if name in OPTIMIZERS:
        return
    from peft_gauge.training.quantization.library import hide_notices

    hide_notices()
    from transformers.training_args import OptimizerNames

    theirs = [each.value for each in OptimizerNames]
    if name not in theirs:
        raise unknown("optimizer", name, (*OPTIMIZERS, *sorted(set(theirs) - {*OPTIMIZERS})))
