"""The contents of a saved run.

A run is one JSON file in pytest-benchmark's own format, so its ``list`` and ``compare`` commands can read it: timed
cases are under ``benchmarks``, and everything else under one further key, `KEY`, which pytest-benchmark ignores.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

KEY = "peft_gauge"

# 1: cases with outcome and metrics, claims with verdicts.
# 2: measured cases run in a process of their own, with further outcomes; raw samples are among the metrics.
# 3: the field's words: benchmark, metrics, inconclusive, mfu, mbu (`peft_gauge.history.upgrade` has the older ones).
VERSION = 3

CaseOutcome = Literal["passed", "failed", "skipped", "out-of-memory", "crashed", "timed-out", "interrupted"]

NOT_RUN: tuple[CaseOutcome, ...] = ("skipped", "interrupted")
"""The outcomes of a case without a result."""

SAMPLES = "sampled_seconds"
"""The metric with the raw times: metric -> one list of seconds per process that measured it."""
CONTROL_SAMPLES = "sampled_control_seconds"
"""The same for the unchanged control, with one time per round of `SAMPLES`."""


@dataclass
class CaseRecord:
    """One case of a run.

    ``id``: the test id; ``benchmark``: the module's name; ``outcome`` and, unless it passed, the ``reason``;
    ``metrics``: the counted and measured values by name; the names contain the units.
    """

    id: str
    benchmark: str
    outcome: CaseOutcome
    reason: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shards:
    """The shards (``pytest --shard i/n``) that a saved run consists of, if these are not all.

    ``held``: their numbers, ascending from 1; ``of``: the number of shards; ``left_out``: the ids of the cases that
    only other shards have; ``None`` if several workers collected, which do not report them.
    """

    held: tuple[int, ...]
    of: int
    left_out: frozenset[str] | None = None

    @property
    def name(self) -> str:
        """``shard 2/4`` or ``shards 1, 3 of 4``."""
        if len(self.held) == 1:
            return f"shard {self.held[0]}/{self.of}"
        return f"shards {', '.join(map(str, self.held))} of {self.of}"

    @property
    def missing(self) -> tuple[int, ...]:
        """The numbers of the other shards."""
        return tuple(number for number in range(1, self.of + 1) if number not in self.held)

    def as_json(self) -> dict[str, Any]:
        left_out = None if self.left_out is None else sorted(self.left_out)
        return {"held": list(self.held), "of": self.of, "left_out": left_out}


@dataclass(frozen=True)
class Selection:
    """The selection of cases that a run was started with.

    ``args``: the paths and node ids on its command line, relative to the project's root, or the default paths;
    ``markers`` and ``keywords``: its expressions (``-m``, ``-k``); ``deselected``: the ids of cases that these, or the
    suite's own defaults, deselected; ``None`` if several workers collected, which do not report them; ``shards``:
    the part of the selection that the run holds, ``None`` for all of it.
    """

    args: tuple[str, ...]
    markers: str = ""
    keywords: str = ""
    deselected: frozenset[str] | None = None
    shards: Shards | None = None

    def covers(self, id_: str) -> bool:
        """Whether the case ``id_`` is in one of the paths, or is one of the node ids or an instance of one."""
        return any(id_ == arg or id_.startswith((f"{arg}/", f"{arg}::", f"{arg}[")) for arg in self.args) or (
            "." in self.args
        )

    @property
    def expressions(self) -> str:
        """``-m 'not slow' -k lora``, as on a command line; empty if there were none."""
        given = {"-m": self.markers, "-k": self.keywords}
        return " ".join(f"{option} {shlex.quote(value)}" for option, value in given.items() if value)

    def as_json(self) -> dict[str, Any]:
        deselected = None if self.deselected is None else sorted(self.deselected)
        shards = {} if self.shards is None else {"shards": self.shards.as_json()}
        return {
            "args": list(self.args),
            "markers": self.markers,
            "keywords": self.keywords,
            "deselected": deselected,
            **shards,
        }


def as_json(
    cases: list[CaseRecord],
    claims: list[dict[str, Any]],
    options: dict[str, Any],
    *,
    interrupted: bool = False,
    resumed_from: str | None = None,
    merged_from: Sequence[str] = (),
    selection: Selection | None = None,
) -> dict[str, Any]:
    """The value stored under `KEY`: schema version, options of the run, cases and claims.

    ``interrupted``: whether the run ended before all its cases; ``resumed_from``: the file of the run that it resumes;
    ``merged_from``: the files of the shards that it joins; ``selection``: the cases that it was to run.
    """
    merged = {"merged_from": list(merged_from)} if merged_from else {}
    return {
        "schema": VERSION,
        "options": options,
        "interrupted": interrupted,
        "resumed_from": resumed_from,
        **merged,
        "selection": None if selection is None else selection.as_json(),
        "cases": [asdict(case) for case in cases],
        "claims": claims,
    }
