"""Data of the report as plain rows from saved runs; the page and the plots are made from these.

Bytes and seconds are unrounded here. A row can be filtered by its ``method``, ``model`` and ``machine``; rows of one
``panel`` share a plot.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_gauge.errors import GaugeError
from peft_gauge.history import store
from peft_gauge.history.answers import NewestAnswers
from peft_gauge.history.briefs import briefs, restored
from peft_gauge.history.ledger import NewestVerdicts
from peft_gauge.history.metrics import RecordedCase, cases_of, is_number, machine_changes
from peft_gauge.history.reader import read_run, runs_in
from peft_gauge.history.schema import SAMPLES
from peft_gauge.medians import median_interval
from peft_gauge.report.format import step_conditions
from peft_gauge.report.html.page_history import History, RememberedRules, machine_of
from peft_gauge.report.rows import PHASES, label, method_rows
from peft_gauge.report.terminal.memory_table import ON_CPU, ON_CUDA, planned_bytes
from peft_gauge.report.terminal.sweep_table import ABOUT_QUALITY, swept

if TYPE_CHECKING:
    from peft_gauge.history.comparison import RunComparison
    from peft_gauge.history.ledger import Standing
    from peft_gauge.history.reader import Run
    from peft_gauge.history.rules import Rules
    from peft_gauge.history.schema import CaseRecord

Row = dict[str, Any]

PLOTTED = ("memory", "planned", "sequence", "times", "pareto")
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
        """The rows of all newest results for the plot ``kind``, one of `PLOTTED`; ``run`` names the run of each."""
        made: Callable[[Run], Iterator[Row]] = {
            "memory": memory_rows,
            "planned": planned_rows,
            "sequence": sequence_rows,
            "times": time_rows,
            "pareto": sweep_rows,
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


# Rows of one run


def _of_method(run: Run, metrics: Mapping[str, Any]) -> Row:
    return {"machine": machine_of(run), "model": metrics.get("model"), "method": metrics.get("method")}


def plans_of(run: Run) -> Iterator[Mapping[str, Any]]:
    """All planned steps among the cases of ``run``."""
    for case in run.cases:
        plan = case.metrics.get("plan")
        if isinstance(plan, Mapping) and {"model", "method", "peak_bytes", "settings"} <= plan.keys():
            yield plan


def methods_told(runs: Sequence[Run]) -> list[Row]:
    """A merged row of metrics for each method that was counted or timed, separated by the way it was trained.

    Metrics with equal settings are merged over ``runs``, newest first; ``run`` names all runs of a row.
    """
    told = {"trainable_params", *(f"{phase}_seconds" for phase in PHASES)}
    by_settings: dict[str, list[tuple[Run, CaseRecord]]] = {}
    for run in reversed(runs):
        for case in run.cases:
            if told & case.metrics.keys() and "method" in case.metrics and case.outcome == "passed":
                by_settings.setdefault(_settings_of(case), []).append((run, case))
    rows = []
    for records in by_settings.values():
        for row in method_rows(case for _, case in records):
            of_row = [run.name for run, case in records if _is_of(row, case)]
            rows.append(row | {"run": ", ".join(reversed(dict.fromkeys(of_row)))})
    return rows


def _settings_of(case: CaseRecord) -> str:
    return json.dumps(case.metrics.get("settings"), sort_keys=True, default=str)


def _is_of(row: Row, case: CaseRecord) -> bool:
    (own,) = method_rows([case])
    return label(own) == label(row) and all(own[name] == row[name] for name in ("model", "device"))


def measured_steps(run: Run) -> list[Row]:
    """A merged row of metrics for each method whose memory was measured, separated by the way it was trained."""
    return [row for row in method_rows(run.cases) if row.get("tensor_peak_bytes") is not None]


def memory_rows(run: Run) -> Iterator[Row]:
    """Bytes by category at the peak, for measured and for planned steps."""
    for row in measured_steps(run):
        panel = f"{row['model']} on {row['device']}, measured, {step_conditions(row.get('settings', {}))}"
        yield from _categories(run, row, row.get("peak_by_category") or {}, panel, label(row), "measured")
    for plan in plans_of(run):
        panel = f"{plan['model']}, planned, {step_conditions(plan['settings'])}"
        yield from _categories(run, plan, plan.get("peak_by_category") or {}, panel, _planned(plan), "planned")


def _categories(
    run: Run, about: Mapping[str, Any], by_category: Mapping[str, int], panel: str, name: str, source: str
) -> Iterator[Row]:
    about_it = {**_of_method(run, about), "panel": f"{panel}, {machine_of(run)}", "label": name, "source": source}
    for category, size in by_category.items():
        if size:
            yield {**about_it, "category": category, "bytes": size}


def _planned(plan: Mapping[str, Any]) -> str:
    checkpointing = ", checkpointing" if plan["settings"].get("grad_checkpointing") else ""
    return f"{plan['method']}{checkpointing}"


def planned_rows(run: Run) -> Iterator[Row]:
    """By method and meter: measured peak, planned peak, ceiling (``None`` on a CPU), and relative error."""
    for row in measured_steps(run):
        where = f"{row['model']} on {row['device']}, {step_conditions(row.get('settings', {}))}, {machine_of(run)}"
        for meter, (measured, planned) in (ON_CUDA if row["device"] == "cuda" else ON_CPU).items():
            planned_metric = planned_bytes(row, planned)
            if row.get(measured) is None or planned_metric is None:
                continue
            yield {
                **_of_method(run, row),
                "panel": where,
                "label": f"{label(row)}, {meter}",
                "meter": meter,
                "measured_bytes": row[measured],
                "planned_bytes": planned_metric,
                "ceiling_bytes": (row.get("ceiling") or {}).get(measured),
                "relative_error": (row.get("relative_error") or {}).get(measured),
            }


def sequence_rows(run: Run) -> Iterator[Row]:
    """Peaks at several sequence lengths, all else equal, planned and measured; single lengths are left out."""
    points = [*_planned_points(run), *_measured_points(run)]
    lengths: dict[tuple[str, str, str], set[int]] = {}
    for point in points:
        lengths.setdefault(_line(point), set()).add(point["seq"])
    seen = set()
    for point in points:
        key = (*_line(point), point["seq"])
        if len(lengths[_line(point)]) > 1 and key not in seen:
            seen.add(key)
            yield point


def _line(point: Row) -> tuple[str, str, str]:
    return point["panel"], point["label"], point["source"]


def _planned_points(run: Run) -> Iterator[Row]:
    for plan in plans_of(run):
        settings = plan["settings"]
        yield _point(
            run, plan, _planned(plan), "planned", settings.get("batch"), settings.get("seq"), plan["peak_bytes"]
        )
    for case in run.cases:
        by_seq = case.metrics.get("peak_bytes_by_seq")
        if not isinstance(by_seq, Mapping):
            continue
        model = case.id.partition("[")[2].rstrip("]") or "a model"  # such a case covers one model and many methods
        for seq, peaks in by_seq.items():
            for method, size in peaks.items():
                yield _point(run, {"model": model, "method": method}, method, "planned", 1, int(seq), size)


def _measured_points(run: Run) -> Iterator[Row]:
    for row in measured_steps(run):
        peak = "allocated_peak_bytes" if row["device"] == "cuda" else "tensor_peak_bytes"
        for shape in row.get("shapes") or []:
            if shape.get(peak) is not None:
                yield _point(run, row, label(row), "measured", shape["batch"], shape["seq"], shape[peak])


def _point(run: Run, about: Mapping[str, Any], name: str, source: str, batch: object, seq: object, size: int) -> Row:
    device = f" on {about['device']}" if isinstance(about.get("device"), str) else ""
    panel = f"{about['model']}{device}, batch {batch}, {machine_of(run)}"
    return {**_of_method(run, about), "panel": panel, "label": name, "source": source, "seq": seq, "bytes": size}


def growth_rows(run: Run) -> Iterator[Row]:
    """Growth of the peak per token and per row, measured and planned."""
    for row in method_rows(run.cases):
        for line in row.get("growth") or []:
            yield {**_of_method(run, row), "label": label(row), "metric": row.get("growth_of"), **line}


def time_rows(run: Run) -> Iterator[Row]:
    """Each time of a passed case in seconds: the saved median, and a 95 % interval of the median of its rounds."""
    for record in run.cases:
        if record.outcome != "passed":
            continue
        for metric, value in record.metrics.items():
            if _is_measured_time(metric, record) and is_number(value):
                yield _time(run, record, metric, value)


def _is_measured_time(metric: str, record: CaseRecord) -> bool:
    """Whether it is a time of the case itself: one with samples, or, in a run without samples, named after a phase."""
    samples = record.metrics.get(SAMPLES)
    if samples is not None:
        return metric in samples
    return metric in ("seconds", *(f"{phase}_seconds" for phase in ("forward", "backward", "optimizer", "step")))


def _time(run: Run, record: CaseRecord, metric: str, value: float) -> Row:
    metrics = record.metrics
    processes = (metrics.get(SAMPLES) or {}).get(metric) or []
    interval = median_interval(list(chain.from_iterable(processes)))
    about = _of_method(run, metrics)
    is_method = about["method"] is not None
    where = f"{about['model']} on {metrics.get('device')}, {step_conditions(metrics.get('settings') or {})}, "
    return {
        **about,
        "panel": f"{metric.removesuffix('_seconds')}, {where if is_method else ''}{about['machine']}",
        "label": label(metrics) if is_method else record.id,
        "metric": metric,
        "seconds": value,
        "low_seconds": interval and interval[0],
        "high_seconds": interval and interval[1],
        "rounds": sum(map(len, processes)),
        "processes": len(processes),
        "over_control": metrics.get(metric.replace("_seconds", "_over_control")),
        "unsteady": "; ".join(map(str, metrics.get("unsteady") or [])) or None,
    }


def sweep_rows(run: Run) -> Iterator[Row]:
    """The points of every sweep in ``run``, as from `pareto_rows`."""
    for record in swept(run.cases):
        yield from pareto_rows(run, record)


def pareto_rows(run: Run, record: CaseRecord) -> Iterator[Row]:
    """Points of a saved sweep: quality (higher is better) against each cost (lower is better). ``quality_is`` names the
    quality of a sweep without training.

    ``front``: no other point of the sweep has at most this cost and higher quality, or lower cost and equal quality. A
    point without a quality, whose training diverged, is not on the front.
    """
    points = record.metrics.get("pareto") or []
    quality = record.metrics.get("quality_is") or "quality"
    costs = {name for point in points for name, value in point.items() if is_number(value)} - ABOUT_QUALITY
    for cost in sorted(costs):
        swept = [point for point in points if is_number(point.get(cost))]
        known = [point for point in swept if is_number(point.get("quality"))]
        for point in swept:
            yield {
                **_of_method(run, record.metrics),
                "panel": f"{record.id.removeprefix('benchmarks/')}: {quality} against {cost}, {machine_of(run)}",
                "label": str(point.get("label")),
                "cost": cost,
                "value": point[cost],
                **{name: point.get(name) for name in sorted(ABOUT_QUALITY)},
                "front": point in known and not any(_dominates(other, point, cost) for other in known),
            }


def _dominates(other: Mapping[str, Any], point: Mapping[str, Any], cost: str) -> bool:
    no_worse = other[cost] <= point[cost] and other["quality"] >= point["quality"]
    return bool(no_worse and (other[cost] < point[cost] or other["quality"] > point["quality"]))


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
