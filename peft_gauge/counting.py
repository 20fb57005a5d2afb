"""Parameters and bytes of a model, correct for packed 4-bit weights, tied weights and buffers too.

``numel()`` of a bitsandbytes 4-bit weight counts packed bytes (two weights each), so a trainable percentage taken from
it is about twice too high (peft#733, qlora#260); here a packed weight counts with its original shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft_gauge._internals.torch import buffers_of


@dataclass(frozen=True)
class ParameterCount:
    """Parameters and bytes of a model.

    ``trainable_params`` and ``total_params``: logical parameters, tied ones once; ``trainable_bytes``;
    ``weight_bytes``: all parameters as stored, with their quantization constants; ``buffer_bytes``: registered buffers.
    """

    trainable_params: int
    total_params: int
    trainable_bytes: int
    weight_bytes: int
    buffer_bytes: int

    @property
    def percent_of_total(self) -> float:
        """Trainable parameters as a percentage of all parameters, the adapter's own included."""
        return 100 * self.trainable_params / self.total_params

    def percent_of_base(self, base_params: int) -> float:
        """Trainable parameters as a percentage of the ``base_params`` parameters of the model without adapters."""
        return 100 * self.trainable_params / base_params


def logical_numel(parameter: Tensor) -> int:
    """Number of logical weights in ``parameter`` (a packed 4-bit weight: the product of its original shape)."""
    state = getattr(parameter, "quant_state", None)
    shape = getattr(parameter, "logical_shape", None) if state is None else state.shape
    return parameter.numel() if shape is None else math.prod(shape)


def constant_buffers(model: nn.Module) -> Iterator[Tensor]:
    """The scales and zero points that quantized layers keep as buffers, listed in ``quantization_buffers``."""
    for module in model.modules():
        for name in getattr(module, "quantization_buffers", ()):
            buffer = buffers_of(module).get(name)
            if buffer is not None:
                yield buffer


def quantization_constants(parameter: Tensor) -> Iterator[Tensor]:
    """The tensors needed to dequantize a weight: absmax, its second level, offset, codebooks."""
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        # Not every state has every part: bitsandbytes drops the second level when it repacks a weight for the CPU.
        parts = (getattr(state, name, None) for name in ("absmax", "offset", "code"))
        yield from (part for part in parts if isinstance(part, Tensor))
        state = getattr(state, "state2", None)
    row_scales = getattr(parameter, "SCB", None)  # LLM.int8() keeps one scale per row
    if isinstance(row_scales, Tensor):
        yield row_scales


def nbytes(tensor: Tensor) -> int:
    """Bytes of ``tensor``'s elements (for a ``meta`` tensor: the bytes they would take)."""
    return tensor.numel() * tensor.element_size()


def count(model: nn.Module) -> ParameterCount:
    """Count ``model``'s parameters and bytes; each tensor once, however many names it has."""
    parameters = list(model.parameters())  # `parameters()` already drops tied duplicates
    trainable = [p for p in parameters if p.requires_grad]
    constants = {id(t): t for p in parameters for t in quantization_constants(p)}
    constants |= {id(t): t for t in constant_buffers(model)}
    buffers = {id(b): b for b in model.buffers() if id(b) not in constants}
    return ParameterCount(
        trainable_params=sum(map(logical_numel, trainable)),
        total_params=sum(map(logical_numel, parameters)),
        trainable_bytes=sum(map(nbytes, trainable)),
        weight_bytes=sum(map(nbytes, parameters)) + sum(map(nbytes, constants.values())),
        buffer_bytes=sum(map(nbytes, buffers.values())),
    )


def trainable_dtypes(model: nn.Module) -> dict[str, int]:
    """Trainable parameters by dtype name, such as ``{"float32": 4505600}``."""
    found: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            found[parameter.dtype] = found.get(parameter.dtype, 0) + parameter.numel()
    return {str(dtype).removeprefix("torch."): number for dtype, number in sorted(found.items(), key=str)}
