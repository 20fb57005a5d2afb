"""A text task on a real model: what it learns of the answers, and what it forgets of the text that it knew.

The generated task is `peft_gauge.quality.examples.calendar_examples`; a dataset of the user's own takes its place.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_gauge.errors import GaugeError
from peft_gauge.quality.examples import MASKED, calendar_examples, collate, encode, load_examples, padding
from peft_gauge.quality.training import without_dropout
from peft_gauge.quality.updates import lora_update_norm
from peft_gauge.training import batches, methods, models
from peft_gauge.training.step import StepSettings, TrainingJob

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peft_gauge.quality.examples import Encoded
    from peft_gauge.training.methods import Method
    from peft_gauge.training.models import ModelRecord

CALENDAR = "calendar"
"""The name of the generated task; any other source is a dataset."""

KNOWN_ROWS, KNOWN_TOKENS = 8, 64
"""Rows and tokens a row of the text by which forgetting is seen."""


@dataclass(frozen=True)
class Scored:
    """What a model makes of answers: ``loss`` in nats a token; ``answer_probability``, the mean probability with which
    it would write the whole answer; and the share answered to the last token under greedy decoding."""

    loss: float
    answer_probability: float
    exact_match: float


@dataclass(frozen=True)
class TextTask:
    """Answers to be learned by a model, in ``batches`` of ``batch`` examples, drawn and ordered by ``seed``.

    ``source``: `CALENDAR`, or a dataset as `load_examples` takes it, which is gone through as often as needed, in
    another order each time. ``validation`` and ``held_out`` are numbers of examples; of a dataset at most a quarter
    each. ``device`` and ``dtype`` are those of the base. ``stored``: the very same weights where they load faster.
    """

    model: ModelRecord
    seed: int = 0
    source: str = CALENDAR
    batches: int = 100
    batch: int = 4
    validation: int = 32
    held_out: int = 64
    device: str = "cpu"
    dtype: str = "float32"
    stored: ModelRecord | None = None

    def __post_init__(self) -> None:
        if min(self.batches, self.batch, self.validation, self.held_out) < 1:
            raise GaugeError("a text task needs at least 1 batch, and 1 example in each of its parts")

    def identity(self) -> dict[str, Any]:
        """Everything that determines the task, as JSON holds it."""
        return {"task": "text", **asdict(replace(self, stored=None))}

    def prepared(self) -> PreparedText:
        """The task with model and batches built. Raises `GaugeError` where the model has no tokenizer, or the data does
        not suit it."""
        tokenizer, base = _tokenizer(self.model), _base(self.stored or self.model, self.dtype)
        pad, note = padding(tokenizer)
        training, validation, held_out = split(self.encoded(tokenizer), self)

        def batched(examples: Sequence[Encoded], rows: int) -> list[dict[str, Tensor]]:
            cuts = range(0, len(examples), rows)
            return [collate(examples[start : start + rows], pad, device=self.device) for start in cuts]

        known = batches.batches(
            tokenizer,
            vocab_size=base.get_input_embeddings().num_embeddings,
            batch=KNOWN_ROWS,
            seq=KNOWN_TOKENS,
            number=1,
            device=self.device,
        )
        return PreparedText(
            task=self,
            base=base,
            training=batched(training, self.batch),
            validation=batched(validation, 2 * self.batch),
            held_out=batched(held_out, 2 * self.batch),
            known=known,
            notes=(note,) if note else (),
        )

    def settings(self) -> StepSettings:
        """The shape of a step whose batch holds the longest example."""
        return StepSettings(self.batch, max(len(example.ids) for example in self.encoded(_tokenizer(self.model))))

    def encoded(self, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
        """All examples as tokens; of the calendar as many as the parts need."""
        number = self.validation + self.held_out + self.batches * self.batch
        found = calendar_examples(number, self.seed) if self.source == CALENDAR else load_examples(self.source)
        return [encode(example, tokenizer, most_tokens=self.model.max_positions) for example in found]


def split(examples: Sequence[Encoded], task: TextTask) -> tuple[list[Encoded], list[Encoded], list[Encoded]]:
    """Examples to train on, in the order of their use; to choose learning rates by; and to be judged by.

    No example is in two parts. Where a dataset is too small for three parts (fewer than 3 examples), rates are chosen
    by what is trained on.
    """
    generator = random.Random(task.seed)
    shuffled = generator.sample(examples, len(examples))
    quarter = max(1, len(examples) // 4)
    held_out_number = min(task.held_out, quarter)
    held_out, rest = shuffled[:held_out_number], shuffled[held_out_number:]
    validation_number = min(task.validation, quarter)
    validation, train = rest[:validation_number], rest[validation_number:]
    train = train or validation
    ordered = list(train)
    while len(ordered) < task.batches * task.batch:
        ordered += generator.sample(train, len(train))
    return ordered[: task.batches * task.batch], validation, held_out


def _tokenizer(model: ModelRecord) -> PreTrainedTokenizerBase:
    found = models.tokenizer(model)
    if found is None:
        raise GaugeError(
            f"{model.name} has no tokenizer here: a text task needs real weights; peft-gauge fetch smollm2"
        )
    return found


@lru_cache(maxsize=1)
def _base(model: ModelRecord, dtype: str) -> PreTrainedModel:
    """It is copied for every training; reading a GGUF anew for every seed takes long."""
    return models.build(model, dtype=dtype)


@dataclass(frozen=True)
class PreparedText:
    """A `TextTask` ready to be trained on. ``known``: text of the kind that the base was made for; ``notes``: what had
    to be assumed."""

    task: TextTask
    base: PreTrainedModel
    training: Sequence[Mapping[str, Tensor]]
    validation: Sequence[Mapping[str, Tensor]]
    held_out: Sequence[Mapping[str, Tensor]]
    known: Sequence[Mapping[str, Tensor]]
    notes: tuple[str, ...]

    @cached_property
    def base_scores(self) -> dict[str, Scored]:
        """What the base model, untrained, makes of the held-out answers and of the known text."""
        base = self.base.to(self.task.device)
        return {"held_out": score(base, self.held_out), "known": score(base, self.known)}

    def job(self, method: Method) -> TrainingJob:
        """Training by ``method`` on a fresh copy of the base, before its first step."""
        model = methods.attach(copy.deepcopy(self.base), method, seed=self.task.seed, device=self.task.device)
        model.to(self.task.device)
        torch.manual_seed(self.task.seed)  # dropout, where the method has some
        longest = max(batch["input_ids"].shape[1] for batch in self.training)
        return TrainingJob(model, self.training, StepSettings(batch=self.task.batch, seq=longest))

    def validation_loss(self, job: TrainingJob) -> float:
        """Loss a token of the validation answers."""
        return score(job.model, self.validation).loss

    def scores(self, job: TrainingJob) -> dict[str, float]:
        """Of the held-out answers ``held_out_loss`` (nats a token), ``loss_learned``, the share of the base's loss that
        was learned away (1 at best, below 0 where it is worse than the base), ``answer_probability`` and
        ``exact_match``; ``forgetting``, by how many nats a token the loss on text of the kind that the base was made
        for has risen; for LoRA, ``update_norm``.

        ``quality`` is ``answer_probability`` on the calendar: most of the loss of its answers is their form, which
        anything learns in a few steps, and an answer is right or wrong as a whole. Answers of other datasets are as
        long as they are, and there it is ``loss_learned``.
        """
        of_base, learned = self.base_scores["held_out"], score(job.model, self.held_out)
        loss_learned = 1 - learned.loss / of_base.loss
        scores = {
            "held_out_loss": learned.loss,
            "base_held_out_loss": of_base.loss,
            "loss_learned": loss_learned,
            "answer_probability": learned.answer_probability,
            "exact_match": learned.exact_match,
            "base_exact_match": of_base.exact_match,
            "quality": learned.answer_probability if self.task.source == CALENDAR else loss_learned,
            # The project's own chat texts: in no model's training data, and an instruction model speaks their language.
            "forgetting": score(job.model, self.known).loss - self.base_scores["known"].loss,
        }
        update_norm = lora_update_norm(job.model)
        return scores if update_norm is None else {**scores, "update_norm": update_norm}


def score(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> Scored:
    """Loss a labelled token over ``batches``, and the share of rows whose every labelled token is the likeliest.

    The latter is exact match under greedy decoding without decoding: a model that is given the right beginning and
    finds each next token likeliest is one that would have written the answer, and the other way round.
    """
    loss, probability, tokens, right, rows = 0.0, 0.0, 0, 0, 0
    with torch.no_grad(), without_dropout(model):
        for batch in batches:
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            labels = batch["labels"][:, 1:]
            # Virtual tokens stand at the front; the logits of the last token predict nothing.
            logits = model(**inputs, use_cache=False).logits[:, -batch["labels"].shape[1] : -1].float()
            asked = labels != MASKED
            nats = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=MASKED, reduction="none")
            loss += float(nats.sum())
            probability += float(nats.sum(dim=1).neg().exp().sum())
            tokens += int(asked.sum())
            right += int(((logits.argmax(-1) == labels) | ~asked).all(dim=1).sum())
            rows += len(labels)
    if tokens == 0:
        raise GaugeError("there is no answer to score in these examples")
    return Scored(loss / tokens, probability / rows, right / rows)
