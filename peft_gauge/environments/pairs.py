"""Compare two processes that take steps in turn: is B slower than A?

A pair is one step of A and one of B, adjacent in time: a slow machine slows both, and their ratio is unaffected. Steps
alternate, A B A B …: each follows a step of the other side and finds equally cold caches.

The order must not matter, but it does. LoRA steps of 6 ms, the same code on both sides, two cores: in 64 pairs of
processes with A always first, A was 0.22 ± 0.08 % slower; with two busy neighbours the first step of a pair was
0.4 ± 0.2 % slower than the second (16 pairs of processes); and a step after a pause of 5 ms takes 2.9 ± 0.2 % longer
than a step directly after the other side's. Therefore the order alternates, at two levels:

- Within a pair of processes, the leading side alternates from block to block: A B A B … | B A B A …. The estimate is
  the mean of two medians, of the ratios in blocks led by A and in blocks led by B; the extra cost of the first step
  cancels. If the lead changed from pair to pair, half of the steps would follow a step of their own side, and the
  ratios would have two clusters with the median in the gap between them: with 40 pairs of steps such medians scattered
  by 3.1 % over 16 pairs of processes, the estimates from blocks by 1.0 %.
- Over pairs of processes, the side that is started first, built first and leads the first block alternates too
  (`a_leads`): A in one half of them and B in the other, at each number in `PROCESS_PAIRS`. The effect of the order has
  the opposite sign in the two halves: the mean is free of it, and the spread that gives the interval includes it.
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
"""Takes one step and returns its duration in seconds."""

PROCESS_PAIRS = (4, 8, 16)
"""The verdict is evaluated at these numbers of process pairs. If processes with the same code differ by 2.4 %, 16 pairs
are needed to detect 5 % (``benchmarks/test_verdicts.py``)."""

ERROR_SHARES = {4: 1 / 6, 8: 1 / 6, 16: 2 / 3}
"""The share of the error that each evaluation may use; the last has most, since it has to find small changes."""

BLOCK_PAIRS = 12
"""Pairs of steps in a block led by one side; fewer for long steps."""

BLOCKS = 8
"""The least number of blocks in a pair of processes, unless a pair of steps is too long for the budget."""

PRECISION = 1 / 3
"""Target precision of one pair of processes, as a share of the minimum effect. Processes with the same code differ by
0.6 % and more, so a third of 3 % is precise enough; and starting them takes longer than their steps."""

_CONFIDENCE = 0.95
_NO_INTERVAL = 700.0  # a log ratio that stands for no limit


@dataclass(frozen=True)
class PairRule:
    """The smallest change to report, and how long to look for it.

    ``budget_seconds``: of steps, over all pairs of processes; ``minimum_effect``: a smaller relative difference is
    neither worse nor better; ``error``: the probability of a wrong *worse* or *better* over all evaluations, half for
    each.
    """

    budget_seconds: float = 60.0
    minimum_effect: float = 0.03
    error: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.budget_seconds < math.inf:
            raise GaugeError(f"--budget must be positive, got {self.budget_seconds:g}")
        if not 0 < self.minimum_effect < 1:
            raise GaugeError(f"--minimum-effect must be between 0 and 1, got {self.minimum_effect:g}")

    @property
    def within_processes(self) -> PairRule:
        """The rule for the steps within one pair of processes."""
        return replace(self, budget_seconds=self.budget_seconds / PROCESS_PAIRS[-1])


def a_leads(number: int) -> bool:
    """Whether A comes first in the ``number``-th pair of processes, counted from 0: A B B A, and so on.

    A is first in two of every four, so that a host that slows down steadily favours neither side.
    """
    return number % 4 in (0, 3)


def over_processes(log_ratios: Sequence[float], rule: PairRule) -> Judgement:
    """The verdict over several pairs of processes, each with one logarithm of the ratio B / A.

    ``log_ratios`` are in the order of `a_leads`. The memory layout of a process affects all its steps, so the processes
    are the sample, not the steps. The verdict is evaluated at the numbers in `PROCESS_PAIRS`; the evaluations share the
    error (`ERROR_SHARES`, union bound).

    An effect p of the order is +p in one half of the ratios and -p in the other: it cancels in the mean and increases
    the variance, and so the interval, by p²·n/(n - 1). A model with a term for p would give a narrower interval where p
    exceeds the difference between processes, but a far wider one at four pairs, where it would cost a third of the
    degrees of freedom.
    """
    return judge(of_pairs(log_ratios), rule.error * ERROR_SHARES[len(log_ratios)], rule.minimum_effect)


@dataclass(frozen=True)
class PairedRatios:
    """Estimate (`peft_gauge.history.intervals.Estimate`) of the median ratio from ``log_ratios``, one per pair."""

    log_ratios: Sequence[float]

    @property
    def log_ratio(self) -> float:
        return statistics.median(self.log_ratios)

    @property
    def processes(self) -> tuple[int, int]:
        return 1, 1

    def p_value(self, null: float = 0.0) -> float:
        """The p-value of the sign test, which matches the interval; ratios of exactly ``null`` are left out."""
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
    """The steps of one pair of processes.

    ``seconds_a`` and ``seconds_b``: of each pair's steps, in order; ``a_led``: for each pair, whether A came first;
    ``warmed_up``: whether both sides had stopped getting faster before the first pair.

    Raises `GaugeError` if a step took no time by its clock.
    """

    seconds_a: tuple[float, ...]
    seconds_b: tuple[float, ...]
    a_led: tuple[bool, ...]
    warmed_up: bool = True

    def __post_init__(self) -> None:
        if min(*self.seconds_a, *self.seconds_b) <= 0:
            raise GaugeError("a step took 0 seconds: the clock is too coarse for such short steps")

    @property
    def pairs(self) -> int:
        return len(self.seconds_a)

    @property
    def log_ratio(self) -> float:
        """Logarithm of B / A: the mean of the medians in blocks led by A and in blocks led by B."""
        return statistics.fmean(map(statistics.median, self._by_lead()))

    @property
    def lead(self) -> float:
        """Log factor by which the first step of a pair is slower; 0 if only one side led."""
        by_lead = [statistics.median(each) for each in self._by_lead()]
        return (by_lead[0] - by_lead[1]) / 2 if len(by_lead) == 2 else 0.0

    @property
    def half_width(self) -> float:
        """Half the width of the 95 % interval of `log_ratio` from these steps; `_NO_INTERVAL` for too few."""
        around = [ratio - statistics.median(each) for each in self._by_lead() for ratio in each]
        low, high = PairedRatios(around).interval(1 - _CONFIDENCE)
        return (high - low) / 2

    def _by_lead(self) -> list[list[float]]:
        """The log ratios of pairs led by B, then of those led by A; without an empty list."""
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
    """Warm up, then take steps in pairs until the ratio is precise enough or the budget is used up.

    It is precise enough at a half-width of `PRECISION` of the minimum effect. The ratio itself does not matter:
    stopping where the result looks clear would bias it (optional stopping).

    ``a_first``: whether A leads the first block. Blocks come in twos, one led by each side, and nothing but steps runs
    within a block: a pause would slow the next step. ``on_blocks`` is called after every two blocks. Exceptions of a
    step are not caught.
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
    """Whether both sides stopped getting faster, and the time of the quickest pair."""
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
