"""Attaching a method to a base model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from peft_gauge.errors import GaugeError, one_line
from peft_gauge.training.methods.adapter_config import check_ranks
from peft_gauge.training.methods.definitions import (
    ATTENTION,
    ATTENTION_QV,
    KEPT_IN_CACHE,
    KEYS_VALUES_DOWN,
    Method,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from peft_gauge.training.stored_formats import StoredFormat

PROMPT_LEARNING = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE")
SIZES_OF_SAVED_MODEL = ("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


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

    ``compute_dtype``: what 4-bit weights are dequantized to (default: the model's own dtype). New weights are drawn
    from ``seed``. ``device`` is where the base goes first, layer by layer where it is quantized (default: it stays
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
    """Quantize the base and cast it for k-bit training, in place, as far as ``method`` says, and bring it to
    ``device``. A base that comes quantized stays as it is stored; raises `GaugeError` where ``method`` does not fit."""
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
    """The format that the base is stored in, if it is quantized; raises `GaugeError` where ``method`` needs another."""
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
            f"{method.name} quantizes the base to {method.quantization.quant_format}, and this checkpoint is stored as "
            f"{stored.title} already; use a method that leaves the base as it is, such as lora"
        )
    if method.kind == "peft":
        check_adapter(stored, str(method.peft_config.get("peft_type", "")))
    return stored


def _attach_adapter(base: PreTrainedModel, method: Method, seed: int) -> nn.Module:
    model: nn.Module = base
    if method.kind == "full":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model
    if method.kind == "bottleneck":
        from peft_gauge.training.bottleneck import attach_

        assert method.bottleneck is not None, "a bottleneck method has a bottleneck config"
        attach_(model, method.bottleneck, seed=seed)
        return model
    return _attach_peft(base, method)


def _attach_peft(model: PreTrainedModel, method: Method) -> nn.Module:
    import peft

    settings = _fitted(dict(method.peft_config), model, method.name)
    try:
        config = peft.PeftConfig.from_peft_type(**settings)
        with _without_notices():
            # Left to PEFT where nothing else is asked: releases before 0.12 do not cast, nor know the argument.
            cast: dict[str, Any] = {} if method.autocast_adapter_dtype else {"autocast_adapter_dtype": False}
            attached: nn.Module = peft.get_peft_model(model, config, **cast)
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
    """What was really attached, read back from the model: PEFT type, rank, alpha, dropout, targets, quantization."""
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
