"""Several processes that share a step: they compute what one does, and a rank that fails ends them all."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from peft_gauge import isolation, machine
from peft_gauge.errors import GaugeError
from peft_gauge.machine import installed_version
from peft_gauge.measure.ranks import SharedCase, check, check_same, collective_of, summary, versions
from peft_gauge.pytest_plugin.selection import check_shared_steps
from peft_gauge.training import methods, models
from peft_gauge.training.cases import BATCHES, Case
from peft_gauge.training.settings import StepSettings
from peft_gauge.training.sharding import Sharding
from tests.support.facts import lacking
from tests.support.forked import forked
from tests.support.sharded_child import BATCH, GRADIENTS, SEQ, gradients_of, request
from tests.support.sharded_ranks import run_ranks

TOY = models.resolve("toy-llama")
BLOCK_BYTES = 4 * (4 * 64 * 64 + 3 * 64 * 176 + 2 * 64) * 2
"""More than the weights of a block of the toy with its adapter."""

STARTS = ["fork", pytest.param("spawn", marks=pytest.mark.slow)]
"""How ranks are started: forked, they spare their imports; spawned, they are as a user has them."""

CASE = Case(TOY, methods.LORA, StepSettings(BATCH, SEQ), "cpu", "float32")


def shared(case: Case = CASE, ranks: int = 2, port: int = 0) -> SharedCase:
    stream = torch.arange(ranks * BATCHES * BATCH * SEQ) * 7 % 251
    return SharedCase(case, TOY, stream, Sharding(ranks), rounds=2, limit_seconds=60.0, port=port)


def run_planted(
    way: str,
    folder: Path,
    *,
    limit_seconds: float = 60.0,
    port: int = 0,
    start: str = "fork",
    environment: Mapping[str, str] = MappingProxyType({}),
) -> isolation.ProcessOutcome:
    """How ranks end that fail in a ``way`` (`tests.support.planted_ranks`), and leave their process ids in ``folder``;
    none of them may outlive their case."""
    arguments = (shared(port=port), way, str(folder), start, dict(environment))
    outcome = forked("tests.support.planted_ranks:launch", *arguments, limit_seconds=limit_seconds)
    end = time.monotonic() + 10
    while (alive := [file.name for file in folder.iterdir() if is_alive(int(file.name))]) and time.monotonic() < end:
        time.sleep(0.05)  # killed, perhaps not yet gone
    assert alive == [], "a rank, and with it its port, outlived the case"
    return outcome


def is_alive(pid: int) -> bool:
    """A process that nobody collects stays a zombie, which holds no port."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("start", STARTS)
def test_ranks_train_on_data_of_their_own_and_hold_shares(start: str) -> None:
    outcome = forked("tests.support.planted_ranks:launch_on_one_thread", shared(), start)
    assert outcome.ended == "done", outcome.reason
    first, second = outcome.value
    assert (first["rank"], second["rank"]) == (0, 1)
    assert first["losses"] != second["losses"]
    for each in (first, second):
        assert each["peak_bytes"] == sum(each["peak_by_category"].values())
    # gloo's thread can release the last buffer of a collective late, so that it counts in the peak.
    assert abs(first["peak_bytes"] - second["peak_bytes"]) <= BLOCK_BYTES
    assert abs(first["resident_bytes"] - second["resident_bytes"]) <= BLOCK_BYTES
    alone = forked("peft_gauge.measure.ranks:lone", shared())
    assert alone.ended == "done", alone.reason
    assert alone.value["communication"] == first["communication"]
    assert 0 <= first["peak_bytes"] - alone.value["peak_bytes"] <= BLOCK_BYTES
    assert 0 <= first["resident_bytes"] - alone.value["resident_bytes"] <= BLOCK_BYTES
    for category in ("base_weights", "adapter_weights", "optimizer_state", "inputs"):
        assert alone.value["resident_by_category"][category] == first["resident_by_category"][category] > 0
    # All-gathers and reductions of every step, and of none more.
    assert first["communication"]["reduce_scatter"]["calls"] == 2
    assert 0 < first["communication_seconds"] < 60
    by_collective = first["communication_seconds_by_collective"]
    assert first["communication_seconds"] == sum(by_collective.values())
    assert by_collective.keys() == {"all_gather", "all_reduce"}  # by which gloo computes a reduce-scatter
    assert all(seconds > 0 for seconds in by_collective.values())
    found = summary([first, second], BATCH * SEQ)
    slowest = sorted(map(max, zip(first["step_seconds"], second["step_seconds"], strict=True)))
    assert found["rank_step_seconds"] == sum(slowest) / 2
    assert found["ranks_tokens_per_second"] == 2 * BATCH * SEQ / found["rank_step_seconds"]
    assert found["rank_sent_bytes"] == sum(each["sent_bytes"] for each in first["communication"].values())
    assert found["rank_communication_seconds"] == max(each["communication_seconds"] for each in (first, second))
    peaks = (first["peak_bytes"], second["peak_bytes"])
    assert (found["ranks"], found["rank_peak_bytes"], found["rank_peak_bytes_sum"]) == (2, max(peaks), sum(peaks))
    assert found["imbalance"] == pytest.approx(2 * max(peaks) / sum(peaks) - 1)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    ("way", "ended", "words"),
    [
        ("is killed", "crashed", "rank 1 of 2: killed by SIGKILL"),
        ("has no memory", "out-of-memory", "rank 1 of 2"),
        ("hangs", "timed-out", "LIMIT s"),
        ("has another PEFT", "refused", f"peft: {installed_version('peft')} on rank 0, 0.0.1 on rank 1"),
    ],
)
def test_a_rank_that_fails_ends_all_within_the_limit(
    way: str, ended: str, words: str, start: str, tmp_path: Path
) -> None:
    limit = 60.0 if way != "hangs" else 3.0 if start == "fork" else 20.0
    begin = time.monotonic()
    outcome = run_planted(way, tmp_path, limit_seconds=limit, start=start)
    assert time.monotonic() - begin < limit + 20
    assert outcome.ended == ended, outcome.reason
    assert words.replace("LIMIT", f"{limit:.0f}") in str(outcome.reason)
    if way != "hangs":
        assert [*tmp_path.iterdir()], "no rank was started"


def test_a_port_in_use_is_one_line_before_any_rank_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = run_planted("hangs", tmp_path, port=port)
    assert (outcome.ended, outcome.value) == ("refused", None)
    assert f"port {port}: Address already in use" in str(outcome.reason)
    assert "--rank-port" in str(outcome.reason)
    assert "\n" not in str(outcome.reason)
    assert [*tmp_path.iterdir()] == []


def test_ranks_meet_at_the_requested_port_whatever_the_environment_names(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as taken:  # as of another program that torchrun started
        left_over = {"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": str(taken.getsockname()[1]), "RANK": "5"}
        outcome = run_planted("shows its port", tmp_path, port=port, environment=left_over)
    assert outcome.value == [{"rank": 0, "port": port}, {"rank": 1, "port": port}], outcome.reason


@pytest.mark.parametrize(
    ("device", "ranks", "port", "backend", "words"),
    [
        ("cuda", 2, 0, False, ("nccl", torch.__version__)),
        ("cpu", 2, 0, False, ("gloo", torch.__version__)),
        ("cuda", 3, 0, True, ("3 ranks", "torch sees 2", "--gpus")),
        ("cpu", 2, 2**16, True, ("--rank-port", "65535", "65536")),
    ],
)
def test_ranks_that_cannot_start_here_are_one_line(
    monkeypatch: pytest.MonkeyPatch, device: str, ranks: int, port: int, backend: bool, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr("torch.distributed.is_backend_available", lambda name: backend)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(GaugeError) as raised:
        check(device, ranks, port)
    assert lacking(str(raised.value), *words) == []
    check("cpu", 64, 0) if backend else None


@pytest.mark.parametrize(
    ("event", "collective"),
    [
        ("gloo:all_gather", "all_gather"),
        ("nccl:_all_gather_base", "all_gather"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all_gather"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "reduce_scatter"),
        ("ncclDevKernel_AllReduce_Sum_f32_TREE_LL(ncclDevKernelArgsStorage<4096ul>)", "all_reduce"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "other"),
        ("aten::mm", None),
        ("void at::native::vectorized_elementwise_kernel", None),
    ],
)
def test_a_profilers_event_belongs_to_its_collective(event: str, collective: str | None) -> None:
    assert collective_of(event) == collective


def test_versions_are_those_of_the_libraries_that_change_a_step() -> None:
    found = versions()
    assert found["torch"] == installed_version("torch")
    assert {"peft-gauge", "torch", "transformers", "peft"} <= found.keys()
    check_same([found, dict(found)])
    for name in found:
        with pytest.raises(GaugeError, match=rf"of {name}: .* on rank 0, 9\.9 on rank 2"):
            check_same([found, found, {**found, name: "9.9"}])


# --- before a session starts


@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        ({"--gpus": 3}, {}, ("--gpus 3", "torch sees 2")),
        ({"--rank-port": -1}, {}, ("--rank-port", "-1")),
        ({}, {"TORCHELASTIC_RUN_ID": "1"}, ("torchrun",)),
    ],
)
def test_a_session_that_cannot_share_steps_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], environment: dict[str, str], words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(machine, "accelerators", lambda: ("a GPU", "another"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = {"markexpr": "multigpu", "--gpus": None, "--rank-port": 0, **options}
    config: Any = SimpleNamespace(getoption=given.__getitem__)
    with pytest.raises(GaugeError) as raised:
        check_shared_steps(config, "cuda")
    assert lacking(str(raised.value), *words) == []
    given["markexpr"] = "gpu"
    check_shared_steps(config, "cuda")


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """The reduced gradients of two real ranks, whole, by case."""
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("ranks")
    run_ranks([], 2, folder)
    return {name: load_file(Path(folder / f"{name}.safetensors")) for name in map("-".join, GRADIENTS)}


@pytest.mark.parametrize(("method", "strategy"), GRADIENTS)
def test_gradients_are_those_of_one_process_up_to_one_sum(
    method: str, strategy: str, of_ranks: dict[str, dict[str, torch.Tensor]]
) -> None:
    """Each rank's own gradient is computed as by one process. Their mean is one sum, rounded once, and a division by
    2, which is exact: |error| ≤ 2⁻²⁴ |g₀ + g₁| / 2, in each element; twice that for the sum of one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first, second = (gradients_of(request(method, strategy, 2, {}), rank, None) for rank in range(2))
    finally:
        torch.set_num_threads(threads)
    found = of_ranks[f"{method}-{strategy}"]
    assert found.keys() == first.keys()
    for name in first:
        bound = 2.0**-23 * (first[name].double().abs() + second[name].double().abs()) / 2
        error = (found[name].double() - (first[name].double() + second[name].double()) / 2).abs()
        assert bool((error <= bound).all()), f"{name}: {(error - bound).max()}"
    assert any(bool(gradient.abs().max() > 0) for gradient in found.values())
