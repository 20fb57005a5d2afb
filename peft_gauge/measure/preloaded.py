"""Imports of measured cases and their plans, for a fork server to load once (`peft_gauge.isolation.fork_server`).

Imports only: an operator could start threads, which a fork does not survive. Querying the GPU would break CUDA in every
forked process; bitsandbytes does so when it is imported, and PEFT imports bitsandbytes. Where there may be a GPU, both
are left to each process.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import torch

from peft_gauge import machine
from peft_gauge.errors import GaugeError
from peft_gauge.measure import passes as passes

# Imports of a build, a step and its fingerprint; other architectures import more.
ON_THE_WAY = (
    "psutil",
    "torch._dynamo",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
)


ASK_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"
WHILE_IMPORTING = {
    # Check for a GPU through NVML: CUDA's own check would break CUDA in every forked process (see torch's documentation
    # of this variable).
    ASK_NVML: "1",
    # Up to torch 2.8, inductor starts a thread and compile workers as it is imported, and threads forbid a fork.
    "TORCH_WARM_POOL": "0",
    # pyarrow's allocator starts threads of its own as it is loaded. transformers imports it by way of scikit-learn and
    # pandas, where these are installed.
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


def import_ahead() -> None:
    """Import everything that a fork server may import on this machine."""
    with _environment(WHILE_IMPORTING):
        for name in ON_THE_WAY:
            importlib.import_module(name)
    if torch.backends.cuda.is_built() and not machine.nvidia_driver().absent:
        return
    from peft_gauge.training.quantization import import_peft, load_bitsandbytes

    with suppress(GaugeError):  # bitsandbytes is missing: cases that need it report that themselves
        load_bitsandbytes()
    import_peft()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


import_ahead()
