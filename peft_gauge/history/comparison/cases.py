"""Match the cases of two runs, and list those without a counterpart."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from peft_gauge.history.absent import MISSING, Absences
from peft_gauge.history.comparison.rows import NEW, RENAMED, Row
from peft_gauge.history.metrics import IDENTITY, RecordedCase
from peft_gauge.history.schema import NOT_RUN

if TYPE_CHECKING:
    from peft_gauge.history.reader import Run


def renamed(old_cases: Mapping[str, RecordedCase], new_cases: Mapping[str, RecordedCase]) -> dict[str, str]:
    """Old id -> new id of cases that were only renamed.

    Matched are cases with the same metric names under the same test in another file or about the same subject, or with
    the same fingerprint. A case with several candidates is not matched.
    """
    gone = [case for case in old_cases.values() if case.id not in new_cases]
    come = [case for case in new_cases.values() if case.id not in old_cases]
    found: dict[str, str] = {}
    for key in (_by_test, _by_subject_and_file, _by_subject, _by_fingerprint):
        taken = set(found.values())
        old = _unique([case for case in gone if case.id not in found], key)
        new = _unique([case for case in come if case.id not in taken], key)
        found |= {old[shared].id: new[shared].id for shared in old.keys() & new.keys()}
    return found


def _by_test(case: RecordedCase) -> str | None:
    return json.dumps([case.id.partition("::")[2], sorted(case.metrics)])


def _by_subject_and_file(case: RecordedCase) -> str | None:
    return None if case.subject is None else json.dumps([case.benchmark, sorted(case.metrics), case.subject])


def _by_subject(case: RecordedCase) -> str | None:
    """In any file, if there are metrics other than those that identify the subject."""
    said = case.metrics.keys() - {*IDENTITY}
    return None if case.subject is None or not said else json.dumps([sorted(said), case.subject])


def _by_fingerprint(case: RecordedCase) -> str | None:
    from peft_gauge.history.fingerprints import digest

    return None if case.fingerprint is None else f"{case.benchmark} {digest(case.fingerprint)}"


def _unique(cases: list[RecordedCase], key: Callable[[RecordedCase], str | None]) -> dict[str, RecordedCase]:
    keys = Counter(map(key, cases))
    return {name: case for case in cases if (name := key(case)) is not None and keys[name] == 1}


def renamed_row(old: str, new: str) -> Row:
    return Row(new, "id", "same", RENAMED, before=old, after=new)


def only_in_base(
    base: Run,
    new: Run,
    old_cases: Mapping[str, RecordedCase],
    new_cases: Mapping[str, RecordedCase],
    names: Mapping[str, str],
) -> Iterator[Row]:
    """Rows of cases that NEW does not hold, with the reason; a case that did not run in BASE either is left out."""
    absences = Absences(base, new)
    for case in old_cases.values():
        if case.id not in new_cases and case.id not in names and case.outcome not in NOT_RUN:
            label, why = absences(case.id, case.benchmark, case.metrics)
            yield Row(case.id, "outcome", "inconclusive", label, before=case.outcome, note=f"NEW {why}")


def only_in_new(
    base: Run,
    new: Run,
    old_cases: Mapping[str, RecordedCase],
    new_cases: Mapping[str, RecordedCase],
    names: Mapping[str, str],
) -> Iterator[Row]:
    """Rows of cases that BASE does not hold, with the reason unless they are simply new."""
    absences = Absences(new, base)
    known = set(names.values())
    for case in new_cases.values():
        if case.id not in old_cases and case.id not in known:
            label, why = absences(case.id, case.benchmark, case.metrics)
            note = None if label == MISSING else f"BASE {why}"
            yield Row(case.id, "outcome", "inconclusive", NEW, after=case.outcome, note=case.reason or note)
