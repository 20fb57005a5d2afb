"""The noise of the simulation has the sizes that it is given, and these are the ones that saved runs show."""

from __future__ import annotations

import math
from dataclasses import astuple, fields, replace

import numpy as np
import pytest

from benchmarks import simulation
from benchmarks.simulation import FIRST_OF_PAIR, FIRST_STARTED, SEEN, SHARED_HOST, TAKING_TURNS, Noise, Seen
from peft_gauge.errors import GaugeError
from peft_gauge.history.comparison import compare
from peft_gauge.history.intervals import MOST_FURTHER, Replicated, Single, estimate, judge, of_pairs
from peft_gauge.history.metrics import Samples, cases_of
from peft_gauge.history.reader import read_run, runs_in
from peft_gauge.history.rules import HostSpread, read_rules
from tests.support.paths import ROOT

READ_FROM = ("0001_006d869355e5_20261124_191448.json", "0002_21eda5de3f82_20261124_203938.json")
SILENT = Noise(**{field.name: 1.0 if field.name == "slow_seconds" else 0.0 for field in fields(Noise)})
PHASES = [f"{name}_seconds" for name in simulation.PHASE_SECONDS]


def generator(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


# One source of noise at a time


def test_without_noise_times_are_the_true_ones() -> None:
    times = simulation.suite(generator(), SILENT, processes=2, rounds=3, slower=[1, 1, 1.5, 1, 1, 1, 1])
    assert times.control_seconds == pytest.approx(np.full((7, 2, 3), simulation.CONTROL_SECONDS))
    for name, usual in simulation.PHASE_SECONDS.items():
        seconds = times.seconds[f"{name}_seconds"]
        assert seconds.shape == (7, 2, 3)
        assert seconds[[0, 1, 3, 4, 5, 6]] == pytest.approx(np.full((6, 2, 3), usual))
        assert seconds[2] == pytest.approx(np.full((2, 3), 1.5 * usual))
    pairs = simulation.taking_turns(generator(), SILENT, [True, False], 4, slower=1.1, step_seconds=0.5, block=2)
    first, started = math.exp(FIRST_OF_PAIR), math.exp(FIRST_STARTED)
    a_led = np.array([[True, True, False, False], [False, False, True, True]])
    assert (pairs.led == a_led).all()
    assert pairs.seconds_a == pytest.approx(np.where(a_led, first, 1) * np.array([[0.5 * started], [0.5]]))
    assert pairs.seconds_b == pytest.approx(np.where(a_led, 1, first) * np.array([[0.55], [0.55 * started]]))


def test_a_step_is_the_sum_of_its_phases() -> None:
    times = simulation.suite(generator(), SHARED_HOST, processes=2, rounds=3)
    assert times.seconds["step_seconds"] == pytest.approx(sum(times.seconds[name] for name in PHASES))


@pytest.mark.parametrize(
    ("source", "same_in_run", "same_in_case", "same_in_process", "in_control"),
    [
        ("run", True, True, True, True),
        ("minutes", False, True, True, True),
        ("process", False, False, True, True),
        ("own_minutes", False, True, True, False),
        ("own_process", False, False, True, False),
        ("moment", False, False, False, True),
    ],
)
def test_where_each_noise_is_the_same(
    source: str, same_in_run: bool, same_in_case: bool, same_in_process: bool, in_control: bool
) -> None:
    noise = replace(SILENT, **{source: 0.1})
    times = simulation.suite(generator(), noise, processes=40, rounds=5, cases=50)
    logs = np.log(times.seconds["forward_seconds"] / simulation.PHASE_SECONDS["forward"])
    spreads = {
        "run": float(logs.std()),
        "case": float(logs.std(axis=(1, 2)).max()),
        "process": float(logs.std(axis=2).max()),
    }
    same = {"run": same_in_run, "case": same_in_case, "process": same_in_process}
    assert {name: spread < 1e-9 for name, spread in spreads.items()} == same
    assert (np.log(times.control_seconds).std() < 1e-9) == (same_in_run or not in_control)
    if not same_in_run:
        assert spreads["run"] == pytest.approx(0.1, rel=0.25)


def test_a_run_s_own_factor_has_its_size() -> None:
    source, noise = generator(), replace(SILENT, run=0.1)
    runs = [simulation.suite(source, noise, processes=1, rounds=1, cases=1) for _ in range(300)]
    assert np.log([run.seconds["step_seconds"][0, 0, 0] for run in runs]).std() == pytest.approx(0.1, rel=0.15)


def test_the_slow_state_has_its_share_and_lasts() -> None:
    """What is left of it after a time t is exp(-t / slow_seconds)."""
    noise = replace(SILENT, slow=math.log(2), slow_share=0.3, slow_seconds=0.5)
    logs = simulation.moments(generator(), noise, [0.1] * 60, (2000,)) / math.log(2)
    assert set(np.unique(logs).round(9)) == {0.0, 1.0}
    assert logs.mean() == pytest.approx(0.3, abs=0.02)
    for steps in (1, 5):
        correlation = np.corrcoef(logs[:, :-steps].ravel(), logs[:, steps:].ravel())[0, 1]
        assert correlation == pytest.approx(math.exp(-0.1 * steps / 0.5), abs=0.03)


def test_outliers_have_their_share_and_size() -> None:
    noise = replace(SILENT, outlier=0.4, outlier_share=0.05)
    logs = simulation.moments(generator(), noise, [0.1] * 50, (4000,))
    assert logs.min() == 0
    assert (logs > 0).mean() == pytest.approx(0.05, rel=0.05)
    assert logs[logs > 0].mean() == pytest.approx(0.4, rel=0.05)


def test_pairs_have_processes_of_their_own() -> None:
    pairs = simulation.taking_turns(generator(), replace(SILENT, own_process=0.02), [True] * 4000, 2)
    ratios = np.log(pairs.seconds_b / pairs.seconds_a).mean(axis=1)
    assert ratios.std() == pytest.approx(0.02 * math.sqrt(2), rel=0.05)


def test_the_same_seed_gives_the_same_times() -> None:
    one, other, third = (simulation.suite(generator(seed), SHARED_HOST, processes=2, rounds=5) for seed in (1, 1, 2))
    assert (one.seconds["step_seconds"] == other.seconds["step_seconds"]).all()
    assert (one.seconds["step_seconds"] != third.seconds["step_seconds"]).all()


# As saved runs show them


def simulated() -> Seen:
    """What groups of three simulated runs show, on the average, as three real ones were looked at."""
    source, groups = generator(), []
    for _ in range(30):
        runs = [
            simulation.blocks_of_times(simulation.suite(source, SHARED_HOST, processes=1, rounds=5)) for _ in range(3)
        ]
        timed = [{name: block for name, block in run.items() if "optimizer" not in name} for run in runs]
        groups.append(astuple(simulation.seen(timed)))
    means = np.mean(groups, axis=0)
    return Seen(*means.tolist())


def test_the_noise_is_that_of_the_saved_runs() -> None:
    found = simulated()
    for field in fields(Seen):
        assert getattr(found, field.name) == pytest.approx(getattr(SEEN, field.name), rel=0.25), field.name


def test_what_was_seen_is_what_the_saved_runs_show() -> None:
    """Two of the three runs are in results/; of one spread between two runs there is not much to be expected."""
    paths = [path for path in runs_in(ROOT / "results") if path.name in READ_FROM]
    if len(paths) < len(READ_FROM):
        pytest.skip("the runs that SEEN was read from are no longer in results/")
    runs = [simulation.blocks_of_run(read_run(path)) for path in paths]
    assert [len(run) for run in runs] == [21, 21]
    found = simulation.seen(runs)
    assert (found.low, found.high) == pytest.approx((SEEN.low, SEEN.high), rel=0.2)
    assert found.middle == pytest.approx(SEEN.middle, rel=0.2)
    assert found.between == pytest.approx(SEEN.between, rel=0.3)
    assert found.between_over_control == pytest.approx(SEEN.between_over_control, rel=0.2)


def test_what_is_seen_by_hand() -> None:
    rounds = [0.9, 1.0, 1.1]
    first = {"a": simulation.Block(rounds, 1.0), "b": simulation.Block(rounds, 1.0), "c": simulation.Block([5.0], 9.0)}
    second = {name: simulation.Block([2 * seconds for seconds in rounds], 1.5) for name in "ab"}
    found = simulation.seen([first, second])
    assert found.between == pytest.approx(math.log(2))
    assert found.together == pytest.approx(math.log(2))
    assert found.between_over_control == pytest.approx(math.log(1.5))
    assert found.low == pytest.approx(math.log(0.9))
    assert found.high == pytest.approx(math.log(1.1))


def test_a_simulated_run_is_a_run() -> None:
    times = simulation.suite(generator(), SHARED_HOST, processes=2, rounds=3, cases=2)
    run = simulation.as_run(times, "BASE")
    cases = cases_of(run)
    assert len(cases) == 2 * 4
    samples = cases["benchmarks/test_speed.py::test_forward[case1]"].samples["forward_seconds"]
    assert samples.seconds == tuple(map(tuple, times.seconds["forward_seconds"][1].tolist()))
    assert samples.control_seconds == tuple(map(tuple, times.control_seconds[1].tolist()))
    bare = cases_of(simulation.as_run(times, "BASE", with_control=False))
    assert all(sample.control_seconds is None for case in bare.values() for sample in case.samples.values())
    assert compare(run, run, read_rules()).exit_code() == 0


# What processes have in common


def medians(*logs: float) -> Samples:
    return Samples(tuple((math.exp(each),) * 3 for each in logs))


SPREAD = HostSpread(1.6, 1.4)


def test_what_processes_share_widens_the_interval_by_the_design_effect() -> None:
    """Of n values with correlation r, s² is (1 - r)·σ² and the mean's variance σ²·(1 + (n - 1)·r) / n."""
    base, new = medians(0.0, 0.01, 0.02, 0.03), medians(0.1, 0.11, 0.12, 0.13)
    alone = estimate(base, new, SPREAD, over_control=False)
    shared = estimate(base, new, SPREAD, over_control=False, in_common=0.2)
    assert isinstance(alone, Replicated)
    assert isinstance(shared, Replicated)
    factor = (1 + 3 * 0.2) / (1 - 0.2)
    assert shared.standard_error**2 == pytest.approx(factor * alone.standard_error**2)
    assert (shared.log_ratio, shared.freedom) == (pytest.approx(alone.log_ratio), pytest.approx(alone.freedom))


def test_single_processes_are_judged_as_before() -> None:
    base, new = Samples(((1.0, 1.1, 1.2),)), Samples(((1.3, 1.4, 1.5),))
    alone = estimate(base, new, SPREAD, over_control=False)
    shared = estimate(base, new, SPREAD, over_control=False, in_common=0.2)
    assert isinstance(alone, Single)
    assert isinstance(shared, Single)
    assert (alone.draws == shared.draws).all()
    assert judge(alone, 0.05, 0.03) == judge(shared, 0.05, 0.03, in_common=0.2)


def test_further_processes_do_not_help_against_what_they_share() -> None:
    """The square of the width goes as 1/n + r/(1 - r): from 0.5 with 4 processes and r = 0.2 down to 0.25 at most."""

    def found(half: float, in_common: float) -> int | None:
        known = Replicated(0.1, half / 1.959964, 1e9, (4, 4))
        return judge(known, 0.05, 0.03, in_common=in_common).further

    assert found(0.12, 0.0) == 2  # 4·1.44 = 5.76
    assert found(0.12, 0.2) == 7  # 0.5/1.44 - 0.25 = 1/10.29
    assert found(0.15, 0.2) == MOST_FURTHER + 1  # 0.5/2.25 is less than 0.25


def test_pairs_of_processes_by_hand() -> None:
    found = of_pairs([0.1, 0.12, 0.11])
    assert (found.log_ratio, found.standard_error) == pytest.approx((0.11, 0.01 / math.sqrt(3)))
    assert (found.freedom, found.processes) == (2.0, (3, 3))
    assert found.interval(0.05) == pytest.approx((0.11 - 4.302653 * 0.0057735, 0.11 + 4.302653 * 0.0057735))
    with pytest.raises(GaugeError, match="1 pair of processes does not show"):
        of_pairs([0.1])


def tuples(processes: list[list[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, processes))


def test_a_few_verdicts_on_the_same_code() -> None:
    """The rate is counted in benchmarks/test_verdicts.py; here is that what processes share is accounted for."""
    source = generator(3)
    noise = replace(SHARED_HOST, own_minutes=0.06, own_process=0.02)
    worse = {0.0: 0, 0.6: 0}
    for _ in range(150):
        runs = [simulation.suite(source, noise, processes=5, rounds=5, cases=1) for _ in range(2)]
        base, new = (
            Samples(tuples(run.seconds["step_seconds"][0].tolist()), tuples(run.control_seconds[0].tolist()))
            for run in runs
        )
        for in_common in worse:
            judged = judge(estimate(base, new, SPREAD, over_control=True, in_common=in_common), 0.05, 0.0)
            worse[in_common] += judged.verdict == "worse"
    assert worse[0.0] > 20  # 2.5 % of 150 are 4
    assert worse[0.6] < 12


def test_a_pair_s_order_is_no_difference() -> None:
    pairs = simulation.taking_turns(generator(), TAKING_TURNS, [True, False] * 1500, 20, block=5)
    ratios = np.log(pairs.seconds_b / pairs.seconds_a)
    assert ratios.mean() == pytest.approx(0, abs=0.003)
    assert ratios[pairs.led].mean() == pytest.approx(-FIRST_OF_PAIR, abs=0.004)
    assert ratios[::2].mean() == pytest.approx(-FIRST_STARTED, abs=0.004)
