"""Values for operators that read them from fake tensors, which have none."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from peft_gauge._internals.torch import shape_rules, sparse_coo, sparse_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn

    from peft_gauge.plan.policies.patches import Patches

_GROUPED_ALIGNMENT = 16  # bytes to which grouped products pad their rows (ATen/native/GroupedMMUtils.h)
# Modules between the operator and its caller.
_BETWEEN = (
    "peft_gauge.plan.",
    "peft_gauge.memory.",
    "peft_gauge._internals.torch.",
    "peft_gauge._internals.torch_fakes.",
)


class Answers:
    """Implementations of value-reading operators for fake tensors."""

    def __init__(self, patches: Patches, yes: str, experts: int) -> None:
        self.patches = patches
        self.yes = yes
        self.experts = experts

    def operators(self) -> dict[Any, Callable[..., Any]]:
        implementations: dict[str, Callable[..., Any]] = {
            "_local_scalar_dense": self.scalar,
            "item": self.scalar,
            "equal": self.equal,
            "nonzero": self.positions,
            "_unique2": self.unique,
            "_coalesce": self.coalesced,
            "sparse_mask": self.masked,
            "_sparse_addmm": lambda mode, func, tensor, left, right, **_: _sparse_product(left, right),
            "mm": lambda mode, func, left, right: _sparse_product(left, right),
            "_grouped_mm": _grouped_product,
        }
        known = {getattr(torch.ops.aten, name, None): make for name, make in implementations.items()}
        return {packet.default: _within_mode(make) for packet, make in known.items() if packet is not None}

    def scalar(self, mode: Any, func: Any, tensor: Any) -> bool | int | float:
        if tensor.dtype is torch.bool:
            self.say("a boolean value", self.yes or "false")
            return bool(self.yes)
        self.say("a number read from a tensor", "0")
        return 0.0 if tensor.dtype.is_floating_point else 0

    def equal(self, mode: Any, func: Any, left: Any, right: Any) -> bool:
        self.say("whether two tensors are equal", "false")
        return False

    def positions(self, mode: Any, func: Any, tensor: Any) -> torch.Tensor:
        count = tensor.numel()
        if self.experts and _asked_by().startswith("transformers."):
            self.patches.warn(f"Uniform routing assumed: each of the {self.experts} experts gets equally many tokens.")
            # Which experts have tokens (1-D; some releases add a class for padding), or which tokens one expert has.
            count = min(count, self.experts) if tensor.dim() == 1 else -(-count // self.experts)
        else:
            self.say("the positions chosen by a mask", "all of them, an upper bound")
        # The operator stores the positions of one dimension after those of another.
        return torch.empty(tensor.dim(), count, dtype=torch.long).t()

    def unique(self, mode: Any, func: Any, tensor: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        self.say("the distinct values of a tensor", "one")
        return tensor.new_empty(1), torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)

    def coalesced(self, mode: Any, func: Any, tensor: Any) -> torch.Tensor:
        indices, values = sparse_parts(tensor)
        return _sparse(torch.empty_like(indices), torch.empty_like(values), tensor)

    def masked(self, mode: Any, func: Any, tensor: Any, mask: Any) -> torch.Tensor:
        indices, values = sparse_parts(mask)
        return _sparse(torch.empty_like(indices), torch.empty(values.shape, dtype=tensor.dtype), mask)

    def say(self, question: str, answer: str) -> None:
        self.patches.warn(f"{_asked_by()} reads {question}; assumed: {answer}.")


def _within_mode(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Enter the mode: fake tensor implementations run outside it, where new tensors would be real."""

    def run(mode: Any, *args: Any, **kwargs: Any) -> Any:
        with mode:
            return implementation(mode, *args, **kwargs)

    return run


def _sparse(indices: torch.Tensor, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return sparse_coo(
        like.sparse_dim(), like.dense_dim(), like.shape, indices, values,
        dtype=values.dtype, layout=torch.sparse_coo, device=like.device, is_coalesced=True,
    )  # fmt: skip


def _grouped_product(
    mode: Any, func: Any, left: Any, right: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> torch.Tensor:
    """One product per group of rows (or columns), delimited by `offs`; torch's shape rule supports bfloat16 only."""
    shape = [left.shape[-2], right.shape[-1]]
    if left.dim() == right.dim():
        shape.insert(0, offs.shape[0] if left.dim() == 2 else left.shape[0])
    dtype = left.dtype if out_dtype is None else out_dtype
    row = -(-shape[-1] * dtype.itemsize // _GROUPED_ALIGNMENT) * _GROUPED_ALIGNMENT // dtype.itemsize
    strides = (row, 1) if len(shape) == 2 else (shape[-2] * row, row, 1)
    return torch.empty_strided(shape, strides, dtype=dtype)


def _sparse_product(left: torch.Tensor, right: torch.Tensor) -> Any:
    """A dense product; without this, fake tensors would compute it on real zeros of the same sizes."""
    if left.layout is not torch.sparse_coo:
        return NotImplemented
    return right.new_empty(left.shape[0], right.shape[1])


@contextmanager
def fake_operators(replaced: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    table = shape_rules()
    saved = {operator: table[operator] for operator in replaced if operator in table}
    table.update(replaced)
    try:
        yield
    finally:
        for operator in replaced:
            del table[operator]
        table.update(saved)


def _asked_by() -> str:
    """The nearest caller outside torch, the planner and the tracker: 'peft.tuners.loha.layer.forward'."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] != "torch" and not f"{module}.".startswith(_BETWEEN):
            return f"{module}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "the step"


def experts(model: nn.Module) -> int:
    """Number of experts per layer of a mixture-of-experts base, 0 for a dense one."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return next((n for n in (getattr(config, name, None) for name in names) if isinstance(n, int)), 0)
