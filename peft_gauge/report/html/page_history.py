"""Every metric over all runs of its machine, and its changes.

A change is a verdict of worse or better by `history.comparison`. Its bootstrap would take minutes for a thousand runs,
so it is used only for pairs of runs where a time can have been decided; deterministic metrics are judged by the rules
directly. A time also changes where its level over many runs does (`history.changes`).
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from peft_gauge.claims import NOT_MEASURED
from peft_gauge.history import intervals, metrics
from peft_gauge.history.changes import CHANCE, LEAST_RUNS, change_points
from peft_gauge.history.comparison import Row, compare, judge_value, outcome_verdict
from peft_gauge.history.metrics import (
    FINGERPRINT,
    environment_changes,
    machine_changes,
)
from peft_gauge.history.reader import read_run
from peft_gauge.history.rules import Rule, Rules
from peft_gauge.history.schema import NOT_RUN
from peft_gauge.report.html.page_series import Rows, Series

if TYPE_CHECKING:
    from peft_gauge.history.briefs import Brief, BriefCase, Form
    from peft_gauge.history.reader import Run

# Metrics about the measurement itself, and names of shapes: without a rule they get no history.
OF_MEASURING = ("meters.", "gpu.", "states", "last_known.", "unavailable.", "phases.", "crossings.", "plan.device.")
OF_MEASURING_ENDS = (".batch", ".seq", ".held", "warm_up_rounds", "plan.seconds")

MOST_RUNS, NEWEST_RUNS = 200, 100
"""The most runs of a machine that a page shows in its history, and how many of these are the newest."""


@dataclass(frozen=True)
class RememberedRules(Rules):
    """`Rules` that look up a metric's rule once instead of in every run."""

    known: dict[tuple[str, str], Rule] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of_rules(cls, rules: Rules) -> RememberedRules:
        return cls(rules.rules, rules.family_error, rules.host_spread)

    def of(self, test: str, metric: str) -> Rule:
        key = test, metric
        if key not in self.known:
            self.known[key] = super().of(test, metric)
        return self.known[key]


@dataclass(frozen=True)
class Change:
    """A change in run number ``run`` (an index) from the previous run with the same case.

    ``environment``: other differences between the two: libraries, driver, commit. With ``levels``, ``before`` and
    ``after`` are the medians of the runs before it and from it on, up to the next change.
    """

    run: int
    machine: str
    case: str
    metric: str
    verdict: str
    before: Any
    after: Any
    environment: tuple[str, ...]
    levels: bool = False


@dataclass(frozen=True)
class RunNote:
    """A history's record of a run apart from its metrics; ``when`` is its end in ISO format."""

    machine: str
    name: str
    file: str
    when: str
    commit: str | None
    libraries: Mapping[str, str | None]
    environment: Mapping[str, Any]


@dataclass
class History:
    """All runs so far; add them oldest first."""

    rules: RememberedRules
    runs: list[RunNote] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    subjects: dict[str, dict[str, Any]] = field(default_factory=dict)
    _series: dict[tuple[str, str, str], Series] = field(default_factory=dict)
    _rows: dict[tuple[str, str], Rows] = field(default_factory=dict)
    """The values of a machine's case that are not in its series yet."""
    _last: dict[tuple[str, str], tuple[BriefCase, Run, dict[str, Any]]] = field(default_factory=dict)
    """A machine's case in its newest run, this run, and the case's subject."""
    _verdicts: dict[tuple[str, str], str] = field(default_factory=dict)
    _settled: dict[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """By machine, the claims of its newest run if none of their verdicts changed there."""
    _breaks: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    @property
    def series(self) -> dict[tuple[str, str, str], Series]:
        """All series, by machine, case and metric."""
        for rows in self._rows.values():
            rows.flush()
        self._rows.clear()
        return self._series

    def add(self, brief: Brief) -> None:
        """Add a run, the newest of its machine so far."""
        run = brief.run
        machine, index = machine_of(run), len(self.runs)
        commit = run.commit.get("id")
        self.runs.append(
            RunNote(
                machine,
                run.name,
                run.path.name,
                run.when.isoformat(timespec="seconds"),
                None if commit is None else str(commit)[:12] + ("-dirty" if run.commit.get("dirty") else ""),
                dict(run.libraries),
                metrics.environment(run),
            )
        )
        earlier: dict[int, _Pairs] = {}  # by the identity of the earlier run
        for id_, case in brief.cases.items():
            if case.form.outcome in NOT_RUN:
                continue
            self._keep(machine, index, case)
            last = self._last.get((machine, id_))
            if last is None:
                subject = subject_of(case.metrics)
            else:
                old, base, subject = last
                if old.values is not case.values or old.form is not case.form:
                    now = subject_of(case.metrics)
                    subject = subject if now == subject else now
                earlier.setdefault(id(base), _Pairs(base)).cases.append((old, case))
            self.subjects[id_] = subject
            self._last[machine, id_] = case, run, subject
        for pairs in earlier.values():
            elsewhere = bool(machine_changes(pairs.base, run))
            for old, new in pairs.cases:
                if elsewhere or not _same_settings(old, new):
                    self._breaks.setdefault((machine, new.form.id), []).append(index)
            if not elsewhere and (rows := list(pairs.changed(run, self.rules))):
                environment = tuple(environment_changes(pairs.base, run))
                for row in rows:
                    self._note(index, row, environment)
        self._add_claims(machine, index, run)

    def add_level_changes(self) -> None:
        """Add the runs at which the level of a time changes. Call this once, after all runs were added.

        A time that was measured with a control is divided by it, so that a slower machine does not count as a change.
        A level ends where the case moved to other hardware or other settings. The false-positive rate is that of
        `change_points`, for all times together.
        """
        known = {(each.run, each.machine, each.case, each.metric) for each in self.changes}
        times = [one for one in self.series.values() if self.rules.of(one.case, one.metric).kind == "time"]
        for time in times:
            over_control = time.machine, time.case, time.metric.replace("_seconds", "_over_control")
            one, effect = self.series.get(over_control, time), self.rules.of(time.case, time.metric).minimum_effect
            ends = [bisect_left(one.runs, run) for run in self._breaks.get((one.machine, one.case), ())]
            for start, end in pairwise([0, *ends, len(one.runs)]):
                for change in self._level_changes(one, start, end, effect, CHANCE / len(times)):
                    if (change.run, change.machine, change.case, time.metric) not in known:
                        self.changes.append(change)
        self.changes.sort(key=lambda change: change.run)

    def shown_runs(self) -> set[int]:
        """The indices of the runs that a page shows: all of a machine, or if it has more than `MOST_RUNS`, so many: the
        newest `NEWEST_RUNS`, and evenly spaced earlier ones. Changes are found in all runs."""
        by_machine: dict[str, list[int]] = {}
        for index, run in enumerate(self.runs):
            by_machine.setdefault(run.machine, []).append(index)
        return {index for runs in by_machine.values() for index in _thinned(runs)}

    def _level_changes(self, one: Series, start: int, end: int, effect: float, chance: float) -> Iterable[Change]:
        """The changes of level within the runs ``start`` to ``end`` of the series."""
        if end - start < 2 * LEAST_RUNS:
            return
        steps = [start + at for at in change_points(one.values[start:end], effect, chance)]
        for low, at, high in zip([start, *steps], steps, [*steps[1:], end], strict=False):
            before, after = (statistics.median(part) for part in (one.values[low:at], one.values[at:high]))
            environments = (self.runs[one.runs[place]].environment for place in (at - 1, at))
            yield Change(
                one.runs[at],
                one.machine,
                one.case,
                one.metric,
                "worse" if after > before else "better",
                before,
                after,
                tuple(metrics.changes(*environments)),
                levels=True,
            )

    def _keep(self, machine: str, index: int, case: BriefCase) -> None:
        key = machine, case.form.id
        rows = self._rows.get(key)
        if rows is None or not rows.fit(case.form):
            if rows is not None:
                rows.flush()
            rows = self._rows[key] = Rows(case.form, self._series_of(machine, case.form))
        rows.add(index, case)

    def _series_of(self, machine: str, form: Form) -> list[Series | None]:
        """The series of the form's numbers; ``None`` for a metric that has no history."""
        found: list[Series | None] = []
        runs: list[int] = []
        for metric in (form.names[place] for place in form.numbers):
            key = machine, form.id, metric
            if is_of_measuring(metric) and self.rules.of(form.id, metric).kind == "ignore":
                found.append(None)
            else:
                found.append(self._series.setdefault(key, Series(*key, runs)))
        return found

    def _note(self, index: int, row: Row, environment: tuple[str, ...]) -> None:
        machine = self.runs[index].machine
        told = (row.before, row.after)
        self.changes.append(Change(index, machine, row.test, row.metric, row.verdict, *told, environment))

    def _add_claims(self, machine: str, index: int, run: Run) -> None:
        """Note changed verdicts of claims; only a decision after "inconclusive" is an improvement."""
        if self._settled.get(machine) is run.claims:  # the same once more
            return
        noted = len(self.changes)
        for claim in run.claims:
            name, now = f"claim::{claim['id']}[{claim['model']}]", claim["verdict"]
            if now == NOT_MEASURED:
                continue
            before = self._verdicts.get((machine, name), now)
            self._verdicts[machine, name] = now
            self.subjects[name] = {"model": claim["model"]}
            if before != now:
                row = Row(name, "verdict", "better" if before == "inconclusive" else "worse", before=before, after=now)
                self._note(index, row, ())
        if len(self.changes) == noted:
            self._settled[machine] = run.claims
        else:
            self._settled.pop(machine, None)


def _thinned(runs: Sequence[int]) -> Sequence[int]:
    if len(runs) <= MOST_RUNS:
        return runs
    earlier, newest = runs[:-NEWEST_RUNS], runs[-NEWEST_RUNS:]
    number = MOST_RUNS - NEWEST_RUNS
    return [*(earlier[place * len(earlier) // number] for place in range(number)), *newest]


@dataclass
class _Pairs:
    """The cases of a run whose previous record is in ``base``, as pairs of that record and the new one.

    Both runs are those of briefs; where they are compared in full, they are read from their files.
    """

    base: Run
    cases: list[tuple[BriefCase, BriefCase]] = field(default_factory=list)

    def changed(self, run: Run, rules: RememberedRules) -> Iterable[Row]:
        """The rows that got worse or better."""
        for old, new in self.cases:
            if old.form.outcome != new.form.outcome:
                verdict = outcome_verdict(old.form.outcome, new.form.outcome)
                if verdict in ("worse", "better"):
                    yield Row(new.form.id, "outcome", verdict, before=old.form.outcome, after=new.form.outcome)
        comparable = [(old, new) for old, new in self.cases if _same_settings(old, new)]
        for old, new in comparable:
            yield from _noise_free_changes(old, new, rules)
        shaped = {new.form.id for old, new in comparable if old.form.fingerprint != new.form.fingerprint}
        timed = _can_decide_a_time(comparable, rules)
        if shaped or timed:
            names = {new.form.id for _, new in self.cases}
            both = read_run(self.base.path), read_run(run.path)
            if not timed:  # only fingerprints can differ
                both = _only(both[0], shaped), _only(both[1], shaped)
            for row in compare(*both, rules).rows:
                of_time = row.metric == FINGERPRINT or rules.of(row.test, row.metric).kind == "time"
                if row.test in names and of_time and row.verdict in ("worse", "better"):
                    yield row


def _same_settings(old: BriefCase, new: BriefCase) -> bool:
    return old.form is new.form or old.form.settings == new.form.settings


def _only(run: Run, ids: Set[str]) -> Run:
    return replace(run, cases=tuple(case for case in run.cases if case.id in ids))


def _noise_free_changes(old: BriefCase, new: BriefCase, rules: RememberedRules) -> Iterable[Row]:
    if old.form.names == new.form.names:
        if old.values is new.values:
            return
        values: Iterable[tuple[str, Any, Any]] = zip(new.form.names, old.values, new.values, strict=True)
    else:
        known = old.metrics
        values = ((metric, known.get(metric), after) for metric, after in new.metrics.items())
    for metric, before, after in values:
        if before == after or before is None:
            continue
        rule = rules.of(new.form.id, metric)
        if rule.kind in ("exact", "number") and (verdict := judge_value(rule, before, after)) != "same":
            yield Row(new.form.id, metric, verdict, before=before, after=after)


def _can_decide_a_time(cases: Sequence[tuple[BriefCase, BriefCase]], rules: RememberedRules) -> bool:
    """Whether `compare` can judge any time of ``cases`` worse or better; if False, it certainly does not.

    The interval of a time from one process extends by the spread of hosts beyond the bootstrap's quantiles, so it can
    only be decided if its ratio exceeds that spread. For the others, Holm's correction rejects nothing unless the
    smallest p is at most the family's error over their number. Both are also checked relative to a factor common to
    all times.
    """
    lone: list[tuple[float, float]] = []
    several: list[intervals.Estimate] = []
    spread = rules.host_spread
    for old, new in cases:
        for metric, after in new.times.items():
            before = old.times.get(metric)
            if before is None or not (before.usable and after.usable):
                continue
            if rules.of(new.form.id, metric).kind != "time":
                continue
            over_control = before.log_over_control is not None and after.log_over_control is not None
            if before.samples is not None and after.samples is not None:
                several.append(intervals.estimate(before.samples, after.samples, spread, over_control=over_control))
            elif before.log_over_control is not None and after.log_over_control is not None:
                lone.append((after.log_over_control - before.log_over_control, math.log(spread.over_control)))
            elif before.log_seconds is not None and after.log_seconds is not None:
                lone.append((after.log_seconds - before.log_seconds, math.log(spread.seconds)))
    ratios = [ratio for ratio, _ in lone] + [estimate.log_ratio for estimate in several]
    if not ratios:
        return False
    error = rules.family_error / len(ratios)
    return any(
        any(abs(ratio - null) > 0.99 * spread for ratio, spread in lone)
        or any(estimate.p_value(null) <= error for estimate in several)
        for null in (0.0, statistics.median(ratios))
    )


def is_of_measuring(metric: str) -> bool:
    """Whether ``metric`` describes the measurement or a shape rather than the step."""
    return metric.startswith(OF_MEASURING) or metric.endswith(OF_MEASURING_ENDS)


def machine_of(run: Run) -> str:
    """The machine's name; for runs written by other tools, the folder's."""
    name = run.machine.get("name")
    return name if isinstance(name, str) else run.path.parent.name


SUBJECT_METRICS = {
    "method": ("method", "plan.method", "trained_by"),
    "model": ("model", "plan.model", "architecture"),
}
"""The metrics that name a case's method and model, the first of them that it has; adapters to serve have their own."""


def subject_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The properties to filter a case by: ``method`` and ``model``, if its ``metrics`` name them."""
    found = {}
    for name, keys in SUBJECT_METRICS.items():
        value = next((metrics[key] for key in keys if key in metrics), None)
        if isinstance(value, str):
            found[name] = value
    return found
