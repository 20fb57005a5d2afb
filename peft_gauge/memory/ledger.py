"""The log of storages: when each is made and released, how large it is and what it is for."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_gauge.memory.categories import OUTSIDE

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 512  # torch's CUDA caching allocator rounds every request up to a multiple of this

Where = Callable[[], tuple[str, str]]
"""() -> (path of the module at work, site in Python), asked at each birth."""


def rounded(nbytes: int) -> int:
    """`nbytes` as CUDA's `memory_allocated` counts them: in blocks of 512."""
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


class Event(NamedTuple):
    """One line of the log. `sign` is +1 for a birth, -1 for a death."""

    sign: int
    storage: int
    nbytes: int
    category: str
    phase: str


@dataclass(slots=True)
class StorageRecord:
    """One storage's life; `operator` is the name of what made it ('' if it was there before).

    `module` and `site` are what the tracker's `where` said at its birth: the path of the module at work and the line of
    Python that asked; empty without one.
    """

    nbytes: int
    category: str
    phase: str
    operator: str
    module: str = ""
    site: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Live bytes at one moment, in all and by category; `event` is the index in the log."""

    bytes: int
    by_category: dict[str, int]
    phase: str
    event: int


class _Watch(weakref.ref[Any]):
    """A weak reference that knows which storage it stands for once that is gone."""

    __slots__ = ("key", "record")

    key: int
    record: int


class Ledger:
    """The log. Apart from the mode so that a storage's finalizer holds no operator, frame or tensor."""

    def __init__(self) -> None:
        self.records: list[StorageRecord] = []
        self.log: list[tuple[int, int, str]] = []  # (sign, record, phase); sign 0 marks the start of a phase
        self.alive: dict[int, _Watch] = {}  # StorageImpl address -> watch
        self.phase = OUTSIDE
        self.where: Where | None = None

    def born(self, storage: torch.UntypedStorage, key: int, category: str, operator: str) -> int:
        record = self.note(storage.nbytes(), category, operator)
        watch = _Watch(storage, self._died)
        watch.key, watch.record = key, record
        self.alive[key] = watch
        return record

    def note(self, nbytes: int, category: str, operator: str) -> int:
        record = len(self.records)
        place = ("", "") if self.where is None else self.where()
        self.records.append(StorageRecord(nbytes, category, self.phase, operator, *place))
        self.log.append((1, record, self.phase))
        return record

    def end(self, record: int) -> None:
        self.log.append((-1, record, self.phase))

    def resized(self, storage: torch.UntypedStorage, key: int) -> None:
        """A resize allocates the new block before it frees the old one; the storage object stays the same."""
        watch = self.alive[key]
        old = self.records[watch.record]
        if storage.nbytes() != old.nbytes:
            before, watch.record = watch.record, self.note(storage.nbytes(), old.category, old.operator)
            self.end(before)

    def _died(self, watch: weakref.ref[Any]) -> None:
        if isinstance(watch, _Watch):
            del self.alive[watch.key]
            self.log.append((-1, watch.record, self.phase))
