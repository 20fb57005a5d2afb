"""``--attention flash_attention_2`` without the package flash-attn, which needs a GPU to be built and to run.

transformers looks up its functions by name when a model requests them. While `package` is active, it finds functions
of the same names and signatures that pass fakes through torch's copy of the same kernels. FlashAttention-2 saves the
same tensors for backward: queries, keys, values, outputs and row sums.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor

from peft_gauge._internals.torch import FakeTensor
from peft_gauge._internals.torch import flash_attention as cuda_flash_attention
from peft_gauge._internals.transformers import flash_on_fakes, missing_flash
from peft_gauge.errors import GaugeError

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "flash_attention_2"
WIDEST_HEAD = 256
WIDTH_MULTIPLE = 8  # flash-attn pads heads to it


@contextmanager
def package() -> Iterator[None]:
    """While active, transformers considers flash-attn installed, and its functions accept fakes."""
    from transformers import masking_utils
    from transformers import modeling_flash_attention_utils as utils

    found, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    found.__spec__ = ModuleSpec("flash_attn", None)  # transformers looks for it, but needs no release
    vars(found).update(
        flash_attn_func=attend, flash_attn_varlen_func=attend_rows, flash_attn_with_kvcache=None, bert_padding=padding
    )
    vars(padding).update(pad_input=_padded, unpad_input=None)
    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(_installed("flash_attn", found))
        enter(_installed("flash_attn.bert_padding", padding))
        enter(patch.object(utils, "is_flash_attn_2_available", lambda *args, **kwargs: True))
        enter(flash_on_fakes(_rows_of))
        for file in [file for name, file in sys.modules.items() if name.startswith("transformers.models.")]:
            for missing, function in missing_flash(file).items():
                enter(patch.object(file, missing, function, create=True))
        original = masks[NAME]
        masks[NAME] = _mask
        stack.callback(masks.__setitem__, NAME, original)
        utils.lazy_import_flash_attention(NAME)
        yield


@contextmanager
def _installed(name: str, module: ModuleType) -> Iterator[None]:
    """While active, ``import name`` gives ``module``.

    Not `patch.dict`, which at its end removes every module imported meanwhile: transformers would be imported
    twice, and its classes would differ from those of models built before.
    """
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before


def _mask(*args: Any, attention_mask: Tensor | None = None, kv_length: int = 0, **kwargs: Any) -> Tensor | None:
    """The mask, unchanged: transformers drops a mask without padding, which it finds from the values."""
    return None if attention_mask is None else attention_mask[:, -kv_length:]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """``flash_attn.flash_attn_func`` over fakes: (batch, tokens, heads, width) in 16 bit, the same shape out.

    Raises `GaugeError` if flash-attn has no kernel for these tensors.
    """
    if not isinstance(q, FakeTensor):
        raise GaugeError("this flash attention is for planning only; it takes fake tensors")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise GaugeError("flash attention needs 16-bit tensors; use --dtype bfloat16 or float16, or --attention sdpa")
    width = q.shape[-1]
    if width > WIDEST_HEAD:
        raise GaugeError(
            f"flash attention has no kernel for head dimension {width} (at most {WIDEST_HEAD}); use --attention sdpa"
        )
    scale = width**-0.5 if softmax_scale is None else softmax_scale
    q, k, v = (_in_rows(tensor) for tensor in (q, k, v))
    heads_first = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    out: Tensor = cuda_flash_attention(*heads_first, dropout_p, causal, scale=scale)[0]
    out = out.transpose(1, 2)
    return out if out.shape[-1] == width else out[..., :width]


def _in_rows(tensor: Tensor) -> Tensor:
    if tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    missing = -tensor.shape[-1] % WIDTH_MULTIPLE
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """``flash_attn.flash_attn_varlen_func`` over fakes: the tokens of all sequences concatenated, without unpadding."""
    queries = q.unflatten(0, (-1, max_seqlen_q))
    keys, values = (tensor.unflatten(0, (-1, max_seqlen_k)) for tensor in (k, v))
    return attend(queries, keys, values, dropout_p, softmax_scale, causal).flatten(0, 1)


def _rows_of(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, query_length: int, unpad_func: Any = None
) -> Any:
    """transformers' ``_upad_input``, copies included, as if without padding (how much it removes depends on values)."""
    batch, keys = key.shape[0], key.shape[1]
    rows = [torch.arange(batch * length, device=query.device) for length in (query_length, keys)]
    ends = [torch.zeros(batch + 1, dtype=torch.int32, device=query.device) for _ in rows]
    gathered = [t.flatten(0, 1)[each] for t, each in ((query, rows[0]), (key, rows[1]), (value, rows[1]))]
    return *gathered, rows[0], tuple(ends), (query_length, keys)


def _padded(rows: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """``flash_attn.bert_padding.pad_input``: back to (batch, tokens, heads, width)."""
    out = rows.new_zeros(batch * seqlen, *rows.shape[1:])
    filled: Tensor = out.index_copy(0, indices, rows).unflatten(0, (batch, seqlen))
    return filled
