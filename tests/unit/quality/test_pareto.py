"""Frontier and knee by hand, and how sure a knee is over seeds."""

from __future__ import annotations

import math

import pytest

from peft_gauge.errors import GaugeError
from peft_gauge.quality.pareto import Point, frontier, knee, knee_over_seeds


def points(*pairs: tuple[float, float]) -> list[Point]:
    return [Point(f"p{number}", cost, quality) for number, (cost, quality) in enumerate(pairs)]


def labels(found: list[Point]) -> list[str]:
    return [point.label for point in found]


def test_the_frontier_keeps_what_nothing_beats() -> None:
    assert labels(frontier(points((4, 0.9), (1, 0.2), (2, 0.1), (2, 0.5), (8, 0.9)))) == ["p1", "p3", "p0"]


def test_of_equal_points_the_first_stands_for_all() -> None:
    assert labels(frontier(points((2, 0.5), (2, 0.5), (2, 0.4)))) == ["p0"]


def test_a_dearer_and_better_point_stays_on_the_frontier() -> None:
    assert labels(frontier(points((1, 0.1), (2, 0.2), (4, 0.4)))) == ["p0", "p1", "p2"]


def knee_label(*pairs: tuple[float, float]) -> str | None:
    found = knee(points(*pairs))
    return found.label if found else None


def test_the_knee_is_where_the_curve_goes_flat() -> None:
    assert knee_label((2, 0.5), (3, 0.75), (4, 1.0), (8, 1.001), (16, 1.002)) == "p2"


def test_a_dearer_and_worse_point_still_shows_that_the_curve_is_flat() -> None:
    # Without the last, the curve is a straight line to its end and has no knee.
    assert knee_label((1, 0.0), (2, 0.5), (4, 1.0)) is None
    assert knee_label((1, 0.0), (2, 0.5), (4, 1.0), (8, 0.9)) == "p2"


def test_an_even_and_a_growing_gain_have_no_knee() -> None:
    assert knee_label((1, 0.0), (10, 1.0), (100, 2.0)) is None
    assert knee_label((1, 0.0), (10, 0.1), (100, 2.0)) is None


def test_where_more_buys_nothing_the_cheapest_is_the_knee() -> None:
    assert knee_label((1, 0.9), (2, 0.9), (4, 0.8)) == "p0"


def test_settings_of_one_cost_are_no_trade() -> None:
    assert knee_label((3, 0.9), (3, 0.5)) is None
    assert knee_label((3, 0.9)) is None


def test_the_unit_of_cost_and_of_quality_do_not_matter() -> None:
    curve = [(2, 0.5), (3, 0.7), (4, 0.95), (8, 0.99), (16, 1.0)]
    assert knee_label(*curve) == knee_label(*((cost * 1e9, quality * 40 - 7) for cost, quality in curve)) == "p2"


@pytest.mark.parametrize(("cost", "quality"), [(0, 1), (-1, 1), (math.inf, 1), (1, math.nan)])
def test_what_is_no_point_is_refused(cost: float, quality: float) -> None:
    with pytest.raises(GaugeError, match="must be finite"):
        Point("r8", cost, quality)


def test_no_points_are_refused() -> None:
    with pytest.raises(GaugeError, match="at least one setting"):
        knee([])


COSTS = {"r2": 2.0, "r4": 4.0, "r8": 8.0}
KNEE_AT_R2, KNEE_AT_R4 = (0.0, 0.0, -1.0), (0.0, 1.0, 1.0)


def seeds(*curves: tuple[float, float, float]) -> dict[str, list[float]]:
    return {label: [curve[k] for curve in curves] for k, label in enumerate(COSTS)}


def test_seeds_that_agree_are_sure() -> None:
    found = knee_over_seeds(COSTS, seeds(KNEE_AT_R4, KNEE_AT_R4, KNEE_AT_R4))

    assert (found.label, found.share, found.seeds) == ("r4", 1.0, 3)


def test_of_two_seeds_that_differ_each_is_drawn_twice_in_a_quarter_of_resamples() -> None:
    found = knee_over_seeds(COSTS, seeds(KNEE_AT_R2, KNEE_AT_R4))

    # Both together have the means 0, 0.5, 0: the knee is r4 unless the first is drawn twice.
    assert found.label == "r4"
    assert found.shares["r2"] == pytest.approx(0.25, abs=0.03)
    assert found.shares["r4"] == pytest.approx(0.75, abs=0.03)


def test_a_seed_draws_the_same_for_every_setting() -> None:
    """Seeds may differ by far more than settings do; drawn apart for each setting, they would drown the knee."""
    shifted = [tuple(value + 100.0 * k for value in KNEE_AT_R4) for k in range(4)]

    assert knee_over_seeds(COSTS, seeds(*shifted)).share == 1.0  # type: ignore[arg-type]


def test_a_resample_without_a_knee_is_counted_too() -> None:
    even = (0.0, 1.0, 2.0)
    found = knee_over_seeds(COSTS, seeds(even, even))

    assert (found.label, found.share) == (None, 1.0)
    assert found.as_json()["knee_shares"] == {"none": 1.0}


def test_the_same_seed_draws_the_same_resamples() -> None:
    qualities = seeds(KNEE_AT_R2, KNEE_AT_R4)

    assert knee_over_seeds(COSTS, qualities) == knee_over_seeds(COSTS, qualities)


@pytest.mark.parametrize(
    "qualities", [{}, {"r2": [1.0]}, {"r2": [], "r4": [], "r8": []}, {"r2": [1.0, 2.0], "r4": [1.0], "r8": [1.0, 2.0]}]
)
def test_a_setting_without_one_of_the_seeds_is_refused(qualities: dict[str, list[float]]) -> None:
    with pytest.raises(GaugeError, match="one quality per seed"):
        knee_over_seeds(COSTS, qualities)
