"""The dtypes that a model can be trained in, and the default model and dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_gauge.errors import unknown
from peft_gauge.machine import accelerators

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")


_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16"}


def dtype_named(name: str) -> str:
    """The dtype in `DTYPES` that ``name`` stands for: itself, or a short form such as ``bf16``.

    Raises `GaugeError` for any other.
    """
    found = _SHORT.get(name, name.removeprefix("torch."))
    check_dtype(found)
    return found


def check_dtype(name: str) -> None:
    """Raise `GaugeError` for a dtype that is not in `DTYPES`."""
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called ``name``. Raises `GaugeError` for a dtype that is not in `DTYPES`."""
    check_dtype(name)
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def default_dtype(device: str) -> str:
    """float32 on CPU, 16 bit on CUDA (bfloat16 from compute capability 8.0 on, otherwise float16).

    Few CPUs multiply bfloat16 natively; others take about ten times as long as in float32. The default is therefore
    float32, so that CPU metrics are comparable across machines; ``--dtype`` changes it.
    """
    if device != "cuda":
        return "float32"
    cards = accelerators()
    return "float16" if cards and cards[0].compute_capability < (8, 0) else "bfloat16"


def default_model(device: str) -> str:
    """SmolLM2-135M on CPU, TinyLlama-1.1B on a GPU."""
    return "tinyllama" if device == "cuda" else "smollm2-135m"
