"""Does one method keep the quality of another? The seeds in pairs, an interval of the difference, and a margin.

Both methods of a pair see the same data in the same order, so what makes a seed easy or hard for both drops out of
their difference. To be "no worse" is then a question of non-inferiority: not whether a difference was found, which two
noisy trainings seldom show, but whether one as large as the margin can be excluded. Pure functions of numbers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from peft_gauge.errors import GaugeError

LEAST_PAIRS = 3
"""Two pairs have one degree of freedom, whose 95 % interval reaches 12.7 standard errors each way: no answer."""

ERROR = 0.05
"""How often an interval may miss the true difference; half of that on the side that a verdict stands on."""


@dataclass(frozen=True)
class Difference:
    """By how much the new method's quality is above the base's (below 0: worse): its ``mean`` over ``pairs`` seeds and
    the interval from ``low`` to ``high``."""

    mean: float
    low: float
    high: float
    pairs: int

    def no_worse_than(self, margin: float) -> bool | None:
        """Whether the new method loses less than ``margin``: True where the whole interval says so, False where the
        whole interval says that it loses more, ``None`` (cannot tell) where the margin lies within it."""
        if not (math.isfinite(margin) and margin > 0):
            raise GaugeError(f"a margin of quality is a number above 0, not {margin}")
        if self.low > -margin:
            return True
        return False if self.high < -margin else None


@dataclass(frozen=True)
class Comparison:
    """Whether the new method keeps the base's quality (``None``: cannot tell), with the ``figure`` that says so, or why
    nothing can be said; ``difference`` is ``None`` where there is none."""

    holds: bool | None
    figure: str
    difference: Difference | None = None

    def as_json(self) -> dict[str, Any]:
        """The record as JSON holds it."""
        return asdict(self)


def difference(base: Mapping[int, float], new: Mapping[int, float], *, error: float = ERROR) -> Difference:
    """The mean of new - base over seeds, with Student's interval; it misses the true mean in a share ``error`` of cases
    where differences are normally distributed.

    Student's t, because the spread is itself estimated, from as few as three differences: with the normal
    distribution's 1.96 standard errors the interval of three would miss in 19 % of cases. Nor is the bootstrap an
    answer there: three pairs have ten different resamples. Raises `GaugeError` for fewer than two seeds, a seed without
    a partner, and a quality that is no finite number.
    """
    _check_partners(base, new)
    if len(base) < 2:
        raise GaugeError("an interval over seeds needs at least 2 of them")
    differences = [new[seed] - base[seed] for seed in base]
    if not all(map(math.isfinite, differences)):
        raise GaugeError("a quality that is no finite number cannot be compared; that of a diverged training is None")
    from scipy.special import stdtrit

    mean = statistics.fmean(differences)
    standard_error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = float(stdtrit(len(differences) - 1, 1 - error / 2)) * standard_error
    return Difference(mean, mean - half, mean + half, len(differences))


def compare(
    base: Mapping[int, float | None],
    new: Mapping[int, float | None],
    *,
    margin: float,
    least_base: float = -math.inf,
    names: tuple[str, str] = ("base", "new"),
) -> Comparison:
    """Whether ``new`` keeps the quality of ``base`` to within ``margin``, from the quality of each under every seed;
    ``names`` are what the figure calls the two.

    ``None`` is the quality of a training that diverged. Without its seed a method would be judged by its good days
    only, so nothing can be told then; nor can it from fewer than `LEAST_PAIRS` seeds, nor where the mean quality of
    ``base`` is below ``least_base``: of what taught nothing there is nothing to keep. Raises `GaugeError` where a seed
    has no partner.
    """
    _check_partners(base, new)
    for name, qualities in zip(names, (base, new), strict=True):
        diverged = [str(seed) for seed, quality in qualities.items() if quality is None]
        if diverged:
            return Comparison(None, f"{name} diverged under seed {' and '.join(diverged)}")
    if len(base) < LEAST_PAIRS:
        return Comparison(None, f"{len(base)} seeds are too few, at least {LEAST_PAIRS} are needed")
    of_base, of_new = ({k: q for k, q in side.items() if q is not None} for side in (base, new))
    found = difference(of_base, of_new)
    means = [
        f"{name} {statistics.fmean(side.values()):.4f}" for name, side in zip(names, (of_base, of_new), strict=True)
    ]
    interval = f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f}) over {found.pairs} seeds"
    figure = f"quality: {', '.join(means)}; {interval}, margin {margin:g}"
    if statistics.fmean(of_base.values()) < least_base:
        return Comparison(None, f"{figure}; {names[0]} learned too little, less than {least_base:g}", found)
    return Comparison(found.no_worse_than(margin), figure, found)


def _check_partners(base: Mapping[int, object], new: Mapping[int, object]) -> None:
    alone = sorted(base.keys() ^ new.keys())
    if alone:
        raise GaugeError(f"only one of the two methods was trained under seed {' and '.join(map(str, alone))}")
