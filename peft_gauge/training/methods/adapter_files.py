"""Adapters on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from peft_gauge.training.methods.attachment import prepare_base

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel

    from peft_gauge.training.methods.definitions import Method


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

    A quantized method's base must be given unquantized, as to `attach`. Raises `GaugeError` for a folder without it.
    """
    if method.kind == "full":
        trained: nn.Module = type(model).from_pretrained(str(folder), dtype=model.dtype, local_files_only=True)
        return trained
    if method.kind == "bottleneck":
        from peft_gauge.training.bottleneck import load as load_bottleneck

        adapted: nn.Module = model
        load_bottleneck(adapted, folder)
        return adapted
    from peft import PeftModel

    model = prepare_base(model, method)
    return PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=method.autocast_adapter_dtype)
