"""The allocator model against sequences whose answer is known beforehand.

The hand-worked answers follow from the rules in the module's docstring; each test says how.
"""

from __future__ import annotations

import random
import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_gauge.errors import GaugeError
from peft_gauge.memory.allocator import NULL_HANDLE, CachingAllocator, OutOfMemory, replay, round_request, segment_size

KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize(
    ("nbytes", "block_bytes"), [(1, 512), (511, 512), (512, 512), (513, 1024), (40_000, 40_448), (MIB + 1, MIB + 512)]
)
def test_requests_are_rounded_up_to_512_bytes(nbytes: int, block_bytes: int) -> None:
    assert round_request(nbytes) == block_bytes


@pytest.mark.parametrize(
    ("nbytes", "reserved_bytes"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),  # 1 MiB is still small
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB),  # rounds up to 10 MiB, which gets a segment of its own
        (10 * MIB + 1, 12 * MIB),
        (21 * MIB, 22 * MIB),
        (22 * MIB, 22 * MIB),
    ],
)
def test_first_request_reserves_one_segment(nbytes: int, reserved_bytes: int) -> None:
    allocator = CachingAllocator()
    allocator.malloc(nbytes)
    assert allocator.reserved_bytes == segment_size(round_request(nbytes)) == reserved_bytes


def test_published_snapshot_of_a_vector_times_a_matrix() -> None:
    """The blocks that `torch.cuda.memory_snapshot()` listed for `y = X @ W + b` on a device.

    https://discuss.pytorch.org/t/178671: W is 40,000 bytes, b 40, X 4,000; the product lives until b is added
    and leaves a free block of 512; 8,519,680 bytes are the workspace of cuBLAS.
    """
    allocator = CachingAllocator()
    for nbytes in (40_000, 40, 4_000):
        allocator.malloc(nbytes)
    product = allocator.malloc(40)
    allocator.malloc(8_519_680)
    allocator.malloc(40)
    allocator.free(product)

    small, large = allocator.segments()
    assert [(b.size_bytes, b.allocated) for b in small.blocks] == [
        (40_448, True), (512, True), (4_096, True), (512, False), (512, True), (2_051_072, False),
    ]  # fmt: skip
    assert (small.pool, small.size_bytes) == ("small", 2_097_152)
    assert [(b.size_bytes, b.allocated) for b in large.blocks] == [(8_519_680, True), (12_451_840, False)]
    assert (large.pool, large.size_bytes) == ("large", 20_971_520)
    assert allocator.allocated_bytes == 45_568 + 512 - 512 + 8_519_680  # 45,568 as printed there


def test_zero_bytes_take_nothing() -> None:
    allocator = CachingAllocator(capacity_bytes=0)
    handle = allocator.malloc(0)
    allocator.free(handle)
    assert handle == NULL_HANDLE
    assert allocator.reserved_bytes == allocator.allocated_bytes == 0


def test_two_pools_do_not_share_segments() -> None:
    """A 20 MiB segment with 18 MiB free serves no request of 1 MiB, however much room it has."""
    allocator = CachingAllocator()
    allocator.malloc(2 * MIB)
    allocator.malloc(MIB)
    assert allocator.reserved_bytes == 22 * MIB


def test_large_rest_up_to_1_mib_goes_with_the_block() -> None:
    """20 - 9 leaves 11 MiB; 10.5 MiB fit there, and the rest of 0.5 MiB is not split off but counted allocated."""
    allocator = CachingAllocator()
    allocator.malloc(9 * MIB)
    allocator.malloc(10 * MIB + 512 * KIB)
    assert allocator.reserved_bytes == 20 * MIB
    assert allocator.allocated_bytes == 20 * MIB


@pytest.mark.parametrize(("rest_bytes", "blocks"), [(MIB, 1), (MIB + 512, 2)])
def test_large_rest_is_split_only_above_1_mib(rest_bytes: int, blocks: int) -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(12 * MIB))
    allocator.malloc(12 * MIB - rest_bytes)
    (segment,) = allocator.segments()
    assert len(segment.blocks) == blocks


def test_small_rest_is_split_from_512_bytes_on() -> None:
    """1 MiB and 1 MiB - 512 leave 512 bytes of a 2 MiB segment, and the next request gets them."""
    allocator = CachingAllocator()
    for nbytes in (MIB, MIB - 512, 1):
        allocator.malloc(nbytes)
    assert allocator.reserved_bytes == allocator.allocated_bytes == 2 * MIB


def test_freed_block_is_reused_not_reserved_again() -> None:
    allocator = CachingAllocator()
    for _ in range(3):
        allocator.free(allocator.malloc(30 * MIB))
    assert allocator.reserved_bytes == allocator.peak_reserved_bytes == 30 * MIB
    assert allocator.allocated_bytes == 0


def test_best_fit_takes_the_smallest_block_that_holds_the_request() -> None:
    """Of 40, 26 and 30 MiB that are free, 28 go into the 30, so that 40 and 26 still fit afterwards."""
    allocator = CachingAllocator()
    for handle in [allocator.malloc(size * MIB) for size in (40, 26, 30)]:
        allocator.free(handle)
    for size in (28, 40, 26):
        allocator.malloc(size * MIB)
    assert allocator.reserved_bytes == 96 * MIB


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_neighbours_merge_in_whatever_order_they_are_freed(order: tuple[int, ...]) -> None:
    allocator = CachingAllocator()
    handles = [allocator.malloc(6 * MIB) for _ in range(3)]
    for index in order:
        allocator.free(handles[index])
    (segment,) = allocator.segments()
    assert [(b.size_bytes, b.allocated) for b in segment.blocks] == [(20 * MIB, False)]


def test_free_blocks_of_two_segments_do_not_merge() -> None:
    """12 + 12 MiB are free in two segments, and 24 MiB fit into neither."""
    allocator = CachingAllocator()
    for handle in [allocator.malloc(12 * MIB), allocator.malloc(12 * MIB)]:
        allocator.free(handle)
    allocator.malloc(24 * MIB)
    assert allocator.reserved_bytes == 48 * MIB


def test_empty_cache_keeps_segments_in_use() -> None:
    allocator = CachingAllocator()
    kept, gone = allocator.malloc(2 * MIB), allocator.malloc(30 * MIB)
    allocator.free(gone)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * MIB
    allocator.free(kept)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0
    assert allocator.segments() == []


def test_peaks_restart_from_the_present() -> None:
    allocator = CachingAllocator()
    kept = allocator.malloc(10 * MIB)
    allocator.free(allocator.malloc(30 * MIB))
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (40 * MIB, 40 * MIB)
    allocator.reset_peak()
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (10 * MIB, 40 * MIB)
    allocator.free(kept)
    assert allocator.peak_allocated_bytes == 10 * MIB


def test_full_device_gives_cached_segments_back_first() -> None:
    """60 of 100 MiB are cached; 70 MiB do not fit beside them, but do once they went back: one retry."""
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    allocator.free(allocator.malloc(60 * MIB))
    allocator.malloc(70 * MIB)
    assert (allocator.reserved_bytes, allocator.num_alloc_retries, allocator.num_ooms) == (70 * MIB, 1, 0)


def test_device_is_full_at_exactly_its_capacity() -> None:
    allocator = CachingAllocator(capacity_bytes=40 * MIB)
    allocator.malloc(20 * MIB)
    allocator.malloc(20 * MIB)
    assert allocator.num_alloc_retries == 0
    with pytest.raises(OutOfMemory):
        allocator.malloc(1)


def test_out_of_memory_by_fragmentation() -> None:
    """Two 20 MiB segments hold 2 x 2 MiB: 36 of 50 MiB are free, yet 20 MiB in one piece are nowhere."""
    allocator = CachingAllocator(capacity_bytes=50 * MIB)
    blocks = [allocator.malloc(size * MIB) for size in (2, 9, 9, 2, 9, 9)]
    for index in (1, 2, 4, 5):
        allocator.free(blocks[index])
    with pytest.raises(OutOfMemory, match="out of memory: 20971520 bytes") as failure:
        allocator.malloc(20 * MIB)

    error = failure.value
    assert isinstance(error, GaugeError)
    assert (error.requested_bytes, error.segment_bytes, error.capacity_bytes) == (20 * MIB, 20 * MIB, 50 * MIB)
    assert (error.reserved_bytes, error.allocated_bytes, error.fragmentation_bytes) == (40 * MIB, 4 * MIB, 36 * MIB)
    assert (allocator.num_ooms, allocator.num_alloc_retries) == (1, 1)
    allocator.malloc(18 * MIB)  # the largest free piece: the allocator goes on
    assert allocator.reserved_bytes == 40 * MIB


def test_replay_shows_why_reserved_exceeds_the_peak() -> None:
    """Growing buffers: 10, 12, 14 MiB one after the other never reuse a segment, so 36 are reserved for 14."""
    events: list[Any] = []
    for size in (10, 12, 14):
        events += [("alloc", "buffer", size * MIB), ("free", "buffer")]
    result = replay(events)
    assert (result.peak_allocated_bytes, result.peak_reserved_bytes) == (14 * MIB, 36 * MIB)
    assert (result.allocated_bytes, result.num_events, result.out_of_memory) == (0, 6, None)


def test_replay_ends_at_the_event_that_ran_out_of_memory() -> None:
    result = replay([("alloc", 0, 30 * MIB), ("alloc", 1, 30 * MIB), ("free", 0)], capacity_bytes=40 * MIB)
    assert result.num_events == 1
    assert result.out_of_memory is not None
    assert result.out_of_memory.allocated_bytes == result.allocated_bytes == 30 * MIB
    assert result.num_alloc_retries == 1


@pytest.mark.parametrize(
    ("event", "complaint"),
    [
        (("free", "x"), "event 1: id 'x' is not allocated"),
        (("alloc", "w", 1), "event 1: id 'w' is allocated already"),
        (("alloc", "x", -1), "event 1: malloc: the size must not be negative, got -1"),
        (("realloc", "w", 1), "event 1: invalid event"),
    ],
)
def test_replay_refuses_a_senseless_sequence(event: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replay([("alloc", "w", 4), event])


def test_double_free_and_negative_capacity_are_refused() -> None:
    allocator = CachingAllocator()
    handle = allocator.malloc(1)
    allocator.free(handle)
    with pytest.raises(ValueError, match="no allocated block"):
        allocator.free(handle)
    with pytest.raises(ValueError, match="capacity_bytes"):
        CachingAllocator(-1)


# Sizes around every threshold, and operations: a size to allocate, or the rank of a live block to free.
_SIZES = st.one_of(
    st.integers(0, 4 * KIB),
    st.integers(0, 64 * MIB),
    st.builds(
        lambda edge, off: edge + off, st.sampled_from([MIB, 2 * MIB, 10 * MIB, 20 * MIB]), st.integers(-600, 600)
    ),
)
_OPERATIONS = st.lists(
    st.one_of(st.tuples(st.just("alloc"), _SIZES), st.tuples(st.just("free"), st.integers(0, 1000))), max_size=60
)


def _check_invariants(allocator: CachingAllocator, live: list[int]) -> None:
    segments = allocator.segments()
    blocks = [block for segment in segments for block in segment.blocks]
    assert sum(s.size_bytes for s in segments) == allocator.reserved_bytes <= allocator.peak_reserved_bytes
    assert sum(b.size_bytes for b in blocks if b.allocated) == allocator.allocated_bytes <= allocator.reserved_bytes
    assert sorted(b.address for b in blocks if b.allocated) == sorted(handle for handle in live if handle)
    for segment in segments:
        address = segment.address
        for left, right in pairwise(segment.blocks):
            assert left.allocated or right.allocated, "free neighbours were not merged"
        for block in segment.blocks:  # they tile the segment: no overlap, no hole
            assert block.address == address
            assert block.size_bytes % 512 == 0
            address += block.size_bytes
    ends = [(s.address, s.address + s.size_bytes) for s in segments]
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))


def _refused_bytes(allocator: CachingAllocator, live: list[int], nbytes: int) -> int:
    """Allocate; 0 when that worked, else the bytes of the segment that the device had no room for."""
    try:
        live.append(allocator.malloc(nbytes))
    except OutOfMemory as error:
        return error.segment_bytes
    return 0


@settings(deadline=None, max_examples=150)
@given(_OPERATIONS, st.one_of(st.none(), st.integers(0, 128 * MIB)))
def test_any_sequence_keeps_the_books(operations: list[tuple[str, int]], capacity_bytes: int | None) -> None:
    allocator = CachingAllocator(capacity_bytes)
    live: list[int] = []
    for name, number in operations:
        if name == "alloc":
            refused = _refused_bytes(allocator, live, number)
            assert capacity_bytes is None or not refused or allocator.reserved_bytes + refused > capacity_bytes
            assert capacity_bytes is not None or not refused
        elif live:
            allocator.free(live.pop(number % len(live)))
        _check_invariants(allocator, live)
        assert capacity_bytes is None or allocator.reserved_bytes <= capacity_bytes
    for handle in live:
        allocator.free(handle)
    allocator.empty_cache()
    assert allocator.allocated_bytes == allocator.reserved_bytes == 0
    assert allocator.segments() == []


@settings(deadline=None, max_examples=50)
@given(st.lists(_SIZES, max_size=40))
def test_replay_is_deterministic_and_equals_the_calls(sizes: list[int]) -> None:
    events: list[Any] = [("alloc", i, n) for i, n in enumerate(sizes)] + [("free", i) for i in range(0, len(sizes), 2)]
    result = replay(events)
    assert result == replay(iter(events))
    allocator = CachingAllocator()
    handles = [allocator.malloc(n) for n in sizes]
    for handle in handles[::2]:
        allocator.free(handle)
    assert result.allocated_bytes == allocator.allocated_bytes
    assert result.reserved_bytes == result.peak_reserved_bytes == allocator.reserved_bytes
    assert result.peak_allocated_bytes == allocator.peak_allocated_bytes >= sum(sizes)


@pytest.mark.timing
def test_an_event_costs_little_more_with_many_blocks_alive() -> None:
    """A real step has ten thousand storages; a search through all of them would take 30 times as long."""

    def seconds(alive: int) -> float:
        draw = random.Random(0)
        allocator = CachingAllocator()
        live = [allocator.malloc(int(2 ** draw.uniform(4, 28))) for _ in range(alive)]
        start = time.perf_counter()
        for _ in range(5000):
            place = draw.randrange(alive)
            allocator.free(live[place])
            live[place] = allocator.malloc(int(2 ** draw.uniform(4, 28)))
        return time.perf_counter() - start

    assert min(seconds(15_000) for _ in range(3)) < 10 * min(seconds(500) for _ in range(3))
