"""4-bit number formats: the rounding error of each on a weight matrix, and its bits per parameter."""

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
    weight: Tensor,
    quant_format: str,
    *,
    double_quant: bool = False,
    block_size: int = BLOCK_SIZE,
    storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, Any]:
    """``weight`` as bitsandbytes stores it in ``"nf4"`` or ``"fp4"``: the packed bytes, as numbers of the dtype
    ``storage``, and their ``QuantState``."""
    packed, state = load_bitsandbytes().functional.quantize_4bit(
        weight,
        blocksize=block_size,
        compress_statistics=double_quant,
        quant_type=quant_format,
        quant_storage=storage,
    )
    return packed, state


def dequantized(
    weight: Tensor, quant_format: str, *, double_quant: bool = False, block_size: int = BLOCK_SIZE
) -> Tensor:
    """``weight`` rounded to ``quant_format`` in blocks and back, as a float32 tensor of the same shape.

    ``"nf4"`` and ``"fp4"`` are bitsandbytes' formats. "INT4" can mean either of two uniform integer formats:

    - ``"int4"`` is symmetric: -7 to 7 times absmax/7, which gives 15 levels with zero among them. With a float32 absmax
      it takes 4.5 bits per weight in blocks of 64.
    - ``"int4-minmax"`` has 16 levels in equal steps from the block's minimum to its maximum. Minimum and step are in
      float16, as in GGUF's Q4_1, so it takes 4.5 bits too.

    Raises `GaugeError` for an unknown format, a number of weights that is not a multiple of ``block_size``, and
    ``double_quant`` with an integer format.
    """
    if quant_format not in FOUR_BIT_FORMATS:
        raise unknown("4-bit format", quant_format, FOUR_BIT_FORMATS)
    if weight.numel() % block_size:
        raise GaugeError(f"{weight.numel()} weights do not divide into blocks of {block_size}")
    weight = weight.detach().float().contiguous()
    if quant_format in ("nf4", "fp4"):
        # One block per row: the CPU kernel unpacks rows wrongly if they are not a multiple of a block (see
        # `peft_gauge.training.quantization.layers._check_unpacking`).
        blocks = weight.view(-1, block_size)
        packed, state = pack(blocks, quant_format, double_quant=double_quant, block_size=block_size)
        restored: Tensor = load_bitsandbytes().functional.dequantize_4bit(packed, state)
        return restored.view_as(weight)
    if double_quant:
        raise GaugeError(f"double quantization applies to nf4 and fp4, not to {quant_format}; turn it off")
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
    """``step`` with 1 in place of 0, the step of a block of equal weights, so that dividing by it gives no NaN."""
    return step.where(step > 0, 1.0)


def levels(quant_format: str) -> Tensor:
    """The values of ``quant_format`` for a block of absmax 1, ascending.

    Raises `GaugeError` for ``"int4-minmax"``, whose levels depend on the block.
    """
    if quant_format == "int4":
        return torch.arange(-7, 8) / 7
    if quant_format not in ("nf4", "fp4"):
        raise unknown("4-bit format with fixed levels", quant_format, ("nf4", "fp4", "int4"))
    code: Tensor = load_bitsandbytes().functional.get_4bit_type(quant_format, device="cpu")
    levels: Tensor = code.unique()  # sorted; fp4 has two codes for zero
    return levels


def error_bound(quant_format: str) -> float:
    """The largest change of one weight, in units of its block's absmax, without double quantization.

    It is half the widest gap between two levels. For ``"int4-minmax"`` the range is at most twice absmax, which gives
    1/15. Rounding minimum and step to float16 adds at most 2⁻¹¹ of absmax and of the range, if neither is subnormal.
    """
    if quant_format == "int4-minmax":
        return 1 / 15 + 3 * 2**-11
    return levels(quant_format).diff().max().item() / 2


@dataclass(frozen=True)
class QuantizationError:
    """The error of rounding to a format.

    Attributes:
        relative_rms: ‖W − Q(W)‖ / ‖W‖.
        max_over_absmax: the largest change of one weight, in units of its block's absmax.
        mean_abs: the mean absolute change of a weight.
    """

    relative_rms: float
    max_over_absmax: float
    mean_abs: float


def quantization_error(
    weight: Tensor, quant_format: str, *, double_quant: bool = False, block_size: int = BLOCK_SIZE
) -> QuantizationError:
    """The error of `dequantized` on ``weight``. Raises `GaugeError` as it does, and if all weights are zero."""
    weight = weight.detach().float()
    norm = weight.norm().item()
    if norm == 0:
        raise GaugeError("all weights are zero, so the relative error is undefined; pass other weights")
    change = (weight - dequantized(weight, quant_format, double_quant=double_quant, block_size=block_size)).abs()
    absmax = _no_zero(weight.reshape(-1, block_size).abs().amax(dim=1))
    largest = change.view(-1, block_size).amax(dim=1)
    return QuantizationError(change.norm().item() / norm, (largest / absmax).max().item(), change.mean().item())


def absmax_shift(weight: Tensor, quant_format: str = "nf4") -> tuple[float, float]:
    """The largest shift of a block's absmax by double quantization in ``weight``, and its upper bound.

    Both are in units of the nested absmax. The bound is half the widest gap of bitsandbytes' 8-bit dynamic code.
    """
    functional = load_bitsandbytes().functional
    exact = pack(weight, quant_format)[1].absmax
    state = pack(weight, quant_format, double_quant=True)[1]
    rounded = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    unit = state.state2.absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: exact.numel()]
    code = state.state2.code.cpu()
    # If the code begins above -1, values below its first one are rounded up to it, by the whole distance.
    allowed = max(code.diff().max().item() / 2, code[0].item() + 1)
    return ((rounded - exact).abs() / unit).max().item(), allowed


def bits_per_parameter(
    quant_format: str, *, double_quant: bool = False, block_size: int = BLOCK_SIZE, numel: int | None = None
) -> float:
    """Bits per weight with its share of the quantization constants, calculated.

    ``"nf4"``, ``"fp4"`` and ``"int4"`` take 4 + 32/64 = 4.5 bits; with double quantization 4 + 8/64 + 32/(64·256) ≈
    4.127 (QLoRA, section 3); ``"int4-minmax"`` takes 4 + (16 + 16)/64. This is the limit for a large matrix. With
    ``numel`` weights, partly filled last blocks and the 32-bit offset of double quantization count too. Codebooks do
    not count.
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

    Codebooks have the same values in every layer, but bitsandbytes stores a copy with each: the 16 levels in float32
    and, with double quantization, the 256 values of the 8-bit code.
    """

    params: int
    packed_bytes: int
    absmax_bytes: int
    nested_absmax_bytes: int
    offset_bytes: int
    codebook_bytes: int

    @property
    def bits_per_parameter(self) -> float:
        """Without the codebooks, whose size does not depend on the weight's."""
        held = self.packed_bytes + self.absmax_bytes + self.nested_absmax_bytes + self.offset_bytes
        return 8 * held / self.params

    @property
    def bits_per_parameter_with_codebooks(self) -> float:
        """`bits_per_parameter` with this weight's copy of the codebooks."""
        return self.bits_per_parameter + 8 * self.codebook_bytes / self.params


def stored_bytes(packed: Tensor, state: Any) -> StoredBytes:
    """The bytes of the tensors of a packed weight: the result of `pack`, or a layer's weight and ``quant_state``."""
    nested = getattr(state, "state2", None)
    return StoredBytes(
        params=math.prod(state.shape),
        packed_bytes=packed.nbytes,
        absmax_bytes=state.absmax.nbytes,
        nested_absmax_bytes=nested.absmax.nbytes if nested is not None else 0,
        offset_bytes=state.offset.nbytes if nested is not None else 0,
        codebook_bytes=state.code.nbytes + (nested.code.nbytes if nested is not None else 0),
    )
