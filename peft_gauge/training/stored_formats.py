"""How a checkpoint stores its weights, read from its config: which formats can be planned, and why others cannot.

A ``quantization_config`` in a published config means that the weights are quantized already. The memory of a training
step over them depends on the library that transformers loads them with; `peft_gauge.training.stored_layers` builds
that library's layers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from peft_gauge.errors import GaugeError

Kind = Literal["bitsandbytes", "fp8", "gptq", "awq", "dequantized"]

# Valid bit widths and group sizes; anything else is a mistake in the config.
BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
LARGEST_GROUP = 2**20

STORED_FORMAT = "peft_gauge_stored_format"
"""The attribute of a built model that holds the `StoredFormat` of its base; read it with
`peft_gauge.training.stored_layers.format_of`."""

NAMED_IN_REFUSAL = "bitsandbytes, FP8, GPTQ, AWQ, MXFP4 and compressed-tensors"
"""The formats that can be planned, as error messages list them."""

IN_A_NAME = re.compile(r"(?:^|[-_.])(nvfp4|mxfp4|fp8|w8a8|w4a16|awq|gptq|bnb|4bit|8bit|int4|int8)(?:$|[-_.])", re.I)
"""Storage formats as they appear in names of published models."""


@dataclass(frozen=True)
class StoredFormat:
    """How weights are stored.

    Attributes:
        kind: the library or format of the layers; ``"dequantized"`` for formats that transformers converts to 16 bit
            before a step.
        title: as tables show it.
        settings: the checkpoint's own ``quantization_config``.
        remark: a note for users who train over such a base, or ``None``.
    """

    kind: Kind
    title: str
    settings: dict[str, Any] = field(hash=False)
    remark: str | None = None

    @property
    def description(self) -> str:
        """One phrase for tables: the format, and the config as its source."""
        loaded = ", 16 bit once loaded" if self.kind == "dequantized" else ""
        return f"{self.title}, from its config{loaded}"

    def same_as(self, quant_format: str) -> bool:
        """Whether quantizing a 16-bit base to ``quant_format`` gives this format."""
        return self.kind == "bitsandbytes" and self.settings["quant_format"] == quant_format


def stored_format(config: dict[str, Any], origin: str) -> StoredFormat | None:
    """The storage format of the weights by ``config``; ``None`` for 16- or 32-bit weights.

    Raises `GaugeError`, with the reason, for a format over which no step can be planned.
    """
    inner = config.get("text_config")
    settings = config.get("quantization_config") or config.get("compression_config")
    if settings is None and isinstance(inner, dict):
        settings = inner.get("quantization_config")
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise GaugeError(f"{origin}: quantization_config is not an object")
    method = _method(settings)
    if method == "gguf":
        return None  # dequantized while loading: the built model is an ordinary one
    read = _READERS.get(method)
    if read is None:
        raise GaugeError(
            f"{origin}: its weights are stored with {method!r}, for which {_why_not(method, settings)}; "
            f"use a 16-bit checkpoint, or one in a supported format ({NAMED_IN_REFUSAL})"
        )
    return read(settings, origin)


def name_says(name: str, config: dict[str, Any]) -> str | None:
    """A remark if the model's ``name`` contains a storage format but its config has none; otherwise ``None``."""
    found = IN_A_NAME.search(name)
    if found is None or config.get("quantization_config") or config.get("compression_config"):
        return None
    return f"{name} has {found[1]} in its name but no quantization_config in its config: treated as not quantized"


def _method(settings: dict[str, Any]) -> str:
    if settings.get("quant_method"):
        return str(settings["quant_method"]).lower()
    # Old checkpoints have no quant_method.
    return "bitsandbytes" if settings.get("load_in_4bit") or settings.get("load_in_8bit") else "an unnamed method"


def _why_not(method: str, settings: dict[str, Any]) -> str:
    """Why no step can be planned over weights stored with ``method``, as the end of a sentence."""
    if method == "modelopt":
        algorithm = settings.get("quant_algo") or "ModelOpt"
        return f"transformers has no loader ({algorithm} of NVIDIA's ModelOpt)"
    if method == "nvfp4":
        return "transformers has neither a loader nor a backward pass"
    if method == "fbgemm_fp8":
        return "transformers has no backward pass"
    return "peft-gauge cannot plan a step"


def _whole(settings: dict[str, Any], key: str, default: int, origin: str) -> int:
    value = settings.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise GaugeError(f"{origin}: {key} = {value!r} in its quantization_config is not a whole number")
    return value


def _bitsandbytes(settings: dict[str, Any], origin: str) -> StoredFormat:
    if settings.get("load_in_8bit"):
        return StoredFormat("bitsandbytes", "INT8 (bitsandbytes)", {**settings, "quant_format": "int8"})
    quant_format = str(settings.get("bnb_4bit_quant_type", "fp4")).lower()
    if quant_format not in ("nf4", "fp4"):
        raise GaugeError(f"{origin}: bitsandbytes has no 4-bit format {quant_format!r}; use nf4 or fp4")
    return StoredFormat("bitsandbytes", quant_format.upper(), {**settings, "quant_format": quant_format})


def _fp8(settings: dict[str, Any], origin: str) -> StoredFormat:
    block = settings.get("weight_block_size")
    sizes = [1, 1] if block is None else block
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes):
        raise GaugeError(f"{origin}: weight_block_size = {block!r} must be two positive whole numbers")
    return StoredFormat("fp8", "FP8", settings, "FP8: the backward pass dequantizes each layer's weights to 16 bit")


def _grouped(kind: Literal["gptq", "awq"], remark: str, settings: dict[str, Any], origin: str) -> StoredFormat:
    bits = _whole(settings, "bits", settings.get("w_bit", 4), origin)
    group = _whole(settings, "group_size", settings.get("q_group_size", 128), origin)
    if bits not in BITS[kind]:
        raise GaugeError(f"{origin}: {kind.upper()} with {bits} bits cannot be planned; supported: {BITS[kind]}")
    if group != -1 and not 1 <= group <= LARGEST_GROUP:
        raise GaugeError(f"{origin}: group_size = {group} in its quantization_config must be -1 or positive")
    return StoredFormat(kind, f"{kind.upper()} {bits} bit", {**settings, "bits": bits, "group_size": group}, remark)


def _gptq(settings: dict[str, Any], origin: str) -> StoredFormat:
    said = (
        "GPTQ: planned for gptqmodel's trainable kernel (GPTQConfig(backend='auto_trainable')), which dequantizes each "
        "layer's weights in the forward pass and keeps them for the backward pass"
    )
    return _grouped("gptq", said, settings, origin)


def _awq(settings: dict[str, Any], origin: str) -> StoredFormat:
    version = str(settings.get("version", settings.get("format", "gemm"))).lower()
    if version != "gemm":
        raise GaugeError(f"{origin}: AWQ version {version!r} cannot be planned; the trainable kernel needs 'gemm'")
    said = "AWQ: planned for gptqmodel's trainable kernel (AwqConfig(backend='auto_trainable'))"
    return _grouped("awq", said, settings, origin)


def _mxfp4(settings: dict[str, Any], origin: str) -> StoredFormat:
    said = (
        "MXFP4: planned as 16 bit, as loaded with Mxfp4Config(dequantize=True), because transformers' MXFP4 kernels "
        "have no backward pass"
    )
    return StoredFormat("dequantized", "MXFP4", settings, said)


def _compressed_tensors(settings: dict[str, Any], origin: str) -> StoredFormat:
    groups = settings.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    weights = [group.get("weights") for group in groups if isinstance(group, dict)]
    kinds = {_number_format(each) for each in weights if isinstance(each, dict)}
    title = f"{' and '.join(sorted(kinds)) or settings.get('format', 'weights')} (compressed-tensors)"
    said = "compressed-tensors: planned as 16 bit, because the first forward pass decompresses the layers for good"
    return StoredFormat("dequantized", title, settings, said)


def _number_format(weights: dict[str, Any]) -> str:
    bits, is_float = weights.get("num_bits"), weights.get("type") == "float"
    if is_float and bits == 4:
        return "NVFP4" if weights.get("group_size") == 16 else "MXFP4" if weights.get("group_size") == 32 else "FP4"
    return f"{'FP' if is_float else 'INT'}{bits}"


_READERS = {
    "bitsandbytes": _bitsandbytes,
    "bitsandbytes_4bit": lambda settings, origin: _bitsandbytes({**settings, "load_in_8bit": False}, origin),
    "bitsandbytes_8bit": lambda settings, origin: _bitsandbytes({**settings, "load_in_8bit": True}, origin),
    "fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
    "compressed_tensors": _compressed_tensors,
}
