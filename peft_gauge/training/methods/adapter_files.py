"""Saving and loading trained adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from peft_gauge.training.methods.attachment import prepare_base

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel

    from peft_gauge.training.methods.definitions import Method


def save(model: nn.Module, method: Method, folder: Path) -> int:
    """Save the weights that ``method`` trained in ``folder`` as safetensors, and return their bytes on disk."""
    if method.kind == "bottleneck":
        from peft_gauge.training.bottleneck import save as save_bottleneck

        save_bottleneck(model, folder)
    elif method.kind == "full":
        cast("Any", model).save_pretrained(str(folder))
    else:
        # No method resizes the vocabulary. By default PEFT checks this itself, by looking up the base on the hub.
        cast("Any", model).save_pretrained(str(folder), save_embedding_layers=False)
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def load(model: PreTrainedModel, method: Method, folder: Path) -> nn.Module:
    """Load the weights that `save` wrote into ``folder`` onto the newly built base ``model``.

    Pass the base unquantized, as to `attach`: a method that quantizes it does so here. A folder without bottleneck
    adapters raises `GaugeError`; for other methods, the error is that of PEFT or transformers.
    """
    if method.kind == "full":
        trained: nn.Module = type(model).from_pretrained(str(folder), dtype=model.dtype, local_files_only=True)
        return trained
    if method.kind == "bottleneck":
        from peft_gauge.training.bottleneck import load as load_bottleneck

        adapted: nn.Module = model
        load_bottleneck(adapted, folder)
        return adapted
    from peft_gauge.training.quantization import import_peft

    peft = import_peft()
    model = prepare_base(model, method)
    loaded: nn.Module = peft.PeftModel.from_pretrained(
        model, str(folder), autocast_adapter_dtype=method.autocast_adapter_dtype
    )
    return loaded
