"""The interval of a median against scipy's binomial distribution, and as often as it promises."""

from __future__ import annotations

import math
import random

import pytest

from peft_gauge.medians import median_interval


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99, 1 - 1e-4])
def test_the_interval_is_that_of_the_binomial(confidence: float) -> None:
    from scipy.stats import binom

    for count in range(1, 120):
        values = list(range(1, count + 1))  # so that the bounds are the ranks
        random.Random(count).shuffle(values)
        interval = median_interval(values, confidence)
        ranks = [k for k in range(1, count // 2 + 1) if 2 * binom.cdf(k - 1, count, 0.5) <= 1 - confidence]
        assert interval == ((ranks[-1], count + 1 - ranks[-1]) if ranks else None)


@pytest.mark.parametrize(
    ("count", "ends"),
    [
        (0, None),
        (1, None),
        (5, None),  # 1 - 2/2**5 = 93.75 %
        (6, (1, 6)),  # 1 - 2/2**6 = 96.9 %
        (10, (2, 9)),
        (25, (8, 18)),
        (2000, (956, 1045)),  # 0.5**2000 is no float any more
        (20_000, (9_861, 10_140)),
    ],
)
def test_known_ranks(count: int, ends: tuple[int, int] | None) -> None:
    from scipy.stats import binom

    values = [float(place) for place in range(1, count + 1)]
    random.Random(0).shuffle(values)
    assert median_interval(values) == ends
    if ends is not None:
        assert 2 * binom.cdf(ends[0] - 1, count, 0.5) <= 0.05 < 2 * binom.cdf(ends[0], count, 0.5)


def test_the_interval_covers_the_median_as_often_as_it_promises() -> None:
    draw = random.Random(7)
    covered = 0
    for _ in range(2000):
        interval = median_interval([draw.expovariate(1.0) for _ in range(15)])
        assert interval is not None
        covered += interval[0] <= math.log(2) <= interval[1]
    # At 15 rounds the interval from the 4th to the 12th covers with probability 0.9648.
    assert 0.95 < covered / 2000 < 0.98
