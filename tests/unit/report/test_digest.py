"""The digest of a run: at most 20 lines of 80 columns, with the saved figures to their last digit."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest

from peft_gauge.history.schema import CaseRecord
from peft_gauge.report.format import time_left
from peft_gauge.report.terminal.digest import LINES, WIDTH, Ending, digest, together
from tests.support.facts import lacking

SETTINGS = {"batch": 1, "seq": 64, "dtype": "float32", "weights": "random"}
METHODS = ("full", "lora", "qlora", "bottleneck", "prefix", "prompt", "ia3")


def case(method: str, outcome: Any = "passed", reason: str | None = None, **metrics: Any) -> CaseRecord:
    about = {"method": method, "model": "toy", "device": "cpu", "settings": SETTINGS}
    return CaseRecord(f"benchmarks/test_x.py::test[{method}]", "test_x", outcome, reason, {**about, **metrics})


def measured(method: str, **metrics: Any) -> CaseRecord:
    known = {
        "trainable_params": 14_336,
        "tensor_peak_bytes": 1_420_000,
        "planned_peak_bytes": 1_500_000,
        "step_seconds": 0.0123456,
        "step_over_control": 2.875,
    }
    return case(method, **{**known, **metrics})


def skipped(number: int, reason: str) -> list[CaseRecord]:
    return [CaseRecord(f"benchmarks/test_y.py::test[{each}]", "test_y", "skipped", reason) for each in range(number)]


def flat(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


def test_a_row_has_the_saved_figures() -> None:
    title, headings, row = digest([measured("lora")], [], Ending())
    assert title == "toy on cpu, 1×64 tokens, float32, random weights"
    assert headings.split() == ["method", "trainable", "peak", "of", "plan", "step", "step/forward"]
    assert row.split() == ["lora", "14,336", "1.42", "MB", "94.7", "%", "12.35", "ms", "2.88"]


def test_an_absent_figure_is_a_dash_and_an_absent_column_is_left_out() -> None:
    without = {"planned_peak_bytes": None, "step_over_control": None}
    _, headings, full, lora = digest(
        [measured("full", **without), measured("lora", **without, step_seconds=None)], [], Ending()
    )
    assert headings.split() == ["method", "trainable", "peak", "step"]
    assert full.split()[-2:] == ["12.35", "ms"]
    assert lora.split()[-1] == "–"


@pytest.mark.parametrize("width", [80, 120])
def test_the_largest_digest_fits(width: int) -> None:
    busy = [f"other processes took {percent} % of 2 cores" for percent in (65.3, 77.3)]
    cases = [measured(method, unsteady=busy) for method in METHODS]
    cases += [case(method, "failed", "AssertionError: " + "word " * 90) for method in METHODS]
    cases += [record for number in range(9) for record in skipped(2, f"kind {number}: " + "reason " * 40)]
    cases += [case("lora", plan={"peak_bytes": 1}), CaseRecord("x", "x", "passed", None, {"published": 1})]
    claims = [{"verdict": verdict} for verdict in ("holds", "refuted", "not measured yet")]
    notes = ["compared with 0001_x.json: 1 worse, 0 inconclusive, 2 better, 14 same"]
    lines = digest(cases, claims, Ending(notes, "results/machine/0002_x.json", ["next: peft-gauge report"]), width)

    assert len(lines) <= LINES
    assert max(map(len, lines)) <= WIDTH
    assert (
        lacking(
            flat(lines),
            "7 of 7 methods: other processes took 65.3 to 77.3 % of",
            "  full *".strip(),
            "failed: test_x.py::test[full]: AssertionError",
            "and 4 more that did not pass",
            "2 skipped: kind 0",
            "and 14 more skipped for other reasons",
            "claims: holds 1, refuted 1, not measured yet 1",
            "1 worse, 0 inconclusive, 2 better, 14 same",
            "saved results/machine/0002_x.json",
        )
        == []
    )
    assert lines[-1] == "next: peft-gauge report"
    shown = [line.split()[0] for line in lines if line.endswith(" 2.88")]
    assert shown == list(METHODS[: len(shown)])
    assert f"  and {len(METHODS) - len(shown)} more rows (--details)" in lines


def test_seven_methods_with_the_usual_ending_are_all_shown() -> None:
    cases = [*(measured(method, unsteady=["busy"]) for method in METHODS), *skipped(31, "no real weights")]
    lines = digest(cases, [{"verdict": "holds"}], Ending(saved="a.json", advice=["next: peft-gauge report"]))
    assert [line.split()[0] for line in lines[2:9]] == list(METHODS)


def test_rows_without_room_are_counted() -> None:
    cases = [measured(f"lora-r{rank}") for rank in range(30)]
    lines = digest(cases, [], Ending(saved="a.json"))
    assert len(lines) == LINES
    assert lines[-2:] == ["  and 14 more rows (--details)", "saved a.json"]


def test_skips_of_one_kind_are_one_group() -> None:
    decided = [skipped(1, f"decided by pytest -m slow benchmarks/test_{name}.py: {name}") for name in "abc"]
    same = skipped(2, "no real weights; run: peft-gauge fetch smollm2")
    assert digest([*chain(*decided), *same], [], Ending()) == [
        "3 skipped: decided by pytest -m slow",
        "2 skipped: no real weights; run: peft-gauge fetch smollm2",
    ]


def test_a_long_path_stays_in_one_piece() -> None:
    path = "/tmp/" + "folder/" * 20 + "0001.json"
    assert digest([], [], Ending(["budget: 3 of 9 s used"], path)) == ["budget: 3 of 9 s used", f"saved {path}"]


def test_reasons_that_differ_in_numbers_are_joined() -> None:
    reasons = ["took 9.5 % of 2 cores", "throttled", "took 77.3 % of 2 cores", "took 65 % of 2 cores"]
    assert together(reasons) == ["took 9.5 to 77.3 % of 2 cores", "throttled"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "about 5 s"), (41, "about 40 s"), (130, "about 2 min"), (5000, "about 83 min"), (9000, "about 2.5 h")],
)
def test_time_left(seconds: float, words: str) -> None:
    assert time_left(seconds) == f"{words} left"
