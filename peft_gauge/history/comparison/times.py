"""Compare times, as one family of hypotheses, from their raw rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peft_gauge.history import intervals
from peft_gauge.history.comparison.causes import time_cause
from peft_gauge.history.comparison.rows import ALL_TIMES, Pair, Row, names_of, ratio
from peft_gauge.history.schema import NOT_RUN

if TYPE_CHECKING:
    from peft_gauge.history.intervals import Estimate, Judgement, Verdict
    from peft_gauge.history.metrics import RecordedCase, Samples
    from peft_gauge.history.rules import Rule, Rules

LEAST_TIMES = 5
AGREEING = 0.9
"""A common factor needs at least `LEAST_TIMES` times, and at least this share of them must agree with it."""


@dataclass(frozen=True)
class _Time:
    """A time that can be compared: its row so far, and its estimate."""

    row: Row
    rule: Rule
    estimate: Estimate
    over_control: bool


def judged_times(pairs: Sequence[Pair], rules: Rules, moved: bool) -> tuple[list[Row], list[str]]:
    """Rows of all times, judged as one family, and notes on the control.

    ``moved``: whether any deterministic metric changed; if so, no common factor is estimated.
    """
    found = [each for pair in pairs for each in _times_of(pair, rules)]
    rows = [each for each in found if isinstance(each, Row)]
    times = [each for each in found if isinstance(each, _Time)]
    notes = _control_note(pairs)
    judged = _judge_family(times, rules.family_error, 0.0)
    factor = None if moved else common_factor(times)
    if factor is not None:
        rows.append(_all_times(judged, factor))
        judged = _judge_family(times, rules.family_error, factor)
    return rows + judged, notes


def _times_of(pair: Pair, rules: Rules) -> Iterator[Row | _Time]:
    if pair.old.outcome in NOT_RUN or pair.new.outcome in NOT_RUN:
        return
    for metric in names_of({**pair.old.metrics, **pair.old.samples}, {**pair.new.metrics, **pair.new.samples}):
        rule = rules.of(pair.new.id, metric)
        if rule.kind != "time":
            continue
        old, new = pair.old.samples.get(metric), pair.new.samples.get(metric)
        before, after = (_seconds(case, metric) for case in (pair.old, pair.new))
        row = Row(pair.new.id, metric, "inconclusive", before=before, after=after, ratio=ratio(before, after))
        if before is None or after is None:
            yield from pair.one_sided(row)
            continue
        lacking = [why for why in map(intervals.why_no_estimate, (old, new)) if why is not None]
        if lacking or old is None or new is None:
            yield replace(row, note=lacking[0])
            continue
        over_control = old.control_seconds is not None and new.control_seconds is not None
        estimate = intervals.estimate(
            old, new, rules.host_spread, over_control=over_control, in_common=_in_common(over_control)
        )
        yield _Time(replace(row, cause=time_cause(pair), note=_unsteady(pair)), rule, estimate, over_control)


def _in_common(over_control: bool) -> float:
    return intervals.IN_COMMON_OVER_CONTROL if over_control else intervals.IN_COMMON


def _unsteady(pair: Pair) -> str | None:
    """The reasons for which the clocks reported unsteady times."""
    doubts = [
        f"{name} unsteady: {', '.join(map(str, reasons))}"
        for name, case in (("BASE", pair.old), ("NEW", pair.new))
        if isinstance(reasons := case.metrics.get("unsteady"), list) and reasons
    ]
    return "; ".join(doubts) or None


def _seconds(case: RecordedCase, metric: str) -> float | None:
    """The time from the rounds if there are any, since a table's median may have been computed otherwise."""
    samples = case.samples.get(metric)
    if samples is not None and intervals.why_no_estimate(samples) is None:
        return intervals.centre_seconds(samples.seconds)
    value = case.metrics.get(metric)
    return float(value) if isinstance(value, int | float) else None


def _judge_family(times: Sequence[_Time], family_error: float, factor: float) -> list[Row]:
    """The row of each time, judged relative to ``factor`` (a logarithm) with Holm's correction over all of them."""
    errors = intervals.holm_errors([time.estimate.p_value(factor) for time in times], family_error)
    rows = []
    for time, error in zip(times, errors, strict=True):
        judged = intervals.judge(
            time.estimate,
            error,
            time.rule.minimum_effect,
            relative_to=factor,
            in_common=_in_common(time.over_control),
        )
        divided = ["control"] if time.over_control else []
        divided += [f"all times ×{math.exp(factor):.3f}"] if factor else []
        rows.append(
            replace(
                time.row,
                verdict=judged.verdict,
                judged=judged,
                relative_to=" and ".join(divided) or None,
                cause=time.row.cause if judged.verdict != "same" else None,
                note="; ".join(part for part in (_undecided(time.estimate, judged), time.row.note) if part) or None,
            )
        )
    return rows


def _undecided(estimate: Estimate, judged: Judgement) -> str | None:
    """The number of processes that would decide an inconclusive time."""
    if judged.further is None:
        return None
    most = intervals.MOST_FURTHER
    number = f"about {judged.further}" if judged.further <= most else f"more than {most}"
    lone = "one process does not show how processes differ; " if min(estimate.processes) < 2 else ""
    return f"{lone}{number} more {'process' if judged.further == 1 else 'processes'} per side would decide"


def common_factor(times: Sequence[_Time]) -> float | None:
    """The logarithm of the factor by which all times changed, if it exceeds the minimum effect.

    The factor is their median ratio. Nine tenths of at least five times must lie on its side of 1 and agree with it:
    their own rounds' interval (at 95 %, without any spread of hosts) contains it, or they lie within the minimum effect
    of it.
    """
    if len(times) < LEAST_TIMES:
        return None
    factor = statistics.median(time.estimate.log_ratio for time in times)
    if abs(factor) <= max(math.log1p(time.rule.minimum_effect) for time in times):
        return None
    return factor if sum(_agrees(time, factor) for time in times) >= AGREEING * len(times) else None


def _agrees(time: _Time, factor: float) -> bool:
    low, high = time.estimate.seen(0.05)
    near = abs(time.estimate.log_ratio - factor) <= math.log1p(time.rule.minimum_effect)
    return time.estimate.log_ratio * factor > 0 and (near or low <= factor <= high)


def _all_times(judged: Sequence[Row], factor: float) -> Row:
    """One row instead of many. A change of the times but not of their control is more than a change of environment."""
    verdicts = {row.verdict for row in judged}
    controlled = all(row.relative_to == "control" for row in judged)
    verdict: Verdict = "inconclusive"
    if controlled and verdicts & {"worse", "better"}:
        verdict = "worse" if factor > 0 else "better"
    note = (
        "all times changed by the same factor; their control and all deterministic metrics did not change"
        if controlled
        else "all times changed by the same factor and no deterministic metric did: a change of environment (machine"
        " or shared library); the times below are judged relative to this factor"
    )
    return Row("(all)", "seconds", verdict, ALL_TIMES, ratio=math.exp(factor), note=note)


def _control_note(pairs: Sequence[Pair]) -> list[str]:
    """The change of the control, which is divided out of the times and so is not visible in them."""
    moved = [
        intervals.centre_seconds(new.control_seconds) / intervals.centre_seconds(old.control_seconds)
        for old, new in _controlled(pairs)
        if old.control_seconds and new.control_seconds
    ]
    if not moved:
        return []
    middle = statistics.median(moved)
    return [
        f"the control, divided out of {len(moved)} times, took {middle:.2f} × its time (from {min(moved):.2f} to"
        f" {max(moved):.2f}): a change of the machine, or of a library that the bare model uses too"
    ]


def _controlled(pairs: Sequence[Pair]) -> Iterator[tuple[Samples, Samples]]:
    for pair in pairs:
        for metric in pair.old.samples.keys() & pair.new.samples.keys():
            both = pair.old.samples[metric], pair.new.samples[metric]
            if all(samples.control_seconds and intervals.why_no_estimate(samples) is None for samples in both):
                yield both
