"""The tables of the page: everything that a plot shows, as text and numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_gauge.report import comparison as words
from peft_gauge.report.charts import plots
from peft_gauge.report.format import ABSENT, step_conditions
from peft_gauge.report.html import page_data, page_rows, tasks
from peft_gauge.report.html.page_cells import any_value, number, plain, seconds, size, table, text, verdict
from peft_gauge.report.html.page_history import subject_of
from peft_gauge.report.rows import PHASES, label

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from peft_gauge.history.comparison import RunComparison
    from peft_gauge.history.reader import Run
    from peft_gauge.report.html.page_cells import Line
    from peft_gauge.report.html.page_data import Answering, Machine, Report
    from peft_gauge.report.html.page_history import History
    from peft_gauge.report.html.page_rows import Row

# One table each


def machines(report: Report) -> str:
    headings = (
        "machine",
        "run",
        "ended (UTC)",
        "cases",
        "of",
        "compared with",
        "worse",
        "better",
        "inconclusive",
        "same",
    )
    return table(
        "t-machines",
        "Runs with each machine’s newest results, and changes since the newest earlier run of the same cases",
        headings,
        [
            ({"machine": name}, _machine(name, answering))
            for name, machine in report.machines.items()
            for answering in machine.answering
        ],
    )


def _machine(name: str, answering: Answering) -> list[str]:
    run, compared = answering.run, answering.comparison
    part = "" if run.shards is None else f", {run.shards.name}"
    about = run.name + part + (", interrupted" if run.interrupted else "")
    benchmarks = ", ".join(dict.fromkeys(case.benchmark.removeprefix("test_") for case in run.cases))
    cells = [text(name), text(about), text(f"{run.when:%Y-%m-%d %H:%M}"), plain(len(run.cases), "{}"), text(benchmarks)]
    if compared is None or answering.base is None:
        return [*cells, text("none: no comparable earlier run"), *[ABSENT] * 4]
    counts = [compared.counts[verdict] for verdict in ("worse", "better", "inconclusive", "same")]
    return [*cells, text(answering.base.name), *(plain(count, "{}") for count in counts)]


def environment(machine: Machine) -> list[str]:
    """Other differences between each run and its base, and notes: lines of HTML."""
    return [
        text(f"run {each.run.name}: {line}")
        for each in machine.answering
        if each.comparison is not None
        for line in words.heading(each.comparison)[1:]
    ]


def compared(name: str, report: Report, wanted: Sequence[str]) -> str:
    """The rows of all comparisons with ``wanted`` verdicts; empty text if there are none."""
    lines: list[Line] = []
    answering = [(name, each) for name, machine in report.machines.items() for each in machine.answering]
    for machine_name, each in answering:
        if each.comparison is None or each.base is None:
            continue
        runs = text(f"{each.base.name} → {each.run.name}")
        lines += [
            ({**about, "machine": machine_name}, [verdict(row.verdict), *cells, runs])
            for row, about, cells in _rows(each.run, each.comparison)
            if row.verdict in wanted
        ]
    headings = ("verdict", "case", "metric", "before", "after", "change", "judged", "cause or note", "runs")
    return table(name, f"Newest results against earlier ones: {', '.join(wanted)}", headings, lines) if lines else ""


def _rows(run: Run, comparison: RunComparison) -> Iterable[tuple[Any, Row, list[str]]]:
    subjects = {name: subject_of(case.metrics) for name, case in page_data.case_subjects(run).items()}
    for line in words.shown_lines(comparison, everything=False):
        row, told_as = line.rows[0], line.cells
        kind = f"{told_as.metric} ({row.label})" if row.label else told_as.metric
        rest = (told_as.change, told_as.judged, told_as.remark.removesuffix("; --all shows each"))
        if len(line.rows) > 1:
            yield row, {}, [text(told_as.case), text(kind), text(told_as.before), text(told_as.after), *map(text, rest)]
            continue
        values = [any_value(row.metric, value) for value in (row.before, row.after)]
        model = {"model": row.test.partition("[")[2].rstrip("]")} if row.test.startswith("claim::") else {}
        about = subjects.get(row.test, model)
        yield row, about, [text(told_as.case), text(kind), *values, *map(text, rest)]


def methods(report: Report) -> str:
    lines: list[Line] = []
    for name, machine in report.machines.items():
        for row in page_rows.methods_told([each.run for each in machine.answering]):
            about = {"machine": name, "model": row["model"], "method": row["method"]}
            cells = [
                text(label(row)),
                text(f"{row['model']} on {row['device']}"),
                text(step_conditions(row.get("settings") or {})),
                plain(row.get("trainable_params"), "{:,}"),
                plain(row.get("percent_of_base"), "{:.4f}"),
                size(row.get("adapter_disk_bytes")),
                *(seconds(row.get(f"{phase}_seconds")) for phase in PHASES),
                plain(row.get("step_over_control"), "{:.2f}"),
                plain(row.get("tokens_per_second"), "{:.0f}"),
                text("; ".join(map(str, row.get("unsteady") or [])) or None),
                text(row["run"]),
                text(name),
            ]
            lines.append((about, cells))
    headings = ("method", "model", "conditions", "trainable", "% of base", "on disk", *PHASES)
    rest = ("step / base forward", "tokens/s", "unsteady", "run", "machine")
    return table("t-methods", "Methods: parameter counts and median times", (*headings, *rest), lines)


def memory(rows: Sequence[Row]) -> str:
    """A row for each bar, a column for each category that occurs."""
    used = [name for name in plots.CATEGORIES if any(row["category"] == name for row in rows)]
    used += sorted({row["category"] for row in rows} - set(used))
    bars: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        bars.setdefault((row["panel"], row["label"], row["run"]), []).append(row)
    lines: list[Line] = []
    for (panel, name, _), parts in bars.items():
        by_category = {part["category"]: part["bytes"] for part in parts}
        sizes = [size(sum(by_category.values())), *(size(by_category.get(category)) for category in used)]
        lines.append((parts[0], [text(name), text(panel), text(parts[0]["run"]), *sizes]))
    names = [plots.category_name(category) if category in plots.CATEGORIES else category for category in used]
    return table("t-memory", "Peak memory of a step by category", ("method", "step", "run", "peak", *names), lines)


def planned(rows: Sequence[Row]) -> str:
    lines: list[Line] = [
        (
            row,
            [
                text(row["label"]),
                text(row["panel"]),
                text(row["run"]),
                *(size(row[f"{kind}_bytes"]) for kind in plots.KINDS),
                number(row["relative_error"], f"{100 * (row['relative_error'] or 0):+.1f} %"),
            ],
        )
        for row in rows
    ]
    headings = ("method and meter", "step", "run", *plots.KINDS, "measured vs. planned")
    return table("t-planned", "Peak memory: measured, planned, and ceiling", headings, lines)


def sequence(rows: Sequence[Row]) -> str:
    lines: list[Line] = [
        (
            row,
            [
                *(text(row[name]) for name in ("label", "panel", "run", "source")),
                plain(row["seq"], "{}"),
                size(row["bytes"]),
            ],
        )
        for row in rows
    ]
    headings = ("method", "model", "run", "planned or measured", "tokens", "peak")
    return table("t-sequence", "Peak memory at several sequence lengths", headings, lines)


def growth(report: Report) -> str:
    lines: list[Line] = [
        (
            row,
            [
                text(row["label"]),
                text(f"{row['model']}, {row['machine']}"),
                text("per token" if row.get("along") == "seq" else "per row"),
                text(f"{'batch' if row.get('along') == 'seq' else 'seq'} {row.get('held')}"),
                *(size(row.get(name)) for name in ("slope_bytes", "planned_slope_bytes")),
            ],
        )
        for machine in report.machines.values()
        for answering in machine.answering
        for row in page_rows.growth_rows(answering.run)
    ]
    headings = ("method", "model", "growth", "with", "measured", "planned")
    return table("t-growth", "Growth of the peak, in bytes per further token or row", headings, lines) if lines else ""


def times(rows: Sequence[Row]) -> str:
    lines: list[Line] = [
        (
            row,
            [
                text(row["label"]),
                text(row["panel"]),
                *(seconds(row[name]) for name in ("seconds", "low_seconds", "high_seconds")),
                plain(row["rounds"], "{}"),
                plain(row["processes"], "{}"),
                *(plain(row[f"over_control{end}"], "{:.2f}") for end in ("", "_low", "_high")),
                text(row["unsteady"]),
                text(row["run"]),
            ],
        )
        for row in rows
    ]
    interval = ("95 % interval from", "to")
    ratio = ("/ base forward", *interval)
    headings = ("case", "time of", "median", *interval, "rounds", "processes", *ratio, "unsteady", "run")
    return table("t-times", "Times: median, and a 95 % interval of the rounds’ median", headings, lines)


def quality(rows: Sequence[Row]) -> str:
    """A row for each point of a sweep and each cost."""
    lines: list[Line] = [
        (
            row,
            [
                text(row["label"]),
                text(row["task"]),
                text(tasks.cost_words(row["cost"])),
                any_value(row["cost"], row["value"]),
                text(row["quality_is"]),
                *(plain(row[name], "{:.7g}") for name in ("quality", "quality_low", "quality_high")),
                *(plain(row[name], "{}") for name in ("seeds", "diverged")),
                text("no" if row["front"] else "no quality" if row["quality"] is None else "yes"),
                text(row["test"]),
                text(row["run"]),
            ],
        )
        for row in rows
    ]
    measured = ("quality is", "quality", "lowest over seeds", "highest", "seeds", "diverged")
    headings = ("point", "task", "cost of", "cost", *measured, "dominated", "case", "run")
    return table("t-quality", "Sweeps: quality against cost", headings, lines)


def not_passed(report: Report) -> str:
    lines: list[Line] = []
    for name, machine in report.machines.items():
        for run in (answering.run for answering in machine.answering):
            subjects = page_data.case_subjects(run)
            for case in page_data.not_passed(run):
                about = {**subject_of(subjects[case.id].metrics), "machine": name}
                cells = [text(case.id.removeprefix("benchmarks/")), verdict(case.outcome), text(case.reason)]
                lines.append((about, [*cells, text(run.name), text(name)]))
    return table("t-outcomes", "Cases that did not pass", ("case", "outcome", "reason", "run", "machine"), lines)


def runs(history: History) -> str:
    """The runs in the history of the page, the newest first."""
    shown = sorted(history.shown_runs(), reverse=True)
    lines: list[Line] = [
        (
            {"machine": run.machine},
            [
                text(run.name),
                text(run.machine),
                text(run.when[:16].replace("T", " ")),
                text(run.commit),
                text(versions(run.libraries)),
                text(run.file),
            ],
        )
        for run in (history.runs[index] for index in shown)
    ]
    headings = ("run", "machine", "ended (UTC)", "commit", "libraries", "file")
    number = "All runs" if len(shown) == len(history.runs) else f"{len(shown):,} of {len(history.runs):,} runs"
    return table("t-runs", f"{number}, the newest first", headings, lines)


def versions(libraries: Mapping[str, str | None]) -> str:
    """Installed versions, such as "torch 2.13.0, peft 0.21.2"."""
    return ", ".join(f"{name} {version}" for name, version in libraries.items() if version is not None)
