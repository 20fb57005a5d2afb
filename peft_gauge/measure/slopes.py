"""How a peak grows with batch size and sequence length: slopes and intercepts instead of one number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """A peak against one size with the other fixed: ``peak = intercept_bytes + slope_bytes · size``.

    ``along`` is "batch" (bytes per row) or "seq" (bytes per token position, for all rows); ``held``: the other size.
    """

    along: str
    held: int
    slope_bytes: float
    intercept_bytes: float


def lines(points: Sequence[Mapping[str, Any]], metric: str) -> list[Line]:
    """The line through each two of ``points`` (``batch``, ``seq``, ``metric``) that differ in one size only.

    A peak is not linear in general (attention scores, logits versus weight gradients), but two points define a line, so
    planned and measured slopes between the same points can be compared. Points without the metric are skipped.
    """
    found = []
    for along, other in (("batch", "seq"), ("seq", "batch")):
        for held in sorted({point[other] for point in points}):
            on = sorted((point[along], point[metric]) for point in points if point[other] == held and metric in point)
            if len(on) == 2 and on[0][0] != on[1][0]:
                (first, low), (second, high) = on
                slope = (high - low) / (second - first)
                found.append(Line(along, held, slope, low - slope * first))
    return found
