"""What a saved run holds.

A run is one JSON file in pytest-benchmark's own format, so that its ``list`` and ``compare`` commands read it: timed
cases stand under ``benchmarks``, and everything else under one further key, `KEY`, which pytest-benchmark passes over.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

KEY = "peft_gauge"

# 1: cases with outcome and metrics, claims with verdicts.
# 2: measured cases run in a process of their own and can end in ways of their own; raw samples stand with the metrics.
# 3: the field's words: benchmark, metrics, inconclusive, mfu, mbu (`peft_gauge.history.upgrade` has the older ones).
VERSION = 3

CaseOutcome = Literal["passed", "failed", "skipped", "out-of-memory", "crashed", "timed-out", "interrupted"]

NOT_RUN: tuple[CaseOutcome, ...] = ("skipped", "interrupted")
"""How a case ends that answers nothing."""

SAMPLES = "sampled_seconds"
"""The metric under which raw times stand: metric -> one list of seconds for each process that measured it."""
CONTROL_SAMPLES = "sampled_control_seconds"
"""The same for the unchanged control, round by round beside `SAMPLES`."""


@dataclass
class CaseRecord:
    """One case of a run.

    ``id``: the test id; ``benchmark``: the module's name; ``outcome`` and, unless it passed, the ``reason``;
    ``metrics``: what was counted or measured, by name, units in the names.
    """

    id: str
    benchmark: str
    outcome: CaseOutcome
    reason: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Selection:
    """What a run was asked for, of all the cases that there are.

    ``args``: the paths and node ids on its command line, relative to the project's root, or where it looked without
    any; ``markers`` and ``keywords``: its expressions (``-m``, ``-k``); ``deselected``: the ids of cases that these, or
    the suite's own defaults, left out; ``None`` where several workers collected and nobody noted them.
    """

    args: tuple[str, ...]
    markers: str = ""
    keywords: str = ""
    deselected: frozenset[str] | None = None

    def covers(self, id_: str) -> bool:
        """Whether the case ``id_`` stands in one of the paths, or is one of the node ids or an instance of one."""
        return any(id_ == arg or id_.startswith((f"{arg}/", f"{arg}::", f"{arg}[")) for arg in self.args) or (
            "." in self.args
        )

    @property
    def expressions(self) -> str:
        """``-m 'not slow' -k lora``, as somebody would type it; empty where there were none."""
        given = {"-m": self.markers, "-k": self.keywords}
        return " ".join(f"{option} {shlex.quote(value)}" for option, value in given.items() if value)

    def as_json(self) -> dict[str, Any]:
        deselected = None if self.deselected is None else sorted(self.deselected)
        return {**asdict(self), "args": list(self.args), "deselected": deselected}


def as_json(
    cases: list[CaseRecord],
    claims: list[dict[str, Any]],
    options: dict[str, Any],
    *,
    interrupted: bool = False,
    resumed_from: str | None = None,
    selection: Selection | None = None,
) -> dict[str, Any]:
    """The value stored under `KEY`: schema version, options of the run, cases and claims.

    ``interrupted``: whether the run ended before all its cases; ``resumed_from``: the file whose cases it took over;
    ``selection``: which cases it was asked for, of all that there are.
    """
    return {
        "schema": VERSION,
        "options": options,
        "interrupted": interrupted,
        "resumed_from": resumed_from,
        "selection": None if selection is None else selection.as_json(),
        "cases": [asdict(case) for case in cases],
        "claims": claims,
    }
