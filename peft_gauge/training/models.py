"""Base models as frozen records, built only when asked: on ``meta`` for counting, on CPU or CUDA for running.

A record says where the architecture comes from (a named record of ``fixtures/models/``, a local folder in Hugging
Face layout, a GGUF file, or a hub id) and where the weights come from (drawn from a seed, or real). Nothing touches
the network unless the user names a hub id, and ``trust_remote_code`` is never on.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from peft_gauge import paths
from peft_gauge._internals.transformers import attention_of, flash_attentions, forget_origin, has_sdpa
from peft_gauge.errors import GaugeError, one_line, unknown
from peft_gauge.machine import accelerators
from peft_gauge.training.stored_formats import STORED_FORMAT, StoredFormat, name_says, stored_format

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Source = Literal["record", "folder", "gguf", "hub"]

DTYPES = ("float32", "float16", "bfloat16")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")

# The real weights that `peft-gauge fetch` can bring, by record: the file's name in the cache.
FETCHED_WEIGHTS = {"smollm2-135m": "SmolLM2-135M-Instruct.Q4_1.gguf"}

# No published causal LM comes near these; a config beyond them is a mistake or an attack on the reader's memory.
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
    "attn_implementation",  # of whoever saved the checkpoint; a library that is not here would be asked for
    "_attn_implementation",
    "_attn_implementation_internal",
)
"""Keys of a published config that say nothing of the architecture."""
REQUIRED_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")
POSITION_LIMITS = (
    "max_position_embeddings",
    "n_positions",  # GPT-2, GPT-J
    "n_ctx",
    "seq_length",  # BLOOM
    "max_seq_len",  # MPT
    "context_length",  # RWKV
)
CONFIG_FILE_LIMIT_BYTES = 4_000_000


Weights = Literal["real", "random", "random-gpu"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)


@dataclass(frozen=True)
class ModelRecord:
    """A base model that can be built.

    Fields: ``name`` as shown in tables; ``source`` of the architecture; ``config_json``, the Hugging Face config as
    JSON text (text, so that a record can be hashed and sent to another process); ``weights``, one of `WEIGHTS`:
    ``"real"`` (read from ``location``: a folder, a GGUF file or a hub id), ``"random"`` (drawn from ``seed`` on the
    CPU, the same bytes everywhere) or ``"random-gpu"`` (drawn on the GPU: a 7B in seconds, other bytes on other GPUs).
    """

    name: str
    source: Source
    config_json: str
    weights: Weights
    location: str | None = None
    seed: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """The Hugging Face config as a dictionary (a fresh copy)."""
        return json.loads(self.config_json)

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the model was made for, in tokens: what the text model's config says, else its class's
        default; ``None`` where there is no such limit (a state-space model)."""
        config = self.config
        for part in (_text_part(config), config):
            for key in POSITION_LIMITS:
                if _is_limit(part.get(key)):
                    return int(part[key])
        default = _text_config(self).get("max_position_embeddings")
        return default if _is_limit(default) else None

    @property
    def vocab_size(self) -> int:
        """The rows of the text model's embedding, as its config or its class's default says."""
        return int(_text_config(self)["vocab_size"])

    @property
    def stored(self) -> StoredFormat | None:
        """How the checkpoint stores its weights, as its config says; ``None`` for 16 or 32 bit."""
        return None if self.source == "gguf" else stored_format(self.config, self.name)

    def check_sequence(self, seq: int) -> None:
        """Raise `GaugeError` where ``seq`` tokens are more than the model has positions for."""
        limit = self.max_positions
        if limit is not None and seq > limit:
            raise GaugeError(
                f"a sequence of {seq} tokens is beyond {self.name}'s limit of {limit}; use --seq {limit} or less"
            )


def _is_limit(value: object) -> bool:
    """Whether ``value`` is a number of positions; XLNet says -1 for none."""
    return isinstance(value, int) and value > 0


def record_names() -> list[str]:
    """The names of the records under ``fixtures/models/``."""
    return sorted(folder.name for folder in paths.fixture("models").iterdir() if (folder / "config.json").is_file())


def resolve(spec: str, *, weights: str | None = None, seed: int = 0) -> ModelRecord:
    """The record that ``spec`` names: a record's name, a folder, a .json or .gguf file, or a hub id ``owner/name``.

    ``weights``: one of `WEIGHTS`, or ``None`` for real ones where they are at hand. Raises `GaugeError` for an
    unknown name, an unusable config, or real weights that are not there.
    """
    if weights is not None and weights not in WEIGHTS:
        raise unknown("kind of weights", weights, WEIGHTS)
    if weights == "random-gpu":
        return replace(resolve(spec, weights="random", seed=seed), weights="random-gpu")
    if spec.lower() in record_names():
        return _from_record(spec.lower(), weights, seed)
    path = Path(spec).expanduser()
    if path.is_dir() or path.name == "config.json":
        return _from_folder(path if path.is_dir() else path.parent, weights, seed)
    if path.suffix == ".gguf":
        return _from_gguf(path, weights, seed)
    if path.suffix == ".json":
        return _from_config_file(path, weights, seed)
    if path.exists():
        raise GaugeError(f"{spec} is neither a folder, a config (.json) nor a .gguf file")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", spec):
        return _from_hub(spec, weights, seed)
    if "/" in spec or spec.startswith((".", "~")):
        raise GaugeError(f"no such model folder or file: {spec}")
    raise unknown("model", spec, record_names())


def _from_record(name: str, weights: str | None, seed: int) -> ModelRecord:
    config = read_json_object(paths.fixture("models") / name / "config.json")  # ours: a test holds them to the checks
    fetched = paths.cache() / name / FETCHED_WEIGHTS[name] if name in FETCHED_WEIGHTS else None
    if weights == "real" and (fetched is None or not fetched.is_file()):
        how = "run: peft-gauge fetch smollm2" if fetched else "name a folder, a GGUF file or a hub id that holds them"
        raise GaugeError(f"no real weights of {name} on this machine; {how}")
    if fetched is not None and fetched.is_file() and weights != "random":
        return ModelRecord(name, "record", json.dumps(config), "real", str(fetched), seed)
    return ModelRecord(name, "record", json.dumps(config), "random", None, seed)


def _from_folder(folder: Path, weights: str | None, seed: int) -> ModelRecord:
    config = read_config(folder / "config.json")
    has_weights = any(folder.glob("*.safetensors"))
    if weights == "real" and not has_weights:
        raise GaugeError(f"no .safetensors weights in {folder}; use --weights random or add them")
    real = has_weights and weights != "random"
    name = folder.resolve().name
    return ModelRecord(
        name, "folder", json.dumps(config), "real" if real else "random", str(folder) if real else None, seed
    )


def _from_config_file(path: Path, weights: str | None, seed: int) -> ModelRecord:
    if weights == "real":
        raise GaugeError(f"{path} is a config without weights; name their folder, or use --weights random")
    return ModelRecord(path.stem, "folder", json.dumps(read_config(path)), "random", None, seed)


def _from_gguf(path: Path, weights: str | None, seed: int) -> ModelRecord:
    from transformers import AutoConfig

    if not path.is_file():
        raise GaugeError(f"no such GGUF file: {path}")
    try:
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    except Exception as error:  # the reader raises whatever the bytes led it to
        raise GaugeError(
            f"{path.name} is not a GGUF that transformers can read as a causal LM: {one_line(error, 160)}"
        ) from error
    check_config(config.to_dict(), path.name)
    kind: Literal["random", "real"] = "random" if weights == "random" else "real"
    return ModelRecord(path.stem, "gguf", config.to_json_string(use_diff=False), kind, str(path), seed)


def _from_hub(spec: str, weights: str | None, seed: int) -> ModelRecord:
    from huggingface_hub import hf_hub_download

    try:
        config = read_config(Path(hf_hub_download(spec, "config.json")))
    except GaugeError:
        raise
    except Exception as error:  # no network, no such repository, gated: each library version has its own class
        raise GaugeError(
            f"cannot reach {spec} on the hub ({type(error).__name__}: {one_line(error, 160)}); "
            f"check the name and the network, or use one of: {', '.join(record_names())}"
        ) from error
    kind: Literal["random", "real"] = "random" if weights == "random" else "real"
    return ModelRecord(spec, "hub", json.dumps(config), kind, spec, seed)


def read_config(path: Path) -> dict[str, Any]:
    """The checked config of the ``config.json`` at ``path``; raises `GaugeError` where it is missing or unusable."""
    config = read_json_object(path)
    check_config(config, str(path))
    return config


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file at ``path``; raises `GaugeError` where there is none."""
    if not path.is_file():
        raise GaugeError(f"no {path.name} in {path.parent}; it is needed there")
    if path.stat().st_size > CONFIG_FILE_LIMIT_BYTES:
        raise GaugeError(f"{path} is {path.stat().st_size:,} bytes, far more than any config; refused")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise GaugeError(f"{path} is not readable JSON: {one_line(error, 120)}") from error
    if not isinstance(config, dict):
        raise GaugeError(f"{path} holds no JSON object")
    return config


def check_config(config: dict[str, Any], origin: str) -> None:
    """Raise `GaugeError` unless ``config`` describes a causal LM that transformers builds without custom code.

    The sizes that are given are checked before anything is built: a huge one would take the machine's memory. What a
    published config leaves out is its class's default, as transformers builds it; `remarks` names these, because a
    Llama without ``hidden_size`` is a 7B.
    """
    _check_kind(config, origin)
    stored_format(config, origin)
    parts = [value for value in config.values() if isinstance(value, dict)]  # text_config, vision_config, …
    for part in (config, *parts):
        _check_given_sizes(part, _aliases(part.get("model_type") or config["model_type"]), origin)
    built = _built_config(config, origin)
    if built.is_encoder_decoder:  # by its class, where the config does not say
        raise _encoder_decoder(config, origin)
    _check_built_sizes(built, origin)
    _check_text_batch(built, origin)


def _check_kind(config: dict[str, Any], origin: str) -> None:
    """Raise `GaugeError` for what is no causal LM, with what it is instead."""
    import transformers
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = config.get("model_type")
    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    with_images = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    known = f"{origin}: model_type {model_type!r}"
    if not isinstance(model_type, str):
        raise GaugeError(f"{origin}: the config names no model_type, so the architecture is unknown")
    if model_type not in CONFIG_MAPPING_NAMES:
        if config.get("auto_map"):
            raise GaugeError(f"{origin}: this model needs custom code (auto_map), which peft-gauge does not run")
        raise GaugeError(f"{known} is no causal LM that transformers {transformers.__version__} knows")
    is_decoder = bool(config.get("is_decoder")) or causal.get(model_type) in (config.get("architectures") or ())
    sequences = model_type in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and not config.get("is_decoder")
    if config.get("is_encoder_decoder") or sequences:
        raise _encoder_decoder(config, origin)
    if model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoder:
        raise GaugeError(f"{known} is an encoder (masked LM), no causal LM; a decoder of this type says is_decoder")
    if model_type not in causal and model_type not in with_images:
        raise GaugeError(f"{known} is no causal LM that transformers {transformers.__version__} knows")


def _encoder_decoder(config: dict[str, Any], origin: str) -> GaugeError:
    return GaugeError(
        f"{origin}: model_type {config['model_type']!r} is an encoder-decoder model; only decoder-only causal LMs can "
        f"be planned or measured"
    )


def _check_text_batch(built: PretrainedConfig, origin: str) -> None:
    """Raise `GaugeError` for a vision-language model that takes no batch of text alone (BLIP-2)."""
    kind = _class_of(type(built))
    images = inspect.signature(kind.forward).parameters.get("pixel_values")
    if images is not None and images.default is inspect.Parameter.empty:
        raise GaugeError(
            f"{origin}: {kind.__name__} is a vision-language model that takes no batch of text alone; plan its "
            f"language model by that one's own config"
        )


def _text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The part of ``config`` that describes the text model, as it was published."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _aliases(model_type: object) -> dict[str, str]:
    """Sizes by the name that everybody uses -> by the name that this architecture uses (GPT-2: ``n_embd``)."""
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
                continue  # a few architectures give one value a layer
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
                raise GaugeError(f"{origin}: {name} = {value!r} is not a whole number from 1 to {limit:,}")


def _built_config(config: dict[str, Any], origin: str) -> PretrainedConfig:
    """``config`` as transformers' own class, which knows the architecture's aliases and defaults."""
    from transformers import AutoConfig

    values = {key: value for key, value in config.items() if key not in NO_ARCHITECTURE}
    try:
        return AutoConfig.for_model(**values)
    except Exception as error:  # config classes validate in their own ways
        raise GaugeError(f"the config of {origin} is not usable: {one_line(error, 200)}") from error


def _size(config: PretrainedConfig, name: str) -> Any:
    """The size called ``name``; ``None`` where the architecture has none, or one for each layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers refuses to give one value for sizes that may differ from layer to layer
        return None


def _check_built_sizes(built: PretrainedConfig, origin: str) -> None:
    text = built.get_text_config()
    for size in REQUIRED_SIZES:
        if _size(text, size) is None:
            raise GaugeError(f"{origin}: {size} is missing; the architecture cannot be built without it")
    heads, shared = _size(text, "num_attention_heads"), _size(text, "num_key_value_heads")
    if not isinstance(heads, int):
        return  # a state-space or recurrent model; or one value a layer
    # Where the config has no head_dim, a class leaves it out or divides, and what is left over would be lost.
    if _size(text, "head_dim") in (None, text.hidden_size // heads) and text.hidden_size % heads:
        raise GaugeError(f"{origin}: hidden_size {text.hidden_size} is no multiple of {heads} attention heads")
    if isinstance(shared, int) and heads % shared:
        raise GaugeError(f"{origin}: {heads} attention heads are no multiple of {shared} key-value heads")


@cache
def _text_config(record: ModelRecord) -> dict[str, Any]:
    """The text model's sizes under their usual names, defaults and aliases resolved."""
    text = hf_config(record).get_text_config()
    return {size: _size(text, size) for size in SIZE_LIMITS}


def remarks(record: ModelRecord) -> list[str]:
    """What a reader of a figure about ``record`` should know of how its config was read, a sentence each."""
    stored, named = record.stored, name_says(record.name, record.config)
    said = [stored.remark if stored is not None else None, named]
    return [*_defaulted(record), *_towers(record), *filter(None, said)]


def _defaulted(record: ModelRecord) -> Iterator[str]:
    """Which sizes the config leaves out, and what its class puts in their place."""
    given, text = _text_part(record.config), hf_config(record).get_text_config()
    kind = type(text)
    defaults = {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
    found = []
    for size in SIZE_LIMITS:
        own = kind.attribute_map.get(size, size)
        default = defaults.get(own)
        if size in given or own in given or not isinstance(default, int) or isinstance(default, bool):
            continue
        if _size(text, size) == default:  # else another key gave it (BLOOM's n_embed), or it was derived
            found.append(f"{size} {default}")
    if found:
        yield f"left out of {record.name}'s config and taken as {kind.__name__}'s defaults: {', '.join(found)}"


def _towers(record: ModelRecord) -> Iterator[str]:
    """What becomes of the parts of a multimodal checkpoint that are not the text model."""
    config = hf_config(record)
    if config.get_text_config() is config:
        return
    parts = [name for name in config.sub_configs if name != "text_config" and getattr(config, name, None) is not None]
    names = ", ".join(name.removesuffix("_config") for name in parts)
    if not parts:
        return
    if model_class(record).config_class is type(config):
        yield f"{record.name} holds more than a text model: its weights of {names} are counted, and the batch is text"
    else:
        yield f"{record.name} holds more than a text model: planned and measured without its weights of {names}"


def model_class(record: ModelRecord) -> type[PreTrainedModel]:
    """The class that ``record`` is built as: the causal LM of its config, else the vision-language model around it."""
    return _class_of(type(hf_config(record)))


def _class_of(kind: type[PretrainedConfig]) -> type[PreTrainedModel]:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING
    found = (MODEL_FOR_CAUSAL_LM_MAPPING if causal else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)[kind]
    return found[0] if isinstance(found, tuple) else found


def _auto_class(record: ModelRecord) -> Any:
    """transformers' class that builds and loads ``record`` as `model_class`."""
    import transformers

    causal = type(hf_config(record)) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModelForImageTextToText


def check_dtype(name: str) -> None:
    """Raise `GaugeError` for a dtype that a model is not trained in."""
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called ``name``; raises `GaugeError` for one that a model is not trained in."""
    check_dtype(name)
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def default_dtype(device: str) -> str:
    """float32 on CPU, 16 bit on CUDA (bfloat16 from compute capability 8.0 on, else float16).

    Few CPUs multiply bfloat16 natively and the others take about ten times as long in it, so a suite whose CPU
    figures are to be compared across machines starts from float32; ``--dtype`` changes it.
    """
    if device != "cuda":
        return "float32"
    cards = accelerators()
    return "float16" if cards and cards[0].compute_capability < (8, 0) else "bfloat16"


def default_model(device: str) -> str:
    """SmolLM2-135M where there is only a CPU, TinyLlama-1.1B on a GPU."""
    return "tinyllama" if device == "cuda" else "smollm2-135m"


def hf_config(record: ModelRecord) -> PretrainedConfig:
    """The record's architecture as a transformers config object."""
    return _built_config(record.config, record.name)


def build(
    record: ModelRecord,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    attn_implementation: str | None = None,
    as_stored: bool = True,
) -> PreTrainedModel:
    """The model of ``record`` on ``device``, with weights in ``dtype``; quantised, where the checkpoint is.

    On ``"meta"`` nothing is allocated (70B takes about a second). Random weights are drawn in float32 on the CPU from
    ``record.seed`` by the architecture's own initialisation and then rounded to ``dtype``, so the same seed gives
    the same bytes on every device. ``attn_implementation``: one of `ATTENTIONS`, or ``None`` for sdpa where the
    architecture has it, else eager (`attention` says which). Without ``as_stored`` drawn weights stay unquantised.
    Raises `GaugeError` where the architecture has not the attention asked for, where the machine has not enough
    memory, or where the weights do not match the architecture.
    """
    import torch

    wanted = torch_dtype(dtype)
    check_attention(record, attn_implementation)
    if device == "meta":
        model_class(record), _auto_class(record)  # imported here: under a device, torch 2.6 cannot import its compiler
        with torch.device("meta"):
            model = _from_config(record, attn_implementation).to(wanted)
        # What flash attention casts to, where activations are float32 and weights are packed.
        model.config.dtype = model.config.get_text_config().dtype = wanted
        return _as_stored(model, record) if as_stored else model
    check_measurable(record)
    _check_memory(record, wanted)
    if record.weights == "real":
        model = _load(record, wanted, attn_implementation).to(device)
        setattr(model, STORED_FORMAT, record.stored)
        return model
    if record.weights == "random-gpu":
        model = _drawn_on_the_gpu(record, wanted, attn_implementation)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(record.seed)
            model = _from_config(record, attn_implementation).to(wanted)
    return (_as_stored(model, record) if as_stored else model).to(device)


def _drawn_on_the_gpu(record: ModelRecord, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel:
    """The model on the CPU, as any other, with weights that the GPU drew in ``dtype``; its memory is given back."""
    import torch

    with torch.random.fork_rng(devices=[torch.cuda.current_device()]), torch.device("cuda"):
        torch.cuda.manual_seed(record.seed)
        model = _from_config(record, attn_implementation, dtype)
    model.to("cpu")
    torch.cuda.empty_cache()
    return model


def _as_stored(model: PreTrainedModel, record: ModelRecord) -> PreTrainedModel:
    stored = record.stored
    if stored is not None:
        from peft_gauge.training.stored_layers import store_

        store_(model, stored)
    return model


def check_measurable(record: ModelRecord) -> None:
    """Raise `GaugeError` where the base comes in a format whose steps are planned but not measured."""
    stored = record.stored
    if stored is not None and stored.kind != "bitsandbytes":
        needed = "loading them takes" if stored.kind == "dequantised" else "their layers take"
        raise GaugeError(
            f"{record.name} is stored as {stored.title}; steps over such weights are planned (peft-gauge plan) and not "
            f"measured, because {needed} packages that this project does not require; measure a 16-bit checkpoint"
        )


def attention(model: PreTrainedModel) -> str:
    """The attention that ``model`` was built with: sdpa, eager, …; ``"none"`` for a model without attention."""
    text = model.config.get_text_config()
    if _size(text, "num_attention_heads") is None:
        return "none"
    return str(attention_of(text))


KERNELS_ELSEWHERE = ("causal_conv1d_fn", "selective_scan_fn", "chunk_gated_delta_rule", "rwkv_linear_attention")
"""Names in transformers' modelling files of what runs a recurrent layer: kernels of other packages, or PyTorch code."""


def is_recurrent(model: nn.Module) -> bool:
    """Whether ``model`` has state-space or other recurrent layers, for which fast kernels come from other packages."""
    files = {type(module).__module__ for module in model.modules()}
    return any(hasattr(sys.modules.get(file), name) for file in files for name in KERNELS_ELSEWHERE)


def check_attention(record: ModelRecord, asked: str | None) -> None:
    """Raise `GaugeError` where the architecture of ``record`` has not the attention ``asked`` for; ``None`` is any."""
    if asked is None:
        return
    if asked not in ATTENTIONS:
        raise unknown("attention", asked, ATTENTIONS)
    kind, release = model_class(record), metadata.version("transformers")
    if asked == "sdpa" and not has_sdpa(kind):
        raise GaugeError(f"{kind.__name__} has no sdpa attention in transformers {release}; use eager")
    flash = flash_attentions(kind, asked)
    if asked == "flash_attention_2" and asked not in flash:
        other = f"; it takes {flash[0]}, which is not planned" if flash else ""
        raise GaugeError(f"{kind.__name__} has no {asked} in transformers {release}{other}; use sdpa or eager")


def stored(record: ModelRecord, dtype: str, folder: Path) -> ModelRecord:
    """``record`` with its very weights as safetensors in ``dtype`` in ``folder``, from which they load in a moment.

    For whoever builds the same base many times, in processes of their own: drawing weights and dequantising a GGUF
    take longer than reading them. A record that loads from safetensors already comes back as it is, and so does one
    whose drawn weights are quantised, which are small, or which the GPU draws: they are drawn again.
    """
    in_safetensors = record.weights == "real" and not str(record.location).endswith(".gguf")
    if in_safetensors or record.weights == "random-gpu" or record.stored is not None:
        return record
    model = build(record, dtype=dtype)
    with _without_progress_bars():
        model.save_pretrained(folder)
    return replace(record, source="folder", weights="real", location=str(folder))


KEPT_COPIES = 3
"""Of fetched weights, each for another dtype or release of transformers; older copies go."""


def kept(record: ModelRecord, dtype: str) -> ModelRecord:
    """`stored`, beside the GGUF in the user's cache, for good; any other record comes back as it is.

    A copy is of one release of transformers, which dequantises the weights and names the fields of the config. Raises
    `OSError` where it cannot be written.
    """
    gguf = Path(record.location or "")
    if gguf.suffix != ".gguf" or not gguf.is_relative_to(paths.cache()):
        return record
    kind = f"{gguf.stat().st_mtime_ns:x}-{dtype}-transformers-{metadata.version('transformers')}"
    copy = gguf.with_name(f"{gguf.stem}-{kind}")
    if not copy.is_dir():
        with tempfile.TemporaryDirectory(dir=gguf.parent, prefix="unfinished-") as folder:
            stored(record, dtype, Path(folder) / "copy")
            try:
                (Path(folder) / "copy").rename(copy)
            except OSError:
                if not copy.is_dir():  # or another process was first, with the same bytes
                    raise
        copies = sorted(gguf.parent.glob(f"{gguf.stem}-*-transformers-*"), key=lambda each: each.stat().st_mtime)
        for old in copies[:-KEPT_COPIES]:
            shutil.rmtree(old, ignore_errors=True)
    return replace(record, source="folder", location=str(copy))


def _from_config(
    record: ModelRecord, attn_implementation: str | None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model in ``dtype``, float32 by default."""
    import torch

    config = hf_config(record)
    text, auto = config.get_text_config(), _auto_class(record)
    if model_class(record).config_class is type(text):  # the text model of a multimodal checkpoint, or all of it
        config = text
    try:
        return auto.from_config(config, dtype=dtype or torch.float32, attn_implementation=attn_implementation)
    except Exception as error:  # every architecture refuses in its own way
        raise GaugeError(f"{record.name} cannot be built from its config: {one_line(error, 200)}") from error


def _load(record: ModelRecord, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel:
    assert record.location is not None, "real weights have a location"
    where: dict[str, Any] = {"pretrained_model_name_or_path": record.location, "use_safetensors": True}
    if record.location.endswith(".gguf"):
        path = Path(record.location)
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        # The GGUF reader's own progress bar knows no switch; what is wrong with a file comes as an exception.
        with _without_progress_bars(), contextlib.redirect_stderr(io.StringIO()):
            model, report = _auto_class(record).from_pretrained(
                **where,
                dtype=dtype,
                attn_implementation=attn_implementation,
                local_files_only=record.source != "hub",
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # unreadable, truncated, no safetensors, no network: one line each
        raise GaugeError(f"cannot load the weights of {record.name}: {one_line(error, 200)}") from error
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise GaugeError(
            f"the weights of {record.name} do not fit its config: {len(missing)} missing, first {missing[0]}"
        )
    if record.location.endswith(".gguf"):
        _forget_gguf(model)
    if record.source != "hub":
        # With a name, saving an adapter would look the base up on the hub, and write this machine's path into it.
        model.name_or_path = ""
        forget_origin(model.config)
    return model


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _forget_gguf(model: PreTrainedModel) -> None:
    """Drop the marks of a quantised model: the weights of a GGUF were dequantised on the way in."""
    for mark in ("is_quantized", "quantization_method", "hf_quantizer"):
        model.__dict__.pop(mark, None)
    model.config.__dict__.pop("quantization_config", None)


def _check_memory(record: ModelRecord, dtype: torch.dtype) -> None:
    import psutil

    # Drawn in float32 and then cast: the float32 tensors are all alive at once.
    packed = record.stored is not None and record.weights == "real"
    size = 1 if packed else 4 if record.weights == "random" else dtype.itemsize
    needed_bytes = logical_params(record) * size
    available_bytes = psutil.virtual_memory().available
    if needed_bytes > available_bytes:
        raise GaugeError(
            f"{record.name} needs {needed_bytes / 1e9:.1f} GB of host memory to build and "
            f"{available_bytes / 1e9:.1f} GB are free; take a smaller model, or count it on meta"
        )


@cache
def logical_params(record: ModelRecord) -> int:
    """The number of the base model's parameters, tied ones once (built on ``meta``)."""
    return sum(parameter.numel() for parameter in build(record, device="meta", as_stored=False).parameters())


@cache
def tokenizer(record: ModelRecord) -> PreTrainedTokenizerBase | None:
    """The tokenizer that came with the record's real weights; ``None`` where there is none (random weights).

    The same object for every caller: out of a GGUF file it takes seconds to read.
    """
    from transformers import AutoTokenizer

    if record.weights != "real" or record.location is None:
        return None
    if record.location.endswith(".gguf"):
        path = Path(record.location)
        return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    if record.source == "folder" and not any(Path(record.location).glob("tokenizer*")):
        return None
    return AutoTokenizer.from_pretrained(
        record.location, local_files_only=record.source != "hub", trust_remote_code=False
    )
