"""Pairs of allocations in two steps: first in the order of both, then those with another size or place."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from peft_gauge.memory.categories import BACKWARD, FORWARD, OPTIMIZER, OUTSIDE
from peft_gauge.traces.alignment import Key, align
from peft_gauge.traces.log import BEFORE, Allocation, Segment, StepLog

PHASES = (FORWARD, BACKWARD, OPTIMIZER)
STEP = "step"  # the only phase of a trace without phases

NEAR = 48
"""The largest number of pairs between two allocations of equal size for the two to count as moved."""


@dataclass(frozen=True)
class Gap:
    """The allocations between two pairs: indices of those without an equal partner."""

    phase: str
    planned: list[int]
    measured: list[int]
    after: int | None  # the planned allocation of the pair before, in the same phase
    until: int | None  # that of the pair after


class Pairing:
    """The pairs of allocations of ``planned`` and ``measured``, by index.

    Attributes:
        partner: planned -> measured, equal in size or not.
        back: measured -> planned.
        equal: pairs of equal size, in the order of both steps.
        gaps: the gaps between these pairs.
        gap_of: measured -> its gap.
        moved: the number of pairs that the two steps allocate in a different order.
        counts: phase -> [planned, measured, equal] allocations.
        compared: the runs of the measurement's events that have a counterpart.
        notes: limits of the pairing, for readers.
    """

    def __init__(self, planned: StepLog, measured: StepLog) -> None:
        self.planned, self.measured = planned, measured
        self.partner: dict[int, int] = {}
        self.equal: list[tuple[int, int]] = []
        self.gaps: list[Gap] = []
        self.moved = 0
        self.notes: list[str] = []
        self.counts: dict[str, list[int]] = {}
        self.compared: list[Segment] = []
        self._ends = {id(log): _Ends(log) for log in (planned, measured)}
        for of_plan, of_measurement in self._segments():
            self._align(of_plan, of_measurement)
        self._pair_moved()
        self.back = {measured: planned for planned, measured in self.partner.items()}
        self.gap_of = {index: gap for gap in self.gaps for index in gap.measured}

    def _segments(self) -> Iterator[tuple[list[Segment], list[Segment]]]:
        """The runs of events to align: micro-batch by micro-batch, the last with the last."""
        if not any(segment.phase == FORWARD for segment in self.measured.segments):
            self.notes.append("the trace has no phases: the whole step was compared as one phase")
            yield self.planned.segments, self.measured.segments
            return
        ours, theirs = _by_phase(self.planned), _by_phase(self.measured)
        for phase in (*PHASES, OUTSIDE):
            mine, its = ours.get(phase, []), theirs.get(phase, [])
            common = min(len(mine), len(its))
            for number in range(max(len(mine), len(its))):
                if number < common - 1 or len(mine) == len(its):
                    yield [mine[number]], [its[number]]
            if common and len(mine) != len(its):
                yield [mine[-1]], [its[-1]]
                left_out = abs(len(mine) - len(its))
                whose = "the plan" if len(mine) < len(its) else "the measurement"
                if phase in (FORWARD, BACKWARD):
                    self.notes.append(f"{left_out} {phase} passes that {whose} does not have were not compared")
            elif not common:
                for segment in mine:
                    yield [segment], []
                for segment in its:
                    yield [], [segment]

    def _align(self, of_plan: Sequence[Segment], of_measurement: Sequence[Segment]) -> None:
        ours = [index for segment in of_plan for index in self.planned.births(segment)]
        theirs = [index for segment in of_measurement for index in self.measured.births(segment)]
        phases = {segment.phase for segment in (*of_plan, *of_measurement)}
        phase = phases.pop() if len(phases) == 1 else STEP
        self.compared += of_measurement
        pairs = align(self._keys(self.planned, ours), self._keys(self.measured, theirs))
        count = self.counts.setdefault(phase, [0, 0, 0])
        count[0], count[1], count[2] = count[0] + len(ours), count[1] + len(theirs), count[2] + len(pairs)
        before = (-1, -1)
        for pair in (*pairs, (len(ours), len(theirs))):
            mine, its = ours[before[0] + 1 : pair[0]], theirs[before[1] + 1 : pair[1]]
            if mine or its:
                after = ours[before[0]] if before[0] >= 0 else None
                until = ours[pair[0]] if pair[0] < len(ours) else None
                self.gaps.append(Gap(phase, mine, its, after, until))
                self._pair_unequal(mine, its)
            if pair[0] < len(ours):
                self.equal.append((ours[pair[0]], theirs[pair[1]]))
                self.partner[ours[pair[0]]] = theirs[pair[1]]
            before = pair

    def _keys(self, log: StepLog, indices: Iterable[int]) -> list[Key]:
        ends = self._ends[id(log)]
        return [Key(each.nbytes, each.site, ends.outlives(each)) for each in (log.allocations[i] for i in indices)]

    def _pair_unequal(self, ours: Sequence[int], theirs: Sequence[int]) -> None:
        """Pair allocations whose sizes differ by a factor of 2, 4 or 8, unless different functions requested them; then
        the allocations of each function that requested the same number of them on both sides."""
        free = list(theirs)
        for mine in ours:
            left = self.planned.allocations[mine]
            for number, its in enumerate(free):
                right = self.measured.allocations[its]
                same_site = left.site == right.site or not (left.site and right.site)
                if same_site and _is_another_dtype(left.nbytes, right.nbytes):
                    self.partner[mine] = its
                    del free[: number + 1]
                    break
        taken = {self.partner[mine] for mine in ours if mine in self.partner}
        by_site: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for mine in ours:
            if mine not in self.partner:
                by_site[self.planned.allocations[mine].site][0].append(mine)
        for its in theirs:
            if its not in taken:
                by_site[self.measured.allocations[its].site][1].append(its)
        for site, (planned, measured) in by_site.items():
            if site and len(planned) == len(measured):
                self.partner.update(zip(planned, measured, strict=True))

    def _pair_moved(self) -> None:
        """Pair moved allocations: of equal size, with the same lifetime or a known site, and few pairs apart."""
        ranks = _ranks(self.planned, [pair[0] for pair in self.equal])
        their_ranks = _ranks(self.measured, [pair[1] for pair in self.equal])
        taken = set(self.partner.values())
        waiting: dict[tuple[str, int], list[tuple[int, Key]]] = defaultdict(list)
        for gap in self.gaps:
            for its, key in zip(gap.measured, self._keys(self.measured, gap.measured), strict=True):
                if its not in taken:
                    waiting[gap.phase, key.nbytes].append((its, key))
        for gap in self.gaps:
            for mine, key in zip(gap.planned, self._keys(self.planned, gap.planned), strict=True):
                if mine in self.partner:
                    continue
                rank = ranks(self.planned.allocations[mine].born)
                candidates = waiting[gap.phase, key.nbytes]
                near = [
                    (other.outlives != key.outlives, abs(rank - their_ranks(self.born(its))), number)
                    for number, (its, other) in enumerate(candidates)
                    if _may_have_moved(key, other)
                ]
                best = min((each for each in near if each[1] <= NEAR), default=None)
                if best is not None:
                    its, _ = candidates.pop(best[2])
                    self.partner[mine] = its
                    self.counts[gap.phase][2] += 1
                    self.moved += 1

    def born(self, measured: int) -> int:
        """The position in the measurement at which ``measured`` is allocated."""
        return self.measured.allocations[measured].born

    def moment_of_plan(self, position: int) -> int:
        """The planned moment that corresponds to the measured one at ``position``."""
        return _other_moment(self.measured, position, self.planned, self._pairs_by_measured)

    def moment_of_measurement(self, position: int) -> int:
        """The measured moment that corresponds to the planned one at ``position``."""
        return _other_moment(self.planned, position, self.measured, self._pairs_by_planned)

    @cached_property
    def _pairs_by_measured(self) -> list[tuple[int, int]]:
        """(position in the measurement, position in the plan) of the allocation of each equal pair, ascending."""
        ours, theirs = self.planned.allocations, self.measured.allocations
        return sorted((theirs[its].born, ours[mine].born) for mine, its in self.equal)

    @cached_property
    def _pairs_by_planned(self) -> list[tuple[int, int]]:
        return sorted((mine, its) for its, mine in self._pairs_by_measured)


def _may_have_moved(planned: Key, measured: Key) -> bool:
    if planned.site and planned.site == measured.site:
        return True
    return planned.outlives == measured.outlives and not measured.site


class _Ends:
    """Tests whether allocations outlive their run of events."""

    def __init__(self, log: StepLog) -> None:
        self._starts = [segment.start for segment in log.segments]

    def outlives(self, allocation: Allocation) -> bool:
        if allocation.died is None:
            return True
        return bisect_right(self._starts, allocation.born) != bisect_right(self._starts, allocation.died)


def _by_phase(log: StepLog) -> dict[str, list[Segment]]:
    found: dict[str, list[Segment]] = defaultdict(list)
    for segment in log.segments:
        found[segment.phase].append(segment)
    return found


def _is_another_dtype(left: int, right: int) -> bool:
    """Whether one size is 2, 4 or 8 times the other, as for the same elements in another dtype."""
    small, large = sorted((left, right))
    return small > 0 and large in (2 * small, 4 * small, 8 * small)


def _ranks(log: StepLog, paired: Sequence[int]) -> Any:
    """Position of an event -> the number of ``paired`` allocations before it."""
    positions = sorted(log.allocations[index].born for index in paired)
    return lambda position: bisect_right(positions, position)


def _other_moment(log: StepLog, position: int, other: StepLog, pairs: Sequence[tuple[int, int]]) -> int:
    """The moment in ``other`` that corresponds to ``position`` in ``log``; ``pairs`` holds positions of allocations.

    For a paired allocation it is that of its partner. Otherwise it is the peak between the surrounding pairs, within
    the phase.
    """
    if position == BEFORE:
        return BEFORE
    number = bisect_right(pairs, (position, len(other.events)))
    before = pairs[number - 1] if number else (BEFORE, BEFORE)
    if before[0] == position:
        return before[1]
    stop = pairs[number][1] if number < len(pairs) else len(other.events)
    window = range(max(before[1], 0), max(stop, before[1] + 1))
    phase = log.events[position].phase
    inside = [each for each in window if other.events[each].phase == phase]
    return max(inside or window, key=other.bytes_at, default=before[1])
