"""The tracker's actions after each operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peft_gauge._internals.torch import schema
from peft_gauge.flops import formula_of
from peft_gauge.memory.categories import OTHER

Workspace = Callable[[Sequence[Any], Any], Sequence[int]]
"""(operator's arguments, its output) -> bytes of each scratch buffer that exists while the kernel runs."""


_COPIES = {"aten::_to_copy", "aten::clone"}
_GRADIENT_STEPS = {"aten::detach", "aten::add_", "aten::copy_", "aten::clone", "aten::new_empty_strided"}
_FLOP_FREE_NAMESPACES = {"aten", "prim", "prims", "profiler", "c10d", "_c10d_functional", "fsdp", "inductor"}


class OperatorPlan:
    """The actions after one operator, determined once, so that the hot path only reads attributes."""

    __slots__ = (
        "category",
        "copies",
        "flops",
        "foreign",
        "name",
        "reaches_gradient",
        "resizes",
        "special",
        "workspace",
    )

    def __init__(
        self,
        func: Any,
        categories: Mapping[str, str],
        workspaces: Mapping[str, Workspace],
        name: str | None = None,
    ) -> None:
        self.name = schema(func).name if name is None else name
        self.category = categories.get(self.name)
        self.copies = self.name in _COPIES
        self.resizes = "resize" in self.name or "set_" in self.name
        self.reaches_gradient = self.name in _GRADIENT_STEPS
        self.workspace = workspaces.get(self.name)
        self.flops = None if func is None else formula_of(func)
        self.foreign = func is not None and self.name.split("::")[0] not in _FLOP_FREE_NAMESPACES
        self.special = bool(self.reaches_gradient or self.workspace or self.flops or self.foreign)


BORN_BEFORE = OperatorPlan(None, {"": OTHER}, {}, name="")
