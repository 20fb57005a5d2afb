"""Reading methods from adapter configs of any PEFT type, and checking them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_gauge.errors import GaugeError, one_line, unknown
from peft_gauge.training import bottleneck
from peft_gauge.training.methods.definitions import BOTTLENECK, Method

RENAMED_TYPES = {"BONE": "MISS"}
"""Former names of PEFT types, and their present names."""

TASK = "CAUSAL_LM"

RANKS_OF_MATRICES = frozenset(
    ("LORA", "ADALORA", "LOHA", "HIRA", "DELORA", "GLORA", "GRALORA", "LILY", "PEANUT", "POLY", "SUPERTUNING", "SHADOW")
)
"""The PEFT types whose ``r`` is the rank of a product of two matrices, limited by the size of the weight.

In other types ``r`` is not such a rank, and PEFT checks it: the width of a shared random projection (VeRA, PVeRA,
RandLoRA), a rank above which a full matrix replaces the product (LoKr), a number of blocks (OFT) or of reflections
(HRA), rows or positions (MiSS, SHiRA), a rank that is reduced to the largest possible (AdaMSS, DEFT)."""

_RANKS = ("r", "init_r", "target_r")
_ALPHAS = ("lora_alpha", "alpha")


def from_adapter_config(path: Path) -> Method:
    """The method in the ``adapter_config.json`` at ``path`` (the file or its folder), named after its folder or file.

    It can be of any PEFT type, or bottleneck adapters. Raises `GaugeError` if the file is missing, if it is not an
    adapter config, or if its task is not causal language modeling.
    """
    folder = path.is_dir()
    name = adapter_name(path)
    path = path / "adapter_config.json" if folder else path
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows write a byte order mark
    except FileNotFoundError:
        where = f"no adapter_config.json in {path.parent}" if folder else f"no adapter config at {path}"
        raise GaugeError(where) from None
    except (ValueError, RecursionError, OSError) as error:
        raise GaugeError(f"{path} is not readable JSON: {one_line(error, 120)}") from error
    if isinstance(values, dict) and values.get("adapter_type") == "bottleneck":
        config = bottleneck.read_config(path)
        return replace(BOTTLENECK, name=name, title=f"bottleneck adapters from {path.name}", bottleneck=config)
    if not isinstance(values, dict) or not isinstance(values.get("peft_type"), str):
        raise GaugeError(f"{path} is not an adapter config: it has no peft_type")
    _check_type(values["peft_type"])
    task = values.get("task_type") or TASK
    if task != TASK:
        raise GaugeError(
            f"{path} is an adapter for the task {task}; only causal language modeling (task_type {TASK}) is supported"
        )
    settings = {**values, "inference_mode": False, "task_type": task}
    return Method(name, f"{values['peft_type']} from {path.name}", "peft", peft_config=settings, starts_as_base=False)


def adapter_name(path: Path) -> str:
    """The name of the method from the adapter config at ``path``, even if the config cannot be read."""
    if path.name == "adapter_config.json":
        return path.resolve().parent.name
    return path.resolve().name if path.is_dir() else path.stem


def _check_type(peft_type: str) -> None:
    from peft_gauge.training.quantization import import_peft

    known = [kind.value for kind in import_peft().PeftType]
    if peft_type in known:
        return
    renamed = RENAMED_TYPES.get(peft_type.upper())
    if renamed in known:
        raise GaugeError(f"unknown PEFT type {peft_type!r}: it is now called {renamed}; change peft_type to {renamed}")
    raise unknown("PEFT type", peft_type, known)


def check_ranks(settings: Mapping[str, Any], largest: int, name: str) -> None:
    """Raise `GaugeError` for an invalid rank or alpha, of the whole adapter or in a pattern.

    A rank is a whole number of at least 1. OFT's may be 0: ``oft_block_size`` then gives the number of blocks.

    Args:
        settings: as in an ``adapter_config.json``.
        largest: the highest rank of any weight matrix in the model.
    """
    kind = str(settings.get("peft_type"))
    patterns = [(key, settings.get(key)) for key in ("rank_pattern", "alpha_pattern")]
    for key, pattern in patterns:
        if pattern is not None and not isinstance(pattern, Mapping):
            raise GaugeError(f"{name}: {key} must map module names to numbers, got {one_line(pattern, 40)}")
    # AdaLoRA's rank pattern holds masks of the singular values that it kept, not ranks.
    by_module = {} if kind == "ADALORA" else dict(settings.get("rank_pattern") or {})
    ranks = {key: settings[key] for key in _RANKS if settings.get(key) is not None}
    if kind == "OFT" and ranks.get("r") == 0 and not isinstance(ranks["r"], bool):
        del ranks["r"]
    for where, rank in [*((f"{key}", value) for key, value in ranks.items()), *by_module.items()]:
        at = f" for {where}" if where in by_module else ""
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise GaugeError(f"{name}: rank {rank!r}{at} is not a whole number of at least 1")
        if kind in RANKS_OF_MATRICES and largest and rank > largest:
            raise GaugeError(
                f"{name}: rank {rank}{at} is above the largest matrix rank in this model; use {largest} or less"
            )
    alphas = {key: settings[key] for key in _ALPHAS if settings.get(key) is not None}
    for where, alpha in {**alphas, **dict(settings.get("alpha_pattern") or {})}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise GaugeError(f"{name}: alpha {alpha!r} for {where} is not a finite number")
