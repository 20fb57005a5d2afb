"""Training loops by name, and the defaults of their settings; without torch and without a trainer's library.

``plain`` is this suite's own step (`peft_gauge.training.step`). ``trainer`` and ``sft`` are the unmodified
`transformers.Trainer` and `trl.SFTTrainer` (`peft_gauge.training.trainers`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from peft_gauge.errors import GaugeError, unknown

if TYPE_CHECKING:
    from peft_gauge.training.step import StepSettings

Loop = Literal["plain", "trainer", "sft"]
LOOPS: tuple[Loop, ...] = ("plain", "trainer", "sft")


def check_loop(name: str) -> None:
    """Raise `GaugeError` unless ``name`` is one of `LOOPS`."""
    if name not in LOOPS:
        raise unknown("loop", name, LOOPS)


def step_settings(
    loop: str, fields: Mapping[str, Any], arguments: Mapping[str, Any]
) -> tuple[StepSettings, tuple[tuple[str, Any], ...]]:
    """The settings of a step, and the trainer's arguments beyond them, as pairs.

    Args:
        fields: the fields of `StepSettings` that are given, ``seq`` among them; the others are the loop's defaults.
        arguments: given arguments of the trainer, by their own names; they go before ``fields``.

    Raises `GaugeError` for an unknown loop, an invalid value, or arguments without a trainer.
    """
    from peft_gauge.training.step import StepSettings

    check_loop(loop)
    given: dict[str, Any] = {
        name: value or None if name == "clip_grad_norm" else value for name, value in fields.items()
    }
    if loop == "plain":
        if arguments:
            raise GaugeError(f"{next(iter(arguments))} is an argument of a trainer: add --loop trainer or --loop sft")
        return StepSettings(**given), ()
    from peft_gauge.training import trainers

    chosen = {**trainers.arguments_of(fields), **arguments}
    found, further = trainers.step_settings(loop, chosen, fields["seq"])  # type: ignore[arg-type]
    return replace(found, float32_outputs=fields.get("float32_outputs", False)), tuple(sorted(further.items()))
