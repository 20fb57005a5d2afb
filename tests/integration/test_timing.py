"""The whole timing path under a fake clock: stored, derived, shown and exported metrics agree to the last digit."""

from __future__ import annotations

import json
from typing import Any

import pytest

from peft_gauge import clock
from peft_gauge.history.schema import CaseRecord
from peft_gauge.report.format import shown_bytes, shown_seconds
from peft_gauge.report.rows import method_rows
from peft_gauge.report.terminal import plan_table
from tests.support.paths import ROOT
from tests.support.suite import sessions


class FakeClock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


def test_timed_is_what_the_clock_says() -> None:
    fake = FakeClock()
    assert clock.timed(lambda: fake.work(0.25), fake) == 0.25


def test_median_ratio_pairs_round_by_round() -> None:
    # The machine slows down threefold in the middle; the pairs do not notice.
    assert clock.median_ratio([2, 6, 6, 2, 2], [1, 3, 3, 1, 1]) == 2
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        clock.median_ratio([1, 2], [1])


def test_throughput_times_time_is_the_work() -> None:
    assert clock.tokens_per_second(128, 0.4) * 0.4 == pytest.approx(128)


def test_the_clock_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    waited: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    first = clock.synchronised_clock()
    assert waited == [True]
    assert clock.synchronised_clock() >= first


# Runs the suite's own fixture and recorder on rounds that "another process" measured, each of another length.
ROUNDS = [0.1, 0.125, 0.3, 0.125, 0.2]
PLANTED = f"""
import statistics
import pytest
from fixtures.replay import REPLAY_CLOCK

ROUNDS = {ROUNDS}

@pytest.mark.benchmark(timer=REPLAY_CLOCK)
def test_planted(replay, record):
    replay(ROUNDS)
    median = statistics.median(ROUNDS)
    record(method="lora", model="toy", device="cpu", forward_seconds=median, step_seconds=median,
           step_over_control=2.0, tokens_per_second=64 / median)


def test_swept(record):
    point = {{"label": "r4", "trainable_params": 896, "peak_bytes": 660_480, "quality": 0.9, "quality_low": 0.8,
             "quality_high": 1.0, "seeds": 3, "diverged": 0}}
    record(model="toy", task="planted", pareto=[point], trainings=[], knees={{}})
"""


@pytest.fixture(scope="module")
def planted_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What the suite prints and saves of a benchmark whose every duration is known."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks" / "test_planted.py").write_text(PLANTED)
    (folder / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    (folder / "pytest.ini").write_text((ROOT / "pytest.ini").read_text())
    (done,) = sessions(["benchmarks", "-q", "--details", "--results", "out"], folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (saved,) = (folder / "out").glob("*/0001_*.json")
    return done.stdout, json.loads(saved.read_text())


def test_replayed_rounds_are_saved_to_the_last_digit(planted_run: tuple[str, dict[str, Any]]) -> None:
    _, run = planted_run
    (benchmark,) = run["benchmarks"]
    assert benchmark["stats"]["data"] == ROUNDS
    assert benchmark["stats"]["rounds"] == 5
    assert benchmark["stats"]["median"] == 0.125
    assert benchmark["stats"]["max"] == 0.3


def test_derived_and_shown_figures_agree_with_the_stored(planted_run: tuple[str, dict[str, Any]]) -> None:
    shown, run = planted_run
    (benchmark,) = run["benchmarks"]
    (case,) = (each for each in run["peft_gauge"]["cases"] if "test_planted.py::test_planted" in each["id"])
    assert benchmark["extra_info"] == case["metrics"]
    assert case["metrics"]["step_over_control"] == 2.0
    assert case["metrics"]["tokens_per_second"] == 512
    row = next(line for line in shown.splitlines() if line.startswith("│ lora"))
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["lora", "–", "–", "–", "125.00 ms", "–", "–", "125.00 ms", "2.00", "512"]


def test_a_run_shows_its_sweeps(planted_run: tuple[str, dict[str, Any]]) -> None:
    shown, _ = planted_run
    assert "test_swept: toy, planted" in shown
    assert "│ r4      │       896 │ 660.48 kB │" in shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (1.5, "1.50 s"), (0.999, "999.00 ms"), (0.00012, "120.00 µs"), (2.5e-6, "2.50 µs"), (0.0, "0.00 µs")],
)
def test_seconds_as_shown(value: float | None, shown: str) -> None:
    assert shown_seconds(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (7_380_000, "7.38 MB"),
        (538e6, "538.00 MB"),
        (2.2e9, "2.20 GB"),
    ],
)
def test_bytes_as_shown(value: float | None, shown: str) -> None:
    assert shown_bytes(value) == shown


def test_a_failed_case_lends_no_figures_to_the_table() -> None:
    metrics = {"method": "lora", "model": "m", "device": "cpu", "step_seconds": 1.0}
    cases = [
        CaseRecord("a", "test_speed", "failed", "out of memory", metrics),
        CaseRecord("b", "test_speed", "passed", None, {**metrics, "step_seconds": 2.0}),
    ]
    assert [row["step_seconds"] for row in method_rows(cases)] == [2.0]


def test_planned_cases_have_a_table_of_their_own() -> None:
    plan = {
        "model": "toy",
        "method": "lora",
        "settings": {"batch": 1, "seq": 8, "dtype": "bfloat16", "optimizer": "adamw", "grad_checkpointing": False},
        "phase_of_peak": "backward",
        "trainable_params": 1234,
        "peak_bytes": 17_373_248_000,
        "resident_bytes": 13_678_162_944,
        "saved_activation_bytes_per_token": 512.0,
        "device_bytes_estimate": 18_249_416_704,
        "gpus": [],
    }
    shown = plan_table.summary([CaseRecord("a", "test_memory_plan", "passed", None, {"plan": plan})], 80)
    row = next(line for line in shown.splitlines() if line.startswith("│ lora"))
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["lora", "backward", "1,234", "17.37 GB", "13.68 GB", "512 B", "18.25 GB"]
    assert plan_table.summary([], 80) == ""
