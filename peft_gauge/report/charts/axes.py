"""Axes that can be read: what they show in words, where they begin and end, and a few round ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

MOST_TICKS = 7
LEAST_TICKS = 3


def linear(title: str, values: Iterable[float], *, zero: bool = False) -> dict[str, Any]:
    """An axis for ``values``: its title, its ends and its ticks. ``zero``: it begins at 0."""
    known = list(values)
    low, high = (min([0.0, *known]), max([0.0, *known])) if zero else (min(known), max(known))
    margin = (high - low or abs(high) or 1.0) * 0.08
    low, high = (low if zero and low == 0 else low - margin), (high if zero and high == 0 else high + margin)
    return {"title": title, "domain": [low, high], "ticks": linear_ticks(low, high)}


def linear_ticks(low: float, high: float) -> list[float]:
    """The multiples within the ends of 1, 2 or 5 times a power of ten, the smallest that gives few enough."""
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / MOST_TICKS))
    step = next(each * power for each in (1, 2, 5, 10, 20) if span / (each * power) < MOST_TICKS - 1)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{place * step:.10g}") for place in range(first, last + 1)]


def logarithmic(title: str, values: Iterable[float]) -> dict[str, Any]:
    """A logarithmic axis for positive ``values``, with room at both ends."""
    known = [value for value in values if value > 0]
    low, high = min(known), max(known)
    margin = max((high / low) ** 0.1, 1.12)
    low, high = low / margin, high * margin
    return {"title": title, "domain": [low, high], "ticks": logarithmic_ticks(low, high)}


def logarithmic_ticks(low: float, high: float) -> list[float]:
    """At most seven round numbers: powers of ten, with 2 and 5 or only 3 between them where there is room."""
    for digits in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = _within(low, high, digits)
        if len(ticks) <= MOST_TICKS:
            break
    else:
        ticks = ticks[:: math.ceil(len(ticks) / MOST_TICKS)]
    return ticks if len(ticks) >= LEAST_TICKS else linear_ticks(low, high)


def _within(low: float, high: float, digits: Sequence[float]) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    numbers = (float(f"{digit}e{power}") for power in powers for digit in digits)
    return [number for number in numbers if low <= number <= high]
