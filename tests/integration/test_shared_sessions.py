"""Whole sessions of ``pytest -m multigpu`` on two processes of the CPU: measured, compared with plans, saved, shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.suite import sessions

pytestmark = pytest.mark.slow  # three launches of ranks for each method

METHODS = ["full", "lora", "qlora"]


def saved(folder: Path, *options: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """What a session shows, and the metrics of its cases by method."""
    arguments = [
        "-m",
        "multigpu",
        "--details",
        "--device=cpu",
        "--rounds=2",
        "--time-limit=2400",
        f"--results={folder}",
    ]
    (done,) = sessions([*arguments, *options])
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("*/0001_*.json")
    cases = json.loads(file.read_text())["peft_gauge"]["cases"]
    assert {case["outcome"] for case in cases} == {"passed"}
    return done.stdout, {case["metrics"]["method"]: case["metrics"] for case in cases}


def test_two_groups_of_two_processes_share_a_step(tmp_path: Path) -> None:
    """Hybrid sharding: each group holds all shards, and gradients are averaged over the groups. The session fails where
    collectives are not the plan's."""
    text, found = saved(tmp_path, "--gpus=4", "--replicate=2", "--model=toy-llama", "--method=lora")
    assert "shared by 4 ranks (fsdp2, 2 replicas)" in text
    metrics = found["lora"]
    assert (metrics["ranks"], metrics["replicas"]) == (4, 2)
    calls = {name: each["calls"] for name, each in metrics["rank_records"][3]["communication"].items()}
    assert calls["all_reduce"] == calls["reduce_scatter"] > 0


@pytest.mark.parametrize(
    ("model", "strategy", "methods"),
    [("toy-llama", "fsdp2", METHODS), ("toy-llama", "ddp", ["lora"]), ("smollm2-135m", "fsdp2", METHODS)],
)
def test_two_processes_share_a_step(model: str, strategy: str, methods: list[str], tmp_path: Path) -> None:
    chosen = ["--model=" + model, "--strategy=" + strategy, "--method=" + ",".join(methods)]
    text, found = saved(tmp_path, *chosen)
    assert [*found] == methods
    assert f"{model} on cpu, shared by 2 ranks ({strategy})" in text
    for metrics in found.values():
        assert metrics["ranks"] == len(metrics["rank_records"]) == 2
        assert metrics["rank_peak_bytes"] == max(each["peak_bytes"] for each in metrics["rank_records"])
        assert metrics["rank_sent_bytes"] > 0
        assert metrics["weak_scaling"] > 0
        assert metrics["strong_scaling"] > 0
    if strategy == "fsdp2":  # half of the weights each; QLoRA holds four bits of most of them
        weights = {method: metrics["rank_records"][0]["resident_by_category"] for method, metrics in found.items()}
        assert weights["lora"]["base_weights"] == weights["full"]["base_weights"]
        assert weights["qlora"]["base_weights"] < weights["lora"]["base_weights"]
        assert weights["full"]["optimizer_state"] == pytest.approx(2 * weights["full"]["base_weights"], rel=0.01)
