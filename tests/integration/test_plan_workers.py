"""Plans in processes of their own: real workers plan the same in their order, and one that dies costs one case."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from peft_gauge.isolation import child_environment
from peft_gauge.measure import PRELOAD
from peft_gauge.memory.categories import CATEGORIES
from peft_gauge.plan import worker
from peft_gauge.plan.record import PlanFailure, PlanRequest
from peft_gauge.plan.worker import Preloaded
from peft_gauge.pytest_plugin.workers import process_environment
from peft_gauge.training import methods, models
from peft_gauge.training.settings import StepSettings
from tests.support.children import heed_ctrl_c

if TYPE_CHECKING:
    from peft_gauge.plan.search import Tried
    from tests.conftest import Run

TOY = models.resolve("toy-llama", weights="random")
CONTRACT = {
    "model", "method", "trainable_params", "total_params", "phase_of_peak", "peak_bytes", "resident_bytes",
    "resident_live_outputs_bytes", "reserved_bytes_estimate", "device_bytes_estimate", "peak_by_category",
    "resident_by_category", "saved_activation_bytes_per_token", "flops_per_step", "fits", "headroom_bytes", "warnings",
    "seconds", "adapted_modules",
}  # fmt: skip


@pytest.mark.usefixtures("forked_plans")
def test_the_json_of_a_real_worker_keeps_the_contract(run_command: Run) -> None:
    asked = ["--method", "lora", "--method", "prompt", "--gpu", "24GB", "--gpu", "H100 80GB"]
    code, out, _ = run_command("plan", "--model", "toy-llama", "--seq", "32", *asked, "--json")
    cases = json.loads(out)

    assert code == 0
    assert [case["method"] for case in cases] == ["lora", "prompt"]
    for case in cases:
        assert set(case) >= CONTRACT
        assert case["model"] == "toy-llama"
        assert set(case["peak_by_category"]) <= set(CATEGORIES)
        assert sum(case["peak_by_category"].values()) == case["peak_bytes"]
        assert case["fits"] == {"24GB": True, "H100 80GB": True}
        assert case["headroom_bytes"].keys() == case["fits"].keys()
        parts = case["device"]
        assert parts["reserved_bytes"] + parts["context_bytes"] == case["device_bytes_estimate"]


@pytest.mark.slow
def test_forked_workers_plan_the_same_in_the_order_of_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of them share four cases; a spawned one plans all."""
    requests = [PlanRequest(TOY, method, StepSettings(1, 8)) for method in methods.DEFAULT_METHODS[3:]]
    alone: list[Any] = list(worker.plan_all(requests))
    monkeypatch.setattr(worker, "_spawn", lambda: pytest.fail("it was not forked"))
    preloaded = Preloaded(PRELOAD, child_environment(process_environment()))
    shared: list[Any] = worker.plan_in_parallel(requests, workers=3, preloaded=preloaded)
    assert [outcome.method for outcome in shared] == [request.method.name for request in requests]
    assert [replace(outcome, seconds=0.0) for outcome in shared] == [replace(outcome, seconds=0.0) for outcome in alone]


@pytest.mark.usefixtures("forked_plans")
def test_a_search_shows_how_far_it_is() -> None:
    """Before each plan: its place among the searches, and a bound that the number of plans keeps."""
    requests = [
        PlanRequest(TOY, methods.get(name), StepSettings(1, 8), gpus=("600MB", "24GB")) for name in ("lora", "ia3")
    ]
    heard: list[tuple[int, Tried]] = []
    found: list[Any] = list(
        worker.plan_all(requests, find="seq", searching=lambda done, tried: heard.append((done, tried)))
    )
    assert [(each.plan.method, each.gpu) for each in found] == [
        (method, gpu) for method in ("lora", "ia3") for gpu in ("600MB", "24GB")
    ]
    for place, each in enumerate(found):
        of_it = [tried for done, tried in heard if (done, tried.gpu) == divmod(place, 2)]
        assert [tried.plans for tried in of_it] == list(range(len(each.tried)))
        bounds = [tried.at_most for tried in of_it if tried.at_most is not None]
        assert all(len(each.tried) <= bound for bound in bounds)
        assert bool(bounds) == (len(each.tried) > 2), "a line needs two values"


PLANTED_OUTCOME = """
import os, signal, time
from peft_gauge.plan import worker
from peft_gauge.plan.record import PlanFailure

def outcome(request, find, tell):
    if request.method.name == "lora":
        os.kill(os.getpid(), signal.SIGSEGV)
    if request.method.name == "qlora":
        with open(os.environ["HANGING"], "a") as file:
            print(os.getpid(), file=file)
        time.sleep(600)
    print("noise on standard output")
    return [PlanFailure(request.model.name, request.method.name, "planned")]

worker._outcome = outcome
if __name__ == "__main__":
    worker.main()
"""


SPAWNED = pytest.param("spawned", marks=pytest.mark.slow)
UNFORKED = pytest.param("cannot be forked", marks=pytest.mark.slow)


@pytest.mark.parametrize("way", [SPAWNED, "forked", UNFORKED])
def test_a_worker_that_dies_costs_one_case(way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = f"planted_{way.replace(' ', '_')}"
    script = tmp_path / f"{module}.py"
    script.write_text(PLANTED_OUTCOME)
    monkeypatch.setattr(worker, "WORKER", (sys.executable, str(script)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    preloaded = Preloaded(["no_such_module" if way == "cannot be forked" else module], child_environment())
    # A new interpreter for each worker takes seconds: a death by each way that differs, and no more.
    names = {
        "spawned": ("full", "lora", "ia3"),
        "forked": ("full", "lora", "ia3", "lora", "prompt"),
        "cannot be forked": ("lora", "prompt"),
    }[way]
    requests = [PlanRequest(TOY, methods.get(name), StepSettings(1, 8)) for name in names]
    if way == "spawned":
        outcomes = list(worker.plan_all(requests))
    else:
        if way == "forked":
            monkeypatch.setattr(worker, "_spawn", lambda: pytest.fail("it was not forked"))
        outcomes = worker.plan_in_parallel(requests, workers=1, preloaded=preloaded)

    assert [outcome.method for outcome in outcomes if isinstance(outcome, PlanFailure)] == list(names)
    errors = [outcome.error for outcome in outcomes if isinstance(outcome, PlanFailure)]
    died = "planning lora on toy-llama ended the planning process by SIGSEGV"
    assert errors == [died if name == "lora" else "planned" for name in names]


INTERRUPTED = """
import sys
from peft_gauge.training import methods, models
from peft_gauge.isolation import child_environment
from peft_gauge.plan.record import PlanRequest
from peft_gauge.plan.worker import Preloaded, plan_in_parallel
from peft_gauge.training.settings import StepSettings
requests = [PlanRequest(models.resolve("toy-llama"), methods.QLORA, StepSettings(1, 8))] * 6
preloaded = Preloaded(["planted_hanging"], child_environment())
plan_in_parallel(requests, workers=2, preloaded=preloaded)
"""


def test_ctrl_c_ends_forked_workers(tmp_path: Path) -> None:
    """They live in sessions of their own, where a terminal's Ctrl-C does not arrive."""
    (tmp_path / "planted_hanging.py").write_text(PLANTED_OUTCOME)
    hanging = tmp_path / "pids"
    hanging.touch()
    path = os.pathsep.join([str(Path(worker.__file__).parents[2]), str(tmp_path)])
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        env={**os.environ, "PYTHONPATH": path, "HANGING": str(hanging)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    )
    with process:
        try:
            end = time.monotonic() + 60
            while len(hanging.read_text().splitlines()) < 2:
                assert process.poll() is None, "it ended too early"
                assert time.monotonic() < end, "it did not happen"
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
    assert told.strip().endswith("KeyboardInterrupt")
    assert len(hanging.read_text().splitlines()) == 2, "one was replaced"
    assert not any(psutil.pid_exists(int(pid)) for pid in hanging.read_text().splitlines())
