"""Published metrics next to the planned ones, for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from peft_gauge.report.terminal.summary import WIDTH, as_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from peft_gauge.history.schema import CaseRecord


def published_table(cases: Iterable[CaseRecord], width: int = WIDTH) -> str:
    """A line for each case with a ``published`` metric, with its distance from the planned one.

    Failed cases are included, since their distance shows how they failed. Empty text without such cases.
    """
    rows = [case for case in cases if "published" in case.metrics]
    if not rows:
        return ""
    table = Table(title="published metrics", title_justify="left", caption_justify="left")
    table.caption = "distance: planned / published - 1; asserted: the tolerance that the run checks"
    table.add_column("metric", no_wrap=True)
    for heading in ("published", "planned", "distance"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("asserted", no_wrap=True)
    for case in rows:
        metrics = case.metrics
        mark = "" if case.outcome == "passed" else f" ({case.outcome})"
        table.add_row(
            metrics["metric"],
            _number(metrics["published"], metrics["unit"]),
            _number(metrics["planned"], metrics["unit"]),
            f"{metrics['distance_percent']:+.2f} %",
            metrics["asserted"] + mark,
        )
    return as_text([table], width)


def _number(value: float, unit: str) -> str:
    shown = f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3f}"
    return f"{shown} {unit}".rstrip()
