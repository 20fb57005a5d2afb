"""FLOPs, bytes read and bytes written by one operator, from its schema and its arguments.

FLOPs are those of matrix products (`peft_gauge.flops`); elementwise arithmetic counts none. Bytes are those of the
operator's input and output tensors, element count × element size: the least traffic of a kernel that uses every element
of its operands once. A lookup, such as an embedding's, reads less.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_gauge._internals.torch import schema as schema_of
from peft_gauge._internals.torch import storage_key
from peft_gauge.counting import nbytes
from peft_gauge.flops import formula_of

_WITHOUT_PRODUCTS = (
    "bitsandbytes::dequantize_",
    "bitsandbytes::quantize_",
    "bitsandbytes::int8_vectorwise_",
    "bitsandbytes::int8_double_quant",
    "bitsandbytes::int8_mm_dequant",
    "bitsandbytes::optimizer_",
)
"""Prefixes of the names of library operators that work element by element."""

_TORCH = {"aten", "prim", "prims", "profiler", "c10d", "_c10d_functional", "inductor"}

# aten's own operators that contain products; most have formulas, and the others must not count as elementwise.
_PRODUCT = re.compile(
    r"(?:^|_)(?:mm|bmm|addmm|sspaddmm|hspmm|addbmm|baddbmm|mv|addmv|v?dot|matmul|linear|conv(?!ert)\w*|attention"
    r"|lstm|gru|rnn|linalg(?!_vector_norm|__powsum|_check_errors|_cross)|solve|cholesky|fft|cdist|trilinear|geqrf"
    r"|ormqr)(?:_|$)"
)
_OPERANDS_AFTER_SUMMAND = {"addmm", "baddbmm", "addbmm", "addmv"}  # the first argument is the summand

_OVERWRITES = re.compile(r"^(?:_foreach_)?(?:copy|zero|fill|normal|uniform|bernoulli|exponential|random)_$")
_MOVES_NOTHING = re.compile(r"empty|^(?:resize|set)_$")
_SHAPE_ONLY = re.compile(r"^new_|_like$")


class Operator:
    """One overload of one operator, analysed once.

    ``name``: torch's name for it, such as ``aten.mm.default``; ``silent``: a profiler's mark without effect;
    ``unknown_flops``: it may contain matrix products without a formula.
    """

    def __init__(self, func: Any) -> None:
        self.name = str(func)
        schema = schema_of(func)
        self._qualified: str = schema.name
        namespace, self._stem = self._qualified.split("::")
        self.silent = namespace == "profiler"
        self._arguments = [(a.name, _is_written(a), a.is_out or a.name == "out") for a in schema.arguments]
        torchs = namespace in _TORCH
        self._overwrites = torchs and bool(_OVERWRITES.search(self._stem))
        self._moves_nothing = torchs and bool(_MOVES_NOTHING.search(self._stem))
        self._shape_only = torchs and bool(_SHAPE_ONLY.search(self._stem))
        self._own = namespace == "aten"
        self._formula = formula_of(func)
        has_products = (
            bool(_PRODUCT.search(self._stem)) if torchs else not self._qualified.startswith(_WITHOUT_PRODUCTS)
        )
        self.has_flops = self._formula is not None
        self.unknown_flops = has_products and not self.has_flops

    def flops(self, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
        """FLOPs of one call; only where ``has_flops``."""
        assert self._formula is not None
        return self._formula(args, kwargs, out)

    def product_type(self, args: Sequence[Any]) -> str:
        """The operands' dtype, or the name of a library operator (its weights are packed, so their dtype does not
        matter)."""
        if not self._own:
            return self._qualified.replace("::", ".")
        after = 1 if self._stem.rstrip("_") in _OPERANDS_AFTER_SUMMAND else 0
        operands = [value.dtype for value in args[after : after + 2] if isinstance(value, Tensor)]
        return " × ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(operands))

    def traffic(self, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> tuple[int, int]:
        """Bytes read and written by one call; none where the output is a view of an input."""
        if self._moves_nothing:
            return 0, 0
        read = written = 0
        given = set()
        for position, (name, is_written, is_out) in enumerate(self._arguments):
            value = args[position] if position < len(args) else kwargs.get(name)
            for tensor in _tensors(value):
                given.add(_storage(tensor))
                if is_written:
                    written += nbytes(tensor)
                if not (self._shape_only or (is_written and (is_out or self._overwrites))):
                    read += nbytes(tensor)
        made = list(_tensors(out))
        written += sum(nbytes(tensor) for tensor in made if _storage(tensor) not in given)
        return (0, 0) if made and not written else (read, written)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an argument: one, or those of a list with gaps."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            if isinstance(item, Tensor):
                yield item


def _storage(tensor: Tensor) -> int:
    # A sparse tensor has no storage of its own; it is never a view.
    return storage_key(tensor.untyped_storage()) if tensor.layout is torch.strided else id(tensor)
