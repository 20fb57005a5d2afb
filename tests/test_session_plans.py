"""Plans of a session: each is made once, and what is known to be wanted is made together with the first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import test_methods_quality, test_rank_sweep, test_target_modules
from fixtures import plans, sweeps
from peft_gauge.errors import GaugeError
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


def config_of(**options: Any) -> Any:
    """pytest's config, as far as a short sweep reads it."""
    chosen = {"--model": None, "--dataset": None, "--dtype": None, "--seed": 0} | options
    return SimpleNamespace(getoption=chosen.__getitem__)


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
    config = config_of(**{"--dtype": "bfloat16"})
    ahead = sweeps.steps_of_short_sweep(config)
    planned = plans.Plans(lambda: ahead)

    peaks = sweeps._peak_bytes(
        sweeps._task(config, toy, **sweeps.SHORT_TASK), list(sweeps.SHORT_SETTINGS.values())[:2], planned
    )

    assert peaks == {"r2": 1_000_448, "r16": 1_000_448}
    assert turns == [ahead]
    assert [step.method.name for step in ahead] == ["lora-r2", "lora", "lora-qv", "ia3"]
    assert {(step.dtype, step.padded, step.settings) for step in ahead} == {("bfloat16", True, StepSettings(2, 30))}


@pytest.mark.parametrize("options", [{}, {"--model": "toy-llama"}, {"--model": "no-such-model"}])
def test_a_short_sweep_that_will_skip_names_no_steps(
    options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that were not fetched, or a model without a tokenizer, are the case's to tell."""
    monkeypatch.setenv("PEFT_GAUGE_CACHE", str(tmp_path))
    with pytest.raises(GaugeError):
        sweeps.steps_of_short_sweep(config_of(**options))


def test_a_dataset_that_does_not_exist_names_no_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = models.resolve("toy-llama")
    monkeypatch.setattr(models, "resolve", lambda name, weights: toy)
    monkeypatch.setattr(tasks, "_tokenizer", lambda model: None)
    with pytest.raises(GaugeError):
        sweeps.steps_of_short_sweep(config_of(**{"--dataset": str(tmp_path / "none.jsonl")}))


@pytest.mark.parametrize(
    "test",
    [
        test_rank_sweep.test_two_ranks_on_text,
        test_target_modules.test_two_target_sets_on_text,
        test_methods_quality.test_two_methods_on_text,
    ],
)
def test_short_sweeps_name_their_steps(test: Any) -> None:
    (named,) = [mark.kwargs["steps"] for mark in test.pytestmark if mark.name == "plans"]
    assert named is sweeps.steps_of_short_sweep
