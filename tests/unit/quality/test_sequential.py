"""The error of adding seeds until an interval decides, by simulation."""

from __future__ import annotations

import numpy as np
from scipy.special import stdtrit

from peft_gauge.quality.sequential import LOOK_ERROR, LOOKS, until_decided

TRIALS = 20_000


def misses(error: float) -> float:
    """The share of comparisons in which an interval at some look misses the true difference, 0."""
    drawn = np.random.default_rng(20_261_128).standard_normal((TRIALS, LOOKS[-1]))
    missed = np.zeros(TRIALS, dtype=bool)
    for seeds in LOOKS:
        part = drawn[:, :seeds]
        standard_error = part.std(axis=1, ddof=1) / np.sqrt(seeds)
        missed |= np.abs(part.mean(axis=1)) > stdtrit(seeds - 1, 1 - error / 2) * standard_error
    return float(missed.mean())


def test_plain_intervals_at_every_look_are_wrong_too_often() -> None:
    assert 0.12 < misses(0.05) < 0.16


def test_the_error_of_one_look_keeps_that_of_all() -> None:
    assert 0.03 < misses(LOOK_ERROR) <= 0.05


def test_it_stops_at_the_first_look_that_decides() -> None:
    asked: list[int] = []

    def results(seeds: int) -> int:
        asked.append(seeds)
        return seeds

    assert until_decided(results, lambda seeds: seeds >= 5) == 5
    assert asked == [3, 4, 5]


def test_it_ends_at_the_last_look() -> None:
    assert until_decided(lambda seeds: seeds, lambda _: False) == LOOKS[-1]
