"""When to stop adding seeds: a group-sequential test with alpha spent evenly over its looks.

Looking at more and more seeds until a 95 % interval decides is wrong more often than in 5 %: with looks at 3, 4, 5, 6
and 8 seeds, in 14 % (Armitage, McPherson and Rowe 1969 describe the effect). With the same narrower error at each look
(Pocock 1977), here `LOOK_ERROR`, some look misses the truth in at most 5 %
(`tests/unit/quality/test_sequential.py` simulates both).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Result = TypeVar("Result")

LOOKS = (3, 4, 5, 6, 8)
"""Numbers of seeds at which a comparison is evaluated."""

LOOK_ERROR = 0.014
"""Probability that an interval at one look misses the true difference."""


def until_decided(
    results_of: Callable[[int], Result], decided: Callable[[Result], bool], looks: Sequence[int] = LOOKS
) -> Result:
    """The results at the first of ``looks`` that ``decided`` accepts, or at the last one."""
    for number in looks:
        results = results_of(number)
        if decided(results):
            break
    return results
