"""Advice: changes of a step in the order of their cost, each with the plan of the changed step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from peft_gauge.memory import overheads
from peft_gauge.plan import advice, planner
from peft_gauge.plan.record import Plan, PlanFailure, PlanOutcome, PlanRequest
from peft_gauge.report.terminal.advice_table import show_advice
from peft_gauge.training import methods, models
from peft_gauge.training.loops import step_settings
from peft_gauge.training.settings import StepSettings
from peft_gauge.training.sharding import Sharding

pytestmark = pytest.mark.integration
TOY = models.resolve("toy-llama", weights="random")
SETTINGS = StepSettings(16, 128, optimizer="adamw-fused")
FULL = PlanRequest(TOY, methods.FULL, SETTINGS, dtype="float32", gpus=("600MB",))
BY_NAME = {change.name: change for change in advice.CHANGES}

plan = cache(planner.plan)  # the tests ask for the same steps


def plan_all(requests: Sequence[PlanRequest]) -> list[PlanOutcome]:
    return [plan(each) for each in requests]


@pytest.fixture(scope="module")
def found() -> list[advice.Advice]:
    return advice.advise(FULL, plan(FULL), plan_all)


def test_each_is_the_plan_of_the_changed_step(found: list[advice.Advice]) -> None:
    base = plan(FULL)
    for each in found:
        changed: PlanRequest | None = FULL
        for name in each.changes:
            assert changed is not None
            changed = BY_NAME[name].apply(changed)
        assert changed is not None
        planned = plan(changed)
        assert (each.device_bytes, each.peak_bytes) == (planned.device_bytes_estimate, planned.peak_bytes)
        assert each.saved_bytes == base.device_bytes_estimate - planned.device_bytes_estimate > 0


def test_the_order_is_of_the_data_and_then_of_the_cost(found: list[advice.Advice]) -> None:
    keys = [(not each.same_data, each.gpus, round(each.flops_ratio, 2), len(each.changes)) for each in found]
    assert keys == sorted(keys)
    by_changes = {each.changes: each for each in found}
    checkpointed = by_changes["gradient checkpointing",]
    # The blocks' forward is computed twice: of 3 units of work, one more; the output projection's is not.
    assert 1.2 < checkpointed.flops_ratio < 4 / 3
    assert by_changes["batch 1, accumulated",].flops_ratio == pytest.approx(1)
    assert not by_changes["half the sequence",].same_data


def test_combinations_save_more_than_either_and_exclude_each_other(found: list[advice.Advice]) -> None:
    together = [each for each in found if len(each.changes) > 1]
    assert together
    assert {len(each.changes) for each in together} == {2, 3}
    for each in together:
        assert len(set(each.changes)) == len(each.changes)
        assert not any(set(group) <= set(each.changes) for group in advice.EXCLUSIVE)


def test_a_change_that_is_made_already_is_not_proposed() -> None:
    made = replace(
        FULL,
        settings=replace(SETTINGS, batch=1, grad_checkpointing=True, optimizer="paged-adamw8bit"),
        loss="chunked",
        dtype="bfloat16",
        sharding=Sharding(2),
    )
    assert [change.name for change in advice.CHANGES if change.apply(made) is not None] == ["half the sequence"]
    qlora = replace(FULL, method=methods.QLORA)
    assert BY_NAME["base in NF4, unprepared"].apply(qlora) is None
    unprepared = BY_NAME["no k-bit preparation"].apply(qlora)
    assert unprepared is not None
    assert not unprepared.method.prepare_kbit


@pytest.mark.slow
def test_more_gpus_come_last_alone_and_with_checkpointing() -> None:
    """On a model whose weights are most of its memory. Only two GPUs are planned."""
    whole = models.resolve("smollm2-135m", weights="random")
    fewer = {**whole.config, "num_hidden_layers": 8, "vocab_size": 4096}
    asked = replace(FULL, model=replace(whole, config_json=json.dumps(fewer)), settings=StepSettings(1, 8))

    def plan_shared(requests: Sequence[PlanRequest]) -> list[PlanOutcome]:
        is_planned = [each.sharding is not None and each.sharding.ranks == 2 for each in requests]
        return [
            plan(each) if planned else PlanFailure("smollm2", "full", "no")
            for each, planned in zip(requests, is_planned, strict=True)
        ]

    base = plan(asked)
    assert isinstance(base, Plan)
    found = advice.advise(asked, base, plan_shared)
    two = "2 GPUs by FSDP2"
    assert [(each.gpus, each.changes) for each in found] == [(2, (two,)), (2, ("gradient checkpointing", two))]
    # Half of weights, gradients, state and the update's temporaries: 5 × 4 bytes a parameter.
    assert found[0].saved_bytes == pytest.approx(5 * 4 * base.total_params / 2, rel=0.1)


def test_what_cannot_be_planned_or_saves_nothing_is_left_out() -> None:
    base = plan(FULL)

    def plan_some(requests: Sequence[PlanRequest]) -> list[PlanOutcome]:
        return [base if number else PlanFailure("toy", "full", "no") for number, _ in enumerate(requests)]

    assert advice.advise(FULL, base, plan_some) == []


def test_the_first_that_fits_is_marked(
    found: list[advice.Advice], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    least = min(found, key=lambda each: each.device_bytes)
    monkeypatch.setattr(advice, "CHANGES", [BY_NAME[name] for name in {*least.changes, "gradient checkpointing"}])
    asked = replace(FULL, gpus=(str(least.device_bytes + 2**20),))
    base = plan(asked)
    record = {**base.as_json(), "advice": [each.as_json() for each in advice.advise(asked, base, plan_all)]}
    show_advice(record, width=120)
    out = capsys.readouterr().out
    assert out.count("←") == 1
    marked = next(each for each in record["advice"] if all(each["fits"].values()))
    line = next(line for line in out.splitlines() if "←" in line)
    assert marked["changes"][0].split()[0] in line


def test_nothing_to_advise_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(plan(FULL), Plan)
    show_advice({**plan(FULL).as_json(), "advice": []})
    assert capsys.readouterr().out == "full: none of the changes that were tried needs less memory\n"


def test_a_trainer_has_changes_of_its_own() -> None:
    settings, further = step_settings("sft", {"batch": 4, "seq": 128}, {"gradient_checkpointing": False})
    sft = PlanRequest(TOY, methods.LORA, settings, dtype="float32", loop="sft", trainer_arguments=further)
    offloaded = BY_NAME["activation offloading"].apply(sft)
    assert offloaded is not None
    assert dict(offloaded.trainer_arguments) == {"activation_offloading": True}
    assert BY_NAME["activation offloading"].apply(offloaded) is None
    assert BY_NAME["activation offloading"].apply(FULL) is None
    assert BY_NAME["Liger's kernels"].apply(FULL) is None
    assert plan(offloaded).peak_bytes < plan(sft).peak_bytes


def test_a_calibrated_gpu_bounds_the_tokens_per_second(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    found: list[advice.Advice],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not any(each.tokens_per_second for each in found), "600MB is no calibrated GPU"
    overheads.write_calibration(
        tmp_path,
        "H100 80GB",
        torch_version="2.11.0",
        measured_on="2026-11-28",
        context_bytes=778043392,
        cublas_workspace_bytes=67108864,
        cublaslt_workspace_bytes=1048576,
        speed={"product_flops_per_second": 8e14},
    )
    monkeypatch.setattr(advice, "CHANGES", [BY_NAME["gradient checkpointing"]])
    asked = replace(FULL, gpus=("H100",), calibration_folder=str(tmp_path))
    base = plan(asked)
    (each,) = advice.advise(asked, base, plan_all)
    tokens = SETTINGS.batch * SETTINGS.seq
    expected = 8e14 / (base.flops_per_step / tokens * each.flops_ratio)
    assert each.tokens_per_second == {"H100 80GB": pytest.approx(expected)}
    show_advice({**base.as_json(), "advice": [each.as_json()]}, width=120)
    assert f"{expected:,.0f}" in capsys.readouterr().out
