"""A machine's newest results, or one run's, as GitHub Markdown for the summary of a nightly job."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_gauge.errors import one_line
from peft_gauge.history.metrics import environment_changes, machine_changes
from peft_gauge.report.comparison import in_markdown
from peft_gauge.report.format import ABSENT, shown, shown_bytes, shown_seconds, step_conditions
from peft_gauge.report.html import page_data, page_rows
from peft_gauge.report.html.page_history import machine_of
from peft_gauge.report.rows import PHASES, label
from peft_gauge.report.terminal import sweep_table

if TYPE_CHECKING:
    from peft_gauge.history.ledger import Standing
    from peft_gauge.history.reader import Run
    from peft_gauge.history.schema import CaseRecord

MOST_SKIPPED = 20
"""Number of skipped cases listed with their reason; on a small machine most cases are skipped."""
REASON_LIMIT = 200


def escape(value: object) -> str:
    """``value`` on one line, with special characters of Markdown and HTML escaped."""
    return in_markdown(one_line(value))


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], *, texts: int = 1) -> list[str]:
    """The lines of a table whose first ``texts`` columns are texts and the others numbers."""
    rule = ["---"] * texts + ["--:"] * (len(headings) - texts)
    lines = [f"| {' | '.join(map(escape, row))} |" for row in rows]
    return [f"| {' | '.join(headings)} |", f"| {' | '.join(rule)} |", *lines]


def summary(runs: Sequence[Run], claims: Sequence[Standing]) -> str:
    """One machine's results as Markdown: machine, versions, claims, methods, memory with plan and ceiling, sweeps,
    failures.

    ``runs``: one, or those that together have the newest results, newest first, each with its cases among them;
    ``claims``: the newest verdicts. With several runs, each line of a table names its own.
    """
    newest, *_ = runs
    parts = [
        [f"## {escape(machine_of(newest))}, {escape(page_data.named(runs))}"],
        list(_about(runs, claims)),
        list(_methods(runs)),
        list(_memory(runs)),
        list(_plans(runs)),
        *(_sweep(runs, run, case) for run in runs for case in sweep_table.swept(run.cases)),
        list(_not_passed(runs)),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def _about(runs: Sequence[Run], claims: Sequence[Standing]) -> Iterator[str]:
    run, *earlier = runs
    accelerator = run.machine.get("accelerator") or {}
    cpu = run.machine.get("cpu") or {}
    threads = f", {run.machine['threads']} threads" if run.machine.get("threads") is not None else ""
    part = "" if run.shards is None else f", **{run.shards.name} only**"
    end = ", **interrupted before all its cases**" if run.interrupted else ""
    yield f"- ended {run.when:%Y-%m-%d %H:%M %Z}{part}{end}"
    yield f"- processor: {escape(cpu.get('brand_raw') or ABSENT)}, {escape(cpu.get('count') or ABSENT)} cores{threads}"
    memory = shown_bytes(accelerator.get("memory_bytes"))
    yield (
        f"- accelerator: {escape(accelerator['name'])}, {memory}" if accelerator.get("name") else "- accelerator: none"
    )
    libraries = {"Python": run.machine.get("python_version"), **run.libraries}
    libraries |= {"driver": accelerator.get("driver"), "CUDA": accelerator.get("cuda")}
    told = [f"{name} {version}" for name, version in libraries.items() if version is not None]
    yield f"- versions: {escape(', '.join(told))}"
    if run.commit.get("id"):
        yield f"- commit: {escape(str(run.commit['id'])[:12])}{', with changes' if run.commit.get('dirty') else ''}"
    yield f"- cases: {page_data.counted(case.outcome for each in runs for case in each.cases) or 'none'}"
    yield f"- claims: {page_data.counted(claim.verdict for claim in claims) or 'none'}"
    if earlier:
        yield from (f"- run {escape(each.name)}: {_answers(each, run)}" for each in runs)


def _answers(run: Run, newest: Run) -> str:
    """The benchmarks with results from ``run`` and their numbers of cases, its end, and what changed since."""
    benchmarks = Counter(case.benchmark for case in run.cases)
    told = ", ".join(f"{escape(benchmark)} ({number})" for benchmark, number in benchmarks.items()) or "no cases"
    changed = [escape(change) for change in [*machine_changes(run, newest), *environment_changes(run, newest)]]
    part = "" if run.shards is None else f", {run.shards.name}"
    when = f"ended {run.when:%Y-%m-%d %H:%M %Z}{part}{', interrupted' if run.interrupted else ''}"
    return f"{told}; {when}" + (f"; since then {'; '.join(changed)}" if changed else "")


def _with_run(runs: Sequence[Run], headings: Sequence[str]) -> list[str]:
    """A table's ``headings``, with a column for the run if there are several."""
    return [*headings, "run"] if len(runs) > 1 else [*headings]


def _in_run(runs: Sequence[Run], cells: Sequence[str], name: str) -> list[str]:
    return [*cells, name] if len(runs) > 1 else [*cells]


def _where(row: dict[str, Any]) -> str:
    return f"{row['model']} on {row['device']}"


def _methods(runs: Sequence[Run]) -> Iterator[str]:
    rows = page_rows.methods_told(runs)
    if not rows:
        return
    yield "### Methods"
    yield ""
    headings = (
        *("method", "model", "conditions", "trainable", "% of base", "on disk"),
        *(*PHASES, "step / base forward", "tokens/s"),
    )
    yield from table(_with_run(runs, headings), (_in_run(runs, _method(row), row["run"]) for row in rows), texts=3)
    yield ""
    yield "Medians; step / base forward: both timed in the same round. 1 GB = 10⁹ bytes."
    for row in rows:
        if row.get("unsteady"):
            yield f"- unsteady: {escape(label(row))} on {escape(_where(row))}: {escape('; '.join(row['unsteady']))}"


def _method(row: dict[str, Any]) -> list[str]:
    return [
        label(row),
        _where(row),
        step_conditions(row.get("settings") or {}),
        shown(row.get("trainable_params"), "{:,}"),
        shown(row.get("percent_of_base"), "{:.4f}"),
        shown_bytes(row.get("adapter_disk_bytes")),
        *(shown_seconds(row.get(f"{phase}_seconds")) for phase in PHASES),
        shown(row.get("step_over_control"), "{:.2f}"),
        shown(row.get("tokens_per_second"), "{:.0f}"),
    ]


def _memory(runs: Sequence[Run]) -> Iterator[str]:
    rows = [(run, row) for run in runs for row in page_rows.planned_rows(run)]
    if not rows:
        return
    yield "### Memory of a step, measured"
    yield ""
    headings = ("method and meter", "step", "measured", "planned", "of plan", "ceiling")
    yield from table(_with_run(runs, headings), (_in_run(runs, _measured(row), run.name) for run, row in rows), texts=2)


def _measured(row: dict[str, Any]) -> list[str]:
    return [
        row["label"],
        row["panel"],
        shown_bytes(row["measured_bytes"]),
        shown_bytes(row["planned_bytes"]),
        f"{100 * row['measured_bytes'] / row['planned_bytes']:.1f} %" if row["planned_bytes"] else ABSENT,
        _ceiling(row["measured_bytes"], row["ceiling_bytes"]),
    ]


def _ceiling(measured: int, limit: int | None) -> str:
    return (
        f"{shown_bytes(limit)}, EXCEEDED BY {shown_bytes(measured - limit)}"
        if limit and measured > limit
        else shown_bytes(limit)
    )


def _plans(runs: Sequence[Run]) -> Iterator[str]:
    plans = [(run, plan) for run in runs for plan in page_rows.plans_of(run)]
    if not plans:
        return
    yield "### Memory of a step, planned"
    yield ""
    headings = ("method", "model", "conditions", "resident", "peak", "reserved", "device", "peak in")
    yield from table(_with_run(runs, headings), (_in_run(runs, _plan(plan), run.name) for run, plan in plans), texts=3)


def _plan(plan: Mapping[str, Any]) -> list[str]:
    sizes = ("resident_bytes", "peak_bytes", "reserved_bytes_estimate", "device_bytes_estimate")
    return [
        plan["method"],
        plan["model"],
        step_conditions(plan["settings"]),
        *(shown_bytes(plan.get(name)) for name in sizes),
        plan.get("phase_of_peak") or ABSENT,
    ]


def _sweep(runs: Sequence[Run], run: Run, case: CaseRecord) -> list[str]:
    headings, lines = sweep_table.told(case.metrics)
    about = [sweep_table.knees(case), sweep_table.note(case)]
    return [
        f"### {escape(sweep_table.title(case))}{f' (run {escape(run.name)})' if len(runs) > 1 else ''}",
        "",
        *table(headings, lines),
        *(line for each in about if each for line in ("", f"{escape(each)}.")),
    ]


def _not_passed(runs: Sequence[Run]) -> Iterator[str]:
    cases = [case for run in runs for case in page_data.not_passed(run)]
    if not cases:
        return
    broken = [case for case in cases if case.outcome != "skipped"]
    skipped = [case for case in cases if case.outcome == "skipped"]
    yield "### Cases that did not pass"
    yield ""
    told = [*broken, *skipped[:MOST_SKIPPED]]
    yield from table(
        ("outcome", "case", "reason"),
        (
            [case.outcome, case.id.removeprefix("benchmarks/"), one_line(case.reason or ABSENT, REASON_LIMIT)]
            for case in told
        ),
        texts=3,
    )
    if len(skipped) > MOST_SKIPPED:
        yield ""
        yield f"And {len(skipped) - MOST_SKIPPED} more skipped cases."
