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
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from peft_gauge.claims import NOT_MEASURED
from peft_gauge.history import intervals, metrics
from peft_gauge.history.changes import CHANCE, LEAST_RUNS, change_points
from peft_gauge.history.comparison import Row, compare, judge_value, outcome_verdict
from peft_gauge.history.metrics import (
    FINGERPRINT,
    RecordedCase,
    Samples,
    environment_changes,
    machine_changes,
)
from peft_gauge.history.reader import read_run
from peft_gauge.history.rules import Rule, Rules
from peft_gauge.history.schema import NOT_RUN
from peft_gauge.medians import median_interval

if TYPE_CHECKING:
    from peft_gauge.history.briefs import Brief
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


@dataclass
class Series:
    """One metric of one case on one machine: ``values`` at the indices ``runs``; for a time, also its intervals."""

    machine: str
    case: str
    metric: str
    runs: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    intervals: list[tuple[float, float] | None] = field(default_factory=list)

    def only(self, runs: Set[int]) -> Series:
        """The part of the series in ``runs``."""
        places = [place for place, run in enumerate(self.runs) if run in runs]
        if len(places) == len(self.runs):
            return self
        return Series(
            self.machine,
            self.case,
            self.metric,
            [self.runs[place] for place in places],
            [self.values[place] for place in places],
            [self.intervals[place] for place in places] if self.intervals else [],
        )


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
    series: dict[tuple[str, str, str], Series] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    subjects: dict[str, dict[str, Any]] = field(default_factory=dict)
    _last: dict[tuple[str, str], tuple[RecordedCase, Run]] = field(default_factory=dict)
    _verdicts: dict[tuple[str, str], str] = field(default_factory=dict)
    _of_case: dict[tuple[str, str], dict[str, Series | None]] = field(default_factory=dict)
    """The series of a machine's case by metric; ``None`` for a metric that has no history."""
    _breaks: dict[tuple[str, str], list[int]] = field(default_factory=dict)

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
        for case in brief.cases.values():
            if case.outcome in NOT_RUN:
                continue
            self.subjects[case.id] = subject_of(case.metrics)
            self._keep(machine, index, case)
            old, base = self._last.get((machine, case.id), (None, None))
            if old is not None and base is not None:
                earlier.setdefault(id(base), _Pairs(base)).cases.append((old, case))
            self._last[machine, case.id] = case, run
        for pairs in earlier.values():
            elsewhere = bool(machine_changes(pairs.base, run))
            for old, new in pairs.cases:
                if elsewhere or old.settings != new.settings:
                    self._breaks.setdefault((machine, new.id), []).append(index)
            if not elsewhere:
                environment = tuple(environment_changes(pairs.base, run))
                for row in pairs.changed(run, self.rules):
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

    def _keep(self, machine: str, index: int, case: RecordedCase) -> None:
        of_case = self._of_case.setdefault((machine, case.id), {})
        for metric, value in case.metrics.items():
            if type(value) not in (int, float):  # as `metrics.is_number` of parsed JSON, in a tenth of its time
                continue
            series = of_case.get(metric)
            if series is None:
                if metric in of_case:
                    continue
                if is_of_measuring(metric) and self.rules.of(case.id, metric).kind == "ignore":
                    of_case[metric] = None
                    continue
                key = machine, case.id, metric
                series = self.series[key] = of_case[metric] = Series(*key)
            series.runs.append(index)
            if series.values and type(series.values[-1]) is type(value) and series.values[-1] == value:
                value = series.values[-1]  # one object, however many runs have it
            series.values.append(value)
            samples = case.samples.get(metric)
            if samples is not None or series.intervals:
                series.intervals += [None] * (len(series.runs) - 1 - len(series.intervals))
                series.intervals.append(
                    None if samples is None else median_interval(list(chain.from_iterable(samples.seconds)))
                )

    def _note(self, index: int, row: Row, environment: tuple[str, ...]) -> None:
        machine = self.runs[index].machine
        told = (row.before, row.after)
        self.changes.append(Change(index, machine, row.test, row.metric, row.verdict, *told, environment))

    def _add_claims(self, machine: str, index: int, run: Run) -> None:
        """Note changed verdicts of claims; only a decision after "inconclusive" is an improvement."""
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
    cases: list[tuple[RecordedCase, RecordedCase]] = field(default_factory=list)

    def changed(self, run: Run, rules: RememberedRules) -> Iterable[Row]:
        """The rows that got worse or better."""
        names = {new.id for _, new in self.cases}
        for old, new in self.cases:
            verdict = outcome_verdict(old.outcome, new.outcome)
            if verdict in ("worse", "better"):
                yield Row(new.id, "outcome", verdict, before=old.outcome, after=new.outcome)
        comparable = [(old, new) for old, new in self.cases if old.settings == new.settings]
        for old, new in comparable:
            yield from _noise_free_changes(old, new, rules)
        shaped = {new.id for old, new in comparable if old.fingerprint != new.fingerprint}
        timed = _can_decide_a_time(comparable, rules)
        if shaped or timed:
            both = read_run(self.base.path), read_run(run.path)
            if not timed:  # only fingerprints can differ
                both = _only(both[0], shaped), _only(both[1], shaped)
            for row in compare(*both, rules).rows:
                of_time = row.metric == FINGERPRINT or rules.of(row.test, row.metric).kind == "time"
                if row.test in names and of_time and row.verdict in ("worse", "better"):
                    yield row


def _only(run: Run, ids: Set[str]) -> Run:
    return replace(run, cases=tuple(case for case in run.cases if case.id in ids))


def _noise_free_changes(old: RecordedCase, new: RecordedCase, rules: RememberedRules) -> Iterable[Row]:
    if old.metrics == new.metrics:
        return
    for metric, after in new.metrics.items():
        before = old.metrics.get(metric)
        if before is None or before == after:
            continue
        rule = rules.of(new.id, metric)
        if rule.kind in ("exact", "number") and (verdict := judge_value(rule, before, after)) != "same":
            yield Row(new.id, metric, verdict, before=before, after=after)


def _can_decide_a_time(cases: Sequence[tuple[RecordedCase, RecordedCase]], rules: RememberedRules) -> bool:
    """Whether `compare` can judge any time of ``cases`` worse or better; if False, it certainly does not.

    The interval of a time from one process extends by the spread of hosts beyond the bootstrap's quantiles, so it can
    only be decided if its ratio exceeds that spread. For the others, Holm's correction rejects nothing unless the
    smallest p is at most the family's error over their number. Both are also checked relative to a factor common to
    all times.
    """
    lone: list[tuple[float, float]] = []
    several: list[intervals.Estimate] = []
    for old, new in cases:
        for metric in old.samples.keys() & new.samples.keys():
            both = old.samples[metric], new.samples[metric]
            if rules.of(new.id, metric).kind != "time" or any(map(intervals.why_no_estimate, both)):
                continue
            over_control = all(samples.control_seconds is not None for samples in both)
            if min(len(samples.seconds) for samples in both) < 2:
                spread = rules.host_spread.over_control if over_control else rules.host_spread.seconds
                lone.append((_centre(both[1], over_control) - _centre(both[0], over_control), math.log(spread)))
            else:
                several.append(intervals.estimate(*both, rules.host_spread, over_control=over_control))
    ratios = [ratio for ratio, _ in lone] + [estimate.log_ratio for estimate in several]
    if not ratios:
        return False
    error = rules.family_error / len(ratios)
    return any(
        any(abs(ratio - null) > 0.99 * spread for ratio, spread in lone)
        or any(estimate.p_value(null) <= error for estimate in several)
        for null in (0.0, statistics.median(ratios))
    )


def _centre(samples: Samples, over_control: bool) -> float:
    """The logarithm of the time, as in `intervals.estimate`."""
    if not over_control or samples.control_seconds is None:
        return math.log(intervals.centre_seconds(samples.seconds))
    beside = zip(samples.seconds, samples.control_seconds, strict=True)
    return math.log(intervals.centre_seconds([[a / b for a, b in zip(*both, strict=True)] for both in beside]))


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
