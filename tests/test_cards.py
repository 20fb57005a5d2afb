"""Which card a pytest-xdist worker measures on, and what the cards are, with invented cards and a stand-in torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peft_gauge import isolation, machine
from peft_gauge.errors import GaugeError
from peft_gauge.machine import Accelerator
from peft_gauge.pytest_plugin import workers

UUIDS = ("GPU-00000000-1111-2222-3333-444444444444", "MIG-55555555-6666-7777-8888-999999999999")

Plant = Callable[..., None]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """``plant(uuid, …)``: the cards of this machine, by UUID or ``None``."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)

    def invent(*uuids: str | None) -> None:
        invented = tuple(Accelerator("Invented 80GB", 80 * 2**30, (9, 0), uuid) for uuid in uuids)
        monkeypatch.setattr(machine, "accelerators", lambda: invented)

    return invent


# A card for each worker ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("worker", "uuid"), [("gw0", UUIDS[0]), ("gw1", UUIDS[1])])
def test_a_worker_sees_its_own_card_by_uuid(
    worker: str, uuid: str, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(*UUIDS)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")  # whose numbers say nothing once there are UUIDs
    assert workers.card_environment() == {"CUDA_VISIBLE_DEVICES": uuid}


@pytest.mark.parametrize(("visible", "expected"), [(None, "1"), ("5,3", "3"), ("5, GPU-abc", "GPU-abc")])
def test_without_a_uuid_the_card_is_that_of_the_users_list(
    visible: str | None, expected: str, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(None, None)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw1")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert workers.card_environment() == {"CUDA_VISIBLE_DEVICES": expected}


def test_nothing_is_set_where_no_worker_has_to_share(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(*UUIDS)
    assert not workers.is_worker()
    assert workers.card_environment() == {}
    plant()
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    assert workers.is_worker()
    assert workers.card_environment() == {}


def test_a_case_does_not_see_what_libraries_have_written_since(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant()
    monkeypatch.setattr(workers, "_AT_START", {**os.environ, "GAUGE_CHANGED": "first", "GAUGE_GONE": "was there"})
    monkeypatch.setenv("GAUGE_CHANGED", "second")
    monkeypatch.setenv("GAUGE_WRITTEN", "since")
    written = {"GAUGE_CHANGED": "first", "GAUGE_GONE": "was there", "GAUGE_WRITTEN": None}
    assert workers.process_environment() == written
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "another")
    plant(*UUIDS)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw1")
    assert workers.process_environment() == {**written, "CUDA_VISIBLE_DEVICES": UUIDS[1]}
    environment = isolation.child_environment(workers.process_environment())
    assert (environment["GAUGE_GONE"], "GAUGE_WRITTEN" in environment) == ("was there", False)


def config_of(workers: int | None) -> Any:
    """pytest's config, of which only ``-n`` is asked."""
    return SimpleNamespace(getoption=lambda name, default: {"numprocesses": workers}.get(name, default))


def test_more_workers_than_cards_are_refused(plant: Plant) -> None:
    plant(*UUIDS)
    with pytest.raises(GaugeError) as caught:
        workers.check_workers(config_of(4), "cuda")
    assert str(caught.value) == "-n 4 needs 4 cards, one for each worker; torch sees 2: use -n 2"


@pytest.mark.parametrize(("number", "device"), [(2, "cuda"), (1, "cuda"), (0, "cuda"), (None, "cuda"), (4, "cpu")])
def test_workers_that_have_a_card_each_are_not_refused(number: int | None, device: str, plant: Plant) -> None:
    plant(*UUIDS)
    workers.check_workers(config_of(number), device)


@pytest.mark.parametrize(
    ("nodeid", "scope"),
    [
        ("benchmarks/test_memory.py::test_peak[lora-toy-llama-cuda]", "lora-toy-llama-cuda"),
        ("benchmarks/test_speed.py::test_phase[lora-toy-llama-cuda-backward]", "lora-toy-llama-cuda"),
        ("benchmarks/test_speed.py::test_step[lora-toy-llama-cuda]", "lora-toy-llama-cuda"),
        ("benchmarks/test_memory.py::test_variation[lora-checkpointing-toy-cpu]", "lora-checkpointing-toy-cpu"),
        ("benchmarks/test_memory.py::test_peak[lora-owner--name[0]-cuda]", "lora-owner--name[0]-cuda"),
        ("benchmarks/test_claims.py::test_claim[identity-toy-llama]", None),
        ("benchmarks/test_lora_identity.py::test_zero", None),
    ],
)
def test_all_questions_to_a_case_go_to_one_worker(nodeid: str, scope: str | None) -> None:
    pytest.importorskip("xdist")
    config = SimpleNamespace(getvalue=lambda name: ["popen"], getoption=lambda name: ["popen"])
    scheduling = workers.case_scheduling(config, SimpleNamespace(loadscopesched=None))  # type: ignore[arg-type]
    assert scheduling._split_scope(nodeid) == (scope or nodeid)


REPLAYED = """
import pytest
from fixtures.replay import REPLAY_CLOCK

pytestmark = pytest.mark.benchmark(timer=REPLAY_CLOCK)

def test_first(replay, benchmark):
    replay([0.25, 0.5])
    assert benchmark.stats is None

def test_second(replay, benchmark):
    replay([0.125])
    assert benchmark.stats is None
"""


def test_a_benchmark_that_does_not_time_takes_no_rounds(pytester: pytest.Pytester) -> None:
    """pytest-benchmark is disabled under ``-n``; the rounds then stand in the case's own record alone."""
    pytester.makepyfile(REPLAYED)
    result = pytester.runpytest_inprocess("-p", "fixtures.replay", "--benchmark-disable")
    result.assert_outcomes(passed=2)


# What the cards are --------------------------------------------------------------------------------------------------

STAND_IN = """
class Properties:
    def __init__(self, **figures):
        self.__dict__.update(figures)

CARDS = [Properties(**each) for each in {cards}]

class cuda:
    device_count = staticmethod(lambda: len(CARDS))
    get_device_properties = staticmethod(lambda number: CARDS[number])
"""


@pytest.fixture
def ask_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[Accelerator, ...]]:
    """``ask_torch(source)``: `machine.accelerators` where this is the source of the module ``torch``."""
    monkeypatch.setattr(machine, "why_no_cuda", lambda: None)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def ask(source: str) -> tuple[Accelerator, ...]:
        (tmp_path / "torch.py").write_text(source)
        return machine.accelerators.__wrapped__()

    return ask


def test_a_child_tells_name_memory_capability_and_uuid(
    ask_torch: Callable[[str], tuple[Accelerator, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    common = {"name": "Invented", "total_memory": 85_899_345_920, "major": 9, "minor": 0}
    invented = [
        {**common, "uuid": "0000-1111"},  # as torch writes it
        {**common, "uuid": "MIG-2222-3333", "minor": 1},
        {**common, "name": "Old"},  # before torch 2.6 knew UUIDs
    ]
    assert ask_torch(STAND_IN.format(cards=invented)) == (
        Accelerator("Invented", 85_899_345_920, (9, 0), "GPU-0000-1111"),
        Accelerator("Invented", 85_899_345_920, (9, 1), "MIG-2222-3333"),
        Accelerator("Old", 85_899_345_920, (9, 0), None),
    )
    assert "torch" not in sys.modules  # this process stays without it, and so without a CUDA context


def test_a_torch_that_fails_is_one_line(ask_torch: Callable[[str], tuple[Accelerator, ...]]) -> None:
    with pytest.raises(GaugeError) as caught:
        ask_torch("raise RuntimeError('the driver\\nwent away')")
    assert str(caught.value).startswith("torch cannot read the CUDA devices here: went away; ")


def test_a_child_that_dies_without_a_word_is_one_line(
    ask_torch: Callable[[str], tuple[Accelerator, ...]],
) -> None:
    with pytest.raises(GaugeError, match="torch cannot read the CUDA devices here: no message; "):
        ask_torch("import os; os._exit(3)")


def test_no_child_is_asked_where_there_is_no_cuda(
    ask_torch: Callable[[str], tuple[Accelerator, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "why_no_cuda", lambda: "no CUDA device: none")
    assert ask_torch("raise RuntimeError('asked')") == ()
