"""Error rates against known ones."""

from __future__ import annotations

import random

import pytest

from peft_gauge.errors import GaugeError
from peft_gauge.quality.repetition import error_rate


def test_without_an_error_the_bound_is_the_exact_one() -> None:
    found = error_rate([True] * 40)
    assert (found.repetitions, found.right, found.wrong, found.inconclusive) == (40, 40, 0, 0)
    assert found.wrong_at_most == pytest.approx(1 - 0.05 ** (1 / 40))


def test_inconclusive_is_neither_right_nor_wrong() -> None:
    found = error_rate([True, None, False, True])
    assert (found.right, found.wrong, found.inconclusive) == (2, 1, 1)


def test_only_errors_exclude_nothing() -> None:
    assert error_rate([False] * 3).wrong_at_most == 1


@pytest.mark.parametrize("rate", [0.1, *(pytest.param(rate, marks=pytest.mark.slow) for rate in (0.02, 0.3))])
def test_the_bound_covers_the_true_rate_in_95_of_100_cases(rate: float) -> None:
    draw = random.Random(0)
    trials = 1000
    covered = sum(error_rate([draw.random() >= rate for _ in range(40)]).wrong_at_most >= rate for _ in range(trials))
    assert covered >= 0.93 * trials  # 0.95 but for the sampling of 1,000 trials


def test_nothing_repeated_is_an_error() -> None:
    with pytest.raises(GaugeError, match="at least 1 repetition"):
        error_rate([])
