"""Private parts of bitsandbytes. Import this module only where bitsandbytes may be loaded (`quantization`)."""

from __future__ import annotations

from typing import Any

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


def product_int8(A: Any, B: Any, out: Any, bias: Any, state: Any) -> Any:
    """The autograd function of LLM.int8() as run on CUDA, whatever the tensors' device. Unguarded."""
    from bitsandbytes.autograd._functions import MatMul8bitLt

    return MatMul8bitLt.apply(A, B, out, bias, state)
