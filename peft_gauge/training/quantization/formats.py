"""4-bit number formats as instruments of their own: what each loses on a weight matrix, and how many bits it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_gauge.errors import GaugeError, unknown
from peft_gauge.training.quantization.library import load_bitsandbytes

BLOCK_SIZE = 64  # weights that share one absmax: QLoRA's choice and bitsandbytes' default
NESTED_BLOCK_SIZE = 256  # absmax values that share one second-level absmax; fixed in bitsandbytes
FOUR_BIT_FORMATS = ("nf4", "fp4", "int4", "int4-minmax")


def pack(
    weight: Tensor, quant_format: str, *, double_quant: bool = False, block_size: int = BLOCK_SIZE
) -> tuple[Tensor, Any]:
    """``weight`` as bitsandbytes stores it in ``"nf4"`` or ``"fp4"``: the packed bytes and their
    ``QuantState``.
    """
    packed, state = load_bitsandbytes().functional.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=double_quant, quant_type=quant_format
    )
    return packed, state


def dequantized(
    weight: Tensor, quant_format: str, *, double_quant: bool = False, block_size: int = BLOCK_SIZE
) -> Tensor:
    """``weight`` rounded to ``quant_format`` in blocks and back, as a float32 tensor of the same shape.

    ``"nf4"`` and ``"fp4"`` are bitsandbytes' own. Two kinds of uniform 4-bit integer stand beside them,
    because "INT4" names both: ``"int4"``, symmetric, -7 to 7 times absmax/7 (15 levels, zero among them; a
    float32 absmax, so 4.5 bits a weight in blocks of 64); and ``"int4-minmax"``, 16 levels in equal steps
    from the block's minimum to its maximum, minimum and step in float16 as in GGUF's Q4_1 (4.5 bits too).

    Raises `GaugeError` for an unknown format, a number of weights that is no multiple of ``block_size``, and
    ``double_quant`` with an integer format, which nobody stores that way.
    """
    if quant_format not in FOUR_BIT_FORMATS:
        raise unknown("4-bit format", quant_format, FOUR_BIT_FORMATS)
    if weight.numel() % block_size:
        raise GaugeError(f"{weight.numel()} weights do not divide into blocks of {block_size}")
    weight = weight.detach().float().contiguous()
    if quant_format in ("nf4", "fp4"):
        # A block a row: the CPU's kernel gets rows wrong that are no multiple of a block (`_check_unpacking`).
        blocks = weight.view(-1, block_size)
        packed, state = pack(blocks, quant_format, double_quant=double_quant, block_size=block_size)
        restored: Tensor = load_bitsandbytes().functional.dequantize_4bit(packed, state)
        return restored.view_as(weight)
    if double_quant:
        raise GaugeError(f"double quantization belongs to nf4 and fp4, not to {quant_format}")
    blocks = weight.view(-1, block_size)
    return (_symmetric(blocks) if quant_format == "int4" else _minmax(blocks)).view_as(weight)


def _symmetric(blocks: Tensor) -> Tensor:
    step = _no_zero(blocks.abs().amax(dim=1, keepdim=True) / 7)
    return (blocks / step).round() * step


def _minmax(blocks: Tensor) -> Tensor:
    low = blocks.amin(dim=1, keepdim=True).half().float()
    step = _no_zero(((blocks.amax(dim=1, keepdim=True) - low) / 15).half().float())
    return ((blocks - low) / step).round().clamp(0, 15) * step + low


def _no_zero(step: Tensor) -> Tensor:
    """A block of equal weights can have step 0; with 1 in its place they are 0 steps away instead of NaN."""
    return step.where(step > 0, 1.0)


def levels(quant_format: str) -> Tensor:
    """The values that ``quant_format`` has for a block of absmax 1, ascending; not for ``"int4-minmax"``,
    whose levels depend on the block.
    """
    if quant_format == "int4":
        return torch.arange(-7, 8) / 7
    if quant_format not in ("nf4", "fp4"):
        raise unknown("4-bit format with levels of its own", quant_format, ("nf4", "fp4", "int4"))
    code: Tensor = load_bitsandbytes().functional.get_4bit_type(quant_format, device="cpu")
    levels: Tensor = code.unique()  # sorted; fp4 has two codes for zero
    return levels


def error_bound(quant_format: str) -> float:
    """The most that one weight can change, in units of its block's absmax, without double quantization.

    Half the widest gap between two levels. For ``"int4-minmax"`` the range is at most twice absmax, so 1/15,
    and rounding minimum and step to float16 adds at most 2⁻¹¹ of absmax and of the range (constants of normal
    size).
    """
    if quant_format == "int4-minmax":
        return 1 / 15 + 3 * 2**-11
    return levels(quant_format).diff().max().item() / 2


@dataclass(frozen=True)
class QuantizationError:
    """What rounding to a format lost: ``relative_rms`` is ‖W − Q(W)‖ / ‖W‖, ``max_over_absmax`` the largest
    change of one weight in units of its block's absmax, ``mean_abs`` the mean change in the weights' own
    unit.
    """

    relative_rms: float
    max_over_absmax: float
    mean_abs: float


def quantization_error(
    weight: Tensor, quant_format: str, *, double_quant: bool = False, block_size: int = BLOCK_SIZE
) -> QuantizationError:
    """The error of `dequantized` on ``weight``; raises `GaugeError` as it does, and for a weight of zeros."""
    weight = weight.detach().float()
    norm = weight.norm().item()
    if norm == 0:
        raise GaugeError("all weights are zero: a relative error has no meaning")
    change = (weight - dequantized(weight, quant_format, double_quant=double_quant, block_size=block_size)).abs()
    absmax = _no_zero(weight.reshape(-1, block_size).abs().amax(dim=1))
    largest = change.view(-1, block_size).amax(dim=1)
    return QuantizationError(change.norm().item() / norm, (largest / absmax).max().item(), change.mean().item())


def absmax_shift(weight: Tensor, quant_format: str = "nf4") -> tuple[float, float]:
    """How far double quantization moves a block's absmax, and how far it may: both in units of the nested
    absmax.

    The largest shift found in ``weight``, and half the widest gap of bitsandbytes' 8-bit dynamic code.
    """
    functional = load_bitsandbytes().functional
    exact = pack(weight, quant_format)[1].absmax
    state = pack(weight, quant_format, double_quant=True)[1]
    rounded = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    unit = state.state2.absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: exact.numel()]
    code = state.state2.code.cpu()
    # Where the code ends short of -1, what lies beyond its first value is rounded up to it: the whole way.
    allowed = max(code.diff().max().item() / 2, code[0].item() + 1)
    return ((rounded - exact).abs() / unit).max().item(), allowed


def bits_per_parameter(
    quant_format: str, *, double_quant: bool = False, block_size: int = BLOCK_SIZE, numel: int | None = None
) -> float:
    """Bits that one weight takes with its share of the quantization constants, by arithmetic.

    For ``"nf4"``, ``"fp4"`` and ``"int4"`` 4 + 32/64 = 4.5; with double quantization 4 + 8/64 + 32/(64·256) ≈
    4.127 (QLoRA, section 3); for ``"int4-minmax"`` 4 + (16 + 16)/64. That is the limit for a large matrix;
    with ``numel`` weights the last, partly filled blocks and the 32-bit offset of double quantization count
    too. Codebooks are not in it.
    """
    if quant_format not in FOUR_BIT_FORMATS:
        raise unknown("4-bit format", quant_format, FOUR_BIT_FORMATS)
    if numel is None:
        constants = 8 / block_size + 32 / (block_size * NESTED_BLOCK_SIZE) if double_quant else 32 / block_size
        return 4 + constants
    blocks = math.ceil(numel / block_size)
    constant_bits = 8 * blocks + 32 * math.ceil(blocks / NESTED_BLOCK_SIZE) + 32 if double_quant else 32 * blocks
    return (8 * math.ceil(numel / 2) + constant_bits) / numel


@dataclass(frozen=True)
class StoredBytes:
    """The bytes of one packed 4-bit weight of ``params`` parameters, tensor by tensor.

    ``codebook_bytes`` hold the same values in every layer, though bitsandbytes stores a copy with each: the
    16 levels in float32 and, with double quantization, the 256 values of the 8-bit code.
    """

    params: int
    packed_bytes: int
    absmax_bytes: int
    nested_absmax_bytes: int
    offset_bytes: int
    codebook_bytes: int

    @property
    def bits_per_parameter(self) -> float:
        """All but the codebooks, which do not grow with the weight."""
        held = self.packed_bytes + self.absmax_bytes + self.nested_absmax_bytes + self.offset_bytes
        return 8 * held / self.params

    @property
    def bits_per_parameter_with_codebooks(self) -> float:
        """As `bits_per_parameter`, with the copy of the codebooks that this weight carries."""
        return self.bits_per_parameter + 8 * self.codebook_bytes / self.params


def stored_bytes(packed: Tensor, state: Any) -> StoredBytes:
    """Count the tensors that hold a packed weight: what `pack` returns, or a layer's weight and its
    ``quant_state``.
    """
    nested = getattr(state, "state2", None)
    return StoredBytes(
        params=math.prod(state.shape),
        packed_bytes=packed.nbytes,
        absmax_bytes=state.absmax.nbytes,
        nested_absmax_bytes=nested.absmax.nbytes if nested is not None else 0,
        offset_bytes=state.offset.nbytes if nested is not None else 0,
        codebook_bytes=state.code.nbytes + (nested.code.nbytes if nested is not None else 0),
    )
