"""Training a base on facts, and the bits that are left of each afterwards."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_gauge.errors import GaugeError
from peft_gauge.quality.facts import BITS, CLIP, TOKENS, FactSet, Order, Recall, bits_left, composed_facts, random_facts
from peft_gauge.quality.updates import lora_update_norm
from peft_gauge.training import methods
from peft_gauge.training.settings import StepSettings
from peft_gauge.training.step import TrainingJob

if TYPE_CHECKING:
    from peft_gauge.quality.fact_bases import Decoder, LastLayers, Loaded
    from peft_gauge.training.methods import Method

ALIKE = 0.01
"""Bits left that do not differ by as much are alike."""


@dataclass(frozen=True)
class Facts:
    """``number`` facts, drawn and ordered by ``seed``, to train ``base`` on in ``steps`` steps of ``batch``.

    ``held_out``: 0 for random facts; otherwise the facts are composed, and this many others are scored. ``old``: the
    facts are those that ``base`` learned before, all of them, to see whether training recovers what rounding lost.
    """

    base: Decoder | LastLayers
    seed: int = 0
    number: int = 512
    steps: int = 600
    batch: int = 64
    held_out: int = 0
    old: bool = False

    def __post_init__(self) -> None:
        if self.old and (self.held_out or self.number != self.base.facts):
            raise GaugeError("old facts are all those that the base learned before, and none is held out")
        if min(self.steps, self.batch) < 1 or self.held_out < 0:
            raise GaugeError("facts need at least 1 step and 1 fact in a batch, and no negative number held out")
        if not 1 <= self.number <= TOKENS**2 - self.held_out:
            raise GaugeError(f"a number of facts from 1 to {TOKENS**2 - self.held_out} is possible, not {self.number}")

    @property
    def settings(self) -> StepSettings:
        """The shape of a step."""
        return StepSettings(self.batch, 2, clip_grad_norm=CLIP)

    def identity(self) -> dict[str, Any]:
        """Everything that determines the task, as JSON."""
        fields = {key: getattr(self, key) for key in ("seed", "number", "steps", "batch", "held_out")}
        fields |= {"old": True} if self.old else {}
        return {"task": "facts", **self.base.identity(), **fields, "clip": CLIP}

    def prepared(self) -> PreparedFacts:
        """The task with base and facts built."""
        held_out = None
        if self.held_out:
            facts, held_out = composed_facts(self.number, self.held_out, self.seed)
        elif self.old:
            facts = self.base.old_facts()
        else:
            facts = random_facts(self.number, self.seed)
        return PreparedFacts(self, _loaded(self.base), facts, held_out)


@lru_cache(maxsize=2)
def _loaded(base: Decoder | LastLayers) -> Loaded:
    return base.loaded()


@dataclass(frozen=True)
class PreparedFacts:
    """`Facts` ready for training. ``held_out``: ``None`` for random facts."""

    task: Facts
    base: Loaded
    facts: FactSet
    held_out: FactSet | None
    notes: tuple[str, ...] = ()
    kept: dict[tuple[int, Method | None], Mapping[str, Tensor]] = field(default_factory=dict, repr=False)
    rounded: dict[Method, float] = field(default_factory=dict, repr=False)

    def job(self, method: Method) -> FactsJob:
        """Training by ``method`` on a fresh copy of the base, before its first step."""
        attached = methods.attach(copy.deepcopy(self.base.model), method, seed=self.task.seed)
        torch.manual_seed(self.task.seed)  # for dropout, if the method has it
        quantized = _quantized(method)
        return FactsJob(attached, self.task, self.facts, self._inputs(self.facts, quantized), method)

    def validation_loss(self, job: TrainingJob) -> float:
        """Bits left to the precision of `ALIKE`, for the choice of a learning rate: there are no other facts to choose
        it by, and where several rates store everything, the lowest is chosen."""
        return round(self._left(job)[0] / self._alike) * self._alike

    def scores(self, job: TrainingJob) -> dict[str, float]:
        """``bits_left`` per fact, ``quality`` (the bits stored: 8 minus those left), and ``exact_match``, the share of
        facts whose value is the most likely one; of held-out facts, if they are composed, with ``trained_bits_left``
        for the trained ones. ``forgetting``: the increase of bits per old fact (decoder) or per token of known text,
        over the base before any rounding. ``rounding_loss``, of old facts: the same before any training. For LoRA,
        ``update_norm``.
        """
        assert isinstance(job, FactsJob)
        left, right = self._left(job)
        scores = {"bits_left": left, "quality": BITS - left, "exact_match": right}
        if self.held_out is not None:
            scores["trained_bits_left"] = self._bits(job, self.facts)[0]
        scores["forgetting"] = self.base.known(job.model.model, job.quantized) - self._known_before
        if self.task.old:
            scores["rounding_loss"] = self._rounding_loss(job.method)
        update_norm = lora_update_norm(job.model)
        return scores if update_norm is None else {**scores, "update_norm": update_norm}

    def _rounding_loss(self, method: Method) -> float:
        """Computed once: a search trains by one method at several rates."""
        if method not in self.rounded:
            self.rounded[method] = self._bits(self.job(method), self.facts)[0] - self._old_before
        return self.rounded[method]

    def _left(self, job: TrainingJob) -> tuple[float, float]:
        return self._bits(job, self.held_out or self.facts)

    def _bits(self, job: TrainingJob, facts: FactSet) -> tuple[float, float]:
        assert isinstance(job, FactsJob)
        return bits_left(job.model.model, self._inputs(facts, job.quantized), facts.values)

    def _inputs(self, facts: FactSet, quantized: Method | None) -> Mapping[str, Tensor]:
        """Computed once: frozen layers take longer than the trained ones."""
        key = id(facts), quantized
        if key not in self.kept:
            self.kept[key] = self.base.inputs(facts.keys, quantized)
        return self.kept[key]

    @property
    def _alike(self) -> float:
        """Rounding costs less than new facts do."""
        return ALIKE / 10 if self.task.old else ALIKE

    @cached_property
    def _old_before(self) -> float:
        return bits_left(self.base.model, self._inputs(self.facts, None), self.facts.values)[0]

    @cached_property
    def _known_before(self) -> float:
        return self.base.known(self.base.model, None)


def _quantized(method: Method) -> Method | None:
    """A method that quantizes the frozen layers as ``method`` does, equal for all that quantize alike."""
    if method.quantization is None:
        return None
    return methods.QLORA.variant("quantized", "quantized", quantization=method.quantization)


class FactsJob(TrainingJob):
    """Training on facts by ``method``. ``quantized``: the method that quantizes the frozen layers, if any."""

    model: Recall
    chance_loss = math.log(TOKENS)

    def __init__(
        self,
        model: nn.Module,
        task: Facts,
        facts: FactSet,
        inputs: Mapping[str, Tensor],
        method: Method,
    ) -> None:
        self.method = method
        self.quantized = _quantized(method)
        order = Order(facts, inputs, task.steps, task.batch, task.seed)
        super().__init__(Recall(model), order, task.settings)
