"""Does one rank of an FSDP2 step need the memory of its plan on a real device, without the other ranks?

Rank 0 of `--gpus` N (default 8) takes its part of the step in a process group whose other ranks do not exist: torch's
own backend for tests, whose collectives return at once and move no data. Weights are sharded, gathered and released as
on N GPUs, and the allocator's peaks are compared with the plan. Losses are arbitrary, there are no times, and neither
NCCL's buffers nor its streams. So one GPU can check a plan for many:
`pytest benchmarks/test_one_rank.py::test_lone_rank --gpus 8`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fixtures.ranks import about, assert_planned, measured_ranks, rank_request
from peft_gauge.training.sharding import Sharding

if TYPE_CHECKING:
    from collections.abc import Callable

    from fixtures.plans import Plans
    from peft_gauge.plan.record import PlanRequest
    from peft_gauge.training.cases import Case

pytestmark = pytest.mark.slow

RANKS = 8


def sharding_of(config: pytest.Config) -> Sharding:
    """The ranks of this session. Raises `GaugeError` for ``--gpus 0`` and less."""
    return Sharding(RANKS if config.getoption("--gpus") is None else config.getoption("--gpus"))


def steps(case: Case, config: pytest.Config) -> list[PlanRequest]:
    """The planned step of one rank; none for a step that ranks do not share here."""
    sharding = sharding_of(config)
    return [] if case.loop != "plain" or sharding.ranks < 2 else [rank_request(case, sharding)]


@pytest.mark.plans(steps=steps)
def test_lone_rank(case: Case, pytestconfig: pytest.Config, plans: Plans, record: Callable[..., None]) -> None:
    sharding, requests = sharding_of(pytestconfig), steps(case, pytestconfig)
    if not requests:
        pytest.skip("one rank of several needs --gpus 2 or more, and --loop plain")
    (plan,) = plans(requests)

    found = measured_ranks("lone", case, sharding, pytestconfig, processes=1)

    record(
        **about(case),
        strategy="fsdp2",
        lone_ranks=sharding.ranks,
        lone_peak_bytes=found["peak_bytes"],
        lone_allocated_peak_bytes=found.get("allocated_peak_bytes"),
        lone_reserved_peak_bytes=found.get("reserved_peak_bytes"),
        planned_lone_peak_bytes=plan.peak_bytes,
        planned_lone_allocated_bytes=plan.allocated_bytes_estimate,
        planned_lone_reserved_bytes=plan.reserved_bytes_estimate,
        lone_peak_by_category=found["peak_by_category"],
        plan=plan.as_json(),
    )
    sent = {name: (each.calls, each.sent_bytes) for name, each in plan.communication.items()}
    assert {name: (one["calls"], one["sent_bytes"]) for name, one in found["communication"].items()} == sent
    if case.device == "cuda":  # a plan is of CUDA's kernels, which keep other activations than a CPU's
        assert_planned(found["peak_bytes"], plan.peak_bytes)
    assert_planned(found["resident_bytes"], plan.resident_bytes)
