"""The smallest change this host can resolve, from pairs of processes with the same code on both sides.

The true ratio is 1. The mean of the measured ratios shows the bias and their scatter the noise; the noise gives the
smallest difference that a comparison on this host would detect.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft_gauge.environments.pairs import ERROR_SHARES, PROCESS_PAIRS, PairRule, over_processes
from peft_gauge.errors import GaugeError

if TYPE_CHECKING:
    from peft_gauge.history.intervals import Judgement

LEAST_PAIRS = 4
BIAS_ERRORS = 2
"""A mean of log ratios more than this many standard errors from 0 is called a bias; one in twenty is by chance."""
POWER = 0.8
"""The share of comparisons that must detect a slowdown of the reported smallest size."""


@dataclass(frozen=True)
class InterimAnalysis:
    """The resolution of a comparison with ``pairs`` pairs of processes on this host.

    ``half_width``: of the interval, as a log ratio; ``smallest``: the smallest relative slowdown that is judged worse
    in `POWER` of all comparisons, if this were the only evaluation.
    """

    pairs: int
    half_width: float
    smallest: float


@dataclass(frozen=True)
class Resolution:
    """The result of pairs of processes with the same code, as log ratios.

    ``bias``: their mean, and ``standard_error`` its error; ``first``: the cost of being started first (half of the
    difference between the means with A first and with B first), which ``bias`` does not contain; ``spread``: their
    standard deviation apart from ``first``; ``analyses``: one for each of `PROCESS_PAIRS`; ``judged``: the verdict of a
    comparison on these pairs, at the last evaluation that they suffice for.
    """

    pairs: int
    bias: float
    standard_error: float
    first: float
    spread: float
    analyses: tuple[InterimAnalysis, ...]
    judged: Judgement

    @property
    def is_biased(self) -> bool:
        return abs(self.bias) > BIAS_ERRORS * self.standard_error


def resolution(log_ratios: Sequence[float], a_first: Sequence[bool], rule: PairRule) -> Resolution:
    """The resolution from ``log_ratios`` of B / A, one per pair of processes, and whether A was started first in each.

    Raises `GaugeError` for fewer than `LEAST_PAIRS`, or if one side was always first.
    """
    sides = [
        [ratio for ratio, first in zip(log_ratios, a_first, strict=True) if first is by_a] for by_a in (True, False)
    ]
    if len(log_ratios) < LEAST_PAIRS or min(map(len, sides)) < 2:
        raise GaugeError(f"a self-check needs at least {LEAST_PAIRS} pairs of processes, got {len(log_ratios)}")
    by_a, by_b = map(statistics.fmean, sides)
    within = [ratio - mean for side, mean in zip(sides, (by_a, by_b), strict=True) for ratio in side]
    spread = math.sqrt(math.fsum(each**2 for each in within) / (len(within) - 2))
    error = spread / 2 * math.sqrt(sum(1 / len(side) for side in sides))
    analyses = tuple(_analysis(pairs, math.hypot(spread, (by_b - by_a) / 2), rule) for pairs in PROCESS_PAIRS)
    return Resolution(
        len(log_ratios), (by_a + by_b) / 2, error, (by_b - by_a) / 2, spread, analyses, _judged(log_ratios, rule)
    )


def _analysis(pairs: int, deviation: float, rule: PairRule) -> InterimAnalysis:
    """The resolution, from the standard deviation of pairs of processes with the effect of the order included."""
    from scipy.special import stdtrit

    error = deviation / math.sqrt(pairs)
    half = float(stdtrit(pairs - 1, 1 - rule.error * ERROR_SHARES[pairs] / 2)) * error
    beyond = max(half, math.log1p(rule.minimum_effect))
    return InterimAnalysis(pairs, half, math.expm1(beyond + float(stdtrit(pairs - 1, POWER)) * error))


def _judged(log_ratios: Sequence[float], rule: PairRule) -> Judgement:
    for pairs in (each for each in PROCESS_PAIRS if each <= len(log_ratios)):
        judged = over_processes(log_ratios[:pairs], rule)
        if judged.verdict != "inconclusive":
            break
    return judged


def told(found: Resolution, name: str, lead: float, unsteady: str | None) -> list[str]:
    """``found`` as lines of text.

    ``name``: the case's id; ``lead``: log factor by which the first step of a pair is slower; ``unsteady``:
    disturbances of the host.
    """
    wrong = found.judged.verdict in ("worse", "better")
    verdict = f"{found.judged.verdict}: WRONG, both sides are the same" if wrong else found.judged.verdict
    bias = f"a bias, more than {BIAS_ERRORS} standard errors (1 check in 20 shows one by chance)"
    lines = [
        f"{name}: {found.pairs} pairs of processes, the same code on both sides",
        f"  B against A: {_signed(found.bias)} %, standard error {100 * found.standard_error:.2f} %: "
        f"{bias if found.is_biased else 'no bias'}",
        f"  pairs of processes scatter by {100 * found.spread:.2f} %",
        f"  cost of being started first {_signed(found.first)} %, of stepping first {_signed(lead)} %; "
        "the alternating order cancels both",
        f"  {unsteady or 'the host was steady'}",
        "  resolution of a comparison on this host:",
    ]
    lines += [
        f"    {each.pairs:2} pairs: interval ±{_percent(each.half_width)}; "
        f"a slowdown of {100 * each.smallest:.1f} % is detected in {100 * POWER:.0f} of 100 comparisons"
        for each in found.analyses
    ]
    return [*lines, f"  verdict on these pairs: {verdict}"]


def _signed(log_ratio: float) -> str:
    return f"{100 * math.expm1(log_ratio):+.2f}"


def _percent(log_ratio: float) -> str:
    return f"{100 * math.expm1(log_ratio):.1f} %"
