"""Base models as frozen records: the source of the architecture and the source of the weights."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from peft_gauge import paths
from peft_gauge.errors import GaugeError, one_line, unknown
from peft_gauge.training.models import hub
from peft_gauge.training.models.config import (
    SIZE_LIMITS,
    built_config,
    check_config,
    read_config,
    read_json_object,
    size_of,
    text_part,
)
from peft_gauge.training.models.defaults import DTYPES
from peft_gauge.training.stored_formats import StoredFormat, stored_format

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Source = Literal["record", "folder", "gguf", "hub"]
Weights = Literal["real", "random", "random-gpu"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)

# The real weights that `peft-gauge fetch` can download, by record: the file's name in the cache.
FETCHED_WEIGHTS = {"smollm2-135m": "SmolLM2-135M-Instruct.Q4_1.gguf"}

POSITION_LIMITS = (
    "max_position_embeddings",
    "n_positions",  # GPT-2, GPT-J
    "n_ctx",
    "seq_length",  # BLOOM
    "max_seq_len",  # MPT
    "context_length",  # RWKV
)


@dataclass(frozen=True)
class ModelRecord:
    """A base model that can be built.

    Attributes:
        name: as tables show it.
        source: where the architecture comes from.
        config_json: the Hugging Face config as JSON text, so that a record can be hashed and sent to another process.
        weights: ``"real"`` (read from ``location``), ``"random"`` (drawn on the CPU: the same bytes everywhere) or
            ``"random-gpu"`` (drawn on the GPU: a 7B takes seconds, but the bytes differ between GPU models).
        location: of real weights: a folder, a GGUF file or a hub id.
        seed: for random weights.
    """

    name: str
    source: Source
    config_json: str
    weights: Weights
    location: str | None = None
    seed: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """The Hugging Face config as a new dictionary."""
        return dict(json.loads(self.config_json))

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the model supports, in tokens, from the text model's config or its class's default;
        ``None`` if it has no such limit (a state-space model)."""
        config = self.config
        for part in (text_part(config), config):
            for key in POSITION_LIMITS:
                if _is_limit(part.get(key)):
                    return int(part[key])
        default = _text_config(self).get("max_position_embeddings")
        return default if _is_limit(default) else None

    @property
    def vocab_size(self) -> int:
        """The rows of the text model's embedding, from its config or its class's default."""
        return int(_text_config(self)["vocab_size"])

    @property
    def stored(self) -> StoredFormat | None:
        """The storage format of the checkpoint's weights, from its config; ``None`` for 16 or 32 bit."""
        return None if self.source == "gguf" else stored_format(self.config, self.name)

    def check_sequence(self, seq: int, option: str = "--seq") -> None:
        """Raise `GaugeError` if ``seq`` tokens, given by ``option``, are more than `max_positions`."""
        limit = self.max_positions
        if limit is not None and seq > limit:
            raise GaugeError(
                f"a sequence of {seq} tokens exceeds the limit of {self.name}; use {option} {limit} or less"
            )


def _is_limit(value: object) -> bool:
    """Whether ``value`` is a number of positions; XLNet has -1 for "no limit"."""
    return isinstance(value, int) and value > 0


def record_names() -> list[str]:
    """The names of the records under ``fixtures/models/``."""
    return sorted(folder.name for folder in paths.fixture("models").iterdir() if (folder / "config.json").is_file())


def resolve(spec: str, *, weights: str | None = None, seed: int = 0) -> ModelRecord:
    """The record for ``spec``: a record's name, a folder, a .json or .gguf file, or a hub id ``owner/name``.

    ``weights`` is one of `WEIGHTS`, or ``None`` for real weights if available, otherwise random ones. Raises
    `GaugeError` for an unknown name, an invalid config, or real weights that are missing.
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
        raise GaugeError(f"{spec} is not a model; name a folder, a config (.json) or a .gguf file")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", spec):
        return _from_hub(spec, weights, seed)
    if "/" in spec or spec.startswith((".", "~")):
        raise GaugeError(f"no such model folder or file: {spec}")
    raise unknown("model", spec, record_names())


def _from_record(name: str, weights: str | None, seed: int) -> ModelRecord:
    config = read_json_object(paths.fixture("models") / name / "config.json")  # the project's own: a test checks them
    fetched = paths.cache() / name / FETCHED_WEIGHTS[name] if name in FETCHED_WEIGHTS else None
    if weights == "real" and (fetched is None or not fetched.is_file()):
        how = "run: peft-gauge fetch smollm2" if fetched else "name a folder, a GGUF file or a hub id that has them"
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
    except Exception as error:  # the reader raises many kinds of errors for damaged files
        raise GaugeError(
            f"{path.name} is not a GGUF file that transformers can read as a causal LM: {one_line(error, 160)}"
        ) from error
    check_config(config.to_dict(), path.name)
    kind: Literal["random", "real"] = "random" if weights == "random" else "real"
    return ModelRecord(path.stem, "gguf", config.to_json_string(use_diff=False), kind, str(path), seed)


def _from_hub(spec: str, weights: str | None, seed: int) -> ModelRecord:
    try:
        config = read_config(hub.config_file(spec))
    except GaugeError:
        raise
    except Exception as error:  # no network, no such repository, gated: the classes depend on the library's version
        raise GaugeError(
            f"cannot reach {spec} on the hub ({hub.described(error)}); "
            f"check the name and the network, or use one of: {', '.join(record_names())}"
        ) from error
    kind: Literal["random", "real"] = "random" if weights == "random" else "real"
    return ModelRecord(spec, "hub", json.dumps(config), kind, spec, seed)


def stored_dtype(record: ModelRecord) -> str:
    """The data type in which transformers loads the record's weights if it may choose (``dtype="auto"``): that which
    the config names, or else bfloat16, as of most published weights."""
    config = record.config
    for part in (config, text_part(config)):
        named = str(part.get("dtype") or part.get("torch_dtype") or "").removeprefix("torch.")
        if named in DTYPES:
            return named
    return "bfloat16"


def hf_config(record: ModelRecord) -> PretrainedConfig:
    """The record's architecture as a transformers config object."""
    return built_config(record.config, record.name)


@cache
def _text_config(record: ModelRecord) -> dict[str, Any]:
    """The text model's sizes by common name, with defaults and aliases resolved."""
    text = hf_config(record).get_text_config()
    return {name: size_of(text, name) for name in SIZE_LIMITS}
