"""The allocations of one step in order: the same record for a plan and for a measurement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from peft_gauge.memory.categories import OUTSIDE
from peft_gauge.memory.ledger import rounded

if TYPE_CHECKING:
    from peft_gauge.memory.tracker import StorageTracker

BEFORE = -1
"""The position of allocations from before the step."""


@dataclass(slots=True)
class Allocation:
    """One allocation, from its request to its release.

    Attributes:
        nbytes: the requested bytes, rounded up to blocks of 512.
        born, died: positions in the log's events; ``born`` is `BEFORE` for an allocation from before the step, ``died``
            is ``None`` for an allocation that outlives it.
        phase: the phase in which it was allocated.
        site: the Python function that requested it (`peft_gauge.traces.sites`).
        stack: the frames of the request, innermost first.
        operator, module, category: from the plan; empty in a measurement.
    """

    nbytes: int
    born: int
    died: int | None = None
    phase: str = OUTSIDE
    site: str = ""
    stack: tuple[str, ...] = ()
    operator: str = ""
    module: str = ""
    category: str = ""

    def is_alive(self, position: int) -> bool:
        """Whether it is live right after the event at ``position``."""
        return self.born <= position and (self.died is None or self.died > position)


class Event(NamedTuple):
    """``sign`` is +1 for an allocation and -1 for a free; ``allocation`` is the index in `StepLog.allocations`."""

    sign: int
    allocation: int
    phase: str


@dataclass(frozen=True)
class Segment:
    """A run of events in one phase, from ``start`` up to but not including ``stop``."""

    phase: str
    start: int
    stop: int


@dataclass(frozen=True)
class StepLog:
    """The log of one step.

    Attributes:
        unlisted_before_bytes: memory from before the step that is not in ``allocations``, in the allocator's blocks;
            ``None`` if unknown.
        unsplit_bytes: the size of the blocks that are in use at the end, minus their requests; ``None`` if unknown.
        full_segments: sizes of segments that are completely in use at the end.
    """

    allocations: Sequence[Allocation]
    events: Sequence[Event]
    unlisted_before_bytes: int | None = 0
    unsplit_bytes: int | None = None
    full_segments: tuple[int, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def segments(self) -> list[Segment]:
        """The runs of events of one phase, in order."""
        found, start = [], 0
        for phase, run in groupby(self.events, key=lambda event: event.phase):
            stop = start + sum(1 for _ in run)
            found.append(Segment(phase, start, stop))
            start = stop
        return found

    @cached_property
    def curve(self) -> list[int]:
        """Live bytes right after each event, including memory from before the step as far as it is known."""
        live, found = self.before_bytes, []
        for event in self.events:
            live += event.sign * self.allocations[event.allocation].nbytes
            found.append(live)
        return found

    @cached_property
    def before_bytes(self) -> int:
        """Bytes from before the step, as far as they are known."""
        return sum(each.nbytes for each in self.before) + (self.unlisted_before_bytes or 0)

    @property
    def before(self) -> Iterator[Allocation]:
        """The listed allocations from before the step."""
        return (each for each in self.allocations if each.born == BEFORE)

    def bytes_at(self, position: int) -> int:
        """Live bytes right after the event at ``position``; `BEFORE` means the start of the step."""
        return self.before_bytes if position == BEFORE else self.curve[position]

    def peak(self, start: int = 0, stop: int | None = None) -> int:
        """The position of the first peak of live bytes among the events from ``start`` up to but not including
        ``stop``; `BEFORE` if the step never exceeds its start."""
        stop = len(self.events) if stop is None else stop
        most, at = (self.before_bytes, BEFORE) if start == 0 else (-1, start)
        for position in range(start, stop):
            if self.curve[position] > most:
                most, at = self.curve[position], position
        return at

    def births(self, segment: Segment) -> list[int]:
        """The indices of the allocations made in ``segment``, in order."""
        run = self.events[segment.start : segment.stop]
        return [event.allocation for event in run if event.sign > 0]

    @cached_property
    def numbers(self) -> dict[int, int]:
        """Index of an allocation -> its number in the step, from 1."""
        made = (event.allocation for event in self.events if event.sign > 0)
        return {index: number for number, index in enumerate(made, start=1)}


def planned(tracker: StorageTracker) -> StepLog:
    """The log of a step that ``tracker`` recorded, without empty storages and those in host memory."""
    allocations: list[Allocation] = []
    events: list[Event] = []
    index_of: dict[int, int] = {}
    begun = False
    for event in tracker.events:
        if event.nbytes == 0:
            continue
        begun = begun or event.phase != OUTSIDE
        if event.sign > 0:
            record = tracker.records[event.storage]
            index_of[event.storage] = len(allocations)
            allocations.append(
                Allocation(
                    nbytes=rounded(event.nbytes),
                    born=len(events) if begun else BEFORE,
                    phase=event.phase,
                    site=record.site,
                    operator=record.operator,
                    module=record.module,
                    category=event.category,
                )
            )
        index = index_of[event.storage]
        if begun:
            if event.sign < 0:
                allocations[index].died = len(events)
            events.append(Event(event.sign, index, event.phase))
    return StepLog(allocations, events)
