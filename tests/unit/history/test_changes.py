"""Steps that were planted in histories of a thousand runs are found where they are, and none where there is none."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest

from peft_gauge.history.changes import LEAST_RUNS, _largest, change_points

# Seconds, which are too long for the unit tests.
pytestmark = pytest.mark.integration

RUNS = 1000


def history(
    seed: int, levels: Sequence[tuple[int, float]] = (), *, runs: int = RUNS, outliers: float = 0.0
) -> list[float]:
    """Times about 1 s with 2 % noise; from each place in ``levels`` on, times its factor; some far too long."""
    generator = np.random.default_rng(seed)
    seconds = np.exp(generator.normal(0, 0.02, runs))
    for at, factor in levels:
        seconds[at:] *= factor
    long = generator.random(runs) < outliers
    return (seconds * np.where(long, np.exp(generator.exponential(0.4, runs)), 1)).tolist()


def off(found: list[int], planted: Sequence[int]) -> int | None:
    """How many runs beside the planted places the farthest of as many found ones is; ``None`` for another number."""
    if len(found) != len(planted):
        return None
    return max(abs(one - other) for one, other in zip(found, planted, strict=True))


@pytest.mark.parametrize("factor", [1.1, 1 / 1.1])
def test_a_step_of_10_percent_is_found_at_its_run(factor: float) -> None:
    places = np.random.default_rng(7).integers(50, 950, 30).tolist()
    distances = [off(change_points(history(at, [(at, factor)])), [at]) for at in places]
    assert [distance for distance in distances if distance is None or distance > 1] == []


def test_outliers_hide_no_step() -> None:
    """An outlier right before a step looks like its first run, so that a few are two or three runs early."""
    places = np.random.default_rng(8).integers(50, 950, 60).tolist()
    distances = [off(change_points(history(at, [(at, 1.1)], outliers=0.05)), [at]) for at in places]
    assert None not in distances
    assert sum(distance is not None and distance <= 1 for distance in distances) >= 54
    assert max(distance or 0 for distance in distances) <= 5


def test_a_regression_that_was_mended_is_found_at_both_ends() -> None:
    distances = [off(change_points(history(seed, [(300, 1.1), (350, 1 / 1.1)])), [300, 350]) for seed in range(20)]
    assert sum(distance is not None and distance <= 1 for distance in distances) >= 19


def test_steps_of_several_heights() -> None:
    planted = [(100, 1.1), (300, 1.3), (600, 0.7), (900, 1.06)]
    assert off(change_points(history(1, planted, outliers=0.02)), [at for at, _ in planted]) in (0, 1)


@pytest.mark.parametrize("runs", [12, 40, RUNS])
def test_noise_alone_has_no_steps(runs: int) -> None:
    """The smallest effect counts here, so that nothing but chance decides."""
    seeds = 200 if runs < RUNS else 40
    stepped = sum(change_points(history(seed, runs=runs, outliers=0.05), 0.0) != [] for seed in range(seeds))
    assert stepped <= 0.05 * seeds


def test_a_step_below_the_minimum_effect_is_none() -> None:
    values = history(3, [(500, 1.02)])
    assert change_points(values) == []
    assert off(change_points(values, 0.01), [500]) is not None


def test_short_histories() -> None:
    """Below two times the least number of runs nothing is called a step; a dozen runs are enough for a clear one."""
    low, high = [1.0, 1.01, 0.99, 1.005, 0.995, 1.002, 0.998, 1.003], [2.0, 2.02, 1.98, 2.01, 1.99, 2.0, 2.01, 1.97]
    assert change_points(low[: LEAST_RUNS - 1] + high[:LEAST_RUNS]) == []
    assert change_points(low + high) == [8]
    assert change_points([1.0] * 30) == []
    assert change_points([1.0] * 15 + [2.0] * 15) == [15]


def test_equal_times_share_their_rank() -> None:
    """A coarse clock gives many of them."""
    assert _largest(np.ones(30))[1] == 0
    place, deviation = _largest(np.array([1.0] * 10 + [2.0] * 10))
    assert place == 10
    assert deviation == pytest.approx(50 / np.sqrt(10 * 10 * 21 / 12))  # 10·(15.5 - 10.5) over Wilcoxon's deviation


def test_values_are_neither_changed_nor_scaled() -> None:
    values = history(5, [(500, 1.1)])
    before = list(values)
    found = change_points(values)
    assert values == before
    assert change_points([1e-6 * value for value in values]) == found
    assert change_points(values[::-1]) == [RUNS - at for at in reversed(found)]


def test_times_that_are_zero_are_steps_still() -> None:
    assert change_points([0.0] * 20 + [1.0] * 20) == [20]
    assert change_points([0.0] * 40) == []


def test_a_history_takes_a_fraction_of_a_second() -> None:
    histories = [history(seed, [(200 + 10 * seed, 1.1)], outliers=0.05) for seed in range(10)]
    began = time.process_time()
    for values in histories:
        change_points(values)
    assert (time.process_time() - began) / len(histories) < 0.25
