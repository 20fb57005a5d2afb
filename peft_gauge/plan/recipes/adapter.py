"""The method of a recipe: an adapter by its keys, on a base that may be quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_gauge.errors import GaugeError

if TYPE_CHECKING:
    from peft_gauge.training.methods import Method


def adapter(
    settings: dict[str, Any],
    *,
    bits: int | None = None,
    quant_format: str = "nf4",
    double_quant: bool = False,
    compute_dtype: str | None = None,
    **further: Any,
) -> Method:
    """An adapter with PEFT's ``settings``, LoRA unless they name another type, over a base in ``bits`` (4, 8 or
    ``None``).

    Args:
        compute_dtype: of a 4-bit base; ``None`` for that of the base's weights.
        further: fields of `Method`.
    """
    from peft_gauge.training import methods

    given = {key: value for key, value in settings.items() if value is not None}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **given}
    quantization = None
    if bits is not None:
        if bits not in (4, 8):
            raise GaugeError(f"a base in {bits} bit cannot be planned; bitsandbytes has 4 and 8")
        quantization = methods.Quantization(
            quant_format if bits == 4 else "int8",  # type: ignore[arg-type]
            double_quant,
            compute_dtype if bits == 4 else None,
        )
    kind = str(config["peft_type"]).lower()
    return methods.Method(
        kind if bits is None else f"q{kind}",
        f"{config['peft_type']} by the recipe",
        "peft",
        peft_config=config,
        quantization=quantization,
        merges=True,
        **further,
    )
