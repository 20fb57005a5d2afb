"""Two clocks that tick in turn: is B slower than A?

A pair is one step of A and one of B, next to each other in time, so that what slows the machine slows both, and their
ratio keeps none of it. The steps simply take turns, A B A B …: each follows one of the other side and finds the same
cold caches. With the order within pairs reversed every other time, a step would follow one of its own side half of the
time, and the ratios would fall into two heaps with the median in the gap between them: of 200 pairs of one and the
same code its interval was ±3 to ±10 % wide, and taking turns ±1 % (20 sets each on a busy host of 2 cores).

The median of the ratios is judged by its order-statistics interval, which asks nothing of the ratios' distribution but
that pairs are independent.

Looking at the verdict while pairs come in is looking many times, and each look may be fooled. So the k-th look is made
at an error of error / (k·(k + 1)). Over all looks, however many, these add up to ``error`` at most (the union bound,
with the series of 1/(k(k+1))), whatever the looks have to do with each other. Between two looks the number of pairs
grows by a factor, so that there are few of them.
"""

from __future__ import annotations

import math
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peft_gauge.clock.rounds import DEFAULT_WARM_UP, WarmUp
from peft_gauge.errors import GaugeError
from peft_gauge.history.intervals import Judgement, judge, of_pairs

if TYPE_CHECKING:
    from peft_gauge.clock import Clock

Step = Callable[[], float]
"""Takes one step and returns its seconds."""

PROCESS_PAIRS = (4, 8, 16)
"""At so many pairs of processes the verdict is looked at. Among processes of the same code that are 2.4 % apart, 16 are
needed to find 3 % (``benchmarks/test_verdicts.py``)."""

ERROR_SHARES = {4: 1 / 6, 8: 1 / 6, 16: 2 / 3}
"""The part of the error that each of these looks may take: the last most, which has to find small changes."""

LEAST_CHANGE = 1 / 3
"""The part of the minimum effect that the ratio has to reach: half of all estimates of an effect are below it."""

_NO_INTERVAL = 700.0  # the logarithm of a ratio past which nothing is told apart


@dataclass(frozen=True)
class PairRule:
    """When pairs end: at a verdict, or when ``budget_seconds`` are over.

    ``minimum_effect``: a smaller difference, as a share, is none; ``error``: the chance of a wrong *worse* or
    *better*, over all looks, half of it for either; ``first_look``: the number of pairs at the first look; ``growth``:
    from one look to the next.
    """

    budget_seconds: float = 60.0
    minimum_effect: float = 0.03
    error: float = 0.02
    first_look: int = 24
    growth: float = 1.4

    def __post_init__(self) -> None:
        if not 0 < self.budget_seconds < math.inf:
            raise GaugeError(f"a budget of {self.budget_seconds:g} s is none; give a positive number of seconds")
        if not 0 < self.minimum_effect < 1:
            raise GaugeError(f"the minimum effect must lie between 0 and 1, not at {self.minimum_effect:g}")

    def error_at(self, look: int) -> float:
        """The error at which the ``look``-th look is made, counted from 1."""
        return self.error / (look * (look + 1))

    @property
    def within_processes(self) -> PairRule:
        """The rule for the steps of one pair of processes out of `PROCESS_PAIRS`."""
        return replace(self, budget_seconds=self.budget_seconds / PROCESS_PAIRS[-1])

    def pairs_at(self, look: int) -> int:
        """How many pairs there are at the ``look``-th look, counted from 1, unless the budget ends before."""
        return round(self.first_look * self.growth ** (look - 1))


def over_processes(log_ratios: Sequence[float], rule: PairRule) -> Judgement:
    """The verdict on several pairs of processes, each of which gave the logarithm of one ratio B / A.

    How a process lies in memory makes its steps faster or slower for as long as it lives, so the processes are the
    sample and the steps within them are not. It is looked at when there are as many as `PROCESS_PAIRS` says, and the
    looks share the error (`ERROR_SHARES`, union bound).
    """
    return judge(
        of_pairs(log_ratios),
        rule.error * ERROR_SHARES[len(log_ratios)],
        rule.minimum_effect,
        least_change=LEAST_CHANGE * rule.minimum_effect,
    )


@dataclass(frozen=True)
class PairedRatios:
    """The estimate (`peft_gauge.history.intervals.Estimate`) of the median ratio from ``log_ratios``, one a pair."""

    log_ratios: Sequence[float]

    @property
    def log_ratio(self) -> float:
        return statistics.median(self.log_ratios)

    @property
    def processes(self) -> tuple[int, int]:
        return 1, 1

    def p_value(self, null: float = 0.0) -> float:
        """Of the sign test, to which the interval belongs; ratios of exactly ``null`` count for neither sign."""
        from scipy.special import bdtr

        above = sum(each > null for each in self.log_ratios)
        below = sum(each < null for each in self.log_ratios)
        return min(1.0, 2 * float(bdtr(min(above, below), above + below, 0.5)))

    def interval(self, error: float) -> tuple[float, float]:
        """From the k-th smallest to the k-th greatest, with the greatest k that keeps to ``error``.

        `peft_gauge.clock.rounds.median_interval` says why; its exact sums take seconds for thousands of ratios.
        """
        from scipy.special import bdtr

        ordered, count = sorted(self.log_ratios), len(self.log_ratios)
        ranks = range(1, count // 2 + 1)
        rank = bisect_right(ranks, error / 2, key=lambda k: float(bdtr(k - 1, count, 0.5)))
        return (ordered[rank - 1], ordered[-rank]) if rank else (-_NO_INTERVAL, _NO_INTERVAL)

    def seen(self, error: float) -> tuple[float, float]:
        return self.interval(error)


@dataclass(frozen=True)
class Paired:
    """What pairs said.

    ``seconds_a`` and ``seconds_b``: of each pair's steps, in order; ``judged``: the verdict on the median of B / A, at
    the error of its look, where ``further`` counts *pairs*, of which each takes about ``pair_seconds``; ``looks``: how
    often was looked; ``warmed_up``: whether both sides had stopped becoming faster before the first pair.
    """

    seconds_a: tuple[float, ...]
    seconds_b: tuple[float, ...]
    judged: Judgement
    looks: int
    pair_seconds: float
    warmed_up: bool

    @property
    def pairs(self) -> int:
        return len(self.seconds_a)


def step_in_pairs(
    step_a: Step,
    step_b: Step,
    rule: PairRule,
    *,
    clock: Clock = time.monotonic,
    warm_up: WarmUp = DEFAULT_WARM_UP,
    on_look: Callable[[int, Judgement], object] = lambda pairs, judged: None,
) -> Paired:
    """Step in pairs until ``rule`` ends them, after a warm-up of pairs that do not count.

    ``on_look`` is called at each look with the number of pairs and the verdict so far. What a step raises is not
    caught.
    """
    warmed_up = _warm_up(step_a, step_b, clock, warm_up)
    seconds: tuple[list[float], list[float]] = ([], [])
    begin, look = clock(), 1
    while True:
        seconds[0].append(step_a())
        seconds[1].append(step_b())
        pairs, elapsed = len(seconds[0]), clock() - begin
        over = elapsed >= rule.budget_seconds
        if not over and pairs < rule.pairs_at(look):
            continue
        judged = judge_pairs(*seconds, rule, look)
        on_look(pairs, judged)
        if over or judged.verdict != "cannot tell":
            return Paired(tuple(seconds[0]), tuple(seconds[1]), judged, look, elapsed / pairs, warmed_up)
        look += 1


def judge_pairs(seconds_a: Sequence[float], seconds_b: Sequence[float], rule: PairRule, look: int) -> Judgement:
    """The verdict on the median ratio B / A at the ``look``-th look; ``further`` counts pairs.

    Raises `GaugeError` where a step took no time by its clock.
    """
    if min(*seconds_a, *seconds_b) <= 0:
        raise GaugeError("a step took 0 seconds: the clock is too coarse for steps as short as these")
    ratios = PairedRatios([math.log(b / a) for a, b in zip(seconds_a, seconds_b, strict=True)])
    judged = judge(ratios, rule.error_at(look), rule.minimum_effect)
    return judged if judged.further is None else replace(judged, further=_further(ratios, judged, rule))


def _further(ratios: PairedRatios, judged: Judgement, rule: PairRule) -> int:
    """Intervals shrink as 1/√n: how many more pairs until this one would lie on one side, if the median stays.

    What is needed is the distance of the median from where its verdict would change, at least a hundredth of the
    minimum effect, since a median right there would need endless pairs.
    """
    effect = math.log1p(rule.minimum_effect)
    centre = abs(ratios.log_ratio)
    needed = centre if centre > effect else max(effect - centre, effect / 100)
    half = max(math.log(judged.high / judged.ratio), math.log(judged.ratio / judged.low))
    count = len(ratios.log_ratios)
    return max(1, math.ceil(count * min((half / needed) ** 2 - 1, 1e6)))


def _warm_up(step_a: Step, step_b: Step, clock: Clock, warm_up: WarmUp) -> bool:
    """Whether both sides were seen to have stopped becoming faster."""
    seconds: tuple[list[float], list[float]] = ([], [])
    deadline = clock() + warm_up.budget_seconds
    for number in range(warm_up.most):
        seconds[0].append(step_a())
        seconds[1].append(step_b())
        if all(map(warm_up.is_over, seconds)):
            return True
        if number + 1 >= warm_up.least and clock() >= deadline:
            break
    return False
