"""Compare outcomes, claims, deterministic metrics and metrics with a known tolerance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peft_gauge.claims import NOT_MEASURED
from peft_gauge.history.absent import MISSING, NOT_ASKED, NOT_REACHED, OTHER_SHARD
from peft_gauge.history.comparison.causes import cause
from peft_gauge.history.comparison.rows import NEW, NOT_COMPARABLE, Pair, Row, names_of, ratio
from peft_gauge.history.metrics import FINGERPRINT, is_number
from peft_gauge.history.schema import NOT_RUN

if TYPE_CHECKING:
    from peft_gauge.history.intervals import Verdict
    from peft_gauge.history.reader import Run
    from peft_gauge.history.rules import Rule, Rules

BROKEN = ("failed", "out-of-memory", "crashed", "timed-out")
TOLD_NAMES = 5


def conditions(pair: Pair) -> Iterator[Row]:
    """The row of a case's outcome; and one more where its settings differ."""
    old, new = pair.old.outcome, pair.new.outcome
    label = None if old == new else NEW if old in NOT_RUN and new == "passed" else new.replace("-", " ").upper()
    note = pair.new.reason if new != "passed" else pair.old.reason
    yield Row(pair.new.id, "outcome", outcome_verdict(old, new), label, old, new, note=note)
    if pair.differing:
        yield Row(pair.new.id, "settings", "inconclusive", NOT_COMPARABLE, note="; ".join(pair.differing))


def outcome_verdict(old: str, new: str) -> Verdict:
    """Newly broken is worse, and no longer broken is better; a case that did not run in both is inconclusive."""
    if old == new:
        return "same"
    if new in BROKEN:
        return "inconclusive" if old in BROKEN else "worse"
    return "better" if old in BROKEN and new == "passed" else "inconclusive"


def noise_free(pair: Pair, rules: Rules, only_noise_free: bool) -> Iterator[Row]:
    """Rows of all metrics of a case except its times."""
    if pair.old.outcome in NOT_RUN or pair.new.outcome in NOT_RUN:
        return
    for metric in names_of(pair.old.metrics, pair.new.metrics):
        rule = rules.of(pair.new.id, metric)
        if rule.kind in ("time", "ignore") or (only_noise_free and not rule.noise_free):
            continue
        before, after = pair.old.metrics.get(metric), pair.new.metrics.get(metric)
        row = Row(pair.new.id, metric, "inconclusive", before=before, after=after, ratio=ratio(before, after))
        if before is None or after is None:
            yield from pair.one_sided(row)
            continue
        verdict = judge_value(rule, before, after)
        yield replace(row, verdict=verdict, cause=None if verdict == "same" else cause(pair, metric))
    yield from _fingerprint_rows(pair, rules)


def without_rule(pairs: Sequence[Pair], rules: Rules) -> list[str]:
    """A note on metrics that were not compared because no rule covers them."""
    found = [
        metric
        for pair in pairs
        for metric in names_of(pair.old.metrics, pair.new.metrics)
        if rules.passes_over(pair.new.id, metric)
    ]
    names = sorted(set(found))
    told = ", ".join(names[:TOLD_NAMES]) + (f" and {len(names) - TOLD_NAMES} more" if len(names) > TOLD_NAMES else "")
    return [f"no rule for {told}: not compared"] if names else []


def is_noise_free(row: Row, rules: Rules) -> bool:
    """Whether the row's metric is deterministic; claims are excluded, since some are about times."""
    return row.metric != "verdict" and rules.of(row.test, row.metric).noise_free


def _fingerprint_rows(pair: Pair, rules: Rules) -> Iterator[Row]:
    before, after = pair.old.fingerprint, pair.new.fingerprint
    if rules.of(pair.new.id, FINGERPRINT).kind == "ignore" or before is after is None:
        return
    if before is None or after is None:
        shown = [None if each is None else "taken" for each in (before, after)]
        yield from pair.one_sided(Row(pair.new.id, FINGERPRINT, "inconclusive", before=shown[0], after=shown[1]))
        return
    assert pair.shape is not None
    if pair.shape.unknown is not None:
        yield Row(pair.new.id, FINGERPRINT, "inconclusive", NOT_COMPARABLE, note=pair.shape.unknown)
        return
    yield Row(pair.new.id, FINGERPRINT, pair.shape.verdict, cause=pair.shape.difference)


def judge_value(rule: Rule, before: Any, after: Any) -> Verdict:
    """The verdict on a metric of kind exact or number; a value that is not a number is compared exactly."""
    if before == after:
        return "same"
    if not (is_number(before) and is_number(after)):
        return "worse"
    if rule.kind == "number" and abs(after - before) <= max(rule.absolute, rule.relative * abs(before)):
        return "same"
    return "better" if (rule.direction == "lower") == (after < before) and rule.direction != "none" else "worse"


def claims(base: Run, new: Run, rules: Rules) -> Iterator[Row]:
    """Rows of the claims. A claim's verdict must not change, except from "inconclusive" to a decision."""
    old, now = ({f"claim::{claim['id']}[{claim['model']}]": claim for claim in run.claims} for run in (base, new))
    for name in names_of(old, now):
        if rules.of(name, "verdict").kind == "ignore":
            continue
        before, after = (_decided(run.get(name)) for run in (old, now))
        row = Row(name, "verdict", "same", before=before, after=after, note=now.get(name, {}).get("metric"))
        if before == after:
            yield row
        elif before is None:
            yield replace(row, verdict="inconclusive", label=NEW)
        elif after is None:
            # NEW did not run the benchmark of a claim that it lists without a decision, or if it has no claims.
            asked = now and name not in now
            whole = MISSING if asked else NOT_ASKED
            label = OTHER_SHARD if new.shards is not None else NOT_REACHED if new.interrupted else whole
            yield replace(
                row, verdict="inconclusive", label=label, note=None if label == MISSING else "NEW does not decide it"
            )
        else:
            yield replace(row, verdict="better" if before == "inconclusive" else "worse")


def _decided(claim: Mapping[str, Any] | None) -> str | None:
    return None if claim is None or claim["verdict"] == NOT_MEASURED else str(claim["verdict"])
