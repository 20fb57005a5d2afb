"""The stand-in for a CUDA device against what a device does, each time in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from peft_gauge import isolation
from tests.support import fake_cuda
from tests.support.fake_cuda import CONTEXT_BYTES, GIB, MIB, NAME, UUID

LIMIT_SECONDS = 120.0

Seen = Mapping[str, Any]


def on_the_card(folder: Path, *functions: str) -> Seen:
    """What functions of `fake_cuda_children` return, called in turn in one process on a GPU of 3 GiB, of which
    another process has one."""
    outcome = isolation.run(
        "tests.support.fake_cuda_children:several",
        functions,
        limit_seconds=LIMIT_SECONDS,
        environment=fake_cuda.settings(folder, total_bytes=3 * GIB, others_bytes=GIB),
    )
    assert outcome.ended == "done", outcome.reason
    return dict(outcome.value)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """By function; the last one breaks the device."""
    return on_the_card(
        tmp_path_factory.mktemp("GPU"),
        "tell_about_the_card",
        "place_tensors",
        "time_by_events",
        "go_backward",
        "quantize_on_the_card",
        "fork_after_use",
        "break_the_device",
    )


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """By function; the first one begins before CUDA is in use."""
    return on_the_card(tmp_path_factory.mktemp("counted"), "read_the_driver", "count_memory", "run_out_of_memory")


def test_the_card_is_there_and_comes_into_use_when_asked(seen: Seen) -> None:
    found = seen["tell_about_the_card"]
    assert (found["available"], found["count"], found["name"]) == (True, 1, NAME)
    assert found["in_use"] == [False, False, True]
    assert found["stats_before"] == [{}]
    assert found["total_bytes"] == 3 * GIB
    assert found["free"] == [2 * GIB - CONTEXT_BYTES, 3 * GIB]
    assert found["uuid"] == UUID
    assert found["bf16"]
    assert found["streams"] == [True, False, True]
    assert "invalid device ordinal" in found["other_card"]
    # What is not there fails by its name, and is not passed over.
    assert "_cuda_cudaCachingAllocator_raw_alloc" in found["unknown"]
    assert found["graph"].startswith(
        "AssertionError: torch._C._CUDAGraph is not among what tests.support.fake_cuda stands in"
    )


def test_tensors_are_where_they_were_asked_for(seen: Seen) -> None:
    found = seen["place_tensors"]
    on_host = {"cpu", "to cpu", "host", "pinned host"}
    assert found["devices"] == {name: "cpu" if name in on_host else "cuda:0" for name in found["devices"]}
    # transformers asks so whether it builds without memory, and then computes the buffers that no file holds.
    assert found["in a context of meta"] == ["meta", "cuda:0", "cpu"]
    assert found["is_cuda"] == [True, False, 0, False, -1]
    assert found["same"]
    assert found["not the same"]
    assert found["values"] == [1.0, 1.0, 1.0]
    assert found["mixed"].startswith("RuntimeError: Expected all tensors to be on the same device")
    assert found["mixed product"].startswith("RuntimeError: Expected all tensors to be on the same device")
    assert found["numpy"].startswith("TypeError: can't convert cuda:0 device type tensor to numpy")
    assert found["host numpy"] == "nothing"
    assert found["other thread"] == ["cuda:0"] * 3
    assert found["copied"] == "cpu"


def test_memory_is_counted_as_torch_counts_it(counted: Seen) -> None:
    found = counted["count_memory"]
    assert found["start"] == 0
    assert found["held"] == [3 * MIB, 20 * MIB]
    assert found["view"] == 3 * MIB, "a view keeps its storage"
    assert found["given"] == [0, 3 * MIB, 20 * MIB]
    assert found["peak"] == 0
    assert found["emptied"] == 0
    assert found["split"] == [2 * MIB - 512, 4]
    assert found["trace"] == [
        ["segment_alloc", 20 * MIB],
        ["alloc", 4 * MIB],
        ["free_requested", 4 * MIB],
        ["free_completed", 4 * MIB],
    ]
    assert sorted(found["segments"]) == [[2 * MIB, "small"], [20 * MIB, "large"]]


def test_a_full_card_raises_torchs_error(counted: Seen) -> None:
    found = counted["run_out_of_memory"]
    assert found["pieces"] == 4
    assert found["told"].startswith(
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 32.00 MiB. GPU 0 has a total capacity of 3.00 GiB"
    )
    assert found["ooms"] == 1
    assert found["after"] == [0, "OutOfMemoryError"]
    assert found["again"] == "nothing"


def test_events_want_to_be_waited_for(seen: Seen) -> None:
    found = seen["time_by_events"]
    assert found["unrecorded"] == "ValueError: Both events must be recorded before calculating elapsed time."
    assert found["early"] == "RuntimeError: CUDA error: device not ready"
    assert 20 <= found["milliseconds"] <= found["milliseconds by the host"]
    assert found["untimed"] == "ValueError: Both events must be created with argument 'enable_timing=True'."
    assert found["waited for by a value"] == [False, True]


def test_backward_runs_in_a_thread_without_frames_and_with_the_callers_modes(seen: Seen) -> None:
    found = seen["go_backward"]
    assert found["dispatched"] > 5
    assert found["own thread"]
    assert found["frames"] == []
    assert found["devices"] == ["cuda:0"] * 3
    assert found["equal"]
    assert found["failing"] == "ValueError: in the device's thread"
    assert found["by grad"] == ["cuda:0", [3.0, 3.0]]
    assert found["reentrant"] == [2.0, 2.0]
    assert found["modes left"] == 1


def test_a_device_side_assert_shows_late_and_for_good(seen: Seen) -> None:
    found = seen["break_the_device"]
    assert found["shape"] == [1, 8]
    assert found["synchronize"].endswith("CUDA error: device-side assert triggered")
    assert found["later"] == found["synchronize"]
    assert found["stats"]


def test_cuda_cannot_be_used_after_a_fork(seen: Seen) -> None:
    child = seen["fork_after_use"]["child"]
    assert child.startswith("False")
    assert "Cannot re-initialize CUDA in forked subprocess" in child


def test_bitsandbytes_packs_on_the_card(seen: Seen) -> None:
    found = seen["quantize_on_the_card"]
    assert found["weight"] == ["cuda:0", "torch.uint8", 64 * 64 // 2]
    assert found["absmax"] == found["result"] == found["gradient"] == "cuda:0"
    assert found["available"]


def test_the_driver_tells_what_the_allocator_holds(counted: Seen) -> None:
    found = counted["read_the_driver"]
    unavailable, before, in_use, after = found["readings"]
    assert unavailable is None
    assert before["device_bytes"] == GIB
    assert before["process_bytes"] is None
    assert in_use["process_bytes"] == after["process_bytes"] == CONTEXT_BYTES + 2 * MIB
    assert after["device_bytes"] == GIB + CONTEXT_BYTES + 2 * MIB
    assert after["other_processes"] == 1
    assert found["state"]["slowdowns"] == []
