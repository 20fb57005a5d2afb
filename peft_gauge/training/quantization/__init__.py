"""4-bit and 8-bit weights: quantizing a model's layers with bitsandbytes, and the rounding error of formats."""

from __future__ import annotations

from peft_gauge._internals.torch import uncompiled
from peft_gauge.training.quantization.layers import LAYER_FORMATS, left_unquantized, output_heads, quantize_
from peft_gauge.training.quantization.library import import_peft, load_bitsandbytes

__all__ = [
    "LAYER_FORMATS",
    "import_peft",
    "left_unquantized",
    "load_bitsandbytes",
    "output_heads",
    "quantize_",
    "uncompiled",
]
