"""Real steps of TinyLlama on an H200 and their plans: what the comparison finds where the plan is right, and where a
fault was planted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from fixtures.measured_steps import read_steps
from fixtures.traces import measured_step, planned_step, trace_request
from peft_gauge.memory.categories import ACTIVATIONS, BACKWARD, FORWARD, GRADIENTS
from peft_gauge.plan.planner import plan
from peft_gauge.traces import differences
from peft_gauge.traces.comparison import TraceComparison, compare
from peft_gauge.traces.log import BEFORE, Allocation, Event, StepLog

REPEATED = {
    "qlora",  # as with checkpointing
    "lora-autocast",  # as full fine-tuning
    "qlora-unprepared-autocast",
    "lora-trainer-checkpointing",  # TRL checkpoints by default
    "bottleneck",  # as LoRA, but for the gradients of biases
    "full-sft",  # as under Trainer; its loss is in `test_trainer_step.py`
    "qlora-sft",  # as full fine-tuning; QLoRA under Trainer is in `test_plan_measured.py`
}
"""Traces that show what others show, too: these are slow, and run every week."""


def traces(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow if name in REPEATED else ()) for name in names]


PLAIN = traces("lora", "full", "bottleneck", "qlora", "qlora-checkpointing")
AUTOCAST = traces("lora-autocast", "full-float32-autocast", "qlora-unprepared-autocast")
TRAINERS = traces("lora-trainer", "lora-trainer-checkpointing", "full-sft", "qlora-sft")
LAYERS = 22


@cache
def clean(name: str) -> TraceComparison:
    """The comparison of a trace with its plan as it is."""
    return compared(name, planned_step(name))


def compared(name: str, planned: StepLog) -> TraceComparison:
    found = compare(planned, measured_step(name))
    assert sum(row.bytes for row in found.rows) == found.difference_bytes
    assert sum(measured - planned for planned, measured in found.by_category.values()) == found.difference_bytes
    return found


def measured_peak(**settings: object) -> int:
    (step,) = [
        step for step in read_steps() if {"batch": 4, "seq": 768, "model": "tinyllama", **settings} == step.settings
    ]
    return step.later_steps["requested_peak"]


# Where the plan is right ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PLAIN, *AUTOCAST])
def test_a_plain_step_is_planned_but_for_what_no_plan_has(name: str) -> None:
    found = clean(name)
    assert abs(found.unplanned_bytes) <= 0.0003 * found.planned.peak_bytes
    (unsplit,) = [row.bytes for row in found.rows if row.category == differences.UNSPLIT]
    assert 0 < unsplit < 9 * 2**20
    workspaces = [row.bytes for row in found.rows if row.category == differences.WORKSPACES]
    assert workspaces == [2 * 32 * 2**20]  # a Hopper's cuBLAS: forward's and backward's
    assert found.measured.phase == found.planned.phase
    # What differs is attention, which torch took from cuDNN and not from flash, the masks before the first layer and,
    # with bottleneck adapters, the scratch of the sums that make the gradients of biases.
    most = (9 if name == "bottleneck" else 5) * LAYERS + 32
    for phase in found.phases:
        assert phase.measured - phase.equal <= most
        assert phase.planned - phase.equal <= 4 * LAYERS + 32


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainers_step_is_planned_to_the_byte_but_for_workspaces_and_unsplit_blocks(name: str) -> None:
    found = clean(name)
    assert found.unplanned_bytes == 0
    workspaces, unsplit = (
        [row.bytes for row in found.rows if row.category == category]
        for category in (differences.WORKSPACES, differences.UNSPLIT)
    )
    assert workspaces == [2 * 32 * 2**20]
    assert 0 <= sum(unsplit) < 20 * 2**20
    forward = next(phase for phase in found.phases if phase.phase == FORWARD)
    assert forward.equal >= 0.87 * forward.planned
    if not name.startswith("qlora"):  # dequantization calls of another release
        assert forward.equal == forward.planned


@pytest.mark.slow
def test_what_is_offloaded_is_planned_but_for_an_address_or_two() -> None:
    found = clean("lora-sft-offloading")
    assert abs(found.unplanned_bytes) < 0.002 * found.planned.peak_bytes
    assert found.measured.phase == found.planned.phase
    # The bfloat16 copies of the up-projections, which TRL keeps on the GPU by mistake: their address is that of a
    # tensor that it has offloaded and still remembers.
    log = planned_step("lora-sft-offloading")
    end = next(segment.start for segment in log.segments if segment.phase == BACKWARD)
    kept = [each for each in log.allocations if is_copy_of_up_projection(each) and each.is_alive(end)]
    assert sum(each.nbytes for each in kept) == LAYERS * 2048 * 5632 * 2


def is_copy_of_up_projection(each: Allocation) -> bool:
    return each.operator == "aten::_to_copy" and each.module.endswith("mlp.up_proj") and each.phase == FORWARD


@pytest.mark.parametrize("name", ["lora-sft-liger", "lora-trainer-liger"])
def test_ligers_operators_are_planned_to_the_byte(name: str) -> None:
    pytest.importorskip("liger_kernel", reason="run: nox -s liger")
    found = clean(name)
    assert abs(found.unplanned_bytes) <= 0.0001 * found.planned.peak_bytes
    assert found.measured.phase == found.planned.phase == FORWARD


def test_the_peak_is_the_one_that_torchs_own_counter_showed() -> None:
    expected = measured_peak(method="lora", dtype="bfloat16", loop="plain")
    # The log's sums of what was there before count blocks, not requests.
    assert clean("lora").measured.peak_bytes == pytest.approx(expected, abs=3 * 2**20)


def test_a_plan_with_places_is_the_plan() -> None:
    """Module hooks and a look at the stack change nothing of what is planned."""
    log = planned_step("lora")
    assert log.bytes_at(log.peak()) == plan(trace_request("lora")).peak_bytes


def test_nearly_every_planned_allocation_has_its_place() -> None:
    log = planned_step("lora")
    made = [each for each in log.allocations if each.born != BEFORE and each.phase in (FORWARD, BACKWARD)]
    assert sum(1 for each in made if each.operator and each.module) > 0.98 * len(made)
    forward = [each for each in made if each.phase == FORWARD]
    sites = {each.site for each in measured_step("lora").allocations if each.phase == FORWARD}
    assert sum(1 for each in forward if each.site in sites) > 0.95 * len(forward)


# Where a fault was planted --------------------------------------------------------------------------------------------


def one(log: StepLog, fits: Callable[[Allocation], bool]) -> int:
    (found,) = [index for index, each in enumerate(log.allocations) if each.born != BEFORE and fits(each)]
    return found


def without(log: StepLog, dropped: int) -> StepLog:
    """``log`` as it is where one allocation is not made."""
    made: list[Allocation] = []
    index: dict[int, int] = {}
    for number, each in enumerate(log.allocations):
        if number != dropped:
            index[number] = len(made)
            made.append(replace(each))
    events = [Event(e.sign, index[e.allocation], e.phase) for e in log.events if e.allocation != dropped]
    for position, event in enumerate(events):
        each = made[event.allocation]
        each.born, each.died = (position, each.died) if event.sign > 0 else (each.born, position)
    return replace(log, allocations=made, events=events)


def resized(log: StepLog, changed: int, nbytes: int) -> StepLog:
    made = [replace(each, nbytes=nbytes) if number == changed else each for number, each in enumerate(log.allocations)]
    return replace(log, allocations=made)


def beyond(found: Sequence[differences.Row], clean: Sequence[differences.Row]) -> list[differences.Row]:
    """The rows that the clean comparison has not."""
    known = {(row.kind, row.operator, row.module, row.bytes) for row in clean}
    return [row for row in found if (row.kind, row.operator, row.module, row.bytes) not in known]


KEPT = {  # what forward keeps of layer 7, by trace
    "lora": ("model.layers.7.mlp.act_fn", "aten::silu"),
    "full": ("model.layers.7.self_attn.v_proj", "aten::mm"),
    "bottleneck": ("model.layers.7.mlp.act_fn", "aten::silu"),
}


@pytest.mark.parametrize("name", traces(*KEPT))
def test_a_kept_activation_that_is_dropped_from_the_plan_is_named(name: str) -> None:
    module, operator = KEPT[name]
    log, before = planned_step(name), clean(name)
    dropped = one(
        log,
        lambda each: each.phase == FORWARD and each.operator == operator and each.module.endswith(module),
    )
    nbytes = log.allocations[dropped].nbytes
    found = compared(name, without(log, dropped))
    assert found.difference_bytes == before.difference_bytes + nbytes
    (row,) = beyond(found.rows, before.rows)
    assert (row.kind, row.bytes, row.count) == (differences.ONLY_MEASURED, nbytes, 1)
    assert (row.category, row.operator) == (ACTIVATIONS, operator)
    assert row.where.endswith(module)


def test_a_doubled_gradient_is_named() -> None:
    log, before = planned_step("full"), clean("full")
    doubled = one(
        log,
        lambda each: (
            each.category == GRADIENTS and each.phase == BACKWARD and each.module.endswith("layers.3.mlp.down_proj")
        ),
    )
    nbytes = log.allocations[doubled].nbytes
    found = compared("full", resized(log, doubled, 2 * nbytes))
    (row,) = beyond(found.steps, before.steps)
    assert (row.kind, row.category, row.bytes) == (differences.SIZE, GRADIENTS, -nbytes)
    assert row.where.endswith("layers.3.mlp.down_proj")


def test_an_operator_in_another_dtype_is_named() -> None:
    """All layers' attention outputs planned in float32, as if one cast had been forgotten."""
    log, before = planned_step("lora"), clean("lora")
    widened, nbytes = log, 0
    for index, each in enumerate(log.allocations):
        if each.born != BEFORE and each.phase == FORWARD and each.operator == "aten::silu":
            widened, nbytes = resized(widened, index, 2 * each.nbytes), nbytes + each.nbytes
    found = compared("lora", widened)
    (row,) = beyond(found.rows, before.rows)
    assert (row.kind, row.operator, row.count) == (differences.SIZE, "aten::silu", LAYERS)
    assert row.bytes == -nbytes == found.difference_bytes - before.difference_bytes
    assert row.module.endswith("model.layers.*.mlp.act_fn")
    first = found.first_large
    assert first is not None
    assert first.module.endswith("model.layers.0.mlp.act_fn")
    assert (first.planned_bytes, first.measured_bytes) == (2 * nbytes // LAYERS, nbytes // LAYERS)
