"""NF4 compared with other 4-bit formats, on drawn weights and on a model's own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peft_gauge.errors import GaugeError, unknown
from peft_gauge.training.quantization.formats import bits_per_parameter, quantization_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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
    ordered = weight.detach().float().reshape(-1, block_size).sort(dim=1).values
    most_values = 1 + (ordered.diff(dim=1) != 0).sum(dim=1).max().item()
    return most_values <= 16


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


def compare_nf4(samples: Iterable[Tensor], *, rival: str = "int4", double_quant: bool = False) -> FormatComparison:
    """Compare NF4 with ``rival``, both in blocks of 64.

    Args:
        samples: weight matrices, one pair of errors each. Fewer than six are always inconclusive.
        double_quant: use double quantization for NF4, and for FP4 as the rival.
    """
    rival_double_quant = double_quant and rival == "fp4"
    nf4_errors, rival_errors, rounded = [], [], 0
    for weight in samples:
        nf4_errors.append(quantization_error(weight, "nf4", double_quant=double_quant).relative_rms)
        rival_errors.append(quantization_error(weight, rival, double_quant=rival_double_quant).relative_rms)
        rounded += already_rounded(weight)
    if not nf4_errors:
        raise GaugeError("no weights to compare the formats on; pass at least one sample")
    unfair = f"{rounded} of {len(nf4_errors)} samples have at most 16 values per block: already rounded to 4 bit"
    return FormatComparison(
        rival=rival,
        nf4_errors=tuple(nf4_errors),
        rival_errors=tuple(rival_errors),
        nf4_bits=bits_per_parameter("nf4", double_quant=double_quant),
        rival_bits=bits_per_parameter(rival, double_quant=rival_double_quant),
        unfair=unfair if rounded else None,
    )


def nf4_against_int4(
    distribution: str, seeds: Iterable[int] = range(8), *, rival: str = "int4", double_quant: bool = False
) -> FormatComparison:
    """`compare_nf4` on weights drawn from ``distribution``, one sample per seed.

    INT4 in the literature (QLoRA, table 4) is symmetric, here ``"int4"``; ``"int4-minmax"`` is a stronger rival.
    """
    samples = (drawn_weight(distribution, seed) for seed in seeds)
    return compare_nf4(samples, rival=rival, double_quant=double_quant)
