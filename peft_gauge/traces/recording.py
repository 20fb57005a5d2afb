"""The content of an allocator trace, independent of its file format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft_gauge.memory.categories import FORWARD, OPTIMIZER

ALLOC = "alloc"
FREES = ("free_requested", "free_completed")

HOW_TO_RECORD = (
    "call torch.cuda.memory._record_memory_history() before the step and _dump_snapshot(FILE) after it, "
    "or let the suite record it: pytest -m gpu"
)


Actions = Sequence[tuple[str, int, int, int]]
"""(action, address, bytes, index of the stack or -1), as the allocator logs them."""


@dataclass
class Recording:
    """The trace of one device.

    Attributes:
        events: (sign, address, requested bytes, index into ``stacks`` or -1), in order of time. A free counts once, at
            the first of its two events (request and completion).
        phases: the phase of each event.
        blocks: address -> (requested bytes, bytes of the block) for blocks in use at the end; ``None`` if unknown.
        in_use_bytes: bytes in use at the end, if only the sum is known.
        settings: the trained case, if the file has it.
        about: GPU, versions and so on.
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
        """(start, stop) of each step in the events: from its first forward pass to that of the next step."""
        starts, updated = [], True
        for position, phase in enumerate(self.phases):
            if phase == FORWARD and updated:
                starts.append(position)
                updated = False
            updated = updated or phase == OPTIMIZER
        if not starts:
            return [(0, len(self.events))]
        return list(zip(starts, [*starts[1:], len(self.events)], strict=True))
