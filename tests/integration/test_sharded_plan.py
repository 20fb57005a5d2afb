"""Steps of FSDP2 and DDP: one rank on fakes, against real processes that send each other tensors (gloo)."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from peft_gauge.plan.planner import plan
from peft_gauge.plan.record import GpuFit, Plan, PlanRequest
from peft_gauge.plan.search import find
from peft_gauge.training import methods
from tests.support.planted_cases import plan_of
from tests.support.sharded_child import request
from tests.support.sharded_ranks import assert_same_rank, trace_on_fakes, traces_of_real_ranks, without_buffers

if TYPE_CHECKING:
    from tests.conftest import Run

RANKS = 2
LATE_BYTES = 2 * 4 * 50_000
"""Two buffers of the toy's largest unit, a block of some 50,000 weights in float32."""

CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((method.name, "fsdp2", {}) for method in methods.DEFAULT_METHODS if method.quantization is None),
    ("lora", "fsdp2", {"grad_checkpointing": True}),
    ("full", "fsdp2", {"clip_grad_norm": 1.0, "grad_accumulation": 2}),
    ("lora", "ddp", {}),
]


@pytest.fixture(scope="module")
def real_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """By rank, the trace of each case."""
    return traces_of_real_ranks(CASES, RANKS, tmp_path_factory.mktemp("ranks"))


@cache
def planned_case(number: int) -> str:
    """The JSON of the trace of a case on fakes."""
    return json.dumps(trace_on_fakes(*CASES[number], RANKS))


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: "-".join([*CASES[n][:2], *CASES[n][2]]))
def test_a_planned_rank_is_a_real_one_without_its_numbers(number: int, real_ranks: list[list[dict[str, Any]]]) -> None:
    """To the byte, for the first rank; a later one can lack rows of tensors with fewer rows than ranks. gloo's thread
    can release the last buffers of a collective late: then they count in the peak of a real rank."""
    planned = json.loads(planned_case(number))
    first, *later = (dict(rank[number]) for rank in real_ranks)
    if CASES[number][1] == "ddp":  # a plan's buckets are those that a run rebuilds after its first step
        assert sent(planned) == sent(first)
        del planned["communication"], first["communication"]
    assert_same_rank(planned, first, LATE_BYTES)
    peak = planned["peak"][0]
    for real in later:
        assert 0.99 * peak <= real["peak"][0] <= peak + LATE_BYTES
        resident = without_buffers(real["resident"]), without_buffers(first["resident"])
        assert sum(resident[0].values()) <= sum(resident[1].values())


def test_most_peaks_are_planned_to_the_byte(real_ranks: list[list[dict[str, Any]]]) -> None:
    exact = [real_ranks[0][i]["peak"][0] == json.loads(planned_case(i))["peak"][0] for i in range(len(CASES))]
    assert sum(exact) > len(exact) / 2


def sent(trace: dict[str, Any]) -> int:
    return sum(sent_bytes for _, sent_bytes in trace["communication"].values())


def planned(gpus: int, method: str = "full", **further: Any) -> Plan:
    return plan(replace(request(method, "fsdp2", gpus, {}, **further), gpus=("24GB",)))


@pytest.mark.slow
def test_hybrid_sharding_is_that_of_four_real_processes(tmp_path: Path) -> None:
    """Two groups of two: as `CASES`."""
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("full", "fsdp2", {"replicas": 2}),
        ("lora", "fsdp2", {"replicas": 2}),
    ]
    real = traces_of_real_ranks(cases, 4, tmp_path)
    for number, case in enumerate(cases):
        assert_same_rank(json.loads(json.dumps(trace_on_fakes(*case, 4))), real[0][number], LATE_BYTES)


def test_replicas_hold_the_shards_of_a_group_and_average_them() -> None:
    """A rank of 2 groups of 4 holds what a rank of 4 holds, and sends the average of its gradients to the other group:
    2 (N-1)/N of a shard, with N = 2."""
    alone, hybrid = planned(4), planned(8, replicas=2)
    assert hybrid.resident_by_category == alone.resident_by_category
    assert hybrid.peak_by_category["gradients"] == alone.peak_by_category["gradients"]
    for collective in ("all_gather", "reduce_scatter"):
        assert hybrid.communication[collective] == alone.communication[collective]
    shard = 4 * hybrid.total_params / 4
    assert "all_reduce" not in alone.communication
    assert hybrid.communication["all_reduce"].sent_bytes == pytest.approx(shard, rel=0.01)


def test_ranks_share_weights_gradients_and_state_by_zero_3() -> None:
    """Rajbhandari et al. 2020: with N ranks, each holds 1/N of what all hold between two steps."""
    parts = ("base_weights", "optimizer_state")
    alone, shared = plan(replace(request("full", "fsdp2", 2, {}), sharding=None)), planned(4)
    for part in parts:
        whole = alone.resident_by_category[part]
        # Blocks of 512 bytes, and rows that do not divide by 4.
        assert whole / 4 <= shared.resident_by_category[part] <= whole / 4 + 512 * 3 * 40
    assert shared.trainable_params == alone.trainable_params
    assert shared.flops_per_step == alone.flops_per_step


def test_the_bytes_of_a_step_are_those_of_its_collectives() -> None:
    """Each block's weights are gathered twice, since they are released after forward, and the head's once; every
    gradient is reduced once. A rank sends (N-1)/N of each (Rajbhandari et al. 2020, section 7: 3 times the weights)."""
    found = planned(4).communication
    weights = 4 * planned(4).total_params
    assert found["reduce_scatter"].sent_bytes == pytest.approx(weights * 3 / 4, rel=0.01)
    assert weights * 3 / 4 < found["all_gather"].sent_bytes < 2 * weights * 3 / 4
    kept = planned(4, reshard_after_forward=False).communication
    assert kept["all_gather"].sent_bytes == pytest.approx(weights * 3 / 4, rel=0.01)


def test_ddp_sends_each_gradient_to_all() -> None:
    found = plan(request("full", "ddp", 4, {}))
    assert found.communication["all_reduce"].sent_bytes == pytest.approx(2 * 3 / 4 * 4 * found.total_params, rel=0.001)
    assert found.resident_by_category["communication_buffers"] == pytest.approx(4 * found.total_params, rel=0.01)


def test_offloaded_shards_and_state_are_in_host_memory() -> None:
    """In float32: 4 bytes of weights, 4 of gradients and 8 of two averages per parameter, over 4 ranks; the update of
    one list of tensors adds temporaries there."""
    kept, offloaded = planned(4), planned(4, offload=("params",))
    assert not {"base_weights", "optimizer_state", "gradients"} & set(offloaded.resident_by_category)
    assert kept.host_bytes is None
    assert offloaded.host_bytes is not None
    share = offloaded.total_params / 4
    assert 16 * share <= offloaded.host_bytes <= 1.05 * 24 * share
    # On the GPU remain the gathered units, activations, and for a moment one shard to gather from.
    assert offloaded.peak_bytes < kept.peak_bytes - 0.9 * kept.resident_by_category["base_weights"]
    assert offloaded.peak_by_category["activations"] > 0
    assert offloaded.communication == kept.communication
    assert any("host memory" in note for note in offloaded.warnings)


def test_packed_weights_are_sharded_too() -> None:
    asked = replace(request("qlora", "fsdp2", 2, {}), dtype="bfloat16")
    alone, shared = plan(replace(asked, sharding=None)), plan(asked)
    assert shared.resident_by_category["base_weights"] == pytest.approx(
        alone.resident_by_category["base_weights"] / 2, rel=0.02
    )
    # Each rank holds all constants.
    assert shared.resident_by_category["quantization_constants"] == alone.resident_by_category["quantization_constants"]


class Shared:
    """Plans of which each GPU holds 10 GB, and its share of 100 GB."""

    def __init__(self, usable: int) -> None:
        self.usable = usable
        self.tried: list[int] = []

    def __call__(self, asked: PlanRequest) -> Plan:
        ranks = 1 if asked.sharding is None else asked.sharding.ranks
        self.tried.append(ranks)
        resident = 100 * 10**9 // ranks
        used = resident + 10 * 10**9
        fits = used <= self.usable
        gpu = GpuFit("a GPU", self.usable, used, fits, self.usable - used, 0)
        return replace(plan_of(asked, used), resident_bytes=resident, gpus=(gpu,))


@pytest.mark.parametrize(
    ("usable", "fewest"), [(110, 1), (109, 2), (60, 2), (24, 8), (23, 8), (22, 9), (11, 100), (10, None)]
)
def test_the_fewest_gpus_hold_the_step_and_one_less_does_not(usable: int, fewest: int | None) -> None:
    planner = Shared(usable * 10**9)
    found = find(replace(request("full", "fsdp2", 2, {}), gpus=("24GB",)), "gpus", planner)
    assert found.value == fewest
    assert found.plan.fits == (fewest is not None)
    assert len(planner.tried) == len(set(planner.tried)) < 15


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--strategy", "ddp"], "--gpus"),
        (["--gpus", "0"], "at least 1"),
        (["--gpus", "2", "--strategy", "fsdp3"], "fsdp2"),
        (["--gpus", "2", "--strategy", "ddp", "--no-reshard-after-forward"], "fsdp2"),
        (["--gpus", "2", "--offload", "optimizer"], "--strategy fsdp2, which offloads params"),
        (["--gpus", "2", "--offload", "weights"], "--offload must be params, optimizer or both, not 'weights'"),
        (["--gpus", "2", "--strategy", "ddp", "--offload", "params"], "--strategy ddp, which offloads nothing"),
        (["--offload", "params"], "--gpus"),
        (["--replicate", "2"], "--gpus"),
        (["--gpus", "4", "--replicate", "3"], "4 GPUs, --replicate 3"),
        (["--gpus", "4", "--replicate", "4"], "at least 2"),
        (["--gpus", "4", "--replicate", "0"], "--replicate 0"),
        (["--gpus", "4", "--strategy", "ddp", "--replicate", "2"], "not for ddp"),
        (["--gpus", "2", "--loop", "trainer"], "--loop plain"),
        (["--gpus", "2", "--find", "gpus", "--gpu", "24GB"], "drop --gpus"),
    ],
)
def test_bad_options_are_one_line(options: list[str], named: str, run_command: Run) -> None:
    code, _, errors = run_command("plan", "--model", "toy-llama", "--method", "lora", "--seq", "16", *options)
    assert code == 2
    assert named in errors
    assert len(errors.strip().splitlines()) == 1
