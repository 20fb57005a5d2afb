"""The newest results of a machine over all its saved runs: for each case, the newest record in which it ran.

A default run, a slow run and a run of one benchmark each cover a part of the suite, so no single run holds all cases.
A result stays valid until a newer run has another, or runs the benchmark without the case (`Absences`): then the case
is gone from the suite. A run that was interrupted, or deselected the case, invalidates nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from peft_gauge.history.absent import MISSING, Absences
from peft_gauge.history.schema import NOT_RUN

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from peft_gauge.history.reader import Run
    from peft_gauge.history.schema import CaseRecord


class NewestAnswers:
    """The newest results of runs, which are added oldest first (`add`)."""

    def __init__(self) -> None:
        self._runs: list[Run] = []  # runs that hold a newest result, and the newest run; oldest first
        self._records: dict[
            str, tuple[int, list[CaseRecord]]
        ] = {}  # by id: the index of its run, and its records there

    def add(self, run: Run) -> None:
        """Add ``run``, the newest so far."""
        place = len(self._runs)
        self._runs.append(run)
        given: dict[str, list[CaseRecord]] = {}
        for case in run.cases:
            given.setdefault(case.id, []).append(case)  # a second record is of a failed clean-up
        self._forget_what_is_gone(run, given)
        for id_, records in given.items():
            known = self._records.get(id_)
            if known is None or _ran(records) or not _ran(known[1]):
                self._records.pop(id_, None)
                self._records[id_] = place, records
        self._let_go()

    def _forget_what_is_gone(self, run: Run, given: Mapping[str, Iterable[CaseRecord]]) -> None:
        if self._records.keys() <= given.keys():
            return
        places = {place for place, _ in self._records.values()}
        absences = {place: Absences(self._runs[place], run) for place in places}
        # A run without a selection may have run only a part; a benchmark that changed has other cases.
        known = {place: {case.id for case in self._runs[place].cases} for place in places}
        changed = {place: {case.benchmark for case in run.cases if case.id not in ids} for place, ids in known.items()}
        for id_, (place, (record, *_)) in list(self._records.items()):
            may_be_gone = run.selection is not None or record.benchmark in changed[place]
            if id_ in given or not may_be_gone:
                continue
            if absences[place](id_, record.benchmark, record.metrics).label == MISSING:
                del self._records[id_]

    def _let_go(self) -> None:
        """Drop runs without a newest result: a history can have a thousand runs."""
        kept = sorted({place for place, _ in self._records.values()} | {len(self._runs) - 1})
        self._runs = [self._runs[place] for place in kept]
        moved = {old: new for new, old in enumerate(kept)}
        self._records = {id_: (moved[place], records) for id_, (place, records) in self._records.items()}

    def by_run(self) -> list[Run]:
        """The runs that hold a newest result, newest first, each with only these cases.

        The newest run is always included, even if all its cases were skipped and have their results from earlier runs.
        """
        cases: dict[int, list[CaseRecord]] = {len(self._runs) - 1: []} if self._runs else {}
        for place, records in self._records.values():
            cases.setdefault(place, []).extend(records)
        return [replace(self._runs[place], cases=tuple(cases[place])) for place in sorted(cases, reverse=True)]


def _ran(records: Iterable[CaseRecord]) -> bool:
    return any(record.outcome not in NOT_RUN for record in records)
