"""How much memory does a training step take, how far is that from its plan, and is it under its ceiling?

Each case runs in its own process. On CUDA the caching allocator (allocated, reserved) and the driver (NVML: device,
process) are read phase by phase, and each peak is compared with the plan and the ceiling; on every device the storages
of tensors are tracked, which counts live bytes exactly. A plan models CUDA's kernels: on a CPU, whose kernels keep
other tensors, its distance is recorded but not judged. GB are 10⁹ bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from peft_gauge.measure.slopes import lines

if TYPE_CHECKING:
    from collections.abc import Callable

    from fixtures.measured import Measured

    Record = Callable[..., None]

pytestmark = pytest.mark.measures("memory")

# measured metric -> the plan's metric, the ceiling's
COMPARED = {
    "allocated_peak_bytes": ("allocated_bytes_estimate", "allocated_bytes"),
    "reserved_peak_bytes": ("reserved_bytes_estimate", "reserved_bytes"),
    "own_device_peak_bytes": ("device_bytes_estimate", "device_bytes"),
}


def test_peak(measured: Measured, record: Record) -> None:
    memory = measured.metrics["memory"]

    record(**memory, **against_plan(measured), ceiling=ceiling_of(measured))
    assert_trained(measured)
    assert memory["naive_after_loading_bytes"] < memory["tensor_peak_bytes"]
    assert sum(memory["peak_by_category"].values()) == memory["tensor_peak_bytes"]
    assert over_ceiling(measured) == []


@pytest.mark.measures("memory", shapes=True)
@pytest.mark.slow_on_cpu
def test_growth(measured: Measured, record: Record) -> None:
    """Slope and intercept along the batch and along the sequence, planned and measured."""
    metric = "allocated_peak_bytes" if measured.case.device == "cuda" else "tensor_peak_bytes"
    of_plan, _ = COMPARED.get(metric, ("peak_bytes", None))
    points = measured.metrics["memory"]["shapes"]
    plans = [measured.plan, *measured.shape_plans]
    planned = [
        {"batch": plan.settings["batch"], "seq": plan.settings["seq"], metric: getattr(plan, of_plan)} for plan in plans
    ]

    found: list[dict[str, Any]] = [
        {
            "along": line.along,
            "held": line.held,
            "slope_bytes": line.slope_bytes,
            "intercept_bytes": line.intercept_bytes,
            "planned_slope_bytes": plan.slope_bytes,
            "planned_intercept_bytes": plan.intercept_bytes,
        }
        for line, plan in zip(lines(points, metric), lines(planned, metric), strict=True)
    ]

    record(growth=found, growth_of=metric)
    assert len(found) == 4
    assert all(line["slope_bytes"] >= 0 for line in found), "a larger step took less memory"


@pytest.mark.variations
@pytest.mark.slow_on_cpu
def test_variation(measured: Measured, record: Record) -> None:
    """One thing changed: the base unprepared for k-bit training, adapters in 16 bit, gradient checkpointing."""
    memory = measured.metrics["memory"]

    record(**memory, **against_plan(measured), ceiling=ceiling_of(measured))
    assert_trained(measured)
    assert over_ceiling(measured) == []


def assert_trained(measured: Measured) -> None:
    assert measured.metrics["gradients"] == {"missing": [], "not_finite": []}
    assert measured.metrics["learned"], "a trainable weight never moved: this was no training step"


def against_plan(measured: Measured) -> dict[str, Any]:
    """Planned metrics, and the relative error of each measured one."""
    memory, plan = measured.metrics["memory"], measured.plan
    found: dict[str, Any] = {
        "planned_peak_bytes": plan.peak_bytes,
        "planned_allocated_bytes": plan.allocated_bytes_estimate,
        "planned_reserved_bytes": plan.reserved_bytes_estimate,
        "planned_device_bytes": plan.device_bytes_estimate,
        "planned_saved_activation_bytes_per_token": plan.saved_activation_bytes_per_token,
    }
    errors = {
        metric: memory[metric] / getattr(plan, planned) - 1
        for metric, (planned, _) in COMPARED.items()
        if metric in memory
    }
    errors["tensor_peak_bytes"] = memory["tensor_peak_bytes"] / plan.peak_bytes - 1
    return {**found, "relative_error": errors}


def ceiling_of(measured: Measured) -> dict[str, int] | None:
    """The ceilings by measured metric; ``None`` on a CPU, whose kernels are not planned."""
    if measured.case.device != "cuda":
        return None
    ceiling = measured.ceiling
    return {metric: getattr(ceiling, limit) for metric, (_, limit) in COMPARED.items()}


def over_ceiling(measured: Measured) -> list[str]:
    """A line for each measured peak above its ceiling."""
    memory = measured.metrics["memory"]
    return [
        f"{metric}: {memory[metric]:,} is above the ceiling of {limit:,}"
        for metric, limit in (ceiling_of(measured) or {}).items()
        if metric in memory and memory[metric] > limit
    ]
