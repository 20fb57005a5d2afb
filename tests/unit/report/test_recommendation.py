"""Which method to use, from setups with known numbers: the rule, its ties, and the data that do not decide."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from peft_gauge.history.rules import read_rules
from peft_gauge.report.html.page_data import gather
from peft_gauge.report.html.recommendation import fastest_of, recommend
from peft_gauge.report.html.setups import MethodResult, Quality, Ratio, Setup, setups_of
from tests.support.paths import RESULTS


def quality(mean: float, low: float, high: float, seeds: int = 3, diverged: int = 0) -> Quality:
    return Quality("calendar", mean, low, high, seeds, diverged, "0004")


def method(name: str, **more: Any) -> MethodResult:
    return MethodResult(name, name, **more)


def setup(*methods: MethodResult, source: str = "measured") -> Setup:
    when = datetime(2026, 1, 1, tzinfo=UTC)
    return Setup("toy on cpu", "box", "toy", source, when, list(methods))


GOOD, FAIR, POOR = quality(0.9, 0.85, 0.95), quality(0.8, 0.7, 0.9), quality(0.2, 0.1, 0.3)


def test_of_methods_whose_seeds_overlap_the_smallest_is_recommended() -> None:
    found = recommend(
        setup(
            method("full", quality=quality(0.99, 0.98, 1.0), peak_bytes=8_000_000_000, ratio=Ratio(6.0, 5.9, 6.1)),
            method("lora", quality=GOOD, peak_bytes=4_000_000_000, ratio=Ratio(2.0, 1.9, 2.1)),
            method("qlora", quality=FAIR, peak_bytes=2_000_000_000, ratio=Ratio(3.0, 2.9, 3.1)),
            method("ia3", quality=POOR, peak_bytes=1_000_000_000, ratio=Ratio(1.5, 1.4, 1.6)),
        )
    )
    assert (found.method, found.headline) == ("qlora", "Use qlora")
    reasons = " ".join(found.reasons)
    assert "0.800 (0.700 to 0.900 over 3 seeds)" in reasons
    assert "Their seeds overlap with its: lora." in reasons
    assert "least memory: 2.00 GB; next is lora with 4.00 GB" in reasons
    assert "Full fine-tuning reaches 0.990" in reasons
    assert "4.0 × the memory and 2.0 × the time; the seeds’ ranges do not overlap" in reasons
    assert any("another task may order them otherwise" in each for each in found.doubts)


def test_a_method_above_all_others_wins_whatever_it_needs() -> None:
    found = recommend(setup(method("lora", quality=GOOD, peak_bytes=9), method("ia3", quality=POOR, peak_bytes=1)))
    assert found.method == "lora"
    assert "Every other method’s seeds are below: ia3." in found.reasons[0]


@pytest.mark.parametrize(
    ("ratios", "params", "chosen"),
    [
        ((Ratio(2.0, 1.9, 2.1), Ratio(3.0, 2.9, 3.1)), (9, 1), "lora"),  # alike in memory: the faster
        ((Ratio(2.0, 1.5, 2.5), Ratio(2.1, 1.6, 2.6)), (9, 1), "dora"),  # and alike in time: fewer parameters
        ((None, None), (9, 1), "dora"),
    ],
)
def test_ties_are_decided_in_order(
    ratios: tuple[Ratio | None, Ratio | None], params: tuple[int, int], chosen: str
) -> None:
    lora, dora = (
        method(name, quality=GOOD, peak_bytes=peak, ratio=ratio, trainable_params=number)
        for name, peak, ratio, number in zip(("lora", "dora"), (1000, 1015), ratios, params, strict=True)
    )
    assert recommend(setup(lora, dora)).method == chosen


def test_without_quality_nothing_is_recommended() -> None:
    found = recommend(
        setup(
            method("lora", peak_bytes=4_000_000, ratio=Ratio(2.0, 1.9, 2.1)),
            method("ia3", peak_bytes=1_000_000, ratio=Ratio(2.1, 2.0, 2.2)),
        )
    )
    assert found.method is None
    assert found.headline.startswith("Not decided: no quality")
    assert found.reasons == [
        "Least memory: ia3, 1.00 MB, measured.",
        "Fastest step: lora, 2.00 × a forward of the base; alike: ia3.",
    ]
    assert "test_methods_quality.py" in found.doubts[0]


def test_one_method_has_no_rival() -> None:
    assert recommend(setup(method("lora"))).headline == "Not decided: only lora was measured"
    assert recommend(setup(method("full"))).method is None


def test_uncertain_qualities_are_doubted() -> None:
    found = recommend(
        setup(
            method("lora", quality=quality(0.9, 0.9, 0.9, seeds=1), peak_bytes=2),
            method("ia3", quality=quality(0.9, 0.8, 1.0, diverged=1), peak_bytes=4),
            method("prefix", peak_bytes=1),
        )
    )
    assert found.method == "lora"
    assert found.doubts[0] == "Some qualities are from one seed, or a seed diverged."
    assert "No quality of prefix." in found.doubts


def test_only_overlapping_intervals_are_alike() -> None:
    one, near, far, unknown = (
        method(name, ratio=ratio)
        for name, ratio in {
            "one": Ratio(1.0, 0.9, 1.1),
            "near": Ratio(1.15, 1.05, 1.2),
            "far": Ratio(2.0, 1.9, 2.1),
            "unknown": Ratio(1.01, None, None),
        }.items()
    )
    assert [each.name for each in fastest_of([far, unknown, near, one])] == ["one", "near"]
    assert [each.name for each in fastest_of([unknown, near])] == ["unknown"]
    assert fastest_of([method("lora")]) == []


def test_the_saved_runs_of_this_repository_decide_for_one_model() -> None:
    first, *others = setups_of(gather([RESULTS], read_rules()))
    assert (first.model, first.source, len(first.methods)) == ("smollm2-135m", "measured", 7)
    assert recommend(first).method == "qlora"
    assert all(recommend(each).method is None for each in others)
    llama = next(each for each in others if each.model == "llama-2-7b")
    assert {each.name: each.fits("24GB") for each in llama.methods}["full"] is False
    assert {each.name: each.fits("24GB") for each in llama.methods}["qlora"] is True
