"""Plan many steps, all or none: for a table or a picture, every plan is needed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from peft_gauge.errors import GaugeError
from peft_gauge.plan import worker
from peft_gauge.plan.record import Plan, PlanFailure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft_gauge.plan.record import PlanRequest


def sweep(requests: Sequence[PlanRequest]) -> list[Plan]:
    """The plans of ``requests``, in their order, from one planning process, with progress on a terminal.

    Raises `GaugeError` for the first case that cannot be planned.
    """
    if not sys.stderr.isatty():
        return [_succeeded(outcome) for outcome in worker.plan_all(requests)]
    with typer.progressbar(worker.plan_all(requests), len(requests), "planning", file=sys.stderr) as outcomes:
        return [_succeeded(outcome) for outcome in outcomes]


def _succeeded(outcome: object) -> Plan:
    if isinstance(outcome, PlanFailure):
        raise GaugeError(outcome.error)
    assert isinstance(outcome, Plan)  # there is no search, so there is no `Found`
    return outcome
