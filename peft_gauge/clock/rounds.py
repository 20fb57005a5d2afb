"""Timed rounds of work by a device clock and a host clock: when warm-up is over and when to stop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peft_gauge.clock import Clock, median_ratio
from peft_gauge.errors import GaugeError, unknown
from peft_gauge.medians import median_interval

# Whether noise has settled is checked from this many rounds on, when each half has a meaningful interval, and only at
# multiples of the second number: every further check is a further chance to stop by luck.
_SETTLED_FROM_ROUNDS = 20
_SETTLED_EVERY_ROUNDS = 4


@dataclass(frozen=True)
class Round:
    """One call of the work, in seconds; ``device_seconds`` is by CUDA events, and ``None`` on the CPU.

    ``laps`` are the parts of work that has several, in order: on the device they add up to the whole. On CUDA a lap's
    host seconds are those of launching it, since nothing waits for the device between two laps.
    """

    host_seconds: float
    device_seconds: float | None
    laps: tuple[Round, ...] = ()

    @property
    def seconds(self) -> float:
        """By the device's clock if there is one, otherwise by the host's."""
        return self.host_seconds if self.device_seconds is None else self.device_seconds


class Stopwatch:
    """Times one call at a time by the host's clock and, for CUDA, by the device's as well.

    The device's seconds run from when the current stream reaches the work to when it finishes it, including pauses in
    which the stream waits for the host to launch more. The host's seconds include waiting for all streams and are
    longer. Far longer ones indicate work on other streams, or on the host after the last launch.

    Args:
        device: "cuda", which is torch's current device, or "cpu".
        clock: the host's clock, in seconds.
        torch_cuda: replacement for `torch.cuda` (its ``Event`` and ``synchronize`` are used).

    Raises `GaugeError` for another device, or for "cuda" if torch finds none.
    """

    def __init__(self, device: str, clock: Clock = time.perf_counter, torch_cuda: Any = None) -> None:
        if device not in ("cpu", "cuda"):
            raise unknown("device", device, ("cpu", "cuda"))
        self.clock = clock
        self._cuda = None
        if device == "cuda":
            self._cuda = torch_cuda or _torch_cuda()

    def time(self, *parts: Callable[[], object]) -> Round:
        """Time a call of ``parts`` in turn, from an idle device until the device has finished.

        With more than one part, each is a lap of the round.
        """
        host = [0.0] * (len(parts) + 1)
        if self._cuda is None:
            host[0] = self.clock()
            for number, part in enumerate(parts, start=1):
                part()
                host[number] = self.clock()
            return _round(host, None)
        events = [self._cuda.Event(enable_timing=True) for _ in host]
        self._cuda.synchronize()  # work launched before is not part of this round
        events[0].record()
        host[0] = self.clock()
        for number, part in enumerate(parts, start=1):
            part()
            events[number].record()
            if number < len(parts):
                host[number] = self.clock()
        self._cuda.synchronize()
        host[-1] = self.clock()
        return _round(host, events)


def _round(host: Sequence[float], events: Sequence[Any] | None) -> Round:
    """The round between the first and the last reading; with more than two, a lap between consecutive ones."""

    def between(first: int, last: int) -> Round:
        # CUDA events count milliseconds.
        device = None if events is None else events[first].elapsed_time(events[last]) / 1000
        return Round(host[last] - host[first], device)

    whole, last = between(0, -1), len(host) - 1
    laps = tuple(between(number, number + 1) for number in range(last)) if last > 1 else ()
    return Round(whole.host_seconds, whole.device_seconds, laps)


def _torch_cuda() -> Any:
    import torch

    if not torch.cuda.is_available():
        raise GaugeError("torch finds no CUDA device to time on; use the device cpu")
    return torch.cuda


def relative_noise(seconds: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of the median, over the median; ``None`` below 6 rounds or at median 0.

    The interval is exact for independent rounds whose number was fixed beforehand. Rounds in one process are
    correlated, and a rule that looks at the noise decides when to stop: treat it as a measure of agreement of rounds.
    """
    interval = median_interval(seconds)
    median = statistics.median(seconds) if seconds else 0.0
    if interval is None or median == 0:
        return None
    low, high = interval
    return (high - low) / 2 / median


@dataclass(frozen=True)
class StoppingRule:
    """When to stop: by the first criterion that applies, once there are ``min_rounds``.

    - the noise (`relative_noise`) is at most ``relative_noise``;
    - the noise has settled: from the first half of the rounds on, with each further round, it was never lower than
      1 - ``settled`` times its value after the first half. Independent rounds would have reduced it to about 0.7, so
      these, which have two speeds or drift, gain nothing from more of their kind. Checked at every fourth round from
      the 20th on;
    - there are ``max_rounds``, or ``budget_seconds`` are spent, preparation and control included.

    The first two follow the "stdrel" criterion of NVIDIA's nvbench (nvbench/detail/stdrel_criterion.cxx), which uses
    the standard deviation over the mean, settled once its own history varies by less than 5 %. With ``min_rounds``
    equal to ``max_rounds`` the number is fixed, and neither noise nor time matters.

    Raises `GaugeError` for limits that no rounds can meet.
    """

    min_rounds: int = 5
    max_rounds: int = 50
    budget_seconds: float = 30.0
    relative_noise: float = 0.01
    settled: float = 0.1

    def __post_init__(self) -> None:
        if not 1 <= self.min_rounds <= self.max_rounds:
            raise GaugeError(f"rounds must satisfy 1 ≤ min ≤ max, got {self.min_rounds} to {self.max_rounds}")
        if not (self.budget_seconds > 0 and self.relative_noise >= 0 and 0 <= self.settled < 1):
            raise GaugeError(
                "invalid stopping rule: the budget must be positive, noise at least 0, settled at least 0 and below 1; "
                f"got {self.budget_seconds:g} s, {self.relative_noise:g} and {self.settled:g}"
            )

    def why_stop(self, seconds: Sequence[float], spent_seconds: float) -> str | None:
        """Why to stop after the rounds of these ``seconds``, as text for a reader; ``None`` to continue."""
        count = len(seconds)
        if count < self.min_rounds:
            return None
        if self.min_rounds < self.max_rounds:
            noise = relative_noise(seconds)
            if noise is not None and noise <= self.relative_noise:
                return f"noise below {100 * self.relative_noise:g} %"
            if noise is not None and self._has_settled(seconds):
                return f"noise settled at {100 * noise:.1f} %"
        if count >= self.max_rounds:
            return "1 round" if count == 1 else f"{count} rounds"
        if spent_seconds >= self.budget_seconds:
            return f"{self.budget_seconds:g} s spent"
        return None

    def _has_settled(self, seconds: Sequence[float]) -> bool:
        count = len(seconds)
        if count < _SETTLED_FROM_ROUNDS or count % _SETTLED_EVERY_ROUNDS:
            return False
        history = [relative_noise(seconds[:rounds]) for rounds in range(count // 2, count + 1)]
        known = [noise for noise in history if noise is not None]
        return len(known) == len(history) and min(known) >= (1 - self.settled) * known[0]


@dataclass(frozen=True)
class WarmUp:
    """When warm-up is over: as soon as rounds no longer get faster.

    They no longer do when the median of the last ``window`` rounds is at least 1 - ``tolerance`` times the median of
    the ``window`` rounds before. At least ``least`` rounds run, whatever they cost: the first may compile. Afterwards,
    ``most`` rounds in total or a further ``budget_seconds`` end a warm-up that is not over yet. ``least`` equal to
    ``most`` fixes the number.

    Raises `GaugeError` for limits that no rounds can meet.
    """

    least: int = 1
    most: int = 30
    window: int = 3
    tolerance: float = 0.05
    budget_seconds: float = 10.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise GaugeError(f"warm-up rounds must satisfy 1 ≤ least ≤ most, got {self.least} to {self.most}")
        if not (self.window >= 1 and 0 <= self.tolerance < 1 and self.budget_seconds > 0):
            raise GaugeError(
                "invalid warm-up: window must be at least 1, tolerance at least 0 and below 1, the budget positive; "
                f"got {self.window}, {self.tolerance:g} and {self.budget_seconds:g} s"
            )

    def is_over(self, seconds: Sequence[float]) -> bool:
        """Whether rounds of these ``seconds`` have no downward trend; False below 2·``window`` rounds."""
        if len(seconds) < max(self.least, 2 * self.window):
            return False
        before = statistics.median(seconds[-2 * self.window : -self.window])
        return statistics.median(seconds[-self.window :]) >= (1 - self.tolerance) * before


DEFAULT_WARM_UP = WarmUp()


@dataclass(frozen=True)
class Rounds:
    """The result of `measure`.

    Attributes:
        rounds: the rounds that count, in order.
        control_seconds: the control's seconds before each of them, by the same clock; empty without a control.
        warm_up_rounds: number of rounds before them that do not count.
        warmed_up: whether rounds no longer got faster before the first that counts.
        stopped: why there are no more rounds (`StoppingRule`).
        relative_noise: of ``seconds``; ``None`` below 6 rounds.
    """

    rounds: tuple[Round, ...]
    control_seconds: tuple[float, ...]
    warm_up_rounds: int
    warmed_up: bool
    stopped: str
    relative_noise: float | None

    @property
    def seconds(self) -> tuple[float, ...]:
        """Each round by the device's clock if there is one, otherwise by the host's."""
        return tuple(each.seconds for each in self.rounds)

    @property
    def over_control(self) -> float | None:
        """The median over rounds of round / control; ``None`` without a control."""
        if not self.control_seconds:
            return None
        return median_ratio(self.seconds, self.control_seconds)


def measure(
    work: Callable[[], object] | Sequence[Callable[[], object]],
    prepare: Callable[[], object],
    stopwatch: Stopwatch,
    rule: StoppingRule,
    *,
    control: Callable[[], object] | None = None,
    warm_up: WarmUp = DEFAULT_WARM_UP,
    earlier_seconds: Sequence[float] = (),
) -> Rounds:
    """Time rounds of ``work`` until ``rule`` ends them, after a warm-up by ``warm_up``.

    A round is: ``control``, timed for comparison; ``prepare``, not timed; ``work``, timed. Warm-up rounds are the same,
    so that control and preparation are warm as well. If ``work`` has several parts, each is a lap of the round.
    ``earlier_seconds``: of ``work``, timed shortly before in this process; the warm-up compares its rounds with them,
    too, and may take one less. Exceptions of ``work`` are not caught.
    """
    parts = (work,) if callable(work) else tuple(work)

    def one_round() -> tuple[Round, float | None]:
        control_seconds = None if control is None else stopwatch.time(control).seconds
        prepare()
        return stopwatch.time(*parts), control_seconds

    warm_up_rounds, warmed_up = _warm_up(lambda: one_round()[0].seconds, stopwatch.clock, warm_up, earlier_seconds)
    rounds: list[Round] = []
    control_rounds: list[float] = []
    stopped = None
    begin = stopwatch.clock()
    while stopped is None:
        this_round, control_seconds = one_round()
        rounds.append(this_round)
        if control_seconds is not None:
            control_rounds.append(control_seconds)
        stopped = rule.why_stop([each.seconds for each in rounds], stopwatch.clock() - begin)
    noise = relative_noise([each.seconds for each in rounds])
    return Rounds(tuple(rounds), tuple(control_rounds), warm_up_rounds, warmed_up, stopped, noise)


def _warm_up(
    one_round: Callable[[], float], clock: Clock, warm_up: WarmUp, earlier_seconds: Sequence[float]
) -> tuple[int, bool]:
    """Number of warm-up rounds, and whether rounds no longer got faster at the end."""
    seconds = [*earlier_seconds]
    deadline = None
    for number in range(1, warm_up.most + 1):
        seconds.append(one_round())
        if number >= warm_up.least and warm_up.is_over(seconds):
            return number, True
        if number == warm_up.least:
            deadline = clock() + warm_up.budget_seconds
        elif deadline is not None and clock() >= deadline:
            return number, False
    return warm_up.most, False
