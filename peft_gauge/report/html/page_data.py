"""All data of the report, gathered from saved runs: the newest results of each machine, their changes, the history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from peft_gauge.collector import no_collector
from peft_gauge.errors import GaugeError
from peft_gauge.history import store
from peft_gauge.history.answers import NewestAnswers
from peft_gauge.history.briefs import briefs, restored
from peft_gauge.history.ledger import NewestVerdicts
from peft_gauge.history.metrics import RecordedCase, cases_of, machine_changes
from peft_gauge.history.reader import read_run, runs_in
from peft_gauge.report.html.page_history import History, RememberedRules, machine_of
from peft_gauge.report.html.page_rows import Row, memory_rows, planned_rows, sequence_rows, sweep_rows, time_rows

if TYPE_CHECKING:
    from peft_gauge.history.comparison import RunComparison
    from peft_gauge.history.ledger import Standing
    from peft_gauge.history.reader import Run
    from peft_gauge.history.rules import Rules
    from peft_gauge.history.schema import CaseRecord

EARLIER_LOOKED_AT = 20
"""How many runs back to look for a base: runs of one benchmark may lie between two runs of all."""


@dataclass(frozen=True)
class Answering:
    """A run with only those of its cases that are the newest, and the newest comparable earlier run, if any."""

    run: Run
    base: Run | None = None
    comparison: RunComparison | None = None


@dataclass
class Machine:
    """The newest results of one machine. No single run has all cases: each case is shown from the newest run with it.

    ``answering``: these runs, newest first; ``claims``: the newest verdicts.
    """

    answering: list[Answering]
    claims: list[Standing] = field(default_factory=list)


@dataclass
class Report:
    """All data of the report. ``left_out``: a line for each unusable path."""

    machines: dict[str, Machine] = field(default_factory=dict)
    history: History | None = None
    left_out: list[str] = field(default_factory=list)

    def rows(self, kind: str) -> list[Row]:
        """The newest results as rows for the plot ``kind``, one of `panels.PLOTTED`; ``run`` names the run of each."""
        made: Callable[[Run], Iterator[Row]] = {
            "memory": memory_rows,
            "planned": planned_rows,
            "sequence": sequence_rows,
            "times": time_rows,
            "quality": sweep_rows,
        }[kind]
        runs = [each.run for machine in self.machines.values() for each in machine.answering]
        return [row | {"run": run.name} for run in runs for row in made(run)]


def find(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The files of all runs in ``paths``, each once, and a line for each path without runs."""
    found: dict[Path, Path] = {}
    problems = []
    for path in paths:
        try:
            files = [path] if store.is_file(path) else runs_in(path)
        except GaugeError as error:
            problems.append(str(error))
            continue
        if not files:
            problems.append(f"{store.shown(path)} contains no saved runs")
        found |= {file.resolve(): file for file in files}
    return list(found.values()), problems


@no_collector()
def gather(paths: Sequence[Path], rules: Rules) -> Report:
    """The report of all runs under ``paths``.

    Paths without runs and unreadable files are left out, with a line each. Raises `GaugeError` if no run is left. Only
    briefs of the runs are read, one at a time; a history can have thousands. Runs that are shown or compared are read
    in full at the end.
    """
    remembered = RememberedRules.of_rules(rules)
    history = History(remembered)
    files, left_out = find(paths)
    latest: dict[str, list[Run]] = {}
    answers: dict[str, NewestAnswers] = {}
    verdicts: dict[str, NewestVerdicts] = {}
    for brief in briefs(files, left_out):
        history.add(brief)
        name = machine_of(brief.run)
        verdicts.setdefault(name, NewestVerdicts()).add(brief.run)
        answers.setdefault(name, NewestAnswers()).add(brief.run)
        kept = latest.setdefault(name, [])
        kept.append(brief.run)
        del kept[: -EARLIER_LOOKED_AT - 1]
    if not latest:
        raise GaugeError(nothing_left(left_out))
    history.add_level_changes()
    machines = {}
    for name, runs in sorted(latest.items()):
        claims = verdicts[name].standings()
        answering = _compared([*map(restored, answers[name].by_run())], runs, claims, remembered)
        machines[name] = Machine(answering, claims)
    return Report(machines, history, left_out)


def nothing_left(left_out: Sequence[str]) -> str:
    """One line on why no run could be used."""
    more = f" (and {len(left_out) - 1} more that could not be used)" if len(left_out) > 1 else ""
    return f"{left_out[0]}{more}" if left_out else "no saved run was given"


def newest_answers(files: Sequence[Path], left_out: list[str]) -> list[tuple[list[Run], list[Standing]]]:
    """For each machine, the runs with its newest results, as from `NewestAnswers.by_run`, and its newest verdicts.

    ``files``: oldest first; unreadable ones are added to ``left_out``.
    """
    answers: dict[str, NewestAnswers] = {}
    verdicts: dict[str, NewestVerdicts] = {}
    for brief in briefs(files, left_out):
        answers.setdefault(machine_of(brief.run), NewestAnswers()).add(brief.run)
        verdicts.setdefault(machine_of(brief.run), NewestVerdicts()).add(brief.run)
    return [([*map(restored, found.by_run())], verdicts[name].standings()) for name, found in sorted(answers.items())]


def _compared(
    answering: list[Run], latest: Sequence[Run], claims: Sequence[Standing], rules: RememberedRules
) -> list[Answering]:
    """Each of ``answering`` compared with the newest comparable earlier run among ``latest``, which are of briefs."""
    answered = {case.id for run in answering for case in run.cases}
    places = {run.path: place for place, run in enumerate(latest)}
    found = []
    for run in answering:
        earlier = latest[: places.get(run.path, 0)]
        decided = {(each.id, each.model) for each in claims if each.source is not None and each.source.run == run.name}
        found.append(_against_newest(_with_claims(run, decided), earlier, answered, rules))
    return found


def _with_claims(run: Run, decided: set[tuple[str, str]]) -> Run:
    return replace(run, claims=tuple(each for each in run.claims if (each["id"], each["model"]) in decided))


def _against_newest(new: Run, earlier: Sequence[Run], answered: set[str], rules: RememberedRules) -> Answering:
    """Compare with BASE's cases of the same benchmarks; cases shown from other runs are neither missing nor new."""
    from peft_gauge.history.comparison import compare

    own, benchmarks = {case.id for case in new.cases}, {case.benchmark for case in new.cases}
    decided = {(claim["id"], claim["model"]) for claim in new.claims}
    for brief in reversed(earlier):
        if not own & {case.id for case in brief.cases} or machine_changes(brief, new):
            continue
        base = read_run(brief.path)
        asked = (each for each in base.cases if each.id in own or each.benchmark in benchmarks)
        cases = tuple(each for each in asked if each.id in own or each.id not in answered)
        comparison = compare(replace(_with_claims(base, decided), cases=cases), new, rules)
        if comparison.incomparable is None:
            return Answering(new, base, comparison)
    return Answering(new)


def not_passed(run: Run) -> list[CaseRecord]:
    """The cases that did not pass, skipped ones last."""
    return sorted((case for case in run.cases if case.outcome != "passed"), key=lambda case: case.outcome == "skipped")


def named(runs: Sequence[Run]) -> str:
    """The names of the runs shown, such as "run 0003" or "runs 0003, 0002 and 0001"."""
    *most, last = [run.name for run in runs]
    return f"runs {', '.join(most)} and {last}" if most else f"run {last}"


def counted(values: Iterable[str]) -> str:
    """``values`` by frequency, most frequent first: "36 holds, 18 refuted"."""
    return ", ".join(f"{number} {value}" for value, number in Counter(values).most_common())


def case_subjects(run: Run) -> dict[str, RecordedCase]:
    """The cases of ``run`` by id, named as in a comparison's rows."""
    return cases_of(run)
