"""Comparison of a planned step with a recorded one, allocation by allocation: their differences, and the contribution
of each difference to the distance between the two peaks.

Within each phase the allocations are paired in order (`peft_gauge.traces.alignment`). Both steps are then compared at
one moment: that of the greater of the two peaks, and its counterpart in the other step by the pairs. The rows are:

- allocations that are live on one side only, or have another size;
- memory from before the step on one side only;
- if the other side's own peak is at another moment, its distance from the bytes compared here.

The rows add up exactly to the measured peak minus the planned peak.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from peft_gauge.memory.categories import OUTSIDE
from peft_gauge.memory.overheads import (
    CUBLAS_WORKSPACE_BYTES,
    CUBLAS_WORKSPACE_HOPPER_BYTES,
    CUBLAS_WORKSPACES,
)
from peft_gauge.traces.differences import (
    ALIVE_IN_MEASUREMENT,
    ALIVE_IN_PLAN,
    MOMENT,
    NOT_PLANNED,
    ONLY_MEASURED,
    ONLY_PLANNED,
    OTHER_MOMENT,
    SIZE,
    UNSPLIT,
    WORKSPACES,
    Difference,
    Row,
    grouped,
    is_large,
    there_before,
)
from peft_gauge.traces.log import BEFORE, Allocation, StepLog
from peft_gauge.traces.names import PlannedNames
from peft_gauge.traces.pairing import PHASES, STEP, Gap, Pairing


@dataclass(frozen=True)
class PhaseCount:
    """A phase's number of allocations and its peak of live bytes. ``equal`` counts pairs of equal size in any order."""

    phase: str
    planned: int
    measured: int
    equal: int
    planned_peak_bytes: int | None
    measured_peak_bytes: int | None


@dataclass(frozen=True)
class Side:
    """The peak of one step. ``number`` is that of the allocation that reaches it, from 1; 0 is the step's start."""

    peak_bytes: int
    phase: str
    number: int


@dataclass(frozen=True)
class TraceComparison:
    """The result of a comparison, described in the module's docstring.

    Attributes:
        planned, measured: the two peaks, in requested bytes rounded up to blocks of 512.
        phases: counts by phase.
        first, first_large: the first difference, and the first of at least `LARGE_BYTES`.
        rows: the parts of the difference between the peaks, largest first; their bytes add up to it.
        by_category: category -> (planned, measured) bytes at the compared moment, with the distance of the other peak
            under `MOMENT`; they add up to the peaks.
        steps: all differences in the step, live at the peak or not, largest first.
        moved: the number of pairs that the two steps allocate in a different order.
        unsplit_bytes: the part of torch's ``memory_allocated`` beyond the requests that stay live, if known.
        notes: limits of the comparison, for readers.
    """

    planned: Side
    measured: Side
    phases: tuple[PhaseCount, ...]
    first: Difference | None
    first_large: Difference | None
    rows: tuple[Row, ...]
    by_category: Mapping[str, tuple[int, int]]
    steps: tuple[Row, ...]
    moved: int
    unsplit_bytes: int | None
    notes: tuple[str, ...] = field(default=())

    @property
    def difference_bytes(self) -> int:
        """The measured peak minus the planned peak."""
        return self.measured.peak_bytes - self.planned.peak_bytes

    @property
    def unplanned_bytes(self) -> int:
        """The part of the difference that known library workspaces and unsplit blocks do not explain."""
        return sum(row.bytes for row in self.rows if row.category not in (WORKSPACES, UNSPLIT))

    def as_json(self) -> dict[str, Any]:
        """The fields by name, as JSON."""
        return {
            **asdict(self),
            "difference_bytes": self.difference_bytes,
            "unplanned_bytes": self.unplanned_bytes,
            "by_category": {
                name: {"planned_bytes": planned, "measured_bytes": measured, "bytes": measured - planned}
                for name, (planned, measured) in self.by_category.items()
            },
            "rows": [{**asdict(row), "bytes": row.bytes} for row in self.rows],
            "steps": [{**asdict(row), "bytes": row.bytes} for row in self.steps],
        }


def compare(planned: StepLog, measured: StepLog) -> TraceComparison:
    """Compare a planned step with a measured one."""
    return _Comparer(planned, measured).result()


class _Comparer:
    def __init__(self, planned: StepLog, measured: StepLog) -> None:
        self.planned, self.measured = planned, measured
        self.pairing = Pairing(planned, measured)
        self.names = PlannedNames(planned, measured, self.pairing)
        self.partner, self.back = self.pairing.partner, self.pairing.back
        self.notes = [*self.pairing.notes]

    # Differences

    def differences(self) -> list[Difference]:
        """Every allocation without an equal partner, in the order of the step."""
        found = []
        for gap in sorted(self.pairing.gaps, key=self._place):
            unequal = {self.partner[index] for index in gap.planned if index in self.partner}
            for index in gap.planned:
                its = self.partner.get(index)
                if its is None:
                    found.append(self._difference(ONLY_PLANNED, index, None))
                elif self.planned.allocations[index].nbytes != self.measured.allocations[its].nbytes:
                    found.append(self._difference(SIZE, index, its))
            for index in gap.measured:
                if index not in unequal and index not in self.back:
                    found.append(self._difference(ONLY_MEASURED, None, index))
        return found

    def _place(self, gap: Gap) -> tuple[int, int]:
        if gap.measured:
            return self.pairing.born(gap.measured[0]), 0
        return self.pairing.moment_of_measurement(self.planned.allocations[gap.planned[0]].born), 1

    def _difference(self, kind: str, mine: int | None, its: int | None) -> Difference:
        left = None if mine is None else self.planned.allocations[mine]
        right = None if its is None else self.measured.allocations[its]
        if left is not None:
            category, operator, module = left.category, left.operator, left.module
        else:
            assert right is not None, "a difference has at least one allocation"
            category, operator, module = self.names.unplanned(right, self.pairing.gap_of.get(its))  # type: ignore[arg-type]
        phase = (right or left).phase  # type: ignore[union-attr]
        number = self.measured.numbers.get(its, 0) if its is not None else self.planned.numbers.get(mine, 0)  # type: ignore[arg-type]
        return Difference(
            kind,
            phase,
            number,
            category,
            operator,
            module,
            0 if left is None else left.nbytes,
            0 if right is None else right.nbytes,
            right.site if right is not None else left.site if left is not None else "",
        )

    # The compared moment

    def result(self) -> TraceComparison:
        planned_at, measured_at = self.planned.peak(), self._measured_peak()
        planned_peak, measured_peak = self.planned.bytes_at(planned_at), self.measured.bytes_at(measured_at)
        if self.measured.unlisted_before_bytes is None:
            self.notes.append("the trace does not show the memory from before the step: the plan's value is used")
            measured_peak += self.planned.before_bytes - self.measured.before_bytes
        if measured_peak >= planned_peak:
            moments = (self.pairing.moment_of_plan(measured_at), measured_at)
        else:
            moments = (planned_at, self.pairing.moment_of_measurement(planned_at))
        found = [*self._alive(*moments), *self._before(*moments)]
        known = self.measured.unlisted_before_bytes is not None
        offset = 0 if known else self.planned.before_bytes - self.measured.before_bytes
        elsewhere = [
            *self._elsewhere(self.planned, planned_at, planned_peak - self.planned.bytes_at(moments[0]), is_plan=True),
            *self._elsewhere(
                self.measured,
                measured_at,
                measured_peak - self.measured.bytes_at(moments[1]) - offset,
                is_plan=False,
            ),
        ]
        found += elsewhere
        rows = grouped(each for each in found if each.bytes)
        differences = self.differences()
        assert sum(row.bytes for row in rows) == measured_peak - planned_peak, "rows must add up to the difference"
        return TraceComparison(
            planned=_side(self.planned, planned_at, planned_peak),
            measured=_side(self.measured, measured_at, measured_peak),
            phases=tuple(self._phase_counts(offset)),
            first=next(iter(differences), None),
            first_large=next((each for each in differences if is_large(each)), None),
            rows=tuple(rows),
            by_category=self._categories(moments, found),
            steps=tuple(grouped(differences)),
            moved=self.pairing.moved,
            unsplit_bytes=self.measured.unsplit_bytes,
            notes=(*self.measured.notes, *self.notes),
        )

    def _measured_peak(self) -> int:
        """The position of the peak among the events that have a counterpart in the plan."""
        overall = self.measured.peak()
        if overall == BEFORE or any(part.start <= overall < part.stop for part in self.pairing.compared):
            return overall
        found = max(
            (self.measured.peak(part.start, part.stop) for part in self.pairing.compared), key=self.measured.bytes_at
        )
        if self.measured.bytes_at(overall) > self.measured.bytes_at(found):
            self.notes.append(
                "the measured peak is in a pass that was not compared; the peak of the compared passes is shown"
            )
        return found

    def _alive(self, planned_at: int, measured_at: int) -> Iterator[Difference]:
        """Allocations of the step that are live at the moment on one side only, or have another size."""
        for mine, left in enumerate(self.planned.allocations):
            if left.born == BEFORE:
                continue
            its = self.partner.get(mine)
            alive = left.is_alive(planned_at)
            also = its is not None and self.measured.allocations[its].is_alive(measured_at)
            if alive and its is None:
                yield self._difference(ONLY_PLANNED, mine, None)
            elif alive and also:
                if left.nbytes != self.measured.allocations[its].nbytes:  # type: ignore[index]
                    yield self._difference(SIZE, mine, its)
            elif alive:
                yield replace(self._difference(ALIVE_IN_PLAN, mine, its), measured_bytes=0)
            elif also:
                yield replace(self._difference(ALIVE_IN_MEASUREMENT, mine, its), planned_bytes=0)
        for its, right in enumerate(self.measured.allocations):
            if right.born != BEFORE and its not in self.back and right.is_alive(measured_at):
                yield self._difference(ONLY_MEASURED, None, its)

    def _before(self, planned_at: int, measured_at: int) -> Iterator[Difference]:
        """Memory from before the step on one side only that is live at the moment."""
        unlisted = self.measured.unlisted_before_bytes
        if unlisted is None:  # the plan's value is used for the start; the bytes freed since can differ
            balance = _freed_before(self.planned, planned_at) - _freed_before(self.measured, measured_at)
            if balance:
                sides = {"measured_bytes" if balance > 0 else "planned_bytes": abs(balance)}
                yield there_before(NOT_PLANNED, "", "", **sides)
            return
        ours: dict[int, list[Allocation]] = defaultdict(list)
        for each in self.planned.before:
            if each.is_alive(planned_at):
                ours[each.nbytes].append(each)
        for each in self.measured.before:
            if not each.is_alive(measured_at):
                continue
            if ours[each.nbytes]:
                ours[each.nbytes].pop()
            else:
                yield there_before(*self.names.unplanned(each, None), measured_bytes=each.nbytes)
        left = [each for group in ours.values() for each in group]
        if not unlisted:
            for each in left:
                yield there_before(each.category, each.operator, each.module, planned_bytes=each.nbytes)
            return
        excess = unlisted - sum(each.nbytes for each in left)
        workspaces = self._workspaces_within(excess, left)
        if workspaces:
            yield there_before(WORKSPACES, "cuBLAS workspace", "", measured_bytes=workspaces)
            excess -= workspaces
        if excess > 0:
            yield there_before(UNSPLIT, "", "", measured_bytes=excess)
        elif excess < 0:
            yield there_before(NOT_PLANNED, "", "", planned_bytes=-excess)

    def _workspaces_within(self, excess: int, planned: Sequence[Allocation]) -> int:
        """The part of ``excess`` that is cuBLAS workspaces, if only sums are known.

        The GPU is taken for a Hopper if it has more fully used segments of the size of Hopper's workspace than there
        are planned tensors of that size.
        """
        hopper = CUBLAS_WORKSPACE_HOPPER_BYTES
        segments = self.measured.full_segments.count(hopper)
        is_hopper = segments > sum(1 for each in planned if each.nbytes == hopper)
        size = hopper if is_hopper else CUBLAS_WORKSPACE_BYTES
        return size * min(max(excess, 0) // size, CUBLAS_WORKSPACES)

    def _elsewhere(self, log: StepLog, at: int, nbytes: int, *, is_plan: bool) -> Iterator[Difference]:
        if nbytes:
            whose = "planned" if is_plan else "measured"
            phase, number, allocation = _phase_of(log, at), 0, None
            if at != BEFORE:
                allocation = log.allocations[log.events[at].allocation]
                number = log.numbers.get(log.events[at].allocation, 0)
            yield Difference(
                OTHER_MOMENT,
                phase,
                number,
                MOMENT,
                f"the {whose} peak: {allocation.operator or allocation.site}" if allocation else f"the {whose} peak",
                allocation.module if allocation else "",
                nbytes if is_plan else 0,
                0 if is_plan else nbytes,
            )

    def _categories(self, moments: tuple[int, int], found: Sequence[Difference]) -> dict[str, tuple[int, int]]:
        """Bytes by category on both sides: the plan's bytes at the moment, and these plus the differences."""
        planned: Counter[str] = Counter()
        for each in self.planned.allocations:
            if each.is_alive(moments[0]):
                planned[each.category] += each.nbytes
        measured = Counter(planned)
        for difference in found:
            if difference.kind == OTHER_MOMENT:
                planned[MOMENT] += difference.planned_bytes
                measured[MOMENT] += difference.measured_bytes
            else:
                measured[difference.category] += difference.bytes
        names = sorted({*planned, *measured}, key=lambda name: -max(planned[name], measured[name]))
        return {name: (planned[name], measured[name]) for name in names if planned[name] or measured[name]}

    def _phase_counts(self, offset: int) -> Iterator[PhaseCount]:
        for phase in (*PHASES, OUTSIDE, STEP):
            if phase in self.pairing.counts:
                ours, theirs, equal = self.pairing.counts[phase]
                peaks = _peak_in(self.planned, phase), _peak_in(self.measured, phase)
                if ours or theirs:
                    measured = None if peaks[1] is None else peaks[1] + offset
                    yield PhaseCount(phase, ours, theirs, equal, peaks[0], measured)


def _phase_of(log: StepLog, position: int) -> str:
    return OUTSIDE if position == BEFORE else log.events[position].phase


def _side(log: StepLog, position: int, peak_bytes: int) -> Side:
    number = 0 if position == BEFORE else log.numbers.get(log.events[position].allocation, 0)
    return Side(peak_bytes, _phase_of(log, position), number)


def _peak_in(log: StepLog, phase: str) -> int | None:
    """The peak of live bytes within a phase, including its start."""
    found = [
        max([log.bytes_at(segment.start - 1), *log.curve[segment.start : segment.stop]])
        for segment in log.segments
        if phase in (segment.phase, STEP)
    ]
    return max(found, default=None)


def _freed_before(log: StepLog, position: int) -> int:
    """Bytes from before the step that are freed by ``position``."""
    return sum(each.nbytes for each in log.before if not each.is_alive(position))
