"""A recipe as it was understood, and the reading of its keys."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from peft_gauge import paths
from peft_gauge.errors import GaugeError, did_you_mean
from peft_gauge.training.trainers import NOT_PLANNED

if TYPE_CHECKING:
    from peft_gauge.training.methods import Method


STORED = "auto"
"""The data type of a recipe whose tool loads weights as the checkpoint stores them."""

NO_LIGER = NOT_PLANNED["use_liger_kernel"]
LESS = "is not planned; a step needs less with it"
"""Reasons that several tools share."""


@dataclass(frozen=True)
class Recipe:
    """The step of a config file.

    Fields:
        tool: whose file it is.
        model: the base as the file names it; ``None`` if it names none.
        method: the fine-tuning method; ``None`` if the file does not name one.
        dtype: of the base's weights as they are loaded, or `STORED`; ``None`` if the file does not name one.
        loop: by which the step is taken. ``fields``: the given fields of `StepSettings`, and the tool's own defaults.
        arguments: further arguments of the trainer.
        reentrant, attention, loss: as in `PlanRequest`.
        understood: key -> its value, for keys that the plan follows; ``defaults``: those that the file leaves out.
        without_effect: keys that do not change the memory of a step.
        not_modelled: key -> the reason why the plan does not follow it.
        unknown: keys that the tool does not read, each with a suggestion.
    """

    tool: str
    model: str | None
    method: Method | None
    dtype: str | None
    loop: str
    fields: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    reentrant: bool | None = None
    attention: str | None = None
    loss: str = "full"
    understood: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    without_effect: tuple[str, ...] = ()
    not_modelled: Mapping[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The part of the record on how the file was read."""
        return {
            "tool": self.tool,
            "understood": dict(self.understood),
            "defaults": dict(self.defaults),
            "without_effect": list(self.without_effect),
            "not_modelled": dict(self.not_modelled),
            "unknown": list(self.unknown),
        }


class Keys:
    """The keys of a file. Each is understood, without effect, not modelled, or unknown."""

    def __init__(self, tool: str, values: Mapping[str, Any], known: Iterable[str]) -> None:
        self.tool = tool
        self._values = {name: value for name, value in values.items() if value is not None}
        self._empty = values.keys() - self._values.keys()
        self._known = frozenset(known)
        self.understood: dict[str, Any] = {}
        self.defaults: dict[str, Any] = {}
        self.not_modelled: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str, default: Any = None) -> Any:
        """The value of ``name``, which the plan follows; an absent or empty key has the tool's ``default``."""
        if name in self._values:
            self.understood[name] = self._values[name]
            return self._values[name]
        if default is not None:
            self.defaults[name] = default
        return default

    def is_empty(self, name: str) -> bool:
        """Whether the file has ``name`` without a value."""
        return name in self._empty

    def value(self, name: str) -> Any:
        """The value of ``name``, without noting that the plan follows it."""
        return self._values.get(name)

    def whole(self, name: str, default: int | None = None) -> int:
        """`get` for a whole number of at least 1; raises `GaugeError` for another value, and where there is none."""
        value = self.get(name, default)
        if value is None:
            raise GaugeError(f"the {self.tool} recipe has no {name}, which has no default; add --set {name}=NUMBER")
        if isinstance(value, bool) or not isinstance(value, (int, str)) or not str(value).isdigit() or int(value) < 1:
            raise GaugeError(f"{name} in the {self.tool} recipe must be a whole number of at least 1, not {value!r}")
        return int(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """`get` for true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise GaugeError(f"{name} in the {self.tool} recipe must be true or false, not {value!r}")
        return value

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Note, with the reason, each key of ``reasons`` that is not switched off: the plan does not follow it."""
        on = {name for name, value in self._values.items() if value not in (False, 0, "", [])}
        self.not_modelled |= {name: reason for name, reason in reasons.items() if name in on}

    def recipe(self, model: Any, attention: Any = None, **fields: Any) -> Recipe:
        """The recipe with ``fields``, and with every key in its group."""
        without_effect, unknown = self._rest()
        return Recipe(
            tool=self.tool,
            model=None if model is None else str(model),
            attention=None if attention is None else str(attention),
            understood=self.understood,
            defaults=self.defaults,
            without_effect=without_effect,
            not_modelled=self.not_modelled,
            unknown=unknown,
            **fields,
        )

    def _rest(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The keys without an effect on memory, and the unknown ones with a suggestion."""
        left = [name for name in self._values if name not in self.understood and name not in self.not_modelled]
        unknown = [name for name in left if name not in self._known]
        return (
            tuple(name for name in left if name in self._known),
            tuple(f"{name!r}{did_you_mean(name, self._known)}" for name in unknown),
        )


OLDER = "older TrainingArguments"
"""Names of earlier releases of transformers, none with an effect on the memory of a step."""

FLASH = "flash_attention_2"


def attention_name(given: Any) -> Any:
    """``given``, an attention implementation, by the name that it is planned under: every flash attention needs the
    same memory, also a later one, or one from the Hub (``kernels-community/vllm-flash-attn3``)."""
    text = str(given).lower().replace("-", "_")
    return FLASH if "flash_attn" in text or text.startswith("flash_attention") else given


@cache
def known_keys(tool: str) -> frozenset[str]:
    """The names of the keys that axolotl or LLaMA-Factory reads, or `OLDER` ones (``fixtures/recipe_keys.json``)."""
    content = json.loads(paths.fixture("recipe_keys.json").read_text(encoding="utf-8"))
    return frozenset(content[tool]["keys"])
