"""Rounds under clocks that move only when told to: what is timed, when counting begins, and why it ends."""

from __future__ import annotations

import inspect
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from peft_gauge.clock import tokens_per_second
from peft_gauge.clock.rounds import (
    Round,
    Rounds,
    StoppingRule,
    Stopwatch,
    WarmUp,
    measure,
    relative_noise,
)
from peft_gauge.errors import GaugeError

NO_WARM_UP = WarmUp(least=1, most=1)


class FakeMachine:
    """A host clock and a device that works off what was launched; also what stands in for `torch.cuda`."""

    def __init__(self) -> None:
        self.now = 64.0
        self.device_free_at = 0.0
        self.calls: list[str] = []
        machine = self

        class Event:
            def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
                self.enable_timing = enable_timing
                self.at: float | None = None

            def record(self, stream: object = None) -> None:
                machine.calls.append("record")
                self.at = max(machine.now, machine.device_free_at)

            def elapsed_time(self, end_event: Event) -> float:
                machine.calls.append("elapsed_time")
                assert self.enable_timing
                assert end_event.enable_timing
                assert self.at is not None
                assert end_event.at is not None
                if end_event.at > machine.now:
                    raise RuntimeError("the end event has not been reached")
                return (end_event.at - self.at) * 1000

        self.Event = Event

    def clock(self) -> float:
        self.calls.append("clock")
        return self.now

    def synchronize(self, device: object = None) -> None:
        self.calls.append("synchronize")
        self.now = max(self.now, self.device_free_at)

    def on_host(self, seconds: float) -> None:
        self.calls.append("work")
        self.now += seconds

    def launch(self, device_seconds: float, host_seconds: float = 0.0) -> None:
        """Launch a kernel, which itself takes the host ``host_seconds``, and return before it is done."""
        self.calls.append("launch")
        self.now += host_seconds
        self.device_free_at = max(self.now, self.device_free_at) + device_seconds

    def stopwatch(self, device: str) -> Stopwatch:
        return Stopwatch(device, self.clock, self if device == "cuda" else None)


@pytest.fixture
def machine() -> FakeMachine:
    return FakeMachine()


def planted(machine: FakeMachine, seconds: Sequence[float] | Iterator[float]) -> Callable[[], None]:
    """Work whose calls take these ``seconds``, one after the other."""
    each = iter(seconds)
    return lambda: machine.on_host(next(each))


def nothing() -> None:
    pass


# One round


def test_a_round_on_the_cpu_is_what_the_host_clock_says(machine: FakeMachine) -> None:
    one = machine.stopwatch("cpu").time(lambda: machine.on_host(0.375))
    assert one == Round(host_seconds=0.375, device_seconds=None)
    assert one.seconds == 0.375
    assert machine.calls == ["clock", "work", "clock"]


def test_a_round_on_the_card_has_both_clocks(machine: FakeMachine) -> None:
    """The device works 0.25 s; the host needs 0.0625 s to launch, in which the stream has nothing to do."""
    one = machine.stopwatch("cuda").time(lambda: machine.launch(0.25, host_seconds=0.0625))
    assert one == Round(host_seconds=0.3125, device_seconds=0.3125)
    assert one.seconds == 0.3125


def test_the_order_of_calls_around_the_work(machine: FakeMachine) -> None:
    machine.stopwatch("cuda").time(lambda: machine.launch(0.25))
    around = ["synchronize", "record", "clock", "launch", "record", "synchronize", "clock", "elapsed_time"]
    assert machine.calls == around


def test_milliseconds_of_events_become_seconds(machine: FakeMachine) -> None:
    one = machine.stopwatch("cuda").time(lambda: machine.launch(1.5))
    assert one.device_seconds == 1.5


def test_what_was_launched_before_is_in_neither_clock(machine: FakeMachine) -> None:
    machine.launch(8.0)
    one = machine.stopwatch("cuda").time(lambda: machine.launch(0.25))
    assert one == Round(0.25, 0.25)


def test_the_device_seconds_are_those_that_count() -> None:
    assert Round(host_seconds=0.5, device_seconds=0.25).seconds == 0.25
    # A device that took no time is not a device without a clock.
    assert Round(host_seconds=0.5, device_seconds=0.0).seconds == 0.0


def test_the_stand_in_has_the_signatures_of_torch(machine: FakeMachine) -> None:
    import torch

    def defaults(function: Callable[..., object]) -> list[tuple[str, object]]:
        parameters = list(inspect.signature(function).parameters.values())
        return [(each.name, each.default) for each in parameters if each.name not in ("self", "cls")]

    real, fake = torch.cuda.Event, machine.Event
    for theirs, ours in (
        (real.__new__, fake.__init__),
        (real.record, fake.record),
        (real.elapsed_time, fake.elapsed_time),
        (torch.cuda.synchronize, machine.synchronize),
    ):
        # Newer releases have arguments more, at the end.
        assert defaults(ours) == defaults(theirs)[: len(defaults(ours))]


def test_an_unknown_device_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    with pytest.raises(GaugeError, match="unknown device 'cuda:1'; did you mean cuda"):
        Stopwatch("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GaugeError, match="torch finds no CUDA device to time on"):
        Stopwatch("cuda")


# Noise


def test_noise_is_half_the_width_over_the_median() -> None:
    assert relative_noise([1.0, 1.25, 0.5, 0.875, 1.125, 1.0]) == 0.375  # 6 rounds: from least to greatest
    assert relative_noise([1.0] * 5) is None  # 5 rounds enclose their median with 93.75 % only
    assert relative_noise([0.0] * 6) is None
    assert relative_noise([]) is None


# When to stop


def drawn(make: Callable[[random.Random], float], seed: int) -> Iterator[float]:
    draw = random.Random(seed)
    while True:
        yield make(draw)


def rounds_until(rule: StoppingRule, seconds: Iterator[float], spent: float = 0.0) -> tuple[int, str]:
    so_far: list[float] = []
    while True:
        so_far.append(next(seconds))
        reason = rule.why_stop(so_far, spent)
        if reason is not None:
            return len(so_far), reason


def test_constant_rounds_end_by_low_noise() -> None:
    # The first number of rounds that has an interval.
    assert rounds_until(StoppingRule(), itertools.repeat(0.5)) == (6, "noise below 1 %")


def test_the_least_number_of_rounds_is_kept() -> None:
    rule = StoppingRule(min_rounds=9, relative_noise=0.025)
    assert rounds_until(rule, itertools.repeat(0.5), spent=1e9) == (9, "noise below 2.5 %")


def test_noise_of_exactly_the_limit_is_low_enough() -> None:
    values = [0.875, 1.0, 1.0, 1.0, 1.0, 1.125]
    assert StoppingRule(relative_noise=0.125).why_stop(values, 0) == "noise below 12.5 %"
    assert StoppingRule(relative_noise=0.1249).why_stop(values, 0) is None


def test_rounds_of_two_speeds_end_because_their_noise_has_settled() -> None:
    # However many rounds there are, the interval spans both speeds: ±0.125 around 1.125.
    assert rounds_until(StoppingRule(), itertools.cycle([1.0, 1.25])) == (20, "noise settled at 11.1 %")


def test_settling_is_asked_at_every_fourth_round() -> None:
    rule = StoppingRule(min_rounds=21)
    assert rounds_until(rule, itertools.cycle([1.0, 1.25])) == (24, "noise settled at 11.1 %")


def shrinking(low: int, then: float) -> list[float]:
    """Twenty rounds whose interval is ±0.25 around 1 in the first ten, and ±``then`` once ``low`` more were quieter."""
    return [0.75, 1.25] * 5 + [1 - then, 1 + then] * (low // 2) + [0.75, 1.25] * ((10 - low) // 2)


def test_noise_that_still_shrinks_has_not_settled() -> None:
    rule = StoppingRule(relative_noise=0.0)
    assert rule.why_stop(shrinking(0, 0.25), 0) == "noise settled at 25.0 %"
    assert rule.why_stop(shrinking(10, 0.125), 0) is None
    # The measure is ``settled``: ±0.234375 is 0.9375 of ±0.25.
    mild = shrinking(10, 0.234375)
    assert relative_noise(mild) == 0.234375
    assert StoppingRule(relative_noise=0.0, settled=0.1).why_stop(mild, 0) == "noise settled at 23.4 %"
    assert StoppingRule(relative_noise=0.0, settled=0.05).why_stop(mild, 0) is None


def test_noise_that_shrank_and_grew_again_has_not_settled() -> None:
    """All rounds of the second half are looked at, not its two ends."""
    values = [0.75, 1.0, 1.25] * 4 + [1.0] * 5 + [0.5, 1.5] * 3 + [1.5]
    noise = [relative_noise(values[:count]) for count in range(12, 25)]
    assert noise[0] == noise[-1] == 0.25
    assert min(each for each in noise if each is not None) == 0.0
    assert StoppingRule(relative_noise=0.0).why_stop(values, 0) is None


def test_independent_noise_is_mostly_let_run_and_two_speeds_are_not() -> None:
    def early(make: Callable[[random.Random], float]) -> float:
        runs = [rounds_until(StoppingRule(), drawn(make, seed)) for seed in range(200)]
        return sum(count < 50 for count, _ in runs) / 200

    assert early(lambda draw: draw.gauss(1, 0.05)) < 0.4
    assert early(lambda draw: draw.choice([1.0, 1.2]) * draw.gauss(1, 0.005)) > 0.95


def test_noisy_rounds_end_at_the_most() -> None:
    rule = StoppingRule(max_rounds=16)  # before settling is asked for the first time
    assert rounds_until(rule, drawn(lambda draw: draw.gauss(1, 0.2), seed=3)) == (16, "16 rounds")


def test_a_single_round_is_spelt_in_the_singular() -> None:
    assert rounds_until(StoppingRule(1, 1), itertools.repeat(1.0)) == (1, "1 round")


def test_rounds_end_when_the_budget_is_spent() -> None:
    rule = StoppingRule(budget_seconds=2.5)
    assert rule.why_stop([1.0, 2.0, 1.0, 2.0, 1.0], 2.25) is None
    assert rule.why_stop([1.0, 2.0, 1.0, 2.0, 1.0], 2.5) == "2.5 s spent"


def test_a_fixed_number_asks_neither_noise_nor_time() -> None:
    rule = StoppingRule(min_rounds=8, max_rounds=8, budget_seconds=0.001)
    assert rounds_until(rule, itertools.repeat(0.5), spent=100.0) == (8, "8 rounds")


@pytest.mark.parametrize(
    "limits",
    [
        {"min_rounds": 0},
        {"min_rounds": 6, "max_rounds": 5},
        {"budget_seconds": 0},
        {"budget_seconds": math.nan},
        {"relative_noise": -0.01},
        {"settled": 1.0},
        {"settled": -0.1},
    ],
    ids=str,
)
def test_a_rule_that_cannot_be_met_is_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(GaugeError, match="rounds must satisfy 1|invalid stopping rule"):
        StoppingRule(**limits)


# When to begin


def warm_up_of(machine: FakeMachine, seconds: Iterator[float] | Sequence[float], warm_up: WarmUp) -> Rounds:
    rule = StoppingRule(min_rounds=1, max_rounds=1)
    return measure(planted(machine, seconds), nothing, machine.stopwatch("cpu"), rule, warm_up=warm_up)


def test_warm_up_ends_where_the_planted_drift_ends(machine: FakeMachine) -> None:
    """Rounds halve up to the fifth. Of rounds 4, 5 and 6 the median is that of the steady ones already, so the ninth
    round, which completes 7, 8 and 9, is the first at which nothing becomes faster; at the eighth 3, 4, 5 are slower.
    """
    drift = [16.0, 8.0, 4.0, 2.0, *[1.0] * 20]
    taken = warm_up_of(machine, drift, WarmUp(budget_seconds=1000))
    assert (taken.warm_up_rounds, taken.warmed_up) == (9, True)
    assert taken.seconds == (1.0,)


def test_one_slow_first_round_costs_no_more_than_the_least(machine: FakeMachine) -> None:
    taken = warm_up_of(machine, itertools.chain([64.0], itertools.repeat(1.0)), WarmUp())
    assert (taken.warm_up_rounds, taken.warmed_up) == (6, True)


def test_the_tolerance_decides_what_a_trend_is(machine: FakeMachine) -> None:
    slope = [1.0] * 3 + [0.9375] * 3 + [0.9375] * 9
    assert warm_up_of(machine, slope, WarmUp(tolerance=0.0625)).warm_up_rounds == 6
    assert warm_up_of(machine, slope, WarmUp(tolerance=0.0624)).warm_up_rounds == 8


def test_rounds_that_become_slower_are_warm(machine: FakeMachine) -> None:
    taken = warm_up_of(machine, (1.5**i for i in range(50)), WarmUp(budget_seconds=100))
    assert (taken.warm_up_rounds, taken.warmed_up) == (6, True)


def test_the_window_sets_how_many_are_compared(machine: FakeMachine) -> None:
    assert warm_up_of(machine, [4.0, 2.0, 2.0, 2.0], WarmUp(window=1)).warm_up_rounds == 3


@pytest.mark.parametrize(("earlier", "rounds"), [((), 2), ([2.0], 1), ([4.0], 2), ([2.0, 4.0], 2), ([1.0], 1)])
def test_a_warm_up_goes_on_from_earlier_rounds(machine: FakeMachine, earlier: Sequence[float], rounds: int) -> None:
    rule, watch = StoppingRule(min_rounds=1, max_rounds=1), machine.stopwatch("cpu")
    work = planted(machine, itertools.repeat(2.0))
    taken = measure(work, nothing, watch, rule, warm_up=WarmUp(window=1), earlier_seconds=earlier)
    assert (taken.warm_up_rounds, taken.warmed_up, len(taken.rounds)) == (rounds, True, 1)


def test_a_warm_up_without_end_is_told(machine: FakeMachine) -> None:
    taken = warm_up_of(machine, (2.0**-i for i in range(50)), WarmUp(most=12))
    assert (taken.warm_up_rounds, taken.warmed_up) == (12, False)
    assert taken.seconds == (2.0**-12,)


def test_a_warm_up_too_dear_is_told(machine: FakeMachine) -> None:
    """The budget begins when the least rounds are over: 8 s of 4 s each after the first, or after three."""
    taken = warm_up_of(machine, itertools.repeat(4.0), WarmUp(budget_seconds=8.0))
    assert (taken.warm_up_rounds, taken.warmed_up) == (3, False)
    taken = warm_up_of(machine, itertools.repeat(4.0), WarmUp(budget_seconds=8.0, least=3))
    assert (taken.warm_up_rounds, taken.warmed_up) == (5, False)


def test_more_rounds_than_are_needed_can_be_asked_for(machine: FakeMachine) -> None:
    taken = warm_up_of(machine, itertools.repeat(1.0), WarmUp(least=9, most=9))
    assert (taken.warm_up_rounds, taken.warmed_up) == (9, True)


@pytest.mark.parametrize(
    "limits",
    [
        {"least": 0},
        {"least": 4, "most": 3},
        {"window": 0},
        {"tolerance": 1.0},
        {"tolerance": -0.1},
        {"budget_seconds": 0},
    ],
    ids=str,
)
def test_a_warm_up_that_cannot_be_is_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(GaugeError, match="warm-up"):
        WarmUp(**limits)


# The whole path


def test_preparation_and_control_stay_outside_and_every_figure_is_exact(machine: FakeMachine) -> None:
    order: list[str] = []
    work_seconds = iter([9.0, 0.25, 0.5, 0.25, 0.75])

    def work() -> None:
        order.append("work")
        machine.on_host(next(work_seconds))

    def control() -> None:
        order.append("control")
        machine.on_host(0.125)

    def prepare() -> None:
        order.append("prepare")
        machine.now += 32.0

    rule = StoppingRule(min_rounds=4, max_rounds=4)
    taken = measure(work, prepare, machine.stopwatch("cpu"), rule, control=control, warm_up=NO_WARM_UP)
    assert taken == Rounds(
        rounds=(Round(0.25, None), Round(0.5, None), Round(0.25, None), Round(0.75, None)),
        control_seconds=(0.125,) * 4,
        warm_up_rounds=1,
        warmed_up=False,
        stopped="4 rounds",
        relative_noise=None,
    )
    assert order == ["control", "prepare", "work"] * 5
    assert taken.seconds == (0.25, 0.5, 0.25, 0.75)
    assert taken.over_control == 3.0  # of 2, 4, 2, 6
    assert tokens_per_second(96, statistics.median(taken.seconds)) == 256


def test_on_the_card_the_control_is_by_the_same_clock_as_the_work(machine: FakeMachine) -> None:
    """A second stream works on for 0.5 s: the host waits for it, the events of the current stream do not see it."""

    def work() -> None:
        machine.launch(0.25)

    real_synchronize = machine.synchronize

    def synchronize(device: object = None) -> None:
        real_synchronize(device)
        if machine.calls[-2:] == ["record", "synchronize"]:
            machine.now += 0.5

    machine.synchronize = synchronize  # type: ignore[method-assign]
    rule = StoppingRule(min_rounds=6)
    stopwatch = machine.stopwatch("cuda")
    taken = measure(work, lambda: machine.launch(2.0), stopwatch, rule, control=lambda: machine.launch(0.125))
    assert taken.rounds == (Round(0.75, 0.25),) * 6
    assert taken.control_seconds == (0.125,) * 6
    assert taken.seconds == (0.25,) * 6
    assert taken.over_control == 2.0
    assert (taken.relative_noise, taken.stopped) == (0.0, "noise below 1 %")


def test_laps_are_the_parts_of_one_round(machine: FakeMachine) -> None:
    parts = [lambda: machine.on_host(0.25), lambda: machine.on_host(0.5), lambda: machine.on_host(0.125)]
    taken = machine.stopwatch("cpu").time(*parts)
    assert taken == Round(0.875, None, (Round(0.25, None), Round(0.5, None), Round(0.125, None)))
    assert machine.stopwatch("cpu").time(parts[0]).laps == ()


def test_laps_on_the_card_add_up_and_nothing_waits_between_them(machine: FakeMachine) -> None:
    parts = [lambda: machine.launch(0.25), lambda: machine.launch(0.5)]
    taken = machine.stopwatch("cuda").time(*parts)
    assert [lap.device_seconds for lap in taken.laps] == [0.25, 0.5]
    assert (taken.device_seconds, taken.host_seconds) == (0.75, 0.75)
    assert machine.calls.count("synchronize") == 2
    waits = [number for number, call in enumerate(machine.calls) if call == "synchronize"]
    assert "record" not in machine.calls[: waits[0]]
    assert "record" not in machine.calls[waits[1] :]


def test_measured_parts_give_each_round_its_laps(machine: FakeMachine) -> None:
    rule = StoppingRule(min_rounds=2, max_rounds=2)
    parts = [lambda: machine.on_host(0.25), lambda: machine.on_host(0.5)]
    taken = measure(parts, nothing, machine.stopwatch("cpu"), rule, warm_up=NO_WARM_UP)
    assert [[lap.seconds for lap in each.laps] for each in taken.rounds] == [[0.25, 0.5]] * 2
    assert taken.seconds == (0.75, 0.75)


def test_without_a_control_there_is_no_ratio(machine: FakeMachine) -> None:
    rule = StoppingRule(min_rounds=2, max_rounds=2)
    taken = measure(planted(machine, [1.0] * 9), nothing, machine.stopwatch("cpu"), rule)
    assert taken.control_seconds == ()
    assert taken.over_control is None


def test_the_budget_counts_preparation_but_not_the_warm_up(machine: FakeMachine) -> None:
    def prepare() -> None:
        machine.now += 0.75

    rule = StoppingRule(min_rounds=1, budget_seconds=4.0)
    draw = itertools.cycle([0.125, 0.375])
    taken = measure(planted(machine, draw), prepare, machine.stopwatch("cpu"), rule, warm_up=WarmUp(6, 6))
    assert taken.stopped == "4 s spent"
    assert len(taken.rounds) == 4  # of 1 s on average, with what was prepared


def test_the_noise_told_is_that_of_the_rounds_that_count(machine: FakeMachine) -> None:
    values = [100.0, 1.0, 1.25, 0.5, 0.875, 1.125, 1.0]
    rule = StoppingRule(min_rounds=6, max_rounds=6)
    taken = measure(planted(machine, values), nothing, machine.stopwatch("cpu"), rule, warm_up=NO_WARM_UP)
    assert taken.relative_noise == 0.375


def test_a_body_that_fails_is_not_silenced(machine: FakeMachine) -> None:
    def work() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        measure(work, nothing, machine.stopwatch("cpu"), StoppingRule())


def test_the_real_host_clock_times_a_sleep() -> None:
    """A sleep is never shorter than asked for; how much longer depends on what else runs here."""
    assert Stopwatch("cpu").time(lambda: time.sleep(0.01)).seconds >= 0.01
