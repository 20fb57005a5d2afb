"""How long do forward, backward and a whole training step take, method by method?

Each phase is timed by pytest-benchmark with a clock that waits for the device. A fresh graph and cleared gradients are
made outside the clock. Before every round a forward of the bare base model is timed as a control, so that each time
also stands as a multiple of something that no method changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from peft_gauge.cases import Case, described
from peft_gauge.clock import synchronised_clock, tokens_per_second

if TYPE_CHECKING:
    from collections.abc import Callable

    from fixtures.timing import Timing
    from peft_gauge.step import TrainingJob

    Stopwatch = Callable[[Callable[[], object], Callable[[], object]], Timing]

pytestmark = pytest.mark.benchmark(timer=synchronised_clock)


def test_forward(case: Case, job: TrainingJob, stopwatch: Stopwatch, record: Callable[..., None]) -> None:
    timing = stopwatch(job.forward, job.clear)

    job.clear()
    record(**described(case, job), **figures("forward", timing))


def test_backward(case: Case, job: TrainingJob, stopwatch: Stopwatch, record: Callable[..., None]) -> None:
    def fresh_graph() -> None:
        job.clear()
        job.forward()

    timing = stopwatch(job.backward, fresh_graph)

    job.clear()
    record(**described(case, job), **figures("backward", timing))


def test_step(case: Case, job: TrainingJob, stopwatch: Stopwatch, record: Callable[..., None]) -> None:
    timing = stopwatch(job.step, job.clear)

    job.clear()
    assert job.learned(), "a trainable weight never moved: this was no training step"
    figure = figures("step", timing)
    figure["tokens_per_second"] = tokens_per_second(job.settings.tokens, figure["step_seconds"])
    record(**described(case, job), **figure)


def figures(phase: str, timing: Timing) -> dict[str, float]:
    return {
        f"{phase}_seconds": timing.median_seconds,
        f"{phase}_over_control": timing.over_control,
        "control_seconds": timing.median_control_seconds,
    }
