"""A model of PyTorch's native CUDA caching allocator, without a GPU.

The allocator places tensors in segments from `cudaMalloc`, which it keeps after they are free. Reserved memory
therefore depends on the order of allocations and frees, not only on live bytes. Replaying that order here gives the
reserved bytes of a GPU run.

The rules are from PyTorch's `c10/cuda/CUDACachingAllocator.cpp` (at commit 001074d), the constants from
`c10/core/AllocatorConfig.h` in PyTorch 2.13.

Modeled: 512-byte rounding, the small and the large pool, segment sizes, best fit, splitting, merging on free, the
release of cached segments when the device is full, and the counters of `torch.cuda.memory_stats`.

Not modeled, because they are off by default: `max_split_size_mb`, `roundup_power2_divisions`,
`garbage_collection_threshold`, `large_segment_size_mb`, `expandable_segments` and CUDA-graph pools. Also not modeled:
more than one stream, and `record_stream`, which delays frees. With `expandable_segments:True`, segments grow by pages
of 2 or 20 MiB, which usually reserves less if sizes vary.

Segment addresses are an assumption: the driver chooses them, while the model counts upward. They only determine which
of two equally large free blocks is used first.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Literal

from peft_gauge.errors import GaugeError

MIN_BLOCK_BYTES = 512
"""Every request is rounded up to a multiple of this (`kMinBlockSize`)."""
SMALL_REQUEST_BYTES = 1 << 20
"""The largest rounded request for the small pool (`kSmallSize`)."""
SMALL_SEGMENT_BYTES = 2 << 20
"""Size of every segment of the small pool (`kSmallBuffer`)."""
LARGE_SEGMENT_BYTES = 20 << 20
"""Segment for a large request under `MIN_OWN_SEGMENT_BYTES` (`kLargeBuffer`, `large_segment_size`)."""
MIN_OWN_SEGMENT_BYTES = 10 << 20
"""From this size on, a request gets a segment of its own size (`kMinLargeAlloc`)."""
ROUND_LARGE_BYTES = 2 << 20
"""Such a segment's size is a multiple of this (`kRoundLarge`)."""

NULL_HANDLE = 0
"""The handle of a request for zero bytes: no block, like PyTorch's null pointer."""

AllocEvent = tuple[Literal["alloc"], Hashable, int]
FreeEvent = tuple[Literal["free"], Hashable]
Event = AllocEvent | FreeEvent


class OutOfMemory(GaugeError):
    """The device is full even after the allocator released every entirely free segment.

    `requested_bytes` is the size that the caller requested, `segment_bytes` the size requested from `cudaMalloc`.
    """

    def __init__(
        self,
        *,
        requested_bytes: int,
        segment_bytes: int,
        capacity_bytes: int,
        reserved_bytes: int,
        allocated_bytes: int,
    ) -> None:
        self.requested_bytes = requested_bytes
        self.segment_bytes = segment_bytes
        self.capacity_bytes = capacity_bytes
        self.reserved_bytes = reserved_bytes
        self.allocated_bytes = allocated_bytes
        super().__init__(
            f"out of memory: {requested_bytes} bytes requested (a segment of {segment_bytes}), "
            f"{capacity_bytes} on the device, {reserved_bytes} reserved ({allocated_bytes} allocated, "
            f"{self.fragmentation_bytes} in free blocks that do not fit); reduce the batch size or the sequence length"
        )

    @property
    def fragmentation_bytes(self) -> int:
        """Reserved but not allocated. If large, allocation failed because of fragmentation, not size."""
        return self.reserved_bytes - self.allocated_bytes


@dataclass(frozen=True)
class BlockInfo:
    """A block of a segment, with the same fields as in `torch.cuda.memory_snapshot()`."""

    address: int
    size_bytes: int
    allocated: bool


@dataclass(frozen=True)
class SegmentInfo:
    """One segment from `cudaMalloc` and the blocks that fill it, in order of address."""

    address: int
    size_bytes: int
    pool: Literal["small", "large"]
    blocks: tuple[BlockInfo, ...]


class _Block:
    __slots__ = ("address", "allocated", "is_small", "next", "prev", "size")

    def __init__(self, address: int, size: int, is_small: bool) -> None:
        self.address = address
        self.size = size
        self.is_small = is_small
        self.allocated = False
        self.prev: _Block | None = None
        self.next: _Block | None = None


def round_request(nbytes: int) -> int:
    """The smallest block for a request of `nbytes` > 0."""
    return -(-nbytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES


def segment_size(block_bytes: int) -> int:
    """The bytes to request from `cudaMalloc` when no free block fits a (rounded) request of `block_bytes`."""
    if block_bytes <= SMALL_REQUEST_BYTES:
        return SMALL_SEGMENT_BYTES
    if block_bytes < MIN_OWN_SEGMENT_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-block_bytes // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES


class CachingAllocator:
    """The allocator of one device and one stream.

    `capacity_bytes` is the total available to `cudaMalloc` (the GPU's memory minus the CUDA context); None means no
    limit. Attributes ending in `_bytes` match those in `torch.cuda.memory_stats`: allocated counts whole blocks,
    including rounding and remainders that were not split off.
    """

    def __init__(self, capacity_bytes: int | None = None) -> None:
        if capacity_bytes is not None and capacity_bytes < 0:
            raise ValueError(f"capacity_bytes must not be negative, got {capacity_bytes}")
        self.capacity_bytes = capacity_bytes
        self.num_alloc_retries = 0
        self.num_ooms = 0
        self._allocated = self._peak_allocated = 0
        self._reserved = self._peak_reserved = 0
        # Free blocks as (size, address), sorted: PyTorch's best fit is the first entry not below (size, 0).
        self._free_small: list[tuple[int, int]] = []
        self._free_large: list[tuple[int, int]] = []
        self._blocks: dict[int, _Block] = {}
        self._next_address = SMALL_SEGMENT_BYTES  # never NULL_HANDLE

    @property
    def allocated_bytes(self) -> int:
        """Bytes in allocated blocks."""
        return self._allocated

    @property
    def reserved_bytes(self) -> int:
        """Bytes in segments, allocated or cached."""
        return self._reserved

    @property
    def peak_allocated_bytes(self) -> int:
        """The largest `allocated_bytes` since the start or the last `reset_peak`."""
        return self._peak_allocated

    @property
    def peak_reserved_bytes(self) -> int:
        """The largest `reserved_bytes` since the start or the last `reset_peak`."""
        return self._peak_reserved

    def reset_peak(self) -> None:
        """Restart both peaks from the bytes that are allocated and reserved now (not from zero)."""
        self._peak_allocated = self._allocated
        self._peak_reserved = self._reserved

    def malloc(self, nbytes: int) -> int:
        """Allocate a block for `nbytes` and return its handle for `free`.

        Raises `OutOfMemory` if the capacity is exceeded; the allocator stays usable.
        """
        if nbytes < 0:
            raise ValueError(f"malloc: the size must not be negative, got {nbytes} bytes")
        if nbytes == 0:
            return NULL_HANDLE
        size = round_request(nbytes)
        block = self._take_free_block(size) or self._new_segment(size, nbytes)
        self._split(block, size)
        block.allocated = True
        self._allocated += block.size
        self._peak_allocated = max(self._peak_allocated, self._allocated)
        return block.address

    def free(self, handle: int) -> None:
        """Return a block to its pool, merged with free neighbors in the same segment."""
        if handle == NULL_HANDLE:
            return
        block = self._blocks.get(handle)
        if block is None or not block.allocated:
            raise ValueError(f"free of {handle}: no allocated block has this handle")
        block.allocated = False
        self._allocated -= block.size
        pool = self._pool(block.is_small)
        after = block.next
        if after is not None and not after.allocated:
            _discard(pool, after)
            self._absorb_next(block)
        before = block.prev
        if before is not None and not before.allocated:
            _discard(pool, before)
            self._absorb_next(before)
            block = before
        insort(pool, (block.size, block.address))

    def empty_cache(self) -> None:
        """Release every segment without an allocated block (`torch.cuda.empty_cache`)."""
        for pool in (self._free_small, self._free_large):
            kept = []
            for size, address in pool:
                block = self._blocks[address]
                if block.prev is None and block.next is None:
                    del self._blocks[address]
                    self._reserved -= size
                else:
                    kept.append((size, address))
            pool[:] = kept

    def segments(self) -> list[SegmentInfo]:
        """All segments with their blocks, by address, like `torch.cuda.memory_snapshot()`."""
        found = []
        for head in sorted((b for b in self._blocks.values() if b.prev is None), key=lambda b: b.address):
            blocks = []
            block: _Block | None = head
            while block is not None:
                blocks.append(BlockInfo(block.address, block.size, block.allocated))
                block = block.next
            total = sum(info.size_bytes for info in blocks)
            found.append(SegmentInfo(head.address, total, "small" if head.is_small else "large", tuple(blocks)))
        return found

    def _pool(self, is_small: bool) -> list[tuple[int, int]]:
        return self._free_small if is_small else self._free_large

    def _take_free_block(self, size: int) -> _Block | None:
        pool = self._pool(size <= SMALL_REQUEST_BYTES)
        index = bisect_left(pool, (size, 0))
        if index == len(pool):
            return None
        return self._blocks[pool.pop(index)[1]]

    def _new_segment(self, size: int, requested_bytes: int) -> _Block:
        wanted = segment_size(size)
        if not self._fits(wanted):
            self.empty_cache()
            self.num_alloc_retries += 1  # PyTorch counts the second attempt, whether or not it succeeds
            if not self._fits(wanted):
                self._fail(wanted, requested_bytes)
        block = _Block(self._next_address, wanted, size <= SMALL_REQUEST_BYTES)
        self._next_address += wanted
        self._blocks[block.address] = block
        self._reserved += wanted
        self._peak_reserved = max(self._peak_reserved, self._reserved)
        return block

    def _fits(self, segment_bytes: int) -> bool:
        return self.capacity_bytes is None or self._reserved + segment_bytes <= self.capacity_bytes

    def _fail(self, segment_bytes: int, requested_bytes: int) -> None:
        self.num_ooms += 1
        assert self.capacity_bytes is not None, "without a capacity every segment fits"
        raise OutOfMemory(
            requested_bytes=requested_bytes,
            segment_bytes=segment_bytes,
            capacity_bytes=self.capacity_bytes,
            reserved_bytes=self._reserved,
            allocated_bytes=self._allocated,
        )

    def _split(self, block: _Block, size: int) -> None:
        """Split `block` after `size` bytes if PyTorch would; the remainder, at higher addresses, becomes free.

        The small pool splits off remainders of at least 512 bytes; the large pool only those above 1 MiB.
        """
        rest_bytes = block.size - size
        keep = rest_bytes >= MIN_BLOCK_BYTES if block.is_small else rest_bytes > SMALL_REQUEST_BYTES
        if not keep:
            return
        rest = _Block(block.address + size, rest_bytes, block.is_small)
        rest.prev, rest.next = block, block.next
        if block.next is not None:
            block.next.prev = rest
        block.next = rest
        block.size = size
        self._blocks[rest.address] = rest
        insort(self._pool(block.is_small), (rest_bytes, rest.address))

    def _absorb_next(self, block: _Block) -> None:
        after = block.next
        assert after is not None, "call this only with a neighbor to absorb"
        block.size += after.size
        block.next = after.next
        if after.next is not None:
            after.next.prev = block
        del self._blocks[after.address]


def _discard(pool: list[tuple[int, int]], block: _Block) -> None:
    del pool[bisect_left(pool, (block.size, block.address))]


@dataclass(frozen=True)
class ReplayResult:
    """The allocator's counters after a sequence of events, and their peaks.

    `out_of_memory` is None if the whole sequence fitted; otherwise it is the error at event number `num_events` (from
    0), where the replay stopped.
    """

    num_events: int
    allocated_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    num_alloc_retries: int
    out_of_memory: OutOfMemory | None


def replay(events: Iterable[Event], *, capacity_bytes: int | None = None) -> ReplayResult:
    """Run `("alloc", id, nbytes)` and `("free", id)` events through a new allocator.

    An id may be used again after it is freed. Raises `ValueError`, with the event's number, for an invalid sequence.
    Running out of memory does not raise: it is part of the result.
    """
    allocator = CachingAllocator(capacity_bytes)
    handles: dict[Hashable, int] = {}
    failure: OutOfMemory | None = None
    done = 0
    for event in events:
        try:
            _apply(allocator, handles, event)
        except OutOfMemory as error:
            failure = error.with_traceback(None)  # a traceback would keep the allocator's frames alive
            break
        except ValueError as error:
            raise ValueError(f"event {done}: {error}") from error
        done += 1
    return ReplayResult(
        num_events=done,
        allocated_bytes=allocator.allocated_bytes,
        reserved_bytes=allocator.reserved_bytes,
        peak_allocated_bytes=allocator.peak_allocated_bytes,
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        num_alloc_retries=allocator.num_alloc_retries,
        out_of_memory=failure,
    )


def _apply(allocator: CachingAllocator, handles: dict[Hashable, int], event: Event) -> None:
    match event:
        case ("alloc", key, int(nbytes)):
            if key in handles:
                raise ValueError(f"id {key!r} is allocated already")
            handles[key] = allocator.malloc(nbytes)
        case ("free", key):
            if key not in handles:
                raise ValueError(f"id {key!r} is not allocated")
            allocator.free(handles.pop(key))
        case _:
            raise ValueError(f'invalid event {event!r}; expected ("alloc", id, nbytes) or ("free", id)')
