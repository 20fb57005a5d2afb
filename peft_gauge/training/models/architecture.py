"""An architecture in transformers: its class, its attention, and the defaults for values missing from its config."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any

from peft_gauge._internals.transformers import attention_of, flash_attentions, has_sdpa
from peft_gauge.errors import GaugeError, unknown
from peft_gauge.training.models.config import SIZE_LIMITS, class_of, size_of, text_part
from peft_gauge.training.models.records import ModelRecord, hf_config
from peft_gauge.training.stored_formats import name_says

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

ATTENTIONS = ("sdpa", "eager", "flash_attention_2")


def model_class(record: ModelRecord) -> type[PreTrainedModel]:
    """The class that ``record`` is built as: the causal LM of its config, otherwise the vision-language model."""
    return class_of(type(hf_config(record)))


def auto_class(record: ModelRecord) -> Any:
    """transformers' auto class that builds and loads ``record`` as `model_class`."""
    import transformers

    causal = type(hf_config(record)) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModelForImageTextToText


def remarks(record: ModelRecord) -> list[str]:
    """Notes for readers of results about ``record`` on how its config was interpreted, one sentence each."""
    stored, named = record.stored, name_says(record.name, record.config)
    said = [stored.remark if stored is not None else None, named]
    return [*_defaulted(record), *_towers(record), *filter(None, said)]


def _defaulted(record: ModelRecord) -> Iterator[str]:
    """The sizes that are missing from the config, with the defaults of its class."""
    given, text = text_part(record.config), hf_config(record).get_text_config()
    kind = type(text)
    defaults = {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
    found = []
    for size in SIZE_LIMITS:
        own = kind.attribute_map.get(size, size)
        default = defaults.get(own)
        if size in given or own in given or not isinstance(default, int) or isinstance(default, bool):
            continue
        if size_of(text, size) == default:  # otherwise another key gave it (BLOOM's n_embed), or it was derived
            found.append(f"{size} {default}")
    if found:
        yield f"missing from {record.name}'s config, so {kind.__name__}'s defaults are used: {', '.join(found)}"


def _towers(record: ModelRecord) -> Iterator[str]:
    """Notes on the parts of a multimodal checkpoint outside the text model: whether they are counted."""
    config = hf_config(record)
    if config.get_text_config() is config:
        return
    parts = [name for name in config.sub_configs if name != "text_config" and getattr(config, name, None) is not None]
    names = ", ".join(name.removesuffix("_config") for name in parts)
    if not parts:
        return
    if model_class(record).config_class is type(config):
        yield f"{record.name} is multimodal: its weights of {names} are counted, but the batch is text only"
    else:
        yield f"{record.name} is multimodal: planned and measured without its weights of {names}"


def attention(model: PreTrainedModel) -> str:
    """The attention implementation of ``model``: sdpa, eager, …; ``"none"`` for a model without attention."""
    text = model.config.get_text_config()
    if size_of(text, "num_attention_heads") is None:
        return "none"
    return str(attention_of(text))


KERNELS_ELSEWHERE = ("causal_conv1d_fn", "selective_scan_fn", "chunk_gated_delta_rule", "rwkv_linear_attention")
"""Names of functions in transformers' modeling files that run a recurrent layer: kernels of other packages, or PyTorch
code."""


def is_recurrent(model: nn.Module) -> bool:
    """Whether ``model`` has state-space or other recurrent layers, whose fast kernels come from other packages."""
    files = {type(module).__module__ for module in model.modules()}
    return any(hasattr(sys.modules.get(file), name) for file in files for name in KERNELS_ELSEWHERE)


def check_attention(record: ModelRecord, asked: str | None) -> None:
    """Raise `GaugeError` if the architecture does not support the attention called ``asked``; ``None`` means any."""
    if asked is None:
        return
    if asked not in ATTENTIONS:
        raise unknown("attention", asked, ATTENTIONS)
    kind, release = model_class(record), metadata.version("transformers")
    if asked == "sdpa" and not has_sdpa(kind):
        raise GaugeError(f"{kind.__name__} has no sdpa attention in transformers {release}; use eager")
    flash = flash_attentions(kind, asked)
    if asked == "flash_attention_2" and asked not in flash:
        other = f"; it supports {flash[0]}, which cannot be planned" if flash else ""
        raise GaugeError(f"{kind.__name__} has no {asked} in transformers {release}{other}; use sdpa or eager")
