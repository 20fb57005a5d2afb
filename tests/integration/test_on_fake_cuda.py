"""The path of every benchmark on a GPU, and of tests/gpu, run to its end on the GPU of `tests.support.fake_cuda`.

What is asserted is that each case passes and is recorded as one of a GPU is. Metrics are of the CPU's kernels, and of
no GPU: times mean nothing, and peaks little.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peft_gauge.history import schema
from peft_gauge.training import methods
from tests.support import fake_cuda
from tests.support.fake_cuda import CONTEXT_BYTES, GIB, MIB, NAME, SM_CLOCK_MHZ
from tests.support.paths import ROOT

# float32: most CPUs multiply 16 bit ten times as slowly. The GPU is so small that its matrices are too.
QUICK = ["--model=toy-llama", "--dtype=float32", "--batch=2", "--seq=64", "--rounds=3"]
SMALL_CARD_BYTES = 1280 * MIB


def run_pytest(folder: Path, *arguments: str, total_bytes: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--results", str(folder / "out"), *arguments],
        cwd=ROOT,
        env=fake_cuda.settings(folder, total_bytes=total_bytes),
        capture_output=True,
        text=True,
        check=False,
    )


def records(folder: Path) -> list[dict[str, Any]]:
    (path,) = (folder / "out").rglob("*.json")
    run = json.loads(path.read_text(encoding="utf-8"))
    assert run["machine_info"]["accelerator"]["name"] == NAME
    cases: list[dict[str, Any]] = run[schema.KEY]["cases"]
    return cases


def check(folder: Path, done: subprocess.CompletedProcess[str], wanted: set[tuple[str, str]]) -> None:
    """That all ``wanted`` (benchmark, method) passed, with a GPU's metrics, and that nothing else happened."""
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    cases = records(folder)
    assert {case["outcome"] for case in cases} <= {"passed"}, done.stdout[-6000:]
    found = {(case["benchmark"], case["metrics"].get("method")) for case in cases}
    assert wanted <= found, sorted(wanted - found)
    for case in cases:
        metrics = case["metrics"]
        assert metrics["device"] == "cuda"
        if "allocated_peak_bytes" in metrics:
            check_memory(metrics)
        for line in metrics.get("growth", ()):
            assert abs(line["intercept_bytes"] - line["planned_intercept_bytes"]) < 4 * MIB
        if "step_seconds" in metrics:
            assert metrics["host_step_seconds"] > 0
            assert metrics["states"][0]["before"]["sm_clock_mhz"] == SM_CLOCK_MHZ


def check_memory(metrics: dict[str, Any]) -> None:
    assert metrics["unavailable"] == {}
    assert 0 < metrics["allocated_peak_bytes"] <= metrics["reserved_peak_bytes"]
    assert metrics["process_peak_bytes"] >= CONTEXT_BYTES + metrics["reserved_peak_bytes"]
    assert metrics["own_device_peak_bytes"] == metrics["process_peak_bytes"]
    assert metrics["ooms"] == metrics["alloc_retries"] == 0
    # Of a toy's step most are workspaces, which are planned as the GPU's.
    assert abs(metrics["relative_error"]["allocated_peak_bytes"]) < 0.05
    # The tracker's sum and the allocator's, which have the same events, in bytes and in blocks.
    assert 0.9 < metrics["tensor_peak_bytes"] / (metrics["allocated_peak_bytes"] - WORKSPACES_BYTES) <= 1.0


WORKSPACES_BYTES = 2 * fake_cuda.WORKSPACE_BYTES  # of forward's thread and of backward's


def test_a_method_is_measured_on_a_card(tmp_path: Path) -> None:
    """LoRA's peak, times and fingerprint; without its growth, and without the GPU's speed."""
    benchmarks = ("test_memory", "test_speed", "test_fingerprint")
    selected = [*(f"benchmarks/{name}.py" for name in benchmarks), "-k", "test_peak or test_phase or test_fingerprint"]
    done = run_pytest(tmp_path, *selected, "-m", "gpu", *QUICK, "--method=lora", total_bytes=SMALL_CARD_BYTES)
    check(tmp_path, done, {(name, "lora") for name in benchmarks})


@pytest.mark.slow
def test_every_benchmark_of_every_method_on_a_card(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "benchmarks", "-m", "gpu", *QUICK, total_bytes=SMALL_CARD_BYTES)
    names = [method.name for method in methods.DEFAULT_METHODS]
    check(tmp_path, done, {(benchmark, name) for benchmark in ("test_memory", "test_speed") for name in names})


@pytest.mark.slow
def test_many_adapters_are_served_on_a_card(tmp_path: Path) -> None:
    selected = ["benchmarks/test_many_adapters.py", "-m", "gpu and slow"]
    done = run_pytest(tmp_path, *selected, "--model=toy-llama", "--dtype=float32", total_bytes=SMALL_CARD_BYTES)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert {case["outcome"] for case in records(tmp_path)} == {"passed"}


@pytest.mark.slow
def test_the_tests_of_the_instruments_pass_on_a_card(tmp_path: Path) -> None:
    files = ["tests/gpu"]
    # Of the speeds of this machine's CPU nothing is told.
    left_out = "not smollm2 and not second_product"
    done = run_pytest(tmp_path, *files, "-m", "gpu", "-k", left_out, total_bytes=4 * GIB)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
