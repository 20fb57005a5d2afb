"""Sweeps as tables: what is shown is what was recorded, to the digit, and what was not measured is a dash."""

from __future__ import annotations

from typing import Any

import pytest

from peft_gauge.history.schema import CaseRecord
from peft_gauge.report.terminal import sweep_table


def point(label: str, **metrics: Any) -> dict[str, Any]:
    about = {"quality": 0.98765, "quality_low": 0.9, "quality_high": 1.0, "seeds": 3, "diverged": 0}
    return (
        {"label": label, "trainable_params": 1_843_200, "peak_bytes": 736_456_789, "step_seconds": 0.78961}
        | about
        | metrics
    )


def training(label: str, seed: int, rate: float | None) -> dict[str, Any]:
    return {"label": label, "seed": seed, "search": {"tried": [], "chosen": rate, "at_edge": False}}


SWEEP: dict[str, Any] = {
    "model": "toy",
    "task": "planted",
    "pareto": [
        point("r16"),
        point("r2", peak_bytes=None, quality=None, quality_low=None, quality_high=None, diverged=1),
    ],
    "trainings": [training("r16", seed, 3e-3) for seed in range(3)] + [training("r2", 0, None)],
    "knees": {
        "trainable_params": {"knee": "r16", "knee_share": 0.724, "seeds": 3},
        "peak_bytes": {"knee": None, "knee_share": 0.5805, "seeds": 3},
    },
}


def case(**metrics: Any) -> CaseRecord:
    return CaseRecord("benchmarks/test_rank_sweep.py::test_rank", "test_rank_sweep", "passed", None, SWEEP | metrics)


def test_every_figure_is_there_to_its_last_digit() -> None:
    headings, lines = sweep_table.told(SWEEP)
    assert headings == ["setting", "trainable", "peak", "step", "learning rate", "quality", "over seeds", "diverged"]
    assert lines == [
        ["r16", "1,843,200", "736.46 MB", "789.61 ms", "0.003", "0.9877", "0.9000 to 1.0000", "0 of 3"],
        ["r2", "1,843,200", "–", "789.61 ms", "–", "–", "–", "1 of 3"],
    ]


def test_costs_are_those_that_the_sweep_has() -> None:
    points = [{"label": "rank 4", "update_params": 1024, "quality": 0.5, "seeds": 1, "diverged": 0}]
    headings, lines = sweep_table.told({"pareto": points})
    assert headings == ["setting", "update", "quality", "over seeds", "diverged"]
    assert lines == [["rank 4", "1,024", "0.5000", "–", "0 of 1"]]


def test_where_nothing_was_trained_there_are_no_rates_and_seeds() -> None:
    points = [{"label": "[b]switching", "held_bytes": 567_549_312, "quality": 0.9321}]
    metrics = {"pareto": points, "quality_is": "rows per forward of the base"}
    served = CaseRecord("benchmarks/test_many.py::test_ways[lora-64]:x:", "test_many", "passed", None, metrics)
    assert sweep_table.told(metrics) == (["setting", "held", "quality"], [["[b]switching", "567.55 MB", "0.9321"]])
    text = sweep_table.summary([served])
    assert text.splitlines()[0].strip() == "test_ways[lora-64]:x:"
    assert "quality: rows per forward of the base, higher is better" in " ".join(text.split())
    assert "│ [b]switching │" in text
    assert "seeds" not in text


def test_a_setting_that_was_searched_twice_shows_both_rates() -> None:
    _, lines = sweep_table.told(SWEEP | {"trainings": [training("r16", 0, 1e-3), training("r16", 1, 3.2e-5)]})
    assert lines[0][4] == "0.001, 3.2e-05"


def test_the_knee_is_told_with_its_share_and_none_is_said() -> None:
    text = sweep_table.summary([case()])
    assert "knee, with the share of resamples of seeds, by trainable: r16 in 72 %; by peak: none in 58 %" in " ".join(
        text.split()
    )
    assert text.splitlines()[0].strip() == "test_rank: toy, planted"


def test_of_one_seed_the_knee_has_no_share() -> None:
    """One seed resampled is that seed: "in 100 %" would look sure."""
    one = {"trainable_params": {"knee": "r16", "knee_share": 1.0, "seeds": 1}}
    told = sweep_table.knees(case(knees=one | {"peak_bytes": {"knee": None, "knee_share": 1.0, "seeds": 1}}))
    assert told == "knee of one seed by trainable: r16; by peak: none"


@pytest.mark.parametrize(
    ("quality", "told"),
    [
        (1.8702e-11, "1.9e-11"),
        (0.0000499, "5.0e-05"),
        (-0.00002, "-2.0e-05"),
        (0.00005, "0.0001"),
        (0.00016, "0.0002"),
        (0.0, "0.0000"),
    ],
)
def test_a_quality_that_is_not_0_never_reads_as_0(quality: float, told: str) -> None:
    points = [point("r2", quality=quality, quality_low=quality, quality_high=0.5)]
    _, (line,) = sweep_table.told({"pareto": points})
    assert line[4:6] == [told, f"{told} to 0.5000"]


def test_a_case_that_swept_nothing_has_no_table() -> None:
    assert sweep_table.summary([case(pareto=[]), CaseRecord("a", "a", "skipped", "no weights", {})]) == ""
