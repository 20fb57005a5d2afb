"""Plan many steps, all or none: for a table or a picture, every plan is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_gauge.errors import GaugeError
from peft_gauge.plan import worker
from peft_gauge.plan.record import Plan, PlanFailure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from peft_gauge.plan.record import PlanRequest


def sweep(requests: Sequence[PlanRequest], made: Callable[[], object] = lambda: None) -> list[Plan]:
    """The plans of ``requests``, in their order, from one planning process; ``made`` is called after each.

    Raises `GaugeError` for the first case that cannot be planned.
    """
    plans = []
    for outcome in worker.plan_all(requests):
        plans.append(_succeeded(outcome))
        made()
    return plans


def _succeeded(outcome: object) -> Plan:
    if isinstance(outcome, PlanFailure):
        raise GaugeError(outcome.error)
    assert isinstance(outcome, Plan)  # there is no search, so there is no `Found`
    return outcome
