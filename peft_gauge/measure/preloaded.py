"""Imports of measured cases and their plans, for a fork server to load once (`peft_gauge.isolation.fork_server`).

Imports only: an operator could start threads, which a fork does not survive. Querying the GPU would break CUDA in every
forked process; bitsandbytes does so when it is imported, and PEFT imports bitsandbytes. Where there may be a GPU, both
are left to each process.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from peft_gauge import machine
from peft_gauge.errors import GaugeError
from peft_gauge.measure import passes as passes

# Imports of a build, a step and its fingerprint; other architectures import more.
ON_THE_WAY = (
    "psutil",
    "torch._dynamo",
    "torch._inductor.compile_fx",  # most of the time to import bitsandbytes
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
)


ASK_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"


def import_ahead() -> None:
    """Import everything that a fork server may import on this machine."""
    with _asking_nvml():
        for name in ON_THE_WAY:
            importlib.import_module(name)
    if torch.backends.cuda.is_built() and not machine.nvidia_driver().absent:
        return
    with suppress(GaugeError):  # bitsandbytes is missing: cases that need it report that themselves
        from peft_gauge.training.quantization import load_bitsandbytes

        load_bitsandbytes()
    importlib.import_module("peft")


@contextmanager
def _asking_nvml() -> Iterator[None]:
    """Make torch check for a GPU through NVML: CUDA's own check would break CUDA in every forked process (see torch's
    documentation of ``PYTORCH_NVML_BASED_CUDA_CHECK``)."""
    before = os.environ.get(ASK_NVML)
    os.environ[ASK_NVML] = "1"
    try:
        yield
    finally:
        del os.environ[ASK_NVML]
        if before is not None:
            os.environ[ASK_NVML] = before


import_ahead()
