"""Shared steps in the terminal: the memory of the ranks, their communication, speed and scaling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from peft_gauge.report.format import ABSENT, shown, shown_bytes, shown_seconds, step_conditions
from peft_gauge.report.rows import label
from peft_gauge.report.terminal.summary import as_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from peft_gauge.history.schema import CaseRecord

METHOD_WIDTH = 14  # columns; longer names take two lines, so that the table has 100 columns at most


def summary(cases: Iterable[CaseRecord], width: int) -> str:
    """A table for each model, device, number of ranks, strategy and number of replicas; empty without shared steps."""
    cases = list(cases)
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in (case.metrics for case in cases if case.outcome == "passed" and "rank_peak_bytes" in case.metrics):
        shared = tuple(row.get(name) for name in ("model", "device", "ranks", "strategy"))
        groups.setdefault((*shared, row.get("replicas", 1)), []).append(row)
    lone = [case.metrics for case in cases if case.outcome == "passed" and "lone_peak_bytes" in case.metrics]
    for row in lone:
        groups.setdefault((row["model"], row["device"], row["lone_ranks"]), []).append(row)
    tables = [_table(rows, *group) if len(group) == 5 else _lone_table(rows, *group) for group, rows in groups.items()]
    return as_text(tables, width)


LONE = {
    "tensors": ("lone_peak_bytes", "planned_lone_peak_bytes"),
    "allocated": ("lone_allocated_peak_bytes", "planned_lone_allocated_bytes"),
    "reserved": ("lone_reserved_peak_bytes", "planned_lone_reserved_bytes"),
}
"""Heading -> the measured metric of a rank without the others, and the planned one."""


def _lone_table(rows: list[Mapping[str, Any]], model: str, device: str, ranks: int) -> Table:
    title = f"{model} on {device}, one of {ranks} ranks (fsdp2) without the others, "
    table = Table(title=title + step_conditions(rows[0]["settings"]), title_justify="left")
    table.add_column("method", max_width=METHOD_WIDTH, overflow="fold")
    for heading in LONE:
        table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("of plan", justify="right", no_wrap=True)
    for row in rows:
        cells = []
        for measured, planned in ((row.get(a), row.get(b)) for a, b in LONE.values()):
            cells += [shown_bytes(measured), shown(measured and planned and 100 * measured / planned, "{:.1f} %")]
        table.add_row(label(row), *cells)
    return table


def _table(rows: list[Mapping[str, Any]], model: str, device: str, ranks: int, strategy: str, replicas: int) -> Table:
    how = strategy if replicas == 1 else f"{strategy}, {replicas} replicas"
    title = f"{model} on {device}, shared by {ranks} ranks ({how}), {step_conditions(rows[0]['settings'])} each"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = (
        "largest rank: peak of its tensors; sent: most by a rank, in a step\n"
        "weak, strong: seconds of one rank alone, for its tokens, for all / seconds of all"
    )
    table.add_column("method", max_width=METHOD_WIDTH, overflow="fold")
    for heading in (
        "largest\nrank",
        "all\nranks",
        "imbal-\nance",
        "sent",
        "communi-\ncation",
        "tokens/s",
        "scaling\nweak/strong",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            label(row),
            shown_bytes(row["rank_peak_bytes"]),
            shown_bytes(row.get("rank_peak_bytes_sum")),
            _percent(row.get("imbalance")),
            shown_bytes(row.get("rank_sent_bytes")),
            shown_seconds(row.get("rank_communication_seconds")),
            shown(row.get("ranks_tokens_per_second"), "{:.0f}"),
            _scaling(row),
        )
    return table


def _percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.1f} %"


def _scaling(row: Mapping[str, Any]) -> str:
    return "/".join(shown(row.get(f"{name}_scaling"), "{:.2f}") for name in ("weak", "strong"))
