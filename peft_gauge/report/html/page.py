"""One self-contained HTML page of saved runs: tables, plots, filters; its content security policy forbids network."""

from __future__ import annotations

import html
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_gauge.report.charts import plots
from peft_gauge.report.html import page_data, page_tables
from peft_gauge.report.html.page_cells import SUBJECT, text
from peft_gauge.report.html.page_history import MOST_RUNS, NEWEST_RUNS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from peft_gauge.report.html.page_data import Report, Row
    from peft_gauge.report.html.page_history import History, Series

ASSETS = Path(__file__).parent / "assets"
# Vega compiles its expressions with Function, hence 'unsafe-eval'; nothing may be loaded from anywhere.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
DIGITS = 7
"""Significant digits of non-integer values in a history: as many as are ever shown."""

ABOUT = {
    "memory": "Each bar is the peak memory of one step by category. Letters in the segments refer to the legend. "
    "Measured on a CPU or CUDA by tracking every tensor; planned without the device.",
    "planned": "Each measured peak with its plan and its ceiling, which the case must not exceed. Plans model CUDA’s "
    "kernels: on a CPU the distance is shown but not judged.",
    "sequence": "Peaks at several sequence lengths, all else equal. Solid lines are measured, dashed planned.",
    "times": "The median of a time and a 95 % interval of the rounds’ median, between two order statistics of rounds "
    "taken as independent. The interval shows the precision within this run, not the variation between runs.",
    "pareto": "Each point is one setting of a sweep: lower cost and higher quality are better. The line joins the "
    "points that no other dominates.",
}
TITLES = {
    "memory": "Memory by category",
    "planned": "Planned against measured",
    "sequence": "Memory against sequence length",
    "times": "Times",
    "pareto": "Quality against cost",
}
NOTHING = "No run has data for this."


def render(report: Report) -> str:
    """The page as HTML; raises `GaugeError` if the report extra is not installed."""
    library = vega()
    rows = {kind: report.rows(kind) for kind in page_data.PLOTTED}
    sections = _sections(report, rows)
    head = "".join(f'<li><a href="#{name}" data-section="{name}">{text(title)}</a></li>' for name, title, _ in sections)
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="h-{name}"><h2 id="h-{name}" tabindex="-1">{text(title)}</h2>\n{content}'
        "</section>"
        for name, title, content in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="color-scheme" content="light dark">
<title>peft-gauge report</title>
<style>
{_asset("page.css")}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header><h1>peft-gauge report</h1>
<p>{text("Shown: " + "; ".join(page_tables.shown_of(report)))}.
1 GB = 10⁹ bytes, 1 MB = 10⁶ bytes, 1 kB = 10³ bytes.</p>
<nav aria-label="Sections"><ul>{head}</ul></nav>
</header>
{_filters(report, rows)}
<main id="main">
<noscript><p>Without JavaScript there are no plots and no filters; every table below can be read.</p></noscript>
{body}
</main>
<script type="application/json" id="data">{_json(_data(report, rows))}</script>
<script>{_script(library)}</script>
<script>{_script(_asset("page.js"))}</script>
</body>
</html>
"""


@cache
def vega() -> str:
    """Vega, Vega-Lite and vega-embed in one script, in the version that Altair targets; takes seconds to bundle."""
    version = plots.vega_lite_version()
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version))


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _script(source: str) -> str:
    """``source`` without text that would end a script element or start a comment in it."""
    return source.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _json(data: object) -> str:
    document = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return document.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _filters(report: Report, rows: dict[str, list[Row]]) -> str:
    assert report.history is not None
    subjects = [*(row for some in rows.values() for row in some), *report.history.subjects.values()]
    subjects += [{"machine": name} for name in report.machines]
    selects = "".join(_select(name, _values(subjects, name)) for name in SUBJECT)
    return f"""<form class="filters" aria-label="Filters" role="search">{selects}
<button type="reset">Show all</button>
<a id="link" href="#">Link to this view</a>
<p id="status" role="status" aria-live="polite"></p></form>"""


def _values(rows: Iterable[Row], name: str) -> list[str]:
    return sorted({str(row[name]) for row in rows if row.get(name) is not None})


def _select(name: str, values: Sequence[str]) -> str:
    options = "".join(f'<option value="{html.escape(value)}">{text(value)}</option>' for value in values)
    return f'<label>{name}<select name="{name}"><option value="">all</option>{options}</select></label>'


def _sections(report: Report, rows: dict[str, list[Row]]) -> list[tuple[str, str, str]]:
    """(id, title, HTML) of each section, in the page's order."""
    assert report.history is not None
    made = {"memory": page_tables.memory, "planned": page_tables.planned, "sequence": page_tables.sequence}
    made |= {"times": page_tables.times, "pareto": page_tables.pareto}
    plotted = [
        (kind, TITLES[kind], _plot(kind, made[kind](some)) if some else f"<p>{NOTHING}</p>")
        for kind, some in rows.items()
        if some or kind != "pareto"
    ]
    growth = page_tables.growth(report)
    plotted = [(k, t, body + (_details(growth) if k == "sequence" and growth else "")) for k, t, body in plotted]
    return [
        ("summary", "Summary", _summary(report)),
        ("claims", "Claims", page_tables.claims(report)),
        ("methods", "Methods", page_tables.methods(report)),
        *plotted,
        ("history", "History", _history_section(report.history)),
        ("outcomes", "Cases that did not pass", page_tables.not_passed(report)),
        ("runs", "Runs", _details(page_tables.runs(report.history), "All runs")),
    ]


def _summary(report: Report) -> str:
    parts = []
    if report.left_out:
        lines = "".join(f"<li>{text(line)}</li>" for line in report.left_out)
        parts.append(f'<div class="warning" role="note"><p>Left out:</p><ul>{lines}</ul></div>')
    parts.append(page_tables.machines(report))
    for name, machine in report.machines.items():
        verdicts = page_data.counted(claim.verdict for claim in machine.claims)
        outcomes = page_data.counted(case.outcome for each in machine.answering for case in each.run.cases)
        told = f"cases: {outcomes or 'none'}" + (f"; claims: {verdicts}" if verdicts else "")
        parts.append(f'<p data-machine="{html.escape(name)}">{text(name)}: {text(told)}.</p>')
        notes = page_tables.environment(machine)
        if notes:
            lines = "".join(f"<li>{line}</li>" for line in notes)
            parts.append(f'<ul data-machine="{html.escape(name)}">{lines}</ul>')
    decided = page_tables.compared("t-decided", report, ("worse", "better"))
    parts.append(decided or "<p>No metric got worse or better in the newest results.</p>")
    rest = page_tables.compared("t-undecided", report, ("inconclusive", "same"))
    return "\n".join([*parts, *([_details(rest, "Undecided, new or missing")] if rest else [])])


def _plot(kind: str, own_table: str) -> str:
    title = html.escape(TITLES[kind])
    return (
        f'<p id="about-{kind}">{ABOUT[kind]}</p>\n'
        f'<div class="plot" data-plot="{kind}" role="group" aria-label="{title}: plots" '
        f'aria-describedby="about-{kind}"></div>\n{_details(own_table)}'
    )


def _details(content: str, heading: str = "Data as a table") -> str:
    return f"<details><summary>{text(heading)}</summary>{content}</details>"


def _history_section(history: History) -> str:
    return f"""<p id="about-history">Every metric over all runs of its machine. A change point (▲ worse, ▼ better) is
where <code>peft-gauge compare</code> reports a change from the previous run with the same case: by its interval for a
time, by its tolerance or exactly for anything else; and where the level of a time changes over many runs, which takes
about a dozen runs. Bars are 95 % intervals of the rounds’ median.{_thinning(history)}</p>
<form class="pick" aria-label="Which history">
<label>case<select name="case"></select></label>
<label>metric<select name="metric"></select></label>
<label>across<select name="across"><option value="history">dates</option>
<option value="versions">versions of the libraries</option></select></label></form>
<div class="plot" data-plot="history" role="group" aria-label="History: plot" aria-describedby="about-history"></div>
<details id="history-data"><summary>Data as a table</summary></details>
{page_tables.changes(history) if history.changes else "<p>No metric changed in any run.</p>"}"""


def _thinning(history: History) -> str:
    """Names the runs that are left out; empty text if there are none."""
    left_out = len(history.runs) - len(history.shown_runs())
    if not left_out:
        return ""
    return (
        f" Changes are found in all {len(history.runs):,} runs. Shown are each machine’s newest {NEWEST_RUNS}, "
        f"{MOST_RUNS - NEWEST_RUNS} evenly spaced earlier ones, and those with a change of the metric; the other "
        f"{left_out:,} are left out."
    )


# Data for the page's script


def _data(report: Report, rows: dict[str, list[Row]]) -> dict[str, Any]:
    assert report.history is not None
    labels = plots.labels_of([*rows["sequence"], *rows["memory"]])
    machines = list(report.machines)
    specs = {kind: plots.spec(kind, labels) for kind, some in rows.items() if some}
    return {
        "plots": {kind: plots.prepared(kind, some) for kind, some in rows.items()},
        "specs": specs | {kind: plots.spec(kind, machines) for kind in ("history", "versions")},
        "titles": TITLES,
        "history": history_data(report.history),
    }


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
    wanted = ("step_seconds", "tensor_peak_bytes", "plan.peak_bytes", "seconds")
    found = [one for metric in wanted for one in history.series.values() if one.metric == metric]
    first = next(iter(found or history.series.values()), None)
    return None if first is None else [first.case, first.metric]
