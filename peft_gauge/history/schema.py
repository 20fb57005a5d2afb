"""What a saved run holds.

A run is one JSON file in pytest-benchmark's own format, so that its ``list`` and ``compare`` commands read it: timed
cases stand under ``benchmarks``, and everything else under one further key, `KEY`, which pytest-benchmark passes over.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

KEY = "peft_gauge"

# 1: cases with outcome and figures, claims with verdicts.
# 2: measured cases run in a process of their own and can end in ways of their own; raw samples stand with the figures.
VERSION = 2

Outcome = Literal["passed", "failed", "skipped", "out-of-memory", "crashed", "timed-out", "interrupted"]

SAMPLES = "sampled_seconds"
"""The figure under which raw times stand: metric -> one list of seconds for each process that measured it."""
CONTROL_SAMPLES = "sampled_control_seconds"
"""The same for the unchanged control, round by round beside `SAMPLES`."""


@dataclass
class CaseRecord:
    """One case of a run.

    ``id``: the test id; ``question``: the module's name; ``outcome`` and, unless it passed, the ``reason``;
    ``figures``: what was counted or measured, by name, units in the names.
    """

    id: str
    question: str
    outcome: Outcome
    reason: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)


def as_json(
    cases: list[CaseRecord],
    claims: list[dict[str, Any]],
    options: dict[str, Any],
    *,
    interrupted: bool = False,
    resumed_from: str | None = None,
) -> dict[str, Any]:
    """The value stored under `KEY`: schema version, options of the run, cases and claims.

    ``interrupted``: whether the run ended before all its cases; ``resumed_from``: the file whose cases it took over.
    """
    return {
        "schema": VERSION,
        "options": options,
        "interrupted": interrupted,
        "resumed_from": resumed_from,
        "cases": [asdict(case) for case in cases],
        "claims": claims,
    }
