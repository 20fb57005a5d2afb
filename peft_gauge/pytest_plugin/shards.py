"""``--shard i/n``: run the i-th of n parts of the collected tests, for several machines that share one run.

The tests of a case stay together, since one process measures the case for all of them; each other test is a group of
its own. The heaviest group goes to the lightest shard, again and again. Weights and order come from markers and test
ids only: neither an earlier run, nor what the machine has in its caches, nor Python's hash seed changes the parts.
``peft-gauge merge`` joins the saved shards.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import pytest

from peft_gauge.errors import GaugeError, one_line
from peft_gauge.history.schema import Shards
from peft_gauge.pytest_plugin.workload import MEASURES, job_of, passes_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

LEFT_TO_OTHERS = pytest.StashKey[frozenset[str]]()
"""The ids of the collected tests that are in other shards."""

# Seconds on a CPU with two cores, roughly: only their ratios matter.
PROCESS_SECONDS = 4.0
PASS_SECONDS = 2.0
SHAPES_SECONDS = 3.0
SLOW_SECONDS = 60.0
OTHER_SECONDS = 0.5


class Shard(NamedTuple):
    """The ``number``-th of ``of`` parts, from 1 on."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def shard_of(config: pytest.Config) -> Shard | None:
    """The shard of ``--shard``, ``None`` without it. Raises `GaugeError` unless it is i/n with 1 ≤ i ≤ n."""
    given = config.getoption("--shard")
    if given is None:
        return None
    match = re.fullmatch(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})", given)
    if match is None:
        raise GaugeError(f"--shard must be i/n, such as 2/4 for the second of four, not {one_line(given, 40)!r}")
    number, of = map(int, match.groups())
    if number > of:
        raise GaugeError(f"--shard {number}/{of}: the last of {of} shards is {of}/{of}")
    return Shard(number, of)


def parts(items: Iterable[pytest.Item], count: int) -> list[list[pytest.Item]]:
    """``items`` in ``count`` disjoint parts of about equal weight, each in the order of ``items``."""
    items = list(items)
    groups: dict[Hashable, list[pytest.Item]] = {}
    for item in items:
        job = job_of(item, split=False)
        groups.setdefault(item.nodeid if job is None else job, []).append(item)
    by_weight = sorted(groups.values(), key=lambda group: (-_seconds(group), min(item.nodeid for item in group)))
    loads = [0.0] * count
    places: dict[int, int] = {}
    for group in by_weight:
        lightest = loads.index(min(loads))
        loads[lightest] += _seconds(group)
        places |= {id(item): lightest for item in group}
    return [[item for item in items if places[id(item)] == place] for place in range(count)]


def _seconds(group: Sequence[pytest.Item]) -> float:
    """The weight of tests that share a process, or of one test."""
    slow = SLOW_SECONDS * sum(item.get_closest_marker("slow") is not None for item in group)
    if job_of(group[0], split=False) is None:
        return slow or OTHER_SECONDS
    passes = {name for item in group for name in passes_of(item)}
    shapes = any(marker.kwargs.get("shapes", False) for item in group for marker in item.iter_markers(MEASURES))
    return slow + PROCESS_SECONDS + PASS_SECONDS * len(passes) + SHAPES_SECONDS * shapes


def record_of(config: pytest.Config) -> Shards | None:
    """This session's shard for the saved run; ``None`` without ``--shard``."""
    shard = shard_of(config)
    # With -n the workers collect, and the process that saves the run does not see what they left out.
    return None if shard is None else Shards((shard.number,), shard.of, config.stash.get(LEFT_TO_OTHERS, None))
