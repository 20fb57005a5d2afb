"""Trade-offs of quality against cost: the Pareto frontier, its knee, and the knee's stability over seeds.

Pure functions of numbers: higher quality is better, lower cost (parameters, bytes, seconds) is better.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peft_gauge.errors import GaugeError

RESAMPLES = 2000


@dataclass(frozen=True)
class Point:
    """One setting: its ``cost``, positive, and its ``quality``."""

    label: str
    cost: float
    quality: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cost) and self.cost > 0 and math.isfinite(self.quality)):
            raise GaugeError(f"{self.label}: cost {self.cost} and quality {self.quality} must be finite, cost above 0")


def frontier(points: Sequence[Point]) -> list[Point]:
    """The Pareto-optimal points by ascending cost: every point of at most their cost has lower quality.

    Of points with equal cost and quality, the first is kept.
    """
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.quality)):
        if not kept or point.quality > kept[-1].quality:
            kept.append(point)
    return kept


def knee(points: Sequence[Point]) -> Point | None:
    """The point after which more cost buys least: the farthest above the straight line from the cheapest to the most
    expensive setting, over the logarithm of cost (Satopää et al., 2011, "Finding a Kneedle in a Haystack").

    The curve is the best quality up to a cost, so a setting that costs more and is worse flattens it. ``None`` if no
    point lies above the line: the gain is constant or still increasing.
    """
    if not points:
        raise GaugeError("a knee needs at least one setting")
    best = frontier(points)
    cheapest, dearest = min(p.cost for p in points), max(p.cost for p in points)
    if len(best) == 1:  # more cost, if any setting has more, gains nothing
        return best[0] if cheapest < dearest else None
    low, gain = best[0].quality, best[-1].quality - best[0].quality

    def above(point: Point) -> float:
        along = math.log(point.cost / cheapest) / math.log(dearest / cheapest)
        return (point.quality - low) / gain - along

    highest = max(best, key=above)
    return highest if above(highest) > 1e-9 else None


@dataclass(frozen=True)
class Knee:
    """The knee of the mean qualities, and the share of resamples with the knee at each setting (``None``: no knee)."""

    label: str | None
    shares: Mapping[str | None, float]
    seeds: int

    @property
    def share(self) -> float:
        """The share of resamples that agree with ``label``."""
        return self.shares.get(self.label, 0.0)

    def as_json(self) -> dict[str, object]:
        """The record as JSON; resamples without a knee count under "none"."""
        shares = {label or "none": share for label, share in self.shares.items()}
        return {"knee": self.label, "knee_share": self.share, "knee_shares": shares, "seeds": self.seeds}


def knee_over_seeds(
    costs: Mapping[str, float],
    qualities: Mapping[str, Sequence[float]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Knee:
    """The knee and its stability: seeds are drawn with replacement, the same for every setting (a seed's data is
    shared), and the knee of the means is computed again.

    ``qualities`` has one value per seed for each label of ``costs``. A share counts resamples; it is not a probability
    that the setting is best: with n seeds one resample in n^(n-1) is the same seed n times, so with three seeds the
    extremes weigh much. Raises `GaugeError` if a setting lacks a seed.
    """
    numbers = {len(values) for values in qualities.values()}
    if not costs or qualities.keys() != costs.keys() or len(numbers) != 1 or 0 in numbers:
        raise GaugeError("every setting needs a cost and one quality per seed, for the same seeds")
    (seeds,) = numbers

    def knee_of(drawn: Sequence[int]) -> str | None:
        means = {label: statistics.fmean(values[k] for k in drawn) for label, values in qualities.items()}
        found = knee([Point(label, costs[label], means[label]) for label in costs])
        return found.label if found else None

    generator = random.Random(seed)
    found = Counter(knee_of(generator.choices(range(seeds), k=seeds)) for _ in range(resamples))
    shares = {label: count / resamples for label, count in found.most_common()}
    return Knee(knee_of(range(seeds)), shares, seeds)
