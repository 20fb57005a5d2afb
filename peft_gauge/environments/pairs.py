"""Two processes whose steps take turns: is B slower than A?

A pair is one step of A and one of B, next to each other in time, so that what slows the machine slows both, and their
ratio keeps none of it. Steps take turns, A B A B …: each follows one of the other side and finds the same cold caches.

Which side comes first must not matter, and it does. LoRA steps of 6 ms, the same code on both sides, two cores: in 64
pairs of processes of which A was always first, A was 0.22 ± 0.08 % slower; with two busy neighbours the first step of a
pair was 0.4 ± 0.2 % slower than the second (16 pairs of processes); and a step behind a pause of 5 ms takes 2.9 ± 0.2 %
longer than one that follows the other side's at once. So the lead changes, at two levels:

- Within a pair of processes the side that leads changes from block to block: A B A B … | B A B A …. The ratios of the
  blocks that A leads have a median of their own, and so have those that B leads; their mean is the estimate, in which
  whatever the first step of a pair costs cancels. Were the lead to change from pair to pair, a step would follow one of
  its own side half of the time, and the ratios would fall into two heaps with the median in the gap between them: of 40
  pairs of steps such medians scattered by 3.1 % over 16 pairs of processes, and the estimates of blocks by 1.0 %.
- Over pairs of processes the side that is started first, built first and leads the first block changes too
  (`a_leads`), so that it is A's in one half of them and B's in the other, at each number in `PROCESS_PAIRS`. An effect
  of that position is in one half with the other sign: the mean is free of it, and the spread that the interval is made
  of contains it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peft_gauge.clock.rounds import DEFAULT_WARM_UP, WarmUp
from peft_gauge.errors import GaugeError
from peft_gauge.history.intervals import Judgement, judge, of_pairs
from peft_gauge.medians import median_interval

if TYPE_CHECKING:
    from peft_gauge.clock import Clock

Step = Callable[[], float]
"""Takes one step and returns its seconds."""

PROCESS_PAIRS = (4, 8, 16)
"""At so many pairs of processes the verdict is looked at. Among processes of the same code that are 2.4 % apart, 16 are
needed to find 5 % (``benchmarks/test_verdicts.py``)."""

ERROR_SHARES = {4: 1 / 6, 8: 1 / 6, 16: 2 / 3}
"""The part of the error that each of these looks may take: the last most, which has to find small changes."""

BLOCK_PAIRS = 12
"""Pairs of steps that one side leads before the other does; fewer where they are long."""

BLOCKS = 8
"""In at least so many blocks a pair of processes spends its budget, where a pair of steps is short enough for it."""

PRECISION = 1 / 3
"""The part of the minimum effect to which one pair of processes is measured. Processes of the same code are 0.6 % apart
and more, so that a third of 3 % is fine enough; and starting them takes longer than their steps."""

_CONFIDENCE = 0.95
_NO_INTERVAL = 700.0  # the logarithm of a ratio past which nothing is told apart


@dataclass(frozen=True)
class PairRule:
    """What a difference is, and how long to look for one.

    ``budget_seconds``: of steps, over all pairs of processes; ``minimum_effect``: a smaller difference, as a share, is
    neither worse nor better; ``error``: the chance of a wrong *worse* or *better*, over all looks, half of it for
    either.
    """

    budget_seconds: float = 60.0
    minimum_effect: float = 0.03
    error: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.budget_seconds < math.inf:
            raise GaugeError(f"a budget of {self.budget_seconds:g} s is none; give a positive number of seconds")
        if not 0 < self.minimum_effect < 1:
            raise GaugeError(f"the minimum effect must lie between 0 and 1, not at {self.minimum_effect:g}")

    @property
    def within_processes(self) -> PairRule:
        """The rule for the steps of one pair of processes out of `PROCESS_PAIRS`."""
        return replace(self, budget_seconds=self.budget_seconds / PROCESS_PAIRS[-1])


def a_leads(number: int) -> bool:
    """Whether A comes first in the ``number``-th pair of processes, counted from 0: A B B A, and so on.

    Of every four, A is first in two, and a host that becomes slower all the time favours neither.
    """
    return number % 4 in (0, 3)


def over_processes(log_ratios: Sequence[float], rule: PairRule) -> Judgement:
    """The verdict on several pairs of processes, each of which gave the logarithm of one ratio B / A.

    ``log_ratios`` are in the order of `a_leads`. How a process lies in memory makes its steps faster or slower for as
    long as it lives, so the processes are the sample and the steps within them are not. It is looked at when there are
    as many as `PROCESS_PAIRS` says, and the looks share the error (`ERROR_SHARES`, union bound).

    An effect p of who comes first is +p in one half of the ratios and -p in the other: their mean has none of it, and
    their variance, from which the interval is made, is greater by p²·n/(n - 1). With a term for p in the model the
    interval would be narrower where p is greater than what processes differ by, and far wider at four pairs, where a
    third of the degrees of freedom would go into it.
    """
    return judge(of_pairs(log_ratios), rule.error * ERROR_SHARES[len(log_ratios)], rule.minimum_effect)


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
        """`median_interval` of the ratios, which `p_value` is the test of; as wide as can be where there is none."""
        return median_interval(self.log_ratios, 1 - error) or (-_NO_INTERVAL, _NO_INTERVAL)

    def seen(self, error: float) -> tuple[float, float]:
        return self.interval(error)


@dataclass(frozen=True)
class Paired:
    """What the steps of one pair of processes said.

    ``seconds_a`` and ``seconds_b``: of each pair's steps, in order; ``a_led``: for each pair, whether A came first;
    ``warmed_up``: whether both sides had stopped becoming faster before the first pair.

    Raises `GaugeError` where a step took no time by its clock.
    """

    seconds_a: tuple[float, ...]
    seconds_b: tuple[float, ...]
    a_led: tuple[bool, ...]
    warmed_up: bool = True

    def __post_init__(self) -> None:
        if min(*self.seconds_a, *self.seconds_b) <= 0:
            raise GaugeError("a step took 0 seconds: the clock is too coarse for steps as short as these")

    @property
    def pairs(self) -> int:
        return len(self.seconds_a)

    @property
    def log_ratio(self) -> float:
        """Of B / A: the mean of the median where A led and the median where B did."""
        return statistics.fmean(map(statistics.median, self._by_lead()))

    @property
    def lead(self) -> float:
        """By how much the first step of a pair takes longer, as the logarithm of a factor; 0 where one side led."""
        by_lead = [statistics.median(each) for each in self._by_lead()]
        return (by_lead[0] - by_lead[1]) / 2 if len(by_lead) == 2 else 0.0

    @property
    def half_width(self) -> float:
        """How far `log_ratio` is known from these steps alone: half of its 95 % interval, `_NO_INTERVAL` for a few."""
        around = [ratio - statistics.median(each) for each in self._by_lead() for ratio in each]
        low, high = PairedRatios(around).interval(1 - _CONFIDENCE)
        return (high - low) / 2

    def _by_lead(self) -> list[list[float]]:
        """The log ratios, those of the side that did not lead first, without a side that never led."""
        found: dict[bool, list[float]] = {False: [], True: []}
        for a, b, led in zip(self.seconds_a, self.seconds_b, self.a_led, strict=True):
            found[led].append(math.log(b / a))
        return [each for each in found.values() if each]


def step_in_pairs(
    step_a: Step,
    step_b: Step,
    rule: PairRule,
    *,
    a_first: bool = True,
    clock: Clock = time.monotonic,
    warm_up: WarmUp = DEFAULT_WARM_UP,
    on_blocks: Callable[[Paired], object] = lambda paired: None,
) -> Paired:
    """Step in pairs, after a warm-up of pairs that do not count, until the ratio is known or the budget is over.

    It is known well enough at a half-width of `PRECISION` of the minimum effect. What the ratio is does not matter:
    who stops where it looks decided keeps the luckiest ratios.

    ``a_first``: whether A leads the first block. Blocks are taken two and two, one led by either side, and nothing is
    done within a block but stepping: a pause would slow the step behind it. ``on_blocks`` is called behind each two.
    What a step raises is not caught.
    """
    warmed_up, pair_seconds = _warm_up(step_a, step_b, clock, warm_up, a_first)
    size = max(1, min(BLOCK_PAIRS, int(rule.budget_seconds / BLOCKS / pair_seconds))) if pair_seconds > 0 else 1
    enough = PRECISION * math.log1p(rule.minimum_effect)
    seconds_a: list[float] = []
    seconds_b: list[float] = []
    a_led: list[bool] = []
    begin = clock()
    while True:
        for led_by_a in (a_first, not a_first):
            (first, firsts), (second, seconds) = (
                ((step_a, seconds_a), (step_b, seconds_b)) if led_by_a else ((step_b, seconds_b), (step_a, seconds_a))
            )
            for _ in range(size):
                firsts.append(first())
                seconds.append(second())
            a_led += [led_by_a] * size
        paired = Paired(tuple(seconds_a), tuple(seconds_b), tuple(a_led), warmed_up)
        on_blocks(paired)
        if clock() - begin >= rule.budget_seconds or paired.half_width <= enough:
            return paired


def _warm_up(step_a: Step, step_b: Step, clock: Clock, warm_up: WarmUp, a_first: bool) -> tuple[bool, float]:
    """Whether both sides were seen to have stopped becoming faster, and how long the quickest pair took."""
    seconds: tuple[list[float], list[float]] = ([], [])
    sides = ((step_a, seconds[0]), (step_b, seconds[1]))
    deadline = clock() + warm_up.budget_seconds
    warm = False
    for number in range(warm_up.most):
        for step, taken in sides if a_first else sides[::-1]:
            taken.append(step())
        warm = all(map(warm_up.is_over, seconds))
        if warm or (number + 1 >= warm_up.least and clock() >= deadline):
            break
    return warm, min(a + b for a, b in zip(*seconds, strict=True))
