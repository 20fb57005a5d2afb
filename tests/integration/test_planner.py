"""A plan of a whole model against a real step of it; LoRA's of its first layers is in the unit tests."""

from __future__ import annotations

import pytest

from peft_gauge.training import methods, models
from tests.unit.plan.test_planner import hold_against_a_real_step


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_planned_step_of_smollm2_is_a_real_one_without_its_numbers(method: str) -> None:
    hold_against_a_real_step(methods.get(method), models.resolve("smollm2-135m", weights="random"), "float32")
