"""Enough parameters: known curves are found again, and the interval covers the truth as often as it states."""

from __future__ import annotations

import math

import numpy as np
import pytest

from peft_gauge.errors import GaugeError
from peft_gauge.quality.saturation import enough

PARAMS = [4096 * 2**k for k in range(6)]
MARGIN = 0.25


def curve(params: float, half: float, *, top: float = 8.0, floor: float = 0.1, slope: float = 2.0) -> float:
    return floor + (top - floor) / (1 + (params / half) ** slope)


def where(half: float, *, top: float = 8.0, floor: float = 0.1, slope: float = 2.0) -> float:
    return float(half * ((top - floor) / MARGIN - 1) ** (1 / slope))


def drawn(half: float, seeds: int, generator: np.random.Generator) -> dict[int, list[float]]:
    """Curves whose position differs between seeds by 10 %, with 5 % of noise."""
    return {
        seed: [curve(p, half * shift) * float(np.exp(generator.normal(0, 0.05))) for p in PARAMS]
        for seed, shift in enumerate(np.exp(generator.normal(0, 0.1, seeds)))
    }


@pytest.mark.parametrize("half", [6e3, 1e4, 2e4])
def test_a_curve_without_noise_is_found_again(half: float) -> None:
    bits = {seed: [curve(p, half) for p in PARAMS] for seed in range(3)}

    found = enough(PARAMS, bits, margin=MARGIN, error=0.05)

    assert found is not None
    assert found.params == pytest.approx(where(half), rel=0.02)
    assert found.high / found.low == pytest.approx(1, abs=0.01)
    assert found.floor == pytest.approx(0.1, rel=0.05)


def test_the_interval_covers_the_truth() -> None:
    generator = np.random.default_rng(20_261_128)
    half, covered, trials = 1e4, 0, 60
    for _ in range(trials):
        found = enough(PARAMS, drawn(half, 4, generator), margin=MARGIN, error=0.05)
        assert found is not None
        covered += found.low <= where(half) <= found.high
    assert covered / trials > 0.85  # 95 % stated; of 60 trials, 99 % of draws have more than 52


def test_a_flat_curve_has_no_such_place() -> None:
    bits = {seed: [0.1 + 0.01 * seed] * len(PARAMS) for seed in range(3)}
    assert enough(PARAMS, bits, margin=MARGIN, error=0.05) is None


def test_a_curve_that_still_falls_ends_beyond_the_last_rank() -> None:
    bits = {seed: [curve(p, 2e5) for p in PARAMS] for seed in range(3)}
    found = enough(PARAMS, bits, margin=MARGIN, error=0.05)
    assert found is not None
    assert found.params > PARAMS[-1]


@pytest.mark.parametrize(
    ("params", "bits"),
    [
        (PARAMS[:3], {0: [1.0] * 3, 1: [1.0] * 3}),
        (PARAMS, {0: [1.0] * 6}),
        (PARAMS, {0: [1.0] * 6, 1: [1.0] * 5}),
        (PARAMS, {0: [1.0] * 6, 1: [0.0] * 6}),
        (PARAMS, {0: [1.0] * 6, 1: [math.inf] * 6}),
    ],
)
def test_too_little_data_is_an_error(params: list[float], bits: dict[int, list[float]]) -> None:
    with pytest.raises(GaugeError, match="curve over parameters|every seed|positive and finite"):
        enough(params, bits, margin=MARGIN, error=0.05)
