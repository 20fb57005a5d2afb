"""``peft-gauge accuracy``: plot planned against measured memory."""

from __future__ import annotations

from pathlib import Path  # typer reads the annotations at run time
from typing import Annotated

import typer

from peft_gauge.errors import GaugeError


def accuracy(
    run: Annotated[Path, typer.Argument(help="Saved run of benchmarks/test_published.py with steps on a GPU.")],
    out: Annotated[Path, typer.Option(help="Plot to write, .svg or .png; its data is written next to it as .csv.")],
    where: Annotated[str, typer.Option(help="The GPU that was measured, for the title.")] = "an NVIDIA H200",
) -> None:
    """Plot the planned peak memory of the steps of a saved run against the measured one."""
    from peft_gauge.history.reader import read_run
    from peft_gauge.report.charts import accuracy_picture
    from peft_gauge.report.charts.memory_picture import check_destination
    from peft_gauge.training import methods

    if run.is_dir():
        raise GaugeError(f"{run} is a folder; give the file of a saved run")
    check_destination(out)
    known = sorted(methods.METHODS, key=len, reverse=True)
    steps = accuracy_picture.steps_of(read_run(run), known)
    # Variants are drawn like the method that they vary.
    default = [method.name for method in methods.DEFAULT_METHODS]
    of_default = {name: next(each for each in default if name.split("-")[0] == each) for name in known}
    titles = {name: methods.get(of_default[name]).title for name in known}
    order = [methods.get(name).title for name in default]
    steps.sort(key=lambda step: order.index(titles[step.method]))
    data = accuracy_picture.save(steps, titles, where, out)
    print(f"wrote {out} and its data, {data}")
