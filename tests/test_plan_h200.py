"""Plans of whole training steps against what they took on an NVIDIA H200 (tests/data/h200_steps.json).

Here are the steps that are planned in seconds; `benchmarks/test_published.py` has the others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_gauge import methods, models
from peft_gauge.plan.overheads import CONTEXT_HOPPER_BYTES, CUBLAS_WORKSPACE_HOPPER_BYTES, CUBLAS_WORKSPACES
from peft_gauge.plan.planner import plan
from peft_gauge.plan.record import Plan, PlanRequest
from peft_gauge.step import StepSettings

STEPS = json.loads((Path(__file__).parent / "data" / "h200_steps.json").read_text(encoding="utf-8"))["steps"]
WORKSPACE_BYTES = CUBLAS_WORKSPACES * CUBLAS_WORKSPACE_HOPPER_BYTES
ROUNDING_BYTES = 512 * 1024
"""Plans count in blocks of 512, the allocator's count of requests does not."""


def is_quick(settings: dict[str, Any]) -> bool:
    plain = settings["loop"] == "plain" and "mixed" not in settings
    small = settings["model"] in ("toy-llama", "smollm2-135m")
    told = settings["model"] == "tinyllama" and (
        ("ckpt" in settings and settings["method"] == "qlora")  # float32 attention with shared heads, recomputed
        or settings.get("optimizer") in ("adamw-fused", "adamw8bit")  # an update without storages of its own
    )
    return plain and (small or (told and "accum" not in settings))


QUICK = [step for step in STEPS if is_quick(step["settings"])]


def ids(step: dict[str, Any]) -> str:
    settings = step["settings"]
    return "-".join(str(settings[key]) for key in ("model", "method", "optimizer", "ckpt") if key in settings)


def planned(settings: dict[str, Any]) -> Plan:
    shape = StepSettings(
        batch=settings["batch"],
        seq=settings["seq"],
        optimizer=settings.get("optimizer", "adamw"),
        grad_checkpointing=settings.get("ckpt", False),
    )
    model = models.resolve(settings["model"], weights="random")
    return plan(PlanRequest(model, methods.get(settings["method"]), shape, dtype=settings["dtype"], gpus=("H200",)))


@pytest.mark.parametrize("step", QUICK, ids=ids)
def test_a_plan_is_what_the_gpu_took(step: dict[str, Any]) -> None:
    found = planned(step["settings"])
    requested = step["later_steps"]["requested_peak"] - WORKSPACE_BYTES
    assert found.trainable_params == step["trainable_params"]
    assert found.peak_bytes == pytest.approx(requested, abs=ROUNDING_BYTES)
    (card,) = found.gpus
    # The segments depend on the order of frees, too, of which autograd's thread has its own.
    assert card.device_bytes - CONTEXT_HOPPER_BYTES == pytest.approx(step["first_steps"]["reserved_peak"], rel=0.09)
    assert card.fits


def test_the_context_is_what_the_driver_shows_beside_the_segments() -> None:
    outside = {step["process_bytes"] - step["reserved_bytes"] for step in STEPS}
    assert max(outside) == CONTEXT_HOPPER_BYTES
    assert min(outside) > 0.95 * CONTEXT_HOPPER_BYTES


def test_no_quick_step_is_left_out_by_mistake() -> None:
    assert len(QUICK) == 9
