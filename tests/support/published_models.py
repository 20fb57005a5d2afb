"""Configs of published models (``tests/data/models``), whole and cut down to what a test has time for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft_gauge.training import models
from tests.support.paths import DATA

CONFIGS = DATA / "models"

LAYERS = 2
# What makes a model long or wide; a cut keeps the architecture and everything else.
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "depth")
LISTS_BY_LAYER = ("layer_types", "hybrid_override_pattern")
WIDTHS = {
    "vocab_size": 512,
    "vocab_size_per_layer_input": 512,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "experts_per_token": 2,
    "top_k_experts": 2,
}
# Where the first layers are not of every kind that the model has.
OWN_CUTS: dict[str, dict[str, Any]] = {
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "num_experts": 2},
    "nemotron_h": {"hybrid_override_pattern": "M*E", "num_hidden_layers": 3},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "rwkv": {"vocab_size": 512},
}


def path(name: str) -> Path:
    """The published config called ``name``."""
    return CONFIGS / f"{name}.json"


def names() -> list[str]:
    """All published configs at hand."""
    return sorted(file.stem for file in CONFIGS.glob("*.json"))


def cut(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with two layers, few experts and a small vocabulary; nested configs likewise."""
    small: dict[str, Any] = {}
    for key, value in config.items():
        if key in LAYER_COUNTS:
            small[key] = min(value, LAYERS)
        elif key in LISTS_BY_LAYER:
            small[key] = value[:LAYERS]
        elif key in WIDTHS and isinstance(value, int):
            small[key] = min(value, WIDTHS[key])
        else:
            small[key] = cut(value) if key in ("text_config", "vision_config") else value
    if config.get("pad_token_id") is not None:
        small["pad_token_id"] = 0
    return {**small, **OWN_CUTS.get(str(config.get("model_type")), {})}


def cut_file(name: str, folder: Path, **changes: Any) -> Path:
    """The published config called ``name``, cut and with ``changes``, as a file in ``folder``."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps({**cut(json.loads(path(name).read_text())), **changes}))
    return file


def first_layers(name: str, layers: int, **changes: Any) -> models.ModelRecord:
    """A record of ``fixtures/models`` cut to its first ``layers``: as wide as it is, with its embeddings, its head and
    its vocabulary, except for ``changes`` of the config; random weights."""
    config = {**models.resolve(name).config, "num_hidden_layers": layers, **changes}
    return models.ModelRecord(f"{name}-cut", "folder", json.dumps(config), "random")
