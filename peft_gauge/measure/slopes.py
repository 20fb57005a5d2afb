"""How a peak grows with the batch and with the length of sequence: slopes and intercepts, not one number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """A peak against one size while the other is held: ``peak = intercept_bytes + slope_bytes · size``.

    ``along`` is "batch" (bytes a row) or "seq" (bytes a token of each row); ``held`` the other size's value.
    """

    along: str
    held: int
    slope_bytes: float
    intercept_bytes: float


def lines(points: Sequence[Mapping[str, Any]], figure: str) -> list[Line]:
    """The line through each two of ``points`` (``batch``, ``seq``, ``figure``) that differ in one size only.

    A peak of two sizes is no line in general (attention's scores, logits against weights' gradients); through two
    points there is one, so what is compared is the slope between the same points, planned and measured.
    Points without the figure are passed over.
    """
    found = []
    for along, other in (("batch", "seq"), ("seq", "batch")):
        for held in sorted({point[other] for point in points}):
            on = sorted((point[along], point[figure]) for point in points if point[other] == held and figure in point)
            if len(on) == 2 and on[0][0] != on[1][0]:
                (first, low), (second, high) = on
                slope = (high - low) / (second - first)
                found.append(Line(along, held, slope, low - slope * first))
    return found
