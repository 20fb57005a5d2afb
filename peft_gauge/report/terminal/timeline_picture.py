"""Memory over a planned step in the terminal: a stacked area by category, the phases below it, and the peak by name."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peft_gauge.report.format import shown_bytes
from peft_gauge.report.terminal.plan_table import LOOKS

if TYPE_CHECKING:
    from collections.abc import Sequence

Moment = Mapping[str, Any]
"""A moment of a step's timeline (`peft_gauge.traces.timeline.Moment`) as JSON; `Timeline` likewise."""
Timeline = Mapping[str, Any]

HEIGHT = 14
AXIS = 11  # columns of the scale to the left


def columns_for(width: int) -> int:
    """The columns of the picture in a terminal of ``width`` columns."""
    return max(20, min(width, 120) - AXIS)


def show_timeline(title: str, found: Timeline, *, width: int | None = None) -> None:
    """Print the picture of ``found`` and the modules that hold the peak's memory."""
    console = Console(width=width, highlight=False)
    console.print(Text(f"memory over a step: {title}"))
    console.print(*_rows(found), sep="\n")
    console.print(_phases(found["moments"]))
    console.print(_legend(found["moments"]))
    console.print(Text(peak_sentence(found)))
    if found["held"]:
        console.print(_table(found))


def peak_sentence(found: Timeline) -> str:
    """The peak, its phase, and the operator and module whose allocation reached it."""
    peak = found["peak"]
    words = f"peak {shown_bytes(total(peak))} in {peak['phase']}"
    if not peak["operator"]:
        return words
    module = shown_module(peak["module"])
    return f"{words}, reached by {peak['operator']}" + (f" in {module}" if module else "")


def total(moment: Moment) -> int:
    """The live bytes of ``moment``."""
    return sum(moment["by_category"].values())


def shown_module(path: str) -> str:
    """A module's path without the wrappers of PEFT and transformers in front of it."""
    for wrapper in ("base_model.model.model.", "base_model.model.", "model."):
        if path.startswith(wrapper):
            return path.removeprefix(wrapper)
    return "the model" if path in ("model", "base_model", "base_model.model") else path


def _rows(found: Timeline) -> list[Text]:
    full, position = total(found["peak"]), found["peak"]["position"]
    at_peak = next((place for place, each in enumerate(found["moments"]) if each["position"] == position), None)
    stacks = [_stack(each["by_category"], full) for each in found["moments"]]
    rows = []
    marker = Text(" " * AXIS)
    if at_peak is not None:
        marker.append(" " * at_peak + "▼ peak")
    rows.append(marker)
    for level in range(HEIGHT, 0, -1):
        labelled = level in (HEIGHT, HEIGHT // 2)
        row = Text(f"{shown_bytes(full * level / HEIGHT) if labelled else '':>{AXIS - 2}} │")
        for stack in stacks:
            category = stack[level - 1] if level <= len(stack) else None
            _, glyph, colour = ("", " ", "") if category is None else LOOKS[category]
            row.append(glyph, style=colour)
        rows.append(row)
    return rows


def _stack(by_category: Mapping[str, int], full: int) -> list[str]:
    """The categories of a column's cells, from below; ends are rounded, so that the height is right."""
    cells: list[str] = []
    total = 0
    for category in LOOKS:
        total += by_category.get(category, 0)
        cells += [category] * (round(HEIGHT * total / full) - len(cells))
    return cells


def _phases(moments: Sequence[Moment]) -> Text:
    """The name of each phase below its columns, with a bar where it begins."""
    line = Text(" " * (AXIS - 1) + "└")
    for phase, run in groupby(moments, key=lambda moment: moment["phase"]):
        cells = len(list(run))
        line.append(f"│{phase}"[:cells].ljust(cells, "─") if cells > 1 else "│")
    return line


def _legend(moments: Sequence[Moment]) -> Text:
    line = Text()
    for category, (heading, glyph, colour) in LOOKS.items():
        if any(category in moment["by_category"] for moment in moments):
            line.append(glyph, style=colour).append(f" {heading}  ")
    return line


def _table(found: Timeline) -> Table:
    table = Table(title="made in the step and live at its peak", title_justify="left")
    for name in ("category", "module", "operator"):
        table.add_column(name, overflow="fold")
    table.add_column("×", justify="right")
    table.add_column("bytes", justify="right", no_wrap=True)
    for each in found["held"]:
        heading, module = LOOKS[each["category"]][0], shown_module(each["module"])
        table.add_row(heading, module, each["operator"], str(each["count"]), shown_bytes(each["nbytes"]))
    return table
