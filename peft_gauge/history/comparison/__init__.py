"""Two saved runs, metric by metric: same, better, worse or inconclusive, with the change and its likely cause."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft_gauge.history import store
from peft_gauge.history.absent import Absences, left_to_other_shards
from peft_gauge.history.comparison.cases import only_in_base, only_in_new, renamed, renamed_row
from peft_gauge.history.comparison.causes import fingerprint, shape
from peft_gauge.history.comparison.rows import UNCHECKED, Pair, Row
from peft_gauge.history.comparison.times import judged_times
from peft_gauge.history.comparison.values import (
    claims,
    conditions,
    is_noise_free,
    judge_value,
    noise_free,
    outcome_verdict,
    without_rule,
)
from peft_gauge.history.metrics import cases_of, environment_changes, machine_changes

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from peft_gauge.history.metrics import RecordedCase
    from peft_gauge.history.reader import Run
    from peft_gauge.history.rules import Rules

__all__ = ["Row", "RunComparison", "compare", "judge_value", "outcome_verdict"]

TOLD_BENCHMARKS = 3


@dataclass(frozen=True)
class RunComparison:
    """NEW against BASE. ``environment``: differences other than the code under test; ``notes``: further information.

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
        """The number of rows by verdict or label, the four verdicts first."""
        found = Counter(row.says for row in self.rows)
        return {name: found[name] for name in ("worse", "inconclusive", "better", "same")} | dict(sorted(found.items()))

    def exit_code(self, *, strict: bool = False) -> int:
        """0: no regression; 1: a regression or, if ``strict``, a case that is no longer checked; 2: not comparable."""
        if self.incomparable is not None:
            return 2
        bad = any(row.verdict == "worse" or (strict and row.label in UNCHECKED) for row in self.rows)
        return 1 if bad else 0


def compare(base: Run, new: Run, rules: Rules, *, across_machines: bool = False) -> RunComparison:
    """``new`` compared with ``base``; ``across_machines`` allows different machines and skips noisy metrics."""
    machines = machine_changes(base, new)
    if machines and not across_machines:
        return _comparison(base, new, (), [], f"the machines differ ({'; '.join(machines)})")
    old_cases, new_cases = cases_of(base), cases_of(new)
    names = renamed(_without(old_cases, left_to_other_shards(new)), _without(new_cases, left_to_other_shards(base)))
    rows = [renamed_row(old, name) for old, name in names.items()]
    pairs = [
        Pair(old, new_cases[name], shape(fingerprint(old, old_cases), fingerprint(new_cases[name], new_cases)))
        for old in old_cases.values()
        if (name := names.get(old.id, old.id)) in new_cases
    ]
    rows += only_in_base(base, new, old_cases, new_cases, names)
    rows += only_in_new(base, new, old_cases, new_cases, names)
    rows += [row for pair in pairs for row in conditions(pair)]
    comparable = [pair for pair in pairs if not pair.differing]
    rows += [row for pair in comparable for row in noise_free(pair, rules, across_machines)]
    rows += claims(base, new, rules)
    notes = [f"machines differ: {'; '.join(machines)}; metrics with noise were not compared"] if machines else []
    notes += without_rule(comparable, rules)
    if not machines:
        moved = any(row.verdict in ("worse", "better") and is_noise_free(row, rules) for row in rows)
        judged, note = judged_times(comparable, rules, moved)
        rows += judged
        notes += note
    return _comparison(base, new, rows, notes, None if comparable else _why_incomparable(base, new, pairs))


def _without(cases: Mapping[str, RecordedCase], ids: Collection[str]) -> dict[str, RecordedCase]:
    return {id_: case for id_, case in cases.items() if id_ not in ids}


def _comparison(base: Run, new: Run, rows: Sequence[Row], notes: list[str], incomparable: str | None) -> RunComparison:
    interrupted = [f"{name} was interrupted" for name, run in (("BASE", base), ("NEW", new)) if run.interrupted]
    shards = [f"{name} is {run.shards.name}" for name, run in (("BASE", base), ("NEW", new)) if run.shards is not None]
    return RunComparison(
        base=store.shown(base.path),
        new=store.shown(new.path),
        environment=tuple(environment_changes(base, new)),
        notes=(*notes, *shards, *interrupted),
        incomparable=incomparable,
        rows=tuple(sorted(rows, key=lambda row: (row.badness, row.test, row.metric))),
    )


def _why_incomparable(base: Run, new: Run, pairs: Sequence[Pair]) -> str:
    """Why nothing can be judged: other settings, or no case in both, and then the benchmarks of each."""
    if pairs:
        differing = Counter(change for pair in pairs for change in pair.differing)
        ((most, _),) = differing.most_common(1)
        return f"the settings of every case in both differ ({most}{', …' if len(differing) > 1 else ''})"
    asked = [{case.benchmark for case in run.cases} for run in (base, new)]
    told = " and ".join(f"{name} {_benchmarks(run)}" for name, run in (("BASE", base), ("NEW", new)))
    if not asked[0] & asked[1]:
        return f"the runs have no case in common, since their benchmarks differ: {told}"
    absences = Absences(base, new)
    reasons = Counter(absences(case.id, case.benchmark, case.metrics).why for case in base.cases)
    return f"no case in common, although both ran {', '.join(sorted(asked[0] & asked[1]))}: NEW {_most(reasons)}"


def _benchmarks(run: Run) -> str:
    """ "test_speed (28 cases) and 3 more", followed by "interrupted" if it was."""
    counted = Counter(case.benchmark for case in run.cases).most_common()
    named = [f"{benchmark} ({number} case{'s' * (number != 1)})" for benchmark, number in counted[:TOLD_BENCHMARKS]]
    more = f" and {len(counted) - TOLD_BENCHMARKS} more" if len(counted) > TOLD_BENCHMARKS else ""
    return f"{', '.join(named) or 'none'}{more}{', interrupted' if run.interrupted else ''}"


def _most(reasons: Counter[str]) -> str:
    (most, _), *rest = reasons.most_common()
    return most + (f", and {len(rest)} other reason{'s' * (len(rest) > 1)}" if rest else "")
