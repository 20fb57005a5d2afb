"""An interval for the median of what was drawn, whatever its distribution."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cache


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """The interval that covers the median of what ``values`` are drawn from with at least this ``confidence``.

    As many of n independent values lie below their median as heads fall in n tosses. So the k-th smallest and the k-th
    largest value enclose the median except with probability 2·P(Binomial(n, 1/2) < k), and the interval is the one with
    the greatest k that keeps this within 1 - ``confidence`` (Le Boudec, Performance Evaluation of Computer and
    Communication Systems, 2010, chapter 2). ``None`` where not even the extremes do: below 6 values for 95 %.
    """
    rank = _rank(len(values), confidence)
    if rank == 0:
        return None
    ordered = sorted(values)
    return ordered[rank - 1], ordered[-rank]


@cache
def _rank(count: int, confidence: float) -> int:
    """The greatest k of `median_interval`, or 0; exact, in whole numbers of the 2**count outcomes of the tosses."""
    allowed = int(Fraction(1 - confidence) * 2**count / 2)
    below, ways = 0, 1  # outcomes with fewer than k heads; with exactly k - 1
    for k in range(1, count // 2 + 1):
        below += ways
        if below > allowed:
            return k - 1
        ways = ways * (count - k + 1) // k
    return count // 2
