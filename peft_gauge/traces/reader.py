"""Read a log of CUDA's caching allocator: a snapshot of torch's, or the compact file that this project records.

A snapshot (``torch.cuda.memory._dump_snapshot``) is a pickle of dictionaries, lists, tuples, texts and numbers. Pickles
from elsewhere can run code when they are loaded; this reader takes those plain values alone and refuses anything else.

The compact file is JSON, as a rule gzipped::

    {"config": {"model": …, "method": …, …},       what was trained; also under "settings"
     "stacks": [["torch/nn/functional.py:1443:dropout", …], …],          innermost frame first
     "events": [["alloc", id, bytes, index into stacks], ["free_completed", id, bytes, -1], …],
     "phases": [[index into events, "forward"], …],                      where a phase begins; optional
     "blocks": [[id, bytes asked for, bytes of the block], …],           what is in use at the end; optional
     "segments": [[id, bytes, pool, bytes in use], …]}                   likewise, where blocks are not told

Without ``phases`` they are told from marks (an allocation of 170,496 + 512 × n bytes that is freed at once), else from
the stacks.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import pickle
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from peft_gauge.errors import GaugeError, one_line
from peft_gauge.memory.tracker import BACKWARD, FORWARD, OPTIMIZER, OUTSIDE, rounded
from peft_gauge.traces.log import BEFORE, Allocation, Event, StepLog
from peft_gauge.traces.sites import frame_text, site_of

if TYPE_CHECKING:
    from collections.abc import Iterator

MARK_BYTES = 333 * 512
"""Of a mark, plus 512 for each number: a size that no tensor of a transformer has by its shape."""
MARKS = (OUTSIDE, FORWARD, BACKWARD, OPTIMIZER, OUTSIDE, OUTSIDE)
"""The phase that begins with the mark of each number."""
MARK_FUNCTION = "mark"

MOST_JSON_BYTES = 1 << 30
"""A compact file that unpacks to more is refused: a step of a 70B model takes some ten million bytes."""
TIMES_IN_MEMORY = 10
"""What the values of a pickle take in memory, over its size: 9 for 300,000 events whose stacks are shared."""

ALLOC = "alloc"
FREES = ("free_requested", "free_completed")

HOW_TO_RECORD = (
    "call torch.cuda.memory._record_memory_history() before the step and _dump_snapshot(FILE) after it, "
    "or let the suite record it: pytest -m gpu"
)


@dataclass
class Recording:
    """What a file holds of one device.

    ``events``: (sign, address, bytes asked for, index into ``stacks`` or -1), in order of time; of the two events of
    a free, the request and its completion, the first. ``phases``: the phase of each event. ``blocks``: address ->
    (bytes asked for, bytes of the block) of what was in use at the end, ``None`` where only sums are known:
    ``in_use_bytes``. ``settings``: what was trained, where the file says so; ``about``: card, versions and the like.
    """

    events: list[tuple[int, int, int, int]]
    stacks: list[tuple[str, ...]]
    phases: list[str]
    blocks: dict[int, tuple[int, int]] | None
    in_use_bytes: int | None
    full_segments: tuple[int, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def steps(self) -> list[tuple[int, int]]:
        """(start, stop) of each step in the events: from its first forward to the next step's."""
        starts, updated = [], True
        for position, phase in enumerate(self.phases):
            if phase == FORWARD and updated:
                starts.append(position)
                updated = False
            updated = updated or phase == OPTIMIZER
        if not starts:
            return [(0, len(self.events))]
        return list(zip(starts, [*starts[1:], len(self.events)], strict=True))


def read(path: Path, device: int | None = None) -> Recording:
    """What ``path`` recorded of ``device``; ``None`` takes the only device with a history.

    Raises `GaugeError` for a file that is missing, cut off, no allocator trace, without a history, or that would run
    code; and for a device that it does not have.
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
                return _from_pickle(path, stream, device)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise GaugeError(f"{path} is cut off or damaged ({one_line(error, 80)}); copy or record it again") from error
    except OSError as error:
        raise GaugeError(f"{path} cannot be read: {error.strerror or error}") from error
    raise GaugeError(
        f"{path} is not an allocator trace: neither a snapshot of torch.cuda.memory._dump_snapshot nor peft-gauge's own"
    )


def _opened(path: Path, packed: bool) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb")) if packed else path.open("rb")


# --- torch's snapshot ---------------------------------------------------------------------------------------


class _Refused(Exception):
    """A pickle asked for something that is no plain value."""


class _PlainUnpickler(pickle.Unpickler):
    """Containers, texts and numbers; whatever would import or call something is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("a persistent object")


def _from_pickle(path: Path, stream: IO[bytes], device: int | None) -> Recording:
    _check_memory(path)
    try:
        snapshot = _PlainUnpickler(stream).load()
    except _Refused as error:
        raise GaugeError(
            f"{path} is refused: it would load {one_line(error, 80)}; a memory snapshot holds plain values only"
        ) from error
    except (EOFError, pickle.UnpicklingError) as error:
        raise GaugeError(f"{path} is cut off or damaged ({one_line(error, 80)}); copy or record it again") from error
    except Exception as error:  # a made-up pickle can fail in every way there is
        raise GaugeError(f"{path} cannot be read as a pickle: {one_line(error, 120)}") from error
    return of_snapshot(path, snapshot, device)


def of_snapshot(path: Path | str, snapshot: Any, device: int | None = None) -> Recording:
    """What ``snapshot`` (as ``torch.cuda.memory._snapshot`` returns it) has of ``device``; it is used up. ``path`` is
    its name in messages. Raises `GaugeError` as `read` does."""
    traces = snapshot.get("device_traces") if isinstance(snapshot, dict) else None
    if not isinstance(traces, list) or not all(isinstance(trace, list) for trace in traces):
        raise GaugeError(
            f"{path} is not a memory snapshot: it has no device_traces; write one with torch.cuda.memory._dump_snapshot"
        )
    number = _device(path, [len(trace) for trace in traces], device)
    trace, traces[:] = traces[number], []  # the other devices' events, and below this one's, can go
    stacks = _Stacks()
    actions = list(_entries(path, trace, stacks))
    trace.clear()
    blocks, full = _blocks(path, snapshot.get("segments", []), number)
    events, phases = _with_phases(actions, stacks.found)
    return Recording(events, stacks.found, phases, blocks, None, full, about={"device": number})


def _check_memory(path: Path) -> None:
    import psutil

    needed, free = TIMES_IN_MEMORY * path.stat().st_size, psutil.virtual_memory().available
    if needed > free:
        raise GaugeError(
            f"{path} may need {needed / 1e9:.1f} GB of memory to be read, and {free / 1e9:.1f} GB are free; "
            "record fewer events (max_entries) or only one step"
        )


def _device(path: Path | str, lengths: Sequence[int], asked: int | None) -> int:
    """The index of the trace to read, by the number of events of each device."""
    recorded = [index for index, length in enumerate(lengths) if length]
    if asked is not None and not 0 <= asked < len(lengths):
        there = f"devices 0 to {len(lengths) - 1}" if len(lengths) > 1 else f"{len(lengths) or 'no'} device"
        raise GaugeError(f"{path} has no device {asked}; it was recorded with {there}")
    if not recorded:
        raise GaugeError(f"{path} holds no history: recording was off; {HOW_TO_RECORD}")
    if asked is None and len(recorded) > 1:
        raise GaugeError(f"{path} has histories of devices {', '.join(map(str, recorded))}; choose with --device")
    if asked is not None and asked not in recorded:
        raise GaugeError(f"{path} has no history of device {asked}, but of {', '.join(map(str, recorded))}")
    return recorded[0] if asked is None else asked


class _Stacks:
    """Stacks by their index, each kept once. The frames of many events are one list: it is looked at once."""

    def __init__(self) -> None:
        self.found: list[tuple[str, ...]] = []
        self._by_text: dict[tuple[str, ...], int] = {}
        self._by_list: dict[int, int] = {}
        self._held: list[Any] = []  # so that no list gets the address of another

    def index(self, frames: Sequence[Mapping[str, Any]]) -> int:
        known = self._by_list.get(id(frames))
        if known is None:
            text = tuple(
                frame_text(str(frame["filename"]), int(frame["line"]), str(frame["name"]))
                for frame in frames
                if str(frame["filename"]).endswith(".py")  # not those of C++
            )
            known = self._by_text.setdefault(text, len(self.found))
            if known == len(self.found):
                self.found.append(text)
            self._by_list[id(frames)] = known
            self._held.append(frames)
        return known


def _entries(path: Path | str, trace: Sequence[Any], stacks: _Stacks) -> Iterator[tuple[str, int, int, int]]:
    """(action, address, bytes, stack) of the allocations and frees of one device's trace."""
    for number, entry in enumerate(trace):
        try:
            action = entry["action"]
            if action == ALLOC:
                # "addr" since torch 2.0; an entry without frames was recorded with context=None.
                yield action, int(entry["addr"]), int(entry["size"]), stacks.index(entry.get("frames") or [])
            elif action in FREES:
                yield action, int(entry["addr"]), int(entry["size"]), -1
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise GaugeError(f"{path}: event {number} is none of the allocator's: {one_line(error, 80)}") from error


def _blocks(path: Path | str, segments: Any, device: int) -> tuple[dict[int, tuple[int, int]], tuple[int, ...]]:
    """What is in use at the end, and the sizes of segments that are in use whole."""
    blocks: dict[int, tuple[int, int]] = {}
    full = []
    try:
        for segment in segments:
            if segment.get("device", device) != device:
                continue
            address = segment["address"]
            for block in segment["blocks"]:
                address = block.get("address", address)  # the field is newer than the format
                if block["state"] == "active_allocated":
                    blocks[address] = (int(block.get("requested_size") or block["size"]), int(block["size"]))
                address += block["size"]
            if segment["total_size"] == segment.get("allocated_size"):
                full.append(int(segment["total_size"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GaugeError(f"{path}: its segments are not the allocator's: {one_line(error, 80)}") from error
    return blocks, tuple(full)


# --- the compact file ---------------------------------------------------------------------------------------


def _from_json(path: Path, stream: IO[bytes], device: int | None) -> Recording:
    text = stream.read(MOST_JSON_BYTES + 1)
    if len(text) > MOST_JSON_BYTES:
        raise GaugeError(f"{path} unpacks to more than {MOST_JSON_BYTES / 1e9:.1f} GB; that is no trace of one step")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GaugeError(f"{path} is cut off or damaged ({one_line(error, 80)}); copy or record it again") from error
    if not isinstance(record, dict) or not isinstance(record.get("events"), list) or "stacks" not in record:
        raise GaugeError(f"{path} is not an allocator trace: it has no events and stacks")
    number = record.get("device", 0)
    if device not in (None, number):
        raise GaugeError(f"{path} has no device {device}; it is of device {number}")
    if not record["events"]:
        raise GaugeError(f"{path} holds no history: recording was off; {HOW_TO_RECORD}")
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
        raise ValueError("an event's stack is not there")
    events, phases = _with_phases(actions, stacks, record.get("phases"))
    listed, segments = record.get("blocks"), record.get("segments")
    blocks = None if listed is None else {int(key): (int(asked), int(size)) for key, asked, size in listed}
    sums = None if segments is None else [(int(size), int(used)) for _, size, _, used in segments]
    settings = record.get("settings", record.get("config", {}))
    about = record.get("about", {})
    if not isinstance(settings, dict) or not isinstance(about, dict):
        raise ValueError("its settings are no object")
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


# --- phases -------------------------------------------------------------------------------------------------

Actions = Sequence[tuple[str, int, int, int]]
Signed = list[tuple[int, int, int, int]]


def _with_phases(
    actions: Actions, stacks: Sequence[tuple[str, ...]], told: Iterable[Sequence[Any]] | None = None
) -> tuple[Signed, list[str]]:
    """The events without marks and without second events of one free, and the phase of each."""
    begins = {} if told is None else {int(position): str(phase) for position, phase in told}
    marks = {} if told is not None else _marks(actions, stacks)
    teller = None if begins or marks else _Teller(stacks)
    events: Signed = []
    phases: list[str] = []
    phase = OUTSIDE
    requested, marked = set[int](), set[int]()  # addresses
    for position, (action, address, size, stack) in enumerate(actions):
        phase = begins.get(position, phase)
        if position in marks:
            phase = marks[position]
            marked.add(address)
        elif action == ALLOC:
            marked.discard(address)
            if teller is not None:
                phase = teller.phase(stack)
            if size:
                events.append((1, address, size, stack))
                phases.append(phase)
        elif address in requested:
            requested.discard(address)  # the completion of a free whose request stands in the log
        else:
            if action == "free_requested":
                requested.add(address)
            if address not in marked:
                events.append((-1, address, size, stack))
                phases.append(phase)
    return events, phases


def _marks(actions: Actions, stacks: Sequence[tuple[str, ...]]) -> dict[int, str]:
    """Position of a mark -> the phase that begins there."""
    found = {}
    for position, (action, address, size, stack) in enumerate(actions):
        number, rest = divmod(size - MARK_BYTES, 512)
        if action != ALLOC or rest or not 0 <= number < len(MARKS):
            continue
        site = site_of(stacks[stack]) if stack >= 0 else ""
        following = actions[position + 1] if position + 1 < len(actions) else ("", -1, 0, -1)
        ends_at_once = following[0] in FREES and following[1] == address
        if ends_at_once and site.rpartition(":")[2] in (MARK_FUNCTION, ""):
            found[position] = MARKS[number]
    return found if len(found) > 1 else {}


class _Teller:
    """Tells the phase of allocations from their stacks, in order.

    Autograd runs on a thread of its own, which has no Python frames but those of a recomputed (checkpointed) layer or
    of a function written in Python. A forward after that begins where the first one began: with the same stack.
    """

    def __init__(self, stacks: Sequence[tuple[str, ...]]) -> None:
        self._kinds = [_kind(stack) for stack in stacks]
        self._has_frames = any(stacks)
        self._phase = OUTSIDE
        self._first_of_forward: int | None = None

    def phase(self, stack: int) -> str:
        if not self._has_frames:
            return OUTSIDE
        kind = BACKWARD if stack < 0 else self._kinds[stack]
        if kind == FORWARD:
            if self._first_of_forward is None:
                self._first_of_forward = stack
            if self._phase != BACKWARD or stack == self._first_of_forward:
                self._phase = FORWARD
        elif kind == BACKWARD and self._first_of_forward is None:
            pass  # a thread without frames before anything ran forward
        elif kind is not None:
            self._phase = kind
        return self._phase


def _kind(stack: Sequence[str]) -> str | None:
    """What a stack says by itself; ``None`` where it says nothing."""
    if not stack:
        return BACKWARD
    functions = {frame.rpartition(":")[2] for frame in stack}
    if "backward" in functions:
        return BACKWARD
    if any(frame.startswith("torch/amp/grad_scaler.py") for frame in stack):
        return BACKWARD if "scale" in functions else OPTIMIZER  # the loss is scaled, then gradients are unscaled
    if any(frame.startswith(("torch/optim/", "bitsandbytes/optim/", "torch/nn/utils/clip_grad.py")) for frame in stack):
        return OPTIMIZER
    if "_call_impl" in functions:
        return FORWARD
    return None


# --- one step -----------------------------------------------------------------------------------------------


def step_log(recording: Recording, number: int | None = None) -> StepLog:
    """The log of one step of ``recording``: of the step ``number`` (from 1), else of the last.

    What was there before it is told from what is freed in it, from what earlier events made, and from what is in use at
    the end and was never made. Raises `GaugeError` for a step that is not there.
    """
    steps = recording.steps()
    if number is not None and not 1 <= number <= len(steps):
        raise GaugeError(f"the trace has {len(steps)} step{'s' if len(steps) > 1 else ''}, and no step {number}")
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
        else:  # made before the recording began
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
    """Adds to the allocations what is in use at the end and was never made; returns what is known by its sum alone, and
    what blocks have beyond their requests."""
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


def _alive_sizes(events: Signed, alive: Mapping[int, int]) -> Iterator[int]:
    """Sizes of what was made after the step and is alive at the end (``alive`` has -1 for it)."""
    last = {address: size for sign, address, size, _ in events if sign > 0}
    return (last[address] for address, index in alive.items() if index < 0)
