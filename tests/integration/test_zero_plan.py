"""Steps of DeepSpeed's ZeRO: one rank on fakes, against real processes that send each other tensors (gloo)."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch

from peft_gauge import isolation
from peft_gauge._internals.deepspeed import has_deepspeed
from peft_gauge.measure.ranks import SharedCase, summary
from peft_gauge.plan.planner import plan
from peft_gauge.training.cases import BATCHES, Case
from tests.support.sharded_child import BATCH, SEQ, request
from tests.support.sharded_ranks import assert_same_rank, trace_on_fakes, traces_of_real_ranks
from tests.support.suite import sessions

if TYPE_CHECKING:
    from tests.conftest import Run

RANKS = 2
needs_deepspeed = pytest.mark.skipif(not has_deepspeed(), reason="DeepSpeed is not installed; run: nox -s deepspeed")

# Deprecated names of torch, and addresses of fakes, which DeepSpeed compares; a plan silences both.
pytestmark = pytest.mark.filterwarnings("ignore")

CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((method, strategy, {}) for strategy in ("zero1", "zero2", "zero3") for method in ("full", "lora")),
    *(("full", strategy, {"dtype": "bfloat16"}) for strategy in ("zero1", "zero2", "zero3")),
    ("lora", "zero3", {"grad_checkpointing": True, "dtype": "bfloat16"}),
    ("full", "zero2", {"clip_grad_norm": 1.0, "grad_accumulation": 2}),
    ("lora", "zero3", {"clip_grad_norm": 1.0, "grad_accumulation": 2, "dtype": "bfloat16"}),
    *(("full", strategy, {"offload": ["optimizer"], "dtype": "bfloat16"}) for strategy in ("zero1", "zero2", "zero3")),
    ("full", "zero2", {"offload": ["optimizer"], "grad_accumulation": 2}),
    ("full", "zero3", {"offload": ["params"], "dtype": "bfloat16"}),
    ("lora", "zero3", {"offload": ["params", "optimizer"], "grad_accumulation": 2, "dtype": "bfloat16"}),
]


@pytest.fixture(scope="module")
def real_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """By rank, the trace of each case."""
    return traces_of_real_ranks(CASES, RANKS, tmp_path_factory.mktemp("ranks"))


@cache
def planned_case(number: int) -> dict[str, Any]:
    return dict(json.loads(json.dumps(trace_on_fakes(*CASES[number], RANKS))))


@needs_deepspeed
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{n}-" + "-".join([*CASES[n][:2], *CASES[n][2]]))
def test_a_planned_rank_is_a_real_one_without_its_numbers(number: int, real_ranks: list[list[dict[str, Any]]]) -> None:
    """The most that may be released late is a bucket of all gradients and its copy."""
    assert_same_rank(planned_case(number), real_ranks[0][number], 2 * 430_000)


@needs_deepspeed
def test_most_peaks_are_planned_to_the_byte(real_ranks: list[list[dict[str, Any]]]) -> None:
    exact = [real_ranks[0][i]["peak"][0] == planned_case(i)["peak"][0] for i in range(len(CASES))]
    assert sum(exact) > len(exact) / 2


@needs_deepspeed
@pytest.mark.parametrize(("strategy", "weights", "state"), [("zero1", 1, 8), ("zero2", 1, 8), ("zero3", 8, 8)])
def test_each_stage_shards_its_part(strategy: str, weights: int, state: int) -> None:
    """Rajbhandari et al. 2020, figure 1, in bfloat16: 2 bytes of weights per parameter; 12 of state, with float32
    weights and two averages."""
    found = plan(replace(request("full", strategy, 8, {"dtype": "bfloat16"}), attention=None))
    parameters = found.total_params
    resident = found.resident_by_category
    assert resident["base_weights"] == pytest.approx(2 * parameters / weights, rel=0.02)
    assert resident["optimizer_state"] == pytest.approx(12 * parameters / state, rel=0.02)
    bucket = 2 * 500_000_000  # DeepSpeed's default, whatever the model's size
    assert found.peak_by_category["communication_buffers"] == bucket


@needs_deepspeed
@pytest.mark.parametrize(
    ("strategy", "offload", "moved"),
    [
        ("zero1", ("optimizer",), {"optimizer_state"}),
        ("zero2", ("optimizer",), {"optimizer_state"}),
        ("zero3", ("optimizer",), {"optimizer_state", "gradients"}),
        ("zero3", ("params",), {"base_weights"}),
        ("zero3", ("params", "optimizer"), {"base_weights", "optimizer_state", "gradients"}),
    ],
)
def test_offloading_moves_its_part_to_host_memory(strategy: str, offload: tuple[str, ...], moved: set[str]) -> None:
    """Ren et al. 2021, ZeRO-Offload: 16 bytes per parameter of a shard leave the GPU with the update: float32 weights,
    gradients and two averages; and 2 bytes of weights."""
    settings = {"dtype": "bfloat16"}
    kept, found = (
        plan(replace(request("full", strategy, 8, {**settings, "offload": each}), attention=None))
        for each in ((), offload)
    )
    assert kept.resident_by_category.keys() - found.resident_by_category.keys() == moved | (
        {"optimizer_temporaries"} if "optimizer" in offload else set()
    )
    share = found.total_params / 8
    least = 16 * share * ("optimizer" in offload) + 2 * share * ("params" in offload)
    buffers = 2 * 64 * 256  # of the largest parameter
    assert found.host_bytes is not None
    assert least <= found.host_bytes <= least + 8 * share + buffers  # 16-bit copies; temporaries of torch's update
    assert found.communication["all_gather"] == kept.communication["all_gather"]
    assert any("in host memory" in note for note in found.warnings)


@needs_deepspeed
def test_the_bytes_of_a_step_are_those_of_its_collectives() -> None:
    """Stage 2 reduces all gradients to all, and gathers the weights once."""
    found = plan(request("full", "zero2", 4, {"dtype": "bfloat16"}))
    weights = 2 * found.total_params
    assert found.communication["all_reduce"].sent_bytes == pytest.approx(2 * weights * 3 / 4, rel=0.01)
    assert found.communication["all_gather"].sent_bytes == pytest.approx(weights * 3 / 4, rel=0.01)


MEASURED = [
    *((method, strategy) for strategy in ("zero1", "zero2", "zero3") for method in ("full", "lora")),
    ("qlora", "zero3"),
]


@needs_deepspeed
@pytest.mark.parametrize(("method", "strategy"), MEASURED)
def test_measured_ranks_are_the_planned_one(method: str, strategy: str) -> None:
    """Ranks of `-m multigpu`: the collectives, and the memory up to buffers that gloo's thread releases late."""
    asked = request(method, strategy, RANKS, {})
    case = Case(asked.model, asked.method, asked.settings, "cpu", asked.dtype, attention=asked.attention)
    stream = torch.arange(RANKS * BATCHES * BATCH * SEQ) * 7 % 251
    assert asked.sharding is not None
    outcome = isolation.run(
        "peft_gauge.measure.ranks:launch",
        SharedCase(case, asked.model, stream, asked.sharding, rounds=2, limit_seconds=60.0),
        limit_seconds=300.0,
        environment={"OMP_NUM_THREADS": "1"},
    )
    assert outcome.ended == "done", outcome.reason
    found = plan(asked)
    planned = {name: {"calls": each.calls, "sent_bytes": each.sent_bytes} for name, each in found.communication.items()}
    for each in outcome.value:
        assert each["communication"] == planned
        # A plan counts blocks of 512 bytes, a measured rank bytes, and a batch that it has trained on.
        assert found.peak_bytes - 200_000 <= each["peak_bytes"] <= found.peak_bytes + 2 * 430_000
        for category in ("base_weights", "adapter_weights", "optimizer_state", "gradients"):
            whole, own = (by.get(category, 0) for by in (found.resident_by_category, each["resident_by_category"]))
            assert 0 <= whole - own <= 512 * 100
        assert len(each["step_seconds"]) == 2
    first, second = (each["losses"] for each in outcome.value)
    assert first != second
    assert summary(outcome.value, BATCH * SEQ)["rank_communication_seconds"] > 0


@pytest.mark.skipif(has_deepspeed(), reason="DeepSpeed is installed")
def test_a_session_without_deepspeed_is_one_line() -> None:
    (done,) = sessions(["-m", "multigpu", "--device=cpu", "--model=toy-llama", "--strategy=zero2", "--no-save"])
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = done.stderr.strip().splitlines()
    assert "pip install deepspeed" in line


@pytest.mark.skipif(has_deepspeed(), reason="DeepSpeed is installed")
def test_without_deepspeed_one_line_names_it(run_command: Run) -> None:
    options = ["--gpus", "2", "--strategy", "zero2"]
    code, _, errors = run_command("plan", "--model", "toy-llama", "--method", "lora", "--seq", "16", *options)
    assert code == 2
    assert "pip install deepspeed" in errors
    assert len(errors.strip().splitlines()) == 1


@needs_deepspeed
def test_fp16_is_one_line(run_command: Run) -> None:
    options = ["--gpus", "2", "--strategy", "zero2", "--dtype", "float16"]
    code, _, errors = run_command("plan", "--model", "toy-llama", "--method", "lora", "--seq", "16", *options)
    assert code == 2
    assert "fp16" in errors
