"""A training step against truths known beforehand: its arithmetic, its bookkeeping, its batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft_gauge.errors import GaugeError
from peft_gauge.training import models, step
from peft_gauge.training.batches import batches, chat_examples
from peft_gauge.training.settings import OPTIMIZERS, StepSettings
from peft_gauge.training.step import TrainingJob


class Quadratic(nn.Module):
    """loss = mean((w - target)²) for each element: gradient 2(w - target)/n."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.calls: list[Tensor] = []

    def forward(self, target: Tensor, use_cache: bool) -> object:
        assert use_cache is False, "a key-value cache would stay alive with the outputs"
        self.calls.append(target)
        loss = ((self.w - target) ** 2).mean()
        return type("Output", (), {"loss": loss})()


def quadratic_job(**settings: object) -> TrainingJob:
    targets = [{"target": torch.tensor([1.0, 3.0])}, {"target": torch.tensor([3.0, 1.0])}]
    return TrainingJob(Quadratic(), targets, StepSettings(batch=1, seq=2, **settings))  # type: ignore[arg-type]


def test_one_step_of_gradient_descent_by_hand() -> None:
    job = quadratic_job(optimizer="sgd", learning_rate=0.5)
    job.step()
    # gradient at w=0: 2(0 - [1, 3])/2 = [-1, -3]
    assert job.trainable[0].tolist() == [0.5, 1.5]


def test_accumulation_averages_the_gradients_of_its_micro_batches() -> None:
    job = quadratic_job(optimizer="sgd", learning_rate=0.5, grad_accumulation=2)
    job.step()
    # mean of [-1, -3] and [-3, -1]
    assert job.trainable[0].tolist() == [1.0, 1.0]
    assert job.settings.tokens == 1 * 2 * 2


def test_clipping_by_hand() -> None:
    job = quadratic_job(optimizer="sgd", learning_rate=1.0, clip_grad_norm=1.0)
    job.step()
    norm = 10**0.5
    assert job.trainable[0].tolist() == pytest.approx([1 / norm, 3 / norm], rel=1e-5)


def test_batches_are_taken_in_turn() -> None:
    job = quadratic_job(optimizer="sgd")
    for _ in range(3):
        job.step()
    model = job.model
    assert isinstance(model, Quadratic)
    assert [call.tolist() for call in model.calls] == [[1, 3], [3, 1], [1, 3]]


def test_between_steps_there_are_no_gradients_and_no_graph() -> None:
    job = quadratic_job()
    job.warm_up()
    assert job.loss is None
    assert all(parameter.grad is None for parameter in job.trainable)
    assert len(job.losses) == 2


def test_learned_sees_a_parameter_that_stands_still() -> None:
    job = quadratic_job(optimizer="sgd", learning_rate=0.0)
    job.warm_up()
    assert not job.learned()
    job = quadratic_job(optimizer="sgd", learning_rate=0.1)
    with pytest.raises(GaugeError, match="call warm_up"):
        job.learned()
    job.warm_up()
    assert job.learned()


@pytest.mark.parametrize(
    ("dtype", "target", "learned"),
    [
        (torch.bfloat16, [3.0, 3.0], True),  # an update of 1e-4 to 1.0, whose neighbours are 0.004 and 0.008 away
        (torch.float16, [3.0, 3.0], True),
        (torch.bfloat16, [1.0, 1.0], False),  # no gradient
    ],
)
def test_an_update_that_rounding_swallows_was_one(dtype: torch.dtype, target: list[float], learned: bool) -> None:
    """As with the norms of an untrained model in 16 bit, which is what a GPU trains by default."""
    model = Quadratic()
    model.w = nn.Parameter(torch.ones(2, dtype=dtype))
    job = TrainingJob(model, [{"target": torch.tensor(target, dtype=dtype)}], StepSettings(batch=1, seq=2))
    job.warm_up()
    assert model.w.tolist() == [1.0, 1.0]
    assert job.learned() is learned


def test_learned_sees_two_weights_that_changed_places() -> None:
    job = quadratic_job(optimizer="sgd", learning_rate=0.0)
    job.trainable[0].data = torch.tensor([1.0, 2.0])
    job.warm_up()
    assert not job.learned()
    job.trainable[0].data = torch.tensor([2.0, 1.0])
    assert job.learned()


def test_learned_sees_places_far_apart() -> None:
    """A large tensor is read in parts; two weights at the same place of two parts have changed places."""
    job = quadratic_job(optimizer="sgd", learning_rate=0.0)
    far = 3 * 2**20
    values = torch.zeros(far + 7)
    values[5] = 1.0
    job.trainable[0].data = values
    job._at_start = [step._digest(parameter) for parameter in job.trainable]
    assert not job.learned()
    values[[5, far + 5]] = values[[far + 5, 5]]
    assert job.learned()


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "8bit" not in name])
def test_every_optimizer_moves_only_what_trains(name: str) -> None:
    job = quadratic_job(optimizer=name)
    job.warm_up()
    assert job.learned()
    model = job.model
    assert isinstance(model, Quadratic)
    assert model.frozen.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch": 0, "seq": 2}, "batch must be at least 1"),
        ({"batch": 1, "seq": 2, "optimizer": "adamx"}, "unknown optimizer"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(GaugeError, match=said):
        StepSettings(**settings)  # type: ignore[arg-type]


def test_no_batches_are_refused() -> None:
    with pytest.raises(GaugeError, match="no batch"):
        TrainingJob(Quadratic(), [], StepSettings(1, 2))


# ---- batches -------------------------------------------------------------------------------------------------------


def test_the_chat_dataset_has_a_hundred_examples() -> None:
    dataset = chat_examples()
    assert len(dataset) == 100
    assert dataset.column_names == ["prompt", "response"]
    assert len(set(dataset["prompt"])) == 100


def test_ids_without_a_tokenizer_are_seeded_and_inside_the_vocabulary() -> None:
    first = batches(None, vocab_size=50, batch=3, seq=7, seed=1)
    again = batches(None, vocab_size=50, batch=3, seq=7, seed=1)
    other = batches(None, vocab_size=50, batch=3, seq=7, seed=2)
    assert [b["input_ids"].shape for b in first] == [(3, 7)] * 4
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0]["input_ids"], other[0]["input_ids"])
    assert max(int(b["input_ids"].max()) for b in first) < 50


class LetterTokenizer:
    """One id a letter; enough of a tokenizer for `batches`."""

    chat_template = None
    eos_token = "\0"

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


def test_a_tokenizer_gives_the_same_shape_from_the_examples_in_order() -> None:
    found = batches(LetterTokenizer(), vocab_size=0x110000, batch=2, seq=8, number=2)
    assert [b["input_ids"].shape for b in found] == [(2, 8)] * 2
    text = "".join(chr(i) for b in found for i in b["input_ids"].flatten().tolist())
    first = chat_examples()[0]
    assert f"{first['prompt']}\n{first['response']}".startswith(text)


def test_more_tokens_than_the_examples_have_repeat_them() -> None:
    class OneToken(LetterTokenizer):
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [len(text)]}

    found = batches(OneToken(), vocab_size=10**6, batch=1, seq=150, number=1)
    ids = found[0]["input_ids"][0]
    assert torch.equal(ids[:50], ids[100:])


@pytest.mark.slow
@pytest.mark.integration
def test_real_tokens_where_the_weights_were_fetched() -> None:
    try:
        record = models.resolve("smollm2-135m", weights="real")
    except GaugeError as error:
        pytest.skip(str(error))
    tokenizer = models.tokenizer(record)
    assert tokenizer is not None
    found = batches(tokenizer, vocab_size=49152, batch=1, seq=64, number=1)
    assert chat_examples()[0]["prompt"] in tokenizer.decode(found[0]["input_ids"][0].tolist())
