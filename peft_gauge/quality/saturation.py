"""How many trainable parameters are enough? A curve of bits left against parameters, and where it flattens.

The curve is a sigmoid in the logarithm of the parameters (Hill 1910; the usual curve of a dose and its effect): from
the bits that no parameter would leave, down to a floor that more parameters do not lower. All seeds share its height,
slope and floor; each has a position of its own. *Enough* is where the curve comes within a margin of its floor, and the
uncertainty is that of the mean position over seeds. Pure functions of numbers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from peft_gauge.errors import GaugeError

if TYPE_CHECKING:
    import numpy as np

STEEPEST = 20.0
"""Limit of the slope: between neighbouring ranks, a steeper curve is a step."""


@dataclass(frozen=True)
class Enough:
    """Parameters at which the curve is within a margin of its ``floor``, in bits, with the interval from ``low`` to
    ``high`` over ``seeds``."""

    params: float
    low: float
    high: float
    floor: float
    seeds: int

    def as_json(self) -> dict[str, Any]:
        """The record as JSON."""
        return asdict(self)


def enough(
    params: Sequence[float], bits: Mapping[int, Sequence[float]], *, margin: float, error: float
) -> Enough | None:
    """Where the curve of ``bits`` left, by seed and in the order of ``params``, comes within ``margin`` of its floor.

    ``None`` if it is within the margin everywhere. The interval is Student's, of the logarithm; it misses the mean with
    probability ``error``. Raises `GaugeError` for fewer than 4 settings or 2 seeds, or if a value is not positive.
    """
    from scipy.special import stdtrit

    _check(params, bits)
    top, slope, floor, halves = _fitted(params, bits)
    if top - floor <= margin:
        return None
    above = math.log((top - floor) / margin - 1) / slope if top - floor > 2 * margin else 0.0
    logs = [half + above for half in halves]
    mean = statistics.fmean(logs)
    half_width = float(stdtrit(len(logs) - 1, 1 - error / 2)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Enough(
        math.exp(mean), low=math.exp(mean - half_width), high=math.exp(mean + half_width), floor=floor, seeds=len(logs)
    )


def _check(params: Sequence[float], bits: Mapping[int, Sequence[float]]) -> None:
    if len(params) < 4 or len(bits) < 2:
        raise GaugeError("a curve over parameters needs at least 4 settings and 2 seeds")
    if any(len(values) != len(params) for values in bits.values()):
        raise GaugeError("every seed needs a value for each setting")
    if not all(math.isfinite(value) and value > 0 for values in (params, *bits.values()) for value in values):
        raise GaugeError("parameters and bits must be positive and finite")


def _fitted(
    params: Sequence[float], bits: Mapping[int, Sequence[float]]
) -> tuple[float, float, float, Sequence[float]]:
    """Top and floor in bits, slope, and the logarithm of the parameters at half height for each seed.

    Least squares of the logarithm of bits: a spread of 0.01 at the floor counts like one of 0.3 at the top.
    """
    import numpy as np
    from scipy.optimize import least_squares

    at = np.log(np.asarray(params, dtype=float))
    observed = np.log(np.asarray(list(bits.values()), dtype=float))
    highest, lowest = float(np.exp(observed.max())), float(np.exp(observed.min()))

    def residuals(theta: np.ndarray) -> np.ndarray:
        height, floor, slope = np.exp(theta[0]), np.exp(theta[1]), theta[2]
        halves = theta[3:, None]
        curve = floor + height / (1 + np.exp(np.clip(slope * (at[None, :] - halves), -500, 500)))
        return np.asarray((np.log(curve) - observed).ravel())

    middle = float(at.mean())
    width = float(at.max() - at.min())
    starts = [(middle + share * width, slope) for share in (-0.4, -0.2, 0.0, 0.2) for slope in (1.0, 3.0)]
    low = [math.log(1e-6), math.log(lowest / 10), 0.1, *[at.min() - width] * len(bits)]
    high = [math.log(100 * highest), math.log(2 * highest), STEEPEST, *[at.max() + width] * len(bits)]

    def fit(start: tuple[float, float]) -> Any:
        half, slope = start
        first = [math.log(max(highest - lowest, 1e-5)), math.log(lowest), slope, *[half] * len(bits)]
        return least_squares(residuals, np.clip(first, low, high), bounds=(low, high))

    best = min(map(fit, starts), key=lambda found: found.cost)
    height, floor, slope = math.exp(best.x[0]), math.exp(best.x[1]), float(best.x[2])
    return floor + height, slope, floor, [float(half) for half in best.x[3:]]
