"""Memory meters behind one small interface, read phase by phase.

`tensors.TensorMeter` follows storages on any device, `cuda.CudaMeter` reads torch's caching allocator,
`nvml.NvmlMeter` reads the driver's metrics for the whole GPU and this process, and `host.HostMeter` reads resident
memory from the operating system. `Phases` drives any number of them:

    phases = Phases([HostMeter(), CudaMeter(), NvmlMeter()])
    with phases.phase(WHOLE_STEP):
        with phases.phase(FORWARD):
            loss = job.forward()
        …
    phases.peaks()[FORWARD]["cuda allocator"]["allocated_peak_bytes"]

An unavailable reading is absent, never 0. Phases nest; entering a phase again makes a separate reading.
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

PEAK = "_peak_bytes"  # suffix of all metrics that are a maximum within a phase


class Meter(Protocol):
    """A memory meter. Phases end in the reverse order of their start."""

    @property
    def name(self) -> str:
        """A short name, the key of its readings."""

    @property
    def sees(self) -> str:
        """The memory that it counts and the memory that it misses, in one line."""

    @property
    def resolution(self) -> str:
        """The smallest amount and the shortest time that it resolves, in one line."""

    def why_unavailable(self) -> str | None:
        """Why it is unavailable here, in one line; ``None`` if it is available."""

    def start_phase(self, name: str) -> None:
        """Record the peaks of phase ``name`` until the matching `end_phase`."""

    def end_phase(self, name: str) -> Mapping[str, int | None]:
        """The metrics of the phase that ends now; ``None`` for an unavailable reading.

        Raises `ValueError` if ``name`` is not the innermost open phase.
        """


@dataclass(frozen=True)
class PhaseReading:
    """One run of one phase: meter's name -> metric -> value, without unavailable readings."""

    phase: str
    by_meter: Mapping[str, Mapping[str, int]]


class Phases:
    """Drives all meters through the phases of one run and collects their readings.

    Meters that are unavailable here are not driven; `unavailable` gives the reasons. Use only one such driver per
    process at a time: the peak counters of the kernel and of torch's allocator exist once, and every start of a phase
    resets them.

    Attributes:
        readings: one entry per ended phase, also if its body raised, in order of their ends.
        unavailable: meter's name -> reason.
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
        """Make the block part of phase ``name``; meters are read at its end, also after an exception."""
        by_meter: dict[str, dict[str, int]] = {}

        def end(meter: Meter) -> None:
            metrics = meter.end_phase(name)
            by_meter[meter.name] = {metric: value for metric, value in metrics.items() if value is not None}

        try:
            with ExitStack() as open_meters:  # if one meter fails, the others are still ended
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
            for meter, metrics in reading.by_meter.items():
                kept = meters.setdefault(meter, {})
                for metric, value in metrics.items():
                    if metric.endswith(PEAK):
                        kept[metric] = max(value, kept.get(metric, value))
        return greatest


def overhead_seconds(
    meter: Meter, work: Callable[[], object] = lambda: None, *, rounds: int = 7, clock: Clock = synchronised_clock
) -> float:
    """Time that ``meter`` adds to one phase around ``work``: the median of ``rounds`` paired differences, in seconds.

    Without ``work``, the cost of starting and ending a phase alone. A meter that follows every operator or samples in a
    thread costs more for longer work, so pass the step to be measured. The result can be negative if the cost is below
    the noise of ``work``.
    """

    def metered() -> None:
        meter.start_phase("overhead")
        try:
            work()
        finally:
            meter.end_phase("overhead")

    metered()  # one-time costs (loading a library, touching a page) do not count
    return statistics.median(timed(metered, clock) - timed(work, clock) for _ in range(rounds))
