"""Intervals and verdicts on times, against ratios that are known beforehand."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from peft_gauge.history.intervals import (
    MOST_FURTHER,
    Estimate,
    Replicated,
    centre_seconds,
    estimate,
    holm_errors,
    judge,
    why_no_estimate,
)
from peft_gauge.history.metrics import Samples
from peft_gauge.history.rules import HostSpread

SPREAD = HostSpread(seconds=1.6, over_control=1.25)
EFFECT = 0.03


def processes(
    generator: np.random.Generator, ratio: float, *, number: int = 5, rounds: int = 5, noise: float = 0.02
) -> Samples:
    """Log-normal rounds of which each process has a factor of its own; ``ratio`` is the true centre in seconds."""
    between = generator.normal(0, noise, (number, 1))
    within = generator.normal(0, noise, (number, rounds))
    return Samples(tuple(map(tuple, (ratio * np.exp(between + within)).tolist())))


def of(base: Samples, new: Samples) -> Estimate:
    return estimate(base, new, SPREAD, over_control=False)


def medians(*values: float) -> Samples:
    """Processes with these medians, three rounds each."""
    return Samples(tuple((value, value * 0.9, value * 1.1) for value in values))


# By hand


def test_welch_by_hand() -> None:
    """Two processes a side, each side's logarithms 0.02 apart and the sides 0.1: t has 2 degrees of freedom."""
    found = of(medians(1, math.exp(0.02)), medians(math.exp(0.1), math.exp(0.12)))
    assert isinstance(found, Replicated)
    assert found.log_ratio == pytest.approx(0.1)
    assert found.standard_error == pytest.approx(math.sqrt(0.0001 + 0.0001))
    assert found.freedom == pytest.approx(2)
    assert found.interval(0.05) == pytest.approx((0.1 - 4.30265 * 0.0141421, 0.1 + 4.30265 * 0.0141421), abs=1e-6)
    t = 0.1 / 0.0141421356
    assert found.p_value() == pytest.approx(1 - t / math.sqrt(t**2 + 2))  # the distribution's closed form for 2 degrees
    judged = judge(found, 0.05, EFFECT)
    assert (judged.verdict, judged.further) == ("worse", None)
    assert judged.ratio == pytest.approx(math.exp(0.1))
    assert judge(found, 0.01, EFFECT).verdict == "inconclusive"  # t = 9.92, and the interval reaches below 0


def test_unequal_spreads_by_hand() -> None:
    """Welch-Satterthwaite: 0.0001² / (0.0001² / 1) with a side that does not vary leaves that side's freedom."""
    found = of(medians(1, 1, 1), medians(1, math.exp(0.02)))
    assert isinstance(found, Replicated)
    assert (found.standard_error, found.freedom) == (pytest.approx(0.01), pytest.approx(1))


def test_holm_by_hand() -> None:
    """0.005 against 0.05/4 and 0.01 against 0.05/3 fall; 0.03 against 0.05/2 stands, and 0.04 with it."""
    assert holm_errors([0.01, 0.04, 0.03, 0.005], 0.05) == pytest.approx([0.05 / 3, 0.025, 0.025, 0.0125])
    assert holm_errors([0.2], 0.05) == [0.05]
    assert holm_errors([], 0.05) == []


@pytest.mark.parametrize(("slower", "verdict"), [(1.0, "inconclusive"), (1.59, "inconclusive"), (1.61, "worse")])
def test_single_processes_are_judged_by_the_known_spread_of_hosts(slower: float, verdict: str) -> None:
    """Constant rounds: the bootstrap has nothing to add, and the interval is the spread alone."""
    found = of(Samples(((1.0,) * 5,)), Samples(((slower,) * 7,)))
    judged = judge(found, 0.05, EFFECT)
    assert (judged.low, judged.ratio, judged.high) == pytest.approx((slower / 1.6, slower, slower * 1.6))
    assert judged.verdict == verdict
    assert judge(of(Samples(((slower,) * 7,)), Samples(((1.0,) * 5,))), 0.05, EFFECT).verdict == verdict.replace(
        "worse", "better"
    )


def test_one_single_process_is_enough_not_to_know_how_processes_differ() -> None:
    assert judge(of(medians(1, 1, 1), Samples(((1.3,) * 5,))), 0.05, EFFECT).verdict == "inconclusive"


def test_over_the_control_the_smaller_spread_holds() -> None:
    control = ((1.0, 2.0, 3.0),)
    base, new = Samples(((1.0, 2.0, 3.0),), control), Samples(((1.3, 2.6, 3.9),), control)
    judged = judge(estimate(base, new, SPREAD, over_control=True), 0.05, EFFECT)
    assert (judged.verdict, judged.low) == ("worse", pytest.approx(1.3 / 1.25))
    assert judge(of(base, new), 0.05, EFFECT).verdict == "inconclusive"


def test_the_control_is_divided_out_round_by_round() -> None:
    """Rounds that are wild, but always 2 and 2.2 times their control: nothing is left but the 10 %."""
    generator = np.random.default_rng(0)

    def side(factor: float) -> Samples:
        control = generator.uniform(1, 9, (3, 4))
        return Samples(tuple(map(tuple, (factor * control).tolist())), tuple(map(tuple, control.tolist())))

    base, new = side(2.0), side(2.2)
    judged = judge(estimate(base, new, SPREAD, over_control=True), 0.05, EFFECT)
    assert (judged.low, judged.ratio, judged.high) == pytest.approx((1.1, 1.1, 1.1))
    assert judge(of(base, new), 0.05, EFFECT).verdict == "inconclusive"


def test_the_centre_of_several_processes() -> None:
    assert centre_seconds([[1, 2, 900], [7, 8, 9], [4]]) == pytest.approx((2 * 8 * 4) ** (1 / 3))


@pytest.mark.parametrize(
    ("samples", "why"),
    [
        (None, "its rounds were not saved"),
        (Samples(((1.0, 1.0),)), "2 rounds are too few; at least 3 are needed"),
        (Samples(((1.0,), (1.0,))), "2 rounds are too few; at least 3 are needed"),
        (Samples(((1.0, 0.0, 1.0),)), "a round took 0 seconds: the clock is too coarse"),
        (Samples(((1.0, 1.0, 1.0),), ((1.0, 0.0, 1.0),)), "a round took 0 seconds: the clock is too coarse"),
        (Samples(((1.0,), (1.0,), (1.0,))), None),
    ],
)
def test_what_is_too_little(samples: Samples | None, why: str | None) -> None:
    assert why_no_estimate(samples) == why


# Verdicts


@pytest.mark.parametrize(
    ("centre", "half", "verdict"),
    [
        (0.0, 0.029, "same"),
        (0.0, 0.030, "inconclusive"),  # log 1.03 = 0.02956
        (0.02, 0.009, "same"),
        (0.02, 0.019, "inconclusive"),  # surely above 1, but perhaps by nothing that matters
        (0.035, 0.034, "worse"),
        (0.035, 0.036, "inconclusive"),
        (-0.035, 0.034, "better"),
        (-0.035, 0.036, "inconclusive"),
        (-0.02, 0.019, "inconclusive"),
        (math.log(1.0299), 0.001, "inconclusive"),
        (math.log(1.0301), 0.001, "worse"),
        (math.log(0.9701), 0.001, "inconclusive"),  # a reader sees −2.99 %, which is less than 3 %
        (math.log(0.9699), 0.001, "better"),
    ],
)
def test_where_an_interval_lies(centre: float, half: float, verdict: str) -> None:
    assert judge(with_half(centre, half), 0.05, EFFECT).verdict == verdict
    assert judge(with_half(centre + 0.2, half), 0.05, EFFECT, relative_to=0.2).verdict == verdict


def with_half(centre: float, half: float, number: int = 4) -> Replicated:
    """An estimate whose 95 % interval reaches ``half`` either way; many degrees of freedom."""
    return Replicated(centre, half / 1.959963985, 1e9, (number, number))


@pytest.mark.parametrize(
    ("centre", "half", "further"),
    [
        (0.05, 0.0999, 12),  # to halve the interval, four times 4 processes
        (0.0, 0.1, 42),  # 4 · (0.1 / 0.029559)² = 45.8, less 4
        (0.05, 0.0500001, 1),
        (0.05, 0.2499, 96),
        (0.05, 0.26, MOST_FURTHER + 1),
        (math.log1p(EFFECT), 0.1, MOST_FURTHER + 1),  # on the very border no number is enough
    ],
)
def test_how_many_more_processes_would_decide(centre: float, half: float, further: int) -> None:
    assert judge(with_half(centre, half), 0.05, EFFECT).further == further


@pytest.mark.parametrize("centre", [0.0, 0.01, 0.05, -0.08])
def test_that_many_more_decide_and_fewer_do_not(centre: float) -> None:
    undecided = with_half(centre, 0.1)
    further = judge(undecided, 0.05, EFFECT).further
    assert further is not None

    def after(more: int) -> str:
        shrunk = undecided.standard_error / math.sqrt(1 + more / 4)
        return judge(replace(undecided, standard_error=shrunk), 0.05, EFFECT).verdict

    assert after(further + 1) != "inconclusive"
    assert after(further - 2) == "inconclusive"


def test_an_interval_without_bounds_is_a_number_still() -> None:
    judged = judge(of(medians(1, 50), medians(1, 900)), 1e-6, EFFECT)
    assert judged.verdict == "inconclusive"
    assert 0 < judged.low < 1 < judged.high < math.inf


def test_the_same_numbers_are_never_a_change() -> None:
    """Not with other numbers of rounds, nor of processes, nor where the noise is nil."""
    for number, rounds in ((1, 3), (1, 40), (2, 5), (9, 5)):
        side = Samples(((1.0,) * rounds,) * number)
        assert judge(of(side, Samples(((1.0,) * 3,) * number)), 0.05, EFFECT).verdict == (
            "inconclusive" if number == 1 else "same"
        )


def test_the_same_input_gives_the_same_output() -> None:
    generator = np.random.default_rng(5)
    pairs = [[processes(generator, 1, number=1, rounds=rounds) for rounds in (41, 37)] for _ in range(2)]
    first = [judge(of(*pair), 0.2, EFFECT) for pair in pairs]
    assert [judge(of(*pair), 0.2, EFFECT) for pair in reversed(pairs)] == first[::-1]
    assert first[0] != first[1]


def test_swapping_the_runs_inverts_the_ratio() -> None:
    generator = np.random.default_rng(6)
    one, other = processes(generator, 1, rounds=4), processes(generator, 1.2, number=3)
    there, back = judge(of(one, other), 0.05, EFFECT), judge(of(other, one), 0.05, EFFECT)
    assert (there.verdict, back.verdict) == ("worse", "better")
    assert (1 / back.ratio, 1 / back.high, 1 / back.low) == pytest.approx((there.ratio, there.low, there.high))


# Rates, over seeded trials


@pytest.mark.parametrize("number", [2, 3, 5])
def test_intervals_cover_a_known_ratio(number: int) -> None:
    generator = np.random.default_rng(number)
    trials = 600
    covered = 0
    for _ in range(trials):
        base, new = (processes(generator, ratio, number=number, rounds=7) for ratio in (1.0, 1.05))
        low, high = of(base, new).interval(0.05)
        covered += low <= math.log(1.05) <= high
    assert 0.935 <= covered / trials <= 0.985


def test_the_rounds_of_single_processes_cover_what_they_can() -> None:
    """Without any difference between processes the bootstrap's own interval is about right, and its p-value with it."""
    generator = np.random.default_rng(11)
    nothing = HostSpread(1.0, 1.0)
    trials, covered, alarms = 150, 0, 0
    for _ in range(trials):
        sides = [Samples((tuple(ratio * np.exp(generator.normal(0, 0.05, 15))),)) for ratio in (1.0, 1.05)]
        found = estimate(sides[0], sides[1], nothing, over_control=False)
        low, high = found.interval(0.05)
        covered += low <= math.log(1.05) <= high
        alarms += found.p_value(math.log(1.05)) < 0.05
    assert 0.92 <= covered / trials <= 0.99
    assert alarms / trials <= 0.08


def verdicts(ratio: float, noise: float, trials: int = 300) -> Counter[str]:
    generator = np.random.default_rng(round(1000 * ratio + 1e6 * noise))
    pairs = ((processes(generator, 1, noise=noise), processes(generator, ratio, noise=noise)) for _ in range(trials))
    found = Counter(judge(of(base, new), 0.05, EFFECT).verdict for base, new in pairs)
    return Counter({verdict: round(100 * number / trials) for verdict, number in found.items()})


def test_planted_slowdowns_get_their_verdicts() -> None:
    """In per cent of trials: five processes a side, of which each differs by 2 %, rounds by 2 % more."""
    none, small, medium, large = (verdicts(ratio, 0.02) for ratio in (1.0, 1.03, 1.05, 1.10))
    assert none["worse"] + none["better"] <= 5
    assert small["same"] <= 5
    assert small["better"] == medium["better"] == large["better"] == 0
    assert medium["same"] == large["same"] == 0
    assert large["worse"] >= 98
    assert small["worse"] < medium["worse"] < large["worse"]
    assert medium["worse"] >= 70


def test_with_little_noise_nothing_stays_undecided() -> None:
    assert verdicts(1.0, 0.005)["same"] >= 98
    assert verdicts(1.05, 0.005)["worse"] >= 98
    assert verdicts(1 / 1.05, 0.005)["better"] >= 98


def test_a_family_of_comparisons_keeps_its_error() -> None:
    """Twenty times that did not change, and no effect too small to tell: any alarm in at most 5 % of families."""
    generator = np.random.default_rng(3)
    families, alarmed, uncorrected = 150, 0, 0
    for _ in range(families):
        found = [of(processes(generator, 1), processes(generator, 1)) for _ in range(20)]
        errors = holm_errors([each.p_value() for each in found], 0.05)
        alarmed += any(
            judge(each, error, 0.0).verdict != "inconclusive" for each, error in zip(found, errors, strict=True)
        )
        uncorrected += any(judge(each, 0.05, 0.0).verdict != "inconclusive" for each in found)
    assert alarmed / families <= 0.08
    assert uncorrected / families >= 0.5
