"""How much does a step cost that several GPUs share: memory of each rank, bytes and time of communication, scaling?

Each case runs under torchrun's launcher with one process per GPU, sharded by accelerate's FSDP2 preparation or by DDP
(`pytest -m multigpu --gpus 8 --strategy fsdp2`). Without a GPU two processes of the CPU share it through gloo
(`--device cpu`), which shows that it works, and how much memory it takes, but not how fast it is.

Scaling: *weak* compares a rank's step with the same step on one GPU; *strong* compares the ranks with one GPU that
takes a step of all their tokens.
"""

from __future__ import annotations

import math
import os
import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from fixtures.weights import stored_base
from peft_gauge import isolation, machine
from peft_gauge.measure.ranks import SharedCase, summary
from peft_gauge.plan.record import PlanRequest
from peft_gauge.pytest_plugin.workers import process_environment
from peft_gauge.training import models
from peft_gauge.training.batches import token_stream
from peft_gauge.training.cases import BATCHES
from peft_gauge.training.sharding import Sharding

if TYPE_CHECKING:
    from collections.abc import Callable

    from fixtures.plans import Plans
    from peft_gauge.training.cases import Case

pytestmark = [pytest.mark.multigpu, pytest.mark.slow]

ROUNDS = 5
CPU_RANKS = 2
TOLERANCE = 0.02
"""Of a rank's tracked bytes, against its plan."""
BLOCKS = 10**6
"""Bytes by which a plan can be larger, since it rounds each tensor up to blocks of 512 bytes."""


def sharding_of(case: Case, config: pytest.Config) -> Sharding:
    """The ranks of this session: ``--gpus``, else all GPUs, or two processes of the CPU. Raises `GaugeError`."""
    gpus = config.getoption("--gpus")
    if gpus is None:
        gpus = len(machine.accelerators()) if case.device == "cuda" else CPU_RANKS
    return Sharding(max(gpus, 1), config.getoption("--strategy"))


def steps(case: Case, config: pytest.Config) -> list[PlanRequest]:
    """The planned step of one rank."""
    sharding = sharding_of(case, config)
    if sharding.ranks < 2 or case.loop != "plain":
        return []
    return [
        PlanRequest(
            case.model, case.method, case.settings, dtype=case.dtype, attention=case.attention, sharding=sharding
        )
    ]


@pytest.mark.plans(steps=steps)
def test_shared_step(case: Case, pytestconfig: pytest.Config, plans: Plans, record: Callable[..., None]) -> None:
    sharding = sharding_of(case, pytestconfig)
    if sharding.ranks < 2:
        pytest.skip("one GPU shares no step; use --gpus 2 or more, or --device cpu")
    if case.loop != "plain":
        pytest.skip(f"--loop {case.loop} is not shared over several GPUs here; use --loop plain")
    (plan,) = plans(steps(case, pytestconfig))
    tokens = case.settings.tokens

    ranks = launched(case, sharding, pytestconfig)
    shared = summary(ranks, tokens)
    alone = seconds_of_one(case, pytestconfig)
    settings = replace(case.settings, batch=case.settings.batch * sharding.ranks)
    all_alone = seconds_of_one(replace(case, settings=settings), pytestconfig)

    record(
        method=case.method.name,
        title=case.method.title,
        model=case.model.name,
        device=case.device,
        settings={
            "batch": case.settings.batch,
            "seq": case.settings.seq,
            "dtype": case.dtype,
            "weights": case.model.weights,
            "grad_checkpointing": case.settings.grad_checkpointing,
            "mixed_precision": case.settings.mixed_precision,
        },
        strategy=sharding.strategy,
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
        if sharding.strategy == "fsdp2":
            assert found == planned
        if case.device == "cuda" or case.attention == "eager":  # a plan is of CUDA's attention kernels
            assert_planned(each["peak_bytes"], plan.peak_bytes)
        assert_planned(each["resident_bytes"], plan.resident_bytes)


def assert_planned(tracked: int, planned: int) -> None:
    assert (1 - TOLERANCE) * planned - BLOCKS <= tracked <= (1 + TOLERANCE) * planned


def launched(case: Case, sharding: Sharding | None, config: pytest.Config) -> list[dict[str, Any]]:
    """The record of each rank; ends the test if a rank failed."""
    ranks = 1 if sharding is None else sharding.ranks
    limit = config.getoption("--time-limit")
    stream = token_stream(
        models.tokenizer(case.model),
        vocab_size=case.model.vocab_size,
        tokens=ranks * BATCHES * case.settings.batch * case.settings.seq,
        seed=case.seed,
    )
    rounds = config.getoption("--rounds") or ROUNDS
    shared = SharedCase(
        case, stored_base(case.model, case.dtype), stream, sharding, rounds, limit, config.getoption("--rank-port")
    )
    outcome = isolation.run(
        "peft_gauge.measure.ranks:launch", shared, limit_seconds=limit, environment=environment(case, ranks)
    )
    if outcome.ended != "done":
        pytest.fail(f"{outcome.ended}: {outcome.reason}", pytrace=False)
    found: list[dict[str, Any]] = outcome.value
    return found


def environment(case: Case, ranks: int) -> dict[str, str | None]:
    """On a CPU, ranks share the cores: threads that wait for each other's turn take many times as long."""
    if case.device == "cuda":
        return process_environment()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {**process_environment(), "OMP_NUM_THREADS": str(max(cores // ranks, 1))}


def seconds_of_one(case: Case, config: pytest.Config) -> float:
    (found,) = launched(case, None, config)
    return float(statistics.median(found["step_seconds"]))
