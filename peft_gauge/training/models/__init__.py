"""Base models as frozen records, and their construction: on ``meta`` for counting, on CPU or CUDA for running.

A record holds the source of the architecture (a named record of ``fixtures/models/``, a local folder in Hugging Face
layout, a GGUF file, or a hub id) and of the weights (drawn from a seed, or real). The network is used only for hub ids,
and ``trust_remote_code`` is always off.
"""

from __future__ import annotations

from peft_gauge.training.models.architecture import (
    ATTENTIONS,
    attention,
    check_attention,
    is_recurrent,
    remarks,
)
from peft_gauge.training.models.construction import build, check_measurable, kept, logical_params, stored, tokenizer
from peft_gauge.training.models.defaults import (
    DTYPES,
    check_dtype,
    default_dtype,
    default_model,
    dtype_named,
    torch_dtype,
)
from peft_gauge.training.models.records import ModelRecord, hf_config, record_names, resolve, stored_dtype

__all__ = [
    "ATTENTIONS",
    "DTYPES",
    "ModelRecord",
    "attention",
    "build",
    "check_attention",
    "check_dtype",
    "check_measurable",
    "default_dtype",
    "default_model",
    "dtype_named",
    "hf_config",
    "is_recurrent",
    "kept",
    "logical_params",
    "record_names",
    "remarks",
    "resolve",
    "stored",
    "stored_dtype",
    "tokenizer",
    "torch_dtype",
]
