"""One self-contained HTML page of saved runs; its content security policy forbids network.

It opens with the method to use and the changes of an upgrade. Plots follow whose titles are questions, each with its
numbers as a table that opens on demand.
"""

from __future__ import annotations

import html
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from peft_gauge.report.charts import looks, panels, plots
from peft_gauge.report.html import page_changes, page_claims, page_data, page_setups, page_tables
from peft_gauge.report.html.page_cells import SUBJECT, details, text
from peft_gauge.report.html.page_history import MOST_RUNS, NEWEST_RUNS
from peft_gauge.report.html.page_script_data import script_data
from peft_gauge.report.html.setups import setups_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from peft_gauge.report.charts.looks import Look
    from peft_gauge.report.html.page_data import Machine, Report
    from peft_gauge.report.html.page_history import History
    from peft_gauge.report.html.page_rows import Row
    from peft_gauge.report.html.setups import Setup

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("state.js", "plots.js", "history.js", "page.js")
"""Parts of one script, in order; they share one scope."""
# Vega compiles its expressions with Function, hence 'unsafe-eval'; nothing may be loaded from anywhere.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)

ABOUT = {
    "times": "Medians with a 95 % interval of the rounds’ median, the fastest first. Hollow: unsteady. “Base forward” "
    "is a forward of the bare model before every round, which cancels the machine’s noise.",
    "memory": "Each bar is the peak of one step by category; letters refer to the legend. Measured by tracking every "
    "tensor, or planned without the device.",
    "quality": "Each point is one setting; up and to the left is better. Lines are the range over seeds, the dashed "
    "line joins the settings that no other beats. Hollow: one seed, or a seed diverged.",
    "planned": "Each measured peak (filled) with its plan and its ceiling, which a case must not exceed. Plans model "
    "CUDA’s kernels: on a CPU the distance is shown but not judged.",
    "sequence": "Peaks at several sequence lengths, all else equal. Filled points are measured, hollow ones planned.",
}
NOTHING = "No run has data for this."


def render(report: Report) -> str:
    """The page as HTML; raises `GaugeError` if the report extra is not installed."""
    library = vega()
    rows = {kind: report.rows(kind) for kind in panels.PLOTTED}
    setups = setups_of(report)
    of_methods = looks.looks_of(
        [*(each.name for setup in setups for each in setup.methods)]
        + [row["label"] for kind in ("times", "sequence") for row in rows[kind]]
    )
    sections = _sections(report, rows, setups, of_methods)
    head = "".join(
        f'<li><a href="#{name}" data-section="{name}">{text(short)}</a></li>' for name, short, *_ in sections
    )
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="h-{name}"><h2 id="h-{name}" tabindex="-1">{text(title)}</h2>\n{content}'
        "</section>"
        for name, _, title, content in sections
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
{_colours()}{_asset("page.css")}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header><h1>peft-gauge report</h1>
<p>{text(_about(report))}</p>
<nav aria-label="Sections"><ul>{head}</ul></nav>
</header>
{_filters(report, rows)}
<main id="main">
<noscript><p>Without JavaScript there are no plots and no filters; every table below can be read.</p></noscript>
{body}
</main>
<script type="application/json" id="data">{_json(script_data(report, rows, of_methods))}</script>
<script>{_script(library)}</script>
<script>"use strict";
(() => {{
{_script("".join(map(_asset, SCRIPTS)))}}})();
</script>
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


def _colours() -> str:
    """The colours of methods as classes, on a light and on a dark background."""
    light, dark = (
        "".join(f".m{place} {{ --own: {pair[side]}; }}\n" for place, pair in enumerate(looks.COLOURS))
        for side in (0, 1)
    )
    return f"{light}@media (prefers-color-scheme: dark) {{\n{dark}}}\n"


def _about(report: Report) -> str:
    """How much is on the page, and what its units mean."""
    assert report.history is not None
    runs, machines = len(report.history.runs), len(report.machines)
    newest = max(run.when for run in report.history.runs)[:10]
    return (
        f"{runs:,} run{'s' if runs != 1 else ''} of {machines:,} machine{'s' if machines != 1 else ''}, the newest of "
        f"{newest}. Each result is from the newest run that has it. 1 GB = 10⁹ bytes."
    )


def _filters(report: Report, rows: Mapping[str, list[Row]]) -> str:
    assert report.history is not None
    subjects = [*(row for some in rows.values() for row in some), *report.history.subjects.values()]
    subjects += [{"machine": name} for name in report.machines]
    selects = "".join(_select(name, _values(subjects, name)) for name in SUBJECT)
    return f"""<form class="filters" aria-label="Filters" role="search">{selects}
<button type="reset">Show all</button>
<a id="link" href="#">Link to this view</a>
<p id="status" class="sr" role="status" aria-live="polite"></p></form>"""


def _values(rows: Iterable[Mapping[str, object]], name: str) -> list[str]:
    return sorted({str(row[name]) for row in rows if row.get(name) is not None})


def _select(name: str, values: Sequence[str]) -> str:
    options = "".join(f'<option value="{html.escape(value)}">{text(value)}</option>' for value in values)
    return f'<label>{name}<select name="{name}"><option value="">all</option>{options}</select></label>'


def _sections(
    report: Report, rows: Mapping[str, list[Row]], setups: Sequence[Setup], of_methods: Mapping[str, Look]
) -> list[tuple[str, str, str, str]]:
    """(id, name in the navigation, title, HTML) of each section, in the page's order."""
    assert report.history is not None
    titles = panels.TITLES
    return [
        ("choice", "Choice", "Which method should I use?", _choice(report, setups, of_methods)),
        ("changed", "Changes", "What did the upgrade change?", _changed(report)),
        ("times", "Time", titles["times"], _times(rows)),
        ("memory", "Memory", titles["memory"], _memory(rows, report)),
        ("quality", "Quality", titles["quality"], _quality(rows)),
        ("claims", "Claims", "Do the claims of the literature hold?", page_claims.claims(report)),
        ("history", "History", titles["history"], _history_section(report.history)),
        ("sources", "Sources", "Where are these numbers from?", _sources(report)),
    ]


def _choice(report: Report, setups: Sequence[Setup], of_methods: Mapping[str, Look]) -> str:
    everything = details(page_tables.methods(report), "All numbers of all methods")
    return page_setups.blocks(setups, report.machines, of_methods) + everything


def _changed(report: Report) -> str:
    assert report.history is not None
    decided = page_tables.compared("t-decided", report, ("worse", "better"))
    rest = page_tables.compared("t-undecided", report, ("inconclusive", "same"))
    return "\n".join(
        [
            page_changes.changed(report.history),
            *([details(decided, "Newest results against the runs before them")] if decided else []),
            *([details(rest, "Undecided, new or missing")] if rest else []),
        ]
    )


def _times(rows: Mapping[str, list[Row]]) -> str:
    return _plot("times", "time", page_tables.times(rows["times"])) if rows["times"] else f"<p>{NOTHING}</p>"


def _memory(rows: Mapping[str, list[Row]], report: Report) -> str:
    if not rows["memory"]:
        return f"<p>{NOTHING}</p>"
    parts = [_plot("memory", "step", page_tables.memory(rows["memory"]))]
    growth = page_tables.growth(report)
    tables = {"planned": page_tables.planned(rows["planned"]), "sequence": page_tables.sequence(rows["sequence"])}
    tables["sequence"] += details(growth, "Growth per token and row") if growth else ""
    parts += [details(_plot(kind, "step", own), panels.TITLES[kind]) for kind, own in tables.items() if rows[kind]]
    if growth and not rows["sequence"]:
        parts.append(details(growth, "Growth per token and row"))
    return "\n".join(parts)


def _quality(rows: Mapping[str, list[Row]]) -> str:
    if not rows["quality"]:
        return f"<p>{NOTHING} Sweeps over methods, ranks and modules have it: <code>pytest -m slow</code>.</p>"
    return _plot(
        "quality", "task", page_tables.quality(rows["quality"]), more='<label>cost<select name="cost"></select></label>'
    )


def _plot(kind: str, choice: str, own_table: str, *, more: str = "") -> str:
    title = html.escape(panels.TITLES[kind])
    return (
        f'<form class="pick" aria-label="{title} Which {choice}">'
        f'<label>{choice}<select name="{kind}"></select></label>{more}</form>\n'
        f'<div class="plot" data-plot="{kind}" role="group" aria-label="{title}" '
        f'aria-describedby="about-{kind}"></div>\n<details class="about"><summary>How to read it</summary>'
        f'<p id="about-{kind}">{ABOUT[kind]}</p></details>\n'
        f"{details(own_table, 'Data as a table')}"
    )


def _history_section(history: History) -> str:
    title = panels.TITLES["history"]
    return f"""<form class="pick" aria-label="Which metric" role="search">
<label>search a case or metric<input type="search" name="find" autocomplete="off" placeholder="lora step"></label>
<label>across<select name="across"><option value="history">dates</option>
<option value="versions">versions of the libraries</option></select></label></form>
<p id="found" role="status" aria-live="polite"></p><ul id="hits" class="tree"></ul>
<details id="browse"><summary>Browse all cases and metrics</summary><ul id="tree" class="tree"></ul></details>
<div class="plot" data-plot="history" role="group" aria-label="{title}" aria-describedby="about-history"></div>
<details class="about"><summary>How to read it</summary>
<p id="about-history">Triangles are changes (▲ worse, ▼ better): where <code>peft-gauge compare</code>
reports one against the previous run with the same case, and where the level of a time changes over about a dozen runs
or more. Bars are 95 % intervals of the rounds’ median.{_thinning(history)}</p></details>
<details id="history-data"><summary>Data as a table</summary></details>"""


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


def _sources(report: Report) -> str:
    assert report.history is not None
    parts = []
    if report.left_out:
        lines = "".join(f"<li>{text(line)}</li>" for line in report.left_out)
        parts.append(f'<div class="warning" role="note"><p>Left out:</p><ul>{lines}</ul></div>')
    told = "".join(
        f'<li data-machine="{html.escape(name)}">{text(name)}: {text(_outcomes(machine))}</li>'
        for name, machine in report.machines.items()
    )
    notes = "".join(
        f'<li data-machine="{html.escape(name)}">{line}</li>'
        for name, machine in report.machines.items()
        for line in page_tables.environment(machine)
    )
    parts += [
        details(f"<ul>{told}</ul>{page_tables.machines(report)}", "Newest runs, and what each was compared with"),
        *([details(f"<ul>{notes}</ul>", "Differences of libraries, commits and hosts")] if notes else []),
        details(page_tables.not_passed(report), "Cases that did not pass"),
        details(page_tables.runs(report.history), "All runs"),
    ]
    return "\n".join(parts)


def _outcomes(machine: Machine) -> str:
    """The outcomes of all newest cases, and the runs that they are from."""
    outcomes = page_data.counted(case.outcome for each in machine.answering for case in each.run.cases)
    return f"{outcomes or 'no cases'}; {page_data.named([each.run for each in machine.answering])}"
