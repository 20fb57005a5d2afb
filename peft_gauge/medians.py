"""A distribution-free confidence interval of the median."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cache


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """A confidence interval of the median of the distribution of ``values``, with at least this ``confidence``.

    The number of n independent values below the median has the distribution of heads in n coin tosses. The k-th
    smallest and the k-th largest value therefore enclose the median except with probability 2·P(Binomial(n, 1/2) < k).
    The interval has the greatest k that keeps this within 1 - ``confidence`` (Le Boudec, Performance Evaluation of
    Computer and Communication Systems, 2010, chapter 2). ``None`` if even the extremes do not suffice: below 6 values
    for 95 %.
    """
    rank = _rank(len(values), confidence)
    if rank == 0:
        return None
    ordered = sorted(values)
    return ordered[rank - 1], ordered[-rank]


@cache
def _rank(count: int, confidence: float) -> int:
    """The greatest k of `median_interval`, or 0; exact, by counting the 2**count outcomes of the tosses."""
    allowed = int(Fraction(1 - confidence) * 2**count / 2)
    below, ways = 0, 1  # outcomes with fewer than k heads; with exactly k - 1
    for k in range(1, count // 2 + 1):
        below += ways
        if below > allowed:
            return k - 1
        ways = ways * (count - k + 1) // k
    return count // 2
