"""A recorded step compared with its plan, in the terminal: at most 100 columns wide."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from peft_gauge.report.format import ABSENT, shown, shown_bytes

WIDTH = 100

NOT_PLANNED = "not in the plan"  # allocations of this category ran near a module, not necessarily in it

_WRAPPERS = re.compile(r"^(?:(?:base_model|model)\.)+(?=.)")


def show(record: Mapping[str, Any], top: int) -> None:
    """Print ``record`` (a comparison as printed by ``--json``) on standard output, each list cut to ``top`` rows."""
    console = Console(highlight=False, markup=False, emoji=False, width=WIDTH)
    console.print(*render(record, top), sep="\n")


def render(record: Mapping[str, Any], top: int) -> list[RenderableType]:
    """The renderables for ``record``: peaks, phases, first differences, breakdown of the difference, notes."""
    parts: list[RenderableType] = [_peaks(record), _phases(record), *_firsts(record)]
    if record["rows"]:
        parts += [_categories(record), _rows(record, top)]
    else:
        parts.append(Text("at the peak both steps have the same allocations, byte for byte"))
    if record["steps"]:
        parts.append(_steps(record, top))
    return [*parts, *_notes(record)]


def _peaks(record: Mapping[str, Any]) -> Text:
    planned, measured = record["planned"], record["measured"]
    share = 100 * record["difference_bytes"] / planned["peak_bytes"] if planned["peak_bytes"] else 0.0
    lines = [
        f"{record['title']}: a recorded step compared with its plan",
        f"peak measured {measured['peak_bytes']:,} B in {measured['phase']}, allocation {measured['number']:,}",
        f"peak planned  {planned['peak_bytes']:,} B in {planned['phase']}, allocation {planned['number']:,}",
        f"difference    {record['difference_bytes']:+,} B ({share:+.3f} %)",
        f"              {record['unplanned_bytes']:+,} B without library workspaces and unsplit blocks",
    ]
    about = record["about"]
    if "gpu" in about:
        versions = about.get("versions") or {}
        told = [f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if versions.get(name)]
        lines.insert(1, ", ".join([f"recorded on {about['gpu']}", *told]))
    return Text("\n".join(lines))


def _phases(record: Mapping[str, Any]) -> Table:
    table = Table(title="number of allocations, and peak by phase", title_justify="left")
    table.add_column("phase", no_wrap=True)
    for heading in ("measured", "planned", "equal", "peak measured", "peak planned", "difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in record["phases"]:
        measured, planned = each["measured_peak_bytes"], each["planned_peak_bytes"]
        difference = None if measured is None or planned is None else measured - planned
        table.add_row(
            each["phase"],
            *(f"{each[name]:,}" for name in ("measured", "planned", "equal")),
            shown_bytes(measured),
            shown_bytes(planned),
            shown(difference, "{:+,}"),
        )
    return table


def _firsts(record: Mapping[str, Any]) -> list[Text]:
    first, large = record["first"], record["first_large"]
    if first is None:
        return [Text("no difference: all allocations are equal")]
    lines = [Text(f"first difference: {_told(first)}")]
    if large is None:
        lines.append(Text("none of 1 MiB or more"))
    elif large != first:
        lines.append(Text(f"first of 1 MiB or more: {_told(large)}"))
    return lines


def _told(difference: Mapping[str, Any]) -> str:
    def size(nbytes: int) -> str:
        return f"{nbytes:,} B" if nbytes else "nothing"

    operator, site = difference["operator"], difference["site"]
    near = "near" if difference["category"] == NOT_PLANNED else "in"
    where = f" {near} {module(difference['module'])}" if difference["module"] else ""
    at = f" (allocated at {site})" if site and site != operator else ""
    return (
        f"{difference['phase']}, allocation {difference['number']:,}: measured {size(difference['measured_bytes'])}, "
        f"planned {size(difference['planned_bytes'])}: {operator or 'unknown'}{where}{at}"
    )


def _categories(record: Mapping[str, Any]) -> Table:
    table = Table(title="at the peak, by category", title_justify="left")
    table.add_column("category", no_wrap=True)
    for heading in ("measured", "planned", "difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    equal = 0
    for name, sizes in record["by_category"].items():
        if sizes["bytes"]:
            table.add_row(name.replace("_", " "), *_sizes(sizes["measured_bytes"], sizes["planned_bytes"]))
        else:
            equal += sizes["planned_bytes"]
    if equal:
        table.add_row("all others (equal)", *_sizes(equal, equal))
    table.add_section()
    table.add_row("sum", *_sizes(record["measured"]["peak_bytes"], record["planned"]["peak_bytes"]))
    return table


def _sizes(measured: int, planned: int) -> list[str]:
    return [f"{measured:,}", f"{planned:,}", f"{measured - planned:+,}" if measured != planned else ABSENT]


def _rows(record: Mapping[str, Any], top: int) -> Table:
    rows = record["rows"]
    table = _list("breakdown of the difference (+: missing from the plan, −: only in the plan)")
    for row in rows[:top]:
        table.add_row(*_cells(row))
    if len(rows) > top:
        rest = rows[top:]
        table.add_row(f"{len(rest)} more", "", "", f"{sum(row['count'] for row in rest):,}", _signed(rest))
    table.add_section()
    table.add_row("sum", "", "", "", _signed(rows))
    return table


def _steps(record: Mapping[str, Any], top: int) -> Table:
    rows = record["steps"]
    table = _list(f"allocations that differ anywhere in the step, the largest of {len(rows)} kinds")
    for row in rows[:top]:
        table.add_row(*_cells(row))
    return table


def _list(title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("kind", width=18, overflow="fold")
    table.add_column("operator", width=24, overflow="fold")
    table.add_column("module", width=21, overflow="fold")
    table.add_column("×", justify="right", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    operator = row["operator"] or row["category"].replace("_", " ")
    modules = row["modules"]
    where = modules[0] if len(modules) == 1 else row["module"]
    near = "near " if row["category"] == NOT_PLANNED and where else ""
    return [row["kind"], operator, f"{near}{module(where)}", f"{row['count']:,}", _signed([row])]


def _signed(rows: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(row['bytes'] for row in rows):+,}"


def module(path: str) -> str:
    """A module's path without the wrappers around the model."""
    return _WRAPPERS.sub("", path)


def _notes(record: Mapping[str, Any]) -> list[Text]:
    notes = list(record["notes"])
    if record["moved"]:
        notes.append(f"{record['moved']:,} allocations are in another order and count as equal")
    if record["unsplit_bytes"]:
        notes.append(
            f"unsplit blocks at the peak are {record['unsplit_bytes']:,} B larger than requested; "
            "memory_allocated includes them, a peak of requests does not"
        )
    return [Text(f"note: {note}") for note in notes]
