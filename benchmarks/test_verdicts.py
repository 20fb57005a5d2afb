"""How often is a verdict wrong?

The same code is compared with itself a thousand times, and code that was made slower by a known share some hundred
times, with the noise of a shared host: two speeds that alternate, drift, outliers, processes that differ
(`peft_gauge.history.simulation`, with sizes that were read from saved runs). What decides is what decides in earnest:
`peft-gauge compare` by ``fixtures/rules.toml``, steps in turn in one and in several pairs of processes, and for
comparison pytest-benchmark's ``--benchmark-compare-fail``. A bare run asks a few dozen times, ``-m slow`` as often as
the question says, and of real processes too.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from operator import truediv
from typing import TYPE_CHECKING

import numpy as np
import pytest

from peft_gauge.environments import options
from peft_gauge.environments.build import Environment
from peft_gauge.environments.measuring import compare_case
from peft_gauge.environments.pairs import PROCESS_PAIRS, PairRule, over_processes, step_in_pairs
from peft_gauge.environments.requirements import Side
from peft_gauge.history import simulation
from peft_gauge.history.comparing import compare
from peft_gauge.history.rules import read_rules
from peft_gauge.history.schema import SAMPLES
from peft_gauge.history.simulation import SHARED_HOST, TAKING_TURNS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from peft_gauge.history.intervals import Verdict
    from peft_gauge.history.simulation import Pairs, Times

    Record = Callable[..., None]

SEED = 20_261_124
ROUNDS = 5
FALSE_ALARMS = 0.01
"""The share of comparisons of the same code that may say "worse"."""

FAMILY_ERROR = 0.02
"""Of both verdicts, *worse* and *better*, over all cases."""

FOUND = {1.03: 0.80, 1.05: 0.95, 1.10: 0.99}
"""How much slower -> the share of comparisons that have to find it."""

STEP_SECONDS = 0.04
BUDGET_SECONDS = 60.0
MOST_PAIRS = 900
"""More than are taken in `BUDGET_SECONDS`, warm-up included."""

POOL = 64
"""Real pairs of processes to draw from, of which each takes about six seconds."""
DRAWN = 1000

TRIALS = 4
REAL_PROCESS_PAIRS = 8
REAL_PAIRS = 40
WARM_UP_PAIRS = 5


def times(few: int, many: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "comparisons", [pytest.param(few, id=str(few)), pytest.param(many, id=str(many), marks=pytest.mark.slow)]
    )


def at_most(share: float, count: int) -> int:
    """How many of ``count`` may be: of a thousand the share itself; of fewer, what it does not exceed in 99 of 100."""
    from scipy.stats import binom

    return int(share * count) if count >= 1000 else int(binom.ppf(0.99, count, share))


# Saved runs


@pytest.mark.parametrize("processes", [pytest.param(1, id="1-process"), pytest.param(5, id="5-processes")])
@times(4, 1000)
def test_saved_runs_of_the_same_code(processes: int, comparisons: int, record: Record) -> None:
    rules = read_rules()
    found: Counter[str] = Counter()
    for number in range(comparisons):
        base, new = runs(number, processes)
        rows = compare(simulation.as_run(base, "BASE"), simulation.as_run(new, "NEW"), rules).rows
        verdicts = Counter(row.verdict for row in rows if row.metric.endswith("seconds"))
        found.update({f"comparisons_with_{verdict.replace(' ', '_')}": 1 for verdict in verdicts})

    record(comparisons=comparisons, processes=processes, **found)
    assert found["comparisons_with_worse"] <= at_most(FALSE_ALARMS, comparisons)


@pytest.mark.parametrize("field", ["mean", "median"])
@times(100, 1000)
def test_fixed_threshold_of_5_percent(field: str, comparisons: int, record: Record) -> None:
    """Not a verdict of ours: pytest-benchmark's ``--benchmark-compare-fail=mean:5%``, on the same times."""
    from pytest_benchmark.utils import PercentageRegressionCheck

    check = PercentageRegressionCheck(field, 5)
    average = getattr(statistics, field)
    alarms = failing = 0
    for number in range(comparisons):
        base, new = ({name: average(rounds) for name, rounds in rounds_of(run)} for run in runs(number, 1))
        failed = sum(bool(check.fails({field: new[name]}, {field: base[name]})) for name in base)
        failing += failed
        alarms += failed > 0

    record(comparisons=comparisons, comparisons_with_worse=alarms, failed_per_comparison=failing / comparisons)
    # What it is here for: that the noise is one on which a fixed threshold fails.
    assert alarms > at_most(FALSE_ALARMS, comparisons)


def runs(number: int, processes: int) -> tuple[Times, Times]:
    """Two runs of the same code, the ``number``-th of their kind."""
    generator = np.random.default_rng([SEED, number, processes])
    base, new = (simulation.suite(generator, SHARED_HOST, processes=processes, rounds=ROUNDS) for _ in range(2))
    return base, new


def rounds_of(run: Times) -> list[tuple[str, list[float]]]:
    """All rounds of each time, whatever process they are of."""
    return [
        (f"{metric} {number}", rounds)
        for metric, of_cases in run.seconds.items()
        for number, rounds in enumerate(of_cases.reshape(len(of_cases), -1).tolist())
    ]


# Steps in turn


@times(20, 1000)
def test_pairs_of_processes_of_the_same_code(comparisons: int, record: Record) -> None:
    """A suite of seven cases, each by several pairs of processes, whose steps take turns."""
    verdicts = by_processes(comparisons * simulation.CASES, 1.0, FAMILY_ERROR / simulation.CASES)
    alarms = suites_with_worse(verdicts)

    record(comparisons=comparisons, comparisons_with_worse=alarms, verdicts=dict(Counter(verdicts)))
    assert alarms <= at_most(FALSE_ALARMS, comparisons)


@pytest.mark.parametrize(("slower", "found"), FOUND.items())
@times(200, 1000)
def test_pairs_of_processes_of_slower_code(slower: float, found: float, comparisons: int, record: Record) -> None:
    verdicts = by_processes(comparisons, slower, FAMILY_ERROR)

    record(slower=slower, comparisons=comparisons, verdicts=dict(Counter(verdicts)))
    assert comparisons - verdicts.count("worse") <= at_most(1 - found, comparisons)


@pytest.mark.slow
@pytest.mark.parametrize("comparisons", [1000])
def test_two_processes_do_not_show_how_processes_differ(comparisons: int, record: Record) -> None:
    """The same code in two processes, judged by its pairs of steps; a *worse* or *better* has to be found twice."""
    rule = PairRule(error=PairRule.error / simulation.CASES)
    firsts, seconds = (steps_in_turn(attempt, comparisons * simulation.CASES, 1.0, MOST_PAIRS) for attempt in range(2))
    verdicts: list[Verdict] = []
    for first, second in zip(each_of(firsts), each_of(seconds), strict=True):
        once = verdict(*first, rule)
        decided = once in ("same", "cannot tell") or once == verdict(*second, rule)
        verdicts.append(once if decided else "cannot tell")
    alarms = suites_with_worse(verdicts)

    record(comparisons=comparisons, comparisons_with_worse=alarms, verdicts=dict(Counter(verdicts)))
    # What it is here for: however many pairs of steps, two processes are a sample of one, and twice one is few.
    assert alarms > at_most(FALSE_ALARMS, comparisons)


def suites_with_worse(verdicts: Sequence[Verdict]) -> int:
    starts = range(0, len(verdicts), simulation.CASES)
    return sum("worse" in verdicts[start : start + simulation.CASES] for start in starts)


def steps_in_turn(attempt: int, comparisons: int, slower: float, pairs: int) -> Pairs:
    generator = np.random.default_rng([SEED, attempt, comparisons, round(1000 * slower)])
    return simulation.taking_turns(
        generator, TAKING_TURNS, comparisons, pairs, slower=slower, step_seconds=STEP_SECONDS
    )


def by_processes(comparisons: int, slower: float, error: float) -> list[Verdict]:
    """The verdicts of pairs of processes, the most of which share a comparison's `BUDGET_SECONDS`."""
    pairs = round(BUDGET_SECONDS / PROCESS_PAIRS[-1] / (2 * STEP_SECONDS))
    taken = steps_in_turn(0, comparisons * PROCESS_PAIRS[-1], slower, pairs)
    medians = np.median(np.log(taken.seconds_b / taken.seconds_a), axis=1).reshape(comparisons, PROCESS_PAIRS[-1])
    rule = PairRule(error=error)
    return [looked_at(each, rule)[0] for each in medians.tolist()]


def looked_at(log_ratios: list[float], rule: PairRule) -> tuple[Verdict, int]:
    """As `peft-gauge ab` looks: at its numbers of pairs of processes, until one of them decides; and which did."""
    for pairs in PROCESS_PAIRS:
        found = over_processes(log_ratios[:pairs], rule).verdict
        if found != "cannot tell":
            break
    return found, pairs


def each_of(pairs: Pairs) -> Iterator[tuple[list[float], list[float]]]:
    return zip(pairs.seconds_a.tolist(), pairs.seconds_b.tolist(), strict=True)


def verdict(seconds_a: Sequence[float], seconds_b: Sequence[float], rule: PairRule) -> Verdict:
    """What pairs of these steps say; the clock moves by them, and by nothing else."""
    spent = 0.0

    def step(seconds: Sequence[float]) -> Callable[[], float]:
        left = iter(seconds)

        def once() -> float:
            nonlocal spent
            taken = next(left)
            spent += taken
            return taken

        return once

    return step_in_pairs(step(seconds_a), step(seconds_b), rule, clock=lambda: spent).judged.verdict


# Steps in turn, in earnest


@pytest.mark.slow
def test_comparisons_drawn_from_real_processes(record: Record) -> None:
    """A thousand comparisons whose pairs of processes are drawn from real ones: LoRA steps of `peft-gauge ab . .`.

    Both sides ran the same code, so either may stand for A; a slowdown is planted by multiplying B's times, which is
    what a slower step would have done to them.
    """
    begin = time.perf_counter()
    log_ratios = pool_of_real_pairs()
    pair_seconds = (time.perf_counter() - begin) / len(log_ratios)
    generator = random.Random(SEED)

    def compared(slower: float, error: float) -> tuple[Verdict, int]:
        drawn = [generator.choice((1, -1)) * each for each in generator.sample(log_ratios, PROCESS_PAIRS[-1])]
        return looked_at([each + math.log(slower) for each in drawn], PairRule(error=error))

    same = [compared(1.0, FAMILY_ERROR / simulation.CASES)[0] for _ in range(DRAWN * simulation.CASES)]
    alarms = suites_with_worse(same)
    slowed = {slower: [compared(slower, FAMILY_ERROR) for _ in range(DRAWN)] for slower in FOUND}
    found = {slower: sum(verdict == "worse" for verdict, _ in each) for slower, each in slowed.items()}

    record(
        process_pairs=len(log_ratios),
        pair_seconds=pair_seconds,
        log_ratios=log_ratios,
        log_ratio_deviation=statistics.stdev(log_ratios),
        comparisons=DRAWN,
        comparisons_with_worse=alarms,
        verdicts=dict(Counter(same)),
        found={str(slower): number for slower, number in found.items()},
        # Not asserted: how long a pair takes is the machine's.
        found_within_budget={
            str(slower): sum(verdict == "worse" and pairs * pair_seconds <= BUDGET_SECONDS for verdict, pairs in each)
            for slower, each in slowed.items()
        },
        pairs_that_decided={
            str(slower): dict(Counter(str(pairs) for _, pairs in each)) for slower, each in slowed.items()
        },
    )
    assert alarms <= at_most(FALSE_ALARMS, DRAWN)
    assert all(DRAWN - found[slower] <= at_most(1 - share, DRAWN) for slower, share in FOUND.items())


def pool_of_real_pairs() -> list[float]:
    """Of pairs of new processes that take the same LoRA step in turn, the median logarithm of B's seconds over A's."""
    installed = Environment(Side(()), None, {})
    (case,) = options.cases_of(["lora"], "toy-llama", None, None, "cpu")
    setting = options.setting_of(1, case.device)
    never = PairRule(budget_seconds=PROCESS_PAIRS[-1], error=1e-12)  # a verdict would end it; a second for each pair
    found = []
    for _ in range(POOL // PROCESS_PAIRS[-1]):
        finding = compare_case((installed, installed), case, never, setting)
        a, b = (record.figures[SAMPLES]["step_seconds"] for record in finding.records)
        found += [statistics.median(map(math.log, map(truediv, *pair))) for pair in zip(b, a, strict=True)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("extra", "expected"), [(0, "not worse"), (5, "worse")])
def test_real_processes(extra: int, expected: str, record: Record) -> None:
    """Products of matrices in real processes on whatever machine this is, 100 of them a step, and 105 in B's."""
    found: Counter[Verdict] = Counter()
    ratios = []
    for _ in range(TRIALS):
        log_ratios = [real_log_ratio(100, 100 + extra) for _ in range(REAL_PROCESS_PAIRS)]
        judged = over_processes(log_ratios, PairRule(error=FAMILY_ERROR))
        found[judged.verdict] += 1
        ratios.append(judged.ratio)

    record(extra_work=extra / 100, trials=TRIALS, process_pairs=REAL_PROCESS_PAIRS, verdicts=dict(found), ratios=ratios)
    if expected == "worse":
        assert found["worse"] > TRIALS / 2
        assert found["better"] == 0
    else:
        assert found["worse"] + found["better"] <= 1


def real_log_ratio(work_a: int, work_b: int) -> float:
    """Of two new processes, the median over pairs of steps of the logarithm of B's seconds over A's."""
    with worker(work_a) as a, worker(work_b) as b:
        pairs = [(a(), b()) if number % 2 == 0 else (b(), a())[::-1] for number in range(REAL_PAIRS + WARM_UP_PAIRS)]
    return statistics.median(math.log(of_b / of_a) for of_a, of_b in pairs[WARM_UP_PAIRS:])


WORKER = """
import sys, time
import numpy
matrix = numpy.random.default_rng(0).random((128, 128))
for line in sys.stdin:
    begin = time.perf_counter()
    for _ in range(int(sys.argv[1])):
        matrix @ matrix
    print(time.perf_counter() - begin, flush=True)
"""


@contextmanager
def worker(work: int) -> Iterator[Callable[[], float]]:
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, "-c", WORKER, str(work)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=os.environ | one_thread
    ) as process:
        asked, answer = process.stdin, process.stdout
        assert asked is not None
        assert answer is not None

        def step() -> float:
            asked.write("step\n")
            return float(answer.readline())

        yield step
        asked.close()  # the process reads the end, and ends
