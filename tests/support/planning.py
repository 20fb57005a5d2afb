"""Plans of the command line in the tests' own process, which has imported the libraries already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from peft_gauge.plan import worker

if TYPE_CHECKING:
    import pytest

    from peft_gauge.plan.record import PlanRequest


def plan_here(monkeypatch: pytest.MonkeyPatch) -> list[PlanRequest]:
    """Plan in this process, one after the other, in place of worker processes; returns the requests, as they come."""
    asked: list[PlanRequest] = []

    def plan_all(requests: Sequence[PlanRequest], *, find: str | None = None, searching: Any = None) -> Iterator[Any]:
        asked.extend(requests)
        for request in requests:
            yield from worker._outcome(request, find)

    monkeypatch.setattr(worker, "plan_all", plan_all)
    # Several workers are several processes; two plans in one process would share its fake mode.
    monkeypatch.setattr(worker, "plan_in_parallel", lambda requests, waiting=None: list(plan_all(requests)))
    return asked
