"""FLOPs of one operator from its argument shapes: matrix products and attention, two per multiply-add.

Most formulas come from `torch.utils.flop_counter`. Attention has its own: before torch 2.13 the registered formula
rejects grouped-query shapes (fewer key-value heads than query heads), and the CPU kernel has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from peft_gauge._internals.torch import flop_formulas, packet, schema

Formula = Callable[[Sequence[Any], Mapping[str, Any], Any], int]
"""(positional arguments, keyword arguments, output) of one call -> its FLOPs."""


def formula_of(func: Any) -> Formula | None:
    """The formula for the operator overload ``func``; ``None`` if there is none.

    An in-place product uses the formula of its out-of-place twin.
    """
    name = schema(func).name
    own = _OWN.get(name)
    if own is not None:
        return lambda args, kwargs, out: int(own(args))
    registered = flop_formulas()
    found = registered.get(packet(func))
    namespace, stem = name.split("::")
    if found is None and stem.endswith("_") and namespace == "aten":
        found = registered.get(getattr(torch.ops.aten, stem.rstrip("_"), None))
    if found is None:
        return None
    return lambda args, kwargs, out: int(found(*args, **kwargs, out_val=out))


def _attention(args: Sequence[Any]) -> int:
    """QKᵀ and PV over (batch, query heads, queries, keys)."""
    query, key, value = args[:3]
    return int(2 * _pairs(query, key) * (query.shape[-1] + value.shape[-1]))


def _attention_backward(args: Sequence[Any]) -> int:
    """QKᵀ again, and two products for each of the two products of forward; the first argument is the gradient."""
    query, key, value = args[1:4]
    return int(2 * _pairs(query, key) * (3 * query.shape[-1] + 2 * value.shape[-1]))


def _pairs(query: torch.Tensor, key: torch.Tensor) -> int:
    return math.prod(query.shape[:-1]) * int(key.shape[-2])


ATTENTION_KERNELS = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")

_OWN: Mapping[str, Callable[[Sequence[Any]], int]] = {
    **{f"aten::_scaled_dot_product_{kernel}": _attention for kernel in ATTENTION_KERNELS},
    **{f"aten::_scaled_dot_product_{kernel}_backward": _attention_backward for kernel in ATTENTION_KERNELS},
    "aten::mv": lambda args: 2 * args[0].numel(),
    "aten::addmv": lambda args: 2 * args[1].numel(),
    "aten::dot": lambda args: 2 * args[0].numel(),
    "aten::vdot": lambda args: 2 * args[0].numel(),
    "aten::_int_mm": lambda args: 2 * args[0].numel() * args[1].shape[1],
    "bitsandbytes::gemm_4bit": lambda args: 2 * args[0].numel() * args[2][0],
    "bitsandbytes::gemv_4bit": lambda args: 2 * args[0].numel() * args[2][0],
    "bitsandbytes::int8_linear_matmul": lambda args: 2 * args[0].numel() * args[1].shape[0],
    "bitsandbytes::int8_scaled_mm": lambda args: 2 * args[0].numel() * args[1].shape[0],
}
