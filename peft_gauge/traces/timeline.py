"""Live memory over a step, by category, and the modules that hold the memory at its peak."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from peft_gauge.memory.categories import CATEGORIES
from peft_gauge.traces.differences import folded_module
from peft_gauge.traces.log import BEFORE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from peft_gauge.traces.log import Allocation, StepLog

LARGEST = 6
"""Modules named at the peak."""


@dataclass(frozen=True)
class Moment:
    """The largest total among the events of one column: its ``position`` in the log, its phase, and bytes by category.

    ``operator`` and ``module`` made the allocation that reached the total; empty if it is from before the step.
    """

    position: int
    phase: str
    by_category: dict[str, int]
    operator: str = ""
    module: str = ""

    @property
    def nbytes(self) -> int:
        return sum(self.by_category.values())


@dataclass(frozen=True)
class Holder:
    """``count`` live allocations of one category, module (layer indices folded to ``*``) and operator."""

    category: str
    module: str
    operator: str
    count: int
    nbytes: int


@dataclass(frozen=True)
class Timeline:
    """A step in columns of equally many allocations and releases.

    Attributes:
        moments: the largest total of each column.
        peak: the first peak of the step; one of ``moments``.
        held: the live allocations at the peak, largest first, without the weights and the optimizer's state.
    """

    moments: tuple[Moment, ...]
    peak: Moment
    held: tuple[Holder, ...]

    def as_json(self) -> dict[str, Any]:
        """The record for JSON."""
        return asdict(self)


def timeline(log: StepLog, columns: int) -> Timeline:
    """``log``, a planned step, in at most ``columns`` columns."""
    peak = log.peak()
    width = max(1, -(-len(log.events) // columns))
    highest: dict[int, tuple[int, int]] = {}  # column -> position, bytes
    for position, nbytes in enumerate(log.curve):
        column = position // width
        if column not in highest or nbytes > highest[column][1]:
            highest[column] = position, nbytes
    moments = tuple(_moments(log, [position for position, _ in highest.values()]))
    at_peak = next((each for each in moments if each.position == peak), None) or _start(log)
    return Timeline(moments, at_peak, tuple(_held(log, peak)))


def _start(log: StepLog) -> Moment:
    phase = log.events[0].phase if log.events else ""
    return Moment(BEFORE, phase, _in_order(_summed(log.before)))


def _moments(log: StepLog, positions: list[int]) -> Iterator[Moment]:
    live = _summed(log.before)
    wanted = iter(positions)
    position = next(wanted, None)
    for number, event in enumerate(log.events):
        made = log.allocations[event.allocation]
        live[made.category] += event.sign * made.nbytes
        if number == position:
            by = made if event.sign > 0 else None
            names = (by.operator, by.module) if by is not None else ("", "")
            yield Moment(number, event.phase, _in_order(live), *names)
            position = next(wanted, None)


def _summed(allocations: Iterable[Allocation]) -> Counter[str]:
    found: Counter[str] = Counter()
    for each in allocations:
        found[each.category] += each.nbytes
    return found


def _in_order(live: Counter[str]) -> dict[str, int]:
    return {category: live[category] for category in CATEGORIES if live[category]}


def _held(log: StepLog, peak: int) -> Iterator[Holder]:
    """The largest groups of allocations that the step has made and that live at its peak."""
    sizes: Counter[tuple[str, str, str]] = Counter()
    counts: Counter[tuple[str, str, str]] = Counter()
    for each in log.allocations:
        if each.born != BEFORE and each.is_alive(peak):
            key = each.category, folded_module(each.module), each.operator
            sizes[key] += each.nbytes
            counts[key] += 1
    for key, nbytes in sizes.most_common(LARGEST):
        yield Holder(*key, counts[key], nbytes)
