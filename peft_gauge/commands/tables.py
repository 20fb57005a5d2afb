"""Rows on standard output as JSON, comma-separated values or Markdown, for every command with a table."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import typer

from peft_gauge.errors import GaugeError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel="Output")]
AsCsv = Annotated[
    bool,
    typer.Option(
        "--csv",
        help="Print comma-separated values: bytes and seconds as numbers, unavailable ones empty.",
        rich_help_panel="Output",
    ),
]
AsMarkdown = Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.", rich_help_panel="Output")]

Form = Literal["json", "csv", "markdown"]


def form_of(as_json: bool, as_csv: bool, as_markdown: bool) -> Form | None:
    """The requested form; ``None`` for the terminal's. Raises `GaugeError` for more than one."""
    given: dict[Form, bool] = {"json": as_json, "csv": as_csv, "markdown": as_markdown}
    if sum(given.values()) > 1:
        raise GaugeError("--json, --csv and --markdown exclude each other; give one of them")
    return next((form for form, is_given in given.items() if is_given), None)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def print_csv(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Raw values: ``None`` is an empty cell, a truth value ``true`` or ``false``, an object JSON."""
    writer = csv.DictWriter(sys.stdout, names, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _raw(row.get(name)) for name in names})


def _raw(value: Any) -> Any:
    if isinstance(value, dict | list | tuple):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else value


def print_markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """``lines`` of formatted cells; characters that Markdown interprets are escaped."""
    from peft_gauge.report.comparison import in_markdown

    for line in (headings, *lines):
        print("| " + " | ".join(in_markdown(cell).replace("\n", " ") for cell in line) + " |")
        if line is headings:
            print("| " + " | ".join(["---"] * len(headings)) + " |")


def print_rows(rows: Sequence[Mapping[str, Any]], form: Form | None) -> None:
    """Print ``rows``, which have the same keys, in ``form`` or as a table for the terminal."""
    names = list(rows[0]) if rows else []
    cells = [[_shown(row[name]) for name in names] for row in rows]
    if form == "json":
        print_json(rows)
    elif form == "csv":
        print_csv(rows, names)
    elif form == "markdown":
        print_markdown(names, cells)
    else:
        _print_table(names, cells)


def _print_table(names: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for place, name in enumerate(names):
        numbers = all(_is_number(line[place]) for line in cells if line[place] not in ("", "–"))
        justify: Literal["left", "right"] = "right" if numbers and place else "left"
        # A narrow terminal breaks names, never the digits of a number.
        table.add_column(name.replace("_", "\n"), justify=justify, overflow="fold", no_wrap=numbers)
    for line in cells:
        table.add_row(*line)
    Console(highlight=False, markup=False, emoji=False).print(table)


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").removeprefix("-").replace(".", "", 1).isdigit()


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
