"""The method of a recipe: LoRA by its keys, on a base that may be quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_gauge.errors import GaugeError

if TYPE_CHECKING:
    from peft_gauge.training.methods import Method


def lora(
    settings: dict[str, Any],
    *,
    bits: int | None = None,
    quant_format: str = "nf4",
    double_quant: bool = False,
    adapters_in_float32: bool = True,
) -> Method:
    """LoRA with PEFT's ``settings``, over a base in ``bits`` (4, 8 or ``None``).

    The base is not prepared for k-bit training: TRL and LLaMA-Factory leave that out, and axolotl casts norms and
    embeddings back to 16 bit after it.
    """
    from peft_gauge.training import methods

    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **{k: v for k, v in settings.items() if v is not None}}
    quantization = None
    if bits is not None:
        if bits not in (4, 8):
            raise GaugeError(f"a base in {bits} bit cannot be planned; bitsandbytes has 4 and 8")
        quantization = methods.Quantization(quant_format if bits == 4 else "int8", double_quant)  # type: ignore[arg-type]
    name = "lora" if bits is None else "qlora"
    return methods.Method(
        name,
        "LoRA by the recipe",
        "peft",
        peft_config=config,
        quantization=quantization,
        autocast_adapter_dtype=adapters_in_float32,
        merges=True,
    )
