"""Fine-tuning methods as data: how each changes a base model, and which parameters it trains.

A variant is defined by its differences from a parent method. The measured training step is the same for all methods
(`peft_gauge.training.step`).
"""

from __future__ import annotations

from peft_gauge.training.methods.adapter_config import adapter_name, check_ranks, from_adapter_config
from peft_gauge.training.methods.adapter_files import load, save
from peft_gauge.training.methods.attachment import attach, check_checkpointing, effective_settings, prepare_base
from peft_gauge.training.methods.definitions import (
    ALL_LINEAR,
    ATTENTION,
    ATTENTION_QV,
    BOTTLENECK,
    DEFAULT_METHODS,
    FULL,
    IA3,
    LINEAR_LAYERS,
    LORA,
    METHODS,
    PREFIX,
    PROMPT,
    QLORA,
    RANKS,
    Blocks,
    Cast,
    Method,
    Quantization,
    get,
)

__all__ = [
    "ALL_LINEAR",
    "ATTENTION",
    "ATTENTION_QV",
    "BOTTLENECK",
    "DEFAULT_METHODS",
    "FULL",
    "IA3",
    "LINEAR_LAYERS",
    "LORA",
    "METHODS",
    "PREFIX",
    "PROMPT",
    "QLORA",
    "RANKS",
    "Blocks",
    "Cast",
    "Method",
    "Quantization",
    "adapter_name",
    "attach",
    "check_checkpointing",
    "check_ranks",
    "effective_settings",
    "from_adapter_config",
    "get",
    "load",
    "prepare_base",
    "save",
]
