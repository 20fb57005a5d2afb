"""Measured memory in the terminal: each method's peak by every meter, with its plan and its ceiling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from peft_gauge.report.format import ABSENT, shown, shown_bytes, shown_seconds
from peft_gauge.report.rows import by_model, conditions, label, method_rows
from peft_gauge.report.terminal.summary import as_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from peft_gauge.history.schema import CaseRecord

# heading -> (measured metric, planned metric); each contains the previous one
ON_CUDA = {
    "allocated": ("allocated_peak_bytes", "planned_allocated_bytes"),
    "reserved": ("reserved_peak_bytes", "planned_reserved_bytes"),
    "device": ("own_device_peak_bytes", "planned_device_bytes"),
}
ON_CPU = {"tensors": ("tensor_peak_bytes", "planned_peak_bytes")}


def planned_bytes(row: Mapping[str, Any], metric: str) -> Any:
    """The planned ``metric`` of a case. Older runs do not have it separately: they compared the allocator's peak, which
    includes the libraries' workspaces, with the planned peak of tensors."""
    value = row.get(metric)
    return row.get("planned_peak_bytes") if value is None and metric == "planned_allocated_bytes" else value


def summary(cases: Iterable[CaseRecord], width: int) -> str:
    """A table for each model and device with measured memory, as text; empty if there is none."""
    rows = [row for row in method_rows(cases) if "tensor_peak_bytes" in row]
    return as_text(
        [
            _table(group, f"memory of a step, {model} on {device}, {conditions(group)}")
            for (model, device), group in by_model(rows).items()
        ],
        width,
    )


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    compared = ON_CUDA if rows[0]["device"] == "cuda" else ON_CPU
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = _caption(rows)
    table.add_column("method", no_wrap=True)
    for heading in (
        "after loading",
        *compared,
        "of plan",
        "ceiling",
        "resident",
        "activations\nper token",
        "host",
        "peak in",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        first_measured, _ = next(iter(compared.values()))
        table.add_row(
            label(row),
            shown_bytes(row.get("naive_after_loading_bytes")),
            *(shown_bytes(row.get(measured)) for measured, _ in compared.values()),
            share_of_plan(row),
            shown_bytes((row.get("ceiling") or {}).get(first_measured)),
            shown_bytes(row.get("resident_bytes")),
            shown_bytes(row.get("saved_activation_bytes_per_token")),
            shown_bytes(row.get("rss_peak_bytes")),
            row.get("phase_of_peak") or ABSENT,
        )
    return table


def share_of_plan(row: Mapping[str, Any]) -> str:
    """A case's measured peak in percent of the planned one; a dash if either is missing."""
    first_measured, first_planned = next(iter((ON_CUDA if row["device"] == "cuda" else ON_CPU).values()))
    measured, planned = row.get(first_measured), planned_bytes(row, first_planned)
    return ABSENT if measured is None or not planned else f"{100 * measured / planned:.1f} %"


def _caption(rows: list[dict[str, Any]]) -> str:
    """Explains the columns and the cost of measuring."""
    first, *_ = ON_CUDA if rows[0]["device"] == "cuda" else ON_CPU
    told = (
        "after loading: memory before training; "
        f"of plan: {first} peak / planned peak"
        f"{', including library workspaces' if first == 'allocated' else ' (planned for CUDA’s kernels)'}"
    )
    return f"{told}\ncost of measuring: {', '.join(_costs(rows[0].get('meters') or {}))}"


def _costs(meters: Mapping[str, Mapping[str, Any]]) -> list[str]:
    costs = []
    for name, about in meters.items():
        if "overhead_seconds_per_phase" in about:
            costs.append(f"{name} {shown_seconds(about['overhead_seconds_per_phase'])} per phase")
        if "overhead_times_a_step" in about:
            costs.append(f"{name} {shown(about['overhead_times_a_step'], '{:.1f}')} × a step, in a separate step")
    return costs
