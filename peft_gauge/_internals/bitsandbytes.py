"""What is private in bitsandbytes, and used. Import it where bitsandbytes may be loaded (`quantization`)."""

from __future__ import annotations

from typing import Any

import torch

PRODUCT_4BIT_SINCE = "0.50.0"
"""The release whose 4-bit layers multiply by an operator of their own, which hides the weight's dequantised copy."""


NOTICES = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    "bitsandbytes.cextension": "bitsandbytes library load error",
}
"""Logger -> how a message begins that is left out: advice on an optional CPU kernel, and the traceback of a CUDA
library that did not load. Unguarded: where the words change, they are printed."""


def native_library() -> Any:
    """The loaded library of kernels; its ``compiled_with_cuda`` says which. Unguarded."""
    from bitsandbytes.cextension import lib

    return lib


def has_product_4bit() -> bool:
    """Whether that operator, `bitsandbytes::gemm_4bit`, is there (once bitsandbytes is imported)."""
    return hasattr(torch.ops.bitsandbytes, "gemm_4bit")


def code_books() -> dict[str, Any]:
    """The library's cache of 8-bit code books by name: one is lent for a fake pack, which cannot compute it."""
    from bitsandbytes import functional

    return functional.name2qmap


def product_int8(A: Any, B: Any, out: Any, bias: Any, state: Any) -> Any:
    """The autograd function of LLM.int8() as CUDA runs it, whatever the tensors' device. Unguarded."""
    from bitsandbytes.autograd._functions import MatMul8bitLt

    return MatMul8bitLt.apply(A, B, out, bias, state)
