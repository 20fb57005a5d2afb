"""A comparison's rows, and the pairs of cases that they are about."""

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
"""Labels of rows that say: this was checked once, and now it is not."""


@dataclass(frozen=True)
class Row:
    """One line of a comparison.

    ``test`` and ``metric``: what was compared; ``label``: for what is no plain metric, what it is (NEW, RENAMED,
    SKIPPED, OUT OF MEMORY, …; of a case that only BASE holds, one of `ABSENT`); ``before`` and ``after``: the values,
    of a time in seconds; ``ratio``: after / before. Of a time that was judged: ``judged``, which may be ``relative_to``
    the control or a common factor.
    ``cause``: what may explain a change; ``note``: anything else.
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
        """The row in a word: its verdict, or its label where the verdict alone would say less."""
        return self.verdict if self.label is None or self.verdict in ("worse", "better") else self.label

    @property
    def badness(self) -> tuple[int, int, float]:
        """Sorts the worst first."""
        order = 3 if self.label == NEW else {"worse": 0, "inconclusive": 1, "better": 2, "same": 4}[self.verdict]
        size = abs(math.log(self.ratio)) if self.ratio is not None and self.ratio > 0 else math.inf
        return order, 0 if self.label else 1, -size


@dataclass(frozen=True)
class Shape:
    """How the fingerprints of a case's step differ, ``None`` if they do not, and what that makes of the step; or why
    that cannot be said."""

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
        """The settings that differ. A case that did not run, or died, may have none of its own to hold against it."""
        known = self.old.settings and self.new.settings
        both_passed = self.old.outcome == self.new.outcome == "passed"
        return changes(self.old.settings, self.new.settings) if known or both_passed else []

    def one_sided(self, row: Row) -> Iterator[Row]:
        """The row of a metric that one run lacks; of a case that did not pass, that says nothing new."""
        if self.old.outcome == self.new.outcome == "passed":
            yield replace(row, verdict="inconclusive", label=NEW if row.before is None else MISSING)


def names_of(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The names in either, in the old one's order, then the new one's."""
    return [*old, *(name for name in new if name not in old)]


def ratio(before: object, after: object) -> float | None:
    if is_number(before) and is_number(after) and before > 0 and after > 0:
        return float(after / before)
    return None
