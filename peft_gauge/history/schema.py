"""The contents of a saved run.

A run is one JSON file in pytest-benchmark's own format, so its ``list`` and ``compare`` commands can read it: timed
cases are under ``benchmarks``, and everything else under one further key, `KEY`, which pytest-benchmark ignores.
"""

from __future__ import annotations

import shlex
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
class Selection:
    """The selection of cases that a run was started with.

    ``args``: the paths and node ids on its command line, relative to the project's root, or the default paths;
    ``markers`` and ``keywords``: its expressions (``-m``, ``-k``); ``deselected``: the ids of cases that these, or the
    suite's own defaults, deselected; ``None`` if several workers collected, which do not report them.
    """

    args: tuple[str, ...]
    markers: str = ""
    keywords: str = ""
    deselected: frozenset[str] | None = None

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

    ``interrupted``: whether the run ended before all its cases; ``resumed_from``: the file of the run that it resumes;
    ``selection``: the cases that it was to run.
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
