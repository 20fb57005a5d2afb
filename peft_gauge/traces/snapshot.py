"""Reading torch's memory snapshots: pickles, from which only plain values are accepted."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from peft_gauge.errors import GaugeError, one_line
from peft_gauge.traces.phases import with_phases
from peft_gauge.traces.recording import ALLOC, FREES, HOW_TO_RECORD, Recording
from peft_gauge.traces.sites import frame_text

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMES_IN_MEMORY = 10
"""Memory of a loaded pickle over its size on disk: 9 for 300,000 events with shared stacks."""


class _Refused(Exception):
    """A pickle contains something other than plain values."""


class _PlainUnpickler(pickle.Unpickler):
    """Loads containers, strings and numbers. Rejects anything that would import or call code before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("a persistent object")


def from_pickle(path: Path, stream: IO[bytes], device: int | None) -> Recording:
    _check_memory(path)
    try:
        snapshot = _PlainUnpickler(stream).load()
    except _Refused as error:
        raise GaugeError(
            f"{path} is rejected: it would load {one_line(error, 80)}; a memory snapshot has plain values only"
        ) from error
    except (EOFError, pickle.UnpicklingError) as error:
        raise GaugeError(f"{path} is cut off or damaged ({one_line(error, 80)}); copy or record it again") from error
    except Exception as error:  # an invalid pickle can raise any error
        raise GaugeError(f"{path} cannot be read as a pickle: {one_line(error, 120)}") from error
    return of_snapshot(path, snapshot, device)


def of_snapshot(path: Path | str, snapshot: Any, device: int | None = None) -> Recording:
    """The recording of ``device`` in ``snapshot``, a result of ``torch.cuda.memory._snapshot``, which is emptied to
    save memory. ``path`` is its name in messages. Raises `GaugeError` as `read` does."""
    traces = snapshot.get("device_traces") if isinstance(snapshot, dict) else None
    if not isinstance(traces, list) or not all(isinstance(trace, list) for trace in traces):
        raise GaugeError(
            f"{path} is not a memory snapshot: it has no device_traces; write one with torch.cuda.memory._dump_snapshot"
        )
    number = _device(path, [len(trace) for trace in traces], device)
    trace, traces[:] = traces[number], []  # free the events of other devices
    stacks = _Stacks()
    actions = list(_entries(path, trace, stacks))
    trace.clear()
    blocks, full = _blocks(path, snapshot.get("segments", []), number)
    events, phases = with_phases(actions, stacks.found)
    return Recording(events, stacks.found, phases, blocks, None, full, about={"device": number})


def _check_memory(path: Path) -> None:
    import psutil

    needed, free = TIMES_IN_MEMORY * path.stat().st_size, psutil.virtual_memory().available
    if needed > free:
        raise GaugeError(
            f"reading {path} may need {needed / 1e9:.1f} GB of memory, but only {free / 1e9:.1f} GB are free; "
            "record fewer events (max_entries) or only one step"
        )


def _device(path: Path | str, lengths: Sequence[int], asked: int | None) -> int:
    """The index of the trace to read, by the number of events of each device."""
    recorded = [index for index, length in enumerate(lengths) if length]
    if asked is not None and not 0 <= asked < len(lengths):
        there = f"devices 0 to {len(lengths) - 1}" if len(lengths) > 1 else f"{len(lengths) or 'no'} device"
        raise GaugeError(f"{path} has no device {asked}; it was recorded with {there}")
    if not recorded:
        raise GaugeError(f"{path} has no history because recording was off; {HOW_TO_RECORD}")
    if asked is None and len(recorded) > 1:
        raise GaugeError(f"{path} has histories of devices {', '.join(map(str, recorded))}; choose one with --device")
    if asked is not None and asked not in recorded:
        raise GaugeError(f"{path} has no history of device {asked}; use --device {' or '.join(map(str, recorded))}")
    return recorded[0] if asked is None else asked


class _Stacks:
    """Distinct stacks by index. Many events share one list of frames, which is processed once."""

    def __init__(self) -> None:
        self.found: list[tuple[str, ...]] = []
        self._by_text: dict[tuple[str, ...], int] = {}
        self._by_list: dict[int, int] = {}
        self._held: list[Any] = []  # keep lists alive, so that no two have the same id

    def index(self, frames: Sequence[Mapping[str, Any]]) -> int:
        known = self._by_list.get(id(frames))
        if known is None:
            text = tuple(
                frame_text(str(frame["filename"]), int(frame["line"]), str(frame["name"]))
                for frame in frames
                if str(frame["filename"]).endswith(".py")  # leave out C++ frames
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
                # The key is "addr" since torch 2.0. An entry recorded with context=None has no frames.
                yield action, int(entry["addr"]), int(entry["size"]), stacks.index(entry.get("frames") or [])
            elif action in FREES:
                yield action, int(entry["addr"]), int(entry["size"]), -1
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise GaugeError(f"{path}: event {number} is not a valid allocator event: {one_line(error, 80)}") from error


def _blocks(path: Path | str, segments: Any, device: int) -> tuple[dict[int, tuple[int, int]], tuple[int, ...]]:
    """The blocks in use at the end, and the sizes of segments that are completely in use."""
    blocks: dict[int, tuple[int, int]] = {}
    full = []
    try:
        for segment in segments:
            if segment.get("device", device) != device:
                continue
            address = segment["address"]
            for block in segment["blocks"]:
                address = block.get("address", address)  # older snapshots do not have the field
                if block["state"] == "active_allocated":
                    blocks[address] = (int(block.get("requested_size") or block["size"]), int(block["size"]))
                address += block["size"]
            if segment["total_size"] == segment.get("allocated_size"):
                full.append(int(segment["total_size"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GaugeError(f"{path}: its segments are invalid: {one_line(error, 80)}") from error
    return blocks, tuple(full)
