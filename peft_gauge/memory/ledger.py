"""The log of storages: when each is allocated and released, its size and its category."""

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
"""Called at each allocation: () -> (path of the running module, line of Python)."""


def rounded(nbytes: int) -> int:
    """`nbytes` rounded up to whole blocks of 512, as `torch.cuda.memory_allocated` counts them."""
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


class Event(NamedTuple):
    """One event of the log. `sign` is +1 for an allocation, -1 for a release."""

    sign: int
    storage: int
    nbytes: int
    category: str
    phase: str


@dataclass(slots=True)
class StorageRecord:
    """One storage, from its allocation to its release.

    Attributes:
        operator: the name of the operator that allocated it; '' if it existed before.
        module, site: the results of the tracker's `where` at its allocation: the path of the running module and the
            calling line of Python; empty without `where`.
    """

    nbytes: int
    category: str
    phase: str
    operator: str
    module: str = ""
    site: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Live bytes at one moment, in total and by category; `event` is the index in the log."""

    bytes: int
    by_category: dict[str, int]
    phase: str
    event: int


class _Watch(weakref.ref[Any]):
    """A weak reference that identifies its storage even after the storage is released."""

    __slots__ = ("key", "record")

    key: int
    record: int


class Ledger:
    """The log. It is separate from the dispatch mode so that finalizers hold no operator, frame or tensor."""

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
        """Record a resize, which allocates the new block before it frees the old one and keeps the storage object."""
        watch = self.alive[key]
        old = self.records[watch.record]
        if storage.nbytes() != old.nbytes:
            before, watch.record = watch.record, self.note(storage.nbytes(), old.category, old.operator)
            self.end(before)

    def _died(self, watch: weakref.ref[Any]) -> None:
        if isinstance(watch, _Watch):
            del self.alive[watch.key]
            self.log.append((-1, watch.record, self.phase))
