"""``peft-gauge memory-bars``: plot saved plans as stacked bars of the memory of each GPU."""

from __future__ import annotations

from pathlib import Path  # typer reads the annotations at run time
from typing import Annotated

import typer

from peft_gauge.commas import listed
from peft_gauge.errors import GaugeError


def memory_bars(
    plans: Annotated[list[Path], typer.Argument(help="Files that peft-gauge plan --json printed, in the bars' order.")],
    out: Annotated[Path, typer.Option(help="Plot to write, .svg or .png; its data is written next to it as .csv.")],
    gpu: Annotated[
        list[str] | None,
        typer.Option(help="GPUs to draw as lines, comma-separated or repeated (default: those of the plans)."),
    ] = None,
) -> None:
    """Plot the device memory of saved plans of one model and step by category, for example by number of GPUs."""
    from peft_gauge.commands.memory_curve import card
    from peft_gauge.report.charts import memory_bars as plot
    from peft_gauge.report.charts.memory_picture import check_destination

    check_destination(out)
    found = plot.read(plans)
    cards = [card(name) for name in listed(gpu)] if gpu else plot.cards_of(found)
    data = plot.save(found, {plan["method"]: _title(plan["method"]) for plan in found}, cards, out)
    print(f"wrote {out} and its data, {data}")


def _title(method: str) -> str:
    """The name of a method for readers; an adapter's file has only its own."""
    from peft_gauge.training import methods

    try:
        return methods.get(method).title
    except GaugeError:
        return method
