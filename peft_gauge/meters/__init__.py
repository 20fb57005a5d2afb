"""What a step did need: meters behind one small interface, read phase by phase.

`tensors.TensorMeter` follows storages on any device, `cuda.CudaMeter` asks torch's caching allocator,
`nvml.NvmlMeter` asks the driver about the whole card and this process, `host.HostMeter` asks the operating system for
resident memory. `Phases` drives any number of them:

    phases = Phases([HostMeter(), CudaMeter(), NvmlMeter()])
    with phases.phase(WHOLE_STEP):
        with phases.phase(FORWARD):
            loss = job.forward()
        …
    phases.peaks()[FORWARD]["cuda allocator"]["allocated_peak_bytes"]

A figure that a meter cannot read is absent, never 0. Phases nest; a phase entered again is a reading of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

from peft_gauge.clock import Clock, synchronised_clock, timed

LOAD = "load"
PREPARE = "prepare"
WARM_UP = "warm-up"
FORWARD = "forward"
BACKWARD = "backward"
OPTIMIZER = "optimizer"
WHOLE_STEP = "step"

PEAK = "_peak_bytes"  # how the names of all figures end that are the most within a phase


class Meter(Protocol):
    """One instrument for memory. Phases are ended in the reverse of the order in which they were started."""

    @property
    def name(self) -> str:
        """A short name, the key of its readings."""

    @property
    def sees(self) -> str:
        """What is in its figures and what is not, in one line."""

    @property
    def resolution(self) -> str:
        """The smallest amount and the shortest time that it can tell apart, in one line."""

    def why_unavailable(self) -> str | None:
        """Why it cannot read anything here, in one line; ``None`` where it can."""

    def start_phase(self, name: str) -> None:
        """From now until the matching `end_phase`, keep the peaks of phase ``name``."""

    def end_phase(self, name: str) -> Mapping[str, int | None]:
        """The figures of the phase that ends now; ``None`` for one that could not be read.

        Raises `ValueError` if ``name`` is not the innermost open phase.
        """


@dataclass(frozen=True)
class PhaseReading:
    """One run of one phase: meter's name -> figure -> value; only figures that could be read are there."""

    phase: str
    by_meter: Mapping[str, Mapping[str, int]]


class Phases:
    """Drives all meters through the phases of one run, and keeps what they read.

    Meters that are not available here are not driven; `unavailable` says why. Only one such driver may be at work in a
    process: the peak counters of the kernel and of torch's allocator exist once, and every start of a phase resets
    them.

    Attributes:
        readings: one entry for each phase that has ended, also if its body raised, in order of their ends.
        unavailable: meter's name -> why it cannot read here.
    """

    def __init__(self, meters: Iterable[Meter]) -> None:
        self.readings: list[PhaseReading] = []
        self.unavailable: dict[str, str] = {}
        self._meters: list[Meter] = []
        for meter in meters:
            reason = meter.why_unavailable()
            if reason is None:
                self._meters.append(meter)
            else:
                self.unavailable[meter.name] = reason

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything within the block belongs to phase ``name``; meters are read at its end whatever happens in it."""
        by_meter: dict[str, dict[str, int]] = {}

        def end(meter: Meter) -> None:
            figures = meter.end_phase(name)
            by_meter[meter.name] = {figure: value for figure, value in figures.items() if value is not None}

        try:
            with ExitStack() as open_meters:  # one that fails does not keep the others from being ended
                for meter in self._meters:
                    meter.start_phase(name)
                    open_meters.callback(end, meter)
                yield
        finally:
            self.readings.append(PhaseReading(name, by_meter))

    def peaks(self) -> dict[str, dict[str, dict[str, int]]]:
        """Phase -> meter's name -> peak in bytes, the greatest of all runs of that phase."""
        greatest: dict[str, dict[str, dict[str, int]]] = {}
        for reading in self.readings:
            meters = greatest.setdefault(reading.phase, {})
            for meter, figures in reading.by_meter.items():
                kept = meters.setdefault(meter, {})
                for figure, value in figures.items():
                    if figure.endswith(PEAK):
                        kept[figure] = max(value, kept.get(figure, value))
        return greatest


def overhead_seconds(
    meter: Meter, work: Callable[[], object] = lambda: None, *, rounds: int = 7, clock: Clock = synchronised_clock
) -> float:
    """What ``meter`` adds to the time of one phase around ``work``: the median of ``rounds`` paired differences.

    Without ``work``, the cost of starting and ending a phase alone. A meter that follows every operator or samples in a
    thread costs more the longer the work is, so pass the step that is going to be measured. The result can be below 0
    where the cost is smaller than the noise of ``work``.
    """

    def metered() -> None:
        meter.start_phase("overhead")
        try:
            work()
        finally:
            meter.end_phase("overhead")

    metered()  # what happens only once (a library that is loaded, a page that is touched) is no cost of a phase
    return statistics.median(timed(metered, clock) - timed(work, clock) for _ in range(rounds))
