"""Save A and B as two runs and compare these, with the verdicts of the paired measurement."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_gauge.history import comparison, schema
from peft_gauge.history.fingerprints import differences
from peft_gauge.history.metrics import FINGERPRINT, SETTINGS, changes, flat
from peft_gauge.history.reader import read_run
from peft_gauge.history.writer import commit_info, write_run

if TYPE_CHECKING:
    from peft_gauge.environments.measurement import MethodResult
    from peft_gauge.environments.requirements import Side
    from peft_gauge.history.comparison import Row, RunComparison
    from peft_gauge.history.rules import Rules

CHANGED = "CHANGED"
"""Label of a changed fingerprint: between two releases this is information, not a verdict."""
NO_OPERATOR = "no operator changed: machine or kernel"
METRIC = "step_seconds"


def save(
    findings: Sequence[MethodResult], sides: tuple[Side, Side], options: Mapping[str, Any], results: Path
) -> tuple[Path, Path]:
    """Save both sides as runs under ``results``, A's first; raises `GaugeError` as `write_run` does."""
    from pytest_benchmark import __version__

    paths = []
    for number, letter in enumerate("AB"):
        machine = dict(findings[0].machines[number])
        told = {**options, "ab": {"side": letter, "requirements": sides[number].name, "of": [s.name for s in sides]}}
        run: dict[str, Any] = {
            "machine_info": machine,
            "commit_info": commit_info(),
            "benchmarks": [],
            "datetime": datetime.now(UTC).isoformat(),
            "version": __version__,
            schema.KEY: schema.as_json([each.records[number] for each in findings], [], told),
        }
        paths.append(write_run(results, machine["name"], run))
    return paths[0], paths[1]


def compared(findings: Sequence[MethodResult], paths: tuple[Path, Path], rules: Rules) -> RunComparison:
    """The comparison of both saved runs, with the verdicts of ``findings`` on times.

    A setting that differs was changed by the releases; it is reported and does not make the runs incomparable. A
    changed fingerprint is reported without a verdict.
    """
    runs = []
    for number, path in enumerate(paths):
        cases = tuple(_comparable(each.records[number]) for each in findings)
        runs.append(replace(read_run(path), cases=cases))
    found = comparison.compare(runs[0], runs[1], rules)
    by_id = {each.records[0].id: each for each in findings}
    shapes = {row.test: row.cause for row in found.rows if row.metric == FINGERPRINT}
    rows = [_decided(row, by_id[row.test], shapes.get(row.test)) for row in found.rows]
    rows.sort(key=lambda row: (row.badness, row.test, row.metric))
    notes = [note for note in found.notes if METRIC not in note]
    notes += [f"{each.records[0].id}: settings that the releases changed: {text}" for each, text in _settings(findings)]
    return replace(found, rows=tuple(rows), notes=tuple(notes))


def _comparable(record: schema.CaseRecord) -> schema.CaseRecord:
    """``record`` without settings, and with one median time in place of its rounds: the pairs give the verdict."""
    metrics = {name: value for name, value in record.metrics.items() if name not in (SETTINGS, schema.SAMPLES)}
    samples = record.metrics.get(schema.SAMPLES)
    if samples is not None:
        metrics[METRIC] = statistics.median([seconds for process in samples[METRIC] for seconds in process])
    return replace(record, metrics=metrics)


def _decided(row: Row, finding: MethodResult, shape: str | None) -> Row:
    if row.metric == FINGERPRINT and row.verdict in ("worse", "better"):
        return replace(row, verdict="inconclusive", label=CHANGED)
    if row.metric != METRIC or finding.judged is None:
        return row
    judged = finding.judged
    same = judged.verdict == "same"
    cause = None if same else shape or NO_OPERATOR
    # The ratio of both sides' medians depends on which side came first and on differences between processes.
    row = replace(row, verdict=judged.verdict, ratio=judged.ratio, judged=judged, cause=cause, note=finding.note)
    return replace(row, label="same") if same else row  # a label makes an unchanged time visible: it is the result


def _settings(findings: Sequence[MethodResult]) -> Iterator[tuple[MethodResult, str]]:
    for each in findings:
        old, new = (dict(flat(record.metrics.get(SETTINGS) or {})) for record in each.records)
        differing = changes(old, new) if old and new else []
        if differing:
            yield each, "; ".join(differing)


def told_differences(finding: MethodResult, limit: int = 20) -> list[str]:
    """Lines on how B's step differs, after a line with the case's id; empty if nothing differs."""
    before, after = (record.metrics.get(FINGERPRINT) for record in finding.records)
    if before is None or after is None:
        return []
    texts = [each.text for each in differences(before, after)]
    if not texts:
        return []
    rest = [f"  and {len(texts) - limit} more"] if len(texts) > limit else []
    return [f"{finding.records[0].id}: changes in the step", *(f"  {text}" for text in texts[:limit]), *rest]
