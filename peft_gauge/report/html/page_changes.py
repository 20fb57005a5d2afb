"""What did the upgrade change? Each change as a coloured difference with a sparkline of its history."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from peft_gauge.history.metrics import is_number
from peft_gauge.report.format import ABSENT
from peft_gauge.report.html.page_cells import SIGNS, any_value, details, filterable, shown_value, table, text, verdict

if TYPE_CHECKING:
    from peft_gauge.report.html.page_cells import Line
    from peft_gauge.report.html.page_history import Change, History
    from peft_gauge.report.html.page_series import Series

MOST_CHANGES = 500
"""Of the table of changes; the newest ones are in it."""
MOST_ITEMS = 60
"""Items of the list; the page shows the first few that pass its filters."""
SHOWN_ITEMS = 4
SPARK_POINTS = 40
WIDTH, HEIGHT = 120, 28


@dataclass(frozen=True)
class Together:
    """Changes of one metric with one verdict on one day: an upgrade often changes many cases and machines alike."""

    changes: tuple[Change, ...]

    @property
    def largest(self) -> Change:
        return max(self.changes, key=lambda change: abs(_share(change) or 0))


def changed(history: History) -> str:
    """The list of changes, newest first, and in a run worse ones first; below it a table of all."""
    if not history.changes:
        return "<p>No metric got worse or better in any run.</p>"
    found = grouped(history)
    items = "\n".join(_item(history, each, place >= SHOWN_ITEMS) for place, each in enumerate(found[:MOST_ITEMS]))
    return (
        f'<ul class="changes" data-shown="{SHOWN_ITEMS}">{items}</ul>'
        '<p id="no-change" hidden>No change passes the filters.</p>'
        f"{details(_table(history), f'All {len(history.changes):,} changes')}"
    )


def grouped(history: History) -> list[Together]:
    """The changes, those of one day, metric and verdict together: newest days first, then worse and larger ones."""
    groups: dict[tuple[Any, ...], list[Change]] = {}
    for change in history.changes:
        word = change.after if isinstance(change.after, str) else None
        day = history.runs[change.run].when[:10]
        groups.setdefault((day, change.metric, change.verdict, word), []).append(change)
    found = [Together(tuple(group)) for group in groups.values()]
    found.sort(key=lambda each: (each.changes[0].verdict != "worse", -abs(_share(each.largest) or 0)))
    return sorted(found, key=lambda each: history.runs[each.changes[0].run].when[:10], reverse=True)


def _item(history: History, each: Together, hidden: bool) -> str:
    change = each.largest
    run = history.runs[change.run]
    series = history.series.get((change.machine, change.case, change.metric))
    because = f"<small>with {text('; '.join(change.environment[:3]))}</small>" if change.environment else ""
    level = " (its level over many runs)" if change.levels else ""
    values = [any_value(change.metric, value) for value in (change.before, change.after)]
    arrow = "" if change.before is None and change.after is None else f": {values[0]} → {values[1]}"
    name = _linked(change, series is not None, _names(each))
    return (
        f"<li{_subjects(history, each)}{' hidden' if hidden else ''}>"
        f'<span class="delta v {change.verdict}">{_sign(change)} {text(difference(change))}'
        f'<span class="sr"> {change.verdict}</span></span>'
        f"<span>{name}<br>{text(in_words(change.metric) + level)}{arrow}</span>"
        f"{sparkline(series, change.run) if series is not None else '<span></span>'}"
        f"<small>run {text(run.name)}, {run.when[:10]}, {text(change.machine)}</small>{because}</li>"
    )


def _subjects(history: History, each: Together) -> str:
    """The attributes by which an item is filtered: its method and model if all its changes share them, its machines."""
    subjects = [history.subjects.get(one.case, {}) for one in each.changes]
    shared = {
        name: values.pop()
        for name in ("method", "model")
        if len(values := {about.get(name) for about in subjects}) == 1 and None not in values
    }
    machines = html.escape("\n".join(dict.fromkeys(one.machine for one in each.changes)))
    return f'{filterable(shared)} data-machines="{machines}"'


def _names(each: Together) -> str:
    """The cases of an item, or their number and that with the largest change."""
    names = list(dict.fromkeys(_case_in_words(one.case) for one in each.changes))
    machines = len({one.machine for one in each.changes})
    where = f" on {machines} machines" if machines > 1 else ""
    most = f"{len(names)} cases{where}, most in {_case_in_words(each.largest.case)}"
    return most if len(names) > 3 else ", ".join(names) + where


def _sign(change: Change) -> str:
    """The sign of the new verdict or outcome, or else of the change."""
    word = change.after if isinstance(change.after, str) else ""
    return SIGNS.get(word) or SIGNS[change.verdict]


def _case_in_words(case: str) -> str:
    """A case by its test and parameters, such as "step lora-smollm2-135m-cpu"; a claim by its name and model."""
    test = case.removeprefix("benchmarks/").rpartition("::")[2] or case
    name, _, parameters = test.partition("[")
    if case.startswith("claim::"):
        return f"claim {name} on {parameters.rstrip(']')}"
    return f"{name.removeprefix('test_').replace('_', ' ')} {parameters.rstrip(']')}".strip()


def in_words(metric: str) -> str:
    """A metric's name without underscores, and without a unit that its value shows."""
    for unit in ("_seconds", "_bytes"):
        metric = metric.removesuffix(unit)
    return metric.replace("_over_control", " / base forward").replace("_", " ")


def difference(change: Change) -> str:
    """The change in per cent; for other values the new word, and from 0 the verdict."""
    share = _share(change)
    if share is not None:
        return "> +999 %" if share > 9.99 else f"{100 * share:+.3g} %"
    return text(change.after) if isinstance(change.after, str) else change.verdict


def _share(change: Change) -> float | None:
    before, after = change.before, change.after
    if is_number(before) and is_number(after) and before:
        return float(after / before - 1)
    return None


def sparkline(series: Series, run: int) -> str:
    """The newest values of ``series`` as a small line, with a mark at ``run``, the change."""
    values, runs = series.values[-SPARK_POINTS:], series.runs[-SPARK_POINTS:]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    step = (WIDTH - 10) / max(len(values) - 1, 1)
    points = [
        (5 + place * step, HEIGHT - 5 - (value - low) / span * (HEIGHT - 10)) for place, value in enumerate(values)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    mark = next(((x, y) for (x, y), at in zip(points, runs, strict=True) if at == run), points[-1])
    label = (
        f"{len(values)} runs, from {shown_value(series.metric, values[0])} to {shown_value(series.metric, values[-1])}"
    )
    return (
        f'<svg class="spark" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">'
        f'<polyline points="{line}"/><circle cx="{mark[0]:.1f}" cy="{mark[1]:.1f}" r="3.5"/></svg>'
    )


def _linked(change: Change, known: bool, name: str) -> str:
    if not known:
        return text(name)
    case = urlencode({"case": change.case, "metric": change.metric, "section": "history"})
    return f'<a class="to-history" href="#{html.escape(case)}">{text(name)}</a>'


def _table(history: History) -> str:
    newest = sorted(history.changes, key=lambda change: -change.run)[:MOST_CHANGES]
    lines: list[Line] = [
        ({**history.subjects.get(change.case, {}), "machine": change.machine}, _cells(history, change))
        for change in newest
    ]
    headings = ("verdict", "run", "ended (UTC)", "case", "metric", "before", "after", "other changes", "machine")
    more = f", the newest {MOST_CHANGES} of {len(history.changes)}" if len(history.changes) > MOST_CHANGES else ""
    return table("t-changes", f"Changes in the history{more}", headings, lines)


def _cells(history: History, change: Change) -> list[str]:
    run = history.runs[change.run]
    known = (change.machine, change.case, change.metric) in history.series
    values: list[Any] = [any_value(change.metric, value) for value in (change.before, change.after)]
    return [
        verdict(change.verdict),
        text(run.name),
        text(run.when[:16].replace("T", " ")),
        _linked(change, known, change.case.removeprefix("benchmarks/")),
        text(change.metric + (", its level over many runs" if change.levels else "")),
        *values,
        text("; ".join(change.environment) or ABSENT),
        text(change.machine),
    ]
