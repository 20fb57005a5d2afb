"""Addresses of fakes: those that the caching allocator would hand out."""

from __future__ import annotations

import torch

from peft_gauge.memory.tracker import StorageTracker
from peft_gauge.plan import fakes
from peft_gauge.plan.addresses import Addresses

MEGABYTE = 2**20


def test_a_freed_block_is_handed_out_again_and_a_live_one_is_not() -> None:
    tracker = StorageTracker()
    addresses = Addresses(tracker)
    with fakes.fake_mode(), tracker:
        kept = torch.empty(30 * MEGABYTE, dtype=torch.uint8)
        freed = torch.empty(30 * MEGABYTE, dtype=torch.uint8)
        first, second = (addresses.of(each.untyped_storage()) for each in (kept, freed))
        assert first != second
        del freed
        again = torch.empty(30 * MEGABYTE - 512, dtype=torch.uint8)
        other = torch.empty(30 * MEGABYTE, dtype=torch.uint8)
        assert addresses.of(again.untyped_storage()) == second, "the block has just room for it"
        assert addresses.of(other.untyped_storage()) not in (first, second)
        assert addresses.of(kept[7:].untyped_storage()) == first, "a view has its storage's"
    tracker.close()


def test_what_was_asked_for_before_it_was_tracked_keeps_its_address() -> None:
    tracker = StorageTracker()
    addresses = Addresses(tracker)
    with fakes.fake_mode():
        weight = torch.empty(MEGABYTE)
        before = addresses.of(weight.untyped_storage())
        tracker.adopt(weight, "base_weights")
        with tracker:
            made = torch.empty(MEGABYTE)
            assert addresses.of(weight.untyped_storage()) == before != addresses.of(made.untyped_storage())
            tracker.start_over()
            assert addresses.of(weight.untyped_storage()) == before
            assert addresses.of(made.untyped_storage()) != before
    tracker.close()
