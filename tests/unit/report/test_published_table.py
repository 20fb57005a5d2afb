"""The table of published metrics shows every case that has one, with its distance, and nothing else."""

from __future__ import annotations

from typing import Any

from peft_gauge.history.schema import CaseOutcome, CaseRecord
from peft_gauge.report.terminal.published_table import published_table


def case(name: str, outcome: CaseOutcome = "passed", **metrics: Any) -> CaseRecord:
    return CaseRecord(f"benchmarks/test_published.py::{name}", "test_published", outcome, None, metrics)


def published(name: str, outcome: CaseOutcome = "passed", **changed: Any) -> CaseRecord:
    metrics = {
        "metric": name,
        "published": 21.3,
        "planned": 20.4987,
        "unit": "GB",
        "distance_percent": -3.7619,
        "asserted": "within",
    }
    return case(name, outcome, **{**metrics, **changed})


def test_no_table_without_a_published_figure() -> None:
    assert published_table([case("other", trainable_params=3)]) == ""


def test_a_figure_is_shown_with_its_distance() -> None:
    row = line_of(published_table([case("other"), published("a-peak")]), "a-peak")

    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "a-peak",
        "21.300 GB",
        "20.499 GB",
        "-3.76 %",
        "within",
    ]


def test_counts_are_shown_whole_and_failures_as_such() -> None:
    count = published("a-count", "failed", published=3686400.0, planned=1843200.0, unit="", asserted="exact")

    row = line_of(published_table([count], width=20), "a-count")
    assert "3,686,400 │" in row
    assert "1,843,200 │" in row
    assert "exact (failed)" in row


def line_of(table: str, name: str) -> str:
    (line,) = [line for line in table.splitlines() if name in line]
    return line
