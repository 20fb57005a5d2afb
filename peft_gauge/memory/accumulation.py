"""In-place sums of gradients, as autograd's engine makes them when no dispatch mode is active.

The engine sums two gradients of one tensor in place if nothing else holds the first. With a dispatch mode active it
never does (torch/csrc/autograd/input_buffer.cpp checks `isTensorSubclassLike`), so a tracked step would need memory for
one more activation than an untracked one. The tracker therefore sums in place where the engine would.
"""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peft_gauge._internals.torch import DispatchMode, called_by_engine, current_node, holders, without_modes

ADD = torch.ops.aten.add.Tensor


def engine_accumulates(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> bool:
    """Whether this addition comes from the engine and nothing else holds its left operand."""
    if kwargs or len(args) != 2 or torch.is_grad_enabled():
        return False
    left, right = args
    if not (isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)):
        return False
    if left.shape != right.shape or left.dtype != right.dtype or left.layout is not torch.strided:
        return False
    if current_node() is None or not called_by_engine(sys._getframe().f_back):
        return False
    if not dense(left):
        return False
    lone_tensor, lone_storage = lone_holders()
    tensor_holders, storage_holders = holders(left)
    return tensor_holders <= lone_tensor and storage_holders <= lone_storage


def dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their part of the storage without gaps or overlaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


@functools.cache
def lone_holders() -> tuple[int, int]:
    """The reference counts, in this torch version, of a gradient that only the engine's buffer holds."""

    class Probe(DispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: deque[tuple[int, int]] = deque()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is ADD and current_node() is not None:
                self.seen.append(holders(args[0]))
            return func(*args, **(kwargs or {}))

    with without_modes(), torch.enable_grad():
        x = torch.zeros(2, requires_grad=True)
        y = x * 1.0
        total = y * 2.0 + y * 3.0
        probe = Probe()
        with probe:
            total.backward(torch.ones(2))
    return probe.seen[0]
