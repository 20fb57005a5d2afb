"""A synthetic task with a known answer: learn back an update of known rank in known modules.

The teacher is the base model with W' = W + s·‖W‖₂·U·Vᵀ in every target module, U and V with r* orthonormal columns
drawn from a seed; the student is the base model with a method attached, trained on the teacher's logits. The r*
singular values are equal, so each missing rank costs about the same: the student's error falls until its rank is r*
and then stays flat, and only module sets that contain the planted ones reach the floor. A procedure that selects ranks
or modules has to find this answer before it is applied to a real model.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_gauge.errors import GaugeError
from peft_gauge.quality.training import without_dropout
from peft_gauge.quality.updates import lora_update_norm
from peft_gauge.training import methods, models
from peft_gauge.training.settings import StepSettings
from peft_gauge.training.step import TrainingJob

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peft_gauge.training.methods import Method
    from peft_gauge.training.models import ModelRecord

PLANTED_RANK = 4
UPDATE_OVER_WEIGHT = 0.5
"""Spectral norm of the planted update over that of the weight: large enough for a loss far above rounding."""

VALIDATION_SEED, HELD_OUT_SEED, TEACHER_SEED = 1_000_001, 1_000_002, 1_000_003


def small_decoder(seed: int = 0) -> ModelRecord:
    """The toy Llama at half its width, with weights whose products keep the norm of their inputs.

    With the usual standard deviation of 0.02, attention in such a narrow model is nearly uniform and queries hardly
    matter: an update of q_proj would be invisible in the logits and could not be learned back.
    """
    toy = models.resolve("toy-llama")
    width = 32
    config = {
        **toy.config,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "vocab_size": 64,
        "initializer_range": 1 / math.sqrt(width),
    }
    return replace(toy, name="toy-llama-half", config_json=json.dumps(config), seed=seed)


class Student(nn.Module):
    """A model trained on given logits: its loss is the mean squared difference, float32, over all tokens.

    Called like a language model, with the logits, of shape (batch, seq, vocabulary), as ``labels``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = getattr(model, "config", None)

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool = False) -> SimpleNamespace:
        # Virtual tokens before the input have logits of their own, but no teacher.
        logits = self.model(input_ids=input_ids, use_cache=use_cache).logits[:, -labels.shape[1] :]
        return SimpleNamespace(loss=nn.functional.mse_loss(logits.float(), labels))


@dataclass(frozen=True)
class Synthetic:
    """One synthetic task: an update of ``rank`` in the ``targets`` of every layer, all drawn from ``seed``.

    Rank 0 is the control: the teacher is the base model itself. Training uses ``batches`` of ``batch`` × ``seq``
    uniformly drawn token ids in order; with at least as many batches as steps, none repeats.
    """

    seed: int = 0
    rank: int = PLANTED_RANK
    targets: tuple[str, ...] = methods.ATTENTION_QV
    batches: int = 150
    batch: int = 8
    seq: int = 16

    name = "planted"

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise GaugeError(f"a planted rank must be at least 0, got {self.rank}")

    @property
    def record(self) -> ModelRecord:
        """The base model; its weights are drawn from the seed, too."""
        return small_decoder(self.seed)

    @property
    def settings(self) -> StepSettings:
        """The shape of a step."""
        return StepSettings(batch=self.batch, seq=self.seq)

    def identity(self) -> dict[str, Any]:
        """Everything that determines the task, as JSON."""
        fields = {key: getattr(self, key) for key in ("seed", "rank", "targets", "batches", "batch", "seq")}
        return {"task": self.name, "config": self.record.config_json, "size": UPDATE_OVER_WEIGHT, **fields}

    def prepared(self) -> PreparedSynthetic:
        """The task with base, teacher and batches built: a fraction of a second, once for all settings."""
        base = models.build(self.record)
        teacher, synthetic_norm = plant(base, self.rank, self.targets, seed=self.seed)

        def taught(number: int, rows: int, seed: int) -> list[dict[str, Tensor]]:
            generator = torch.Generator().manual_seed(seed)
            vocabulary = base.get_input_embeddings().num_embeddings
            ids = torch.randint(0, vocabulary, (number, rows, self.seq), generator=generator)
            with torch.no_grad():
                return [{"input_ids": rows, "labels": teacher(rows, use_cache=False).logits} for rows in ids]

        return PreparedSynthetic(
            task=self,
            base=base,
            synthetic_norm=synthetic_norm,
            training=taught(self.batches, self.batch, self.seed),
            validation=taught(1, 8 * self.batch, VALIDATION_SEED + self.seed),
            held_out=taught(1, 8 * self.batch, HELD_OUT_SEED + self.seed),
        )


@dataclass(frozen=True)
class PreparedSynthetic:
    """A `Synthetic` task ready for training. ``synthetic_norm``: Frobenius norm of the planted update over all layers;
    ``validation``: batches to select learning rates; ``held_out``: batches to score a trained student."""

    task: Synthetic
    base: PreTrainedModel
    synthetic_norm: float
    training: Sequence[dict[str, Tensor]]
    validation: Sequence[dict[str, Tensor]]
    held_out: Sequence[dict[str, Tensor]]
    notes: tuple[str, ...] = ()

    def job(self, method: Method) -> TrainingJob:
        """A student of ``method`` on a fresh copy of the base, before its first step."""
        model = methods.attach(copy.deepcopy(self.base), method, seed=self.task.seed)
        torch.manual_seed(self.task.seed)  # for dropout, if the method has it
        return TrainingJob(Student(model), self.training, self.task.settings)

    def validation_loss(self, job: TrainingJob) -> float:
        """Mean squared error of the logits on the validation batch."""
        return loss_on(job.model, self.validation)

    def scores(self, job: TrainingJob) -> dict[str, float]:
        """``held_out_loss``, mean squared; unless teacher and base are equal, ``quality``: the share of the base's
        error that the student removed (at most 1; below 0 if it is worse than the base); and for LoRA,
        ``update_over_synthetic``: the norm of its update over that of the planted one."""
        loss, of_base = loss_on(job.model, self.held_out), loss_on(Student(self.base), self.held_out)
        scores = {"held_out_loss": loss, "base_held_out_loss": of_base}
        if of_base == 0:
            return scores
        scores["quality"] = 1 - loss / of_base
        update_norm = lora_update_norm(job.model)
        if update_norm is not None:
            scores["update_over_synthetic"] = update_norm / self.synthetic_norm
        return scores


def plant(base: PreTrainedModel, rank: int, targets: Sequence[str], *, seed: int) -> tuple[PreTrainedModel, float]:
    """A copy of ``base`` with an update of ``rank`` equal singular values in every linear layer named in ``targets``,
    and the Frobenius norm of all these updates together.

    Raises `GaugeError` if no layer has such a name, or one is too small for the rank.
    """
    teacher = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(TEACHER_SEED + seed)
    chosen = [module for path, module in teacher.named_modules() if path.rpartition(".")[2] in targets]
    if not chosen:
        raise GaugeError(f"this model has no module called {' or '.join(targets)}")
    singular_values: list[float] = []
    with torch.no_grad():
        for module in chosen:
            weight = module.weight
            if rank > min(weight.shape):
                raise GaugeError(f"an update of rank {rank} does not fit a weight of {tuple(weight.shape)}")
            u, v = (torch.linalg.qr(torch.randn(size, rank, generator=generator))[0] for size in weight.shape)
            size = UPDATE_OVER_WEIGHT * float(torch.linalg.matrix_norm(weight, 2))
            weight += size * u @ v.T
            singular_values += [size] * rank
    return teacher, math.hypot(*singular_values)


def loss_on(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> float:
    """The model's mean loss over ``batches`` of equal size, without dropout."""
    with torch.no_grad(), without_dropout(model):
        return sum(float(model(**batch, use_cache=False).loss) for batch in batches) / len(batches)
