"""The rows of a comparison, and the pairs of cases that they compare."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peft_gauge.history.absent import ABSENT, MISSING
from peft_gauge.history.metrics import RecordedCase, changes, is_number
from peft_gauge.history.schema import NOT_RUN

if TYPE_CHECKING:
    from peft_gauge.history.intervals import Judgement, Verdict

NEW, RENAMED, NOT_COMPARABLE, ALL_TIMES = "NEW", "RENAMED", "NOT COMPARABLE", "ALL TIMES"
UNCHECKED = frozenset({*ABSENT, NOT_COMPARABLE, *(name.upper() for name in NOT_RUN)})
"""Labels of rows whose check existed in BASE and is missing in NEW."""


@dataclass(frozen=True)
class Row:
    """One line of a comparison.

    ``test`` and ``metric``: the compared value; ``label``: the kind of row if it is not a plain metric (NEW, RENAMED,
    SKIPPED, OUT OF MEMORY, …; for a case that only BASE holds, one of `ABSENT`); ``before`` and ``after``: the values,
    times in seconds; ``ratio``: after / before. For a time with a verdict: ``judged``, which may be ``relative_to`` the
    control or a common factor. ``cause``: a possible cause of the change; ``note``: any further remark.
    """

    test: str
    metric: str
    verdict: Verdict
    label: str | None = None
    before: Any = None
    after: Any = None
    ratio: float | None = None
    judged: Judgement | None = None
    relative_to: str | None = None
    cause: str | None = None
    note: str | None = None

    @property
    def says(self) -> str:
        """The row in a word: its verdict, or its label if that is more informative."""
        return self.verdict if self.label is None or self.verdict in ("worse", "better") else self.label

    @property
    def badness(self) -> tuple[int, int, float]:
        """Sorts the worst first."""
        order = 3 if self.label == NEW else {"worse": 0, "inconclusive": 1, "better": 2, "same": 4}[self.verdict]
        size = abs(math.log(self.ratio)) if self.ratio is not None and self.ratio > 0 else math.inf
        return order, 0 if self.label else 1, -size


@dataclass(frozen=True)
class Shape:
    """The difference between the fingerprints of a case's step (``None`` if they are equal) with its verdict, or the
    reason why they cannot be compared."""

    difference: str | None
    unknown: str | None = None
    verdict: Verdict = "inconclusive"


@dataclass(frozen=True)
class Pair:
    """The same case in both runs."""

    old: RecordedCase
    new: RecordedCase
    shape: Shape | None

    @property
    def differing(self) -> list[str]:
        """The settings that differ. A case that did not run, or died, may lack settings; that is not a difference."""
        known = self.old.settings and self.new.settings
        both_passed = self.old.outcome == self.new.outcome == "passed"
        return changes(self.old.settings, self.new.settings) if known or both_passed else []

    def one_sided(self, row: Row) -> Iterator[Row]:
        """The row of a metric that one run lacks; none for a case that did not pass: its outcome shows it."""
        if self.old.outcome == self.new.outcome == "passed":
            yield replace(row, verdict="inconclusive", label=NEW if row.before is None else MISSING)


def names_of(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The names of both, in the old one's order, then the new one's."""
    return [*old, *(name for name in new if name not in old)]


def ratio(before: object, after: object) -> float | None:
    if is_number(before) and is_number(after) and before > 0 and after > 0:
        return float(after / before)
    return None
