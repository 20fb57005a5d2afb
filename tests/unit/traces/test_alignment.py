"""The alignment against every alignment there is, and its two ways of filling the table against each other."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_gauge.traces import alignment
from peft_gauge.traces.alignment import SAME_LIFE, SAME_SITE, SAME_SIZE, Key, align, comparable, weight

KEYS = st.builds(Key, st.sampled_from([512, 1024, 1536]), st.sampled_from(["", "a.py:f", "b.py:g"]), st.booleans())


def total(left: list[Key], right: list[Key], pairs: list[tuple[int, int]]) -> int:
    left, right = comparable(left, right)
    return sum(weight(left[i], right[j]) for i, j in pairs)


def best_of_all(left: list[Key], right: list[Key]) -> int:
    """The greatest total over all choices of as many positions on either side."""
    left, right = comparable(left, right)
    most = 0
    for number in range(1, min(len(left), len(right)) + 1):
        for rows in itertools.combinations(range(len(left)), number):
            for columns in itertools.combinations(range(len(right)), number):
                weights = [weight(left[i], right[j]) for i, j in zip(rows, columns, strict=True)]
                if all(weights):
                    most = max(most, sum(weights))
    return most


@given(st.lists(KEYS, max_size=5), st.lists(KEYS, max_size=5))
def test_no_alignment_is_better(left: list[Key], right: list[Key]) -> None:
    pairs = align(left, right)
    assert total(left, right, pairs) == best_of_all(left, right)
    assert all(left[i].nbytes == right[j].nbytes for i, j in pairs)
    assert pairs == sorted(pairs)
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)


@settings(max_examples=50)
@given(st.lists(KEYS, max_size=40), st.lists(KEYS, max_size=40))
def test_a_table_that_is_halved_finds_as_good_a_one(left: list[Key], right: list[Key]) -> None:
    whole = total(left, right, align(left, right))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment, "MOST_CELLS", 16)
        assert total(left, right, align(left, right)) == whole


def test_the_site_decides_between_equal_sizes_and_the_life_after_it() -> None:
    silu, mul = Key(512, "functional.py:silu", True), Key(512, "modeling.py:forward", True)
    assert align([mul], [silu, mul]) == [(0, 1)]
    assert align([mul._replace(site="")], [silu._replace(outlives=False), mul]) == [(0, 1)]
    assert 2 * SAME_SIZE > SAME_SIZE + SAME_SITE + SAME_LIFE  # a second pair is worth more than the first one's site


def test_two_known_sites_are_no_pair_and_one_that_a_side_has_not_may_be_any() -> None:
    silu, mul = Key(512, "functional.py:silu", True), Key(512, "modeling.py:forward", True)
    assert align([silu, mul], [mul, silu]) in ([(0, 1)], [(1, 0)])
    assert align([silu, mul], [silu._replace(site="renamed.py:swish"), mul]) == [(0, 0), (1, 1)]


def test_nothing_is_paired_with_another_size() -> None:
    assert align([Key(512, "a", True)], [Key(1024, "a", True)]) == []
    assert align([], [Key(512, "", True)]) == []


def test_many_equal_layers_with_one_allocation_more_are_aligned_around_it() -> None:
    layer = [Key(512 * size, f"line {size}", size % 2 == 0) for size in range(1, 41)]
    left, right = layer * 200, layer * 200
    extra = Key(512 * 7, "a line that the other has not", True)
    right = [*right[:5000], extra, *right[5000:]]
    pairs = align(left, right)
    assert len(pairs) == len(left) == 8000
    assert {j for _, j in pairs} == set(range(len(right))) - {5000}
