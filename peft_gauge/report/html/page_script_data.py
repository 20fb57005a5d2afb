"""The data of the page's script: specs, rows and panels of its plots, and the history, without repetitions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_gauge.report.charts import looks, panels, plots
from peft_gauge.report.html import page_tables, tasks

if TYPE_CHECKING:
    from peft_gauge.report.charts.looks import Look
    from peft_gauge.report.html.page_data import Report
    from peft_gauge.report.html.page_history import History
    from peft_gauge.report.html.page_rows import Row
    from peft_gauge.report.html.page_series import Series

DIGITS = 7
"""Significant digits of non-integer values in a history: as many as are ever shown."""


def script_data(report: Report, rows: Mapping[str, Sequence[Row]], of_methods: Mapping[str, Look]) -> dict[str, Any]:
    """Everything that the script draws. ``rows``: those of each kind of plot, as the report has them."""
    assert report.history is not None
    ready = {kind: panels.prepared(kind, some) for kind, some in rows.items()}
    specs = {kind: plots.spec(kind, of_methods) for kind, some in ready.items() if some}
    of_machines = looks.looks_of(report.machines)
    return {
        "specs": specs | {kind: plots.spec(kind, of_machines) for kind in ("history", "versions")},
        "rows": {kind: columns(some) for kind, some in ready.items()},
        "panels": {kind: panels.panels(kind, some) for kind, some in ready.items()},
        "units": plots.UNITS,
        "costs": {name: tasks.cost_words(name) for name in dict.fromkeys(row["cost"] for row in ready["quality"])},
        "dark": looks.dark_colours(),
        "shapes": looks.PATHS,
        "history": history_data(report.history),
    }


def columns(rows: Sequence[Row]) -> dict[str, Any]:
    """``rows`` by field: each is a list of values, or of indices into its ``texts`` if all its values are texts."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        if all(isinstance(value, str) for value in values):
            texts = _Index()
            found[name] = {"at": [texts[value] for value in values], "texts": texts.names}
        else:
            found[name] = values
    return found


def history_data(history: History) -> dict[str, Any]:
    """A history for the page, without repetitions.

    ``runs``: [machine, name, end, commit, versions] by index; ``versions``: texts of all libraries, ``differing``: of
    those that vary between runs, both by index; ``cases``: [id, method, model]; ``metrics``: names; ``at``: lists of
    indices of runs; ``series``: [machine, case, metric, at, values, lows, highs], indices except for the values, where
    [number, times] stands for a repeated number; ``changes``: [run, case, metric, verdict]. Of a long history only some
    runs are in it (`History.shown_runs`), and of each metric those at which it changed.
    """
    machines, cases, metrics, versions, at = (_Index() for _ in range(5))
    noted = [each for each in history.changes if (each.machine, each.case, each.metric) in history.series]
    changed: dict[tuple[str, str, str], set[int]] = {}
    for change in noted:
        changed.setdefault((change.machine, change.case, change.metric), set()).add(change.run)
    shown = history.shown_runs()
    there = sorted(shown.union(*changed.values()))
    places = {run: place for place, run in enumerate(there)}
    runs = [
        [machines[run.machine], run.name, run.when, run.commit, versions[tuple(run.libraries.items())]]
        for run in (history.runs[index] for index in there)
    ]
    series = [
        [
            machines[one.machine],
            cases[one.case],
            metrics[one.metric],
            at[tuple(places[run] for run in one.runs)],
            *_values_of(one),
        ]
        for one in (each.only(shown | changed.get(key, set())) for key, each in history.series.items())
    ]
    changes = [[places[change.run], cases[change.case], metrics[change.metric], change.verdict] for change in noted]
    subjects = [history.subjects[case] for case in cases.names]
    return {
        "machines": machines.names,
        "runs": runs,
        "versions": [page_tables.versions(dict(libraries)) for libraries in versions.names],
        "differing": differing([dict(libraries) for libraries in versions.names]),
        "cases": [
            [case, about.get("method"), about.get("model")] for case, about in zip(cases.names, subjects, strict=True)
        ],
        "metrics": metrics.names,
        "at": at.names,
        "series": series,
        "changes": changes,
        "opening": _opening(history),
    }


def differing(libraries: Sequence[Mapping[str, str | None]]) -> list[str]:
    """For each set of ``libraries``, the versions that vary between the sets."""
    names = dict.fromkeys(name for versions in libraries for name in versions)
    changing = [name for name in names if len({versions.get(name) for versions in libraries}) > 1]
    return [
        ", ".join(f"{name} {versions.get(name) or 'absent'}" for name in changing) or "the same libraries in all runs"
        for versions in libraries
    ]


class _Index:
    """Values in the order of their first use."""

    def __init__(self) -> None:
        self._places: dict[Any, int] = {}

    def __getitem__(self, name: Any) -> int:
        return self._places.setdefault(name, len(self._places))

    @property
    def names(self) -> list[Any]:
        return list(self._places)


def _values_of(series: Series) -> list[Any]:
    values = [_repeated(series.values)]
    if any(series.intervals):
        ends: Iterable[Any] = zip(*(each or (None, None) for each in series.intervals), strict=True)
        values += [[None if end is None else _rounded(end) for end in side] for side in ends]
    return values


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")


def _repeated(values: Sequence[float]) -> list[Any]:
    """``values`` with repetitions as [number, times]."""
    if values and values.count(values[0]) == len(values):  # most series
        return [[_rounded(values[0]), len(values)] if len(values) > 1 else _rounded(values[0])]
    found: list[list[Any]] = []
    for value in map(_rounded, values):
        if found and found[-1][0] == value:
            found[-1][1] += 1
        else:
            found.append([value, 1])
    return [value if times == 1 else [value, times] for value, times in found]


def _opening(history: History) -> list[str] | None:
    """The case and metric whose history is shown first: the newest change, otherwise a step's time or peak."""
    for change in reversed(history.changes):
        if (change.machine, change.case, change.metric) in history.series:
            return [change.case, change.metric]
    wanted = ("step_over_control", "step_seconds", "tensor_peak_bytes", "plan.peak_bytes", "seconds")
    found = [one for metric in wanted for one in history.series.values() if one.metric == metric]
    first = next(iter(found or history.series.values()), None)
    return None if first is None else [first.case, first.metric]
