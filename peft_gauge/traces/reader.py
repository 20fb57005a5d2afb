"""Reading traces of the CUDA caching allocator: torch's memory snapshots, or this project's compact files.

A snapshot (``torch.cuda.memory._dump_snapshot``) is a pickle of dictionaries, lists, tuples, strings and numbers.
Loading a pickle can run code, so this reader accepts only these plain values and rejects everything else.


The compact file is JSON, usually gzipped::

    {"config": {"model": …, "method": …, …},       the trained case; also under "settings"
     "stacks": [["torch/nn/functional.py:1443:dropout", …], …],          innermost frame first
     "events": [["alloc", id, bytes, index into stacks], ["free_completed", id, bytes, -1], …],
     "phases": [[index into events, "forward"], …],                      start of each phase; optional
     "blocks": [[id, requested bytes, bytes of the block], …],           blocks in use at the end; optional
     "segments": [[id, bytes, pool, bytes in use], …]}                   at the end, if there are no blocks

If ``phases`` is missing, phases are read from marks (an allocation of 170,496 + 512 × n bytes that is freed at once),
otherwise from the stacks.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from peft_gauge.errors import GaugeError, one_line
from peft_gauge.memory.categories import OUTSIDE
from peft_gauge.memory.ledger import rounded
from peft_gauge.traces.log import BEFORE, Allocation, Event, StepLog
from peft_gauge.traces.phases import with_phases
from peft_gauge.traces.recording import ALLOC, FREES, HOW_TO_RECORD, Recording
from peft_gauge.traces.sites import site_of
from peft_gauge.traces.snapshot import from_pickle

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_JSON_BYTES = 1 << 30
"""A compact file that unpacks to more is rejected; a step of a 70B model takes about ten million bytes."""


def read(path: Path, device: int | None = None) -> Recording:
    """The recording of ``device`` in ``path``; ``None`` means the only device with a history.

    Raises `GaugeError` for a file that is missing, truncated, not an allocator trace, without a history, or would run
    code when loaded; also for a device that is not in the file.
    """
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with contextlib.closing(_opened(path, packed)) as stream:
            first = stream.read(1)
            stream.seek(0)
            if first == b"{":
                return _from_json(path, stream, device)
            if first == b"\x80":
                return from_pickle(path, stream, device)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise GaugeError(f"{path} is cut off or damaged ({one_line(error, 80)}); copy or record it again") from error
    except OSError as error:
        raise GaugeError(f"{path} cannot be read: {error.strerror or error}") from error
    raise GaugeError(
        f"{path} is not an allocator trace: neither a snapshot of torch.cuda.memory._dump_snapshot nor peft-gauge's own"
    )


def _opened(path: Path, packed: bool) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb")) if packed else path.open("rb")


def _from_json(path: Path, stream: IO[bytes], device: int | None) -> Recording:
    text = stream.read(MOST_JSON_BYTES + 1)
    if len(text) > MOST_JSON_BYTES:
        raise GaugeError(
            f"{path} unpacks to more than {MOST_JSON_BYTES / 1e9:.1f} GB, too much for one step; record a single step"
        )
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GaugeError(f"{path} is cut off or damaged ({one_line(error, 80)}); copy or record it again") from error
    if not isinstance(record, dict) or not isinstance(record.get("events"), list) or "stacks" not in record:
        raise GaugeError(f"{path} is not an allocator trace: it has no events and stacks")
    number = record.get("device", 0)
    if device not in (None, number):
        raise GaugeError(f"{path} has no device {device}; it was recorded on device {number}")
    if not record["events"]:
        raise GaugeError(f"{path} has no history because recording was off; {HOW_TO_RECORD}")
    try:
        return _of_record(record)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise GaugeError(f"{path} is not an allocator trace: {one_line(error, 120)}") from error


def _of_record(record: Mapping[str, Any]) -> Recording:
    stacks = [tuple(map(str, stack)) for stack in record["stacks"]]
    actions = [(str(action), int(address), int(size), int(stack)) for action, address, size, stack in record["events"]]
    if any(not (action == ALLOC or action in FREES) or size < 0 for action, _, size, _ in actions):
        raise ValueError("an event is neither an allocation nor a free")
    if any(not -1 <= stack < len(stacks) for *_, stack in actions):
        raise ValueError("an event's stack is missing")
    events, phases = with_phases(actions, stacks, record.get("phases"))
    listed, segments = record.get("blocks"), record.get("segments")
    blocks = None if listed is None else {int(key): (int(asked), int(size)) for key, asked, size in listed}
    sums = None if segments is None else [(int(size), int(used)) for _, size, _, used in segments]
    settings = record.get("settings", record.get("config", {}))
    about = record.get("about", {})
    if not isinstance(settings, dict) or not isinstance(about, dict):
        raise ValueError("its settings are not an object")
    return Recording(
        events,
        stacks,
        phases,
        blocks,
        None if sums is None or blocks is not None else sum(used for _, used in sums),
        tuple(size for size, used in sums or () if size == used),
        settings,
        about,
    )


def step_log(recording: Recording, number: int | None = None) -> StepLog:
    """The log of step ``number`` (from 1) of ``recording``, by default the last.

    Memory from before the step is found in three ways: allocations by earlier events, frees without an allocation, and
    blocks in use at the end without an allocation. Raises `GaugeError` if there is no such step.
    """
    steps = recording.steps()
    if number is not None and not 1 <= number <= len(steps):
        raise GaugeError(f"the trace has {len(steps)} step{'s' if len(steps) > 1 else ''} but no step {number}")
    start, stop = steps[-1 if number is None else number - 1]
    allocations: list[Allocation] = []
    events: list[Event] = []
    alive: dict[int, int] = {}  # address -> index of its allocation

    def made(sizes: int, born: int, phase: str, stack: int) -> int:
        frames = recording.stacks[stack] if stack >= 0 else ()
        allocations.append(Allocation(rounded(sizes), born, None, phase, site_of(frames), frames))
        return len(allocations) - 1

    earlier: dict[int, tuple[int, int]] = {}
    for sign, address, size, stack in recording.events[:start]:
        if sign > 0:
            earlier[address] = (size, stack)
        else:
            earlier.pop(address, None)
    for address, (size, stack) in earlier.items():
        alive[address] = made(size, BEFORE, OUTSIDE, stack)
    for position in range(start, stop):
        sign, address, size, stack = recording.events[position]
        phase = recording.phases[position]
        if sign > 0:
            index = alive[address] = made(size, len(events), phase, stack)
        elif address in alive:
            index = alive.pop(address)
            allocations[index].died = len(events)
        else:  # allocated before the recording began
            index = made(size, BEFORE, OUTSIDE, -1)
            allocations[index].died = len(events)
        events.append(Event(sign, index, phase))
    for sign, address, size, _ in recording.events[stop:]:
        if sign < 0 and alive.pop(address, None) is None:
            made(size, BEFORE, OUTSIDE, -1)
        elif sign > 0:
            alive[address] = -1
    unlisted, unsplit = _at_the_end(recording, alive, allocations, made)
    return StepLog(allocations, events, unlisted, unsplit, recording.full_segments)


def _at_the_end(
    recording: Recording, alive: Mapping[int, int], allocations: Sequence[Allocation], made: Any
) -> tuple[int | None, int | None]:
    """Add blocks that are in use at the end but have no allocation event.

    Return the bytes in use that are known only as a sum, and the sizes of blocks minus their requests.
    """
    if recording.blocks is not None:
        for address, (asked, _) in recording.blocks.items():
            if address not in alive:
                made(asked, BEFORE, OUTSIDE, -1)
        return 0, sum(size - rounded(asked) for asked, size in recording.blocks.values())
    if recording.in_use_bytes is None:
        return None, None
    seen = sum(allocations[index].nbytes for index in alive.values() if index >= 0)
    later = recording.events
    seen += sum(rounded(size) for size in _alive_sizes(later, alive))
    return recording.in_use_bytes - seen, None


def _alive_sizes(events: Sequence[tuple[int, int, int, int]], alive: Mapping[int, int]) -> Iterator[int]:
    """Sizes of allocations after the step that are live at the end (-1 in ``alive``)."""
    last = {address: size for sign, address, size, _ in events if sign > 0}
    return (last[address] for address, index in alive.items() if index < 0)
