"""Private parts of transformers. Nothing is imported before it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from types import ModuleType

# --- attention ----------------------------------------------------------------------------------------------

PACKING = "find_packed_sequence_indices"
"""In masking_utils: decides from the values of `position_ids` whether a row of a batch is several sequences."""


def has_packing() -> bool:
    """Whether the function that `without_packing` replaces exists; a plan warns if it does not."""
    return _in_masking_utils(PACKING) is not None


@contextmanager
def without_packing() -> Iterator[None]:
    """While active, no row of a batch is treated as several sequences. Guarded by `has_packing`."""
    with _replaced(PACKING, lambda original: lambda position_ids: None):
        yield


MASK_SKIPPED = "_ignore_causal_mask_sdpa"
"""In masking_utils: decides from a padding mask's values whether sdpa's own causal mask will do."""


def has_mask_skipped() -> bool:
    """Whether the function that `without_padding` replaces exists; a plan warns if it does not."""
    return _in_masking_utils(MASK_SKIPPED) is not None


@contextmanager
def without_padding() -> Iterator[None]:
    """While active, a padding mask masks no token, whatever its values. Guarded by `has_mask_skipped`."""

    def unmasked(original: Any) -> Any:
        return lambda padding_mask, *args, **kwargs: original(None, *args, **kwargs)

    with _replaced(MASK_SKIPPED, unmasked):
        yield


def _in_masking_utils(name: str) -> Any:
    from transformers import masking_utils

    return getattr(masking_utils, name, None)


@contextmanager
def _replaced(name: str, replacement: Callable[[Any], Any]) -> Iterator[None]:
    """While active, a function of masking_utils is its ``replacement``; nothing if this release has it not."""
    from transformers import masking_utils

    original = _in_masking_utils(name)
    with nullcontext() if original is None else patch.object(masking_utils, name, replacement(original)):
        yield


# Functions that transformers caches after looking them up, by release; cleared for a block and restored afterwards.
_LOOKED_UP = (
    "_loaded_implementation",
    "_flash_fn",
    "_flash_varlen_fn",
    "_flash_with_kvcache_fn",
    "_pad_fn",
    "_unpad_fn",
    "_process_flash_kwargs_fn",
)


@contextmanager
def flash_on_fakes(rows_of: Callable[..., Any]) -> Iterator[None]:
    """While active, transformers' flash attention reads no tensor's values and requires no GPU.

    ``rows_of`` replaces `_upad_input`. A missing name raises `AttributeError`, unless releases differ in it.
    """
    from transformers import modeling_flash_attention_utils as utils
    from transformers import modeling_utils

    base = modeling_utils.PreTrainedModel
    with ExitStack() as stack:
        enter = stack.enter_context
        for looked_up in (name for name in _LOOKED_UP if hasattr(utils, name)):
            enter(patch.object(utils, looked_up, None))
        enter(patch.object(utils, "_is_packed_sequence", lambda *args, **kwargs: False))  # reads values
        enter(patch.object(utils, "_upad_input", rows_of))
        for check in ("_flash_attn_can_dispatch", "_flash_attn_2_can_dispatch"):  # transformers 5, transformers 4
            if hasattr(base, check):
                enter(patch.object(base, check, lambda *args, **kwargs: True))
        yield


def missing_flash(file: ModuleType) -> Mapping[str, Any]:
    """The function that a modelling file imports only if flash-attn was installed at its import (Falcon's)."""
    from transformers import modeling_flash_attention_utils as utils

    asks = ("is_flash_attn_available", "is_flash_attn_2_available")
    name = "_flash_attention_forward"
    if name in vars(file) or not any(each in vars(file) for each in asks):
        return {}
    return {name: getattr(utils, name)}


def attention_of(config: Any) -> Any:
    """The attention implementation that a model was built with; `None` for a config without one."""
    return getattr(config, "_attn_implementation", None)


def has_sdpa(kind: Any) -> bool:
    """Whether a model class has sdpa attention. Unguarded."""
    return bool(kind._supports_sdpa)


def flash_attentions(kind: Any, asked: str) -> list[str]:
    """The flash attentions that a model class supports, ``asked`` if it names none; empty if it supports none."""
    if not getattr(kind, "_supports_flash_attn", getattr(kind, "_supports_flash_attn_2", False)):
        return []
    return list(getattr(kind, "_compatible_flash_implementations", None) or [asked])


# --- gradient checkpointing -----------------------------------------------------------------------------------


def checkpoint_trained_blocks(model: Any) -> None:
    """Let ``model`` turn gradient checkpointing on for blocks with a trained parameter only; the input of each then
    requires a gradient. LLaMA-Factory does so (`llamafactory.model.model_utils.checkpointing`)."""
    import torch
    from torch.utils.checkpoint import checkpoint

    def enable(
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        **further: Any,  # every_n_layers, which these trainers leave at 1
    ) -> None:
        given = gradient_checkpointing_kwargs or activation_checkpointing_kwargs or {"use_reentrant": True}

        def of_trained(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            hidden = next((each for each in args if torch.is_tensor(each) and each.is_floating_point()), None)
            if hidden is not None:
                hidden.requires_grad_(True)
            return checkpoint(block, *args, **given, **kwargs)

        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=of_trained)
        for module in model.modules():
            is_trained = any(parameter.requires_grad for parameter in module.parameters())
            if hasattr(module, "gradient_checkpointing") and not is_trained:
                module.gradient_checkpointing = False

    model.gradient_checkpointing_enable = enable
    model.activation_checkpointing_enable = enable  # its name since transformers 5.21


# --- quantized models, and where a model came from ----------------------------------------------------------


def replace_layers(quantizer: Any, model: Any) -> None:
    """Puts a quantizer's own layers into a model without weights, as `from_pretrained` does. Unguarded."""
    quantizer._process_model_before_weight_loading(model)


def mark_quantized(config: Any, dtype: Any) -> None:
    """Flash attention reads the compute dtype from a quantized model's config, not from its (packed) weights:
    transformers 5 from the first of these attributes, transformers 4 from the second."""
    config._is_quantized = True
    config._pre_quantization_dtype = dtype


def mark_loaded(model: Any, quant_format: str, *, double_quant: bool) -> None:
    """Marks a quantized model as `from_pretrained` does: trainers read it before they move, cast or refuse it. A
    missing name raises `ImportError`."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    in_8bit = quant_format == "int8"
    formats = {} if in_8bit else {"bnb_4bit_quant_type": quant_format, "bnb_4bit_use_double_quant": double_quant}
    config = BitsAndBytesConfig(load_in_8bit=in_8bit, load_in_4bit=not in_8bit, **formats)
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.is_quantized = True
    setattr(model, "is_loaded_in_8bit" if in_8bit else "is_loaded_in_4bit", True)


def forget_origin(config: Any) -> None:
    """Removes a config's name: with it, saving an adapter would look its base up on the Hub."""
    config._name_or_path = ""
