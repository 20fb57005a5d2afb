"""Snapshots in the real format, written here by hand, and every way in which one can be unusable."""

from __future__ import annotations

import gzip
import json
import pickle
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from peft_gauge.errors import GaugeError
from peft_gauge.memory.categories import BACKWARD, FORWARD, OPTIMIZER, OUTSIDE
from peft_gauge.traces.log import BEFORE, StepLog
from peft_gauge.traces.phases import MARK_BYTES
from peft_gauge.traces.reader import read, step_log
from peft_gauge.traces.sites import shortened, site_here, site_of
from tests.support import paths
from tests.support.snapshots import ADAM, EMBEDDING, GRADS, LINEAR, Device, one_step, snapshot

if TYPE_CHECKING:
    from peft_gauge.traces.recording import Recording

TRACES = paths.DATA / "h200_traces"
MIB = 1 << 20
Write = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path) -> Write:
    def write(value: object, name: str = "dump.pickle") -> Path:
        path = tmp_path / name
        path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value))
        return path

    return write


def lives(log: StepLog) -> list[tuple[int, str, str, bool]]:
    """(bytes, phase, site, whether it was there before) of each allocation."""
    return [(each.nbytes, each.phase, each.site, each.born == BEFORE) for each in log.allocations]


# What is read --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_a_snapshot_is_one_step_with_its_phases(written: Write, packed: bool) -> None:
    device = one_step(Device())
    blocks = [[device.block(0x1000, 100, 512), device.block(0x9000, 7000, 8192), device.block(0, 0, 99, "inactive")]]
    raw = pickle.dumps(snapshot(device, blocks=blocks))
    recording = read(written(gzip.compress(raw) if packed else raw))
    assert recording.phases == [OUTSIDE] + [FORWARD] * 3 + [BACKWARD] * 4 + [OPTIMIZER] * 3
    log = step_log(recording)
    assert lives(log) == [
        (512, OUTSIDE, "accelerate/utils/operations.py:send_to_device", True),
        (2048, FORWARD, "torch/nn/functional.py:embedding", False),
        (3072, FORWARD, "torch/nn/modules/linear.py:forward", False),
        (512, BACKWARD, "torch/autograd/__init__.py:_make_grads", False),
        (5120, BACKWARD, "", False),
        (6144, OPTIMIZER, "torch/optim/adam.py:_multi_tensor_adam", False),
        (7168, OUTSIDE, "", True),  # in use at the end, never made in the trace
    ]
    assert [(part.phase, part.start, part.stop) for part in log.segments] == [
        (FORWARD, 0, 3),
        (BACKWARD, 3, 7),
        (OPTIMIZER, 7, 10),
    ]
    assert log.before_bytes == 512 + 7168
    assert log.curve[:3] == [9728, 12_800, 10_752]
    assert log.bytes_at(log.peak()) == 512 + 7168 + 5120 + 6144
    assert log.unsplit_bytes == 8192 - 7168
    assert log.allocations[1].stack == (
        "torch/nn/functional.py:2567:embedding",
        "torch/nn/modules/module.py:1790:_call_impl",
    )


def test_of_several_steps_the_last_or_the_one_asked_for(written: Write) -> None:
    device = one_step(one_step(Device()), 0x10000)
    device.take(0x7000, 70_000, EMBEDDING)
    recording = read(written(snapshot(device)))
    assert len(recording.steps()) == 3
    assert [each.nbytes for each in step_log(recording).allocations if each.born != BEFORE] == [70_144]
    first, second = step_log(recording, 1), step_log(recording, 2)
    assert first.before_bytes == 512
    assert second.before_bytes == 2 * 512  # the first step's inputs were never freed
    assert [each.nbytes for each in second.allocations if each.born != BEFORE] == [2048, 3072, 512, 5120, 6144]
    with pytest.raises(GaugeError, match="the trace has 3 steps but no step 4"):
        step_log(recording, 4)


def test_a_second_micro_batch_begins_where_the_first_began(written: Write) -> None:
    device = Device()
    for _ in range(2):
        device.take(0x2000, 2000, EMBEDDING)
        device.take(0x3000, 3000, LINEAR)
        device.take(0x4000, 4, GRADS)
        device.take(0x8000, 800, LINEAR)  # a checkpointed layer's second forward, in backward
        for address, size in ((0x8000, 800), (0x4000, 4), (0x3000, 3000), (0x2000, 2000)):
            device.give(address, size)
    device.take(0x6000, 6000, ADAM)
    log = step_log(read(written(snapshot(device))))
    assert [(part.phase, part.stop - part.start) for part in log.segments] == [
        (FORWARD, 2),
        (BACKWARD, 6),
        (FORWARD, 2),
        (BACKWARD, 6),
        (OPTIMIZER, 1),
    ]


def test_what_is_freed_without_having_been_made_was_there_before(written: Write) -> None:
    device = Device()
    device.take(0x2000, 2000, EMBEDDING)
    device.give(0x9000, 9000)
    device.take(0x9000, 900, EMBEDDING)
    log = step_log(read(written(snapshot(device))))
    assert [(each.nbytes, each.born, each.died) for each in log.allocations] == [
        (2048, 0, None),
        (9216, BEFORE, 1),
        (1024, 2, None),
    ]
    assert log.before_bytes == 9216


def test_a_trace_without_stacks_has_no_phases_and_is_one_step(written: Write) -> None:
    device = Device()
    device.take(0x1000, 1000)
    device.take(0x2000, 2000)
    recording = read(written(snapshot(device)))
    assert recording.phases == [OUTSIDE, OUTSIDE]
    assert len(step_log(recording).events) == 2


def test_the_device_with_a_history_is_read_and_else_the_one_asked_for(written: Write) -> None:
    idle, busy, other = Device(), one_step(Device()), Device(base=0x7E0000000000)
    other.take(0x1000, 12_345, EMBEDDING)
    path = written(snapshot(idle, busy))
    assert len(read(path).events) == 11
    both = written(snapshot(idle, busy, other))
    assert read(both, 2).events[0][2] == 12_345
    with pytest.raises(GaugeError, match="has histories of devices 1, 2; choose one with --device"):
        read(both)
    with pytest.raises(GaugeError, match="has no history of device 0; use --device 1 or 2"):
        read(both, 0)
    with pytest.raises(GaugeError, match="has no device 3; it was recorded with devices 0 to 2"):
        read(both, 3)


def test_blocks_of_other_devices_are_not_this_ones(written: Write) -> None:
    first, second = one_step(Device()), one_step(Device())
    blocks = [[first.block(0x1000, 100, 512)], [second.block(0x1000, 100, 512), second.block(0x9000, 900, 1024)]]
    path = written(snapshot(first, second, blocks=blocks))
    assert step_log(read(path, 0)).before_bytes == 512
    assert step_log(read(path, 1)).before_bytes == 512 + 1024


@cache
def recorded(path: Path) -> tuple[Recording, StepLog]:
    """A real trace, and its step."""
    recording = read(path)
    return recording, step_log(recording)


@pytest.mark.parametrize("path", sorted(TRACES.glob("*.json.gz")), ids=lambda path: path.name.partition(".")[0])
def test_real_traces_are_one_step_of_forward_backward_and_update(path: Path) -> None:
    recording, log = recorded(path)
    assert len(recording.steps()) == 1
    phases = [part.phase for part in log.segments if part.phase != OUTSIDE]
    micro_batches = recording.settings.get("accum", 1)
    assert phases == [FORWARD, BACKWARD] * micro_batches + [OPTIMIZER]
    # What is there before is there after: a step leaves nothing behind but what it replaces (inputs, losses).
    assert abs(log.curve[-1] - log.before_bytes) < 200_000
    assert not any(each.site.endswith(":mark") for each in log.allocations)
    assert all(BEFORE <= each.born < (len(log.events) if each.died is None else each.died) for each in log.allocations)


REPEATED = {"lora", "lora-autocast", "qlora", "qlora-autocast", "qlora-unprepared-autocast", "full-float32-autocast"}
"""Of the marked traces those that show what others show, too: these are slow, and run every week."""
MARKED = [
    pytest.param(path, id=name, marks=pytest.mark.slow if name in REPEATED else ())
    for path in sorted(TRACES.glob("*.json.gz"))
    if "trainer" not in (name := path.name.partition(".")[0]) and "sft" not in name  # those could not be marked
]


@pytest.mark.parametrize("path", MARKED)
def test_phases_told_from_stacks_are_those_that_were_marked(written: Write, path: Path) -> None:
    record = json.loads(gzip.decompress(path.read_bytes()))
    marks = {number for number, stack in enumerate(record["stacks"]) if stack and stack[0].endswith(":mark")}
    events, bare = record["events"], []
    for number, event in enumerate(events):
        ends_a_mark = number > 0 and events[number - 1][3] in marks and event[0] == "free_completed"
        if event[3] not in marks and not ends_a_mark:
            bare.append(event)
    assert len(events) - len(bare) == 2 * 6
    marked = recorded(path)[1]
    told = step_log(read(written(json.dumps({**record, "events": bare}).encode())))

    def births(log: StepLog) -> list[tuple[int, str]]:
        return [(log.allocations[event.allocation].nbytes, event.phase) for event in log.events if event.sign > 0]

    assert births(told) == births(marked)
    assert told.before_bytes == marked.before_bytes


def test_marks_end_a_phase_and_are_none_of_the_steps_allocations(written: Write) -> None:
    mark = ["own.py:1:mark"]
    events = [
        ["alloc", 1, MARK_BYTES, 0], ["free_completed", 1, MARK_BYTES, -1],
        ["alloc", 1, MARK_BYTES + 512, 0], ["free_completed", 1, MARK_BYTES + 512, -1],
        ["alloc", 1, 100, 1],
        ["alloc", 2, MARK_BYTES + 1024, 0], ["free_completed", 2, MARK_BYTES + 1024, -1],
        ["alloc", 2, MARK_BYTES, 1], ["free_completed", 2, MARK_BYTES, -1],  # a tensor of that size: another function
        ["free_completed", 1, 100, -1],
    ]  # fmt: skip
    record = {"stacks": [mark, ["own.py:9:work"]], "events": events}
    log = step_log(read(written(json.dumps(record).encode())))
    assert [(event.sign, event.phase) for event in log.events] == [
        (1, FORWARD),
        (1, BACKWARD),
        (-1, BACKWARD),
        (-1, BACKWARD),
    ]
    assert log.unlisted_before_bytes is None  # neither blocks nor segments: nobody knows


# What is refused -----------------------------------------------------------------------------------------------------


class Malicious:
    """A pickle of it would run a command where it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_something_is_refused(written: Write, tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "ran"
    value = snapshot(one_step(Device()))
    value["allocator_settings"] = Malicious(marker)
    path = written(pickle.dumps(value, protocol=protocol))
    with pytest.raises(GaugeError, match="is rejected: it would load .*; a memory snapshot has plain values only"):
        read(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())  # the pickle does what it is meant to
    assert marker.exists()


def test_even_a_harmless_class_is_refused(written: Write) -> None:
    with pytest.raises(GaugeError, match="it would load collections.OrderedDict"):
        read(written({"device_traces": __import__("collections").OrderedDict()}))


WHOLE = pickle.dumps(snapshot(one_step(Device())))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"", "is not an allocator trace"),
        (b"hello", "is not an allocator trace: neither a snapshot of torch.cuda.memory._dump_snapshot nor"),
        (WHOLE[: len(WHOLE) // 2], "is cut off or damaged"),
        (gzip.compress(WHOLE)[:-200], "is cut off or damaged"),
        (b"\x1f\x8bnot gzip", "is cut off or damaged"),
        (b'{"events": [', "is cut off or damaged"),
        (b'{"claims": []}', "is not an allocator trace: it has no events and stacks"),
        (b'{"events": [["alloc", 1, 2, 5]], "stacks": []}', "an event's stack is missing"),
        (b'{"events": [["oom", 1, 2, -1]], "stacks": []}', "neither an allocation nor a free"),
        (b'{"events": [["alloc", "x", 2, -1]], "stacks": []}', "is not an allocator trace: invalid literal"),
        (b'{"events": [], "stacks": []}', "has no history because recording was off"),
        ([1, 2], "is not a memory snapshot: it has no device_traces"),
        ({"segments": []}, "is not a memory snapshot: it has no device_traces"),
        ({"device_traces": [3]}, "is not a memory snapshot: it has no device_traces"),
        ({"segments": [], "device_traces": []}, "has no history because recording was off"),
        (
            {"segments": [], "device_traces": [[], []]},
            "has no history because recording was off; call torch.cuda.memory._rec",
        ),
        ({"segments": [], "device_traces": [[{"action": "alloc"}]]}, "event 0 is not a valid allocator event: 'addr'"),
        ({"segments": [], "device_traces": [["x"]]}, "event 0 is not a valid allocator event"),
        ({"segments": [{}], "device_traces": [one_step(Device()).trace]}, "its segments are invalid"),
    ],
)
def test_what_is_no_trace_is_one_line(written: Write, value: object, message: str) -> None:
    with pytest.raises(GaugeError, match=re.escape(message)) as caught:
        read(written(value))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(GaugeError, match="cannot be read: No such file"):
        read(tmp_path / "none.pickle")
    with pytest.raises(GaugeError, match="cannot be read: Is a directory"):
        read(tmp_path)


def test_a_snapshot_beyond_the_free_memory_is_not_begun(written: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(snapshot(one_step(Device())))
    monkeypatch.setattr("peft_gauge.traces.snapshot.TIMES_IN_MEMORY", 10**12)
    with pytest.raises(GaugeError, match="GB are free; record fewer events"):
        read(path)


# Sites ---------------------------------------------------------------------------------------------------------------


def test_a_path_begins_at_its_package() -> None:
    assert shortened("/opt/env/lib/python3.12/site-packages/torch/nn/functional.py") == "torch/nn/functional.py"
    assert shortened("/home/me/peft_gauge/peft_gauge/training/step.py") == "peft_gauge/training/step.py"
    assert shortened("/home/me/secret/project/train.py") == "project/train.py"
    assert site_of(["torch/nn/functional.py:1443:dropout", "x.py:1:f"]) == "torch/nn/functional.py:dropout"
    assert site_of([]) == ""


def test_running_code_has_the_site_that_its_stack_would_have() -> None:
    import sys

    assert (
        site_here(sys._getframe()) == "traces/test_reader.py:test_running_code_has_the_site_that_its_stack_would_have"
    )
