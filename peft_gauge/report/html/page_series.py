"""The values of one metric of one case over all runs of its machine, and how those of thousands of runs are added."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_gauge.history.briefs import BriefCase, Form

MOST_ROWS = 64
"""Rows of a case that are kept before they are split into columns; longer ones hold more equal numbers in memory."""


@dataclass
class Series:
    """One metric of one case on one machine: ``values`` at the indices ``runs``; for a time, also its intervals."""

    machine: str
    case: str
    metric: str
    runs: list[int] = field(default_factory=list)
    """The series of one case may share this list."""
    values: list[float] = field(default_factory=list)
    intervals: list[tuple[float, float] | None] = field(default_factory=list)

    def only(self, runs: Set[int]) -> Series:
        """The part of the series in ``runs``."""
        places = [place for place, run in enumerate(self.runs) if run in runs]
        if len(places) == len(self.runs):
            return self
        return Series(
            self.machine,
            self.case,
            self.metric,
            [self.runs[place] for place in places],
            [self.values[place] for place in places],
            [self.intervals[place] for place in places] if self.intervals else [],
        )


class Rows:
    """The values of a case on one machine, as a row per run, until `flush` adds them to the case's series.

    A case has the same metrics in nearly every run: to split rows into columns takes a fifth of the time of one
    addition per metric and run.
    """

    def __init__(self, form: Form, series: Sequence[Series | None]) -> None:
        """``series``: those of the form's ``numbers``, in their order; ``None`` for a metric without a history."""
        self._form, self._series = form, series
        own = {id(one.runs): [*one.runs] for one in series if one is not None}  # other series may share the old lists
        for one in series:
            if one is not None:
                one.runs = own[id(one.runs)]
        self._runs = list(own.values())
        self._rows: list[tuple[float, ...]] = []
        self._times: list[tuple[int, str, tuple[float, float] | None]] = []
        self._last: tuple[tuple[Any, ...], tuple[float, ...]] | None = None

    def fit(self, form: Form) -> bool:
        """Whether a case of this form has the same metrics, the same of them numbers."""
        own = self._form
        return form is own or (form.names == own.names and form.numbers == own.numbers)

    def add(self, run: int, case: BriefCase) -> None:
        """Add the case as it was in this run; its form must `fit`."""
        if self._last is None or self._last[0] is not case.values:
            self._last = case.values, tuple([case.values[place] for place in self._form.numbers])
        for runs in self._runs:
            runs.append(run)
        for metric, timed in case.times.items():
            self._times.append((len(self._rows), metric, timed.interval))
        self._rows.append(self._last[1])
        if len(self._rows) == MOST_ROWS:
            self.flush()

    def flush(self) -> None:
        """Add all rows to the series."""
        columns = zip(*self._rows, strict=True)
        timed: dict[str, Series] = {}
        for one, column in zip(self._series, columns, strict=False):
            if one is not None:
                one.values += _one_object(column, one.values[-1:])
                timed[one.metric] = one
        for place, metric, interval in self._times:
            if metric in timed:
                one = timed[metric]
                at = len(one.values) - len(self._rows) + place
                one.intervals += [None] * (at - len(one.intervals))
                one.intervals.append(interval)
        for one in timed.values():
            if one.intervals:
                one.intervals += [None] * (len(one.values) - len(one.intervals))
        self._rows, self._times = [], []


def _one_object(column: tuple[float, ...], before: Sequence[float]) -> Sequence[float]:
    """``column``; where all its values are the same, as one object, that ``before`` if it is the same too."""
    first = column[0]
    if column.count(first) < len(column) or len(set(map(type, column))) > 1:
        return column
    if before and type(before[0]) is type(first) and before[0] == first:
        first = before[0]
    return [first] * len(column)
