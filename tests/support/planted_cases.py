"""A pytest plugin: measured cases of the real suite end in ways that are known beforehand.

Loaded by ``-p``, which pytest-xdist's workers get too. ``--planted`` gives `Settings` in JSON.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from peft_gauge import isolation
from peft_gauge.errors import GaugeError
from peft_gauge.isolation import fork_server, note
from peft_gauge.memory import gpus
from peft_gauge.plan.record import DeviceEstimate, GpuFit, Plan, PlanOutcome, PlanRequest
from peft_gauge.training import models

if TYPE_CHECKING:
    from peft_gauge.measure.passes import CaseSetup


@dataclass(frozen=True)
class Settings:
    """What is planted in a session.

    Attributes:
        planted: by method, which of the functions below its case runs in place of its measurement; other methods are
            measured.
        plans: planned peak bytes by method; ``None`` if plans are made and the base is built.
        started: the folder in which each process that is started for a case leaves a file.
    """

    planted: dict[str, str]
    plans: dict[str, int] | None
    started: str


LAST = {"phase": "step", "rss_peak_bytes": 123_456_789}
PLANNED_PEAK_BYTES = 1_000_448
TENSOR_PEAK_BYTES = 900_000


def plan_of(request: PlanRequest, peak_bytes: int = PLANNED_PEAK_BYTES) -> Plan:
    settings = {"batch": request.settings.batch, "seq": request.settings.seq}
    return Plan(
        model=request.model.name,
        method=request.method.name,
        settings=settings,
        trainable_params=10,
        total_params=100,
        phase_of_peak="backward",
        peak_bytes=peak_bytes,
        resident_bytes=peak_bytes // 2,
        resident_live_outputs_bytes=peak_bytes // 2,
        allocated_bytes_estimate=peak_bytes,
        reserved_bytes_estimate=2 * peak_bytes,
        device_bytes_estimate=3 * peak_bytes,
        device=DeviceEstimate(peak_bytes, 2 * peak_bytes, peak_bytes, 0, 0, {}),
        peak_by_category={"base_weights": peak_bytes},
        resident_by_category={"base_weights": peak_bytes // 2},
        saved_activation_bytes_per_token=512.0,
        flops_per_step=1000,
    )


def plan_in_process(requests: Sequence[PlanRequest], waiting: object = None) -> list[PlanOutcome]:
    """In place of `peft_gauge.plan.worker.plan_in_parallel`: plans at once, with each setting that a table shows."""
    found: list[PlanOutcome] = []
    for request in requests:
        plan = plan_of(request)
        fits = [gpus.lookup(name) for name in request.gpus]
        settings = {**asdict(request.settings), "dtype": request.dtype, "loop": request.loop, "attention": "sdpa"}
        room = [
            GpuFit(gpu.name, gpu.usable_bytes, plan.device_bytes_estimate, left >= 0, left, 0)
            for gpu in fits
            for left in [gpu.usable_bytes - plan.device_bytes_estimate]
        ]
        found.append(replace(plan, settings=settings, gpus=tuple(room)))
    return found


def metrics_of(setup: CaseSetup) -> dict[str, Any]:
    """The metrics of a memory pass, invented."""
    case = setup.case
    settings = {"batch": case.settings.batch, "seq": case.settings.seq, "dtype": case.dtype, "weights": "random"}
    names = {"method": case.method.name, "title": case.method.title, "model": case.model.name, "device": case.device}
    return {
        "described": {**names, "settings": settings},
        "gradients": {"missing": [], "not_finite": []},
        "learned": True,
        "work_seconds": 0.0,
        "memory": {
            "naive_after_loading_bytes": 400_000,
            "tensor_peak_bytes": TENSOR_PEAK_BYTES,
            "peak_by_category": {"base_weights": TENSOR_PEAK_BYTES},
        },
    }


# What runs in the case's process -------------------------------------------------------------------------------------


def be_killed(_: dict[str, Any]) -> None:
    from tests.support import children

    children.be_killed(9, LAST)


def break_the_device(_: dict[str, Any]) -> NoReturn:
    note(**LAST)
    raise RuntimeError(
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported late"
    )


def lack_a_library(_: dict[str, Any]) -> NoReturn:
    note(phase="imports")
    raise GaugeError("bitsandbytes has no kernels for this torch's CUDA")


def fit_nothing(_: dict[str, Any]) -> NoReturn:
    note(phase="prepare")
    raise GaugeError("the adapter does not fit the model")


def hang(started: str) -> None:
    from tests.support import children

    children.announce_and_hang(str(Path(started, "hanging")), LAST)


def give(metrics: dict[str, Any]) -> dict[str, Any]:
    return metrics


def run_out_of_memory(setup: CaseSetup) -> dict[str, Any]:
    """The real measurement, of a step for whose update there is no memory."""
    from peft_gauge.measure import passes
    from peft_gauge.training.step import TrainingJob
    from tests.support import children

    TrainingJob.optimizer_step = lambda self: children.raise_out_of_memory()  # type: ignore[method-assign]
    return passes.measure(setup)


# What stands in for the suite's own, in pytest's process -------------------------------------------------------------

_run = isolation.run


def run(settings: Settings, function: str, *arguments: Any, **options: Any) -> isolation.ProcessOutcome:
    invented = {**options, "preload": None}  # what measures nothing need not wait for the imports of a measurement
    if function == "peft_gauge.measure.passes:peak_throughput":
        return _run("tests.support.planted_cases:give", _card_speed(*arguments), **invented)
    (setup,) = arguments
    method = setup.case.method.name
    descriptor, _ = tempfile.mkstemp(prefix=f"{method}.", dir=settings.started)
    os.close(descriptor)
    planted = settings.planted.get(method)
    if planted is None:
        return _run(function, setup, **options)
    # But for the real measurement, what is sent must not bring torch into the process: it would take seconds.
    if planted == run_out_of_memory.__name__:
        return _run(f"tests.support.planted_cases:{planted}", setup, **options)
    given = settings.started if planted == hang.__name__ else metrics_of(setup)
    return _run(f"tests.support.planted_cases:{planted}", given, **invented)


def _card_speed(device: str, dtype: str) -> dict[str, Any]:
    return {
        "device": device,
        "dtype": dtype,
        "product_flops_per_second": 1e15,
        "copy_bytes_per_second": 1e15,
        "product_shape": [1, 1, 1],
        "copy_bytes": 1,
    }


class PlantedPlanning:
    """Like `peft_gauge.plan.worker.Planning`, but ``outcome_of`` answers at once. ``begun``: receives the requests."""

    def __init__(
        self,
        outcome_of: Callable[[PlanRequest], PlanOutcome],
        requests: Sequence[PlanRequest],
        begun: Callable[[list[PlanRequest]], object] = lambda requests: None,
        **options: Any,
    ) -> None:
        begun(list(requests))
        self._outcomes = [outcome_of(request) for request in requests]

    def outcome(self, index: int, waiting: object = None) -> PlanOutcome:
        return self._outcomes[index]

    def end(self) -> None:
        pass


def _planted_plan(peaks: dict[str, int], request: PlanRequest) -> Plan:
    return plan_of(request, peaks.get(request.method.name, PLANNED_PEAK_BYTES))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--planted", required=True)


def pytest_configure(config: pytest.Config) -> None:
    from fixtures import plans

    settings = Settings(**json.loads(config.getoption("--planted")))
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)  # the process may run another session
    patch.setattr(isolation, "run", partial(run, settings))
    if settings.plans is not None:
        patch.setattr(fork_server, "prepare", lambda preload, environment: None)
        patch.setattr(plans, "Planning", partial(PlantedPlanning, partial(_planted_plan, settings.plans)))
        patch.setattr(models, "stored", lambda record, dtype, folder: record)
        patch.setattr(models, "tokenizer", lambda record: None)
