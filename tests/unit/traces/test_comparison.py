"""Steps that differ in one known thing, and what the comparison says of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peft_gauge.memory.categories import ACTIVATIONS, BACKWARD, BASE_WEIGHTS, FORWARD, GRADIENTS, OPTIMIZER
from peft_gauge.memory.overheads import CUBLAS_WORKSPACE_BYTES, CUBLAS_WORKSPACE_HOPPER_BYTES
from peft_gauge.traces import comparison, differences
from peft_gauge.traces.comparison import TraceComparison, compare
from peft_gauge.traces.log import BEFORE, Allocation, Event, StepLog

KB = 1024
MIB = 1 << 20
GRADIENT = 320 * KB

Made = tuple[str, str, int, str, str, str]  # name, phase, bytes, operator, module, category


class Steps:
    """Builds the two logs of a step of four layers: forward keeps an activation a layer and drops another; backward
    makes a gradient a layer and lets the activation go; the update takes a temporary and lets the gradients go."""

    def __init__(self) -> None:
        self.before = [(4 * MIB, BASE_WEIGHTS)]
        self.lines: list[tuple[int, str, Made]] = []
        for layer in range(4):
            at = f"layers.{layer}"
            self.take("kept", layer, FORWARD, MIB, "aten::silu", f"{at}.act", ACTIVATIONS)
            self.take("gone", layer, FORWARD, 300 * KB, "aten::mul", f"{at}.mlp", ACTIVATIONS)
            self.give("gone", layer, FORWARD)
        for layer in reversed(range(4)):
            at = f"layers.{layer}"
            self.take("gradient", layer, BACKWARD, GRADIENT, "aten::mm", f"{at}.proj", GRADIENTS)
            self.give("kept", layer, BACKWARD)
        self.take("temporary", 0, OPTIMIZER, 200 * KB, "aten::sqrt", "", "optimizer_temporaries")
        for layer in range(4):
            self.give("gradient", layer, OPTIMIZER)
        self.give("temporary", 0, OPTIMIZER)

    def take(self, name: str, layer: int, phase: str, nbytes: int, operator: str, module: str, category: str) -> None:
        self.lines.append((1, f"{name} {layer}", (name, phase, nbytes, operator, module, category)))

    def give(self, name: str, layer: int, phase: str) -> None:
        self.lines.append((-1, f"{name} {layer}", (name, phase, 0, "", "", "")))

    def without(self, name: str) -> Steps:
        self.lines = [line for line in self.lines if line[1] != name]
        return self

    def resized(self, name: str, nbytes: int) -> Steps:
        self.lines = [
            (sign, key, (*made[:2], nbytes, *made[3:]) if key == name and sign > 0 else made)
            for sign, key, made in self.lines
        ]
        return self

    def log(self, *, measured: bool = False, **about: object) -> StepLog:
        allocations = [Allocation(nbytes, BEFORE, category="" if measured else name) for nbytes, name in self.before]
        index: dict[str, int] = {}
        events: list[Event] = []
        for sign, key, (name, phase, nbytes, operator, module, category) in self.lines:
            if sign > 0:
                index[key] = len(allocations)
                site = f"model.py:{name}" if phase == FORWARD else ""
                stack = (f"model.py:7:{name}",) if site else ()
                told = {} if measured else {"operator": operator, "module": module, "category": category}
                allocations.append(
                    Allocation(nbytes, len(events), None, phase, site, stack if measured else (), **told)
                )
            else:
                allocations[index[key]].died = len(events)
            events.append(Event(sign, index[key], phase))
        return replace(StepLog(allocations, events), **about)  # type: ignore[arg-type]


PLANNED, MEASURED = Steps().log(), Steps().log(measured=True)


def checked(planned: StepLog, measured: StepLog) -> TraceComparison:
    """The comparison, whose parts add up."""
    found = compare(planned, measured)
    assert found.planned.peak_bytes == planned.bytes_at(planned.peak())
    assert sum(row.bytes for row in found.rows) == found.difference_bytes
    assert sum(sizes[0] for sizes in found.by_category.values()) == found.planned.peak_bytes
    assert sum(sizes[1] for sizes in found.by_category.values()) == found.measured.peak_bytes
    return found


def test_equal_steps_have_no_difference() -> None:
    found = checked(PLANNED, MEASURED)
    assert found.difference_bytes == found.unplanned_bytes == 0
    assert (found.first, found.first_large, found.rows, found.steps, found.moved) == (None, None, (), (), 0)
    # Four layers' activations, and the gradient of the last beside them.
    assert found.measured == comparison.Side(4 * MIB + 4 * MIB + GRADIENT, BACKWARD, 9)
    assert [(each.phase, each.planned, each.measured, each.equal) for each in found.phases] == [
        (FORWARD, 8, 8, 8),
        (BACKWARD, 4, 4, 4),
        (OPTIMIZER, 1, 1, 1),
    ]


def test_an_activation_that_the_plan_lacks_is_named_by_its_place_in_other_layers() -> None:
    found = checked(Steps().without("kept 2").log(), MEASURED)
    assert found.difference_bytes == MIB
    (row,) = found.rows
    assert (row.kind, row.phase, row.category, row.operator) == (
        differences.ONLY_MEASURED,
        FORWARD,
        ACTIVATIONS,
        "aten::silu",
    )
    assert (row.where, row.bytes, row.count) == ("layers.2.act", MIB, 1)
    assert found.first is not None
    assert (found.first.number, found.first.planned_bytes, found.first.measured_bytes) == (5, 0, MIB)
    assert found.by_category[ACTIVATIONS] == (3 * MIB, 4 * MIB)


def test_in_backward_without_stacks_the_place_is_told_by_what_came_before() -> None:
    found = checked(Steps().without("gradient 2").log(), MEASURED)
    rows = [row for row in found.steps if row.kind == differences.ONLY_MEASURED]
    assert [(row.operator, row.category, row.bytes) for row in rows] == [("aten::mm", GRADIENTS, GRADIENT)]


def test_an_activation_that_only_the_plan_has_is_the_plans_own() -> None:
    found = checked(PLANNED, Steps().without("kept 1").log(measured=True))
    (row,) = found.rows
    assert (row.kind, row.operator, row.where, row.bytes) == (
        differences.ONLY_PLANNED,
        "aten::silu",
        "layers.1.act",
        -MIB,
    )


def test_another_dtype_is_one_allocation_of_another_size() -> None:
    found = checked(Steps().resized("kept 0", MIB // 2).log(), MEASURED)
    (row,) = found.rows
    assert (row.kind, row.operator, row.where) == (differences.SIZE, "aten::silu", "layers.0.act")
    assert (row.planned_bytes, row.measured_bytes, row.bytes) == (MIB // 2, MIB, MIB // 2)
    assert found.first is not None
    assert (found.first.kind, found.first.number) == (differences.SIZE, 1)


def test_a_doubled_gradient_is_seen_although_backward_has_no_stacks() -> None:
    found = checked(Steps().resized("gradient 3", 2 * GRADIENT).log(), MEASURED)
    (row,) = found.rows
    assert (row.kind, row.category, row.where, row.bytes) == (differences.SIZE, GRADIENTS, "layers.3.proj", -GRADIENT)


def test_what_is_freed_at_another_time_is_told_as_alive_on_one_side() -> None:
    early = Steps()
    moved = early.lines.pop(next(i for i, line in enumerate(early.lines) if line[:2] == (-1, "kept 3")))
    early.lines.insert(11, (moved[0], moved[1], (moved[2][0], FORWARD, *moved[2][2:])))  # at the end of forward
    found = checked(PLANNED, early.log(measured=True))
    kinds = {row.kind: row.bytes for row in found.rows}
    assert kinds[differences.ALIVE_IN_PLAN] == -MIB
    (row,) = [row for row in found.rows if row.kind == differences.ALIVE_IN_PLAN]
    assert (row.operator, row.where) == ("aten::silu", "layers.3.act")


def test_where_the_peaks_are_at_different_moments_a_row_says_how_far_the_other_is_below() -> None:
    found = checked(PLANNED, Steps().resized("temporary 0", 20 * MIB).log(measured=True))
    assert (found.measured.phase, found.planned.phase) == (OPTIMIZER, BACKWARD)
    by_kind = {row.kind: row for row in found.rows}
    elsewhere = by_kind[differences.OTHER_MOMENT]
    # At the update the plan has weights, four gradients and the temporary: less than at its own peak, in backward.
    assert elsewhere.bytes == 4 * GRADIENT + 200 * KB - (4 * MIB + GRADIENT)
    assert elsewhere.category == differences.MOMENT
    assert "aten::mm" in elsewhere.operator
    assert found.difference_bytes == sum(row.bytes for row in found.rows) > 14 * MIB


def test_an_order_that_differs_is_no_difference() -> None:
    other = Steps()
    other.lines[0], other.lines[1] = other.lines[1], other.lines[0]
    found = checked(PLANNED, other.log(measured=True))
    assert found.moved == 1
    assert (found.first, found.rows) == (None, ())


# What was there before ------------------------------------------------------------------------------------------------


def with_before(*sizes: int, **about: object) -> StepLog:
    steps = Steps()
    steps.before = [(size, "") for size in sizes]
    return steps.log(measured=True, **about)


@pytest.mark.parametrize("size", [CUBLAS_WORKSPACE_BYTES, CUBLAS_WORKSPACE_HOPPER_BYTES])
def test_workspaces_among_the_blocks_are_told_by_their_size(size: int) -> None:
    found = checked(PLANNED, with_before(4 * MIB, size, size))
    (row,) = found.rows
    assert (row.category, row.operator, row.count, row.bytes) == (
        differences.WORKSPACES,
        "cuBLAS workspace",
        2,
        2 * size,
    )
    assert found.unplanned_bytes == 0


def test_a_weight_of_a_workspaces_size_is_no_workspace() -> None:
    planned = Steps()
    planned.before = [(CUBLAS_WORKSPACE_HOPPER_BYTES, BASE_WEIGHTS)] * 3
    measured = with_before(*[CUBLAS_WORKSPACE_HOPPER_BYTES] * 5)
    (row,) = checked(planned.log(), measured).rows
    assert (row.category, row.bytes) == (differences.WORKSPACES, 2 * CUBLAS_WORKSPACE_HOPPER_BYTES)


def test_where_only_sums_are_known_the_rest_is_told_apart_from_the_workspaces() -> None:
    hopper = CUBLAS_WORKSPACE_HOPPER_BYTES
    measured = with_before(unlisted_before_bytes=4 * MIB + 2 * hopper + 5 * KB, full_segments=(hopper, 2 * MIB))
    found = checked(PLANNED, measured)
    assert [(row.category, row.bytes) for row in found.rows] == [
        (differences.WORKSPACES, 2 * hopper),
        (differences.UNSPLIT, 5 * KB),
    ]
    assert found.unplanned_bytes == 0


def test_a_weight_that_is_not_there_is_named() -> None:
    planned = Steps()
    planned.before = [(4 * MIB, BASE_WEIGHTS), (3 * MIB, BASE_WEIGHTS)]
    (row,) = checked(planned.log(), MEASURED).rows
    assert (row.kind, row.category, row.bytes) == (differences.THERE_BEFORE_PLANNED, BASE_WEIGHTS, -3 * MIB)
    short = checked(planned.log(), with_before(unlisted_before_bytes=6 * MIB))
    assert short.difference_bytes == -MIB


def test_a_trace_that_does_not_tell_what_was_before_is_taken_to_begin_as_planned() -> None:
    found = checked(Steps().without("kept 2").log(), with_before(unlisted_before_bytes=None))
    assert found.difference_bytes == MIB
    assert any("the plan's value is used" in note for note in found.notes)


def test_a_workspace_that_the_step_itself_makes_is_told() -> None:
    first = Steps()
    first.lines.insert(12, (1, "workspace", ("linear", FORWARD, CUBLAS_WORKSPACE_BYTES, "", "", "")))
    found = checked(PLANNED, first.log(measured=True))
    assert [(row.category, row.bytes) for row in found.rows] == [(differences.WORKSPACES, CUBLAS_WORKSPACE_BYTES)]


# Phases and passes ----------------------------------------------------------------------------------------------------


def passes(number: int, *, measured: bool = False) -> StepLog:
    """Forward and backward ``number`` times, then an update."""
    steps, one = Steps(), Steps()
    update = [line for line in one.lines if line[2][1] == OPTIMIZER and not line[1].startswith("gradient")]
    steps.lines = []
    for each in range(number):
        for sign, key, made in one.lines:
            if made[1] != OPTIMIZER and not key.startswith("gradient"):
                steps.lines.append((sign, f"{key} of {each}", made))
    steps.lines += update
    return steps.log(measured=measured)


def test_further_micro_batches_are_left_out_and_told() -> None:
    found = checked(passes(3), passes(5, measured=True))
    assert found.difference_bytes == 0
    # The first two and the last of the measured passes stand beside the three planned ones.
    assert [(each.planned, each.measured, each.equal) for each in found.phases if each.phase == FORWARD] == [
        (24, 24, 24)
    ]
    assert found.notes == (
        "2 forward passes that the plan does not have were not compared",
        "2 backward passes that the plan does not have were not compared",
    )


def test_a_trace_without_phases_is_compared_in_one_piece() -> None:
    bare = [event._replace(phase="outside") for event in MEASURED.events]
    found = checked(PLANNED, replace(MEASURED, events=bare))
    assert found.difference_bytes == 0
    assert [(each.phase, each.equal) for each in found.phases] == [("step", 13)]
    assert "has no phases" in found.notes[0]
