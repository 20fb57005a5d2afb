"""Live tensors by category, on any device: the planner's own tracker as a meter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peft_gauge.memory.categories import CATEGORIES
from peft_gauge.memory.tracker import StorageTracker

if TYPE_CHECKING:
    from peft_gauge.memory.ledger import Event


@dataclass
class _Open:
    name: str
    events_before: int
    entered: ExitStack = field(default_factory=ExitStack)


class TensorMeter:
    """Bytes of live storages, in total and by category, each storage counted once.

    A storage from before the first phase counts once an operator touches it; `tracker.adopt` counts it at once and sets
    its category. The meter starts a new log with every outermost phase, so it can stay on for a whole run.

    Metrics (bytes): ``live_bytes`` at the end, ``tensor_peak_bytes``, and ``<category>_bytes_at_peak`` for every
    category of the tracker.
    """

    name = "tensors"
    sees = "storages of tensors that operators create or touch, on any device; not a kernel's internal memory"
    resolution = "one byte; every allocation and release of a storage"

    def __init__(self, tracker: StorageTracker | None = None) -> None:
        self.tracker = StorageTracker() if tracker is None else tracker
        self._open: list[_Open] = []

    def why_unavailable(self) -> str | None:
        return None

    def start_phase(self, name: str) -> None:
        phase = _Open(name, 0)
        if not self._open:
            self.tracker.start_over()
            phase.entered.enter_context(self.tracker)
        phase.events_before = len(self.tracker.events)
        phase.entered.enter_context(self.tracker.phase(name))
        self._open.append(phase)

    def end_phase(self, name: str) -> Mapping[str, int | None]:
        innermost = self._open[-1].name if self._open else None
        if innermost != name:
            raise ValueError(f"cannot end phase {name!r}: the innermost open phase is {innermost!r}")
        phase = self._open.pop()
        phase.entered.close()  # this also labels gradients and optimizer state, so events are read afterwards
        at_peak = _at_peak(self.tracker.events, phase.events_before)
        return {
            "live_bytes": self.tracker.live().bytes,
            "tensor_peak_bytes": sum(at_peak.values()),
            **{f"{category}_bytes_at_peak": at_peak[category] for category in CATEGORIES},
        }


def _at_peak(events: Iterable[Event], start: int) -> Counter[str]:
    """Category -> live bytes at the (first) peak, from just before event number ``start`` on."""
    live: Counter[str] = Counter()
    total = most = 0
    at_peak: Counter[str] = Counter()
    for position, event in enumerate(events, start=1):
        live[event.category] += event.sign * event.nbytes
        total += event.sign * event.nbytes
        if position == start or (position > start and total > most):
            most, at_peak = total, live.copy()
    return at_peak
