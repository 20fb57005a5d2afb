"""A run is written whole or not at all."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from peft_gauge.errors import GaugeError
from peft_gauge.history import store, writer
from peft_gauge.machine import machine_info, machine_name

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
RUN = {"commit_info": {"id": "0123456789abcdef0123", "dirty": False}, "benchmarks": []}


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_the_name_tells_number_commit_and_time(tmp_path: Path) -> None:
    path = writer.write_run(tmp_path, "cpu-2c-cpu", RUN, now=NOW)
    assert path == tmp_path / "cpu-2c-cpu" / "0001_0123456789ab_20260102_030405.json"
    assert json.loads(path.read_text()) == RUN
    dirty = {"commit_info": {"id": "ffff", "dirty": True}}
    assert writer.write_run(tmp_path, "cpu-2c-cpu", dirty, now=NOW).name == "0002_ffff-dirty_20260102_030405.json"
    assert writer.write_run(tmp_path, "cpu-2c-cpu", {}, now=NOW).name == "0003_unversioned_20260102_030405.json"
    assert len(left_behind(tmp_path)) == 3


def _write(folder: Path, at_once: Any) -> None:
    at_once.wait()
    writer.write_run(folder, "m", RUN, now=NOW)


def test_runs_that_end_at_once_get_different_numbers(tmp_path: Path) -> None:
    context: Any = multiprocessing.get_context("fork" if sys.platform != "win32" else "spawn")
    at_once = context.Barrier(6)
    processes = [context.Process(target=_write, args=(tmp_path, at_once)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [name[:4] for name in left_behind(tmp_path)] == [f"{number:04d}" for number in range(1, 7)]


def test_a_number_saved_between_look_and_claim_is_not_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.write_run(tmp_path, "m", RUN, now=NOW)
    monkeypatch.setattr(store, "numbers", lambda names: [])  # the look came too early
    assert writer.write_run(tmp_path, "m", RUN, now=NOW).name.startswith("0002_")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object()])
def test_what_json_cannot_hold_is_refused_before_anything_is_written(value: object, tmp_path: Path) -> None:
    with pytest.raises(GaugeError, match="cannot be saved as JSON"):
        writer.write_run(tmp_path, "m", {"metric": value})
    assert left_behind(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GaugeError, match="No space left on device.*--results"):
        writer.write_run(tmp_path, "m", RUN, now=NOW)
    assert left_behind(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.write_run(tmp_path, "m", RUN, now=NOW)
    assert left_behind(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file where the folder should be")
    with pytest.raises(GaugeError, match="cannot save the run under"):
        writer.write_run(tmp_path / "results", "m", RUN, now=NOW)


@pytest.mark.slow
@pytest.mark.integration
def test_pytest_benchmarks_own_commands_read_our_files(tmp_path: Path) -> None:
    stats = {
        "min": 1.0,
        "max": 2.0,
        "mean": 1.5,
        "stddev": 0.5,
        "median": 1.5,
        "iqr": 0.5,
        "q1": 1.2,
        "q3": 1.8,
        "rounds": 2,
        "outliers": "0;0",
        "ops": 0.66,
        "iterations": 1,
        "total": 3.0,
        "data": [1.0, 2.0],
        "hd15iqr": 2.0,
        "ld15iqr": 1.0,
        "iqr_outliers": 0,
        "stddev_outliers": 0,
    }
    timed = {
        "group": None,
        "name": "test_step[lora]",
        "fullname": "b.py::test_step[lora]",
        "params": None,
        "param": "lora",
        "extra_info": {},
        "options": {},
        "stats": stats,
    }
    run = {
        **RUN,
        "machine_info": machine_info(),
        "benchmarks": [timed],
        "datetime": NOW.isoformat(),
        "version": "5.0.0",
        "peft_gauge": {"schema": 1},
    }
    writer.write_run(tmp_path, "m", run, now=NOW)
    writer.write_run(tmp_path, "m", run, now=NOW)
    command = [sys.executable, "-m", "pytest_benchmark", "--storage", f"file://{tmp_path}"]
    listed = subprocess.run([*command, "list"], capture_output=True, text=True, check=True)
    assert len(listed.stdout.split()) == 2
    compared = subprocess.run([*command, "compare"], capture_output=True, text=True, check=True)
    assert compared.stdout.count("test_step[lora]") == 2


def test_machines_are_named_by_what_changes_a_result() -> None:
    assert machine_name("AMD EPYC 7763 64-Core Processor", 2, None) == "amd-epyc-7763-2c-cpu"
    assert (
        machine_name("Intel(R) Xeon(R) CPU @ 2.20GHz", 8, "NVIDIA H100 80GB HBM3")
        == "intel-xeon-8c-nvidia-h100-80gb-hbm3"
    )
    assert machine_name(None, None, None) == "unknown-xc-cpu"


def test_the_machine_record_has_no_live_clock_and_no_host_name() -> None:
    info = json.dumps(machine_info()).lower()
    assert "hz" not in info
    assert f'"{os.uname().nodename.lower()}"' not in info
