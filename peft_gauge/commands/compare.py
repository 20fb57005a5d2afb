"""``peft-gauge compare``: compare saved runs with a base run, metric by metric, with an exit code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path  # typer reads the annotations at run time
from typing import TYPE_CHECKING, Annotated

import typer

from peft_gauge.commands.tables import AsCsv, Form, form_of, print_csv
from peft_gauge.errors import GaugeError
from peft_gauge.history import store

if TYPE_CHECKING:
    from peft_gauge.history.comparison import RunComparison
    from peft_gauge.history.selection import Chosen

STANDARD_OUTPUT = Path("-")


def compare(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN",
            help="Saved runs: BASE, then one or more NEW. For a folder, its newest run that has cases in common "
            "with the others. A single run is NEW; BASE is then the newest earlier run with cases in common.",
            parser=store.place,
        ),
    ] = None,
    last: Annotated[
        int | None,
        typer.Option(help="Compare a machine's newest N runs that have cases in common; the oldest of them is BASE."),
    ] = None,
    results: Annotated[
        Path, typer.Option(help="Folder or address of runs for --last.", metavar="DIR", parser=store.place)
    ] = Path("results"),
    machine: Annotated[str | None, typer.Option(help="Machine for --last (default: this one).")] = None,
    rules: Annotated[Path | None, typer.Option(help="Rules for metrics (default: fixtures/rules.toml).")] = None,
    across_machines: Annotated[
        bool,
        typer.Option("--across-machines", help="Compare runs from different hardware, by deterministic metrics only."),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Exit with code 1 also for missing, unmeasured, skipped or incomparable cases."),
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Show every metric, unchanged ones included.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for example for a CI summary.")] = False,
    as_csv: AsCsv = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the full comparison to this file; - prints it instead."),
    ] = None,
) -> None:
    """Compare each NEW with BASE: same, better, worse or inconclusive, with interval and likely cause.

    Exit code 0: no regression found; 1: regression; 2: runs not comparable or not readable.
    """
    from peft_gauge.history import comparison
    from peft_gauge.history.rules import read_rules

    chosen = _chosen(runs or [], last, results, machine)
    judged_by = read_rules(rules)
    base, *others = chosen.runs
    comparisons = [comparison.compare(base, new, judged_by, across_machines=across_machines) for new in others]
    comparisons = [replace(each, notes=(*chosen.passed_over, *each.notes)) for each in comparisons]
    form = form_of(json_file == STANDARD_OUTPUT, as_csv, markdown)
    if json_file not in (None, STANDARD_OUTPUT):
        _write_json(json_file, comparisons, strict)
    print_comparisons(comparisons, form, everything=everything, strict=strict)
    for each in comparisons:
        if each.incomparable is not None:
            raise GaugeError(_not_comparable(each, across_machines))
    raise typer.Exit(max(each.exit_code(strict=strict) for each in comparisons))


def _chosen(runs: list[Path], last: int | None, results: Path, machine: str | None) -> Chosen:
    """The runs to compare, BASE first; raises `GaugeError` for fewer than two."""
    from peft_gauge.history import selection
    from peft_gauge.history.reader import runs_in

    if last is None:
        if not runs:
            raise GaugeError("give a saved run, or BASE and at least one NEW, or --last N")
        if len(runs) > 1:
            return selection.of_each(list(map(_candidates, runs)))
        return selection.newest_in_common(_candidates(runs[0]), 2) if store.is_folder(runs[0]) else _with_base(runs[0])
    if runs:
        raise GaugeError("give runs or --last, not both")
    if last < 2:
        raise GaugeError(f"--last must be at least 2, got {last}")
    owner = machine or _this_machine()
    found = runs_in(results, owner)
    if len(found) < last:
        raise GaugeError(f"--last {last}: {store.shown(results / owner)} has {len(found)} saved runs")
    return selection.newest_in_common(found, last)


def _with_base(path: Path) -> Chosen:
    """The run in ``path`` and, as BASE, the newest earlier run in its folder that has cases in common with it."""
    from peft_gauge.history import selection
    from peft_gauge.history.reader import read_run, runs_in

    new = read_run(path)
    beside = runs_in(path.parent)
    names = [each.name for each in beside]
    before = beside[: names.index(path.name)] if path.name in names else beside
    found = selection.newest_base(before, new.cases)
    if not found.runs:
        number = f"none of the {len(before)} runs" if before else "no run"
        raise GaugeError(
            f"{store.shown(path)}: {number} before it in its folder has cases in common with it; give BASE, too"
        )
    return replace(found, runs=(*found.runs, new))


def _candidates(path: Path) -> list[Path]:
    """``path``, or the runs in it if it is a folder, oldest first."""
    from peft_gauge.history.reader import runs_in

    if not store.is_folder(path):
        return [path]
    found = runs_in(path)
    if not found:
        raise GaugeError(f"{store.shown(path)} contains no saved runs")
    folders = {run.parent for run in found}
    if len(folders) > 1:
        names = ", ".join(sorted(map(store.shown, folders)))
        raise GaugeError(f"{store.shown(path)} contains runs of several machines; name one: {names}")
    return found


def _this_machine() -> str:
    from peft_gauge.machine import machine_info

    return str(machine_info()["name"])


def _write_json(path: Path, comparisons: list[RunComparison], strict: bool) -> None:
    from peft_gauge.files import write_whole
    from peft_gauge.report import comparison

    try:
        write_whole(path, comparison.as_json(comparisons, strict=strict))
    except OSError as error:
        raise GaugeError(f"cannot write {path}: {error.strerror or error}") from error


def print_comparisons(
    comparisons: list[RunComparison], form: Form | None, *, everything: bool = False, strict: bool = False
) -> None:
    """Print ``comparisons``; JSON and comma-separated values have every metric, whatever ``everything`` is."""
    from rich.console import Console

    from peft_gauge.report import comparison

    if form == "json":
        print(comparison.as_json(comparisons, strict=strict), end="")
    elif form == "csv":
        print_csv(comparison.csv_rows(comparisons), comparison.CSV_COLUMNS)
    elif form == "markdown":
        print(comparison.as_markdown(comparisons, everything=everything), end="")
    else:
        width = Console().width
        print("\n".join(comparison.as_terminal(each, width, everything=everything) for each in comparisons), end="")


def _not_comparable(comparison: RunComparison, across_machines: bool) -> str:
    hint = "" if across_machines or "machines" not in str(comparison.incomparable) else "; add --across-machines to"
    hint += " compare deterministic metrics only" if hint else ""
    return f"{comparison.new} and {comparison.base} are not comparable: {comparison.incomparable}{hint}"
