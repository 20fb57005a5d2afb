"""The planned model: the base on ``meta``, built once, with its method attached."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from peft_gauge._internals.cut_cross_entropy import has_cut_cross_entropy
from peft_gauge.plan import flash_attention, policies
from peft_gauge.plan.call import chunk_loss, cut_loss
from peft_gauge.training import methods, models, stored_layers, targets
from peft_gauge.training.sharding import packed_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from transformers import PreTrainedModel

    from peft_gauge.plan.record import PlanRequest
    from peft_gauge.training.models import ModelRecord

NO_CUT_LOSS = (
    "cut cross-entropy is planned as a loss in 8 chunks along the sequence, which needs more; it is planned as itself "
    "where cut-cross-entropy and triton are installed (pip install 'peft-gauge[cce]')"
)


@dataclass(frozen=True)
class Adapted:
    model: nn.Module
    base_parameters: frozenset[int]  # ids
    modules: tuple[targets.Adapted, ...]


def adapt(request: PlanRequest, notes: list[str]) -> Adapted:
    """The model on ``meta`` with its method attached; the base is built once for all methods and copied."""
    method, settings = request.method, request.settings
    if quant_format(request) is not None or settings.optimizer.endswith("8bit"):
        from peft_gauge.training.quantization import load_bitsandbytes

        load_bitsandbytes()
    base = copy.deepcopy(_meta_base(request.model, request.dtype, request.attention))
    if request.model.stored is not None:
        stored_layers.store_(base, request.model.stored)
    base = methods.prepare_base(
        base, method, storage=packed_dtype(request.sharding, request.dtype, settings.mixed_precision)
    )
    ids, places = frozenset(map(id, base.parameters())), targets.Places.of(base)
    notes += _unquantized(base, request)
    if models.is_recurrent(base):
        notes.append(
            "recurrent layers are planned as in transformers' PyTorch code; with their kernels "
            "(mamba-ssm, causal-conv1d, flash-linear-attention) a step needs less"
        )
    by_trainer = request.loop != "plain"  # which turns checkpointing on itself
    reentrant = settings.grad_checkpointing and request.checkpoint_reentrant and not by_trainer
    if reentrant or (settings.grad_checkpointing and by_trainer):
        methods.check_checkpointing(method)
    with policies.attaching(method) as said:
        attached = methods.attach(
            base,
            replace(method, quantization=None, prepare_kbit=False),  # done just above
            grad_checkpointing=settings.grad_checkpointing and not reentrant and not by_trainer,
        )
    notes += [*said, *_unmatched(method, base, places)]
    if reentrant:
        base.enable_input_require_grads()  # else reentrant checkpointing trains nothing but the last block
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        attached.train()
    if request.loss == "cce" and has_cut_cross_entropy():
        cut_loss(base)
    elif request.loss == "cce":
        notes.append(NO_CUT_LOSS)
        chunk_loss(base)
    elif request.loss == "chunked":
        chunk_loss(base, request.loss_chunk)
    return Adapted(attached, ids, () if method.kind == "full" else targets.adapted(attached, places))


def _unmatched(method: methods.Method, base: PreTrainedModel, places: targets.Places) -> Iterator[str]:
    """A note on targets of an adapter config that do not exist in this architecture: PEFT ignores them silently."""
    named = method.peft_config.get("target_modules")
    if isinstance(named, list):  # else a pattern, PEFT's own default, or ours for the architecture
        missing = targets.unmatched(named, places.modules)
        if missing:
            yield f"target_modules that do not exist in {base.config.model_type}, ignored by PEFT: {', '.join(missing)}"


def _unquantized(base: nn.Module, request: PlanRequest) -> Iterator[str]:
    """A note on the unquantized parts of a quantized base and their size: why QLoRA can need more than LoRA."""
    if request.method.quantization is None:
        return
    from peft_gauge.training.quantization import left_unquantized

    left = left_unquantized(base)
    numels = {where: sum(parameter.numel() for parameter in held) for where, held in left.items()}
    total, itemsize = sum(numels.values()), models.torch_dtype(request.dtype).itemsize
    is_cast = request.method.prepare_kbit and itemsize < 4
    has_experts = any("experts" in where for where in numels)
    if not is_cast and not has_experts:
        return
    largest = [where for where in sorted(numels, key=lambda where: -numels[where]) if numels[where] * 100 >= total]
    parts = [f"{where} {_shown_bytes(numels[where] * itemsize)}" for where in largest]
    rest = total - sum(numels[where] for where in largest)
    parts += [f"the rest {_shown_bytes(rest * itemsize)}"] if rest else []
    sentence = f"not stored in {request.method.quantization.quant_format}: {', '.join(parts)} in {request.dtype}"
    if has_experts:
        sentence += "; bitsandbytes quantizes linear layers, not the 3-D parameters that hold a layer's experts"
    if is_cast:
        sentence += (
            f"; k-bit preparation casts all of these to float32, {_shown_bytes(total * 4)}, and with them the "
            f"activations between quantized layers (--no-prepare-kbit leaves both in {request.dtype})"
        )
    yield sentence


def _shown_bytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.2f} MB"


@lru_cache(maxsize=2)
def _meta_base(record: ModelRecord, dtype: str, attention: str | None) -> PreTrainedModel:
    with attention_package(attention):
        return models.build(record, device="meta", dtype=dtype, attn_implementation=attention, as_stored=False)


def attention_package(attention: str | None) -> contextlib.AbstractContextManager[None]:
    return flash_attention.package() if attention == flash_attention.NAME else contextlib.nullcontext()


@lru_cache(maxsize=8)
def attention(record: ModelRecord, dtype: str, asked: str | None) -> str:
    """The attention implementation of a request's step."""
    return models.attention(_meta_base(record, dtype, asked))


def quant_format(request: PlanRequest) -> str | None:
    """bitsandbytes' format of the base: the checkpoint's own, or the format to which the method quantizes."""
    stored, quantization = request.model.stored, request.method.quantization
    if stored is not None:
        return stored.settings.get("quant_format") if stored.kind == "bitsandbytes" else None
    return None if quantization is None else quantization.quant_format


def double_quant(request: PlanRequest) -> bool | None:
    stored, quantization = request.model.stored, request.method.quantization
    if quant_format(request) is None:
        return None
    if stored is not None:
        return bool(stored.settings.get("bnb_4bit_use_double_quant", False))
    return None if quantization is None else quantization.double_quant
