"""How a checkpoint stores its weights, read from its config: what is planned as stored, what is not, and why.

A published config says with ``quantization_config`` that its weights are quantized already. The library that
transformers hands them to decides what a training step over them needs; `peft_gauge.training.stored_layers` builds
those layers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from peft_gauge.errors import GaugeError

Kind = Literal["bitsandbytes", "fp8", "gptq", "awq", "dequantized"]

# Group sizes and bit widths that a checkpoint can have; anything else is a mistake in the config.
BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
LARGEST_GROUP = 2**20

STORED_FORMAT = "peft_gauge_stored_format"
"""The attribute under which a built model carries the `StoredFormat` of its base; read it with
`peft_gauge.training.stored_layers.format_of`."""

NAMED_IN_REFUSAL = "bitsandbytes, FP8, GPTQ, AWQ, MXFP4 and compressed-tensors"
"""What can be planned, as a refusal lists it."""

IN_A_NAME = re.compile(r"(?:^|[-_.])(nvfp4|mxfp4|fp8|w8a8|w4a16|awq|gptq|bnb|4bit|8bit|int4|int8)(?:$|[-_.])", re.I)
"""Storage formats as publishers put them into a model's name."""


@dataclass(frozen=True)
class StoredFormat:
    """How weights are stored.

    ``kind``: whose layers hold them; ``"dequantized"`` are formats that transformers turns into 16 bit before a step.
    ``title`` as tables show it. ``settings``: the checkpoint's own ``quantization_config``. ``remark``: what to know of
    a step over such a base, or ``None``.
    """

    kind: Kind
    title: str
    settings: dict[str, Any] = field(hash=False)
    remark: str | None = None

    @property
    def description(self) -> str:
        """One phrase for tables: the format and where it is known from."""
        loaded = ", 16 bit once loaded" if self.kind == "dequantized" else ""
        return f"{self.title}, as its config says{loaded}"

    def same_as(self, quant_format: str) -> bool:
        """Whether these are the weights that quantizing a 16-bit base to ``quant_format`` makes."""
        return self.kind == "bitsandbytes" and self.settings["quant_format"] == quant_format


def stored_format(config: dict[str, Any], origin: str) -> StoredFormat | None:
    """The format that ``config`` says its weights are stored in; ``None`` for 16- or 32-bit weights.

    Raises `GaugeError` where a step over such weights cannot be planned, with the reason.
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
        return None  # dequantized on the way in: what is built is an ordinary model
    read = _READERS.get(method)
    if read is None:
        raise GaugeError(
            f"{origin}: its weights are stored with {method!r}, over which {_why_not(method, settings)}; "
            f"take a 16-bit checkpoint (planned as stored are {NAMED_IN_REFUSAL})"
        )
    return read(settings, origin)


def name_says(name: str, config: dict[str, Any]) -> str | None:
    """A remark on a model whose name speaks of a storage format that its config does not have; else ``None``."""
    found = IN_A_NAME.search(name)
    if found is None or config.get("quantization_config") or config.get("compression_config"):
        return None
    return f"{name} has {found[1]} in its name and no quantization_config in its config: taken as an unquantized base"


def _method(settings: dict[str, Any]) -> str:
    if settings.get("quant_method"):
        return str(settings["quant_method"]).lower()
    # Checkpoints from before there was a quant_method.
    return "bitsandbytes" if settings.get("load_in_4bit") or settings.get("load_in_8bit") else "an unnamed method"


def _why_not(method: str, settings: dict[str, Any]) -> str:
    """Why no step can be planned over weights that ``method`` stored, as the end of a sentence."""
    if method == "modelopt":
        algorithm = settings.get("quant_algo") or "ModelOpt"
        return f"transformers has no loader ({algorithm} of NVIDIA's ModelOpt)"
    if method == "nvfp4":
        return "transformers cannot train, nor load such a checkpoint"
    if method == "fbgemm_fp8":
        return "transformers has no backward pass"
    return "peft-gauge cannot plan a step"


def _whole(settings: dict[str, Any], key: str, default: int, origin: str) -> int:
    value = settings.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise GaugeError(f"{origin}: {key} = {value!r} of its quantization_config is not a whole number")
    return value


def _bitsandbytes(settings: dict[str, Any], origin: str) -> StoredFormat:
    if settings.get("load_in_8bit"):
        return StoredFormat("bitsandbytes", "INT8 (bitsandbytes)", {**settings, "quant_format": "int8"})
    quant_format = str(settings.get("bnb_4bit_quant_type", "fp4")).lower()
    if quant_format not in ("nf4", "fp4"):
        raise GaugeError(f"{origin}: bitsandbytes has no 4-bit format {quant_format!r}; it has nf4 and fp4")
    return StoredFormat("bitsandbytes", quant_format.upper(), {**settings, "quant_format": quant_format})


def _fp8(settings: dict[str, Any], origin: str) -> StoredFormat:
    block = settings.get("weight_block_size")
    sizes = [1, 1] if block is None else block
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes):
        raise GaugeError(f"{origin}: weight_block_size = {block!r} is not two whole numbers")
    return StoredFormat("fp8", "FP8", settings, "FP8: a backward dequantizes each layer's weights to 16 bit")


def _grouped(kind: Literal["gptq", "awq"], remark: str, settings: dict[str, Any], origin: str) -> StoredFormat:
    bits = _whole(settings, "bits", settings.get("w_bit", 4), origin)
    group = _whole(settings, "group_size", settings.get("q_group_size", 128), origin)
    if bits not in BITS[kind]:
        raise GaugeError(f"{origin}: {kind.upper()} with {bits} bits cannot be planned; known: {BITS[kind]}")
    if group != -1 and not 1 <= group <= LARGEST_GROUP:
        raise GaugeError(f"{origin}: group_size = {group} of its quantization_config is not -1 or above 0")
    return StoredFormat(kind, f"{kind.upper()} {bits} bit", {**settings, "bits": bits, "group_size": group}, remark)


def _gptq(settings: dict[str, Any], origin: str) -> StoredFormat:
    said = (
        "GPTQ: as gptqmodel's trainable kernel does it (GPTQConfig(backend='auto_trainable')), which dequantizes each "
        "layer's weights in forward and keeps them for backward"
    )
    return _grouped("gptq", said, settings, origin)


def _awq(settings: dict[str, Any], origin: str) -> StoredFormat:
    version = str(settings.get("version", settings.get("format", "gemm"))).lower()
    if version != "gemm":
        raise GaugeError(f"{origin}: AWQ of version {version!r} cannot be planned; the trainable kernel takes 'gemm'")
    said = "AWQ: as gptqmodel's trainable kernel does it (AwqConfig(backend='auto_trainable'))"
    return _grouped("awq", said, settings, origin)


def _mxfp4(settings: dict[str, Any], origin: str) -> StoredFormat:
    said = (
        "MXFP4: transformers' kernels for it have no backward pass; planned as 16 bit, as "
        "Mxfp4Config(dequantize=True) loads it"
    )
    return StoredFormat("dequantized", "MXFP4", settings, said)


def _compressed_tensors(settings: dict[str, Any], origin: str) -> StoredFormat:
    groups = settings.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    weights = [group.get("weights") for group in groups if isinstance(group, dict)]
    kinds = {_number_format(each) for each in weights if isinstance(each, dict)}
    title = f"{' and '.join(sorted(kinds)) or settings.get('format', 'weights')} (compressed-tensors)"
    said = "compressed-tensors: its layers are decompressed for good in the first forward; planned as 16 bit"
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
