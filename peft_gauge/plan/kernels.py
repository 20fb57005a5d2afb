"""The tensors that CUDA's kernels save and their scratch memory, for fake tensors on device `cpu` (`fakes`)."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from peft_gauge._internals import bitsandbytes as bnb_internals
from peft_gauge._internals import moved, released
from peft_gauge._internals.torch import (
    FakeTensor,
    below_autograd,
    composite,
    efficient_attention,
    end_library,
    flash_attention,
    flash_broadcasts_one_head,
    safe_softmax,
)
from peft_gauge._internals.transformers import PACKING, has_packing, without_packing, without_padding
from peft_gauge.plan.fakes import is_quant_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

FLASH_ROW_MULTIPLE = 128  # flash attention's backward pads the sequence of its FP32 buffers to this
FLASH_WIDTH_MULTIPLE = 32  # and the head dimension to this
FLASH_WIDEST = 256  # the widest head that flash attention has a kernel for
FUSED_4BIT_ROWS = 4  # bitsandbytes multiplies up to this many rows without a dequantized copy on every GPU


@contextmanager
def cuda_kernels(*, fused_4bit_rows: int = FUSED_4BIT_ROWS) -> Iterator[None]:
    """While active, fake tensors take CUDA's operators; real CPU tensors take the CPU's.

    - attention: flash or memory-efficient attention as CUDA chooses between them (no quadratic matrix), with the mask
      converted and padded as on CUDA; the math path where CUDA would take it;
    - dropout: one byte per element for the mask;
    - 4-bit products: a dequantized copy of the weight inside the operator, for more than `fused_4bit_rows` rows.
      Between 4 and 1536 rows the choice of bitsandbytes depends on GPU and shape, so this is an upper bound there.
    """
    routes: dict[str, dict[str, Callable[..., Any]]] = {
        "aten": {"scaled_dot_product_attention": _attention, "dropout": _dropout}
    }
    if bnb_internals.has_product_4bit():
        routes["bitsandbytes"] = {"gemm_4bit": _product_4bit(fused_4bit_rows)}
    libraries = []
    try:
        for namespace, kernels in routes.items():
            library = torch.library.Library(namespace, "IMPL")
            libraries.append(library)
            for name, kernel in kernels.items():
                library.impl(name, kernel, "AutogradCPU")
        yield
    finally:
        for library in libraries:
            end_library(library)


def unrouted(model: nn.Module) -> Iterator[str]:
    """A note on each route of `cuda_kernels` and `unpacked_sequences` that ``model`` would take and that is missing
    from a release of a library that should have it.

    bitsandbytes before 0.50 needs no route for its 4-bit products: its own autograd function calls `dequantize_4bit`
    and an ordinary product, on any device.
    """
    in_4bit = any(is_quant_state(getattr(parameter, "quant_state", None)) for parameter in model.parameters())
    if in_4bit and not bnb_internals.has_product_4bit() and released("bitsandbytes", bnb_internals.PRODUCT_4BIT_SINCE):
        yield moved("bitsandbytes", "operator gemm_4bit")
    if not has_packing():
        yield moved("transformers", f"masking_utils.{PACKING}")


@contextmanager
def unpacked_sequences() -> Iterator[None]:
    """While active, transformers never treats a row of a batch as several packed sequences.

    It decides by the values of `position_ids`, which fakes lack. Without this it would build the mask of a packed
    batch, and attention would take the memory-efficient kernel with one mask per layer instead of flash.
    """
    with without_packing():
        yield


def as_packed(packed: bool) -> AbstractContextManager[None]:
    """`unpacked_sequences`, unless the rows are ``packed``: fakes then get the mask of several sequences."""
    return nullcontext() if packed else unpacked_sequences()


@contextmanager
def unpadded_sequences() -> Iterator[None]:
    """While active, the attention mask of a trainer's batch is one of ones: every row is as long as the others.

    transformers drops such a mask by its values, and sdpa then takes its own causal one.
    """
    with without_padding():
        yield


@contextmanager
def cuda_int8_products() -> Iterator[None]:
    """While active, bitsandbytes' 8-bit layers multiply as on CUDA (otherwise, from the tensors' device, as on a CPU).

    LLM.int8()'s outlier columns are left out, since they depend on values.
    """
    import bitsandbytes

    def matmul(A: Any, B: Any, out: Any = None, state: Any = None, threshold: float = 0.0, bias: Any = None) -> Any:
        state.threshold = 0.0
        return bnb_internals.product_int8(A, B, out, bias, state)

    original = bitsandbytes.matmul
    bitsandbytes.matmul = matmul
    try:
        yield
    finally:
        bitsandbytes.matmul = original


def _dropout(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    if isinstance(input, FakeTensor) and train and 0 < p < 1 and input.numel():
        return torch.native_dropout(input, p, train)[0]
    dropped: torch.Tensor = composite(torch.ops.aten.dropout.default, input, p, train)
    return dropped


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """CUDA's choice (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp): flash, else efficient, else math."""
    if not isinstance(query, FakeTensor):
        attended: torch.Tensor = composite(
            torch.ops.aten.scaled_dot_product_attention.default,
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip
        return attended
    if _flash_fits(query, key, value, attn_mask, is_causal=is_causal, grouped=enable_gqa):
        width = query.shape[-1]
        scale = width**-0.5 if scale is None else scale
        padded = [_pad_last(t, 8) for t in (query, key, value)]
        out: torch.Tensor = flash_attention(*padded, dropout_p, is_causal, scale=scale)[0]
        return out[..., :width] if out.shape[-1] != width else out
    if _efficient_fits(query, key, value, attn_mask):
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        mask = None if attn_mask is None else _additive_mask(attn_mask, query, key)
        efficient: torch.Tensor = efficient_attention(query, key, value, mask, keep, dropout_p, is_causal, scale=scale)[
            0
        ]
        return efficient
    return _math_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _math_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """`_scaled_dot_product_attention_math` (aten/src/ATen/native/transformers/attention.cpp) as it runs on CUDA.

    The operator itself cannot be used: for tensor subclasses, such as fakes, it adds the mask out of place.
    """
    dtype = query.dtype
    if dtype in (torch.float16, torch.bfloat16) and not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed():
        query, key, value = query.float(), key.float(), value.float()
    root = (query.shape[-1] ** -0.5 if scale is None else abs(scale)) ** 0.5
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype is torch.bool:
        mask = _float_mask(mask, query.dtype)
    query = query * (-root if scale is not None and scale < 0 else root)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    weights = query @ (key.transpose(-2, -1) * root)
    if mask is not None:
        weights.add_(mask)
    weights = safe_softmax(weights, -1)  # same name, so that the tensor before is released here
    if dropout_p > 0:
        weights = torch.dropout(weights, dropout_p, True)
    product: torch.Tensor = (weights @ value).to(dtype)
    return product


# The filters of `can_use_flash_attention` and `can_use_mem_efficient_attention` that depend on the tensors alone, as of
# torch 2.13. Left out are filters by GPU (a head dimension above 192 on compute capability 8.6, 8.9 or 12) and cuDNN's
# kernel, which recent releases prefer on compute capability 9 and 10.


def _flash_fits(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    is_causal: bool,
    grouped: bool,
) -> bool:
    if mask is not None or query.dtype not in (torch.float16, torch.bfloat16) or not _is_dense(query, key, value):
        return False
    widths = {query.shape[-1], key.shape[-1], value.shape[-1]}
    if len(widths) != 1 or max(widths) > FLASH_WIDEST:
        return False
    if is_causal and query.shape[-2] != key.shape[-2]:
        return False  # flash aligns a causal mask to the lower right
    return _heads_fit(query, key, value, grouped)


def _efficient_fits(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> bool:
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32) or not _is_dense(query, key, value):
        return False
    if mask is not None and mask.stride(-1) != 1:
        return False
    multiple = 4 if query.dtype is torch.float32 else 8
    if query.shape[-1] != key.shape[-1] or any(t.shape[-1] % multiple for t in (query, value)):
        return False
    return query.shape[1] == key.shape[1] == value.shape[1]


def _is_dense(*tensors: torch.Tensor) -> bool:
    """Four dimensions, one batch size, no empty sequence, contiguous last dimension."""
    one_batch = len({tensor.shape[0] for tensor in tensors if tensor.dim() == 4}) == 1
    return one_batch and all(t.dim() == 4 and t.shape[-2] > 0 and t.stride(-1) == 1 for t in tensors)


def _heads_fit(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grouped: bool) -> bool:
    """Whether flash supports these heads: as many key as query heads, or several query heads per key head
    (``enable_gqa``).

    A single key head that is broadcast without ``enable_gqa`` (Falcon-7B) has no fused kernel up to torch 2.13.
    """
    heads, shared, values = query.shape[1], key.shape[1], value.shape[1]
    if shared != values:
        return False
    if grouped or (shared == 1 and flash_broadcasts_one_head()):
        return heads % shared == 0
    return heads == shared


def _float_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.where(mask.logical_not(), float("-inf"), torch.zeros((), dtype=dtype))


def _additive_mask(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A mask in the form of efficient attention: additive, rows padded to 16 elements, expanded as a view."""
    if mask.dtype is torch.bool:
        mask = _float_mask(mask, query.dtype)
    columns = mask.shape[-1]
    mask = _pad_last(mask, 16)[..., :columns]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _pad_last(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    missing = -tensor.shape[-1] % multiple
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _product_4bit(fused_rows: int) -> Callable[..., torch.Tensor]:
    """`bitsandbytes::gemm_4bit` as in its CUDA backend for many rows (backends/cuda/ops.py)."""

    def product(
        A: torch.Tensor,
        B: torch.Tensor,
        shapeB: Sequence[int],
        absmax: torch.Tensor,
        blocksize: int,
        quant_type: str,
        bias: torch.Tensor | None = None,
        absmax_8bit: torch.Tensor | None = None,
        absmax_code: torch.Tensor | None = None,
        absmax_offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        fake = isinstance(A, FakeTensor)
        if not fake or A.numel() // A.shape[-1] <= fused_rows:
            with below_autograd():
                product: torch.Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
                    A, B, shapeB, absmax, blocksize, quant_type, bias, absmax_8bit, absmax_code, absmax_offset
                )
                return product
        if absmax_8bit is not None:
            # Both live until the product is done: they are locals of the backend's function.
            blocks = torch.ops.bitsandbytes.dequantize_blockwise.default(
                absmax_8bit, absmax, absmax_code, 256, torch.float32
            )
            absmax = blocks + absmax_offset
        weight = torch.ops.bitsandbytes.dequantize_4bit.default(B, absmax, blocksize, quant_type, shapeB, A.dtype)
        return torch.nn.functional.linear(A, weight, bias)

    return product


def _flash_backward_scratch(args: Sequence[Any], out: Any) -> list[int]:
    """FP32 `dq` accumulator and row sums, and `dk`, `dv` per query head where heads share keys.

    Source: aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, `mha_bwd`.
    """
    _, query, key = args[:3]
    batch, heads, rows, width = query.shape
    padded_rows = -(-rows // FLASH_ROW_MULTIPLE) * FLASH_ROW_MULTIPLE
    padded_width = -(-width // FLASH_WIDTH_MULTIPLE) * FLASH_WIDTH_MULTIPLE
    scratch = [batch * heads * padded_rows * 4, batch * heads * padded_rows * padded_width * 4]
    if key.shape[1] != heads:
        scratch += 2 * [batch * key.shape[2] * heads * width * key.element_size()]
    return scratch


def _efficient_backward_scratch(args: Sequence[Any], out: Any) -> list[int]:
    """FP32 gradient of the queries, padded to the kernel's blocks, and two rows of sums.

    Source: aten/src/ATen/native/transformers/cuda/mem_eff_attention/kernel_backward.h, `workspace_elements_gq`; the
    block sizes as measured on an H200 (tests/data/h200_attention.json).
    """
    batch, heads, rows, width = args[1].shape
    block = 64 if width <= 64 else 128
    padded = (-(-rows // block) * block) * (-(-width // block) * block)
    return [batch * heads * padded * 4, *2 * [batch * heads * rows * 4]]


def _safe_softmax_scratch(args: Sequence[Any], out: Any) -> list[int]:
    """A mask of the scores that are −∞, and one of fully masked rows; source: aten/src/ATen/native/SoftMax.cpp."""
    return [out.numel(), out.numel() // out.shape[-1] if out.numel() else 0]


def _softmax_backward_scratch(args: Sequence[Any], out: Any) -> list[int]:
    """The product of gradient and output; source: aten/src/ATen/native/cuda/SoftMax.cu, `softmax_backward_cuda_out`."""
    return [args[0].numel() * args[0].element_size()]


CUDA_WORKSPACES = {
    "aten::_scaled_dot_product_flash_attention_backward": _flash_backward_scratch,
    "aten::_scaled_dot_product_efficient_attention_backward": _efficient_backward_scratch,
    "aten::_safe_softmax": _safe_softmax_scratch,
    "aten::_softmax_backward_data": _softmax_backward_scratch,
}
"""Known scratch memory of CUDA kernels, for `StorageTracker(workspaces=...)`."""
