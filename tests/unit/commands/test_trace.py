"""``peft-gauge trace`` as a user runs it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fixtures.traces import planned_step, trace_file, trace_request
from peft_gauge.plan import planner
from tests.support.snapshots import Device, one_step, snapshot

if TYPE_CHECKING:
    from peft_gauge.plan.record import PlanRequest
    from peft_gauge.traces.log import StepLog
    from tests.conftest import Run


# Builds, plans or trains models: seconds, which are too long for the unit tests.
pytestmark = pytest.mark.integration
LORA = str(trace_file("lora"))


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[PlanRequest]:
    """What was planned; TinyLlama's LoRA step is planned once a session."""
    asked: list[PlanRequest] = []

    def step_log(request: PlanRequest) -> tuple[StepLog, tuple[str, ...]]:
        asked.append(request)
        return planned_step("lora"), ("a note of the plan",)

    monkeypatch.setattr(planner, "step_log", step_log)
    return asked


def test_a_recorded_trace_needs_no_options(run_command: Run, planned: list[PlanRequest]) -> None:
    code, out, err = run_command("trace", LORA)
    assert (code, err) == (0, "")
    assert planned == [trace_request("lora")]
    assert "lora on tinyllama, 4×768 tokens, bfloat16, adamw: a recorded step compared with its plan" in out
    assert "cuBLAS workspace" in out
    assert "+67,108,864" in out
    assert "first difference: " in out
    assert "note: a note of the plan" in out
    assert max(map(len, out.splitlines())) <= 100


def test_options_say_what_a_trace_does_not_and_overrule_it(run_command: Run, planned: list[PlanRequest]) -> None:
    code, *_ = run_command(
        "trace", LORA, "--batch", "2", "--grad-checkpointing", "--grad-accumulation", "3", "--attention", "eager"
    )
    assert code == 0
    (request,) = planned
    assert (request.settings.batch, request.settings.seq) == (2, 768)
    assert request.settings.grad_checkpointing
    assert request.settings.grad_accumulation == 3
    assert request.attention == "eager"


def test_json_has_everything_and_adds_up(run_command: Run, planned: list[PlanRequest]) -> None:
    code, out, _ = run_command("trace", LORA, "--json")
    record = json.loads(out)
    assert code == 0
    assert record["difference_bytes"] == record["measured"]["peak_bytes"] - record["planned"]["peak_bytes"]
    assert sum(row["bytes"] for row in record["rows"]) == record["difference_bytes"]
    assert sum(sizes["bytes"] for sizes in record["by_category"].values()) == record["difference_bytes"]
    assert record["settings"]["method"] == "lora"
    assert {"kind", "phase", "operator", "module", "planned_bytes", "measured_bytes", "number"} <= record[
        "first"
    ].keys()


def test_a_trainers_trace_is_compared_with_that_trainers_step(run_command: Run, planned: list[PlanRequest]) -> None:
    code, out, _ = run_command("trace", str(trace_file("lora-sft")), "--json")
    assert code == 0
    assert json.loads(out)["title"].startswith("lora on tinyllama, by trl.SFTTrainer, 4×768 tokens")
    (request,) = planned
    # The header names neither: they are TRL's defaults.
    assert (request.loop, request.settings.grad_checkpointing, request.settings.mixed_precision) == (
        "sft",
        True,
        "bf16",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "does not record its settings; add --model, --method, --batch, --seq"),
        (("--model", "toy-llama", "--batch", "1"), "does not record its settings; add --method, --seq"),
        (("--model", "no-such", "--method", "lora", "--batch", "1", "--seq", "8"), "unknown model 'no-such'"),
        (("--model", "toy-llama", "--method", "lorra", "--batch", "1", "--seq", "8"), "did you mean lora"),
        (("--device", "4"), "has no device 4; it was recorded with 1 device"),
        (("--top", "0"), "--top must be at least 1"),
    ],
)
def test_mistakes_are_one_line(run_command: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    path = tmp_path / "dump.pickle"
    path.write_bytes(pickle.dumps(snapshot(one_step(Device()))))
    code, out, err = run_command("trace", str(path), *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_what_is_no_trace_is_one_line(run_command: Run, tmp_path: Path) -> None:
    path = tmp_path / "dump.pickle"
    for content, message in (
        (b"hello", "is not an allocator trace"),
        (pickle.dumps({"device_traces": [[]]}), "recording was off"),
    ):
        path.write_bytes(content)
        code, out, err = run_command("trace", str(path))
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert message in err


def test_a_snapshot_is_compared_with_the_plan_that_the_options_make(run_command: Run, tmp_path: Path) -> None:
    """A toy model's plan beside a step that has nothing of it but one allocation's size: all of it is told."""
    path = tmp_path / "dump.pickle"
    path.write_bytes(pickle.dumps(snapshot(one_step(Device()))))
    options = ("--model", "toy-llama", "--method", "lora", "--batch", "2", "--seq", "16", "--dtype", "float32")
    code, out, _ = run_command("trace", str(path), *options, "--json")
    record = json.loads(out)
    assert code == 0
    assert record["difference_bytes"] < 0
    assert sum(row["bytes"] for row in record["rows"]) == record["difference_bytes"]
    code, out, _ = run_command("trace", str(path), *options, "--top", "3")
    assert code == 0
    assert "more" in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "my-adapter"}, "was recorded with an adapter config, my-adapter; give it with --adapter"),
        (
            {"model": "my-folder"},
            "was recorded with the model my-folder, which is not found here; give it with --model",
        ),
    ],
)
def test_what_a_trace_has_from_a_file_must_be_named(
    run_command: Run, tmp_path: Path, changed: dict[str, str], message: str
) -> None:
    settings = {"model": "toy-llama", "method": "lora", "batch": 1, "seq": 8, **changed}
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"settings": settings, "stacks": [], "events": [["alloc", 1, 512, -1]]}))
    code, out, err = run_command("trace", str(path))
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err
