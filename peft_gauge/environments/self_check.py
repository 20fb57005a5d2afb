"""What this host can resolve: the same code on both sides, by a fixed number of pairs of processes.

The true ratio is 1. So their mean shows a bias, how they scatter shows the noise, and from the noise follows which
differences a comparison on this host would find.
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
"""So many standard errors from 0 a mean of log ratios is called a bias, as one in twenty is by chance."""
POWER = 0.8
"""The share of comparisons in which the smallest difference is found that is called so."""


@dataclass(frozen=True)
class Looked:
    """What a look at so many pairs of processes can decide on this host.

    ``half_width``: of the interval, as a log ratio; ``smallest``: the smallest slowdown, as a share, that is called
    worse in `POWER` of all comparisons, were this the only look.
    """

    pairs: int
    half_width: float
    smallest: float


@dataclass(frozen=True)
class Resolution:
    """What pairs of processes of the same code showed, as log ratios.

    ``bias`` is their mean and ``standard_error`` its error; ``first`` is what it costs to be started first (half of the
    difference between the means where A was and where B was), which ``bias`` is free of; ``spread``: their standard
    deviation beside ``first``; ``looks``: one for each of `PROCESS_PAIRS`; ``judged``: what a comparison of these
    very pairs says, at the last of its looks that they are enough for.
    """

    pairs: int
    bias: float
    standard_error: float
    first: float
    spread: float
    looks: tuple[Looked, ...]
    judged: Judgement

    @property
    def is_biased(self) -> bool:
        return abs(self.bias) > BIAS_ERRORS * self.standard_error


def resolution(log_ratios: Sequence[float], a_first: Sequence[bool], rule: PairRule) -> Resolution:
    """``log_ratios`` of B / A, one from each pair of processes, and whether A ``a_first``.

    Raises `GaugeError` for fewer than `LEAST_PAIRS`, or where one side was always first.
    """
    sides = [
        [ratio for ratio, first in zip(log_ratios, a_first, strict=True) if first is by_a] for by_a in (True, False)
    ]
    if len(log_ratios) < LEAST_PAIRS or min(map(len, sides)) < 2:
        raise GaugeError(f"a self-check needs {LEAST_PAIRS} pairs of processes at least, not {len(log_ratios)}")
    by_a, by_b = map(statistics.fmean, sides)
    within = [ratio - mean for side, mean in zip(sides, (by_a, by_b), strict=True) for ratio in side]
    spread = math.sqrt(math.fsum(each**2 for each in within) / (len(within) - 2))
    error = spread / 2 * math.sqrt(sum(1 / len(side) for side in sides))
    looks = tuple(_look(pairs, math.hypot(spread, (by_b - by_a) / 2), rule) for pairs in PROCESS_PAIRS)
    return Resolution(
        len(log_ratios), (by_a + by_b) / 2, error, (by_b - by_a) / 2, spread, looks, _judged(log_ratios, rule)
    )


def _look(pairs: int, deviation: float, rule: PairRule) -> Looked:
    """From the standard deviation of pairs of processes, with the effect of who is first, as a comparison has it."""
    from scipy.special import stdtrit

    error = deviation / math.sqrt(pairs)
    half = float(stdtrit(pairs - 1, 1 - rule.error * ERROR_SHARES[pairs] / 2)) * error
    beyond = max(half, math.log1p(rule.minimum_effect))
    return Looked(pairs, half, math.expm1(beyond + float(stdtrit(pairs - 1, POWER)) * error))


def _judged(log_ratios: Sequence[float], rule: PairRule) -> Judgement:
    for pairs in (each for each in PROCESS_PAIRS if each <= len(log_ratios)):
        judged = over_processes(log_ratios[:pairs], rule)
        if judged.verdict != "cannot tell":
            break
    return judged


def told(found: Resolution, name: str, lead: float, unsteady: str | None) -> list[str]:
    """``found`` in lines.

    ``name`` is the case's; ``lead``: by how much the first step of a pair took longer, as the logarithm of a factor;
    ``unsteady``: what was wrong with the host.
    """
    wrong = found.judged.verdict in ("worse", "better")
    verdict = f"{found.judged.verdict}: WRONG, for both sides are the same" if wrong else found.judged.verdict
    bias = f"a bias, more than {BIAS_ERRORS} standard errors (1 check in 20 shows one by chance)"
    lines = [
        f"{name}: {found.pairs} pairs of processes, the same code on both sides",
        f"  B against A: {_signed(found.bias)} %, standard error {100 * found.standard_error:.2f} %: "
        f"{bias if found.is_biased else 'no bias'}",
        f"  pairs of processes scatter by {100 * found.spread:.2f} %",
        f"  to be started first costs {_signed(found.first)} %, to step first {_signed(lead)} %; "
        "the order takes both out",
        f"  {unsteady or 'the host was steady'}",
        "  what a comparison can decide on this host:",
    ]
    lines += [
        f"    {each.pairs:2} pairs: known to ±{_percent(each.half_width)}, "
        f"a slowdown of {100 * each.smallest:.1f} % is found in {100 * POWER:.0f} of 100"
        for each in found.looks
    ]
    return [*lines, f"  verdict on these pairs: {verdict}"]


def _signed(log_ratio: float) -> str:
    return f"{100 * math.expm1(log_ratio):+.2f}"


def _percent(log_ratio: float) -> str:
    return f"{100 * math.expm1(log_ratio):.1f} %"
