"""Schedules, learning-rate searches and divergence, on models small enough to compute by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from peft_gauge.errors import GaugeError
from peft_gauge.quality.training import RATE_FACTOR, Schedule, search_rate, thinned, train, without_dropout
from peft_gauge.training.settings import StepSettings
from peft_gauge.training.step import TrainingJob


class Slope(nn.Module):
    """One weight, trained to be ``labels / input_ids``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.0))

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.weight * input_ids - labels).square().mean())


def slope_job(target: float = 1.0, batches: int = 1) -> TrainingJob:
    batch = {"input_ids": torch.ones(1, 1), "labels": torch.full((1, 1), target)}
    return TrainingJob(Slope(), [batch] * batches, StepSettings(batch=1, seq=1, optimizer="sgd"))


def test_the_rate_rises_and_falls_along_half_a_cosine() -> None:
    schedule = Schedule(steps=10, peak_rate=1.0, warm_up_share=0.2)

    assert [schedule.rate(step) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert schedule.rate(6) == pytest.approx(0.5)
    assert schedule.rate(9) == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)


def test_without_warm_up_the_first_step_has_the_peak_rate() -> None:
    assert Schedule(steps=1, peak_rate=0.25, warm_up_share=0).rate(0) == 0.25


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"steps": 0, "peak_rate": 0.1}, "at least 1 step"),
        ({"steps": 5, "peak_rate": 0.0}, "learning rate"),
        ({"steps": 5, "peak_rate": math.nan}, "learning rate"),
        ({"steps": 5, "peak_rate": 0.1, "warm_up_share": 1.0}, "warm-up"),
    ],
)
def test_an_impossible_schedule_is_refused(values: dict[str, float], complaint: str) -> None:
    with pytest.raises(GaugeError, match=complaint):
        Schedule(**values)  # type: ignore[arg-type]


def test_the_optimizer_follows_the_schedule() -> None:
    """With w' = w - 2·rate·(w - 1), the losses say which rates were really used."""
    schedule = Schedule(steps=6, peak_rate=0.2, warm_up_share=0.3)

    curve = train(slope_job(), schedule)

    error, expected = 1.0, []
    for step in range(6):
        expected.append((step, pytest.approx(error**2)))
        error *= 1 - 2 * schedule.rate(step)
    assert list(curve.losses) == expected
    assert curve.divergence is None
    assert curve.step_seconds > 0


def test_weight_decay_is_the_schedules_own() -> None:
    batch = {"input_ids": torch.zeros(1, 1), "labels": torch.zeros(1, 1)}  # nothing to learn: only decay moves it
    ends = []
    for decay in (0.0, 0.5):
        job = TrainingJob(Slope(), [batch], StepSettings(batch=1, seq=1))
        with torch.no_grad():
            job.trainable[0].fill_(1.0)
        train(job, Schedule(1, 0.1, warm_up_share=0, weight_decay=decay))
        ends.append(job.trainable[0].item())
    assert ends == pytest.approx([1.0, 0.95])


def test_a_loss_that_grows_out_of_hand_ends_the_training_with_step_and_rate() -> None:
    curve = train(slope_job(), Schedule(steps=20, peak_rate=2.0, warm_up_share=0))  # the error triples each step

    assert curve.divergence is not None
    assert (curve.divergence.step, curve.divergence.learning_rate) == (1, 2.0)
    assert curve.divergence.loss == pytest.approx(9.0)
    assert len(curve.losses) == 1


def test_a_loss_that_is_no_number_is_an_outcome_that_json_can_hold() -> None:
    curve = train(slope_job(target=math.nan), Schedule(steps=5, peak_rate=0.1))

    assert curve.divergence is not None
    assert (curve.divergence.step, curve.divergence.loss, curve.losses) == (0, None, ())
    json.dumps(curve.as_json(), allow_nan=False)


def test_a_loss_below_that_of_chance_is_no_divergence_wherever_it_began() -> None:
    """A model that knows the task: its loss begins at 0.0001 and multiplies, as it does for every learner."""
    for chance, diverges in ((0.0, True), (9.0, False), (0.1, True)):
        job = slope_job(target=0.01)
        job.chance_loss = chance  # type: ignore[attr-defined]
        curve = train(job, Schedule(steps=2, peak_rate=30.0, warm_up_share=0))
        assert curve.losses[0][1] == pytest.approx(1e-4)
        assert (curve.divergence is not None) == diverges, chance


def test_rounding_around_a_loss_of_zero_is_no_divergence() -> None:
    job = slope_job(target=0.0)
    later = {"input_ids": torch.ones(1, 1), "labels": torch.full((1, 1), 1e-4)}
    job.train_on([*job.batches, later], job.settings)

    assert train(job, Schedule(steps=2, peak_rate=0.1)).divergence is None


def test_each_step_is_told() -> None:
    told: list[int] = []
    train(slope_job(), Schedule(steps=4, peak_rate=0.1), after_step=told.append)
    assert told == [0, 1, 2, 3]


def test_a_thinned_curve_keeps_its_ends() -> None:
    losses = [float(step) for step in range(1000)]

    kept = thinned(losses, most=5)

    assert kept == ((0, 0.0), (250, 250.0), (500, 500.0), (749, 749.0), (999, 999.0))
    assert thinned(losses[:5], most=5) == tuple(enumerate(losses[:5]))


def distance_from(best: float, limit: float = math.inf) -> Callable[[float], float | None]:
    """An outcome that is least at ``best`` and diverges above ``limit``."""
    return lambda rate: None if rate > limit else abs(math.log(rate / best))


def test_the_start_stays_where_both_neighbours_are_worse() -> None:
    search = search_rate(distance_from(1e-3), 1e-3)

    assert search.chosen == 1e-3
    assert not search.at_edge
    assert [rate for rate, _ in search.tried] == pytest.approx([1e-3 / RATE_FACTOR, 1e-3, 1e-3 * RATE_FACTOR], rel=0.02)


@pytest.mark.parametrize("exponent", [-3, -2, 2, 3])
def test_a_best_rate_at_the_edge_is_followed(exponent: int) -> None:
    best = 1e-3 * RATE_FACTOR**exponent

    search = search_rate(distance_from(best), 1e-3)

    assert search.chosen == pytest.approx(best, rel=0.06)
    assert not search.at_edge


def test_a_best_rate_out_of_reach_is_said_to_be_at_the_edge() -> None:
    search = search_rate(distance_from(1e3), 1e-3, extensions=1)

    assert search.chosen == max(rate for rate, _ in search.tried)
    assert search.at_edge
    assert len(search.tried) == 4


def test_rates_that_diverge_are_recorded_and_never_chosen() -> None:
    search = search_rate(distance_from(1.0, limit=2e-3), 1e-3)

    assert search.chosen == 1e-3
    assert search.tried[-1][1] is None


def test_where_all_diverge_lower_rates_are_tried() -> None:
    found = search_rate(distance_from(1.0, limit=2e-5), 1e-3, extensions=4)
    assert found.chosen is not None
    assert found.chosen < 2e-5

    lost = search_rate(lambda rate: math.nan, 1e-3, extensions=2)
    assert lost.chosen is None
    assert [loss for _, loss in lost.tried] == [None] * 5


def test_a_finer_search_looks_half_a_step_to_both_sides_of_the_best() -> None:
    best = 1e-3 * RATE_FACTOR**0.5

    search = search_rate(distance_from(best), 1e-3, finer=True)

    assert search.chosen == pytest.approx(best, rel=0.02)
    assert not search.at_edge
    assert len(search.tried) == 5


def test_of_rates_that_are_alike_the_lowest_is_chosen() -> None:
    search = search_rate(lambda rate: 0.0 if rate > 2e-4 else 1.0, 1e-3)

    assert search.chosen == pytest.approx(1e-3 / RATE_FACTOR, rel=0.02)
    assert not search.at_edge


def test_dropout_is_off_inside_and_as_it_was_outside() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2), nn.Dropout(0.5))
    model[2].training = False

    with without_dropout(model):
        assert [module.training for module in model] == [False, True, False]
    assert [module.training for module in model] == [True, True, False]
