"""Facts to learn, and how many bits of each are left after training.

A fact is a key of two tokens and a value, one of 256: 8 bits. The loss is the cross-entropy over the 256 values after
the key, so every bit of it is about the facts; there is no format to learn first.

- *Random* facts have independent values. Nothing can be inferred, so N of them hold 8·N bits, and a setting stores at
  most what it has room for: about 2 bits per parameter in pretraining (Allen-Zhu and Li 2024, "Physics of Language
  Models: Part 3.3"). The number of facts sets how much room is needed.
- *Composed* facts follow a rule: the first token gives the upper half of the value, the second the lower half. Pairs of
  tokens that were never trained show whether the rule was learned.

`peft_gauge.quality.fact_bases` has the models that learn them, `peft_gauge.quality.fact_tasks` the training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import overload

import torch
from torch import Tensor, nn

from peft_gauge.errors import GaugeError
from peft_gauge.quality.training import without_dropout

TOKENS = 256
"""Different first tokens, different second tokens, and different values."""

BITS = 8.0
"""Bits of a fact: log₂ of the number of values."""

HALF = 16
"""Values of one half of a composed fact, of 4 bits."""

CLIP = 1.0
"""Maximum gradient norm."""

ROWS_SCORED = 512


@dataclass(frozen=True)
class FactSet:
    """``keys`` of shape (facts, 2), each element from 0 to 255, and ``values`` of shape (facts,), likewise."""

    keys: Tensor
    values: Tensor

    def __len__(self) -> int:
        return len(self.values)


def random_facts(number: int, seed: int) -> FactSet:
    """``number`` different keys with independent values. Raises `GaugeError` if there are not as many keys."""
    if not 1 <= number <= TOKENS**2:
        raise GaugeError(f"a number of facts from 1 to {TOKENS**2} is possible, not {number}")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(TOKENS**2, generator=generator)[:number]
    keys = torch.stack([drawn // TOKENS, drawn % TOKENS], dim=1)
    return FactSet(keys, torch.randint(TOKENS, (number,), generator=generator))


def composed_facts(number: int, held_out: int, seed: int) -> tuple[FactSet, FactSet]:
    """``number`` facts of one rule to train, and ``held_out`` others to score: different pairs of the same tokens."""
    drawn = random_facts(number + held_out, seed)
    generator = torch.Generator().manual_seed(seed)
    upper, lower = (torch.randint(HALF, (TOKENS,), generator=generator) for _ in range(2))
    ruled = FactSet(drawn.keys, HALF * upper[drawn.keys[:, 0]] + lower[drawn.keys[:, 1]])
    cut = [FactSet(ruled.keys[part], ruled.values[part]) for part in (slice(number), slice(number, None))]
    return cut[0], cut[1]


class Recall(nn.Module):
    """A model as it answers facts: its loss is the cross-entropy, float32, over the values after the last token.

    ``model`` is called with the batch; its output layer has one row per value. ``labels``: values, of shape (batch,).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = getattr(model, "config", None)

    def forward(self, labels: Tensor, use_cache: bool = False, **inputs: Tensor) -> SimpleNamespace:
        logits = self.model(**inputs, use_cache=use_cache, logits_to_keep=1).logits[:, -1].float()
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


class Order(Sequence[dict[str, Tensor]]):
    """``steps`` batches: all facts in one random order, then again in another, as often as needed."""

    def __init__(self, facts: FactSet, inputs: Mapping[str, Tensor], steps: int, batch: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        passes = math.ceil(steps * batch / len(facts))
        order = torch.cat([torch.randperm(len(facts), generator=generator) for _ in range(passes)])
        self._rows = order[: steps * batch].split(batch)
        self._columns = {**inputs, "labels": facts.values}

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Tensor]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        return {name: column[self._rows[index]] for name, column in self._columns.items()}


def bits_left(model: nn.Module, inputs: Mapping[str, Tensor], values: Tensor) -> tuple[float, float]:
    """Bits left per fact, and the share of facts whose value is the most likely one."""
    recall = Recall(model)
    nats, right = 0.0, 0
    with torch.no_grad(), without_dropout(model):
        for start in range(0, len(values), ROWS_SCORED):
            part = slice(start, start + ROWS_SCORED)
            labels = values[part]
            answered = recall(labels, **{name: column[part] for name, column in inputs.items()})
            nats += float(answered.loss) * len(labels)
            right += int((answered.logits.argmax(-1) == labels).sum())
    return nats / math.log(2) / len(values), right / len(values)
