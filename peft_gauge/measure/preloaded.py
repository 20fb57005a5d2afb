"""What measured cases and their plans import, for a fork server to import once (`peft_gauge.isolation.fork_server`).

Nothing but imports: an operator could start threads, which a fork does not survive. A look at the card would spoil CUDA
for every forked process; bitsandbytes takes one when it is imported, and PEFT imports bitsandbytes. Where there may be
a card, both are left to each process.
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

# What a build, a step and its fingerprint import on their way; a case of another architecture imports its own besides.
ON_THE_WAY = (
    "psutil",
    "torch._dynamo",
    "torch._inductor.compile_fx",  # nearly all that importing bitsandbytes takes
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
)


ASK_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"


def import_ahead() -> None:
    """Import all that a fork server may import on this machine."""
    with _asking_nvml():
        for name in ON_THE_WAY:
            importlib.import_module(name)
    if torch.backends.cuda.is_built() and not machine.nvidia_driver().absent:
        return
    with suppress(GaugeError):  # without bitsandbytes, which only those need who say so
        from peft_gauge.training.quantization import load_bitsandbytes

        load_bitsandbytes()
    importlib.import_module("peft")


@contextmanager
def _asking_nvml() -> Iterator[None]:
    """Should something ask whether there is a card, let torch ask NVML: CUDA's own answer would spoil CUDA for every
    forked process (torch's documentation of ``PYTORCH_NVML_BASED_CUDA_CHECK``)."""
    before = os.environ.get(ASK_NVML)
    os.environ[ASK_NVML] = "1"
    try:
        yield
    finally:
        del os.environ[ASK_NVML]
        if before is not None:
            os.environ[ASK_NVML] = before


import_ahead()
