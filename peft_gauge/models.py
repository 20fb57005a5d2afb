"""Base models as frozen records, built only when asked: on ``meta`` for counting, on CPU or CUDA for running.

A record says where the architecture comes from (a named record of ``fixtures/models/``, a local folder in Hugging
Face layout, a GGUF file, or a hub id) and where the weights come from (drawn from a seed, or real). Nothing touches
the network unless the user names a hub id, and ``trust_remote_code`` is never on.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft_gauge import paths
from peft_gauge.errors import GaugeError, one_line, unknown
from peft_gauge.machine import accelerators

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Source = Literal["record", "folder", "gguf", "hub"]

DTYPES = ("float32", "float16", "bfloat16")

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
REQUIRED_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
CONFIG_FILE_LIMIT_BYTES = 4_000_000


@dataclass(frozen=True)
class ModelRecord:
    """A base model that can be built.

    Fields: ``name`` as shown in tables; ``source`` of the architecture; ``config_json``, the Hugging Face config as
    JSON text (text, so that a record can be hashed and sent to another process); ``weights``, ``"random"`` (drawn
    from ``seed``) or ``"real"`` (read from ``location``: a folder, a GGUF file or a hub id).
    """

    name: str
    source: Source
    config_json: str
    weights: Literal["random", "real"]
    location: str | None = None
    seed: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """The Hugging Face config as a dictionary (a fresh copy)."""
        return json.loads(self.config_json)

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the model was made for, in tokens; ``None`` where the config does not say."""
        config = self.config
        for key in ("max_position_embeddings", "n_positions", "n_ctx", "seq_length"):
            if isinstance(config.get(key), int):
                return int(config[key])
        return None

    def check_sequence(self, seq: int) -> None:
        """Raise `GaugeError` where ``seq`` tokens are more than the model has positions for."""
        limit = self.max_positions
        if limit is not None and seq > limit:
            raise GaugeError(
                f"a sequence of {seq} tokens is beyond {self.name}'s limit of {limit}; use --seq {limit} or less"
            )


def record_names() -> list[str]:
    """The names of the records under ``fixtures/models/``."""
    return sorted(folder.name for folder in paths.fixture("models").iterdir() if (folder / "config.json").is_file())


def resolve(spec: str, *, weights: str | None = None, seed: int = 0) -> ModelRecord:
    """The record that ``spec`` names: a record's name, a folder, a config or GGUF file, or a hub id ``owner/name``.

    ``weights``: ``"real"``, ``"random"``, or ``None`` for real ones where they are at hand. Raises `GaugeError` for an
    unknown name, an unusable config, or real weights that are not there.
    """
    if weights not in (None, "real", "random"):
        raise unknown("kind of weights", weights, ("real", "random"))
    if spec.lower() in record_names():
        return _from_record(spec.lower(), weights, seed)
    path = Path(spec).expanduser()
    if path.is_dir() or path.name == "config.json":
        return _from_folder(path if path.is_dir() else path.parent, weights, seed)
    if path.suffix == ".gguf":
        return _from_gguf(path, weights, seed)
    if path.exists():
        raise GaugeError(f"{spec} is neither a folder, a config.json nor a .gguf file")
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

    The sizes are checked before anything is built: a missing size would silently become the class's default (a
    Llama without ``hidden_size`` is a 7B), and a huge one would take the machine's memory.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    causal = {config_class.model_type: config_class for config_class in MODEL_FOR_CAUSAL_LM_MAPPING}
    model_type = config.get("model_type")
    if model_type not in causal:
        if config.get("auto_map"):
            raise GaugeError(f"{origin}: this model needs custom code (auto_map), which peft-gauge does not run")
        raise GaugeError(f"{origin}: model_type {model_type!r} is no causal LM that this transformers knows")
    if config.get("is_encoder_decoder"):
        raise GaugeError(f"{origin}: encoder-decoder models are not supported; use a decoder-only causal LM")
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    _check_sizes(inner or config, getattr(causal[model_type], "attribute_map", {}), origin)


def _check_sizes(config: dict[str, Any], aliases: dict[str, str], origin: str) -> None:
    found: dict[str, int] = {}
    for size, limit in SIZE_LIMITS.items():
        value = config.get(size, config.get(aliases.get(size, size)))
        if value is None:
            if size in REQUIRED_SIZES:
                raise GaugeError(f"{origin}: {size} is missing; the architecture cannot be built without it")
            continue
        if isinstance(value, list) and size in ("intermediate_size", "num_key_value_heads"):
            continue  # a few architectures give one value a layer
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise GaugeError(f"{origin}: {size} = {value!r} is not a whole number from 1 to {limit:,}")
        found[size] = value
    heads = found["num_attention_heads"]
    if "head_dim" not in found and found["hidden_size"] % heads:
        raise GaugeError(f"{origin}: hidden_size {found['hidden_size']} is no multiple of {heads} attention heads")
    if heads % found.get("num_key_value_heads", heads):
        raise GaugeError(
            f"{origin}: {heads} attention heads are no multiple of {found['num_key_value_heads']} key-value heads"
        )


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
    from transformers import AutoConfig

    values = record.config
    # Weights read from a GGUF are dequantised on the way in; what is built is an ordinary model.
    values.pop("quantization_config", None)
    try:
        return AutoConfig.for_model(**values)
    except Exception as error:  # config classes validate in their own ways
        raise GaugeError(f"the config of {record.name} is not usable: {one_line(error, 200)}") from error


def build(
    record: ModelRecord, *, device: str = "cpu", dtype: str = "float32", attn_implementation: str = "sdpa"
) -> PreTrainedModel:
    """The model of ``record`` on ``device``, with weights in ``dtype``.

    On ``"meta"`` nothing is allocated (70B takes about a second). Random weights are drawn in float32 on the CPU from
    ``record.seed`` by the architecture's own initialisation and then rounded to ``dtype``, so the same seed gives
    the same bytes on every device. Raises `GaugeError` where the machine has not enough memory or the weights do
    not match the architecture.
    """
    import torch

    wanted = torch_dtype(dtype)
    if device == "meta":
        with torch.device("meta"):
            return _from_config(record, attn_implementation).to(wanted)
    _check_memory(record, wanted)
    if record.weights == "real":
        return _load(record, wanted, attn_implementation).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(record.seed)
        return _from_config(record, attn_implementation).to(wanted).to(device)


def stored(record: ModelRecord, dtype: str, folder: Path) -> ModelRecord:
    """``record`` with its very weights as safetensors in ``dtype`` in ``folder``, from which they load in a moment.

    For whoever builds the same base many times, in processes of their own: drawing weights and dequantising a GGUF
    take longer than reading them. A record that loads from safetensors already comes back as it is.
    """
    if record.weights == "real" and not str(record.location).endswith(".gguf"):
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


def _from_config(record: ModelRecord, attn_implementation: str) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    config = hf_config(record)
    try:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attn_implementation)
    except Exception as error:  # every architecture refuses in its own way
        raise GaugeError(f"{record.name} cannot be built from its config: {one_line(error, 200)}") from error


def _load(record: ModelRecord, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    assert record.location is not None, "real weights have a location"
    where: dict[str, Any] = {"pretrained_model_name_or_path": record.location, "use_safetensors": True}
    if record.location.endswith(".gguf"):
        path = Path(record.location)
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        # The GGUF reader's own progress bar knows no switch; what is wrong with a file comes as an exception.
        with _without_progress_bars(), contextlib.redirect_stderr(io.StringIO()):
            model, report = AutoModelForCausalLM.from_pretrained(
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
        model.name_or_path = model.config._name_or_path = ""
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
    needed_bytes = logical_params(record) * (4 if record.weights == "random" else dtype.itemsize)
    available_bytes = psutil.virtual_memory().available
    if needed_bytes > available_bytes:
        raise GaugeError(
            f"{record.name} needs {needed_bytes / 1e9:.1f} GB of host memory to build and "
            f"{available_bytes / 1e9:.1f} GB are free; take a smaller model, or count it on meta"
        )


@cache
def logical_params(record: ModelRecord) -> int:
    """The number of the base model's parameters, tied ones once (built on ``meta``)."""
    return sum(parameter.numel() for parameter in build(record, device="meta").parameters())


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
