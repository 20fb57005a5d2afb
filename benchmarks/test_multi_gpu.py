"""How much does a step cost that several GPUs share: memory of each rank, bytes and time of communication, scaling?

Each case runs under torchrun's launcher with one process per GPU, sharded by accelerate's FSDP2 preparation, by DDP or
by DeepSpeed's ZeRO, where it is installed (`pytest -m multigpu --gpus 8 --strategy fsdp2`; with `--replicate 2` in two
groups of four that each hold all shards). Without a GPU two processes of the CPU share it through gloo (`--device
cpu`), which shows that it works, and how much memory it takes, but not how fast it is.

Scaling: *weak* compares a rank's step with the same step on one GPU; *strong* compares the ranks with one GPU that
takes a step of all their tokens.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from fixtures.ranks import about, assert_planned, measured_ranks, rank_request
from peft_gauge import machine
from peft_gauge.measure.ranks import summary
from peft_gauge.training.sharding import Sharding

if TYPE_CHECKING:
    from collections.abc import Callable

    from fixtures.plans import Plans
    from peft_gauge.plan.record import PlanRequest
    from peft_gauge.training.cases import Case

pytestmark = [pytest.mark.multigpu, pytest.mark.slow]

CPU_RANKS = 2


def sharding_of(case: Case, config: pytest.Config) -> Sharding:
    """The ranks of this session: ``--gpus``, else all GPUs, or two processes of the CPU. Raises `GaugeError`."""
    gpus = config.getoption("--gpus")
    if gpus is None:
        gpus = len(machine.accelerators()) if case.device == "cuda" else CPU_RANKS
    return Sharding(max(gpus, 1), config.getoption("--strategy"), replicas=config.getoption("--replicate"))


def steps(case: Case, config: pytest.Config) -> list[PlanRequest]:
    """The planned step of one rank."""
    sharding = sharding_of(case, config)
    return [] if sharding.ranks < 2 or case.loop != "plain" else [rank_request(case, sharding)]


@pytest.mark.plans(steps=steps)
def test_shared_step(case: Case, pytestconfig: pytest.Config, plans: Plans, record: Callable[..., None]) -> None:
    sharding = sharding_of(case, pytestconfig)
    if sharding.ranks < 2:
        pytest.skip("one GPU shares no step; use --gpus 2 or more, or --device cpu")
    if case.loop != "plain":
        pytest.skip(f"--loop {case.loop} is not shared over several GPUs here; use --loop plain")
    (plan,) = plans(steps(case, pytestconfig))

    ranks: list[dict[str, Any]] = measured_ranks("launch", case, sharding, pytestconfig, processes=sharding.ranks)
    shared = summary(ranks, case.settings.tokens)
    alone = seconds_of_one(case, pytestconfig)
    settings = replace(case.settings, batch=case.settings.batch * sharding.ranks)
    all_alone = seconds_of_one(replace(case, settings=settings), pytestconfig)

    record(
        **about(case),
        strategy=sharding.strategy,
        **({"replicas": sharding.replicas} if sharding.replicas > 1 else {}),
        **shared,
        planned_rank_peak_bytes=plan.peak_bytes,
        weak_scaling=alone / shared["rank_step_seconds"],
        strong_scaling=all_alone / shared["rank_step_seconds"],
        plan=plan.as_json(),
        rank_records=ranks,
    )
    assert all(math.isfinite(loss) for each in ranks for loss in each["losses"])
    assert len({tuple(each["losses"]) for each in ranks}) == len(ranks), "ranks trained on the same data"
    planned = {name: (each.calls, each.sent_bytes) for name, each in plan.communication.items()}
    for each in ranks:
        found = {name: (one["calls"], one["sent_bytes"]) for name, one in each["communication"].items()}
        if sharding.strategy != "ddp":  # whose buckets follow the order of gradients in a run
            assert found == planned
        if case.device == "cuda":  # a plan is of CUDA's kernels, which keep other activations than a CPU's
            assert_planned(each["peak_bytes"], plan.peak_bytes)
        assert_planned(each["resident_bytes"], plan.resident_bytes)


def seconds_of_one(case: Case, config: pytest.Config) -> float:
    (found,) = measured_ranks("launch", case, None, config, processes=1)
    return float(statistics.median(found["step_seconds"]))
