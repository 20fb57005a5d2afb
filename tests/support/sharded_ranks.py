"""The same sharded steps in real processes (`tests.support.sharded_child`) and on fakes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_gauge.counting import count
from peft_gauge.plan import adaptation, fakes
from peft_gauge.plan.planner import stepping
from peft_gauge.plan.sharded_step import follow_sharded
from tests.support.forked import forked
from tests.support.sharded_child import described, request

if TYPE_CHECKING:
    from peft_gauge.isolation import ProcessOutcome


def run_ranks(cases: Sequence[tuple[str, str, dict[str, Any]]], ranks: int, folder: Path) -> None:
    """`tests.support.sharded_child.run_rank` in as many processes as ``ranks``, which meet in ``folder``."""

    def run(rank: int) -> ProcessOutcome:
        return forked("tests.support.sharded_child:run_rank", rank, ranks, str(folder), cases)

    with ThreadPoolExecutor(ranks) as pool:
        outcomes = list(pool.map(run, range(ranks)))
    assert [outcome.ended for outcome in outcomes] == ["done"] * ranks, [outcome.reason for outcome in outcomes]


def traces_of_real_ranks(
    cases: Sequence[tuple[str, str, dict[str, Any]]], ranks: int, folder: Path
) -> list[list[dict[str, Any]]]:
    """By rank, the trace of each case: method, strategy and settings."""
    run_ranks(cases, ranks, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def trace_on_fakes(method: str, strategy: str, settings: dict[str, Any], ranks: int) -> dict[str, Any]:
    asked = request(method, strategy, ranks, settings)
    adapted = adaptation.adapt(asked, [])
    mode = fakes.fake_mode()
    made = fakes.to_fake(adapted.model, mode)
    base = [made[key] for key in adapted.base_parameters]
    with mode, stepping(asked, adapted.model, []):
        return described(follow_sharded(asked, adapted.model, base, count(adapted.model), []))


def assert_same_rank(planned: dict[str, Any], real: dict[str, Any], late_bytes: int) -> None:
    """To the byte, but for ``late_bytes`` at the peak: gloo's thread can release the last buffers of a collective late,
    which then count in the peak of a real rank."""
    (peak, categories, phase), (most, of_categories, when) = planned["peak"], real["peak"]
    different = ("peak", "resident")
    assert without(planned, different) == without(real, different)
    assert without_buffers(planned["resident"]) == without_buffers(real["resident"])
    if most == peak:
        assert (categories, phase) == (of_categories, when)
    assert peak <= most <= peak + late_bytes


def without(trace: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: fact for name, fact in trace.items() if name not in names}


def without_buffers(resident: list[Any]) -> dict[str, int]:
    """The bytes between two steps by category, without those that gloo's thread may still hold."""
    return {name: nbytes for name, nbytes in resident[1].items() if name not in ("communication_buffers", "other")}
