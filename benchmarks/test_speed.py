"""How long do forward, backward, the optimizer and a whole training step take, method by method?

Measured in a separate process per case, on CUDA by the device's events and by the host's clock. A round is one step,
with its phases timed at their ends, after a warm-up until rounds no longer get faster; rounds are adaptive: they stop
when relative noise is low or stable. Before every round a forward of the bare base model is timed as a
control, so that each time is also available as a multiple of a quantity that no method changes. Throttling, a shared
GPU and a busy host are reported with the times.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import pytest

from fixtures.replay import REPLAY_CLOCK
from peft_gauge.clock import median_ratio, tokens_per_second
from peft_gauge.clock.peak_throughput import impossible, mbu, mfu
from peft_gauge.history.schema import CONTROL_SAMPLES, SAMPLES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fixtures.measured import Measured
    from peft_gauge.clock.peak_throughput import PeakThroughput

    Replay = Callable[[Sequence[float]], None]
    Record = Callable[..., None]

pytestmark = [pytest.mark.benchmark(timer=REPLAY_CLOCK), pytest.mark.measures("speed")]


@pytest.mark.parametrize("phase", ["forward", "backward", "optimizer"])
def test_phase(phase: str, measured: Measured, replay: Replay, record: Record) -> None:
    name = f"{phase}_seconds"

    replay(all_rounds(measured.speeds, name))

    record(**metrics(measured.speeds, name))


@pytest.mark.quick
def test_step(measured: Measured, replay: Replay, record: Record, peak_throughput: PeakThroughput) -> None:
    replay(all_rounds(measured.speeds, "step_seconds"))

    metric = metrics(measured.speeds, "step_seconds")
    seconds = metric["step_seconds"]
    forward_seconds = metrics(measured.speeds, "forward_seconds")["forward_seconds"]
    weights_read_bytes = measured.metrics["speed"]["weights_read_bytes"]
    of_product = mfu(measured.plan.flops_per_step, seconds, peak_throughput)
    of_copy = mbu(weights_read_bytes, forward_seconds, peak_throughput)
    record(
        **metric,
        tokens_per_second=tokens_per_second(measured.case.settings.tokens, seconds),
        flops_per_second=measured.plan.flops_per_step / seconds,
        mfu=of_product,
        weights_read_per_second_bytes=weights_read_bytes / forward_seconds,
        mbu=of_copy,
        gpu=peak_throughput.as_json(),
    )
    assert measured.metrics["learned"], "a trainable weight never moved: this was no training step"
    doubts = [impossible(of_product, "FLOPs of a step"), impossible(of_copy, "weights read by a forward")]
    assert doubts == [None, None]


def all_rounds(speeds: list[dict[str, Any]], name: str) -> list[float]:
    return [seconds for speed in speeds for seconds in speed["samples"][name]]


def metrics(speeds: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The median over processes of each one's median, all samples, and reasons to doubt them."""
    samples = [speed["samples"][name] for speed in speeds]
    control = [speed["control_seconds"] for speed in speeds]
    found: dict[str, Any] = {
        name: statistics.median(map(statistics.median, samples)),
        SAMPLES: {name: samples},
        "warm_up_rounds": [speed["warm_up_rounds"] for speed in speeds],
        "stopped": [speed["stopped"] for speed in speeds],
        "relative_noise": [speed["relative_noise"] for speed in speeds],
        "unsteady": sorted({reason for speed in speeds for reason in speed["unsteady"]}),
    }
    if all(control):
        ratios = [median_ratio(rounds, beside) for rounds, beside in zip(samples, control, strict=True)]
        found |= {
            name.replace("_seconds", "_over_control"): statistics.median(ratios),
            "control_seconds": statistics.median(map(statistics.median, control)),
            CONTROL_SAMPLES: {name: control},
        }
    if name == "step_seconds" and "host_step_seconds" in speeds[0]:
        found["host_step_seconds"] = statistics.median(statistics.median(s["host_step_seconds"]) for s in speeds)
    for optional in ("states", "states_unavailable"):
        if optional in speeds[0]:
            found[optional] = [speed.get(optional) for speed in speeds]
    return found
