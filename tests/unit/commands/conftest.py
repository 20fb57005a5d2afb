"""What several tests of commands need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from peft_gauge.plan import worker
from tests.support.planted_cases import plan_in_process

if TYPE_CHECKING:
    from peft_gauge.plan.record import PlanRequest


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[PlanRequest]:
    """The requests that a plan makes, in place of planning them in processes."""
    found: list[PlanRequest] = []

    def plan_in_parallel(requests: Any, waiting: Any = None) -> Any:
        found.extend(requests)
        return plan_in_process(requests)

    monkeypatch.setattr(worker, "plan_in_parallel", plan_in_parallel)
    return found
