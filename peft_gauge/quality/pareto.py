"""The best trade of quality against cost: the frontier, its knee, and how sure the knee is over seeds.

Pure functions of numbers: quality is better where it is higher, a cost (parameters, bytes, seconds) where it is lower.
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
    """One setting: its ``cost``, above 0, and its ``quality``."""

    label: str
    cost: float
    quality: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cost) and self.cost > 0 and math.isfinite(self.quality)):
            raise GaugeError(f"{self.label}: cost {self.cost} and quality {self.quality} are no point of a trade-off")


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats, by ascending cost: whatever is at most as dear is worse.

    Of points that are equal in both, the first stands for all.
    """
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.quality)):
        if not kept or point.quality > kept[-1].quality:
            kept.append(point)
    return kept


def knee(points: Sequence[Point]) -> Point | None:
    """The point after which more cost buys the least: the farthest above the straight line from the cheapest to the
    dearest setting, over the logarithm of cost (Satopää et al., 2011, "Finding a Kneedle in a Haystack").

    What a dearer setting is worth is the best quality up to its cost, so a setting that is dearer and worse still
    shows that the curve has gone flat. ``None`` where no point lies above the line: the gain is even, or still growing.
    """
    if not points:
        raise GaugeError("there is no setting to find a knee among")
    best = frontier(points)
    cheapest, dearest = min(p.cost for p in points), max(p.cost for p in points)
    if len(best) == 1:  # nothing is gained by paying more, if there is more to pay
        return best[0] if cheapest < dearest else None
    low, gain = best[0].quality, best[-1].quality - best[0].quality

    def above(point: Point) -> float:
        along = math.log(point.cost / cheapest) / math.log(dearest / cheapest)
        return (point.quality - low) / gain - along

    highest = max(best, key=above)
    return highest if above(highest) > 1e-9 else None


@dataclass(frozen=True)
class Knee:
    """The knee of the mean qualities, and the share of resamples in which each setting is it (``None``: no knee)."""

    label: str | None
    shares: Mapping[str | None, float]
    seeds: int

    @property
    def share(self) -> float:
        """The share of resamples that agree with ``label``."""
        return self.shares.get(self.label, 0.0)

    def as_json(self) -> dict[str, object]:
        """The record as JSON holds it; a resample without a knee counts under "none"."""
        shares = {label or "none": share for label, share in self.shares.items()}
        return {"knee": self.label, "knee_share": self.share, "knee_shares": shares, "seeds": self.seeds}


def knee_over_seeds(
    costs: Mapping[str, float],
    qualities: Mapping[str, Sequence[float]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Knee:
    """The knee and how sure it is: seeds are drawn with replacement, the same for every setting (they share a seed's
    data), and the knee is sought again in the means.

    ``qualities`` has one value a seed for each label of ``costs``. A share is of resamples, not a probability that
    the setting is best: of n seeds one resample in n^(n-1) is the same seed n times, so with three the extremes
    weigh much. Raises `GaugeError` where a setting lacks a seed.
    """
    numbers = {len(values) for values in qualities.values()}
    if not costs or qualities.keys() != costs.keys() or len(numbers) != 1 or 0 in numbers:
        raise GaugeError("every setting needs a cost and one quality a seed, of the same seeds")
    (seeds,) = numbers

    def knee_of(drawn: Sequence[int]) -> str | None:
        means = {label: statistics.fmean(values[k] for k in drawn) for label, values in qualities.items()}
        found = knee([Point(label, costs[label], means[label]) for label in costs])
        return found.label if found else None

    generator = random.Random(seed)
    found = Counter(knee_of(generator.choices(range(seeds), k=seeds)) for _ in range(resamples))
    shares = {label: count / resamples for label, count in found.most_common()}
    return Knee(knee_of(range(seeds)), shares, seeds)
