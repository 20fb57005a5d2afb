"""Plans of a session: each is made once, and what is known to be wanted is made together with the first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fixtures import measured, plans, sweeps
from peft_gauge.plan.record import Plan, PlanFailure, PlanRequest
from peft_gauge.quality import tasks
from peft_gauge.training import methods, models
from peft_gauge.training.step import StepSettings
from tests.planted_cases import plan_of


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[list[PlanRequest]]:
    """What each turn of planning was asked; IA³ cannot be planned."""
    asked: list[list[PlanRequest]] = []

    def plan_in_parallel(requests: Sequence[PlanRequest], **options: Any) -> list[Plan | PlanFailure]:
        asked.append(list(requests))
        return [
            PlanFailure(each.model.name, "ia3", "no room") if each.method is methods.IA3 else plan_of(each)
            for each in requests
        ]

    monkeypatch.setattr(plans, "plan_in_parallel", plan_in_parallel)
    return asked


def request_of(method: str) -> PlanRequest:
    return PlanRequest(models.resolve("toy-llama"), methods.get(method), StepSettings(1, 8))


def session_of(*fixturenames: str, **options: Any) -> Any:
    """A session of one item, which asks for these fixtures, and another that has none (as a doctest)."""
    chosen = {"--model": None, "--dataset": None, "--dtype": None, "--seed": 0} | options
    items = [SimpleNamespace(fixturenames=fixturenames), SimpleNamespace()]
    return SimpleNamespace(items=items, config=SimpleNamespace(getoption=chosen.__getitem__))


def test_what_is_wanted_is_planned_with_the_first_and_everything_once(turns: list[list[PlanRequest]]) -> None:
    lora, qlora, full = request_of("lora"), request_of("qlora"), request_of("full")
    planned = plans.Plans(lambda: [lora, qlora, lora])

    assert planned([]) == []
    assert turns == []
    assert [plan.method for plan in planned([qlora])] == ["qlora"]
    assert turns == [[lora, qlora]]
    assert [plan.method for plan in planned([full, lora])] == ["full", "lora"]
    assert turns == [[lora, qlora], [full]]


def test_a_step_that_cannot_be_planned_fails_who_asks_for_it(turns: list[list[PlanRequest]]) -> None:
    planned = plans.Plans(lambda: [request_of("ia3")])
    assert [plan.method for plan in planned([request_of("lora")])] == ["lora"]
    with pytest.raises(pytest.fail.Exception, match="no room"):
        planned([request_of("ia3")])
    assert len(turns) == 1


def test_short_sweeps_are_planned_ahead(turns: list[list[PlanRequest]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The very steps that the sweeps ask for: none is left for a turn of its own."""
    toy = models.resolve("toy-llama")
    monkeypatch.setattr(models, "resolve", lambda name, weights=None: toy)
    monkeypatch.setattr(tasks.TextTask, "settings", lambda self: StepSettings(self.batch, 30))
    monkeypatch.setattr(measured, "steps_of_measured", lambda session: [request_of("full")])
    session = session_of("short_text_sweep", **{"--dtype": "bfloat16"})
    first, *ahead = plans.wanted(session)
    planned = plans.Plans(lambda: ahead)

    assert first == request_of("full")
    peaks = sweeps._peak_bytes(
        sweeps._task(session.config, toy, **sweeps.SHORT_TASK), list(sweeps.SHORT_SETTINGS.values())[:2], planned
    )

    assert peaks == {"r2": 1_000_448, "r16": 1_000_448}
    assert turns == [ahead]
    assert [step.method.name for step in ahead] == ["lora-r2", "lora", "lora-qv", "ia3"]
    assert {(step.dtype, step.padded, step.settings) for step in ahead} == {("bfloat16", True, StepSettings(2, 30))}


def test_no_short_sweep_no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not(*arguments: Any, **options: Any) -> None:
        raise AssertionError("nobody asked")

    monkeypatch.setattr(models, "resolve", must_not)
    assert sweeps.steps_of_short_sweeps(session_of("text_sweep", "record")) == []


@pytest.mark.parametrize("options", [{}, {"--model": "toy-llama"}, {"--model": "no-such-model"}])
def test_a_short_sweep_that_will_skip_wants_no_plans(
    options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that were not fetched, or a model without a tokenizer, are the case's to tell."""
    monkeypatch.setenv("PEFT_GAUGE_CACHE", str(tmp_path))
    assert sweeps.steps_of_short_sweeps(session_of("short_text_sweep", **options)) == []


def test_a_dataset_that_is_none_wants_no_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = models.resolve("toy-llama")
    monkeypatch.setattr(models, "resolve", lambda name, weights: toy)
    monkeypatch.setattr(tasks, "_tokenizer", lambda model: None)
    session = session_of("short_text_sweep", **{"--dataset": str(tmp_path / "none.jsonl")})
    assert sweeps.steps_of_short_sweeps(session) == []
