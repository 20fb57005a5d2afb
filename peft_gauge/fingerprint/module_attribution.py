"""The module in which an operator runs, in the forward and in the backward pass."""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from peft_gauge._internals.torch import ACCUMULATE_GRAD, current_node, next_sequence_number, sequence_number

if TYPE_CHECKING:
    from torch import nn

UNKNOWN = "?"
ROOT = "(model)"


def folded(path: str) -> str:
    """A module's path with its indices folded: ``layers.11.mlp`` becomes ``layers.*.mlp``; the model itself is
    `ROOT`."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path) if path else ROOT


def _whole(path: str) -> str:
    return path or ROOT


class ModuleAttribution:
    """While active, `now` is the path of the innermost running module (folded, unless ``fold`` is off), or `UNKNOWN`.

    Autograd numbers its nodes in the order in which the forward pass creates them. The numbers at which modules were
    entered and left therefore give, in the backward pass, the module that created the running node; a leaf's node
    belongs to the module with the parameter. A forward pass inside the backward (recomputation by checkpointing) counts
    where it runs. The numbers belong to one thread: with reentrant checkpointing on a GPU, where the device's thread
    creates nodes too, a backward operator may be attributed to the wrong module.
    """

    def __init__(self, model: nn.Module, *, fold: bool = True) -> None:
        name = folded if fold else _whole
        self._paths = {id(module): name(path) for path, module in model.named_modules()}
        self._owners = {
            id(parameter): name(path)
            for path, module in model.named_modules()
            for parameter in module.parameters(recurse=False)
        }
        self._open: list[str] = []
        self._numbers: list[int] = []
        self._places: list[str] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> ModuleAttribution:
        # `always_call`: checkpointing leaves modules by an exception once it has recomputed enough.
        self._hooks = [
            register_module_forward_pre_hook(self._entered),
            register_module_forward_hook(self._left, always_call=True),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def now(self) -> str:
        if self._open:
            return self._open[-1]
        node = current_node()
        if node is None:
            return UNKNOWN
        if node.name() == ACCUMULATE_GRAD:
            return self._owners.get(id(getattr(node, "variable", None)), UNKNOWN)
        before = bisect_right(self._numbers, sequence_number(node))
        return self._places[before - 1] if before else UNKNOWN

    def _entered(self, module: nn.Module, args: Any) -> None:
        outer = self._open[-1] if self._open else UNKNOWN
        self._open.append(self._paths.get(id(module), outer))  # a module outside the model counts as its caller
        self._mark()

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        self._open.pop()
        self._mark()

    def _mark(self) -> None:
        """Attribute the autograd nodes from here on to the module that is open now."""
        self._numbers.append(next_sequence_number())
        self._places.append(self._open[-1] if self._open else UNKNOWN)
