"""Private parts of bitsandbytes. Import this module only where bitsandbytes may be loaded (`quantization`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

PRODUCT_4BIT_SINCE = "0.50.0"
"""The first release whose 4-bit layers multiply by their own operator, which hides the dequantized weight."""


NOTICES = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    "bitsandbytes.cextension": "bitsandbytes library load error",
}
"""Logger -> beginning of a message to suppress: advice on an optional CPU kernel, and the traceback of a CUDA library
that did not load. Unguarded: if the wording changes, they are printed."""


def native_library() -> Any:
    """The loaded native library; its ``compiled_with_cuda`` is True for a CUDA build. Unguarded."""
    from bitsandbytes.cextension import lib

    return lib


def has_product_4bit() -> bool:
    """Whether the operator `bitsandbytes::gemm_4bit` exists (after bitsandbytes was imported)."""
    return hasattr(torch.ops.bitsandbytes, "gemm_4bit")


def code_books() -> dict[str, Any]:
    """The library's cache of 8-bit code books by name; a fake pack, which cannot compute one, uses it."""
    from bitsandbytes import functional

    return functional.name2qmap


@contextmanager
def quant_states_of_modules() -> Iterator[None]:
    """While active, a 4-bit layer whose weight has lost its state to FSDP takes that of the module without making its
    weight a subclass, which a fake cannot become. The function's name is guarded by a contract test."""
    from bitsandbytes.nn import modules

    def restore(module: Any) -> None:
        if getattr(module.weight, "quant_state", None) is None:
            module.weight.quant_state = module.quant_state

    with patch.object(modules, "fix_4bit_weight_quant_state_from_module", restore):
        yield


def product_int8(A: Any, B: Any, out: Any, bias: Any, state: Any) -> Any:
    """The autograd function of LLM.int8() as run on CUDA, whatever the tensors' device. Unguarded."""
    from bitsandbytes.autograd._functions import MatMul8bitLt

    return MatMul8bitLt.apply(A, B, out, bias, state)
