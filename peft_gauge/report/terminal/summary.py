"""The summary at the end of a run, for the terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from peft_gauge.report.format import ABSENT, shown, shown_bytes, shown_seconds
from peft_gauge.report.rows import PHASES, by_model, conditions, label, method_rows

if TYPE_CHECKING:
    from peft_gauge.history.schema import CaseRecord

# Width of the method table: a narrower terminal wraps it, but no digits are lost.
WIDTH = 136


def summary(cases: Iterable[CaseRecord], claims: Iterable[Mapping[str, Any]], width: int) -> str:
    """The tables of one run as text of at most ``width`` columns: methods, then claims with their verdicts."""
    tables = [
        _method_table(group, f"{model} on {device}, {conditions(group)}")
        for (model, device), group in by_model(_timed_or_counted(cases)).items()
    ]
    claims = list(claims)
    return as_text([*tables, *([_claim_table(claims)] if claims else [])], width)


def as_text(tables: Iterable[Table], width: int) -> str:
    """``tables`` as plain text of ``width`` columns, at least `WIDTH`; empty without tables.

    Brackets and colons in a cell, as in a test's id, are not interpreted as markup.
    """
    out = io.StringIO()
    console = Console(
        file=out, width=max(width, WIDTH), force_terminal=False, highlight=False, markup=False, emoji=False
    )
    for table in tables:
        console.print(table)
    return out.getvalue()


def _timed_or_counted(cases: Iterable[CaseRecord]) -> list[dict[str, Any]]:
    return [row for row in method_rows(cases) if row.keys() & {"trainable_params", *(f"{p}_seconds" for p in PHASES)}]


def _method_table(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    told = "medians of this run; step / base forward: median over rounds of their ratio, both timed in the same round"
    table.caption = "\n".join([told, *_unsteady(rows)])
    table.add_column("method", no_wrap=True)
    for heading in ("trainable", "% of base", "on disk", *PHASES, "step /\nbase forward", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{label(row)} (unsteady)" if row.get("unsteady") else label(row),
            shown(row.get("trainable_params"), "{:,}"),
            shown(row.get("percent_of_base"), "{:.4f}"),
            shown_bytes(row.get("adapter_disk_bytes")),
            *(shown_seconds(row.get(f"{phase}_seconds")) for phase in PHASES),
            shown(row.get("step_over_control"), "{:.2f}"),
            shown(row.get("tokens_per_second"), "{:.0f}"),
        )
    return table


def _unsteady(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each row with unreliable times, with the reasons."""
    return [f"unsteady: {label(row)}: {'; '.join(row['unsteady'])}" for row in rows if row.get("unsteady")]


def _claim_table(claims: list[Mapping[str, Any]]) -> Table:
    table = Table(title="claims", title_justify="left")
    for heading in ("claim", "model", "verdict"):
        table.add_column(heading, no_wrap=True)
    table.add_column("metric", overflow="fold")
    for claim in claims:
        table.add_row(claim["id"], claim["model"], claim["verdict"], claim.get("metric") or ABSENT)
    return table
