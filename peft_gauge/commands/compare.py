"""``peft-gauge compare``: saved runs against a base, figure by figure, with an exit code."""

from __future__ import annotations

from pathlib import Path  # typer reads the annotations at run time
from typing import TYPE_CHECKING, Annotated

import typer

from peft_gauge.errors import GaugeError

if TYPE_CHECKING:
    from peft_gauge.history.comparing import Comparison


def compare(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="BASE NEW...", help="Saved runs; a folder is the newest run in it.")
    ] = None,
    last: Annotated[
        int | None, typer.Option(help="Take the newest N runs of a machine instead; the oldest of them is BASE.")
    ] = None,
    results: Annotated[Path, typer.Option(help="Where --last looks.")] = Path("results"),
    machine: Annotated[str | None, typer.Option(help="Whose runs --last takes. Default: this machine's.")] = None,
    rules: Annotated[Path | None, typer.Option(help="How figures are judged. Default: fixtures/rules.toml.")] = None,
    across_machines: Annotated[
        bool, typer.Option("--across-machines", help="Let machines differ; compare only what carries no noise.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit code 1 also for what is missing, skipped or not comparable.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Show also what stayed the same.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, such as for a job's summary.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
) -> None:
    """Compare each NEW with BASE: same, better, worse or cannot tell, with interval and likely cause.

    Exit code 0 where nothing got worse, 1 where something did, 2 where runs are not comparable or cannot be read.
    """
    from peft_gauge.history import comparing
    from peft_gauge.history.reading import read_run
    from peft_gauge.history.rules import read_rules

    paths = _chosen(runs or [], last, results, machine)
    judged_by = read_rules(rules)
    base, *others = map(read_run, paths)
    comparisons = [comparing.compare(base, new, judged_by, across_machines=across_machines) for new in others]
    if json_file is not None:
        _write_json(json_file, comparisons, strict)
    _print(comparisons, markdown, everything)
    for comparison in comparisons:
        if comparison.incomparable is not None:
            raise GaugeError(_not_comparable(comparison, across_machines))
    raise typer.Exit(max(comparison.exit_code(strict=strict) for comparison in comparisons))


def _chosen(runs: list[Path], last: int | None, results: Path, machine: str | None) -> list[Path]:
    """The files to compare, BASE first; raises `GaugeError` for fewer than two."""
    from peft_gauge.history.reading import runs_in

    if last is None:
        if len(runs) < 2:
            raise GaugeError("compare needs BASE and at least one NEW, or --last N")
        return [_newest(path) for path in runs]
    if runs:
        raise GaugeError("name runs or give --last, not both")
    if last < 2:
        raise GaugeError(f"--last {last}: a comparison needs at least 2 runs")
    owner = machine or _this_machine()
    found = runs_in(results, owner)
    if len(found) < last:
        raise GaugeError(f"--last {last}: {results / owner} has {len(found)} saved runs")
    return found[-last:]


def _newest(path: Path) -> Path:
    """``path``, or the newest run in it if it is a folder."""
    from peft_gauge.history.reading import runs_in

    if not path.is_dir():
        return path
    found = runs_in(path)
    if not found:
        raise GaugeError(f"{path} holds no saved run")
    folders = {run.parent for run in found}
    if len(folders) > 1:
        raise GaugeError(f"{path} holds runs of several machines; name one: {', '.join(sorted(map(str, folders)))}")
    return found[-1]


def _this_machine() -> str:
    from peft_gauge.machine import machine_info

    return str(machine_info()["name"])


def _write_json(path: Path, comparisons: list[Comparison], strict: bool) -> None:
    from peft_gauge.history.writing import write_whole
    from peft_gauge.report import comparison

    try:
        write_whole(path, comparison.as_json(comparisons, strict=strict))
    except OSError as error:
        raise GaugeError(f"cannot write {path}: {error.strerror or error}") from error


def _print(comparisons: list[Comparison], markdown: bool, everything: bool) -> None:
    from rich.console import Console

    from peft_gauge.report import comparison

    if markdown:
        print(comparison.as_markdown(comparisons, everything=everything), end="")
    else:
        width = Console().width
        print("\n".join(comparison.as_terminal(each, width, everything=everything) for each in comparisons), end="")


def _not_comparable(comparison: Comparison, across_machines: bool) -> str:
    hint = "" if across_machines or "machines" not in str(comparison.incomparable) else "; --across-machines compares"
    hint += " what carries no noise" if hint else ""
    return f"{comparison.new} and {comparison.base} are not comparable: {comparison.incomparable}{hint}"
