"""Private parts of TRL. Nothing is imported before it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

# --- the fused output projection ----------------------------------------------------------------------------


class _Kernel:
    """A Triton kernel, which allocates nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


def has_fused_head() -> bool:
    """Whether the names that `fused_head_on_fakes` replaces exist; a plan warns if they do not."""
    try:
        from trl.kernels import chunked_logprob
        from trl.trainer import utils
    except ImportError:
        return False
    names = ("_use_triton", "_forward_kernel", "_backward_kernel", "_addmm_fp32")
    return hasattr(utils, "_use_triton") and all(hasattr(chunked_logprob, name) for name in names)


def lacks_fused_head() -> bool:
    """Whether this TRL has the fused head, but not the names that `fused_head_on_fakes` replaces."""
    from trl.trainer import utils

    return hasattr(utils, "add_fused_lm_head") and not has_fused_head()


@contextmanager
def fused_head_on_fakes() -> Iterator[None]:
    """While active, `SFTTrainer`'s tiled loss takes CUDA's path: its Triton kernels, without their numbers, and
    products that add to float32 without copies of their factors. Guarded by `has_fused_head`."""
    if not has_fused_head():
        yield
        return
    import torch
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    add = chunked_logprob._addmm_fp32

    def added(acc: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        if a.dtype == torch.float32:
            add(acc, a, b)
        else:  # cuBLAS writes float32 from 16-bit factors; here into the same bytes, since shapes are all that counts
            torch.mm(a, b, out=acc.view(a.dtype)[:, : acc.shape[1]])

    with ExitStack() as stack:
        for module in (chunked_logprob, utils):
            stack.enter_context(patch.object(module, "_use_triton", lambda device: True))
        for name in ("_forward_kernel", "_backward_kernel"):
            stack.enter_context(patch.object(chunked_logprob, name, _Kernel()))
        stack.enter_context(patch.object(chunked_logprob, "_addmm_fp32", added))
        cdiv = SimpleNamespace(cdiv=lambda number, divisor: -(-number // divisor))
        stack.enter_context(patch.object(chunked_logprob, "triton", cdiv, create=True))
        yield
