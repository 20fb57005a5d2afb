"""A planned step beside a recorded one, allocation by allocation: where they differ, and what each difference is
of the distance between the two peaks.

Within each phase the allocations are paired in order (`peft_gauge.traces.alignment`). Both steps are then compared at
one moment: that of the greater of the two peaks, and the moment of the other step that the pairs lead to. What is alive
on one side only, or with another size, is a row. So is what was there before the step on one side only and, where the
other side's own peak lies at another moment, how much lower it is here. The rows add up to the measured peak less the
planned one, to the byte.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from peft_gauge.fingerprint.places import folded
from peft_gauge.memory.overheads import (
    CUBLAS_WORKSPACE_BYTES,
    CUBLAS_WORKSPACE_HOPPER_BYTES,
    CUBLAS_WORKSPACES,
    CUBLASLT_WORKSPACE_BYTES,
)
from peft_gauge.memory.tracker import BACKWARD, FORWARD, OPTIMIZER, OUTSIDE
from peft_gauge.traces.alignment import Key, align
from peft_gauge.traces.log import BEFORE, Allocation, Segment, StepLog

PHASES = (FORWARD, BACKWARD, OPTIMIZER)
STEP = "step"  # the one phase of a trace that does not tell them

# What a row is about.
SIZE = "another size"
ONLY_PLANNED = "only in the plan"
ONLY_MEASURED = "only in the measurement"
ALIVE_IN_PLAN = "alive in the plan only"
ALIVE_IN_MEASUREMENT = "alive in the measurement only"
THERE_BEFORE_PLANNED = "there before, only in the plan"
THERE_BEFORE_MEASURED = "there before, only in the measurement"
OTHER_MOMENT = "the peaks are at different moments"

# Categories that no plan has.
NOT_PLANNED = "not in the plan"
WORKSPACES = "library workspaces"
UNSPLIT = "unsplit blocks and the like"
MOMENT = "moment"

NEAR = 48
"""How many pairs may lie between two allocations of one size that the two steps make in another order."""

WORKSPACE_NAMES: Mapping[int, str] = {
    CUBLAS_WORKSPACE_HOPPER_BYTES: "cuBLAS workspace",
    CUBLAS_WORKSPACE_BYTES: "cuBLAS workspace",
    CUBLASLT_WORKSPACE_BYTES: "cuBLASLt workspace",
}
"""Sizes of what cuBLAS and cuBLASLt keep for themselves. An allocation that no plan has is one if a matrix product
asked for it, or if it was there before the step."""

_PRODUCTS = ("linear", "matmul", "bmm", "baddbmm", "addmm", "mm")

LARGE_BYTES = 1 << 20
"""From this size on a difference is told apart from the many small ones."""


@dataclass(frozen=True)
class Difference:
    """One place where the two steps differ.

    ``number``: of the measured allocation among the step's, from 1, or of the planned one where nothing was measured.
    ``operator`` and ``module`` are the plan's; where the plan has nothing, ``operator`` is the Python function that
    asked (in backward, whose thread has none, the planned operator just before), ``module`` that of the planned
    allocation just before. ``planned_bytes`` and ``measured_bytes`` are 0 where there is nothing.
    """

    kind: str
    phase: str
    number: int
    category: str
    operator: str
    module: str
    planned_bytes: int
    measured_bytes: int
    site: str = ""

    @property
    def bytes(self) -> int:
        """What the plan has too few (+) or too many (−)."""
        return self.measured_bytes - self.planned_bytes


@dataclass(frozen=True)
class Row:
    """Differences of one kind, operator and module, its indices folded. ``site``: which Python function asked, of the
    first; ``modules``: those that were folded; ``first_number``: as in `Difference`."""

    kind: str
    phase: str
    category: str
    operator: str
    module: str
    count: int
    planned_bytes: int
    measured_bytes: int
    first_number: int
    modules: tuple[str, ...] = ()
    site: str = ""

    @property
    def bytes(self) -> int:
        """What the plan has too few (+) or too many (−)."""
        return self.measured_bytes - self.planned_bytes

    @property
    def where(self) -> str:
        """The module, with its indices where it is only one."""
        return self.modules[0] if len(self.modules) == 1 else self.module


@dataclass(frozen=True)
class PhaseCount:
    """A phase's allocations, and its peak: the most alive at once within it. ``equal``: pairs of one size, in whichever
    order."""

    phase: str
    planned: int
    measured: int
    equal: int
    planned_peak_bytes: int | None
    measured_peak_bytes: int | None


@dataclass(frozen=True)
class Side:
    """The peak of one step. ``number``: of the allocation that makes it, from 1; 0 at the step's start."""

    peak_bytes: int
    phase: str
    number: int


@dataclass(frozen=True)
class Comparison:
    """What was found; see the module.

    Fields:
        planned, measured: the two peaks, in bytes asked of the allocator, in blocks of 512.
        phases: counts by phase.
        first, first_large: the first difference, and the first of `LARGE_BYTES` or more.
        rows: what the difference between the peaks is made of, the largest first; their bytes add up to it.
        by_category: category -> (planned, measured) bytes in the moment that is compared, the other peak's distance
            under `MOMENT`; they add up to the peaks.
        steps: what differs anywhere in the step, whether or not it is alive at the peak, the largest first.
        moved: pairs that the two steps make in another order.
        unsplit_bytes: what torch's ``memory_allocated`` counts beyond requests for what stays, if that is known.
        notes: what a reader has to know.
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
        """The measured peak less the planned one."""
        return self.measured.peak_bytes - self.planned.peak_bytes

    @property
    def unplanned_bytes(self) -> int:
        """The part of the difference that known library workspaces and unsplit blocks are not."""
        return sum(row.bytes for row in self.rows if row.category not in (WORKSPACES, UNSPLIT))

    def as_json(self) -> dict[str, Any]:
        """The record as JSON holds it."""
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


def compare(planned: StepLog, measured: StepLog) -> Comparison:
    """``planned`` beside ``measured``."""
    return _Comparer(planned, measured).result()


@dataclass(frozen=True)
class _Gap:
    """What stands between two pairs: indices of allocations without an equal partner."""

    phase: str
    planned: list[int]
    measured: list[int]
    after: int | None  # the planned allocation of the pair before, in the same phase
    until: int | None  # that of the pair after


class _Comparer:
    def __init__(self, planned: StepLog, measured: StepLog) -> None:
        self.planned, self.measured = planned, measured
        self.partner: dict[int, int] = {}  # planned -> measured, equal or not
        self.equal: list[tuple[int, int]] = []  # in the order of both
        self.gaps: list[_Gap] = []
        self.moved = 0
        self.notes: list[str] = []
        self._counts: dict[str, list[int]] = {}
        self._compared: list[Segment] = []
        self._ends = {id(log): _Ends(log) for log in (planned, measured)}
        for of_plan, of_measurement in self._segments():
            self._align(of_plan, of_measurement)
        self._pair_moved()
        self.back = {measured: planned for planned, measured in self.partner.items()}
        self._gap_of = {index: gap for gap in self.gaps for index in gap.measured}
        self._names = self._learned()

    # Pairing

    def _segments(self) -> Iterator[tuple[list[Segment], list[Segment]]]:
        """Runs of events that are laid side by side: micro-batch by micro-batch, the last with the last."""
        if not any(segment.phase == FORWARD for segment in self.measured.segments):
            self.notes.append("the trace does not tell its phases: the whole step was compared in one piece")
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
                    self.notes.append(f"{left_out} more {phase} passes than {whose} has were not compared")
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
        self._compared += of_measurement
        pairs = align(self._keys(self.planned, ours), self._keys(self.measured, theirs))
        count = self._counts.setdefault(phase, [0, 0, 0])
        count[0], count[1], count[2] = count[0] + len(ours), count[1] + len(theirs), count[2] + len(pairs)
        before = (-1, -1)
        for pair in (*pairs, (len(ours), len(theirs))):
            mine, its = ours[before[0] + 1 : pair[0]], theirs[before[1] + 1 : pair[1]]
            if mine or its:
                after = ours[before[0]] if before[0] >= 0 else None
                until = ours[pair[0]] if pair[0] < len(ours) else None
                self.gaps.append(_Gap(phase, mine, its, after, until))
                self._pair_unequal(mine, its)
            if pair[0] < len(ours):
                self.equal.append((ours[pair[0]], theirs[pair[1]]))
                self.partner[ours[pair[0]]] = theirs[pair[1]]
            before = pair

    def _keys(self, log: StepLog, indices: Iterable[int]) -> list[Key]:
        ends = self._ends[id(log)]
        return [Key(each.nbytes, each.site, ends.outlives(each)) for each in (log.allocations[i] for i in indices)]

    def _pair_unequal(self, ours: Sequence[int], theirs: Sequence[int]) -> None:
        """Pair what has twice, four or eight times the size on one side, unless two functions asked for it; then what
        one function asked for as often on both sides."""
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
        """Pair allocations of one size, and of one life or known site, that stand near each other on the two sides of
        some pairs."""
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
                    (other.outlives != key.outlives, abs(rank - their_ranks(self._born(its))), number)
                    for number, (its, other) in enumerate(candidates)
                    if _may_have_moved(key, other)
                ]
                best = min((each for each in near if each[1] <= NEAR), default=None)
                if best is not None:
                    its, _ = candidates.pop(best[2])
                    self.partner[mine] = its
                    self._counts[gap.phase][2] += 1
                    self.moved += 1

    def _born(self, measured: int) -> int:
        return self.measured.allocations[measured].born

    # Differences

    def differences(self) -> list[Difference]:
        """Every allocation without an equal partner, in the order of the step."""
        found = []
        for gap in sorted(self.gaps, key=self._place):
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

    def _place(self, gap: _Gap) -> tuple[int, int]:
        if gap.measured:
            return self._born(gap.measured[0]), 0
        return self._moment_of_measurement(self.planned.allocations[gap.planned[0]].born), 1

    def _difference(self, kind: str, mine: int | None, its: int | None) -> Difference:
        left = None if mine is None else self.planned.allocations[mine]
        right = None if its is None else self.measured.allocations[its]
        if left is not None:
            category, operator, module = left.category, left.operator, left.module
        else:
            assert right is not None, "a difference is of something"
            category, operator, module = self._unplanned(right, self._gap_of.get(its))  # type: ignore[arg-type]
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

    def _learned(self) -> dict[tuple[Any, ...], Counter[tuple[str, str, str, bool]]]:
        """What the plan calls the allocations of a place and size, by `_contexts`: (category, operator, folded module,
        and whether its indices are those of the allocation after it and not of the one before)."""
        names: dict[tuple[Any, ...], Counter[tuple[str, str, str, bool]]] = defaultdict(Counter)
        ours = [self.planned.allocations[mine] for mine, _ in self.equal]
        for number, (_, its) in enumerate(self.equal):
            left = ours[number]
            before = ours[number - 1] if number else None
            until = ours[number + 1] if number + 1 < len(ours) else None
            module = _folded(left.module)
            of_before = before is not None and _with_indices(module, before.module) == left.module
            of_next = until is not None and _with_indices(module, until.module) == left.module
            for key in _contexts(self.measured.allocations[its], before):
                names[key][left.category, left.operator, module, of_next and not of_before] += 1
        return names

    def _planned(self, index: int | None) -> Allocation | None:
        return None if index is None else self.planned.allocations[index]

    def _unplanned(self, found: Allocation, gap: _Gap | None) -> tuple[str, str, str]:
        """Category, operator and module of a measured allocation that the plan has not: those that it has for the same
        place and size in another layer, else the function that asked and the module of the planned one before."""
        function = found.site.rpartition(":")[2]
        stays = found.born == BEFORE or (found.died is None and found.nbytes != CUBLASLT_WORKSPACE_BYTES)
        if found.nbytes in WORKSPACE_NAMES and (function in _PRODUCTS or stays):
            return WORKSPACES, WORKSPACE_NAMES[found.nbytes], ""
        before, until = (None, None) if gap is None else (self._planned(gap.after), self._planned(gap.until))
        for key in _contexts(found, before):
            if key in self._names:
                (category, operator, module, of_next), _ = self._names[key].most_common(1)[0]
                neighbour = (until or before) if of_next else (before or until)
                return category, operator, _with_indices(module, neighbour.module) if neighbour else module
        module = before.module if before is not None else ""
        if found.site:
            return NOT_PLANNED, found.site, module
        return NOT_PLANNED, f"after {before.operator}" if before is not None and before.operator else "", module

    # The moment that is compared

    def result(self) -> Comparison:
        planned_at, measured_at = self.planned.peak(), self._measured_peak()
        planned_peak, measured_peak = self.planned.bytes_at(planned_at), self.measured.bytes_at(measured_at)
        if self.measured.unlisted_before_bytes is None:
            self.notes.append("the trace does not tell what was there before the step: taken as planned")
            measured_peak += self.planned.before_bytes - self.measured.before_bytes
        if measured_peak >= planned_peak:
            moments = (self._moment_of_plan(measured_at), measured_at)
        else:
            moments = (planned_at, self._moment_of_measurement(planned_at))
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
        rows = _grouped(each for each in found if each.bytes)
        differences = self.differences()
        assert sum(row.bytes for row in rows) == measured_peak - planned_peak, "rows add up to the difference"
        return Comparison(
            planned=_side(self.planned, planned_at, planned_peak),
            measured=_side(self.measured, measured_at, measured_peak),
            phases=tuple(self._phase_counts(offset)),
            first=next(iter(differences), None),
            first_large=next((each for each in differences if _is_large(each)), None),
            rows=tuple(rows),
            by_category=self._categories(moments, found),
            steps=tuple(_grouped(differences)),
            moved=self.moved,
            unsplit_bytes=self.measured.unsplit_bytes,
            notes=(*self.measured.notes, *self.notes),
        )

    def _measured_peak(self) -> int:
        """The position of the peak, among the events that have a counterpart in the plan."""
        overall = self.measured.peak()
        if overall == BEFORE or any(part.start <= overall < part.stop for part in self._compared):
            return overall
        found = max((self.measured.peak(part.start, part.stop) for part in self._compared), key=self.measured.bytes_at)
        if self.measured.bytes_at(overall) > self.measured.bytes_at(found):
            self.notes.append(
                "the measured peak is in a pass that was not compared; the greatest of the others is shown"
            )
        return found

    def _moment_of_plan(self, position: int) -> int:
        """The planned moment that stands for the measured one at ``position``."""
        return _other_moment(self.measured, position, self.planned, self._pairs_by_measured)

    def _moment_of_measurement(self, position: int) -> int:
        return _other_moment(self.planned, position, self.measured, self._pairs_by_planned)

    @cached_property
    def _pairs_by_measured(self) -> list[tuple[int, int]]:
        """(position in the measurement, position in the plan) of each equal pair's births, ascending."""
        ours, theirs = self.planned.allocations, self.measured.allocations
        return sorted((theirs[its].born, ours[mine].born) for mine, its in self.equal)

    @cached_property
    def _pairs_by_planned(self) -> list[tuple[int, int]]:
        return sorted((mine, its) for its, mine in self._pairs_by_measured)

    def _alive(self, planned_at: int, measured_at: int) -> Iterator[Difference]:
        """What the step made and is alive at the moment on one side only, or with another size."""
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
        """What was there before the step on one side only, alive at the moment."""
        unlisted = self.measured.unlisted_before_bytes
        if unlisted is None:  # it was taken as planned; what was freed of it since need not be
            balance = _freed_before(self.planned, planned_at) - _freed_before(self.measured, measured_at)
            if balance:
                sides = {"measured_bytes" if balance > 0 else "planned_bytes": abs(balance)}
                yield _there_before(NOT_PLANNED, "", "", **sides)
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
                yield _there_before(*self._unplanned(each, None), measured_bytes=each.nbytes)
        left = [each for group in ours.values() for each in group]
        if not unlisted:
            for each in left:
                yield _there_before(each.category, each.operator, each.module, planned_bytes=each.nbytes)
            return
        excess = unlisted - sum(each.nbytes for each in left)
        workspaces = self._workspaces_within(excess, left)
        if workspaces:
            yield _there_before(WORKSPACES, "cuBLAS workspace", "", measured_bytes=workspaces)
            excess -= workspaces
        if excess > 0:
            yield _there_before(UNSPLIT, "", "", measured_bytes=excess)
        elif excess < 0:
            yield _there_before(NOT_PLANNED, "", "", planned_bytes=-excess)

    def _workspaces_within(self, excess: int, planned: Sequence[Allocation]) -> int:
        """How much of ``excess`` is cuBLAS's workspaces, where only sums are known: a segment of a Hopper's workspace
        that is in use whole, and that no planned tensor is as large as, tells a Hopper."""
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
        """Bytes by category on both sides: what the plan has at the moment, and that with the differences."""
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
            if phase in self._counts:
                ours, theirs, equal = self._counts[phase]
                peaks = _peak_in(self.planned, phase), _peak_in(self.measured, phase)
                if ours or theirs:
                    measured = None if peaks[1] is None else peaks[1] + offset
                    yield PhaseCount(phase, ours, theirs, equal, peaks[0], measured)


def _may_have_moved(planned: Key, measured: Key) -> bool:
    if planned.site and planned.site == measured.site:
        return True
    return planned.outlives == measured.outlives and not measured.site


def _contexts(found: Allocation, before: Allocation | None) -> Iterator[tuple[Any, ...]]:
    """What tells a measured allocation's place: its stack, else the planned one before; each with its size."""
    if found.stack:
        yield "stack", found.stack, found.nbytes
    elif before is not None:
        yield "after", before.operator, _folded(before.module), found.nbytes


def _folded(module: str) -> str:
    return folded(module) if module else ""


def _with_indices(template: str, neighbour: str) -> str:
    """A folded path with the indices of ``neighbour``, as far as the two agree."""
    parts = template.split(".")
    for number, (part, own) in enumerate(zip(parts, neighbour.split("."), strict=False)):
        if part != own and not (part == "*" and own.isdigit()):
            break
        parts[number] = own
    return ".".join(parts)


class _Ends:
    """Whether allocations outlive the run of events that made them."""

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
    """Whether one size is twice, four or eight times the other: the same elements in another dtype."""
    small, large = sorted((left, right))
    return small > 0 and large in (2 * small, 4 * small, 8 * small)


def _ranks(log: StepLog, paired: Sequence[int]) -> Any:
    """position of an event -> how many of the ``paired`` allocations are made before it."""
    positions = sorted(log.allocations[index].born for index in paired)
    return lambda position: bisect_right(positions, position)


def _other_moment(log: StepLog, position: int, other: StepLog, pairs: Sequence[tuple[int, int]]) -> int:
    """The moment of ``other`` that stands for ``position`` in ``log``; ``pairs``: positions of births in both.

    Of an allocation that both have, its own; else, between the pairs around it and in its phase, that of most bytes.
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


def _phase_of(log: StepLog, position: int) -> str:
    return OUTSIDE if position == BEFORE else log.events[position].phase


def _side(log: StepLog, position: int, peak_bytes: int) -> Side:
    number = 0 if position == BEFORE else log.numbers.get(log.events[position].allocation, 0)
    return Side(peak_bytes, _phase_of(log, position), number)


def _peak_in(log: StepLog, phase: str) -> int | None:
    """The most bytes within a phase, its start included."""
    found = [
        max([log.bytes_at(segment.start - 1), *log.curve[segment.start : segment.stop]])
        for segment in log.segments
        if phase in (segment.phase, STEP)
    ]
    return max(found, default=None)


def _freed_before(log: StepLog, position: int) -> int:
    """Bytes from before the step that are gone at ``position``."""
    return sum(each.nbytes for each in log.before if not each.is_alive(position))


def _there_before(
    category: str, operator: str, module: str, *, planned_bytes: int = 0, measured_bytes: int = 0
) -> Difference:
    kind = THERE_BEFORE_PLANNED if planned_bytes else THERE_BEFORE_MEASURED
    return Difference(kind, OUTSIDE, 0, category, operator, module, planned_bytes, measured_bytes)


def _is_large(difference: Difference) -> bool:
    return abs(difference.bytes) >= LARGE_BYTES


def _grouped(differences: Iterable[Difference]) -> list[Row]:
    """Rows of equal differences, the largest sum first."""
    groups: dict[tuple[str, str, str, str, str], list[Difference]] = {}
    for each in differences:
        module = _folded(each.module)
        groups.setdefault((each.kind, each.phase, each.category, each.operator, module), []).append(each)
    rows = [
        Row(
            *key,
            len(group),
            sum(each.planned_bytes for each in group),
            sum(each.measured_bytes for each in group),
            min(each.number for each in group),
            tuple(dict.fromkeys(each.module for each in group if each.module)),
            group[0].site,
        )
        for key, group in groups.items()
    ]
    return sorted(rows, key=lambda row: -abs(row.bytes))
