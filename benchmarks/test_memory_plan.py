"""How much memory will a training step need, method by method, and at which sequence length do methods cross?

Planned without a GPU: the real step of each method runs on tensors without data, and every storage allocation and
release is recorded (`peft_gauge.plan`). GB are 10⁹ bytes.
"""

from __future__ import annotations

from itertools import pairwise, permutations
from typing import TYPE_CHECKING

import pytest

from peft_gauge.plan.record import PlanRequest
from peft_gauge.training import methods, models
from peft_gauge.training.settings import StepSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from fixtures.plans import Plans

BATCH, SEQ = 1, 512

# One model in a bare run. A plan of 13B or 70B takes two to ten times as long as one of 7B; the claims plan the steps
# they need.
MODELS = [
    pytest.param("tinyllama", marks=pytest.mark.slow),
    "llama-2-7b",
    pytest.param("llama-2-13b", marks=pytest.mark.slow),
    pytest.param("llama-2-70b", marks=pytest.mark.slow),
]


COMPARED = (methods.FULL, methods.LORA, methods.QLORA)
LENGTHS = (64, 512, 2048)


def planned_step(model: str, method: methods.Method) -> list[PlanRequest]:
    return [step(model, method, SEQ)]


def crossing(model: str) -> list[PlanRequest]:
    return [step(model, method, seq) for seq in LENGTHS for method in COMPARED]


def step(model: str, method: methods.Method, seq: int) -> PlanRequest:
    return PlanRequest(models.resolve(model, weights="random"), method, StepSettings(batch=BATCH, seq=seq))


@pytest.mark.untimed
@pytest.mark.plans(steps=planned_step)
@pytest.mark.parametrize("method", methods.DEFAULT_METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("model", MODELS)
def test_planned_memory(model: str, method: methods.Method, plans: Plans, record: Callable[..., None]) -> None:
    (plan,) = plans(planned_step(model, method))

    record(plan=plan.as_json())
    assert sum(plan.peak_by_category.values()) == plan.peak_bytes
    assert sum(plan.resident_by_category.values()) == plan.resident_bytes
    assert plan.resident_bytes < plan.peak_bytes <= plan.reserved_bytes_estimate < plan.device_bytes_estimate


@pytest.mark.slow
@pytest.mark.untimed
@pytest.mark.plans(steps=crossing)
@pytest.mark.parametrize("model", ["tinyllama", "llama-2-7b"])
def test_where_methods_cross(model: str, plans: Plans, record: Callable[..., None]) -> None:
    """Activations grow with the sequence and weights do not, so the order of methods by peak memory can change."""
    found = plans(crossing(model))
    peaks = {seq: {plan.method: plan.peak_bytes for plan in found if plan.settings["seq"] == seq} for seq in LENGTHS}

    crossings = [
        {"overtaken": first, "by": second, "between": [short, long]}
        for short, long in pairwise(LENGTHS)
        for first, second in permutations(peaks[short], 2)
        if peaks[short][first] > peaks[short][second] and peaks[long][first] < peaks[long][second]
    ]
    record(peak_bytes_by_seq={str(seq): peaks[seq] for seq in LENGTHS}, crossings=crossings)
    assert all(peaks[short][name] <= peaks[long][name] for short, long in pairwise(LENGTHS) for name in peaks[short])
