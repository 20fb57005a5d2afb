"""Facts to learn, and how many bits of each are left after training.

A fact is a key of two tokens and a value, one of 256: 8 bits. The loss is the cross-entropy over the 256 values after
the key, so every bit of it is about the facts; there is no format to learn first.

- *Random* facts have independent values. Nothing can be inferred, so N of them hold 8·N bits, and a setting stores at
  most what it has room for: about 2 bits per parameter in pretraining (Allen-Zhu and Li 2024, "Physics of Language
  Models: Part 3.3"). The number of facts sets how much room is needed.
- *Composed* facts follow a rule: the first token gives the upper half of the value, the second the lower half. Pairs of
  tokens that were never trained show whether the rule was learned.

Two bases. `Decoder` is small and pretrained here, on other random facts: it calibrates the procedure, since several
of them can be drawn. `LastLayers` trains the last layers of a real model. The layers before them are frozen, so their
activations are computed once for each key; the result is the same as with the whole model.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, nn

from peft_gauge import paths
from peft_gauge.errors import GaugeError
from peft_gauge.files import make_once
from peft_gauge.quality.training import Schedule, train, without_dropout
from peft_gauge.quality.updates import lora_update_norm
from peft_gauge.training import batches, methods, models
from peft_gauge.training.models.construction import without_progress_bars
from peft_gauge.training.step import StepSettings, TrainingJob

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peft_gauge.training.methods import Method
    from peft_gauge.training.models import ModelRecord

TOKENS = 256
"""Different first tokens, different second tokens, and different values."""

BITS = 8.0
"""Bits of a fact: log₂ of the number of values."""

HALF = 16
"""Values of one half of a composed fact, of 4 bits."""

ALIKE = 0.01
"""Bits left that do not differ by as much are alike."""

CLIP = 1.0
"""Maximum gradient norm."""

ROWS_SCORED = 512
KNOWN_ROWS, KNOWN_TOKENS = 8, 64


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


@dataclass(frozen=True)
class Loaded:
    """A base, ready for facts.

    ``model``: what is trained, with an output layer of one row per value. ``inputs(keys, quantized)``: the arguments of
    its call for keys of shape (facts, 2), from a base that ``quantized`` quantizes (``None``: as it is).
    ``known(model, quantized)``: bits that ``model``, trained, leaves of an old fact or of a token of known text.
    """

    model: PreTrainedModel
    inputs: Callable[[Tensor, Method | None], Mapping[str, Tensor]]
    known: Callable[[nn.Module, Method | None], float]


# --- a small decoder, pretrained on other facts -----------------------------------------------------------------------

WIDTH, LAYERS, HEADS = 128, 4, 4
PRETRAINED_FACTS, PRETRAINING_STEPS, PRETRAINING_BATCH, PRETRAINING_RATE = 2048, 2500, 128, 2e-3
PRETRAINING_SEED = 1_000_003


@dataclass(frozen=True)
class Decoder:
    """A Llama of 0.98 M parameters that stores 2,048 facts, all drawn from ``seed``.

    It is pretrained once, in a few minutes, and kept in the user's cache.
    """

    seed: int = 0

    name = "fact-decoder"

    def identity(self) -> dict[str, Any]:
        """Everything that determines the base, as JSON."""
        pretrained = [PRETRAINED_FACTS, PRETRAINING_STEPS, PRETRAINING_BATCH, PRETRAINING_RATE]
        return {"base": self.name, "seed": self.seed, "config": self.record().config_json, "pretrained": pretrained}

    def record(self) -> ModelRecord:
        """Its architecture, with weights drawn from the seed."""
        toy = models.resolve("toy-llama")
        config = {
            **toy.config,
            "hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "head_dim": WIDTH // HEADS,
            "vocab_size": 2 * TOKENS,
            "max_position_embeddings": 64,
            "initializer_range": 1 / math.sqrt(WIDTH),
        }
        return replace(toy, name=self.name, config_json=json.dumps(config), seed=self.seed)

    def old_facts(self) -> FactSet:
        """The facts of its pretraining."""
        return random_facts(PRETRAINED_FACTS, PRETRAINING_SEED + self.seed)

    def loaded(self) -> Loaded:
        """The pretrained decoder. Raises `GaugeError` if it cannot be kept."""
        model = models.build(_pretrained(self))
        _answer_with(model, range(TOKENS, 2 * TOKENS))
        old = self.old_facts()
        return Loaded(model, _as_ids, lambda trained, _: _bits(trained, _as_ids(old.keys, None), old.values)[0])


def _as_ids(keys: Tensor, quantized: Method | None) -> dict[str, Tensor]:
    """Both tokens of a key come from the same 256."""
    return {"input_ids": keys}


def _pretrained(base: Decoder) -> ModelRecord:
    """``base`` with its pretrained weights, from the cache or trained now."""
    folder = paths.cache() / "facts" / f"decoder-{base.seed}-torch-{torch.__version__}"
    if not folder.is_dir():
        model = models.build(base.record())
        head = model.lm_head
        _answer_with(model, range(TOKENS, 2 * TOKENS))
        old = base.old_facts()
        order = _Order(old, _as_ids(old.keys, None), PRETRAINING_STEPS, PRETRAINING_BATCH, base.seed)
        job = TrainingJob(Recall(model), order, StepSettings(PRETRAINING_BATCH, 2, clip_grad_norm=CLIP))
        train(job, Schedule(PRETRAINING_STEPS, PRETRAINING_RATE))
        with torch.no_grad():
            head.weight[TOKENS:] = model.lm_head.weight
        model.lm_head = head
        _keep(model, folder)
    return replace(base.record(), source="folder", weights="real", location=str(folder))


def _keep(model: PreTrainedModel, folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with without_progress_bars():
            make_once(folder, model.save_pretrained)
    except OSError as error:
        raise GaugeError(
            f"cannot save a pretrained decoder under {folder.parent}: {error.strerror or error}; set PEFT_GAUGE_CACHE "
            f"to move it"
        ) from error


# --- the last layers of a real model ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LastLayers:
    """The last ``layers`` of ``model``; keys and values are words of its vocabulary.

    ``stored``: a record with equal weights that loads faster.
    """

    model: ModelRecord
    layers: int
    stored: ModelRecord | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.name

    def identity(self) -> dict[str, Any]:
        """Everything that determines the base, as JSON."""
        return {"base": "last layers", "layers": self.layers, "model": asdict(self.model)}

    def loaded(self) -> Loaded:
        """The last layers, with a reader for the frozen ones.

        Raises `GaugeError` if the model has no tokenizer, too few layers or words, or an architecture whose last layers
        do not continue its first ones.
        """
        tokenizer = models.tokenizer(self.model)
        if tokenizer is None:
            raise GaugeError(
                f"{self.name} has no tokenizer here: facts need pretrained weights; run peft-gauge fetch smollm2"
            )
        first, second, values = _words(tokenizer)
        whole = models.build(self.stored or self.model)
        head = whole.get_output_embeddings()
        last = _cut(whole, self.layers)
        known_batch = batches.batches(
            tokenizer,
            vocab_size=whole.get_input_embeddings().num_embeddings,
            batch=KNOWN_ROWS,
            seq=KNOWN_TOKENS,
            number=1,
        )[0]
        ids = known_batch["input_ids"]

        @lru_cache(maxsize=4)
        def frozen(quantized: Method | None) -> PreTrainedModel:
            return whole if quantized is None else methods.prepare_base(copy.deepcopy(whole), quantized)

        @lru_cache(maxsize=4)
        def known_inputs(quantized: Method | None) -> Tensor:
            return _activations(frozen(quantized), ids, self.layers)

        def inputs(keys: Tensor, quantized: Method | None) -> dict[str, Tensor]:
            as_tokens = torch.stack([first[keys[:, 0]], second[keys[:, 1]]], dim=1)
            return {"inputs_embeds": _activations(frozen(quantized), as_tokens, self.layers)}

        def known(trained: nn.Module, quantized: Method | None) -> float:
            with _full_head(trained, head), torch.no_grad(), without_dropout(trained):
                logits = trained(inputs_embeds=known_inputs(quantized), use_cache=False).logits[:, :-1].float()
            nats = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            return float(nats) / math.log(2)

        _check_continues(whole, last, ids, self.layers)
        _answer_with(last, values)
        last.set_input_embeddings(nn.Embedding(1, whole.get_input_embeddings().embedding_dim))  # unused; saves copies
        return Loaded(last, inputs, known)


def _words(tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids of the first tokens, the second ones and the values: words of at least four letters, by their id."""
    found = sorted(
        number
        for token, number in tokenizer.get_vocab().items()
        if token[:1] in "Ġ▁" and len(token) > 4 and token[1:].isascii() and token[1:].isalpha() and token[1:].islower()
    )
    if len(found) < 3 * TOKENS:
        raise GaugeError(f"the vocabulary has {len(found)} words of four letters or more, and facts need {3 * TOKENS}")
    first, second, values = torch.tensor(found[: 3 * TOKENS]).split(TOKENS)
    return first, second, values


def _cut(whole: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A copy of ``whole`` with its last ``layers`` only; it takes the activations before them as ``inputs_embeds``."""
    number = len(_blocks(whole))
    if not 1 <= layers < number:
        raise GaugeError(f"this model has {number} layers; train from 1 to {number - 1} of them")
    last = copy.deepcopy(whole)
    kept = nn.ModuleList(list(_blocks(last))[-layers:])
    for place, block in enumerate(kept):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                cast("Any", module).layer_idx = place
    core = getattr(last, last.base_model_prefix)
    core.layers = kept
    for config in {id(each): each for each in (last.config.get_text_config(), core.config)}.values():
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[-layers:]
        config.num_hidden_layers = layers
    return last


def _blocks(model: PreTrainedModel) -> nn.ModuleList:
    found = getattr(getattr(model, model.base_model_prefix, None), "layers", None)
    if not isinstance(found, nn.ModuleList):
        raise GaugeError(f"a model of type {model.config.model_type} does not keep its layers in a list called layers")
    return found


class _Reached(Exception):
    """The activations are known: no later layer has to run."""


def _activations(model: PreTrainedModel, ids: Tensor, layers: int) -> Tensor:
    """The activations before the last ``layers``, of shape (rows, tokens, width), of tokens of shape (rows, tokens)."""
    block = _blocks(model)[-layers]
    found: list[Tensor] = []

    def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[0] if args else kwargs["hidden_states"]).detach())
        raise _Reached

    handle = block.register_forward_pre_hook(seen, with_kwargs=True)
    try:
        with torch.no_grad():
            for rows in ids.split(ROWS_SCORED):
                try:
                    model(input_ids=rows, use_cache=False)
                except _Reached:
                    continue
    finally:
        handle.remove()
    return torch.cat(found)


def _check_continues(whole: PreTrainedModel, last: PreTrainedModel, ids: Tensor, layers: int) -> None:
    """Raise `GaugeError` unless ``last`` after the frozen layers is ``whole``, up to float32 rounding."""
    with torch.no_grad():
        expected = whole(input_ids=ids[:1], use_cache=False).logits
        found = last(inputs_embeds=_activations(whole, ids[:1], layers), use_cache=False).logits
    worst, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if worst > 1e-4 * scale:
        raise GaugeError(
            f"the last {layers} layers of a model of type {whole.config.model_type} do not continue its first ones: "
            f"logits differ by {worst:.3g}"
        )


def _answer_with(model: PreTrainedModel, values: Sequence[int] | Tensor) -> None:
    """Give ``model`` an output layer with the rows of ``values`` only, in place; other words cost time, not bits."""
    head = model.get_output_embeddings()
    rows = torch.as_tensor(values)
    small = nn.Linear(head.in_features, len(rows), bias=False, dtype=head.weight.dtype)
    small.weight = nn.Parameter(head.weight.detach()[rows].clone())
    model.config.tie_word_embeddings = False
    model.set_output_embeddings(small)


@contextmanager
def _full_head(trained: nn.Module, head: nn.Module) -> Iterator[None]:
    """In the context, ``trained`` has the output layer ``head`` of all words."""
    found: Any = getattr(trained, "get_base_model", lambda: trained)()
    small = found.get_output_embeddings()
    found.set_output_embeddings(head)
    try:
        yield
    finally:
        found.set_output_embeddings(small)


# --- the task ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """``number`` facts, drawn and ordered by ``seed``, to train ``base`` on in ``steps`` steps of ``batch``.

    ``held_out``: 0 for random facts; otherwise the facts are composed, and this many others are scored.
    """

    base: Decoder | LastLayers
    seed: int = 0
    number: int = 512
    steps: int = 600
    batch: int = 64
    held_out: int = 0

    def __post_init__(self) -> None:
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
        return {"task": "facts", **self.base.identity(), **fields, "clip": CLIP}

    def prepared(self) -> PreparedFacts:
        """The task with base and facts built."""
        held_out = None
        if self.held_out:
            facts, held_out = composed_facts(self.number, self.held_out, self.seed)
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

    def job(self, method: Method) -> FactsJob:
        """Training by ``method`` on a fresh copy of the base, before its first step."""
        attached = methods.attach(copy.deepcopy(self.base.model), method, seed=self.task.seed)
        torch.manual_seed(self.task.seed)  # for dropout, if the method has it
        quantized = _quantized(method)
        return FactsJob(attached, self.task, self.facts, self._inputs(self.facts, quantized), quantized)

    def validation_loss(self, job: TrainingJob) -> float:
        """Bits left to the precision of `ALIKE`, for the choice of a learning rate: there are no other facts to choose
        it by, and where several rates store everything, the lowest is chosen."""
        return round(self._left(job)[0] / ALIKE) * ALIKE

    def scores(self, job: TrainingJob) -> dict[str, float]:
        """``bits_left`` per fact, ``quality`` (the bits stored: 8 minus those left), and ``exact_match``, the share of
        facts whose value is the most likely one; of held-out facts, if they are composed, with ``trained_bits_left``
        for the trained ones. ``forgetting``: the increase of bits per old fact (decoder) or per token of known text,
        over the base before any rounding.
        For LoRA, ``update_norm``.
        """
        assert isinstance(job, FactsJob)
        left, right = self._left(job)
        scores = {"bits_left": left, "quality": BITS - left, "exact_match": right}
        if self.held_out is not None:
            scores["trained_bits_left"] = self._bits(job, self.facts)[0]
        scores["forgetting"] = self.base.known(job.model.model, job.quantized) - self._known_before
        update_norm = lora_update_norm(job.model)
        return scores if update_norm is None else {**scores, "update_norm": update_norm}

    def _left(self, job: TrainingJob) -> tuple[float, float]:
        return self._bits(job, self.held_out or self.facts)

    def _bits(self, job: TrainingJob, facts: FactSet) -> tuple[float, float]:
        assert isinstance(job, FactsJob)
        return _bits(job.model.model, self._inputs(facts, job.quantized), facts.values)

    def _inputs(self, facts: FactSet, quantized: Method | None) -> Mapping[str, Tensor]:
        """Computed once: frozen layers take longer than the trained ones."""
        key = id(facts), quantized
        if key not in self.kept:
            self.kept[key] = self.base.inputs(facts.keys, quantized)
        return self.kept[key]

    @cached_property
    def _known_before(self) -> float:
        return self.base.known(self.base.model, None)


def _quantized(method: Method) -> Method | None:
    """A method that quantizes the frozen layers as ``method`` does, equal for all that quantize alike."""
    if method.quantization is None:
        return None
    return methods.QLORA.variant("quantized", "quantized", quantization=method.quantization)


class FactsJob(TrainingJob):
    """Training on facts. ``quantized``: the method that quantizes the frozen layers, if any."""

    model: Recall

    def __init__(
        self,
        model: nn.Module,
        task: Facts,
        facts: FactSet,
        inputs: Mapping[str, Tensor],
        quantized: Method | None,
    ) -> None:
        self.quantized = quantized
        order = _Order(facts, inputs, task.steps, task.batch, task.seed)
        super().__init__(Recall(model), order, task.settings)


class _Order(Sequence[dict[str, Tensor]]):
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


def _bits(model: nn.Module, inputs: Mapping[str, Tensor], values: Tensor) -> tuple[float, float]:
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
