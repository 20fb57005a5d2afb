"""The fine-tuning methods as data: how each attaches to a base model, what it trains, what it promises.

A variant is a short difference from a parent. A method says how to change a model; what is then measured is the same
training step for all (`peft_gauge.training.step`).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from peft_gauge.errors import GaugeError, one_line, unknown
from peft_gauge.training import bottleneck
from peft_gauge.training.bottleneck import BottleneckConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from peft_gauge.training.stored_formats import StoredFormat

# Target sets, by the names that Llama gives these linear layers. As a method's targets each means the layers with that
# role in whatever architecture the method is attached to (`peft_gauge.training.targets`). An adapter config's own
# targets are lists, and mean what PEFT makes of them.
ATTENTION_QV = ("q_proj", "v_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
KEYS_VALUES_DOWN = ("k_proj", "v_proj", "down_proj")
ALL_LINEAR = "all-linear"

KEPT_IN_CACHE = ("PREFIX_TUNING", "CARTRIDGE")
"""PEFT types whose virtual tokens are keys and values of every layer."""

RANKS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Quantization:
    """How the frozen base is stored: ``quant_format`` nf4, fp4 or int8; double quantisation for the 4-bit ones."""

    quant_format: Literal["nf4", "fp4", "int8"] = "nf4"
    double_quant: bool = True


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    ``kind``: full, peft (``peft_config`` is the content of an ``adapter_config.json``) or bottleneck (``bottleneck``).
    ``prepare_kbit``: cast what is not quantised to float32, as `peft.prepare_model_for_kbit_training` does.
    ``autocast_adapter_dtype``: PEFT's default keeps 16-bit adapters in float32.
    ``starts_as_base``: the output before the first step is the base model's (LoRA, IA³, zero-initialised bottleneck).
    ``merges``: the trained update can be folded into the base weights.
    """

    name: str
    title: str
    kind: Literal["full", "peft", "bottleneck"]
    peft_config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    bottleneck: BottleneckConfig | None = None
    quantization: Quantization | None = None
    prepare_kbit: bool = False
    autocast_adapter_dtype: bool = True
    starts_as_base: bool = True
    merges: bool = False

    def differs(self, name: str, title: str, **changes: Any) -> Method:
        """A variant: this method under another ``name``, with ``changes``; those of ``peft_config`` are merged in."""
        if "peft_config" in changes:
            changes["peft_config"] = {**self.peft_config, **changes["peft_config"]}
        return replace(self, name=name, title=title, **changes)


_LORA_CONFIG = {
    "peft_type": "LORA",
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": ATTENTION,
    "task_type": "CAUSAL_LM",
}

FULL = Method("full", "full fine-tuning", "full")
LORA = Method("lora", "LoRA", "peft", peft_config=_LORA_CONFIG, merges=True)
QLORA = LORA.differs("qlora", "QLoRA", quantization=Quantization(), prepare_kbit=True)
BOTTLENECK = Method(
    "bottleneck", "bottleneck adapters (Houlsby)", "bottleneck", bottleneck=BottleneckConfig(style="houlsby")
)
PREFIX = Method(
    "prefix",
    "prefix tuning",
    "peft",
    peft_config={"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 20, "task_type": "CAUSAL_LM"},
    starts_as_base=False,
)
PROMPT = Method(
    "prompt",
    "prompt tuning",
    "peft",
    peft_config={"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 20, "task_type": "CAUSAL_LM"},
    starts_as_base=False,
)
# Keys, values and the feed-forward's inner activations, as Liu et al. 2022 (arXiv:2205.05638) have it; PEFT's defaults
# are these for Llama, and other ones for other architectures.
IA3 = Method(
    "ia3",
    "IA³",
    "peft",
    peft_config={"peft_type": "IA3", "task_type": "CAUSAL_LM", "target_modules": KEYS_VALUES_DOWN},
    merges=True,
)

# The seven that every table shows, in the order it shows them.
SEVEN = (FULL, LORA, QLORA, BOTTLENECK, PREFIX, PROMPT, IA3)

VARIANTS = (
    *(
        LORA.differs(f"lora-r{r}", f"LoRA r={r}", peft_config={"r": r, "lora_alpha": 2 * r})
        for r in RANKS
        if r != LORA.peft_config["r"]
    ),
    LORA.differs("lora-qv", "LoRA on q,v", peft_config={"target_modules": ATTENTION_QV}),
    LORA.differs("lora-all-linear", "LoRA on all linear layers", peft_config={"target_modules": ALL_LINEAR}),
    LORA.differs("lora-no-dropout", "LoRA without dropout", peft_config={"lora_dropout": 0.0}),
    LORA.differs("lora-16bit", "LoRA, adapters kept in 16 bit", autocast_adapter_dtype=False),
    QLORA.differs("qlora-unprepared", "QLoRA, not prepared for k-bit training", prepare_kbit=False),
    replace(
        BOTTLENECK,
        name="bottleneck-pfeiffer",
        title="bottleneck adapters (Pfeiffer)",
        bottleneck=BottleneckConfig(style="pfeiffer"),
    ),
)

METHODS = {method.name: method for method in (*SEVEN, *VARIANTS)}


def get(name: str) -> Method:
    """The method called ``name``; raises `GaugeError` with the nearest names."""
    if name.lower() not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name.lower()]


RENAMED_TYPES = {"BONE": "MISS"}
"""PEFT types under the names they had in releases before the oldest that this suite takes, or lost since."""

TASK = "CAUSAL_LM"


def from_adapter_config(path: Path) -> Method:
    """A method of any PEFT type, or bottleneck adapters, from the ``adapter_config.json`` at ``path`` (a file, or the
    folder that holds it); named after its folder or file.

    Raises `GaugeError` where there is no such file, it is no adapter config, or it is for another task than causal
    language modelling.
    """
    folder = path.is_dir()
    name = adapter_name(path)
    path = path / "adapter_config.json" if folder else path
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows write a byte order mark
    except FileNotFoundError:
        where = f"no adapter_config.json in {path.parent}" if folder else f"no adapter config at {path}"
        raise GaugeError(where) from None
    except (ValueError, RecursionError, OSError) as error:
        raise GaugeError(f"{path} is not readable JSON: {one_line(error, 120)}") from error
    if isinstance(values, dict) and values.get("adapter_type") == "bottleneck":
        config = bottleneck.read_config(path)
        return replace(BOTTLENECK, name=name, title=f"bottleneck adapters from {path.name}", bottleneck=config)
    if not isinstance(values, dict) or not isinstance(values.get("peft_type"), str):
        raise GaugeError(f"{path} is no adapter config: it names no peft_type")
    _check_type(values["peft_type"])
    task = values.get("task_type") or TASK
    if task != TASK:
        raise GaugeError(
            f"{path} is an adapter for the task {task}; only causal language modelling is planned and measured "
            f"(task_type {TASK})"
        )
    settings = {**values, "inference_mode": False, "task_type": task}
    return Method(name, f"{values['peft_type']} from {path.name}", "peft", peft_config=settings, starts_as_base=False)


def adapter_name(path: Path) -> str:
    """What the method from the adapter config at ``path`` is called, whether it can be read or not."""
    if path.name == "adapter_config.json":
        return path.resolve().parent.name
    return path.resolve().name if path.is_dir() else path.stem


def _check_type(peft_type: str) -> None:
    from peft_gauge.training.quantization import load_bitsandbytes

    with suppress(GaugeError):
        load_bitsandbytes()  # PEFT imports it too, with its notices
    from peft import PeftType

    known = [kind.value for kind in PeftType]
    if peft_type in known:
        return
    renamed = RENAMED_TYPES.get(peft_type.upper())
    if renamed in known:
        raise GaugeError(f"unknown PEFT type {peft_type!r}: PEFT calls it {renamed} now; change peft_type to {renamed}")
    raise unknown("PEFT type", peft_type, known)


def attach(
    model: PreTrainedModel,
    method: Method,
    *,
    compute_dtype: torch.dtype | None = None,
    grad_checkpointing: bool = False,
    seed: int = 0,
    device: str | None = None,
) -> nn.Module:
    """Make ``model`` ready to be trained by ``method``, in place, and return what is to be called.

    ``compute_dtype``: what 4-bit weights are dequantised to (default: the model's own dtype). New weights are drawn
    from ``seed``. ``device`` is where the base goes first, layer by layer where it is quantised (default: it stays
    where it is). Gradient checkpointing is a setting of the step and off unless asked for, also where a library's
    preparation would turn it on silently. Raises `GaugeError` where the method does not fit the model.
    """
    if grad_checkpointing:
        check_checkpointing(method)
    model = prepare_base(model, method, compute_dtype=compute_dtype, device=device)
    with _seeded(seed):
        attached = _attach_adapter(model, method, seed)
    if grad_checkpointing:
        # Without an input that needs a gradient, reentrant checkpointing never trains an adapter (peft#1142); the
        # non-reentrant kind has no such trap.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    attached.train()
    return attached


def check_checkpointing(method: Method) -> None:
    """Raise `GaugeError` where ``method`` cannot be trained with gradient checkpointing."""
    if method.peft_config.get("peft_type") in KEPT_IN_CACHE:
        raise GaugeError(
            f"{method.name} gives the model its virtual tokens as a key-value cache, which gradient checkpointing "
            "drops; train it without checkpointing"
        )


def prepare_base(
    model: PreTrainedModel,
    method: Method,
    *,
    compute_dtype: torch.dtype | None = None,
    device: str | None = None,
) -> PreTrainedModel:
    """Quantise the base and cast it for k-bit training, in place, as far as ``method`` says, and bring it to
    ``device``. A base that comes quantised stays as it is stored; raises `GaugeError` where ``method`` does not fit."""
    stored = _check_stored(model, method)
    if method.quantization is not None and stored is None:
        from peft_gauge.training.quantization import quantize_

        quantize_(
            model,
            quant_format=method.quantization.quant_format,
            double_quant=method.quantization.double_quant,
            compute_dtype=compute_dtype or model.dtype,
            device=device,
        )
    if device is not None:
        model = model.to(device)
    if method.prepare_kbit:
        from peft import prepare_model_for_kbit_training

        with _without_notices():
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model


def _check_stored(model: PreTrainedModel, method: Method) -> StoredFormat | None:
    """The format that the base is stored in, if it is quantised; raises `GaugeError` where ``method`` needs another."""
    from peft_gauge.training.stored_layers import check_adapter, format_of

    stored = format_of(model)
    if stored is None:
        return None
    if method.kind == "full" and getattr(model, "is_quantized", False):
        raise GaugeError(
            f"{method.name} trains the base's weights, which this checkpoint stores as {stored.title}; use an adapter "
            f"method, or a 16-bit checkpoint"
        )
    if method.quantization is not None and not stored.same_as(method.quantization.quant_format):
        raise GaugeError(
            f"{method.name} quantises the base to {method.quantization.quant_format}, and this checkpoint is stored as "
            f"{stored.title} already; use a method that leaves the base as it is, such as lora"
        )
    if method.kind == "peft":
        check_adapter(stored, str(method.peft_config.get("peft_type", "")))
    return stored


def _attach_adapter(model: PreTrainedModel, method: Method, seed: int) -> nn.Module:
    if method.kind == "full":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model
    if method.kind == "bottleneck":
        from peft_gauge.training.bottleneck import attach_

        assert method.bottleneck is not None, "a bottleneck method has a bottleneck config"
        attach_(model, method.bottleneck, seed=seed)
        return model
    return _attach_peft(model, method)


def _attach_peft(model: PreTrainedModel, method: Method) -> nn.Module:
    import peft

    settings = _fitted(dict(method.peft_config), model, method.name)
    try:
        config = peft.PeftConfig.from_peft_type(**settings)
        with _without_notices():
            # Left to PEFT where nothing else is asked: releases before 0.12 do not cast, nor know the argument.
            cast: dict[str, Any] = {} if method.autocast_adapter_dtype else {"autocast_adapter_dtype": False}
            attached = peft.get_peft_model(model, config, **cast)
    except Exception as error:  # each tuner validates in its own way; the reader needs the sentence, not the stack
        raise GaugeError(f"{method.name} does not fit {model.config.model_type}: {one_line(error, 240)}") from error
    if not any(parameter.requires_grad for parameter in attached.parameters()):
        raise GaugeError(f"{method.name} leaves nothing to train in this model; check its target modules")
    return attached


def _fitted(settings: dict[str, Any], model: PreTrainedModel, name: str) -> dict[str, Any]:
    """``settings`` as they are meant for this model: targets by its architecture's names, sizes of virtual tokens by
    its own sizes, and ranks that can exist."""
    from peft_gauge.training import targets

    architecture = str(getattr(model.config, "model_type", type(model).__name__))
    meant = settings.get("target_modules")
    if meant in (ATTENTION, ATTENTION_QV, KEYS_VALUES_DOWN):
        settings |= _targets_in(model, meant, f"{name} on {architecture}")
    if settings.get("peft_type") in PROMPT_LEARNING:
        # Saved configs hold the sizes of the model that they were saved from; PEFT asks the model where they are not.
        settings = {key: value for key, value in settings.items() if key not in SIZES_OF_SAVED_MODEL}
        settings |= _initial_tokens(settings, model)
    sizes = (min(targets.sizes(linear)) for linear in targets.linear_layers(model).values())
    check_ranks(settings, max(sizes, default=0), name)
    return settings


PROMPT_LEARNING = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE")
SIZES_OF_SAVED_MODEL = ("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


def _targets_in(model: PreTrainedModel, meant: tuple[str, ...], name: str) -> dict[str, Any]:
    """What ``target_modules`` (and IA³'s ``feedforward_modules``) are in ``model`` for one of the target sets."""
    from peft_gauge.training import targets

    if meant == KEYS_VALUES_DOWN:
        found, down = targets.keys_and_values(model), targets.down_projections(model)
        if found:
            inner, outer = targets.as_targets(model, found, down)
            both = [*inner, *outer] if isinstance(inner, list) else f"{inner}|{outer}" if outer else inner
            return {"target_modules": both, "feedforward_modules": outer, **targets.orientation(model, found)}
    elif meant == ATTENTION_QV:
        found = targets.attention_projections(model, (targets.QUERY, targets.VALUE))
    else:  # a model without attention mixes tokens in another way
        found = targets.attention_projections(model) or targets.mixer_inputs(model)
    if not found:
        raise GaugeError(
            f"{name}: this architecture has no attention projections; name target_modules in an adapter_config.json "
            f"and use --adapter, or use lora-all-linear"
        )
    return {"target_modules": targets.as_targets(model, found)[0], **targets.orientation(model, found)}


def _initial_tokens(settings: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Virtual tokens that start from a text or from saved ones: without weights, only their shape; with weights, the
    tokenizer must be on this machine."""
    init = settings.get("prompt_tuning_init")
    if init in (None, "RANDOM", "SAMPLE_VOCAB"):
        return {}
    if next(model.parameters()).is_meta:
        return {"prompt_tuning_init": "RANDOM"}
    if init == "TEXT":
        return {"tokenizer_kwargs": {**(settings.get("tokenizer_kwargs") or {}), "local_files_only": True}}
    return {}


RANKS_OF_MATRICES = frozenset(
    ("LORA", "ADALORA", "LOHA", "HIRA", "DELORA", "GLORA", "GRALORA", "LILY", "PEANUT", "POLY", "SUPERTUNING", "SHADOW")
)
"""The PEFT types whose ``r`` is the rank of a product of two matrices, which a larger one cannot raise. Elsewhere it is
something else, and PEFT says what it may be: the width of a shared random projection (VeRA, PVeRA, RandLoRA), a rank
from which on a full matrix takes the product's place (LoKr), a number of blocks (OFT) or of reflections (HRA), rows or
positions (MiSS, SHiRA), a rank that is cut to what there is (AdaMSS, DEFT)."""

_RANKS = ("r", "init_r", "target_r")
_ALPHAS = ("lora_alpha", "alpha")


def check_ranks(settings: Mapping[str, Any], largest: int, name: str) -> None:
    """Raise `GaugeError` for a rank or an alpha, of a whole adapter or in a pattern, that cannot be.

    ``settings``: as in an ``adapter_config.json``. ``largest``: the highest rank that a matrix of the model can have.
    A rank is a whole number of at least 1; OFT's may be 0, which leaves its number of blocks to ``oft_block_size``.
    """
    kind = str(settings.get("peft_type"))
    patterns = [(key, settings.get(key)) for key in ("rank_pattern", "alpha_pattern")]
    for key, pattern in patterns:
        if pattern is not None and not isinstance(pattern, Mapping):
            raise GaugeError(f"{name}: {key} must map module names to numbers, not be {one_line(pattern, 40)}")
    # What AdaLoRA saves as its rank pattern are masks of the singular values that it kept.
    by_module = {} if kind == "ADALORA" else dict(settings.get("rank_pattern") or {})
    ranks = {key: settings[key] for key in _RANKS if settings.get(key) is not None}
    if kind == "OFT" and ranks.get("r") == 0 and not isinstance(ranks["r"], bool):
        del ranks["r"]
    for where, rank in [*((f"{key}", value) for key, value in ranks.items()), *by_module.items()]:
        at = f" for {where}" if where in by_module else ""
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise GaugeError(f"{name}: rank {rank!r}{at} is not a whole number of at least 1")
        if kind in RANKS_OF_MATRICES and largest and rank > largest:
            raise GaugeError(f"{name}: rank {rank}{at} is above the largest matrix rank in this model, {largest}")
    alphas = {key: settings[key] for key in _ALPHAS if settings.get(key) is not None}
    for where, alpha in {**alphas, **dict(settings.get("alpha_pattern") or {})}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise GaugeError(f"{name}: alpha {alpha!r} for {where} is not a number")


@contextmanager
def _without_notices() -> Iterator[None]:
    """Between PEFT and transformers: an attribute that the one still asks for, and the other has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers from ``seed`` inside, the caller's own stream untouched outside."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def effective_settings(model: nn.Module, method: Method) -> dict[str, Any]:
    """What was really attached, read back from the model: PEFT type, rank, alpha, dropout, targets, quantisation."""
    found: dict[str, Any] = {"kind": method.kind, "prepare_kbit": method.prepare_kbit}
    if method.kind == "peft":
        config = cast("Any", model).peft_config["default"].to_dict()
        wanted = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "num_virtual_tokens")
        found |= {key: _plain(config[key]) for key in wanted if config.get(key) is not None}
        found["autocast_adapter_dtype"] = method.autocast_adapter_dtype
    if method.bottleneck is not None:
        found |= {"style": method.bottleneck.style, "reduction_factor": method.bottleneck.reduction_factor}
    if method.quantization is not None:
        found |= {"quant_format": method.quantization.quant_format, "double_quant": method.quantization.double_quant}
    return found


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it: sets sorted, enums by their value."""
    if isinstance(value, set):
        return sorted(value)
    return getattr(value, "value", value)


def save(model: nn.Module, method: Method, folder: Path) -> int:
    """Write what ``method`` trained into ``folder`` as safetensors and return the bytes of the weights on disk."""
    if method.kind == "bottleneck":
        from peft_gauge.training.bottleneck import save as save_bottleneck

        save_bottleneck(model, folder)
    elif method.kind == "full":
        cast("Any", model).save_pretrained(str(folder))
    else:
        # No method resizes the vocabulary; asked to find that out for itself, PEFT looks the base up on the hub.
        cast("Any", model).save_pretrained(str(folder), save_embedding_layers=False)
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def load(model: PreTrainedModel, method: Method, folder: Path) -> nn.Module:
    """Attach to the fresh base ``model`` what `save` wrote into ``folder``.

    A quantised method's base must be given unquantised, as to `attach`. Raises `GaugeError` for a folder without it.
    """
    if method.kind == "full":
        return type(model).from_pretrained(str(folder), dtype=model.dtype, local_files_only=True)
    if method.kind == "bottleneck":
        from peft_gauge.training.bottleneck import load as load_bottleneck

        load_bottleneck(model, folder)
        return model
    from peft import PeftModel

    model = prepare_base(model, method)
    return PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=method.autocast_adapter_dtype)
