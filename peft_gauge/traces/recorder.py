"""Record one step's log of CUDA's caching allocator, and keep it as a small file.

The history is on for one step, which is not measured: its Python stacks cost time, and its marks (allocations of a
known size, freed at once) tell where phases begin. Addresses become small numbers, stacks are kept once each.
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
"""Of one file: with this many cases a run's traces stay in a repository."""
FRAMES = (14, 6, 2)
"""How many frames of a stack are kept, the innermost: fewer where the file would be larger than `MOST_BYTES`."""
MOST_EVENTS = 2_000_000
"""Of one step, after which the oldest are lost: some 2 GB of stacks on the host."""

BEGIN, FORWARD, BACKWARD, UPDATE, AFTER, END = range(6)  # the numbers of `reading.MARKS`


class Job(Protocol):
    """A training job that is warmed up (`peft_gauge.training.step.TrainingJob`)."""

    settings: Any

    def forward(self) -> Any: ...

    def backward(self) -> None: ...

    def optimizer_step(self) -> None: ...

    def clear(self) -> None: ...


def record_step(job: Job, device: str = "cuda") -> Recording:
    """The log of one step of ``job``. The history is off afterwards, also where the step fails.

    Raises what the step raises, and `GaugeError` where torch recorded nothing.
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
    """Leave a mark in the log: its size tells which, and its stack that it is one."""
    import torch

    torch.empty(MARK_BYTES + 512 * number, dtype=torch.uint8, device=device)


def write(path: Path, recording: Recording, settings: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Keep ``recording`` in ``path``, a gzipped JSON of at most `MOST_BYTES` where that can be done by shorter stacks.

    ``settings``: what was trained (`peft_gauge.commands.trace` makes a plan of it); ``about``: GPU, versions, metrics
    of the same case. The file appears complete or not at all; raises `GaugeError` where it cannot be written.
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
        raise GaugeError(f"the trace cannot be written to {path}: {error.strerror or error}") from error


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
        "blocks_are": "number of the address, bytes asked for, bytes of the block; what was in use at the end",
    }
