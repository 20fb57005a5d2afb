"""Non-inferiority of one method's quality to another's: paired seeds, an interval of the difference, and a margin.

Both methods of a pair see the same data in the same order, so the difficulty of a seed cancels in the difference.
Non-inferiority does not mean that no difference was found, which is common for two noisy trainings, but that one as
large as the margin can be excluded. Pure functions of numbers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from peft_gauge.errors import GaugeError

LEAST_PAIRS = 3
"""Two pairs have one degree of freedom, and a 95 % interval of ±12.7 standard errors: useless."""

ERROR = 0.05
"""Probability that an interval misses the true difference; half of it on the side that a verdict depends on."""


@dataclass(frozen=True)
class Difference:
    """The new method's quality minus the base's (below 0: worse): ``mean`` over ``pairs`` seeds, with the interval from
    ``low`` to ``high``."""

    mean: float
    low: float
    high: float
    pairs: int

    def no_worse_than(self, margin: float) -> bool | None:
        """Whether the new method loses less than ``margin``: True or False if the whole interval agrees, ``None``
        (inconclusive) if it contains -``margin``."""
        if not (math.isfinite(margin) and margin > 0):
            raise GaugeError(f"the margin must be positive and finite, got {margin}")
        if self.low > -margin:
            return True
        return False if self.high < -margin else None


@dataclass(frozen=True)
class NonInferiority:
    """Whether the new method keeps the base's quality (``None``: inconclusive), with the ``metric`` or reason as text;
    ``difference`` is ``None`` if it could not be computed."""

    holds: bool | None
    metric: str
    difference: Difference | None = None

    def as_json(self) -> dict[str, Any]:
        """The record as JSON."""
        return asdict(self)


def difference(base: Mapping[int, float], new: Mapping[int, float], *, error: float = ERROR) -> Difference:
    """The mean of new - base over seeds, with Student's interval; for normally distributed differences it misses the
    true mean with probability ``error``.

    Student's t, because the spread is estimated too, from as few as three differences: an interval of three with the
    normal distribution's 1.96 standard errors would miss in 19 % of cases. The bootstrap does not help: three pairs
    have ten different resamples. Raises `GaugeError` for fewer than two seeds, a seed without a partner, or a quality
    that is not finite.
    """
    _check_partners(base, new)
    if len(base) < 2:
        raise GaugeError("an interval over seeds needs at least 2 seeds")
    differences = [new[seed] - base[seed] for seed in base]
    if not all(map(math.isfinite, differences)):
        raise GaugeError("the quality is not finite; use None for a diverged training")
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
    error: float = ERROR,
    quality: str = "quality",
) -> NonInferiority:
    """Whether ``new`` keeps the quality of ``base`` within ``margin``, given both qualities under every seed; ``names``
    and ``quality`` name the two and their metric in the text; ``error`` is that of `difference`.

    ``None`` is the quality of a diverged training. The result is then inconclusive: dropping diverged seeds would bias
    it (survivorship). It is also inconclusive for fewer than `LEAST_PAIRS` seeds, or if the mean quality of ``base`` is
    below ``least_base``: nothing was learned that could be kept. Raises `GaugeError` if a seed has no partner.
    """
    _check_partners(base, new)
    for name, qualities in zip(names, (base, new), strict=True):
        diverged = [str(seed) for seed, quality in qualities.items() if quality is None]
        if diverged:
            return NonInferiority(None, f"{name} diverged under seed {' and '.join(diverged)}")
    if len(base) < LEAST_PAIRS:
        return NonInferiority(None, f"{len(base)} seeds are too few, at least {LEAST_PAIRS} are needed")
    of_base, of_new = ({k: q for k, q in side.items() if q is not None} for side in (base, new))
    found = difference(of_base, of_new, error=error)
    means = [
        f"{name} {statistics.fmean(side.values()):.4f}" for name, side in zip(names, (of_base, of_new), strict=True)
    ]
    interval = f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f}) over {found.pairs} seeds"
    metric = f"{quality}: {', '.join(means)}; {interval}, margin {margin:g}"
    if statistics.fmean(of_base.values()) < least_base:
        return NonInferiority(None, f"{metric}; {names[0]} learned too little, less than {least_base:g}", found)
    return NonInferiority(found.no_worse_than(margin), metric, found)


def _check_partners(base: Mapping[int, object], new: Mapping[int, object]) -> None:
    alone = sorted(base.keys() ^ new.keys())
    if alone:
        raise GaugeError(f"only one of the two methods was trained under seed {' and '.join(map(str, alone))}")
