"""Attaching a method to a base model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from peft_gauge._internals.transformers import checkpoint_trained_blocks
from peft_gauge.errors import GaugeError, one_line, unknown
from peft_gauge.training.methods.adapter_config import check_ranks
from peft_gauge.training.methods.definitions import (
    ATTENTION,
    ATTENTION_QV,
    KEPT_IN_CACHE,
    KEYS_VALUES_DOWN,
    LINEAR_LAYERS,
    Blocks,
    Cast,
    Method,
    Quantization,
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
    """Prepare ``model`` in place for training by ``method``, and return the model to call.

    Raises `GaugeError` if the method does not fit the model.

    Args:
        compute_dtype: the dtype that 4-bit weights are dequantized to (default: the model's own).
        grad_checkpointing: a setting of the step, off by default, even where a library's preparation turns it on.
        seed: for new weights.
        device: move the base there first, layer by layer if it gets quantized (default: it stays where it is).
    """
    from peft_gauge._internals.torch import no_initial_values

    if grad_checkpointing:
        check_checkpointing(method)
    model = prepare_base(model, method, compute_dtype=compute_dtype, device=device)
    with no_initial_values() if next(model.parameters()).is_meta else _seeded(seed):
        attached = _attach_adapter(model, method, seed)
    _choose_trained(attached, method)
    if method.checkpoints_trained_only:
        checkpoint_trained_blocks(model)
    if grad_checkpointing:
        # Reentrant checkpointing does not train adapters unless the input requires a gradient (peft#1142);
        # non-reentrant checkpointing does.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    attached.train()
    return attached


def check_checkpointing(method: Method) -> None:
    """Raise `GaugeError` if ``method`` cannot be trained with gradient checkpointing."""
    if method.peft_config.get("peft_type") in KEPT_IN_CACHE:
        raise GaugeError(
            f"{method.name} passes its virtual tokens as a key-value cache, which gradient checkpointing drops; train "
            "it without checkpointing"
        )


def prepare_base(
    model: PreTrainedModel,
    method: Method,
    *,
    compute_dtype: torch.dtype | None = None,
    device: str | None = None,
    storage: torch.dtype | None = None,
) -> PreTrainedModel:
    """Quantize the base and prepare it for k-bit training, in place, if ``method`` does so; move it to ``device``.

    ``storage``: the dtype of packed 4-bit weights (default: bitsandbytes', uint8). A base that is quantized already
    keeps its format. Raises `GaugeError` if ``method`` does not fit it.
    """
    stored = _check_stored(model, method)
    if method.quantization is not None and stored is None:
        from peft_gauge.training.quantization import quantize_

        quantize_(
            model,
            quant_format=method.quantization.quant_format,
            double_quant=method.quantization.double_quant,
            compute_dtype=compute_dtype or _compute_dtype(method.quantization) or model.dtype,
            device=device,
            storage=storage,
        )
    if device is not None:
        model = model.to(device)
    if method.prepare_kbit:
        from peft_gauge.training.quantization import import_peft

        peft = import_peft()
        with _without_notices():
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for each in method.casts:
        _cast(model, each)
    return model


def _compute_dtype(quantization: Quantization) -> torch.dtype | None:
    from peft_gauge.training.models import torch_dtype

    return None if quantization.compute_dtype is None else torch_dtype(quantization.compute_dtype)


def _cast(model: PreTrainedModel, meant: Cast) -> None:
    from peft_gauge.training.models import torch_dtype

    if meant.model_type not in (None, model.config.model_type):
        return
    for name, parameter in model.named_parameters():
        is_meant = re.search(meant.names, name) and (parameter.ndim == 1 or not meant.vectors_only)
        if is_meant and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch_dtype(meant.dtype))


def _choose_trained(model: nn.Module, method: Method) -> None:
    """Freeze what ``method`` does not train, and cast the rest to float32 if it does so."""
    if method.trains is not None:
        patterns = _in_blocks(model, method) if isinstance(method.trains, Blocks) else method.trains
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(any(re.search(pattern, name) for pattern in patterns))
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise GaugeError(
                f"{method.name} leaves nothing to train: no parameter of this model matches {', '.join(patterns)}"
            )
    if method.trained_in_float32:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def _in_blocks(model: nn.Module, method: Method) -> list[str]:
    """Patterns of the parameters in the blocks that ``method`` trains. Raises `GaugeError` for unknown modules."""
    chosen = method.trains
    assert isinstance(chosen, Blocks), "patterns are of blocks"
    number = int(cast("Any", model).config.get_text_config().num_hidden_layers)
    names = [name for name, _ in model.named_parameters()]
    of_blocks = {name.split(".0.")[-1].split(".")[0] for name in names if ".0." in name}
    outside = {name.split(".")[-2] for name in names if not re.search(r"\.\d+\.", name)}
    for module in chosen.modules:
        if module != "all" and module not in of_blocks:
            raise unknown("module of a block", module, sorted(of_blocks))
    for module in chosen.extra:
        if module not in outside:
            raise unknown("module outside of blocks", module, sorted(outside))
    blocks = range(max(0, number - chosen.number), number) if chosen.number > 0 else range(min(-chosen.number, number))
    within = [f".{block}.{'' if module == 'all' else module}" for block in blocks for module in chosen.modules]
    return [re.escape(each) for each in (*within, *chosen.extra)]


def _check_stored(model: PreTrainedModel, method: Method) -> StoredFormat | None:
    """The format that the base is stored in, if it is quantized. Raises `GaugeError` if ``method`` needs another."""
    from peft_gauge.training.stored_layers import check_adapter, format_of

    stored = format_of(model)
    if stored is None:
        return None
    if method.kind == "full" and getattr(model, "is_quantized", False):
        raise GaugeError(
            f"{method.name} trains the base weights, which this checkpoint stores as {stored.title}; use an adapter "
            f"method, or a 16-bit checkpoint"
        )
    if method.quantization is not None and not stored.same_as(method.quantization.quant_format):
        raise GaugeError(
            f"{method.name} quantizes the base to {method.quantization.quant_format}, but this checkpoint is stored as "
            f"{stored.title} already; use a method that does not quantize, such as lora"
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
    from peft_gauge.training.quantization import import_peft

    peft = import_peft()
    settings = _fitted(dict(method.peft_config), model, method.name)
    try:
        config = peft.PeftConfig.from_peft_type(**settings)
        with _without_notices():
            # Omit the argument for PEFT's default: releases before 0.12 do not cast and do not accept it.
            cast: dict[str, Any] = {} if method.autocast_adapter_dtype else {"autocast_adapter_dtype": False}
            attached: nn.Module = peft.get_peft_model(model, config, **cast)
    except Exception as error:  # each tuner validates in its own way; the reader needs the sentence, not the stack
        raise GaugeError(f"{method.name} does not fit {model.config.model_type}: {one_line(error, 240)}") from error
    if not any(parameter.requires_grad for parameter in attached.parameters()):
        raise GaugeError(f"{method.name} leaves nothing to train in this model; check its target modules")
    return attached


def _fitted(settings: dict[str, Any], model: PreTrainedModel, name: str) -> dict[str, Any]:
    """``settings`` fitted to this model: its architecture's target modules, its sizes for virtual tokens, and checked
    ranks."""
    from peft_gauge.training import targets

    architecture = str(getattr(model.config, "model_type", type(model).__name__))
    meant = settings.get("target_modules")
    if isinstance(meant, tuple) and LINEAR_LAYERS in meant:
        settings["target_modules"] = _linear_names(model, meant, f"{name} on {architecture}")
    elif meant in (ATTENTION, ATTENTION_QV, KEYS_VALUES_DOWN):
        settings |= _targets_in(model, meant, f"{name} on {architecture}")
    if settings.get("peft_type") in PROMPT_LEARNING:
        # Saved configs have the sizes of the model that they were saved from; without them, PEFT reads the model's.
        settings = {key: value for key, value in settings.items() if key not in SIZES_OF_SAVED_MODEL}
        settings |= _initial_tokens(settings, model)
    sizes = (min(targets.sizes(linear)) for linear in targets.linear_layers(model).values())
    check_ranks(settings, max(sizes, default=0), name)
    return settings


def _linear_names(model: PreTrainedModel, meant: tuple[str, ...], name: str) -> list[str]:
    """The names in ``meant``, with those of linear layers for `LINEAR_LAYERS`."""
    from peft_gauge.training.quantization import output_heads

    heads = {head.rpartition(".")[2] for head in output_heads(model)}
    of_linear = {where.rpartition(".")[2] for where, each in model.named_modules() if "Linear" in type(each).__name__}
    if not of_linear - heads:
        raise GaugeError(f"{name}: this architecture has no module of a class named Linear; name the target modules")
    return sorted((of_linear - heads) | (set(meant) - {LINEAR_LAYERS}))


def _targets_in(model: PreTrainedModel, meant: tuple[str, ...], name: str) -> dict[str, Any]:
    """The ``target_modules`` (and IA³'s ``feedforward_modules``) in ``model`` for one of the target sets."""
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
            f"{name}: this architecture has no attention projections; use lora-all-linear, or --adapter with an "
            f"adapter_config.json that names target_modules"
        )
    return {"target_modules": targets.as_targets(model, found)[0], **targets.orientation(model, found)}


def _initial_tokens(settings: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Settings for virtual tokens initialized from a text or from saved ones: random on ``meta``, which needs shapes
    only; otherwise with a local tokenizer."""
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
    """Suppress a deprecation warning of transformers about an attribute that PEFT still reads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators inside; restore their state afterwards."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def effective_settings(model: nn.Module, method: Method) -> dict[str, Any]:
    """The settings in effect, read back from the model: PEFT type, rank, alpha, dropout, targets, quantization."""
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
    """``value`` converted for JSON: sets as sorted lists, enums as their values."""
    if isinstance(value, set):
        return sorted(value)
    return getattr(value, "value", value)
