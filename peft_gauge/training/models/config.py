"""Model configs, checked before any model is built from them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_gauge.errors import GaugeError, one_line
from peft_gauge.training.stored_formats import stored_format

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Far above any published causal LM: a larger size is a mistake, or an attempt to exhaust memory.
SIZE_LIMITS = {
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "intermediate_size": 2**20,
    "head_dim": 2**14,
    "max_position_embeddings": 2**28,
}
NO_ARCHITECTURE = (
    "quantization_config",  # how weights are stored: see `peft_gauge.training.stored_formats`
    "compression_config",
    "attn_implementation",  # the setting of the checkpoint's author, which may need a library that is not installed
    "_attn_implementation",
    "_attn_implementation_internal",
)
"""Keys of a published config that do not describe the architecture."""
REQUIRED_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")
CONFIG_FILE_LIMIT_BYTES = 4_000_000


def read_config(path: Path) -> dict[str, Any]:
    """The checked config in the ``config.json`` at ``path``. Raises `GaugeError` if it is missing or unusable."""
    config = read_json_object(path)
    check_config(config, str(path))
    return config


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file at ``path``. Raises `GaugeError` if the file is missing or holds anything else."""
    if not path.is_file():
        raise GaugeError(f"no {path.name} in {path.parent}; add it, or name another folder")
    if path.stat().st_size > CONFIG_FILE_LIMIT_BYTES:
        raise GaugeError(
            f"{path} is {path.stat().st_size:,} bytes, too large for a config (limit {CONFIG_FILE_LIMIT_BYTES:,})"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise GaugeError(f"{path} is not readable JSON: {one_line(error, 120)}") from error
    if not isinstance(config, dict):
        raise GaugeError(f"{path} is not a JSON object")
    return config


def check_config(config: dict[str, Any], origin: str) -> None:
    """Raise `GaugeError` unless ``config`` describes a causal LM that transformers builds without custom code.

    Given sizes are checked before anything is built, since a huge one would exhaust memory. Missing sizes get the
    defaults of the config's class, as in transformers. `remarks` names them, because a Llama without ``hidden_size`` is
    a 7B.
    """
    _check_kind(config, origin)
    stored_format(config, origin)
    parts = [value for value in config.values() if isinstance(value, dict)]  # text_config, vision_config, …
    for part in (config, *parts):
        _check_given_sizes(part, _aliases(part.get("model_type") or config["model_type"]), origin)
    built = built_config(config, origin)
    if built.is_encoder_decoder:  # by the class's default, if the config has no such key
        raise _encoder_decoder(config, origin)
    _check_built_sizes(built, origin)
    _check_text_batch(built, origin)


def _check_kind(config: dict[str, Any], origin: str) -> None:
    """Raise `GaugeError` for a model that is not a causal LM, with the kind of model it is."""
    import transformers
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = config.get("model_type")
    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    with_images = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    known = f"{origin}: model_type {model_type!r}"
    if not isinstance(model_type, str):
        raise GaugeError(f"{origin}: the config has no model_type, so the architecture is unknown; add it")
    if model_type not in CONFIG_MAPPING_NAMES:
        if config.get("auto_map"):
            raise GaugeError(f"{origin}: this model needs custom code (auto_map), which peft-gauge does not run")
        raise GaugeError(f"{known} is not a causal LM in transformers {transformers.__version__}")
    is_decoder = bool(config.get("is_decoder")) or causal.get(model_type) in (config.get("architectures") or ())
    sequences = model_type in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and not config.get("is_decoder")
    if config.get("is_encoder_decoder") or sequences:
        raise _encoder_decoder(config, origin)
    if model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoder:
        raise GaugeError(
            f"{known} is an encoder (masked LM), not a causal LM; for a decoder of this type, set is_decoder to true"
        )
    if model_type not in causal and model_type not in with_images:
        raise GaugeError(f"{known} is not a causal LM in transformers {transformers.__version__}")


def _encoder_decoder(config: dict[str, Any], origin: str) -> GaugeError:
    return GaugeError(
        f"{origin}: model_type {config['model_type']!r} is an encoder-decoder model; use a decoder-only causal LM"
    )


def _check_text_batch(built: PretrainedConfig, origin: str) -> None:
    """Raise `GaugeError` for a vision-language model whose batches must have images (BLIP-2)."""
    kind = class_of(type(built))
    images = inspect.signature(kind.forward).parameters.get("pixel_values")
    if images is not None and images.default is inspect.Parameter.empty:
        raise GaugeError(
            f"{origin}: {kind.__name__} is a vision-language model whose batches must have images; use the config of "
            f"its language model"
        )


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a published ``config`` that describes the text model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _aliases(model_type: object) -> dict[str, str]:
    """From the common name of a size to its name in this architecture (GPT-2: ``n_embd``)."""
    from transformers import CONFIG_MAPPING

    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    return getattr(CONFIG_MAPPING[model_type], "attribute_map", {}) if known else {}


def _check_given_sizes(config: dict[str, Any], aliases: dict[str, str], origin: str) -> None:
    for size, limit in SIZE_LIMITS.items():
        for name in {size, aliases.get(size, size)} & config.keys():
            value = config[name]
            if value is None:
                continue
            if isinstance(value, list) and size in ("intermediate_size", "num_key_value_heads", "num_attention_heads"):
                continue  # a few architectures have one value per layer
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
                raise GaugeError(f"{origin}: {name} = {value!r} is not a whole number from 1 to {limit:,}")


def built_config(config: dict[str, Any], origin: str) -> PretrainedConfig:
    """``config`` as an object of transformers' class, with the architecture's aliases and defaults."""
    from transformers import AutoConfig

    values = {key: value for key, value in config.items() if key not in NO_ARCHITECTURE}
    try:
        return AutoConfig.for_model(**values)
    except Exception as error:  # config classes validate in their own ways
        raise GaugeError(f"the config of {origin} is invalid: {one_line(error, 200)}") from error


def size_of(config: PretrainedConfig, name: str) -> Any:
    """The size called ``name``; ``None`` if the architecture has no such size, or one per layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers raises for sizes that may differ between layers
        return None


def _check_built_sizes(built: PretrainedConfig, origin: str) -> None:
    text = built.get_text_config()
    for size in REQUIRED_SIZES:
        if size_of(text, size) is None:
            raise GaugeError(f"{origin}: {size} is missing; add it to the config")
    heads, shared = size_of(text, "num_attention_heads"), size_of(text, "num_key_value_heads")
    if not isinstance(heads, int):
        return  # a state-space or recurrent model, or one value per layer
    # Without head_dim in the config, a class divides and rounds down: the remainder would be lost.
    if size_of(text, "head_dim") in (None, text.hidden_size // heads) and text.hidden_size % heads:
        raise GaugeError(f"{origin}: hidden_size {text.hidden_size} is not a multiple of {heads} attention heads")
    if isinstance(shared, int) and heads % shared:
        raise GaugeError(f"{origin}: {heads} attention heads are not a multiple of {shared} key-value heads")


def class_of(kind: type[PretrainedConfig]) -> type[PreTrainedModel]:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING
    found: Any = (MODEL_FOR_CAUSAL_LM_MAPPING if causal else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)[kind]
    one: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    return one
