"""A text task on a real model: how well it learns the responses, and how much it forgets of text it knew.

The generated task is `peft_gauge.quality.examples.calendar_examples`; a user's dataset can replace it.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_gauge.errors import GaugeError
from peft_gauge.quality.examples import MASKED, calendar_examples, collate, encode, known_text, load_examples, padding
from peft_gauge.quality.training import without_dropout
from peft_gauge.quality.updates import lora_update_norm
from peft_gauge.training import methods, models
from peft_gauge.training.settings import StepSettings
from peft_gauge.training.step import TrainingJob

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peft_gauge.quality.examples import Encoded
    from peft_gauge.training.methods import Method
    from peft_gauge.training.models import ModelRecord

CALENDAR = "calendar"
"""The name of the generated task; any other source is a dataset."""


@dataclass(frozen=True)
class Scored:
    """A model's scores on responses: ``loss`` in nats per token; ``answer_probability``, the mean probability of the
    whole response; and ``exact_match``, the share of responses that greedy decoding reproduces to the last token."""

    loss: float
    answer_probability: float
    exact_match: float


@dataclass(frozen=True)
class TextTask:
    """Responses to learn, in ``batches`` of ``batch`` examples, drawn and ordered by ``seed``.

    ``source``: `CALENDAR`, or a dataset for `load_examples`, repeated as often as needed in another order each time.
    ``validation`` and ``held_out`` are numbers of examples; of a dataset at most a quarter each. ``device`` and
    ``dtype`` are those of the base. ``stored``: a record with equal weights that loads faster.
    """

    model: ModelRecord
    seed: int = 0
    source: str = CALENDAR
    batches: int = 100
    batch: int = 4
    clip_grad_norm: float | None = None
    validation: int = 32
    held_out: int = 64
    device: str = "cpu"
    dtype: str = "float32"
    stored: ModelRecord | None = None

    def __post_init__(self) -> None:
        if min(self.batches, self.batch, self.validation, self.held_out) < 1:
            raise GaugeError("a text task needs at least 1 batch, and 1 example in each split")

    def identity(self) -> dict[str, Any]:
        """Everything that determines the task, as JSON."""
        return {"task": "text", **asdict(replace(self, stored=None))}

    def prepared(self) -> PreparedText:
        """The task with model and batches built. Raises `GaugeError` if the model has no tokenizer, or the data does
        not fit it."""
        tokenizer, base = _tokenizer(self.model), _base(self.stored or self.model, self.dtype)
        pad, note = padding(tokenizer)
        training, validation, held_out = split(self.encoded(tokenizer), self)

        def batched(examples: Sequence[Encoded], rows: int) -> list[dict[str, Tensor]]:
            cuts = range(0, len(examples), rows)
            return [collate(examples[start : start + rows], pad, device=self.device) for start in cuts]

        known = known_text(tokenizer, base, self.device)
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
        """The shape of a step whose batch includes the longest example."""
        longest = max(len(example.ids) for example in self.encoded(_tokenizer(self.model)))
        return StepSettings(self.batch, longest, clip_grad_norm=self.clip_grad_norm)

    def encoded(self, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
        """All examples as tokens; for the calendar, as many as the splits need."""
        number = self.validation + self.held_out + self.batches * self.batch
        found = calendar_examples(number, self.seed) if self.source == CALENDAR else load_examples(self.source)
        return [encode(example, tokenizer, most_tokens=self.model.max_positions) for example in found]


def split(examples: Sequence[Encoded], task: TextTask) -> tuple[list[Encoded], list[Encoded], list[Encoded]]:
    """Split examples into training (in order of use), validation (for learning rates) and held-out ones.

    The splits are disjoint. A dataset with fewer than 3 examples uses its training examples for validation.
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
            f"{model.name} has no tokenizer here: a text task needs pretrained weights; run peft-gauge fetch smollm2"
        )
    return found


@lru_cache(maxsize=1)
def _base(model: ModelRecord, dtype: str) -> PreTrainedModel:
    """The base model, kept since it is copied for every training: reading a GGUF file takes long."""
    return models.build(model, dtype=dtype)


@dataclass(frozen=True)
class PreparedText:
    """A `TextTask` ready for training. ``known``: text like the base model's training data; ``notes``: assumptions."""

    task: TextTask
    base: PreTrainedModel
    training: Sequence[Mapping[str, Tensor]]
    validation: Sequence[Mapping[str, Tensor]]
    held_out: Sequence[Mapping[str, Tensor]]
    known: Sequence[Mapping[str, Tensor]]
    notes: tuple[str, ...]

    @cached_property
    def base_scores(self) -> dict[str, Scored]:
        """The untrained base model's scores on the held-out responses and on the known text."""
        base = self.base.to(self.task.device)
        return {"held_out": score(base, self.held_out), "known": score(base, self.known)}

    def job(self, method: Method) -> TrainingJob:
        """Training by ``method`` on a fresh copy of the base, before its first step."""
        model = methods.attach(copy.deepcopy(self.base), method, seed=self.task.seed, device=self.task.device)
        model.to(self.task.device)
        torch.manual_seed(self.task.seed)  # for dropout, if the method has it
        longest = max(batch["input_ids"].shape[1] for batch in self.training)
        settings = StepSettings(self.task.batch, longest, clip_grad_norm=self.task.clip_grad_norm)
        return TrainingJob(model, self.training, settings)

    def validation_loss(self, job: TrainingJob) -> float:
        """Loss per token of the validation responses."""
        return score(job.model, self.validation).loss

    def scores(self, job: TrainingJob) -> dict[str, float]:
        """On held-out responses: ``held_out_loss`` (nats per token), ``bits_left`` (the same in bits), ``loss_learned``
        (the share of the base's loss that training removed: at most 1, below 0 if it is worse than the base),
        ``answer_probability`` and ``exact_match``. ``forgetting``: the increase of loss, in nats per token, on text
        like the base model's training data. For LoRA, ``update_norm``.

        ``quality`` is ``answer_probability`` on the calendar: most of its loss is the format, which any method learns
        in a few steps, and a date is right or wrong as a whole. On other datasets it is the bits per token that
        training removed, since responses vary in length.
        """
        of_base, learned = self.base_scores["held_out"], score(job.model, self.held_out)
        loss_learned = 1 - learned.loss / of_base.loss
        bits_learned = (of_base.loss - learned.loss) / math.log(2)
        scores = {
            "held_out_loss": learned.loss,
            "bits_left": learned.loss / math.log(2),
            "base_held_out_loss": of_base.loss,
            "loss_learned": loss_learned,
            "answer_probability": learned.answer_probability,
            "exact_match": learned.exact_match,
            "base_exact_match": of_base.exact_match,
            "quality": learned.answer_probability if self.task.source == CALENDAR else bits_learned,
            # The project's own chat texts: in no model's training data, but close to an instruction model's language.
            "forgetting": score(job.model, self.known).loss - self.base_scores["known"].loss,
        }
        update_norm = lora_update_norm(job.model)
        return scores if update_norm is None else {**scores, "update_norm": update_norm}


def score(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> Scored:
    """Loss per labelled token over ``batches``, and the share of rows whose every labelled token is the most likely.

    The latter equals exact match under greedy decoding, without decoding: if each next token is the most likely one
    given the right beginning, greedy decoding produces the response, and conversely.
    """
    loss, probability, tokens, right, rows = 0.0, 0.0, 0, 0, 0
    with torch.no_grad(), without_dropout(model):
        for batch in batches:
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            labels = batch["labels"][:, 1:]
            # Virtual tokens come first; the logits of the last token predict nothing.
            logits = model(**inputs, use_cache=False).logits[:, -batch["labels"].shape[1] : -1].float()
            asked = labels != MASKED
            nats = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=MASKED, reduction="none")
            loss += float(nats.sum())
            probability += float(nats.sum(dim=1).neg().exp().sum())
            tokens += int(asked.sum())
            right += int(((logits.argmax(-1) == labels) | ~asked).all(dim=1).sum())
            rows += len(labels)
    if tokens == 0:
        raise GaugeError("these examples have no response to score")
    return Scored(loss / tokens, probability / rows, right / rows)
