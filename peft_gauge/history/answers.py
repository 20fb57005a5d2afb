"""What the saved runs of a machine answer, taken together: of each case the newest record in which it ran.

A bare run, a slow one and one of a single benchmark each ask for a part of all there is, so no single run holds it. An
answer stands until a newer run gives another, or asks the benchmark and no longer holds the case (`Absences`): then the
case is gone from the suite. A run that was interrupted, or left the case out, takes no answer away.
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
    """The newest answers of runs that are given oldest first (`add`)."""

    def __init__(self) -> None:
        self._runs: list[Run] = []  # those that an answer is of, and the newest, oldest first
        self._records: dict[
            str, tuple[int, list[CaseRecord]]
        ] = {}  # by id: the place of its run, and its records there

    def add(self, run: Run) -> None:
        """Take in ``run``, the newest so far."""
        place = len(self._runs)
        self._runs.append(run)
        given: dict[str, list[CaseRecord]] = {}
        for case in run.cases:
            given.setdefault(case.id, []).append(case)  # a second record tells how a clean-up failed
        self._forget_what_is_gone(run, given)
        for id_, records in given.items():
            known = self._records.get(id_)
            if known is None or _ran(records) or not _ran(known[1]):
                self._records.pop(id_, None)
                self._records[id_] = place, records
        self._let_go()

    def _forget_what_is_gone(self, run: Run, given: Mapping[str, Iterable[CaseRecord]]) -> None:
        places = {place for place, _ in self._records.values()}
        absences = {place: Absences(self._runs[place], run) for place in places}
        # A run without a selection may have run a part only; a benchmark that changed has other cases.
        known = {place: {case.id for case in self._runs[place].cases} for place in places}
        changed = {place: {case.benchmark for case in run.cases if case.id not in ids} for place, ids in known.items()}
        for id_, (place, (record, *_)) in list(self._records.items()):
            may_be_gone = run.selection is not None or record.benchmark in changed[place]
            if id_ in given or not may_be_gone:
                continue
            if absences[place](id_, record.benchmark, record.metrics).label == MISSING:
                del self._records[id_]

    def _let_go(self) -> None:
        """Runs without an answer are not kept: a history can have a thousand of them."""
        kept = sorted({place for place, _ in self._records.values()} | {len(self._runs) - 1})
        self._runs = [self._runs[place] for place in kept]
        moved = {old: new for new, old in enumerate(kept)}
        self._records = {id_: (moved[place], records) for id_, (place, records) in self._records.items()}

    def by_run(self) -> list[Run]:
        """The runs that an answer is of, the newest first, each with only the cases that it answers for the last time.

        The newest of all is always there, also where all its cases were skipped and an earlier run answers them.
        """
        cases: dict[int, list[CaseRecord]] = {len(self._runs) - 1: []} if self._runs else {}
        for place, records in self._records.values():
            cases.setdefault(place, []).extend(records)
        return [replace(self._runs[place], cases=tuple(cases[place])) for place in sorted(cases, reverse=True)]


def _ran(records: Iterable[CaseRecord]) -> bool:
    return any(record.outcome not in NOT_RUN for record in records)
