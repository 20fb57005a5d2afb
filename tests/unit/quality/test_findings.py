"""What sweeps say of claims, on sweeps whose answer is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from peft_gauge.quality.findings import best_rank, best_targets, scaling_sets_size
from peft_gauge.quality.sweep import Trained
from peft_gauge.quality.training import Curve, Divergence, RateSearch

SEARCH = RateSearch(((1e-3, 1.0),), 1e-3, at_edge=False)
CURVE = Curve(((0, 1.0),), step_seconds=0.1)
RANKS = (2, 4, 8, 16, 32, 64)


def swept(qualities: Mapping[str, Sequence[float | None]], parameters: Mapping[str, int]) -> list[Trained]:
    """One training for each quality, under seeds 0, 1, …; ``None``: it diverged."""
    return [
        Trained(label, seed, parameters[label], SEARCH, CURVE, None, {"quality": quality})
        if quality is not None
        else Trained(label, seed, parameters[label], SEARCH, None, Divergence(3, 1e-3, None))
        for label, of_seeds in qualities.items()
        for seed, quality in enumerate(of_seeds)
    ]


def of_ranks(*curves: Sequence[float | None]) -> list[Trained]:
    """A sweep over `RANKS` with the quality of each rank, a curve a seed."""
    labels = [f"r{rank}" for rank in RANKS]
    by_label = {label: [curve[place] for curve in curves] for place, label in enumerate(labels)}
    return swept(by_label, {f"r{rank}": 1000 * rank for rank in RANKS})


def verdict_on_ranks(*curves: Sequence[float | None]) -> str:
    return best_rank(of_ranks(*curves), {}, "planted", least_share=0.8).verdict


def test_a_knee_at_the_same_rank_under_every_seed_is_the_best_trade() -> None:
    knee_at_8 = (0.2, 0.4, 0.80, 0.81, 0.82, 0.83)
    finding = best_rank(of_ranks(*[knee_at_8] * 3), {}, "planted", least_share=0.8)
    assert finding.verdict == "holds"
    assert finding.metric == (
        "quality r2 0.200, r4 0.400, r8 0.800, r16 0.810, r32 0.820, r64 0.830; "
        "knee by parameters: r8 in 100 % of resamples"
    )
    assert finding.conditions == "planted"


def test_where_every_doubling_gains_the_same_there_is_none() -> None:
    even = tuple(0.1 * place for place in range(1, 7))
    assert verdict_on_ranks(even, even, even) == "refuted"


def test_a_knee_that_moves_with_the_seed_cannot_be_told() -> None:
    early, late = (0.2, 0.80, 0.81, 0.82, 0.83, 0.84), (0.2, 0.21, 0.22, 0.23, 0.80, 0.81)
    assert verdict_on_ranks(early, late, early) == "inconclusive"


def test_two_seeds_or_a_diverged_rank_tell_nothing() -> None:
    knee_at_8 = (0.2, 0.4, 0.80, 0.81, 0.82, 0.83)
    assert verdict_on_ranks(knee_at_8, knee_at_8) == "inconclusive"
    diverged = (*knee_at_8[:5], None)
    finding = best_rank(of_ranks(knee_at_8, knee_at_8, diverged), {}, "planted", least_share=0.8)
    assert finding.verdict == "inconclusive"
    assert finding.metric.endswith("; diverged: r64")


def test_where_every_rank_diverged_nothing_is_told() -> None:
    finding = best_rank(of_ranks(*[[None] * len(RANKS)] * 3), {}, "planted", least_share=0.8)
    assert finding.verdict == "inconclusive"
    assert finding.metric == "diverged: r2, r4, r8, r16, r32, r64"


def of_sets(**qualities: Sequence[float | None]) -> list[Trained]:
    return swept(qualities, dict.fromkeys(qualities, 1000))


@pytest.mark.parametrize(
    ("qualities", "verdict"),
    [
        # Every seed shifts all sets alike, so that the pairs agree where the sets themselves do not.
        ({"qv": (0.50, 0.70, 0.60), "qkvo": (0.40, 0.60, 0.51), "all": (0.45, 0.64, 0.55)}, "holds"),
        ({"qv": (0.500, 0.700, 0.600), "qkvo": (0.501, 0.699, 0.6), "all": (0.500, 0.701, 0.599)}, "refuted"),
        ({"qv": (0.50, 0.70, 0.60), "qkvo": (0.60, 0.55, 0.65), "all": (0.4, 0.8, 0.5)}, "inconclusive"),
        ({"qv": (0.50, 0.70, 0.60), "qkvo": (0.40, None, 0.51), "all": (0.45, 0.64, 0.55)}, "inconclusive"),
        ({"qv": (0.50, 0.70), "qkvo": (0.40, 0.60), "all": (0.45, 0.64)}, "inconclusive"),
    ],
)
def test_which_set_of_modules_is_best(qualities: Mapping[str, Sequence[float | None]], verdict: str) -> None:
    assert best_targets(of_sets(**qualities), "planted", margin=0.05).verdict == verdict


def test_the_figure_names_the_set_that_is_ahead_and_by_how_much() -> None:
    """By 0.1, 0.1 and 0.1 ± nothing, and by 0.2: an interval without width."""
    finding = best_targets(of_sets(qv=(0.5, 0.7, 0.6), all=(0.4, 0.6, 0.5)), "planted", margin=0.05)
    assert finding.metric == (
        "quality at equal parameters: qv 0.600, all 0.500; qv is ahead of every other by at least 0.100"
    )


@pytest.mark.parametrize(
    ("sizes", "verdict"),
    [
        ({0.25: 1.0, 2.0: 1.1, 8.0: 0.95}, "refuted"),
        ({0.25: 0.5, 2.0: 1.0, 8.0: 1.5}, "holds"),
        ({0.25: 0.8, 2.0: 1.0, 8.0: 1.2}, "inconclusive"),
    ],
)
def test_whether_the_scaling_sets_the_size(sizes: Mapping[float, float], verdict: str) -> None:
    finding = scaling_sets_size(sizes, {0.25: 0.3, 8.0: None}, alike=1.25, grows=2.0)
    assert finding.verdict == verdict
    assert finding.metric.endswith("at one learning rate for all 0.25: 0.30, 8: diverged")
