"""Facts: what they hold, bits against truths by hand, and the last layers against the whole model."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from peft_gauge.errors import GaugeError
from peft_gauge.quality import fact_bases, fact_tasks
from peft_gauge.quality.fact_bases import Decoder, LastLayers
from peft_gauge.quality.fact_tasks import Facts
from peft_gauge.quality.facts import (
    BITS,
    HALF,
    TOKENS,
    FactSet,
    Recall,
    bits_left,
    composed_facts,
    random_facts,
)
from peft_gauge.quality.sweep import Lengths, Setting, train_setting
from peft_gauge.quality.training import Schedule, train
from peft_gauge.training import batches, methods, models

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LORA = methods.LORA.variant("lora-r4", "LoRA r=4", peft_config={"r": 4, "lora_dropout": 0.0})


# --- what facts hold --------------------------------------------------------------------------------------------------


def test_random_facts_have_different_keys_and_independent_values() -> None:
    found = random_facts(20_000, 0)

    assert len({tuple(key) for key in found.keys.tolist()}) == 20_000
    assert {int(found.keys.min()), int(found.keys.max()), int(found.values.max())} == {0, TOKENS - 1}
    frequencies = torch.bincount(found.values, minlength=TOKENS) / len(found)
    assert float(-(frequencies * frequencies.log2()).sum()) == pytest.approx(BITS, abs=0.02)
    assert torch.equal(found.values, random_facts(20_000, 0).values)
    assert not torch.equal(found.values, random_facts(20_000, 1).values)


def test_composed_facts_follow_one_rule_that_held_out_pairs_share() -> None:
    trained, held_out = composed_facts(4096, 512, 0)

    assert not {tuple(key) for key in trained.keys.tolist()} & {tuple(key) for key in held_out.keys.tolist()}
    upper = {int(key[0]): int(value) // HALF for key, value in zip(trained.keys, trained.values, strict=True)}
    lower = {int(key[1]): int(value) % HALF for key, value in zip(trained.keys, trained.values, strict=True)}
    for key, value in zip(held_out.keys.tolist(), held_out.values.tolist(), strict=True):
        assert value == HALF * upper[key[0]] + lower[key[1]]


@pytest.mark.parametrize("number", [0, TOKENS**2 + 1])
def test_an_impossible_number_of_facts_is_an_error(number: int) -> None:
    with pytest.raises(GaugeError, match="number of facts from 1 to 65536"):
        random_facts(number, 0)


# --- bits -------------------------------------------------------------------------------------------------------------


class Sure(nn.Module):
    """Gives the value of every key the probability ``sure``, and the others the rest in equal parts."""

    def __init__(self, known: FactSet, sure: float) -> None:
        super().__init__()
        self.known = {tuple(key): int(value) for key, value in zip(known.keys.tolist(), known.values, strict=True)}
        self.sure = sure

    def forward(self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int) -> SimpleNamespace:
        logits = torch.full((len(input_ids), 1, TOKENS), math.log((1 - self.sure) / (TOKENS - 1)))
        for row, key in enumerate(input_ids.tolist()):
            logits[row, 0, self.known[tuple(key)]] = math.log(self.sure)
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(("sure", "bits", "right"), [(1 / TOKENS, 8.0, 0.0), (0.5, 1.0, 1.0), (0.125, 3.0, 1.0)])
def test_bits_left_are_those_of_the_probabilities(sure: float, bits: float, right: float) -> None:
    known = random_facts(700, 0)

    left, exact = bits_left(Sure(known, sure), {"input_ids": known.keys}, known.values)

    assert left == pytest.approx(bits, abs=1e-5)
    assert exact == right if sure > 1 / TOKENS else exact < 0.02


# --- the last layers --------------------------------------------------------------------------------------------------


def toy(layers: int = 4, **changes: Any) -> PreTrainedModel:
    record = models.resolve("toy-llama")
    config = {**record.config, "num_hidden_layers": layers, **changes}
    return models.build(replace(record, config_json=json.dumps(config)))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_the_last_layers_continue_the_first_ones(layers: int, tied: bool) -> None:
    whole = toy(tie_word_embeddings=tied)
    ids = torch.randint(0, 64, (3, 7))
    last = fact_bases._cut(whole, layers)

    found = last(inputs_embeds=fact_bases._activations(whole, ids, layers), use_cache=False).logits

    assert len(fact_bases._blocks(last)) == layers
    assert len(fact_bases._blocks(whole)) == 4
    torch.testing.assert_close(found, whole(input_ids=ids, use_cache=False).logits)


def test_a_cut_that_leaves_other_layers_is_noticed() -> None:
    whole = toy()
    other = fact_bases._cut(toy(initializer_range=0.3), 2)
    with pytest.raises(GaugeError, match="do not continue its first ones"):
        fact_bases._check_continues(whole, other, torch.randint(0, 64, (1, 7)), 2)


def test_training_the_last_layers_is_training_them_within_the_whole_model() -> None:
    """LoRA in the last two of four layers: losses and weights of ten steps."""
    whole, keys = toy(), torch.randint(0, 64, (8, 2))
    values = torch.randint(0, 64, (8,))
    in_whole = LORA.variant("l", "l", peft_config={"layers_to_transform": [2, 3]})
    last = fact_bases._cut(whole, 2)
    activations = fact_bases._activations(whole, keys, 2)
    trained = {
        "whole": (methods.attach(copy.deepcopy(whole), in_whole, seed=3), {"input_ids": keys}),
        "last": (methods.attach(copy.deepcopy(last), LORA, seed=3), {"inputs_embeds": activations}),
    }
    starts = [parameter for parameter in trained["whole"][0].parameters() if parameter.requires_grad]
    with torch.no_grad():  # the two draw their weights in another order
        for to, start in zip(
            (each for each in trained["last"][0].parameters() if each.requires_grad), starts, strict=True
        ):
            to.copy_(start)

    losses: dict[str, list[float]] = {}
    for name, (model, inputs) in trained.items():
        recall, optimizer = Recall(model), torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        losses[name] = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = recall(values, **inputs).loss
            loss.backward()
            optimizer.step()
            losses[name].append(float(loss.detach()))

    assert losses["whole"][-1] < losses["whole"][0] - 1e-3
    assert losses["last"] == pytest.approx(losses["whole"], abs=1e-5)


@pytest.mark.parametrize("layers", [0, 4, 9])
def test_a_number_of_layers_that_leaves_nothing_frozen_is_an_error(layers: int) -> None:
    with pytest.raises(GaugeError, match="train from 1 to 3 of them"):
        fact_bases._cut(toy(), layers)


def test_a_model_without_a_tokenizer_has_no_facts() -> None:
    with pytest.raises(GaugeError, match="needs? pretrained weights"):
        LastLayers(models.resolve("toy-llama"), 1).loaded()


def test_layers_that_learned_facts_know_them_and_the_frozen_ones_are_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    toy_record = models.resolve("toy-llama")
    config = {**toy_record.config, "vocab_size": 3 * TOKENS, "num_hidden_layers": 3, "initializer_range": 0.3}
    record = replace(toy_record, config_json=json.dumps(config))
    words = torch.arange(3 * TOKENS).split(TOKENS)
    ids = torch.randint(0, 3 * TOKENS, (2, 8))
    monkeypatch.setattr(fact_bases, "_words", lambda tokenizer: words)
    monkeypatch.setattr(models, "tokenizer", lambda model: object())
    monkeypatch.setattr(batches, "batches", lambda *_, **__: [{"input_ids": ids}])

    knowing = LastLayers(record, 2, facts=16, steps=150, rate=1e-2)
    old = knowing.old_facts()
    left = {}
    for base in (replace(knowing, facts=0), knowing):
        loaded = base.loaded()
        left[base.facts] = bits_left(loaded.model, loaded.inputs(old.keys, None), old.values)[0]

    assert left[0] > 7, "nothing was learned yet"
    assert left[16] < 2
    prepared = Facts(knowing, number=16, steps=1, batch=8, old=True).prepared()
    assert torch.equal(prepared.facts.values, old.values)


# --- the decoder, and training on it ----------------------------------------------------------------------------------


HASTY = Decoder(0, facts=64, steps=60)
"""Pretrained in seconds."""


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("facts")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    """The decoder `HASTY` in a cache of these tests, which the first of them pretrains."""
    pretrain_hastily(monkeypatch, own_cache)


def pretrain_hastily(patch: pytest.MonkeyPatch, cache: Path) -> None:
    patch.setenv("PEFT_GAUGE_CACHE", str(cache))
    patch.setattr(fact_bases, "PRETRAINING_BATCH", 64)
    fact_tasks._loaded.cache_clear()


def test_a_decoder_is_pretrained_once_and_stores_facts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretrain_hastily(monkeypatch, tmp_path)
    task = Facts(HASTY, seed=0, number=32, steps=80, batch=32)
    prepared = task.prepared()

    (folder,) = (tmp_path / "facts").iterdir()
    written = folder.stat().st_mtime_ns
    assert prepared.base.known(prepared.base.model, None) < 0.1, "it does not know its old facts"
    job = prepared.job(methods.FULL)
    before = prepared.validation_loss(job)
    curve = train(job, Schedule(task.steps, 1e-3))
    scores = prepared.scores(job)

    assert before > BITS, "new facts are a surprise"
    assert curve.divergence is None
    assert scores["bits_left"] < 0.2
    assert scores["quality"] == pytest.approx(BITS - scores["bits_left"])
    assert scores["exact_match"] == 1
    assert scores["forgetting"] > 0.1
    fact_tasks._loaded.cache_clear()
    assert task.prepared().base.known(task.prepared().base.model, None) < 0.1
    assert folder.stat().st_mtime_ns == written


@pytest.mark.usefixtures("hasty")
def test_every_method_trains_on_facts() -> None:
    task = Facts(HASTY, seed=0, number=64, steps=2, batch=16, held_out=16)
    prepared = task.prepared()
    for method in methods.DEFAULT_METHODS:
        job = prepared.job(method)
        train(job, Schedule(task.steps, 1e-3))
        scores = prepared.scores(job)
        assert scores.keys() >= {"bits_left", "trained_bits_left", "exact_match", "forgetting"}, method.name
        assert all(math.isfinite(score) for score in scores.values()), method.name


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_of_old_facts_the_loss_by_rounding_is_known_before_training() -> None:
    task = Facts(HASTY, seed=0, number=64, steps=30, batch=64, old=True)
    prepared = task.prepared()
    assert torch.equal(prepared.facts.values, HASTY.old_facts().values)
    before = prepared.base.known(prepared.base.model, None)
    rounded = methods.prepare_base(copy.deepcopy(prepared.base.model), methods.QLORA)
    lost = prepared.base.known(rounded, None) - before
    assert lost > 0, "rounding costs nothing: this base is no test"

    scores = {}
    for method in (LORA, methods.QLORA):
        job = prepared.job(method)
        assert train(job, Schedule(task.steps, 1e-3)).divergence is None
        scores[method] = prepared.scores(job)

    assert scores[LORA]["rounding_loss"] == pytest.approx(0, abs=1e-7)
    assert scores[methods.QLORA]["rounding_loss"] == pytest.approx(lost, rel=0.05)  # it computes in float16
    assert scores[methods.QLORA]["bits_left"] - before < lost, "training recovers some of it"
    # The facts that are trained are those that are forgotten.
    assert scores[LORA]["forgetting"] == pytest.approx(scores[LORA]["bits_left"] - before, abs=1e-6)


@pytest.mark.usefixtures("hasty")
def test_the_order_is_the_same_for_every_method_and_shows_each_fact_once_a_pass() -> None:
    prepared = Facts(HASTY, seed=0, number=64, steps=8, batch=16).prepared()
    full, lora = (prepared.job(method).batches for method in (methods.FULL, LORA))

    keys = [tuple(key) for place in range(4) for key in full[place]["input_ids"].tolist()]
    assert len(set(keys)) == 64
    for place in range(8):
        assert torch.equal(full[place]["input_ids"], lora[place]["input_ids"])
        assert torch.equal(full[place]["labels"], lora[place]["labels"])
    assert not torch.equal(full[0]["input_ids"], full[4]["input_ids"]), "each pass has an order of its own"


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_the_best_run_of_a_search_of_the_same_length_is_the_training() -> None:
    prepared = Facts(HASTY, seed=0, number=32, steps=6, batch=16).prepared()
    setting = Setting("lora", LORA, 1e-2)

    searched = train_setting(prepared, setting, 0, Lengths(6, 6))
    again = train_setting(prepared, setting, 0, Lengths(6, 6), searched.search)

    assert searched.scores == again.scores
    assert searched.curve is not None
    assert again.curve is not None
    assert searched.curve.losses == again.curve.losses
    assert searched.trainable_params == again.trainable_params


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_lora_plus_trains_b_at_a_multiple_of_the_rate() -> None:
    prepared = Facts(HASTY, seed=0, number=32, steps=4, batch=16).prepared()
    job = Setting("lora+", LORA, 1e-2, loraplus_ratio=16).job(prepared)

    train(job, Schedule(4, 1e-3))

    names = {id(parameter): name for name, parameter in job.model.named_parameters()}
    rates = {
        "lora_B" if "lora_B" in names[id(parameter)] else "lora_A": group["lr"]
        for group in job.optimizer.param_groups
        for parameter in group["params"]
    }
    assert rates["lora_B"] == pytest.approx(16 * rates["lora_A"])
    assert rates["lora_A"] == pytest.approx(Schedule(4, 1e-3).rate(3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "at least 1 step"),
        ({"number": 65_536, "held_out": 1}, "1 to 65535"),
        ({"number": 0}, "from 1 to"),
        ({"number": 32, "old": True}, "old facts are all those"),
    ],
)
def test_a_task_that_cannot_be_is_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(GaugeError, match=message):
        Facts(HASTY, **fields)
