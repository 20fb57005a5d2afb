"""The models that learn facts.

`Decoder` is small and pretrained here, on random facts of its own: it calibrates the procedure, since several of them
can be drawn. `LastLayers` trains the last layers of a real model. The layers before them are frozen, so their
activations are computed once for each key; the result is the same as with the whole model.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from peft_gauge import paths
from peft_gauge.errors import GaugeError
from peft_gauge.files import make_once
from peft_gauge.quality.examples import known_text
from peft_gauge.quality.facts import CLIP, ROWS_SCORED, TOKENS, FactSet, Order, Recall, bits_left, random_facts
from peft_gauge.quality.training import Schedule, train, without_dropout
from peft_gauge.training import methods, models
from peft_gauge.training.models.construction import without_progress_bars
from peft_gauge.training.settings import StepSettings
from peft_gauge.training.step import TrainingJob

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peft_gauge.training.methods import Method
    from peft_gauge.training.models import ModelRecord


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
PRETRAINING_BATCH = 128
LEARNING_BATCH = 64
PRETRAINING_SEED = 1_000_003


@dataclass(frozen=True)
class Decoder:
    """A Llama of ``layers`` layers of ``width`` that stores ``facts`` random facts; all are drawn from ``seed``.

    By default it has 0.98 M parameters, and room for many more facts. It is pretrained once, in ``steps`` steps at the
    peak rate ``rate``, which takes minutes, and kept in the user's cache.
    """

    seed: int = 0
    facts: int = 2048
    width: int = WIDTH
    layers: int = LAYERS
    steps: int = 2500
    rate: float = 2e-3

    name = "fact-decoder"

    def identity(self) -> dict[str, Any]:
        """Everything that determines the base, as JSON."""
        pretrained = [self.facts, self.steps, PRETRAINING_BATCH, self.rate]
        return {"base": self.name, "seed": self.seed, "config": self.record().config_json, "pretrained": pretrained}

    def record(self) -> ModelRecord:
        """Its architecture, with weights drawn from the seed."""
        toy = models.resolve("toy-llama")
        config = {
            **toy.config,
            "hidden_size": self.width,
            "intermediate_size": 3 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "head_dim": self.width // HEADS,
            "vocab_size": 2 * TOKENS,
            "max_position_embeddings": 64,
            "initializer_range": 1 / math.sqrt(self.width),
        }
        return replace(toy, name=self.name, config_json=json.dumps(config), seed=self.seed)

    def old_facts(self) -> FactSet:
        """The facts of its pretraining."""
        return random_facts(self.facts, PRETRAINING_SEED + self.seed)

    def loaded(self) -> Loaded:
        """The pretrained decoder. Raises `GaugeError` if it cannot be kept."""
        model = models.build(_pretrained(self))
        _answer_with(model, range(TOKENS, 2 * TOKENS))
        old = self.old_facts()
        return Loaded(model, _as_ids, lambda trained, _: bits_left(trained, _as_ids(old.keys, None), old.values)[0])


def _as_ids(keys: Tensor, quantized: Method | None) -> dict[str, Tensor]:
    """Both tokens of a key come from the same 256."""
    return {"input_ids": keys}


def _pretrained(base: Decoder) -> ModelRecord:
    """``base`` with its pretrained weights, from the cache or trained now."""
    kind = f"{base.width}x{base.layers}-{base.facts}-facts-{base.steps}-steps-{base.rate:g}-seed-{base.seed}"
    folder = paths.cache() / "facts" / f"decoder-{kind}-torch-{torch.__version__}"
    if not folder.is_dir():
        model = models.build(base.record())
        head = model.lm_head
        _answer_with(model, range(TOKENS, 2 * TOKENS))
        old = base.old_facts()
        _learn(model, old, _as_ids(old.keys, None), base.steps, PRETRAINING_BATCH, base.seed, base.rate)
        with torch.no_grad():
            head.weight[TOKENS:] = model.lm_head.weight
        model.lm_head = head
        _keep(model, folder)
    return replace(base.record(), source="folder", weights="real", location=str(folder))


def _learn(
    model: nn.Module,
    facts: FactSet,
    inputs: Mapping[str, Tensor],
    steps: int,
    batch: int,
    seed: int,
    rate: float,
) -> None:
    order = Order(facts, inputs, steps, batch, seed)
    train(TrainingJob(Recall(model), order, StepSettings(batch, 2, clip_grad_norm=CLIP)), Schedule(steps, rate))


def _in_layers(model: PreTrainedModel) -> PreTrainedModel:
    """``model``, with only its layers trained."""
    model.requires_grad_(False)
    _blocks(model).requires_grad_(True)
    return model


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

    ``facts``: random facts, drawn from ``seed``, that these layers learn first, in ``steps`` steps of full fine-tuning
    at the peak rate ``rate``. ``stored``: a record with equal weights that loads faster.
    """

    model: ModelRecord
    layers: int
    stored: ModelRecord | None = field(default=None, compare=False)
    facts: int = 0
    seed: int = 0
    steps: int = 400
    rate: float = 3e-4

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.name

    def identity(self) -> dict[str, Any]:
        """Everything that determines the base, as JSON."""
        learned = {"learned": [self.facts, self.seed, self.steps, self.rate]} if self.facts else {}
        return {"base": "last layers", "layers": self.layers, "model": asdict(self.model), **learned}

    def old_facts(self) -> FactSet:
        """The facts that it learned first. Raises `GaugeError` if there are none."""
        return random_facts(self.facts, PRETRAINING_SEED + self.seed)

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
        ids = known_text(tokenizer, whole)[0]["input_ids"]

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
        if self.facts:
            old = self.old_facts()
            _learn(_in_layers(last), old, inputs(old.keys, None), self.steps, LEARNING_BATCH, self.seed, self.rate)
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
