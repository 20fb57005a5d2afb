"""Recording the caching allocator's trace of one step, and saving it as a compact file.

The history is on for one extra step, which is not measured, because collecting Python stacks takes time. Marks
(allocations of a known size, freed at once) show where phases begin. The file replaces addresses by small numbers, and
holds each stack once.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from peft_gauge._internals.torch import memory_history, memory_snapshot
from peft_gauge.errors import GaugeError
from peft_gauge.files import write_whole
from peft_gauge.traces.phases import MARK_BYTES
from peft_gauge.traces.recording import ALLOC, Recording
from peft_gauge.traces.snapshot import of_snapshot

MOST_BYTES = 200_000
"""The largest size of a file, so that the traces of a run can be kept in a repository."""
FRAMES = (14, 6, 2)
"""Innermost frames to keep per stack: the first of these numbers with which the file is at most `MOST_BYTES`."""
MOST_EVENTS = 2_000_000
"""The largest number of events in a step; older ones are lost. Their stacks take about 2 GB of host memory."""

BEGIN, FORWARD, BACKWARD, UPDATE, AFTER, END = range(6)  # the numbers of `reading.MARKS`


class Job(Protocol):
    """A training job after its warm-up (`peft_gauge.training.step.TrainingJob`)."""

    settings: Any

    def forward(self) -> Any: ...

    def backward(self) -> None: ...

    def optimizer_step(self) -> None: ...

    def clear(self) -> None: ...


def record_step(job: Job, device: str = "cuda") -> Recording:
    """Record one step of ``job``. The history is off afterwards, even if the step fails.

    Raises the step's error, and `GaugeError` if torch recorded nothing.
    """
    with _history():
        mark(BEGIN, device)
        job.clear()
        for _ in range(job.settings.grad_accumulation):
            mark(FORWARD, device)
            job.forward()
            mark(BACKWARD, device)
            job.backward()
        mark(UPDATE, device)
        job.optimizer_step()
        mark(AFTER, device)
        job.clear()
        mark(END, device)
        snapshot = memory_snapshot()
    return of_snapshot("the recorded step", snapshot, _index(device))


@contextmanager
def _history() -> Iterator[None]:
    memory_history(True, MOST_EVENTS)
    try:
        yield
    finally:
        memory_history(False, 0)


def _index(device: str) -> int:
    import torch

    index = torch.device(device).index
    return torch.cuda.current_device() if index is None else index


def mark(number: int, device: str) -> None:
    """Add a mark to the log. Its size gives its number; its stack identifies it as a mark."""
    import torch

    torch.empty(MARK_BYTES + 512 * number, dtype=torch.uint8, device=device)


def write(path: Path, recording: Recording, settings: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write ``recording`` to ``path`` as gzipped JSON, with stacks shortened to keep it below `MOST_BYTES` if possible.

    The file is written whole or not at all. Raises `GaugeError` if it cannot be written.

    Args:
        settings: the trained case, from which `peft_gauge.commands.trace` makes a plan.
        about: GPU, versions, and metrics of the same case.
    """
    for frames in FRAMES:
        packed = gzip.compress(
            json.dumps(_as_json(recording, settings, about, frames), separators=(",", ":")).encode(), mtime=0
        )
        if len(packed) <= MOST_BYTES:
            break
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, packed)
    except OSError as error:
        raise GaugeError(f"cannot write the trace to {path}: {error.strerror or error}") from error


def _as_json(
    recording: Recording, settings: Mapping[str, Any], about: Mapping[str, Any], frames: int
) -> dict[str, Any]:
    numbers: dict[int, int] = {}

    def number(address: int) -> int:
        return numbers.setdefault(address, len(numbers))

    stacks: dict[tuple[str, ...], int] = {}
    places = [stacks.setdefault(stack[:frames], len(stacks)) for stack in recording.stacks]
    events: list[Sequence[Any]] = [
        [ALLOC if sign > 0 else "free_completed", number(address), size, places[stack] if stack >= 0 else -1]
        for sign, address, size, stack in recording.events
    ]
    phases = [
        [position, phase]
        for position, phase in enumerate(recording.phases)
        if position == 0 or recording.phases[position - 1] != phase
    ]
    blocks = [[number(address), asked, size] for address, (asked, size) in (recording.blocks or {}).items()]
    return {
        "settings": dict(settings),
        "about": {**recording.about, **about},
        "device": recording.about.get("device", 0),
        "stacks": [list(stack) for stack in stacks],
        "events": events,
        "phases": phases,
        "blocks": blocks,
        "events_are": "action, number of the address, bytes, index into stacks (innermost frame first; -1: a free)",
        "blocks_are": "number of the address, requested bytes, bytes of the block; blocks in use at the end",
    }
