"""``--shard i/n`` splits a grid into parts that are disjoint, complete, balanced, and the same everywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from peft_gauge.errors import GaugeError
from peft_gauge.pytest_plugin.shards import Shard, parts, shard_of
from tests.support.paths import ROOT
from tests.unit.pytest_plugin.test_workload import item, measuring

METHODS = ("full", "lora", "qlora", "bottleneck", "prefix", "prompt", "ia3")
PROGRAM = """
from tests.unit.pytest_plugin.test_shards import grid, ids
from peft_gauge.pytest_plugin.shards import parts
print(ids(parts(grid(), 3)))
"""


def grid() -> list[Any]:
    """Seven cases of three tests each, their tests apart, and ten tests without a case."""
    kinds = {"test_peak": ("memory",), "test_step": ("speed",), "test_same": ("fingerprint",)}
    measured = [
        measuring(method, *passes, name=f"{name}[{method}]") for name, passes in kinds.items() for method in METHODS
    ]
    return [*measured[:9], *(item(name=f"test_other[{number}]") for number in range(10)), *measured[9:]]


def ids(found: list[list[Any]]) -> list[list[str]]:
    return [[each.nodeid for each in part] for part in found]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 17, 40])
def test_every_test_is_in_one_part_with_all_tests_of_its_case(count: int) -> None:
    tests = grid()
    found = parts(tests, count)

    assert len(found) == count
    assert Counter(id(each) for part in found for each in part) == Counter(map(id, tests))
    places = {each.nodeid: place for place, part in enumerate(found) for each in part}
    for method in METHODS:
        assert len({place for name, place in places.items() if name.endswith(f"[{method}]")}) == 1
    order = {id(each): place for place, each in enumerate(tests)}
    assert all([order[id(each)] for each in part] == sorted(order[id(each)] for each in part) for part in found)


def test_parts_are_balanced() -> None:
    for count in (2, 3, 5):
        found = parts(grid(), count)
        cases = [sum("test_peak" in each.nodeid for each in part) for part in found]
        assert max(cases) - min(cases) <= 1
    # Ten tests without a case weigh less than a case: they go where a case is missing.
    found = parts(grid(), 4)
    others = [sum("test_other" in each.nodeid for each in part) for part in found]
    cases = [sum("test_peak" in each.nodeid for each in part) for part in found]
    assert sorted(cases) == [1, 2, 2, 2]
    assert others[cases.index(1)] == 10


def test_a_slow_test_weighs_more_than_a_case() -> None:
    slow = item(pytest.mark.slow, name="test_slow")
    found = parts([measuring("lora", "speed"), measuring("ia3", "speed"), slow], 2)
    assert sorted(len(part) for part in found) == [1, 2]
    assert [slow] in found


def test_neither_hash_seed_nor_order_of_collection_changes_the_parts() -> None:
    expected = ids(parts(grid(), 3))  # with this process's seed
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(expected)
    assert [sorted(part) for part in ids(parts(grid()[::-1], 3))] == [sorted(part) for part in expected]


def config(given: str | None) -> Any:
    return SimpleNamespace(getoption={"--shard": given}.__getitem__)


def test_the_option_is_a_number_of_a_number() -> None:
    assert shard_of(config("2/4")) == Shard(2, 4)
    assert shard_of(config(None)) is None


@pytest.mark.parametrize(
    "given", ["0/4", "5/4", "x", "", "1/0", "1", "1/2/3", "-1/4", "1/4 ", "02/4", "٢/٤", "1/9999999"]
)
def test_anything_else_is_refused_with_the_option_and_the_input(given: str) -> None:
    with pytest.raises(GaugeError, match="--shard") as refusal:
        shard_of(config(given))
    assert given.strip() in str(refusal.value)
