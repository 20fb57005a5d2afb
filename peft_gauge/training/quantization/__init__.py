"""4-bit and 8-bit weights: quantizing a model's layers with bitsandbytes, and the rounding error of formats."""

from __future__ import annotations

from peft_gauge.training.quantization.layers import LAYER_FORMATS, left_unquantized, output_heads, quantize_
from peft_gauge.training.quantization.library import load_bitsandbytes

__all__ = ["LAYER_FORMATS", "left_unquantized", "load_bitsandbytes", "output_heads", "quantize_"]
