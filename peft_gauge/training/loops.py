"""Training loops by name, and the defaults of their settings; without torch and without a trainer's library.

``plain`` is this suite's own step (`peft_gauge.training.step`). ``trainer`` and ``sft`` are the unmodified
`transformers.Trainer` and `trl.SFTTrainer` (`peft_gauge.training.trainers`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from peft_gauge.errors import GaugeError, unknown

if TYPE_CHECKING:
    from peft_gauge.training.settings import StepSettings

Loop = Literal["plain", "trainer", "sft"]
LOOPS: tuple[Loop, ...] = ("plain", "trainer", "sft")


def check_loop(name: str) -> None:
    """Raise `GaugeError` unless ``name`` is one of `LOOPS`."""
    if name not in LOOPS:
        raise unknown("loop", name, LOOPS)


def check_device(loop: str, mixed_precision: str, device: str) -> None:
    """Raise `GaugeError` if ``loop`` would train in another precision on ``device`` than ``mixed_precision``."""
    if loop != "plain" and mixed_precision == "fp16" and device == "cpu":
        raise GaugeError("a trainer silently leaves fp16 out on a CPU; use bf16, or plan the step with peft-gauge plan")


def step_settings(
    loop: str, fields: Mapping[str, Any], arguments: Mapping[str, Any]
) -> tuple[StepSettings, tuple[tuple[str, Any], ...]]:
    """The settings of a step, and the trainer's arguments beyond them, as pairs.

    Args:
        fields: the fields of `StepSettings` that are given, ``seq`` among them; the others are the loop's defaults.
        arguments: given arguments of the trainer, by their own names; they go before ``fields``.

    Raises `GaugeError` for an unknown loop, an invalid value, or arguments without a trainer.
    """
    from peft_gauge.training.settings import StepSettings

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
    pairs = tuple(sorted((name, _fixed(value)) for name, value in further.items()))
    return replace(found, float32_outputs=fields.get("float32_outputs", False)), pairs


class _FixedDict(dict[str, Any]):
    """A dictionary that nothing changes, so that a case with it can be a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True, default=str))


class _FixedList(list[Any]):
    """A list that nothing changes."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, default=str))


def _fixed(value: Any) -> Any:
    if isinstance(value, dict):
        return _FixedDict(value)
    return _FixedList(value) if isinstance(value, list) else value


def key_values(changes: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` of the option ``--set`` -> value as YAML reads it. Raises `GaugeError` for anything else."""
    import yaml

    found: dict[str, Any] = {}
    for change in changes:
        key, separator, value = change.partition("=")
        if not separator or not key:
            raise GaugeError(f"--set {change!r} is not KEY=VALUE")
        try:
            read = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise GaugeError(f"--set {change!r}: the value is not valid YAML") from error
        if isinstance(read, str):
            with suppress(ValueError):  # YAML reads 1e-4, which has no dot, as a text
                read = float(read)
        found[key.strip()] = read
    return found
