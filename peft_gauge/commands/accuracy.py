"""``peft-gauge accuracy``: planned against measured memory, as a plot or a table."""

from __future__ import annotations

import sys
from pathlib import Path  # typer reads the annotations at run time
from typing import TYPE_CHECKING, Annotated

import typer

from peft_gauge.commands.tables import AsCsv, AsJson, AsMarkdown, form_of, print_rows
from peft_gauge.errors import GaugeError

if TYPE_CHECKING:
    from peft_gauge.report.charts.accuracy_picture import Step


def accuracy(
    run: Annotated[Path, typer.Argument(help="Saved run of benchmarks/test_published.py with steps on a GPU.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Plot to write, .svg or .png; its data is written next to it as .csv (default: no plot)."),
    ] = None,
    where: Annotated[str, typer.Option(help="The GPU that was measured, for the title.")] = "an NVIDIA H200",
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Plot the planned peak memory of the steps of a saved run against the measured one, or print both as a table."""
    from peft_gauge.history.reader import read_run
    from peft_gauge.report.charts import accuracy_picture
    from peft_gauge.report.charts.memory_picture import check_destination
    from peft_gauge.training import methods

    form = form_of(as_json, as_csv, as_markdown)
    if run.is_dir():
        raise GaugeError(f"{run} is a folder; give the file of a saved run")
    if out is not None:
        check_destination(out)
    steps = accuracy_picture.steps_of(read_run(run), sorted(methods.METHODS, key=len, reverse=True))
    titles = _sort(steps)
    if out is not None:
        data = accuracy_picture.save(steps, titles, where, out)
        print(f"wrote {out} and its data, {data}", file=sys.stdout if form is None else sys.stderr)
    if out is None or form is not None:
        print_rows(accuracy_picture.rows_of(steps), form)


def _sort(steps: list[Step]) -> dict[str, str]:
    """Sort ``steps`` by their methods; returns the title of each method, where a variant has its parent's."""
    from peft_gauge.training import methods

    default = [method.name for method in methods.DEFAULT_METHODS]
    parents = {name: next(each for each in default if name.split("-")[0] == each) for name in methods.METHODS}
    titles = {name: methods.get(parents[name]).title for name in methods.METHODS}
    steps.sort(key=lambda step: default.index(parents[step.method]))
    return titles
