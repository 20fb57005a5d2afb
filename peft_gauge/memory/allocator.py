"""A model of PyTorch's native CUDA caching allocator, without a GPU.

Tensors are handed out of segments that the allocator got from `cudaMalloc` and does not give back, so
`reserved` depends on the order of allocations and frees, not only on how much is alive. Replaying that
order here gives the reserved bytes that a GPU run would show.

The rules are those of PyTorch's `c10/cuda/CUDACachingAllocator.cpp` (read at commit 001074d), the constants
those that PyTorch 2.13 installs with `c10/core/AllocatorConfig.h`.

Modelled: 512-byte rounding, the small and the large pool, segment sizes, best fit, splitting, merging on
free, the release of cached segments when the device is full, and the counters of `torch.cuda.memory_stats`.

Not modelled, because they are off by default: `max_split_size_mb`, `roundup_power2_divisions`,
`garbage_collection_threshold`, `large_segment_size_mb`, `expandable_segments` and CUDA-graph pools. Also
not modelled: more than one stream, and `record_stream`, which delays frees. With `expandable_segments:True`
a segment grows by pages of 2 or 20 MiB instead, which as a rule reserves less when sizes vary.

Segment addresses are an assumption: the driver chooses them, the model counts upward. They decide only
which of two equally large free blocks is taken first.
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
"""The largest rounded request that the small pool serves (`kSmallSize`)."""
SMALL_SEGMENT_BYTES = 2 << 20
"""Size of every segment of the small pool (`kSmallBuffer`)."""
LARGE_SEGMENT_BYTES = 20 << 20
"""Segment for a large request under `MIN_OWN_SEGMENT_BYTES` (`kLargeBuffer`, `large_segment_size`)."""
MIN_OWN_SEGMENT_BYTES = 10 << 20
"""From this size on, a request gets a segment of its own size (`kMinLargeAlloc`)."""
ROUND_LARGE_BYTES = 2 << 20
"""Such a segment's size is a multiple of this (`kRoundLarge`)."""

NULL_HANDLE = 0
"""What a request for zero bytes gets: no block, like PyTorch's null pointer."""

AllocEvent = tuple[Literal["alloc"], Hashable, int]
FreeEvent = tuple[Literal["free"], Hashable]
Event = AllocEvent | FreeEvent


class OutOfMemory(GaugeError):
    """The device is full even after the allocator gave back every wholly free segment.

    `requested_bytes` is what the caller asked for; `segment_bytes` what `cudaMalloc` was asked for.
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
            f"out of memory: {requested_bytes} bytes asked for (a segment of {segment_bytes}), "
            f"{capacity_bytes} on the device, {reserved_bytes} reserved, of which {allocated_bytes} allocated "
            f"and {self.fragmentation_bytes} in free blocks that do not fit"
        )

    @property
    def fragmentation_bytes(self) -> int:
        """Reserved but unallocated: large here means that the shape of the cache failed, not its size."""
        return self.reserved_bytes - self.allocated_bytes


@dataclass(frozen=True)
class BlockInfo:
    """A piece of a segment; the same fields as a block of `torch.cuda.memory_snapshot()`."""

    address: int
    size_bytes: int
    allocated: bool


@dataclass(frozen=True)
class SegmentInfo:
    """One `cudaMalloc`ed range and the blocks that tile it, in the order of their addresses."""

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
    """The bytes of the block that a request for `nbytes` > 0 needs at least."""
    return -(-nbytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES


def segment_size(block_bytes: int) -> int:
    """The bytes asked of `cudaMalloc` when no free block holds a (rounded) request of `block_bytes`."""
    if block_bytes <= SMALL_REQUEST_BYTES:
        return SMALL_SEGMENT_BYTES
    if block_bytes < MIN_OWN_SEGMENT_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-block_bytes // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES


class CachingAllocator:
    """The allocator of one device and one stream.

    `capacity_bytes` is what `cudaMalloc` can hand out in total (the GPU's memory less the CUDA context);
    None means without limit. Attributes ending in `_bytes` read like their namesakes in
    `torch.cuda.memory_stats`: allocated counts whole blocks, rounding and unsplit remainders included.
    """

    def __init__(self, capacity_bytes: int | None = None) -> None:
        if capacity_bytes is not None and capacity_bytes < 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}; it must not be negative")
        self.capacity_bytes = capacity_bytes
        self.num_alloc_retries = 0
        self.num_ooms = 0
        self._allocated = self._peak_allocated = 0
        self._reserved = self._peak_reserved = 0
        # Free blocks as (size, address), sorted: the first entry not below (size, 0) is PyTorch's best fit.
        self._free_small: list[tuple[int, int]] = []
        self._free_large: list[tuple[int, int]] = []
        self._blocks: dict[int, _Block] = {}
        self._next_address = SMALL_SEGMENT_BYTES  # never NULL_HANDLE

    @property
    def allocated_bytes(self) -> int:
        """Bytes in blocks that are handed out."""
        return self._allocated

    @property
    def reserved_bytes(self) -> int:
        """Bytes in segments, handed out or cached."""
        return self._reserved

    @property
    def peak_allocated_bytes(self) -> int:
        """The most `allocated_bytes` since the start or the last `reset_peak`."""
        return self._peak_allocated

    @property
    def peak_reserved_bytes(self) -> int:
        """The most `reserved_bytes` since the start or the last `reset_peak`."""
        return self._peak_reserved

    def reset_peak(self) -> None:
        """Let both peaks start again from what is allocated and reserved now (not from zero)."""
        self._peak_allocated = self._allocated
        self._peak_reserved = self._reserved

    def malloc(self, nbytes: int) -> int:
        """Hand out a block for `nbytes` and return its handle, to be given to `free`.

        Raises `OutOfMemory` when the capacity does not allow it; the allocator stays usable.
        """
        if nbytes < 0:
            raise ValueError(f"malloc of {nbytes} bytes: a size must not be negative")
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
        """Put a block back into its pool, merged with free neighbours of the same segment."""
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
        """Give every segment without an allocated block back to the device (`torch.cuda.empty_cache`)."""
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
        """Every segment with its blocks, by address, as `torch.cuda.memory_snapshot()` lists them."""
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
        """Cut `block` to `size` where PyTorch would; the rest, at the higher addresses, becomes free.

        The small pool keeps every whole rounding unit; the large pool lets up to 1 MiB go with the block.
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
        assert after is not None, "only called with a neighbour to absorb"
        block.size += after.size
        block.next = after.next
        if after.next is not None:
            after.next.prev = block
        del self._blocks[after.address]


def _discard(pool: list[tuple[int, int]], block: _Block) -> None:
    del pool[bisect_left(pool, (block.size, block.address))]


@dataclass(frozen=True)
class ReplayResult:
    """What the allocator showed after, and at most during, a sequence of events.

    `out_of_memory` is None when the whole sequence fitted; else the failure at event number
    `num_events` (from 0), where the replay stopped.
    """

    num_events: int
    allocated_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    num_alloc_retries: int
    out_of_memory: OutOfMemory | None


def replay(events: Iterable[Event], *, capacity_bytes: int | None = None) -> ReplayResult:
    """Run `("alloc", id, nbytes)` and `("free", id)` events through a fresh allocator.

    An id may be used again once it is freed. Raises `ValueError`, with the event's number, for a sequence
    that makes no sense; running out of memory is a result.
    """
    allocator = CachingAllocator(capacity_bytes)
    handles: dict[Hashable, int] = {}
    failure: OutOfMemory | None = None
    done = 0
    for event in events:
        try:
            _apply(allocator, handles, event)
        except OutOfMemory as error:
            failure = error.with_traceback(None)  # a result must not keep the allocator's frames alive
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
            raise ValueError(f'{event!r} is neither ("alloc", id, nbytes) nor ("free", id)')
