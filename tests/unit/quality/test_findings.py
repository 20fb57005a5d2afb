"""Verdicts of sweeps, on sweeps whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest

from peft_gauge.quality import findings
from peft_gauge.quality.facts import BITS
from peft_gauge.quality.sweep import Trained
from peft_gauge.quality.training import Curve, Divergence, RateSearch

CURVE = Curve(((0, 1.0),), step_seconds=0.1)
RANKS = (2, 4, 8, 16, 32, 64)
NOISE = (0.001, -0.002, 0.003)
"""What keeps three seeds apart."""


def search(rate: float = 3e-3, *, at_edge: bool = False) -> RateSearch:
    return RateSearch(((rate, 1.0),), rate, at_edge=at_edge)


def trained(
    label: str,
    bits: Sequence[float | None],
    params: int = 1000,
    *,
    found: RateSearch | None = None,
    forgetting: Sequence[float] = (0.0, 0.0, 0.0),
    rounding_loss: float = 0.0,
) -> list[Trained]:
    """One training for each number of bits left, under seeds 0, 1, …; ``None``: it diverged."""
    found = found or search()
    return [
        Trained(label, seed, params, found, None, Divergence(3, 1e-3, None))
        if left is None
        else Trained(
            label,
            seed,
            params,
            found,
            CURVE,
            None,
            {
                "bits_left": left,
                "quality": BITS - left,
                "forgetting": forgetting[seed],
                "rounding_loss": rounding_loss,
            },
        )
        for seed, left in enumerate(bits)
    ]


def about(bits: float) -> list[float | None]:
    return [bits + noise for noise in NOISE]


def of_ranks(*bits: float | None, base: int = 1000) -> list[Trained]:
    """A sweep over `RANKS` that leaves about these ``bits`` at each rank."""
    return [
        each
        for rank, left in zip(RANKS, bits, strict=True)
        for each in trained(f"r{rank}", [None] * 3 if left is None else about(left), base * rank)
    ]


# --- which rank -------------------------------------------------------------------------------------------------------


def test_a_curve_that_flattens_between_the_ranks_has_a_best_one() -> None:
    finding = findings.best_rank(of_ranks(6.0, 3.0, 0.4, 0.11, 0.1, 0.1), "planted", margin=0.25)

    assert finding.verdict == "holds"
    assert finding.metric.startswith("bits left: r2 6.001 ± 0.0025, r4 3.001")
    assert finding.metric.endswith(": r16") or finding.metric.endswith(": r8")
    assert finding.conditions == "planted"


def test_equal_ranks_refute_it() -> None:
    finding = findings.best_rank(of_ranks(0.12, 0.11, 0.1, 0.1, 0.1, 0.1), "planted", margin=0.25)
    assert finding.verdict == "refuted"
    assert "rank hardly matters" in finding.metric


def test_a_curve_that_still_falls_refutes_it() -> None:
    finding = findings.best_rank(of_ranks(7.9, 7.7, 7.2, 6.2, 4.5, 2.5), "planted", margin=0.25)
    assert finding.verdict == "refuted"
    assert "still falling at r64" in finding.metric


@pytest.mark.parametrize(
    "results",
    [
        pytest.param(of_ranks(None, 3.0, 0.4, 0.11, 0.1, 0.1), id="diverged"),
        pytest.param(of_ranks(7.9, 7.8, 7.0, 6.5, 6.4, 6.4), id="little was learned"),
        pytest.param([each for each in of_ranks(6, 3, 0.4, 0.1, 0.1, 0.1) if each.seed < 2], id="two seeds"),
    ],
)
def test_it_is_inconclusive(results: list[Trained]) -> None:
    assert findings.best_rank(results, "planted", margin=0.25).verdict == "inconclusive"


# --- which modules ----------------------------------------------------------------------------------------------------


def of_sets(**bits: Sequence[float | None]) -> list[Trained]:
    return [each for label, of_seeds in bits.items() for each in trained(label, of_seeds)]


@pytest.mark.parametrize(
    ("bits", "verdict"),
    [
        ({"qv": about(3.0), "qkvo": about(1.0), "all": about(0.1)}, "holds"),
        ({"qv": about(0.1), "qkvo": about(3.0), "all": about(1.0)}, "holds"),
        ({"qv": about(1.0), "qkvo": about(1.01), "all": about(0.99)}, "refuted"),
        ({"qv": (1.0, 2.0, 1.5), "qkvo": (1.5, 1.0, 2.0), "all": (2.0, 1.5, 1.0)}, "inconclusive"),
        ({"qv": about(1.0), "qkvo": (None, 1.0, 1.0), "all": about(0.1)}, "inconclusive"),
    ],
)
def test_sets_of_modules(bits: Mapping[str, Sequence[float | None]], verdict: str) -> None:
    assert findings.best_targets(of_sets(**bits), "planted", margin=0.2).verdict == verdict


# --- one against another ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "new", "verdict"),
    [
        (about(0.10), about(0.13), "holds"),
        (about(0.10), about(0.50), "refuted"),
        (about(0.10), (0.1, 0.4, 0.2), "inconclusive"),
        (about(6.0), about(6.0), "inconclusive"),
    ],
)
def test_keeping(base: Sequence[float | None], new: Sequence[float | None], verdict: str) -> None:
    found = findings.keeps(trained("LoRA", base), trained("QLoRA", new), "planted", margin=0.1)
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("base", "new", "verdict"),
    [
        (about(1.0), about(0.5), "holds"),
        (about(1.0), about(0.9), "refuted"),
        (about(1.0), about(1.0), "refuted"),
        (about(1.0), about(2.0), "refuted"),
        (about(1.0), (None, 1.0, 1.0), "refuted"),
        ((None, 1.0, 1.0), (None, 1.0, 1.0), "inconclusive"),
        ((1.0, 1.5, 2.0), (1.6, 0.9, 1.2), "inconclusive"),
    ],
)
def test_learning_more(base: Sequence[float | None], new: Sequence[float | None], verdict: str) -> None:
    found = findings.learns_more(trained("LoRA", base), trained("DoRA", new), "planted", margin=0.25)
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("full", "lora", "verdict"),
    [((3.0, 3.1, 3.2), (1.0, 1.1, 1.0), "holds"), ((1.0, 1.1, 1.0), (3.0, 3.1, 3.2), "refuted")],
)
def test_forgetting(full: Sequence[float], lora: Sequence[float], verdict: str) -> None:
    of_full, of_lora = (
        trained(label, about(0.1), forgetting=forgetting) for label, forgetting in (("full", full), ("LoRA", lora))
    )
    assert findings.forgets_less(of_full, of_lora, "planted", most_left=0.5).verdict == verdict


def test_forgetting_at_unequal_learning_is_inconclusive() -> None:
    full = trained("full", about(0.1), forgetting=(3.0, 3.1, 3.2))
    lora = trained("LoRA", about(1.0), forgetting=(1.0, 1.0, 1.1))
    assert findings.forgets_less(full, lora, "planted", most_left=0.5).verdict == "inconclusive"


# --- rates, capacity --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "verdict"),
    [
        ((1e-2, 1e-2, 1e-2), "holds"),
        ((3.2e-3, 1e-2, 5.6e-3), "holds"),
        ((3e-3, 3e-2, 1e-2), "refuted"),
        ((1e-3, 1e-3, 1e-3), "refuted"),
    ],
)
def test_rates(rates: Sequence[float], verdict: str) -> None:
    full = trained("full", about(0.2), found=search(1e-3))
    ranks = [each for place, rate in enumerate(rates) for each in trained(f"r{place}", about(1), found=search(rate))]
    assert findings.ten_times_the_rate(full, ranks, "planted", times=10, within=3.2).verdict == verdict


def test_a_rate_at_the_edge_of_its_search_decides_nothing() -> None:
    full = trained("full", about(0.1), found=search(1e-3, at_edge=True))
    ranks = trained("r2", about(1), found=search(1e-2))
    assert findings.ten_times_the_rate(full, ranks, "planted", times=10, within=3.2).verdict == "inconclusive"


def test_a_setting_that_stored_everything_has_no_best_rate() -> None:
    full = trained("full", about(0.01), found=search(1e-3))
    finding = findings.ten_times_the_rate(full, trained("r2", about(1), found=search(1e-2)), "", times=10, within=3.2)
    assert finding.verdict == "inconclusive"
    assert "; full stored nearly everything" in finding.metric


def capacity(few: Sequence[float], many: Sequence[float]) -> str:
    """The verdict with these bits left at `RANKS` of 1,000 to 32,000 parameters, for 100 and for 1,000 facts."""
    full = {number: trained("full", about(0.05), 100_000) for number in (100, 1000)}
    ranks = {100: of_ranks(*few, base=500), 1000: of_ranks(*many, base=500)}
    return findings.capacity_decides(full, ranks, margin=0.25, within=2.0).verdict


def test_one_number_of_bits_per_parameter_separates_them() -> None:
    # 0.8 bits per parameter at r2 and less above it; 8, 4, 2, 1, 0.5 and 0.25
    assert capacity([0.1] * 6, [6.0, 5.0, 3.0, 0.2, 0.1, 0.1]) == "holds"


def test_a_low_rank_that_falls_short_with_room_refutes_it() -> None:
    # 0.8 bits asked per parameter are too many for 100 facts, and 4 are not for 1,000
    assert capacity([2.0, 0.1, 0.1, 0.1, 0.1, 0.1], [6.0, 0.1, 0.1, 0.1, 0.1, 0.1]) == "refuted"


def test_a_higher_rank_that_falls_short_refutes_it() -> None:
    assert capacity([0.1] * 6, [6.0, 5.0, 0.1, 0.1, 0.1, 2.0]) == "refuted"


def test_without_any_limit_reached_it_is_inconclusive() -> None:
    assert capacity([0.1] * 6, [0.1] * 6) == "inconclusive"


# --- α ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "verdict"),
    [
        ({0.25: 1.0, 8: 1.1}, "refuted"),
        ({0.25: 1.0, 8: 3.0}, "holds"),
        ({0.25: 1.0, 8: 1.5}, "inconclusive"),
        ({0.25: 3.0, 8: 1.0}, "inconclusive"),
    ],
)
def test_scaling(sizes: Mapping[float, float], verdict: str) -> None:
    found = findings.scaling_sets_size(sizes, {0.25: None, 8: math.pi}, alike=1.25, grows=2.0)
    assert found.verdict == verdict
    assert "0.25: diverged, 8: 3.14" in found.metric


# --- recovery from rounding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "verdict"),
    [
        ((0.002, 0.003, 0.001), "holds"),  # 99 % of 0.2 recovered
        ((0.05, 0.055, 0.045), "refuted"),  # 75 %
        ((0.0, 0.04, 0.02), "inconclusive"),  # 80 to 100 %
        ((0.001, None, 0.001), "inconclusive"),  # diverged under a seed
        ((0.21, 0.22, 0.2), "refuted"),  # training made it worse
    ],
)
def test_recovery_is_a_share_of_the_bits_that_rounding_lost(left: Sequence[float | None], verdict: str) -> None:
    unrounded = trained("r2", (0.0, 0.001, 0.0))
    rounded = trained("QLoRA r2", left, rounding_loss=0.2)
    found = findings.recovers(unrounded, rounded, "here", least_share=0.9, least_lost_bits=0.05)
    assert found.verdict == verdict, found.metric


def test_the_share_that_a_reader_sees_is_the_one_of_the_scores() -> None:
    rounded = trained("QLoRA r2", (0.05, 0.05, 0.05), rounding_loss=0.2)
    found = findings.recovers(trained("r2", (0.0, 0.0, 0.0)), rounded, "", least_share=0.9, least_lost_bits=0.05)
    assert "recovered 75% (75% to 75%) over 3 seeds" in found.metric
    assert "rounding alone loses 0.200" in found.metric


def test_where_rounding_costs_nothing_there_is_nothing_to_recover() -> None:
    rounded = trained("QLoRA r2", (0.0, 0.0, 0.0), rounding_loss=0.01)
    found = findings.recovers(trained("r2", (0.0, 0.0, 0.0)), rounded, "", least_share=0.9, least_lost_bits=0.05)
    assert (found.verdict, "nothing to recover" in found.metric) == ("inconclusive", True)
