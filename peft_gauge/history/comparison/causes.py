"""Possible causes of a change: operators of the step, categories of memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peft_gauge.errors import GaugeError, one_line
from peft_gauge.history.comparison.rows import Pair, Shape, names_of

if TYPE_CHECKING:
    from peft_gauge.history.intervals import Verdict
    from peft_gauge.history.metrics import RecordedCase

TOLD_DIFFERENCES = 2
"""The number of fingerprint differences shown with a verdict."""


def fingerprint(case: RecordedCase, cases: Mapping[str, RecordedCase]) -> Mapping[str, Any] | None:
    """The fingerprint of the case, or of the only case in its run about the same subject that has one."""
    if case.fingerprint is not None or case.subject is None:
        return case.fingerprint
    found = [other.fingerprint for other in cases.values() if other.fingerprint and other.subject == case.subject]
    return found[0] if len(found) == 1 else None


def time_cause(pair: Pair) -> str | None:
    if pair.shape is None or pair.shape.unknown is not None:
        return None
    return pair.shape.difference or "no operator changed: machine or kernel"


def cause(pair: Pair, metric: str) -> str | None:
    """For a peak or a resident size, the categories that changed; for other metrics, the operators that changed."""
    parent, dot, name = metric.rpartition(".")
    kinds = [kind for kind in ("peak", "resident") if kind in name and not name.startswith("planned")]
    by_category = f"{parent}{dot}{kinds[0]}_by_category." if kinds else None
    parts = [
        f"{each.removeprefix(by_category)} {after - before:+,} B"
        for each in names_of(pair.old.metrics, pair.new.metrics)
        if by_category is not None
        and each.startswith(by_category)
        and (before := pair.old.metrics.get(each, 0)) != (after := pair.new.metrics.get(each, 0))
    ]
    if parts:
        return ", ".join(parts)
    return None if pair.shape is None else pair.shape.difference


def shape(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> Shape | None:
    """The first differences of two fingerprints in words; ``None`` if one is missing."""
    from peft_gauge.history.fingerprints import differences, only_less

    if before is None or after is None:
        return None
    try:
        found = differences(before, after)
    except GaugeError as error:
        return Shape(None, str(error))
    rest = len(found) - TOLD_DIFFERENCES
    first = "; ".join(one_line(each.text, 160) for each in found[:TOLD_DIFFERENCES])
    verdict: Verdict = "better" if only_less(found) else "worse" if found else "same"
    return Shape(f"{first}; and {rest} more" if rest > 0 else first or None, verdict=verdict)
