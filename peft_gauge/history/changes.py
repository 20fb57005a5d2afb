"""Detect the runs at which a time changed to another level.

Times are compared by rank, so an outlier weighs no more than any other run. The split with the largest difference in
Wilcoxon's rank sum is a change point if the difference is significant; then both parts are split the same way (binary
segmentation: Scott and Knott 1974, Biometrics 30: 507-512). This finds changes that no comparison of two runs detects,
because they are smaller than the differences between hosts or processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

CHANCE = 0.05
"""Probability of any change point in a history of independent times without one: an upper bound (Bonferroni)."""

LEAST_RUNS = 5
"""Minimum number of runs on either side of a change point: among fewer, outliers would look like a change."""


def change_points(seconds: Sequence[float], minimum_effect: float = 0.03, chance: float = CHANCE) -> list[int]:
    """The indices in ``seconds`` (one time per run, oldest first) at which another level begins, in order.

    A change point needs `LEAST_RUNS` runs on either side and about a dozen in all, and the medians of the two levels
    must differ by more than ``minimum_effect`` (a factor of 1 + this). ``chance``: the probability of any change point
    in a history without one. The times are assumed independent; slow drift is reported as change points.
    """
    import numpy as np

    times = np.asarray(seconds, dtype=float)
    found = _without_small(times, sorted(_segmented(times, 0, len(times), chance)), minimum_effect)
    # Each index was found while its part held further change points; now locate each between its neighbours.
    ends = [0, *found, len(times)]
    around = zip(ends, ends[1:], ends[2:], strict=False)
    placed = {low + _placed(times[low:high], at - low) for low, at, high in around}
    return _without_small(times, sorted(placed), minimum_effect)


def _placed(part: np.ndarray, about: int) -> int:
    """The index of the one change point of ``part``, near ``about``: where the absolute deviations are least.

    A single time weighs at most the size of the change, however large an outlier it is.
    """
    import numpy as np

    before, after = np.median(part[:about]), np.median(part[about:])
    gained = np.cumsum(np.abs(part - before) - np.abs(part - after))
    places = np.arange(LEAST_RUNS, len(part) - LEAST_RUNS + 1)
    return int(places[np.argmin(gained[places - 1])])


def _segmented(times: np.ndarray, low: int, high: int, chance: float) -> Iterator[int]:
    """The significant change points in ``times[low:high]``."""
    spans = list(_spans(low, high))
    if not spans:
        return
    looks = sum(end - start for start, end in spans)
    (at, deviation), start = max(
        ((_largest(times[start:end]), start) for start, end in spans), key=lambda found: found[0][1]
    )
    if deviation > NormalDist().inv_cdf(1 - chance / 2 / looks):
        yield start + at
        yield from _segmented(times, low, start + at, chance)
        yield from _segmented(times, start + at, high, chance)


def _spans(low: int, high: int) -> Iterator[tuple[int, int]]:
    """The whole, and its halves, quarters, …, which overlap by half: in the whole, a rise and a fall soon after it hide
    each other (seeded intervals: Kovács et al. 2023, Biometrika 110: 249-256).
    """
    length = high - low
    while length >= 2 * LEAST_RUNS:
        for start in range(low, high - length + 1, max(1, length // 2)):
            yield start, start + length
        length //= 2


def _largest(part: np.ndarray) -> tuple[int, float]:
    """The index at which ranks before and after differ most, and by how many standard deviations of the rank sum."""
    import numpy as np

    _, group, sizes = np.unique(part, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(sizes) - (sizes - 1) / 2)[group]  # of equal times, the mean of their ranks
    count = len(part)
    before = np.arange(LEAST_RUNS, count - LEAST_RUNS + 1)
    excess = np.cumsum(ranks)[before - 1] - before * (count + 1) / 2
    deviations = np.abs(excess) / np.sqrt(before * (count - before) * (count + 1) / 12)
    largest = int(np.argmax(deviations))
    return int(before[largest]), float(deviations[largest])


def _without_small(times: np.ndarray, steps: Sequence[int], effect: float) -> list[int]:
    """``steps`` without those between levels that hardly differ, removing the smallest first."""
    import numpy as np

    left = list(steps)
    while left:
        levels = [float(np.median(times[low:high])) for low, high in pairwise([0, *left, len(times)])]
        sizes = [_excess(*both) for both in pairwise(levels)]
        if min(sizes) > effect:
            break
        del left[sizes.index(min(sizes))]
    return left


def _excess(one: float, other: float) -> float:
    """The fraction by which the greater number exceeds the smaller."""
    low, high = sorted((one, other))
    return high / low - 1 if low > 0 else math.inf if high > 0 else 0.0
