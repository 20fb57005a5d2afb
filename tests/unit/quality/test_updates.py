"""Ranks of updates: against spectra known by hand, products of known rank, the law of random matrices, and planted
updates; truncation against Eckart and Young, and back to the last bit."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from peft_gauge.errors import GaugeError
from peft_gauge.quality.dissected import Dissected, PreparedDissected, spectral_metrics
from peft_gauge.quality.synthetic import Student, Synthetic, loss_on, plant, small_decoder
from peft_gauge.quality.updates import RANKS, Spectrum, Updates, random_spectrum
from peft_gauge.training import methods, models

if TYPE_CHECKING:
    from peft_gauge.training.step import TrainingJob

Model = TypeVar("Model", bound=nn.Module)

EVERY_LAYER = (*methods.ATTENTION, "gate_proj", "up_proj", "down_proj", "lm_head")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectrum(update: Tensor) -> Spectrum:
    return Spectrum.of(torch.linalg.svdvals(update.double()))


# --- one spectrum ---------------------------------------------------------------------------------------------


def test_a_spectrum_by_hand() -> None:
    found = Spectrum.of(torch.tensor([3.0, 2.0, 1.0, 0.0]))  # squares 9, 4, 1, 0; shares of the sum 1/2, 1/3, 1/6, 0

    assert found.energy_at_rank == {
        r: pytest.approx(s) for r, s in zip(RANKS, (9 / 14, 13 / 14, *[1] * 5), strict=True)
    }
    assert found.energy_rank == 2
    assert found.effective_rank == pytest.approx(2 ** (1 / 2) * 3 ** (1 / 3) * 6 ** (1 / 6))


@pytest.mark.parametrize(("equal", "energy_rank"), [(1, 1), (5, 5), (10, 9), (100, 90)])
def test_equal_singular_values_count_in_full(equal: int, energy_rank: int) -> None:
    found = Spectrum.of(torch.cat([torch.full((equal,), 0.3), torch.zeros(7)]))

    assert found.energy_rank == energy_rank
    assert found.effective_rank == pytest.approx(equal)
    assert found.energy_at_rank[1] == pytest.approx(1 / equal)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_product_has_no_more_ranks_than_its_factors(rank: int) -> None:
    found = spectrum(drawn(40, rank) @ drawn(rank, 60, seed=1))

    assert found.energy_at_rank[8] == pytest.approx(1.0, abs=1e-12)
    assert rank / 2 < found.energy_rank <= rank
    assert 1 <= found.effective_rank < rank + 1e-6


def test_turning_and_scaling_change_no_rank() -> None:
    values = torch.tensor([5.0, 3.0, 1.0, 0.5], dtype=torch.float64)
    (u, _), (v, _) = torch.linalg.qr(drawn(30, 4)), torch.linalg.qr(drawn(20, 4, seed=1))

    turned, straight = spectrum(1e-6 * (u * values) @ v.T), Spectrum.of(values)

    assert turned.energy_rank == straight.energy_rank
    assert turned.effective_rank == pytest.approx(straight.effective_rank, rel=1e-6)


def test_the_energy_rank_sees_less_of_a_floor_than_the_effective_rank() -> None:
    learned = drawn(100, 2) @ drawn(2, 100, seed=1)
    floor = drawn(100, 100, seed=2).sign() * 0.2 * float(torch.linalg.matrix_norm(learned)) / 100  # 4 % of the energy

    alone, on_floor = spectrum(learned), spectrum(learned + floor)

    assert on_floor.energy_rank == alone.energy_rank == 2
    assert on_floor.effective_rank > 10 * alone.effective_rank


@pytest.mark.parametrize(("rows", "columns"), [(300, 300), (100, 300), (576, 192)])
def test_a_random_matrix_follows_marchenko_and_pastur(rows: int, columns: int) -> None:
    found, least = random_spectrum(rows, columns), min(rows, columns)

    energy_rank, effective_rank = expected_ranks(least, max(rows, columns))

    assert found.energy_rank == pytest.approx(energy_rank, abs=0.01 * least + 1)
    assert found.effective_rank == pytest.approx(effective_rank, rel=0.01)


def expected_ranks(least: int, most: int) -> tuple[float, float]:
    """Energy and effective rank if the squared singular values have the law that Marchenko and Pastur (1967) found for
    large matrices of independent entries, by numerical integration over σ in units of the root of ``most``."""
    ratio = math.sqrt(least / most)
    edges = np.linspace(1 - ratio, 1 + ratio, 200_001)
    sigma = (edges[1:] + edges[:-1]) / 2
    square = sigma**2
    density = np.sqrt(((1 + ratio) ** 2 - square) * (square - (1 - ratio) ** 2)) / sigma
    weight = density / density.sum()
    energy_from_top = np.cumsum((weight * square)[::-1]) / (weight * square).sum()
    ranks_from_top = np.cumsum(weight[::-1])
    scaled = sigma / (weight * sigma).sum()
    entropy = math.log(least) - float((weight * scaled * np.log(scaled)).sum())
    return least * float(ranks_from_top[np.searchsorted(energy_from_top, 0.9)]), math.exp(entropy)


@pytest.mark.parametrize(("rows", "columns"), [(576, 576), (192, 576), (1536, 576)])
def test_at_a_quarter_of_the_ranks_of_chance_an_adapter_has_a_quarter_of_the_parameters(
    rows: int, columns: int
) -> None:
    """In SmolLM2's layers, which is why the claim of a low rank is decided there."""
    rank = random_spectrum(rows, columns).energy_rank / 4
    assert rank * (rows + columns) == pytest.approx(rows * columns / 4, rel=0.05)


def test_what_did_not_move_has_no_rank() -> None:
    with pytest.raises(GaugeError, match="not updated"):
        Spectrum.of(torch.zeros(4))


# --- a model's updates ----------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two linear layers, one wide and one tied to the embedding, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.wide = nn.Linear(6, 9, bias=False)
        self.norm = nn.LayerNorm(9)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embedding.weight


def moved(model: Model) -> Model:
    """A copy of ``model`` of which every parameter has moved."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for number, parameter in enumerate(copied.parameters()):
            parameter.add_(drawn(*parameter.shape, seed=1 + number))
    return copied


@pytest.fixture
def base() -> Pair:
    torch.manual_seed(0)
    return Pair().double()


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_truncated_update_is_the_best_of_its_rank(rank: int, base: Pair) -> None:
    trained = moved(base)
    updates = Updates(base, trained)
    whole = (trained.wide.weight - base.wide.weight).detach()

    with updates.truncated(rank):
        cut = (trained.wide.weight - base.wide.weight).detach()

    assert int(torch.linalg.matrix_rank(cut, rtol=1e-10)) == rank
    left_out = torch.linalg.svdvals(whole)[rank:].square().sum().sqrt()  # Eckart and Young
    assert float(torch.linalg.matrix_norm(whole - cut)) == pytest.approx(float(left_out))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_come_back_to_the_last_bit(dtype: torch.dtype, base: Pair) -> None:
    base = base.to(dtype)
    trained = moved(base)
    before = copy.deepcopy(trained.state_dict())
    updates = Updates(base, trained)

    def scoring_that_fails() -> None:
        with updates.truncated(1):
            assert not torch.equal(trained.wide.weight, before["wide.weight"])
            raise KeyError

    with pytest.raises(KeyError):
        scoring_that_fails()
    with updates.truncated(3):
        pass

    after = trained.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_only_linear_layers_are_truncated_and_a_tied_embedding_with_its_layer(base: Pair) -> None:
    trained = moved(base)
    before = copy.deepcopy(trained.state_dict())
    updates = Updates(base, trained)

    with updates.truncated(1):
        inside = trained.state_dict()
        changed = {name for name, weight in before.items() if not torch.equal(weight, inside[name])}

    assert changed == {"wide.weight", "head.weight", "embedding.weight"}
    assert updates.spectra.keys() == {"wide", "head"}
    with updates.truncated(0):
        assert torch.equal(trained.wide.weight, base.wide.weight)


def test_full_rank_is_the_update_itself_up_to_rounding(base: Pair) -> None:
    trained = moved(base)
    whole = copy.deepcopy(trained.state_dict())["wide.weight"]

    with Updates(base, trained).truncated(6):
        assert torch.allclose(trained.state_dict()["wide.weight"], whole, rtol=1e-12, atol=1e-12)


def test_a_planted_rank_is_all_of_it_and_each_rank_less_costs() -> None:
    base = models.build(small_decoder())
    teacher, _ = plant(base, 4, EVERY_LAYER, seed=0)
    student = Student(copy.deepcopy(teacher))
    updates = Updates(base, student, ranks=range(1, 9))
    held_out = Synthetic().prepared().held_out
    with torch.no_grad():
        taught = [{**batch, "labels": teacher(batch["input_ids"]).logits} for batch in held_out]

    errors = {}
    for rank in (1, 2, 3, 4, 8):
        with updates.truncated(rank):
            errors[rank] = loss_on(student, taught)

    assert errors[1] > errors[2] > errors[3] > 0.01
    assert max(errors[4], errors[8]) < 1e-8
    assert loss_on(student, taught) == 0.0
    assert {own.energy_rank for own, _ in updates.spectra.values()} == {4}


def test_a_random_update_has_the_ranks_of_chance() -> None:
    base = models.build(small_decoder())

    metrics = spectral_metrics(Updates(base, moved(base)).spectra)

    for name in ("energy_rank_over_random", "effective_rank_over_random"):
        assert metrics[name] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("rank", [-1, 9])
def test_a_rank_that_was_not_kept_is_refused(rank: int, base: Pair) -> None:
    updates = Updates(base, moved(base), ranks=(2, 8))
    with pytest.raises(GaugeError, match=f"from 0 to 8, got {rank}"), updates.truncated(rank):
        pass


def test_models_that_do_not_belong_together_are_refused(base: Pair) -> None:
    with pytest.raises(GaugeError, match="not updated"):
        Updates(base, copy.deepcopy(base))
    with pytest.raises(GaugeError, match="0 linear layers called wide"):
        Updates(base, nn.Sequential(nn.Linear(6, 9)))
    with pytest.raises(GaugeError, match="2 linear layers called wide"):
        Updates(base, nn.ModuleList([moved(base), moved(base)]))


# --- a task taken apart ---------------------------------------------------------------------------------------


def read_at(energy_rank: int, effective_rank: float, energy: float = 0.5) -> Spectrum:
    return Spectrum(dict.fromkeys(RANKS, energy), energy_rank, effective_rank)


def test_figures_by_hand() -> None:
    of_random = read_at(10, 20.0, 0.1)
    metrics = spectral_metrics(
        {
            "layers.0.q_proj": (read_at(1, 2.0, 0.9), of_random),
            "layers.1.q_proj": (read_at(4, 6.0, 0.7), of_random),
            "layers.2.q_proj": (read_at(5, 7.0, 0.8), of_random),
            "layers.0.v_proj": (read_at(8, 14.0, 0.2), of_random),
        }
    )

    assert metrics["energy_rank_over_random"] == pytest.approx(0.45)
    assert metrics["effective_rank_over_random"] == pytest.approx(0.325)
    assert [metrics[f"q_proj.energy_rank.{which}"] for which in ("least", "median", "most")] == [1, 4, 5]
    assert [metrics[f"q_proj.effective_rank.{which}"] for which in ("least", "median", "most")] == [2.0, 6.0, 7.0]
    assert metrics["q_proj.energy_rank_over_random.median"] == pytest.approx(0.4)
    assert metrics["v_proj.energy_rank_over_random.median"] == pytest.approx(0.8)
    assert (metrics["q_proj.layers"], metrics["v_proj.layers"]) == (3, 1)
    assert metrics["q_proj.energy_at_rank_16"] == 0.8
    assert (metrics["q_proj.random.energy_rank"], metrics["q_proj.random.energy_at_rank_16"]) == (10, 0.1)
    # The two examples are the layers with least and most of the random matrix's ranks.
    assert (metrics["layers.0.q_proj.energy_at_rank_1"], metrics["layers.0.v_proj.energy_at_rank_1"]) == (0.9, 0.2)
    assert "layers.1.q_proj.energy_at_rank_1" not in metrics


@dataclass
class Distance:
    """A prepared task whose quality is 1 less the distance of the ``wide`` layer from the student's own."""

    base: Pair
    trained: Pair
    worst: float = 0.0
    notes: tuple[str, ...] = ("a note",)

    def job(self, method: object) -> Any:
        return SimpleNamespace(model=copy.deepcopy(self.trained))

    def validation_loss(self, job: TrainingJob) -> float:
        return 0.25

    def scores(self, job: TrainingJob) -> dict[str, float]:
        assert isinstance(job.model, Pair)
        distance = (job.model.wide.weight - self.trained.wide.weight).detach().norm()
        return {"quality": 1 - float(distance), "exact_match": 0.5, "loss": self.worst}


def test_scores_are_the_tasks_own_and_those_of_each_rank(base: Pair) -> None:
    whole = Distance(base, moved(base))
    update = (whole.trained.wide.weight - base.wide.weight).detach()
    prepared = PreparedDissected(whole)
    job = prepared.job(methods.FULL)

    scores = prepared.scores(job)

    assert (scores["quality"], scores["loss"]) == (1.0, 0.0)
    values = torch.linalg.svdvals(update)
    for rank in (0, *RANKS):
        assert scores[f"exact_match_at_rank_{rank}"] == 0.5
        assert scores[f"quality_at_rank_{rank}"] == pytest.approx(1 - float(values[rank:].norm()), abs=1e-9)
    assert scores["wide.layers"] == 1
    assert whole.scores(job)["quality"] == 1.0, "the job was not left as it was"
    assert (prepared.notes, prepared.validation_loss(job)) == (("a note",), 0.25)
    assert json.dumps(scores, allow_nan=False)


def test_a_training_that_diverged_is_not_taken_apart(base: Pair) -> None:
    whole = Distance(base, moved(base), worst=math.nan)
    with torch.no_grad():
        whole.trained.wide.weight[0, 0] = math.nan

    assert PreparedDissected(whole).scores(whole.job(methods.FULL)).keys() == {"quality", "exact_match", "loss"}


def test_a_task_taken_apart_is_another_task() -> None:
    task = Synthetic(seed=3)
    identity = Dissected(task).identity()
    assert identity != task.identity()
    assert identity != Dissected(replace(task, seed=4)).identity()
    assert json.loads(json.dumps(identity, default=list))["seed"] == 3
