"""The memory table, and the doubts under the time table: what is shown is what was recorded, to the digit."""

from __future__ import annotations

from typing import Any

import pytest

from peft_gauge.history.schema import CaseRecord
from peft_gauge.report.terminal import memory_table, summary

SETTINGS = {"batch": 4, "seq": 768, "dtype": "bfloat16", "weights": "random", "grad_checkpointing": False}
METRICS: dict[str, Any] = {
    "method": "lora",
    "model": "toy",
    "device": "cuda",
    "settings": SETTINGS,
    "naive_after_loading_bytes": 2_200_123_456,
    "allocated_peak_bytes": 5_150_000_000,
    "reserved_peak_bytes": 5_432_109_876,
    "own_device_peak_bytes": 6_001_000_000,
    "device_peak_bytes": 7_777_000_000,
    "tensor_peak_bytes": 5_100_000_000,
    "planned_peak_bytes": 4_900_000_000,
    "planned_allocated_bytes": 5_000_000_000,
    "planned_reserved_bytes": 5_500_000_000,
    "planned_device_bytes": 6_000_000_000,
    "ceiling": {
        "allocated_peak_bytes": 5_260_000_000,
        "reserved_peak_bytes": 6_200_000_000,
        "own_device_peak_bytes": 6_900_000_000,
    },
    "resident_bytes": 2_209_000_000,
    "saved_activation_bytes_per_token": 81_920.0,
    "rss_peak_bytes": 1_512_000_000,
    "phase_of_peak": "backward",
    "meters": {
        "cuda allocator": {"overhead_seconds_per_phase": 42.4e-6},
        "nvml": {"overhead_seconds_per_phase": 0.0021},
        "tensors": {"overhead_times_a_step": 2.345},
    },
}


def passed(**changed: Any) -> CaseRecord:
    return CaseRecord("a", "test_memory", "passed", None, {**METRICS, **changed})


def on_cpu(**changed: Any) -> dict[str, Any]:
    unseen = ("allocated_peak_bytes", "reserved_peak_bytes", "own_device_peak_bytes", "device_peak_bytes")
    metrics = {name: value for name, value in METRICS.items() if name not in unseen}
    return {**metrics, "device": "cpu", "ceiling": None, **changed}


def cells(shown: str, label: str) -> list[str]:
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if line[:1] == "│"]
    (row,) = [row for row in rows if row[0] == label]
    return row


def headings(shown: str) -> list[str]:
    rows = [line.strip("┃").split("┃") for line in shown.splitlines() if line.startswith("┃")]
    return [" ".join(filter(None, map(str.strip, lines))) for lines in zip(*rows, strict=True)]


def test_a_card_has_every_meter_beside_plan_and_ceiling() -> None:
    shown = memory_table.summary([passed()], 80)
    assert shown.splitlines()[0].rstrip() == "memory of a step, toy on cuda, 4×768 tokens, bfloat16, random weights"
    assert dict(zip(headings(shown), cells(shown, "lora"), strict=True)) == {
        "method": "lora",
        "after loading": "2.20 GB",
        "allocated": "5.15 GB",
        "reserved": "5.43 GB",
        "device": "6.00 GB",
        "of plan": "103.0 %",  # 5.15 of 5.00
        "ceiling": "5.26 GB",
        "resident": "2.21 GB",
        "activations per token": "81.92 kB",
        "host": "1.51 GB",
        "peak in": "backward",
    }
    assert "of plan: allocated peak / planned peak, including library workspaces\n" in "\n".join(
        map(str.rstrip, shown.splitlines())
    )


def test_a_cpu_has_the_tensors_and_no_ceiling() -> None:
    shown = memory_table.summary([CaseRecord("a", "test_memory", "passed", None, on_cpu())], 80)
    row = dict(zip(headings(shown), cells(shown, "lora"), strict=True))
    assert "allocated" not in row
    assert (row["tensors"], row["of plan"], row["ceiling"]) == ("5.10 GB", "104.1 %", "–")
    assert "of plan: tensors peak / planned peak (planned for CUDA’s kernels)" in " ".join(shown.split())


def test_what_was_not_read_is_a_dash_never_0() -> None:
    bare = {name: METRICS[name] for name in ("method", "model", "device", "settings", "tensor_peak_bytes", "meters")}
    shown = memory_table.summary([CaseRecord("a", "test_memory", "passed", None, bare)], 80)
    assert cells(shown, "lora") == ["lora", *["–"] * 10]
    without_plan = memory_table.summary([passed(planned_peak_bytes=None, planned_allocated_bytes=None)], 80)
    assert dict(zip(headings(without_plan), cells(without_plan, "lora"), strict=True))["of plan"] == "–"


def test_a_run_that_kept_no_plan_of_the_allocator_is_held_against_that_of_the_tensors() -> None:
    shown = memory_table.summary([passed(planned_allocated_bytes=None)], 80)
    assert dict(zip(headings(shown), cells(shown, "lora"), strict=True))["of plan"] == "105.1 %"  # 5.15 of 4.90


def test_what_measuring_costs_stands_below() -> None:
    shown = memory_table.summary([passed()], 80)
    assert (
        "cost of measuring: cuda allocator 42.40 µs per phase, nvml 2.10 ms per phase, tensors 2.3 × a step, "
        "in a separate step"
    ) in " ".join(shown.split())


def test_checkpointing_is_a_row_of_its_own() -> None:
    checkpointed = passed(allocated_peak_bytes=3_000_000_000, settings={**SETTINGS, "grad_checkpointing": True})
    shown = memory_table.summary([passed(), checkpointed], 80)
    assert cells(shown, "lora, checkpointing")[2] == "3.00 GB"
    assert cells(shown, "lora")[2] == "5.15 GB"


def test_models_and_devices_have_tables_of_their_own() -> None:
    cases = [passed(), passed(model="other"), CaseRecord("a", "test_memory", "passed", None, on_cpu())]
    titles = [line.split(",")[1] for line in memory_table.summary(cases, 80).splitlines() if line.startswith("memory")]
    assert titles == [" toy on cuda", " other on cuda", " toy on cpu"]


def test_only_what_was_measured_and_passed_is_shown() -> None:
    assert memory_table.summary([], 80) == ""
    assert memory_table.summary([CaseRecord("a", "test_memory", "failed", "over", METRICS)], 80) == ""
    timed = {name: METRICS[name] for name in ("method", "model", "device", "settings")}
    assert memory_table.summary([CaseRecord("a", "test_speed", "passed", None, timed)], 80) == ""


@pytest.mark.parametrize("reasons", [[], ["SM clock fell from 1980 to 1410 MHz", "1 other process computes"]])
def test_unsteady_times_say_so_and_why(reasons: list[str]) -> None:
    metrics = {**{name: METRICS[name] for name in ("method", "model", "device", "settings")}, "step_seconds": 0.25}
    shown = summary.summary([CaseRecord("a", "test_speed", "passed", None, {**metrics, "unsteady": reasons})], [], 80)
    label = "lora (unsteady)" if reasons else "lora"
    assert cells(shown, label)[0] == label
    assert cells(shown, label)[7] == "250.00 ms"
    line = "unsteady: lora: SM clock fell from 1980 to 1410 MHz; 1 other process computes"
    assert (line in shown) == bool(reasons)
