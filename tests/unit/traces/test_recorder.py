"""A step recorded by a stand-in for the CUDA allocator's history, in torch's own format, and what is left of it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peft_gauge.commands.trace import request_of
from peft_gauge.errors import GaugeError
from peft_gauge.measure import passes, trace
from peft_gauge.measure.passes import CaseSetup
from peft_gauge.memory.categories import BACKWARD, FORWARD, OPTIMIZER, OUTSIDE
from peft_gauge.plan.record import PlanRequest
from peft_gauge.traces import recorder
from peft_gauge.traces.phases import MARK_BYTES
from peft_gauge.traces.reader import read, step_log
from peft_gauge.training import cases, methods, models
from peft_gauge.training.cases import Case
from peft_gauge.training.settings import StepSettings
from tests.support.snapshots import ADAM, EMBEDDING, GRADS, LINEAR, Device, frame, snapshot

# Seconds, which are too long for the unit tests.
pytestmark = pytest.mark.integration

MARK_ADDRESS = 0xF0000
MARK_FRAMES = [frame("peft_gauge/traces/recorder.py", 80, "mark"), frame("train.py", 3, "<module>")]


class StandIn:
    """The history of a GPU's allocator: what a job takes and gives is kept while it is on, as torch keeps it."""

    def __init__(self) -> None:
        self.device = Device()
        self.on = False
        self.switched: list[bool] = []

    def history(self, on: bool, most_events: int) -> None:
        assert most_events > 0 or not on
        self.on = on
        self.switched.append(on)
        if not on:
            self.device.trace.clear()  # torch forgets it

    def take(self, address: int, size: int, frames: Any = ()) -> None:
        if self.on:
            self.device.take(address, size, frames)

    def give(self, address: int, size: int) -> None:
        if self.on:
            self.device.give(address, size)

    def mark(self, number: int, device: str) -> None:
        size = MARK_BYTES + 512 * number
        self.take(MARK_ADDRESS, size, MARK_FRAMES)
        self.give(MARK_ADDRESS, size)

    def snapshot(self) -> dict[str, Any]:
        found = snapshot(
            self.device, blocks=[[self.device.block(0x100, 3000, 4096), self.device.block(0x200, 512, 512)]]
        )
        found["device_traces"] = [list(self.device.trace)]
        return found


class Job:
    """Keeps an activation through forward, a gradient through backward; two micro-batches; fails where asked to."""

    def __init__(self, card: StandIn, fails_in: str = "") -> None:
        self.card, self.fails_in = card, fails_in
        self.settings = StepSettings(1, 8, grad_accumulation=2)
        self.cleared = 0
        self.has_gradient = False

    def forward(self) -> None:
        self.card.take(0x1000, 1000, EMBEDDING)
        self.card.take(0x2000, 2000, LINEAR)
        self.card.give(0x1000, 1000)
        self._fail("forward")

    def backward(self) -> None:
        self.card.take(0x3000, 4, GRADS)
        if not self.has_gradient:
            self.card.take(0x4000, 4000)
            self.has_gradient = True
        self.card.give(0x2000, 2000)
        self.card.give(0x3000, 4)
        self._fail("backward")

    def optimizer_step(self) -> None:
        self.card.take(0x5000, 5000, ADAM)
        self.card.give(0x5000, 5000)

    def clear(self) -> None:
        self.cleared += 1
        if self.has_gradient:
            self.card.give(0x4000, 4000)
            self.has_gradient = False

    def effective_settings(self) -> dict[str, Any]:
        return {"attention": "sdpa"}

    def _fail(self, where: str) -> None:
        if where == self.fails_in:
            raise torch.OutOfMemoryError(f"CUDA out of memory in {where}")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn()
    monkeypatch.setattr(recorder, "memory_history", stand_in.history)
    monkeypatch.setattr(recorder, "memory_snapshot", stand_in.snapshot)
    monkeypatch.setattr(recorder, "mark", stand_in.mark)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test")
    yield stand_in
    assert not stand_in.on, "the history stayed on"


def toy_case(device: str, **settings: Any) -> Case:
    model = models.resolve("toy-llama", weights="random")
    return Case(model, methods.LORA, StepSettings(2, 16, **settings), device, "float32")


# The recorder ---------------------------------------------------------------------------------------------------------


def test_a_step_is_recorded_with_its_phases_and_without_its_marks(card: StandIn) -> None:
    found = recorder.record_step(Job(card), "cuda")
    log = step_log(found)
    assert card.switched == [True, False]
    assert [part.phase for part in log.segments] == [
        FORWARD, BACKWARD, FORWARD, BACKWARD, OPTIMIZER, OUTSIDE,
    ]  # fmt: skip
    made = [(each.nbytes, each.phase) for each in log.allocations if each.born >= 0]
    forward, backward = [(1024, FORWARD), (2048, FORWARD)], [(512, BACKWARD)]
    assert made == [*forward, *backward, (4096, BACKWARD), *forward, *backward, (5120, OPTIMIZER)]
    assert log.before_bytes == 3072 + 512
    assert log.unsplit_bytes == 1024


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_history_is_off_after_a_step_that_failed(card: StandIn, where: str) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        recorder.record_step(Job(card, where), "cuda")
    assert card.switched == [True, False]


def test_what_is_kept_in_a_file_is_what_was_recorded(card: StandIn, tmp_path: Path) -> None:
    found = recorder.record_step(Job(card), "cuda")
    path = tmp_path / "new" / "folder" / "case.json.gz"
    recorder.write(path, found, {"model": "toy-llama"}, {"gpu": "NVIDIA Test"})
    again = read(path)
    first, second = step_log(found), step_log(again)
    assert first.allocations == second.allocations
    assert first.events == second.events
    assert (first.before_bytes, first.unsplit_bytes) == (second.before_bytes, second.unsplit_bytes)
    assert again.settings == {"model": "toy-llama"}
    assert again.about == {"device": 0, "gpu": "NVIDIA Test"}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    # No address of this process, and no path of this machine.
    text = gzip.decompress(path.read_bytes()).decode()
    assert "/opt/env" not in text
    assert max(event[1] for event in json.loads(text)["events"]) < 100


def test_stacks_are_cut_where_the_file_would_be_too_large(
    card: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = recorder.record_step(Job(card), "cuda")
    deep = [
        tuple(f"package/module_{number}.py:{depth}:call" for depth in range(30)) for number in range(len(found.stacks))
    ]
    path = tmp_path / "case.json.gz"

    def depth() -> int:
        recorder.write(path, replace(found, stacks=deep), {}, {})
        return max(len(stack) for stack in json.loads(gzip.decompress(path.read_bytes()))["stacks"])

    assert depth() == recorder.FRAMES[0]
    monkeypatch.setattr(recorder, "MOST_BYTES", path.stat().st_size - 1)
    assert depth() == recorder.FRAMES[1]
    monkeypatch.setattr(recorder, "MOST_BYTES", 10)
    assert depth() == recorder.FRAMES[-1]


def test_a_folder_that_cannot_be_written_is_one_line(card: StandIn, tmp_path: Path) -> None:
    found = recorder.record_step(Job(card), "cuda")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(GaugeError, match="cannot write the trace to .*file/case.json.gz: File exists"):
        recorder.write(tmp_path / "file" / "case.json.gz", found, {}, {})


# Beside the memory pass -----------------------------------------------------------------------------------------------


def test_the_memory_pass_leaves_a_trace_that_tells_what_to_plan(card: StandIn, tmp_path: Path) -> None:
    case = toy_case("cuda", grad_accumulation=2, clip_grad_norm=1.0)
    found = trace.trace_step(case, Job(card), tmp_path, {"allocated_peak_bytes": 10_000})  # type: ignore[arg-type]
    (path,) = tmp_path.iterdir()
    assert found == {"file": path.name}
    assert path.name.startswith("lora-toy-llama-cuda_")
    recorded = read(path)
    assert recorded.about["gpu"] == "NVIDIA Test"
    assert recorded.about["allocated_peak_bytes"] == 10_000
    assert recorded.about["versions"]["torch"] == version("torch")
    assert request_of(recorded.settings) == PlanRequest(
        case.model, case.method, case.settings, dtype="float32", attention="sdpa"
    )


def test_a_trace_that_fails_says_why_and_costs_the_case_nothing(card: StandIn, tmp_path: Path) -> None:
    job = Job(card, fails_in="backward")
    found = trace.trace_step(toy_case("cuda"), job, tmp_path, {})  # type: ignore[arg-type]
    assert found == {"skipped": "OutOfMemoryError: CUDA out of memory in backward"}
    assert list(tmp_path.iterdir()) == []
    assert job.cleared == 2  # once before the step, once after what it left


def test_a_cpu_has_no_trace_and_says_so(tmp_path: Path) -> None:
    job: Any = SimpleNamespace()  # is not touched
    assert trace.trace_step(toy_case("cpu"), job, tmp_path, {}) == {"skipped": trace.NO_LOG}
    assert list(tmp_path.iterdir()) == []


def test_the_step_that_is_traced_comes_after_all_that_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def trace_step(case: Case, job: Any, folder: Path, metrics: Any) -> dict[str, str]:
        asked.append((case, folder, dict(metrics)))
        return {"file": "x.json.gz"}

    monkeypatch.setattr(trace, "trace_step", trace_step)
    case = toy_case("cpu")
    stream = torch.arange(cases.BATCHES * case.settings.tokens) % 100
    setup = CaseSetup(case, case.model, stream, passes=("memory",), trace=tmp_path)
    found = passes.measure(setup)
    assert found["memory"]["trace"] == {"file": "x.json.gz"}
    ((_, folder, metrics),) = asked
    assert folder == tmp_path
    assert metrics == {name: value for name, value in found["memory"].items() if name != "trace"}
    assert "trace" not in passes.measure(replace(setup, trace=None))["memory"]
    assert len(asked) == 1
