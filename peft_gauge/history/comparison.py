"""Two saved runs, figure by figure: same, better, worse or cannot tell, with the change and its likely cause."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peft_gauge.errors import GaugeError, one_line
from peft_gauge.history import intervals
from peft_gauge.history.absent import ABSENT, MISSING, NOT_ASKED, NOT_REACHED, Absences
from peft_gauge.history.metrics import (
    FINGERPRINT,
    IDENTITY,
    Case,
    Samples,
    cases_of,
    changes,
    environment_changes,
    machine_changes,
)
from peft_gauge.history.schema import NOT_RUN

if TYPE_CHECKING:
    from peft_gauge.history.intervals import Estimate, Judgement, Verdict
    from peft_gauge.history.reader import Run
    from peft_gauge.history.rules import Rule, Rules

BROKEN = ("failed", "out-of-memory", "crashed", "timed-out")
NOT_MEASURED = "not measured yet"
"""What a claim's verdict is while no benchmark decides it."""

NEW, RENAMED, NOT_COMPARABLE, ALL_TIMES = "NEW", "RENAMED", "NOT COMPARABLE", "ALL TIMES"
UNCHECKED = frozenset({*ABSENT, NOT_COMPARABLE, *(name.upper() for name in NOT_RUN)})
"""Labels of rows that say: this was checked once, and now it is not."""

LEAST_TIMES = 5
AGREEING = 0.9
"""A common factor is read from at least `LEAST_TIMES` times, of which at least this share agree with it."""
TOLD_NAMES = 5
TOLD_QUESTIONS = 3
TOLD_DIFFERENCES = 2
"""How many of a fingerprint's differences stand beside a verdict."""


@dataclass(frozen=True)
class Row:
    """One line of a comparison.

    ``test`` and ``metric``: what was compared; ``label``: for what is no plain figure, what it is (NEW, RENAMED,
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
        order = 3 if self.label == NEW else {"worse": 0, "cannot tell": 1, "better": 2, "same": 4}[self.verdict]
        size = abs(math.log(self.ratio)) if self.ratio is not None and self.ratio > 0 else math.inf
        return order, 0 if self.label else 1, -size


@dataclass(frozen=True)
class Comparison:
    """NEW against BASE. ``environment``: what differs besides the code under test; ``notes``: what else to know.

    ``incomparable``: why the two runs cannot be compared at all, or ``None``. ``rows``: the worst first.
    """

    base: str
    new: str
    environment: tuple[str, ...]
    notes: tuple[str, ...]
    incomparable: str | None
    rows: tuple[Row, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Rows by what they say, the four verdicts first."""
        found = Counter(row.says for row in self.rows)
        return {name: found[name] for name in ("worse", "cannot tell", "better", "same")} | dict(sorted(found.items()))

    def exit_code(self, *, strict: bool = False) -> int:
        """0: nothing got worse; 1: something did, or, if ``strict``, is no longer checked; 2: not comparable."""
        if self.incomparable is not None:
            return 2
        bad = any(row.verdict == "worse" or (strict and row.label in UNCHECKED) for row in self.rows)
        return 1 if bad else 0


@dataclass(frozen=True)
class _Shape:
    """How the fingerprints of a case's step differ, ``None`` if they do not, and what that makes of the step; or why
    that cannot be said."""

    difference: str | None
    unknown: str | None = None
    verdict: Verdict = "cannot tell"


@dataclass(frozen=True)
class _Pair:
    """The same case in both runs."""

    old: Case
    new: Case
    shape: _Shape | None

    @property
    def differing(self) -> list[str]:
        """The settings that differ. A case that did not run, or died, may have none of its own to hold against it."""
        known = self.old.settings and self.new.settings
        both_passed = self.old.outcome == self.new.outcome == "passed"
        return changes(self.old.settings, self.new.settings) if known or both_passed else []

    def one_sided(self, row: Row) -> Iterator[Row]:
        """The row of a figure that one run lacks; of a case that did not pass, that says nothing new."""
        if self.old.outcome == self.new.outcome == "passed":
            yield replace(row, verdict="cannot tell", label=NEW if row.before is None else MISSING)


@dataclass(frozen=True)
class _Time:
    """A time that can be judged: its row as it stands so far, and its estimate."""

    row: Row
    rule: Rule
    estimate: Estimate
    over_control: bool


def compare(base: Run, new: Run, rules: Rules, *, across_machines: bool = False) -> Comparison:
    """``new`` judged against ``base``; ``across_machines`` lets machines differ, and leaves out all that has noise."""
    machines = machine_changes(base, new)
    if machines and not across_machines:
        return _comparison(base, new, (), [], f"the machines differ ({'; '.join(machines)})")
    old_cases, new_cases = cases_of(base), cases_of(new)
    names = renamed(old_cases, new_cases)
    rows = [_renamed_row(old, name) for old, name in names.items()]
    pairs = [
        _Pair(old, new_cases[name], _shape(_fingerprint(old, old_cases), _fingerprint(new_cases[name], new_cases)))
        for old in old_cases.values()
        if (name := names.get(old.id, old.id)) in new_cases
    ]
    rows += _only_in_base(base, new, old_cases, new_cases, names)
    rows += _only_in_new(base, new, old_cases, new_cases, names)
    rows += [row for pair in pairs for row in _conditions(pair)]
    comparable = [pair for pair in pairs if not pair.differing]
    rows += [row for pair in comparable for row in _noise_free(pair, rules, across_machines)]
    rows += _claims(base, new, rules)
    notes = [f"machines differ: {'; '.join(machines)}; what carries noise was not compared"] if machines else []
    notes += _without_rule(comparable, rules)
    if not machines:
        moved = any(row.verdict in ("worse", "better") and _is_noise_free(row, rules) for row in rows)
        judged, note = _judged_times(comparable, rules, moved)
        rows += judged
        notes += note
    return _comparison(base, new, rows, notes, None if comparable else _why_incomparable(base, new, pairs))


def _comparison(base: Run, new: Run, rows: Sequence[Row], notes: list[str], incomparable: str | None) -> Comparison:
    interrupted = [f"{name} was interrupted" for name, run in (("BASE", base), ("NEW", new)) if run.interrupted]
    return Comparison(
        base=str(base.path),
        new=str(new.path),
        environment=tuple(environment_changes(base, new)),
        notes=(*notes, *interrupted),
        incomparable=incomparable,
        rows=tuple(sorted(rows, key=lambda row: (row.badness, row.test, row.metric))),
    )


def _why_incomparable(base: Run, new: Run, pairs: Sequence[_Pair]) -> str:
    """Why nothing can be judged: other settings, or no case in both, and then what each of them asked."""
    if pairs:
        differing = Counter(change for pair in pairs for change in pair.differing)
        ((most, _),) = differing.most_common(1)
        return f"the settings of every case in both differ ({most}{', …' if len(differing) > 1 else ''})"
    asked = [{case.question for case in run.cases} for run in (base, new)]
    told = " and ".join(f"{name} {_questions(run)}" for name, run in (("BASE", base), ("NEW", new)))
    if not asked[0] & asked[1]:
        return f"no case stands in both; they ask different questions: {told}"
    absences = Absences(base, new)
    reasons = Counter(absences(case.id, case.question, case.figures).why for case in base.cases)
    return f"no case stands in both, although both ask {', '.join(sorted(asked[0] & asked[1]))}: NEW {_most(reasons)}"


def _questions(run: Run) -> str:
    """ "test_speed (28 cases) and 3 more", and that it was interrupted where it was."""
    counted = Counter(case.question for case in run.cases).most_common()
    named = [f"{question} ({number} case{'s' * (number != 1)})" for question, number in counted[:TOLD_QUESTIONS]]
    more = f" and {len(counted) - TOLD_QUESTIONS} more" if len(counted) > TOLD_QUESTIONS else ""
    return f"{', '.join(named) or 'none'}{more}{', interrupted' if run.interrupted else ''}"


def _most(reasons: Counter[str]) -> str:
    (most, _), *rest = reasons.most_common()
    return most + (f", and {len(rest)} other reason{'s' * (len(rest) > 1)}" if rest else "")


# Which case is which


def renamed(old_cases: Mapping[str, Case], new_cases: Mapping[str, Case]) -> dict[str, str]:
    """Old id -> new id of cases that only changed their name.

    The same figures' names under the same test in another file, or about the same subject; or the same fingerprint.
    Where two could be meant, none is.
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


def _by_test(case: Case) -> str | None:
    return json.dumps([case.id.partition("::")[2], sorted(case.figures)])


def _by_subject_and_file(case: Case) -> str | None:
    return None if case.subject is None else json.dumps([case.question, sorted(case.figures), case.subject])


def _by_subject(case: Case) -> str | None:
    """In any file: then figures besides those that name the subject have to say what was asked of it."""
    said = case.figures.keys() - {*IDENTITY}
    return None if case.subject is None or not said else json.dumps([sorted(said), case.subject])


def _by_fingerprint(case: Case) -> str | None:
    from peft_gauge.history.fingerprints import digest

    return None if case.fingerprint is None else f"{case.question} {digest(case.fingerprint)}"


def _unique(cases: list[Case], key: Callable[[Case], str | None]) -> dict[str, Case]:
    keys = Counter(map(key, cases))
    return {name: case for case in cases if (name := key(case)) is not None and keys[name] == 1}


def _renamed_row(old: str, new: str) -> Row:
    return Row(new, "id", "same", RENAMED, before=old, after=new)


def _only_in_base(
    base: Run, new: Run, old_cases: Mapping[str, Case], new_cases: Mapping[str, Case], names: Mapping[str, str]
) -> Iterator[Row]:
    """Rows of cases that NEW does not hold, and why; one that did not run in BASE either is no loss."""
    absences = Absences(base, new)
    for case in old_cases.values():
        if case.id not in new_cases and case.id not in names and case.outcome not in NOT_RUN:
            label, why = absences(case.id, case.question, case.figures)
            yield Row(case.id, "outcome", "cannot tell", label, before=case.outcome, note=f"NEW {why}")


def _only_in_new(
    base: Run, new: Run, old_cases: Mapping[str, Case], new_cases: Mapping[str, Case], names: Mapping[str, str]
) -> Iterator[Row]:
    """Rows of cases that BASE does not hold, and why, where it is not only that they are new."""
    absences = Absences(new, base)
    known = set(names.values())
    for case in new_cases.values():
        if case.id not in old_cases and case.id not in known:
            label, why = absences(case.id, case.question, case.figures)
            note = None if label == MISSING else f"BASE {why}"
            yield Row(case.id, "outcome", "cannot tell", NEW, after=case.outcome, note=case.reason or note)


# How a case ended, and under which conditions


def _conditions(pair: _Pair) -> Iterator[Row]:
    """The row of a case's outcome; and one more where its settings differ."""
    old, new = pair.old.outcome, pair.new.outcome
    label = None if old == new else NEW if old in NOT_RUN and new == "passed" else new.replace("-", " ").upper()
    note = pair.new.reason if new != "passed" else pair.old.reason
    yield Row(pair.new.id, "outcome", outcome_verdict(old, new), label, old, new, note=note)
    if pair.differing:
        yield Row(pair.new.id, "settings", "cannot tell", NOT_COMPARABLE, note="; ".join(pair.differing))


def outcome_verdict(old: str, new: str) -> Verdict:
    """A case that newly breaks is worse, one that no longer does is better; of one that was not run, none can tell."""
    if old == new:
        return "same"
    if new in BROKEN:
        return "cannot tell" if old in BROKEN else "worse"
    return "better" if old in BROKEN and new == "passed" else "cannot tell"


# Figures without noise, or with a known tolerance


def _noise_free(pair: _Pair, rules: Rules, only_noise_free: bool) -> Iterator[Row]:
    """Rows of all figures of a case but its times."""
    if pair.old.outcome in NOT_RUN or pair.new.outcome in NOT_RUN:
        return
    for metric in _names(pair.old.figures, pair.new.figures):
        rule = rules.of(pair.new.id, metric)
        if rule.kind in ("time", "ignore") or (only_noise_free and not rule.noise_free):
            continue
        before, after = pair.old.figures.get(metric), pair.new.figures.get(metric)
        row = Row(pair.new.id, metric, "cannot tell", before=before, after=after, ratio=_ratio(before, after))
        if before is None or after is None:
            yield from pair.one_sided(row)
            continue
        verdict = judge_value(rule, before, after)
        yield replace(row, verdict=verdict, cause=None if verdict == "same" else _cause(pair, metric))
    yield from _fingerprint_rows(pair, rules)


def _without_rule(pairs: Sequence[_Pair], rules: Rules) -> list[str]:
    """A note on figures that were not compared because nobody has said how."""
    found = [
        metric
        for pair in pairs
        for metric in _names(pair.old.figures, pair.new.figures)
        if rules.passes_over(pair.new.id, metric)
    ]
    names = sorted(set(found))
    told = ", ".join(names[:TOLD_NAMES]) + (f" and {len(names) - TOLD_NAMES} more" if len(names) > TOLD_NAMES else "")
    return [f"no rule says how to compare {told}"] if names else []


def _is_noise_free(row: Row, rules: Rules) -> bool:
    """Of claims, some are about times."""
    return row.metric != "verdict" and rules.of(row.test, row.metric).noise_free


def _fingerprint_rows(pair: _Pair, rules: Rules) -> Iterator[Row]:
    before, after = pair.old.fingerprint, pair.new.fingerprint
    if rules.of(pair.new.id, FINGERPRINT).kind == "ignore" or before is after is None:
        return
    if before is None or after is None:
        shown = [None if each is None else "taken" for each in (before, after)]
        yield from pair.one_sided(Row(pair.new.id, FINGERPRINT, "cannot tell", before=shown[0], after=shown[1]))
        return
    assert pair.shape is not None
    if pair.shape.unknown is not None:
        yield Row(pair.new.id, FINGERPRINT, "cannot tell", NOT_COMPARABLE, note=pair.shape.unknown)
        return
    yield Row(pair.new.id, FINGERPRINT, pair.shape.verdict, cause=pair.shape.difference)


def judge_value(rule: Rule, before: Any, after: Any) -> Verdict:
    """The verdict on a figure of kind exact or number; what is no number is compared exactly."""
    if before == after:
        return "same"
    if not (_is_number(before) and _is_number(after)):
        return "worse"
    if rule.kind == "number" and abs(after - before) <= max(rule.absolute, rule.relative * abs(before)):
        return "same"
    return "better" if (rule.direction == "lower") == (after < before) and rule.direction != "none" else "worse"


def _claims(base: Run, new: Run, rules: Rules) -> Iterator[Row]:
    """A claim's verdict must not change; only a decision instead of "cannot tell" is for the better."""
    old, now = ({f"claim::{claim['id']}[{claim['model']}]": claim for claim in run.claims} for run in (base, new))
    for name in _names(old, now):
        if rules.of(name, "verdict").kind == "ignore":
            continue
        before, after = (_decided(run.get(name)) for run in (old, now))
        row = Row(name, "verdict", "same", before=before, after=after, note=now.get(name, {}).get("figure"))
        if before == after:
            yield row
        elif before is None:
            yield replace(row, verdict="cannot tell", label=NEW)
        elif after is None:
            # A claim that a run lists and does not decide, or of a run without claims, is decided by a question that
            # it did not ask.
            asked = now and name not in now
            label = NOT_REACHED if new.interrupted else MISSING if asked else NOT_ASKED
            yield replace(
                row, verdict="cannot tell", label=label, note=None if label == MISSING else "NEW does not decide it"
            )
        else:
            yield replace(row, verdict="better" if before == "cannot tell" else "worse")


def _decided(claim: Mapping[str, Any] | None) -> str | None:
    return None if claim is None or claim["verdict"] == NOT_MEASURED else str(claim["verdict"])


# Times


def _judged_times(pairs: Sequence[_Pair], rules: Rules, moved: bool) -> tuple[list[Row], list[str]]:
    """Rows of all times, judged as one family, and notes on what moved with all of them.

    ``moved``: whether any figure without noise changed; if so, no common factor is looked for.
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


def _times_of(pair: _Pair, rules: Rules) -> Iterator[Row | _Time]:
    if pair.old.outcome in NOT_RUN or pair.new.outcome in NOT_RUN:
        return
    for metric in _names({**pair.old.figures, **pair.old.samples}, {**pair.new.figures, **pair.new.samples}):
        rule = rules.of(pair.new.id, metric)
        if rule.kind != "time":
            continue
        old, new = pair.old.samples.get(metric), pair.new.samples.get(metric)
        before, after = (_seconds(case, metric) for case in (pair.old, pair.new))
        row = Row(pair.new.id, metric, "cannot tell", before=before, after=after, ratio=_ratio(before, after))
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
        yield _Time(replace(row, cause=_time_cause(pair), note=_unsteady(pair)), rule, estimate, over_control)


def _in_common(over_control: bool) -> float:
    return intervals.IN_COMMON_OVER_CONTROL if over_control else intervals.IN_COMMON


def _unsteady(pair: _Pair) -> str | None:
    """What the clocks had to say against their own times."""
    doubts = [
        f"{name} unsteady: {', '.join(map(str, reasons))}"
        for name, case in (("BASE", pair.old), ("NEW", pair.new))
        if isinstance(reasons := case.figures.get("unsteady"), list) and reasons
    ]
    return "; ".join(doubts) or None


def _seconds(case: Case, metric: str) -> float | None:
    """Of the rounds where there are any, since a table's median may have been taken otherwise."""
    samples = case.samples.get(metric)
    if samples is not None and intervals.why_no_estimate(samples) is None:
        return intervals.centre_seconds(samples.seconds)
    value = case.figures.get(metric)
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
    """What would decide a time that is not decided."""
    if judged.further is None:
        return None
    most = intervals.MOST_FURTHER
    number = f"about {judged.further}" if judged.further <= most else f"more than {most}"
    lone = "one process does not show how processes differ; " if min(estimate.processes) < 2 else ""
    return f"{lone}{number} more {'process' if judged.further == 1 else 'processes'} a side would decide"


def common_factor(times: Sequence[_Time]) -> float | None:
    """The logarithm of the factor by which all times moved, where they did so beyond the minimum effect.

    Their median ratio; nine tenths of at least five times must lie on its side of 1, and either have it in the interval
    that their own rounds give (at 95 %, without any spread of hosts) or lie within the minimum effect of it.
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
    """One row instead of many. What moved the times but not their control is no mere change of the environment."""
    verdicts = {row.verdict for row in judged}
    controlled = all(row.relative_to == "control" for row in judged)
    verdict: Verdict = "cannot tell"
    if controlled and verdicts & {"worse", "better"}:
        verdict = "worse" if factor > 0 else "better"
    note = (
        "all times moved alike while their control did not and no figure without noise changed"
        if controlled
        else "all times moved alike and no figure without noise changed: the environment (machine, or a library that"
        " all cases share); below, times are judged relative to this"
    )
    return Row("(all)", "seconds", verdict, ALL_TIMES, ratio=math.exp(factor), note=note)


def _control_note(pairs: Sequence[_Pair]) -> list[str]:
    """What the control did, which is divided out of the times and so is not seen in them."""
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
        f" {max(moved):.2f}): the machine, or what a library changed for the bare model too"
    ]


def _controlled(pairs: Sequence[_Pair]) -> Iterator[tuple[Samples, Samples]]:
    for pair in pairs:
        for metric in pair.old.samples.keys() & pair.new.samples.keys():
            both = pair.old.samples[metric], pair.new.samples[metric]
            if all(samples.control_seconds and intervals.why_no_estimate(samples) is None for samples in both):
                yield both


# Causes


def _fingerprint(case: Case, cases: Mapping[str, Case]) -> Mapping[str, Any] | None:
    """That of the case, or of the one case of its run about the same subject that took one."""
    if case.fingerprint is not None or case.subject is None:
        return case.fingerprint
    found = [other.fingerprint for other in cases.values() if other.fingerprint and other.subject == case.subject]
    return found[0] if len(found) == 1 else None


def _time_cause(pair: _Pair) -> str | None:
    if pair.shape is None or pair.shape.unknown is not None:
        return None
    return pair.shape.difference or "no operator changed: machine or kernel"


def _cause(pair: _Pair, metric: str) -> str | None:
    """Of a peak or a resident size, the categories that changed; of anything else, the operators that did."""
    parent, dot, name = metric.rpartition(".")
    kinds = [kind for kind in ("peak", "resident") if kind in name and not name.startswith("planned")]
    by_category = f"{parent}{dot}{kinds[0]}_by_category." if kinds else None
    parts = [
        f"{each.removeprefix(by_category)} {after - before:+,} B"
        for each in _names(pair.old.figures, pair.new.figures)
        if by_category is not None
        and each.startswith(by_category)
        and (before := pair.old.figures.get(each, 0)) != (after := pair.new.figures.get(each, 0))
    ]
    if parts:
        return ", ".join(parts)
    return None if pair.shape is None else pair.shape.difference


def _shape(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> _Shape | None:
    """The first differences of two fingerprints in words; ``None`` where one was not taken."""
    from peft_gauge.history.fingerprints import differences, only_less

    if before is None or after is None:
        return None
    try:
        found = differences(before, after)
    except GaugeError as error:
        return _Shape(None, str(error))
    rest = len(found) - TOLD_DIFFERENCES
    first = "; ".join(one_line(each.text, 160) for each in found[:TOLD_DIFFERENCES])
    verdict: Verdict = "better" if only_less(found) else "worse" if found else "same"
    return _Shape(f"{first}; and {rest} more" if rest > 0 else first or None, verdict=verdict)


# Small things


def _names(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The names in either, in the old one's order, then the new one's."""
    return [*old, *(name for name in new if name not in old)]


def _ratio(before: object, after: object) -> float | None:
    if _is_number(before) and _is_number(after) and before > 0 and after > 0:  # type: ignore[operator]
        return float(after / before)  # type: ignore[operator]
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
