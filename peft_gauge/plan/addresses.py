"""Addresses of storages on the planned device, for code that compares them.

A fake has no address. Where a library compares addresses of storages, its behaviour depends on when the caching
allocator hands out an address again, so the addresses are those of the allocator's model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_gauge._internals.torch import storage_key
from peft_gauge.memory.allocator import CachingAllocator

if TYPE_CHECKING:
    import torch

    from peft_gauge.memory.tracker import StorageTracker

_OUTSIDE = 1 << 60  # above all addresses of the allocator's model


class Addresses:
    """The addresses in a step that ``tracker`` follows.

    A storage whose address is needed before it is tracked has one of its own, and keeps it.
    """

    def __init__(self, tracker: StorageTracker) -> None:
        self._tracker = tracker
        self._untracked: set[int] = set()
        self._restarts = -1

    def of(self, storage: torch.UntypedStorage) -> int:
        """The address of ``storage``; two storages that live at one time have different ones."""
        key, number = storage_key(storage), self._tracker.number_of(storage)
        if number is None:
            self._untracked.add(key)
        if key in self._untracked:
            return _OUTSIDE + key
        self._follow()
        return self._address_of[number]  # type: ignore[index]

    def _follow(self) -> None:
        """Apply the tracker's new events to the allocator."""
        if self._tracker.restarts != self._restarts:
            self._restarts, self._read = self._tracker.restarts, 0
            self._allocator = CachingAllocator()
            self._address_of: dict[int, int] = {}  # by a storage's number in the log
        log = self._tracker.log_since(self._read)
        self._read += len(log)
        for sign, number, nbytes in log:
            if sign > 0:
                self._address_of[number] = self._allocator.malloc(nbytes)
            elif sign < 0:
                self._allocator.free(self._address_of[number])
