"""NF4 compared with other 4-bit formats, on drawn weights and on a model's own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from statistics import mean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peft_gauge.errors import GaugeError, unknown
from peft_gauge.training.quantization.formats import bits_per_parameter, quantization_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

SAMPLE_SHAPE = (256, 1024)
WEIGHT_STD = 0.02  # Llama's initialization; the relative error does not depend on it


def _normal(generator: torch.Generator) -> Tensor:
    return torch.randn(SAMPLE_SHAPE, generator=generator)


def _uniform(generator: torch.Generator) -> Tensor:
    return (torch.rand(SAMPLE_SHAPE, generator=generator) * 2 - 1) * math.sqrt(3)


def _student_t3(generator: torch.Generator) -> Tensor:
    """Student's t with 3 degrees of freedom (heavy tails) over its standard deviation, which is √3."""
    chi_squared = torch.randn((3, *SAMPLE_SHAPE), generator=generator).square().sum(dim=0)
    return torch.randn(SAMPLE_SHAPE, generator=generator) / chi_squared.sqrt()


DISTRIBUTIONS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "normal": _normal,
    "uniform": _uniform,
    "student-t3": _student_t3,
}


def drawn_weight(distribution: str, seed: int) -> Tensor:
    """A 256×1024 float32 weight from ``distribution`` with mean 0 and standard deviation 0.02."""
    if distribution not in DISTRIBUTIONS:
        raise unknown("weight distribution", distribution, DISTRIBUTIONS)
    return DISTRIBUTIONS[distribution](torch.Generator().manual_seed(seed)) * WEIGHT_STD


def already_rounded(weight: Tensor, block_size: int = 32) -> bool:
    """Whether every block of ``weight`` has at most 16 different values, as after 4-bit rounding in such blocks.

    GGUF's 4-bit types have blocks of 32. Weights from such a file are on a uniform grid already: rounding them to a
    uniform format again loses less than the first time, which makes a comparison of formats unfair.
    """
    if weight.numel() % block_size:
        raise GaugeError(f"{weight.numel()} weights do not divide into blocks of {block_size}")
    blocks = weight.detach().float().reshape(-1, block_size)
    # In parts, since one block with more values is enough.
    return all(
        1 + (part.sort(dim=1).values.diff(dim=1) != 0).sum(dim=1).max().item() <= 16 for part in blocks.split(4096)
    )


@dataclass(frozen=True)
class FormatComparison:
    """NF4 compared with a rival format on the same weights, sample by sample.

    Attributes:
        nf4_errors, rival_errors: relative RMS errors, in pairs.
        nf4_bits, rival_bits: bits per parameter.
        unfair: why these samples allow no fair comparison, or ``None``.
    """

    rival: str
    nf4_errors: tuple[float, ...]
    rival_errors: tuple[float, ...]
    nf4_bits: float
    rival_bits: float
    unfair: str | None = None

    @property
    def ratios(self) -> tuple[float, ...]:
        """NF4's error over the rival's, per sample; below 1 where NF4 loses less."""
        return tuple(ours / theirs for ours, theirs in zip(self.nf4_errors, self.rival_errors, strict=True))

    @property
    def p_value(self) -> float:
        """Two-sided sign test: the probability of a split at least this uneven if both formats were equally good."""
        decided = [ratio for ratio in self.ratios if ratio != 1]
        count, wins = len(decided), sum(ratio < 1 for ratio in decided)
        tail = sum(math.comb(count, k) for k in range(min(wins, count - wins) + 1)) / 2**count
        return float(min(1.0, 2 * tail))

    @property
    def holds(self) -> bool | None:
        """Whether NF4 loses less than the rival; ``None`` (inconclusive) at p ≥ 0.05 or on unfair samples."""
        if self.unfair is not None or self.p_value >= 0.05:
            return None
        return sum(ratio < 1 for ratio in self.ratios) * 2 > len(self.ratios)

    def metrics(self) -> dict[str, float | str | None]:
        """The numbers behind `holds`, flat, for a result file."""
        return {
            "rival": self.rival,
            "samples": len(self.ratios),
            "nf4_relative_rms": mean(self.nf4_errors),
            "rival_relative_rms": mean(self.rival_errors),
            "ratio_least": min(self.ratios),
            "ratio_most": max(self.ratios),
            "nf4_bits_per_parameter": self.nf4_bits,
            "rival_bits_per_parameter": self.rival_bits,
            "p_value": self.p_value,
            "unfair": self.unfair,
        }


class Samples:
    """Weight matrices to compare formats on. Each format's errors are computed once, however many it is compared with.

    Raises `GaugeError` without any matrix.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._weights = tuple(weights)
        if not self._weights:
            raise GaugeError("no weights to compare the formats on; pass at least one sample")
        self._errors: dict[tuple[str, bool], tuple[float, ...]] = {}

    def __len__(self) -> int:
        return len(self._weights)

    def errors(self, quant_format: str, *, double_quant: bool = False) -> tuple[float, ...]:
        """The relative RMS error of each matrix in ``quant_format`` (`quantization_error`)."""
        key = (quant_format, double_quant)
        if key not in self._errors:
            self._errors[key] = tuple(
                quantization_error(weight, quant_format, double_quant=double_quant).relative_rms
                for weight in self._weights
            )
        return self._errors[key]

    @cached_property
    def unfair(self) -> str | None:
        """Why the matrices allow no fair comparison (`already_rounded`), or ``None``."""
        rounded = sum(already_rounded(weight) for weight in self._weights)
        if not rounded:
            return None
        return f"{rounded} of {len(self)} samples have at most 16 values per block: already rounded to 4 bit"


@cache
def drawn_samples(distribution: str, seeds: Sequence[int] = range(8)) -> Samples:
    """`drawn_weight` of each seed. ``seeds`` must be hashable: a range or a tuple."""
    return Samples(drawn_weight(distribution, seed) for seed in seeds)


def compare_nf4(samples: Samples, *, rival: str = "int4", double_quant: bool = False) -> FormatComparison:
    """Compare NF4 with ``rival``, both in blocks of 64.

    Args:
        samples: one pair of errors per matrix. Fewer than six are always inconclusive.
        double_quant: use double quantization for NF4, and for FP4 as the rival.
    """
    rival_double_quant = double_quant and rival == "fp4"
    return FormatComparison(
        rival=rival,
        nf4_errors=samples.errors("nf4", double_quant=double_quant),
        rival_errors=samples.errors(rival, double_quant=rival_double_quant),
        nf4_bits=bits_per_parameter("nf4", double_quant=double_quant),
        rival_bits=bits_per_parameter(rival, double_quant=rival_double_quant),
        unfair=samples.unfair,
    )


def nf4_against_int4(
    distribution: str, seeds: Sequence[int] = range(8), *, rival: str = "int4", double_quant: bool = False
) -> FormatComparison:
    """`compare_nf4` on weights drawn from ``distribution``, one sample per seed.

    INT4 in the literature (QLoRA, table 4) is symmetric, here ``"int4"``; ``"int4-minmax"`` is a stronger rival.
    """
    return compare_nf4(drawn_samples(distribution, seeds), rival=rival, double_quant=double_quant)
