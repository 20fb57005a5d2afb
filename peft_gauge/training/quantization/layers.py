"""Replacing a model's linear layers by bitsandbytes', so that QLoRA (Dettmers et al. 2023, arXiv:2305.14314) can be
measured on any weights: drawn, GGUF or safetensors."""

from __future__ import annotations

import re
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_gauge._internals.bitsandbytes import code_books
from peft_gauge._internals.torch import is_fake, unset_fake_temporarily
from peft_gauge._internals.transformers import mark_quantized
from peft_gauge.errors import GaugeError, unknown
from peft_gauge.training.quantization.formats import BLOCK_SIZE, pack
from peft_gauge.training.quantization.library import load_bitsandbytes
from peft_gauge.training.targets import sizes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LAYER_FORMATS = ("nf4", "fp4", "int8")


def quantize_(
    model: nn.Module,
    *,
    quant_format: str = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.float32,
    skip: Sequence[str] | None = None,
    device: str | None = None,
    storage: torch.dtype | None = None,
) -> None:
    """Replace ``model``'s linear layers in place by bitsandbytes' ``Linear4bit`` (``"int8"``: ``Linear8bitLt``).

    The layers are those that transformers' integration replaces: ``nn.Linear`` itself, and GPT-2's ``Conv1D`` with its
    weight transposed. Not quantized (`left_unquantized` lists them) are:

    - layers whose name is, or ends in, an entry of ``skip`` (default: the output head, whatever its name);
    - layers that share their weight with another module;
    - subclasses of ``nn.Linear``;
    - parameters outside linear layers, such as the experts of a mixture, one 3-D parameter per layer.

    Each weight is quantized in blocks of 64 on ``device`` (default: where it is), and its full-precision tensor is
    freed before the next one: a model that does not fit a GPU in 16 bit can be moved there in 4. If a row is not a
    multiple of a block, blocks run across rows, and the last block of a weight may be short. Biases do not change.
    ``double_quant``, ``compute_dtype`` and ``storage`` (the dtype of the packed weights, by default uint8; FSDP shards
    floats only) apply
    to the 4-bit formats. The backward pass dequantizes to the weight's
    former dtype. The model gets the attributes that transformers sets when it loads quantized weights, so that PEFT
    uses its layers for them.

    When reading memory, note:

    - Under ``FakeTensorMode`` and on ``meta`` the layers are the same, but each weight is a plain parameter
      (bitsandbytes' own parameter classes cannot hold a fake tensor) with the same shape, dtype and
      attributes as the real one.
    - On a CPU with AVX-512 BF16, recent bitsandbytes repacks a layer on its first forward in ``eval()`` mode
      without input gradients: double quantization is undone and the layer then computes in bfloat16. Steps in
      ``train()`` mode are not affected.

    Raises `GaugeError` for an unknown format, a model without such layers, a model that is quantized already, weights
    that are not 16- or 32-bit floats, and, on a CPU, rows that the installed bitsandbytes unpacks wrongly there.
    """
    if quant_format not in LAYER_FORMATS:
        raise unknown("quantized layer format", quant_format, LAYER_FORMATS)
    if getattr(model, "is_quantized", False):
        raise GaugeError("the model is quantized already; start from a 16- or 32-bit model")
    kernels_device = _kernels_device(model, device)
    load_bitsandbytes(kernels_device)
    skip = output_heads(model) if skip is None else skip
    names = _linear_names(model, skip)
    if not names:
        raise GaugeError(_why_none(model, skip))
    _check_mixers(model, names)
    for name in names:  # check all layers first, so that a rejected model is unchanged
        _check(name, model.get_submodule(name))
    if quant_format != "int8" and kernels_device == "cpu" and _has_data(model):
        _check_unpacking(model, names, quant_format)
    for name in names:
        linear = _as_linear(model.get_submodule(name))
        if device is not None:
            linear.to(device)
        layer = _quantized_layer(linear, quant_format, double_quant, compute_dtype, storage or torch.uint8)
        model.set_submodule(name, layer)
    _mark(model, quant_format, double_quant, compute_dtype, skip)


def output_heads(model: nn.Module) -> list[str]:
    """The names of ``model``'s output head (lm_head; in RWKV, head), which QLoRA does not quantize; ``lm_head`` if the
    model does not define it."""
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    return [name for name, module in model.named_modules() if module is head] if head is not None else ["lm_head"]


def left_unquantized(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The floating-point parameters of ``model`` that are not quantized, by the module or parameter that holds them.

    Names have no layer numbers: the same module in all layers is one entry. A ``weight`` is listed under its module
    (``lm_head``), other parameters under their own name (``mlp.experts.gate_up_proj``), and all vectors together under
    ``norms and biases``.
    """
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or getattr(parameter, "quant_state", None) is not None:
            continue
        where = re.sub(r"^.*\.\d+\.", "", name)
        where = "norms and biases" if parameter.dim() < 2 else where.removesuffix(".weight")
        found.setdefault(where, []).append(parameter)
    return found


def _kernels_device(model: nn.Module, device: str | None) -> str:
    """The device on which ``model`` will be quantized; "cpu" for weights without data, which run no kernels."""
    return device or next(model.parameters()).device.type if _has_data(model) else "cpu"


def _has_data(model: nn.Module) -> bool:
    weight = next(model.parameters())
    return not (weight.is_meta or is_fake(weight))


def _linear_names(model: nn.Module, skip: Sequence[str]) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    owners = _owners(model)
    return [
        name
        for name, module in model.named_modules()
        # The model may use a subclass for its weight only, without calling its forward.
        if type(module) in (nn.Linear, Conv1D)
        and not any(f".{name}".endswith(f".{part}") for part in skip)
        and len(owners[id(module.weight)]) == 1
    ]


def _owners(model: nn.Module) -> dict[int, set[str]]:
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name)
    return owners


def _why_none(model: nn.Module, skip: Sequence[str]) -> str:
    """Why no layer of ``model`` can be quantized, as a message."""
    own = sorted({type(module).__name__ for module in model.modules() if isinstance(module, nn.Linear)} - {"Linear"})
    architecture = type(model).__name__
    if own:
        return (
            f"no layer of {architecture} can be quantized: its linear layers are of its own class "
            f"{', '.join(own)}, which transformers' bitsandbytes integration leaves in 16 bit; train it unquantized "
            f"(lora instead of qlora)"
        )
    return (
        f"no layer of {architecture} can be quantized: it has no linear layers other than the skipped ones "
        f"({', '.join(skip)}, and tied weights); train it unquantized (lora instead of qlora)"
    )


def _as_linear(layer: nn.Module) -> nn.Linear:
    """``layer`` itself, or a ``Conv1D`` as an equivalent ``nn.Linear`` with a transposed copy of its weight."""
    if isinstance(layer, nn.Linear):
        return layer
    weight: Any = layer.weight
    inputs, outputs = weight.shape
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
    linear.bias = layer.bias  # type: ignore[assignment]
    return linear.train(layer.training)


def _check(name: str, linear: nn.Module) -> None:
    weight: Any = linear.weight
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise GaugeError(f"{name} is {weight.dtype}; only float32, float16 and bfloat16 weights can be quantized")


def _check_unpacking(model: nn.Module, names: Sequence[str], quant_format: str) -> None:
    """Raise `GaugeError` for a layer that the CPU kernel would dequantize wrongly: if a block ends inside a row, some
    releases (such as 0.50) use the next block's scale for its end."""
    for name in names:
        inputs, _ = sizes(model.get_submodule(name))
        if inputs % BLOCK_SIZE and not _unpacks(inputs, quant_format):
            raise GaugeError(
                f"{name} has {inputs} inputs, not a multiple of the block size {BLOCK_SIZE}; the CPU kernel of "
                f"bitsandbytes {version('bitsandbytes')} unpacks such rows wrongly; use a GPU, or int8"
            )


@cache
def _unpacks(inputs: int, quant_format: str) -> bool:
    """Whether the CPU kernel unpacks rows of ``inputs`` weights as it unpacks the same weights in rows of one block."""
    functional = load_bitsandbytes().functional
    with unset_fake_temporarily():
        weight = torch.linspace(-1, 1, BLOCK_SIZE * inputs).sin().view(BLOCK_SIZE, inputs)
        packed, state = pack(weight, quant_format)
        by_row = functional.dequantize_4bit(packed, state)
        state.shape = torch.Size((inputs, BLOCK_SIZE))
        return torch.equal(by_row.flatten(), functional.dequantize_4bit(packed, state).flatten())


_MULTIPLIED_BY_HAND = {"MambaMixer": "dt_proj", "FalconMambaMixer": "dt_proj"}
"""Modules in transformers that multiply by the weight of a layer instead of calling the layer."""


def _check_mixers(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        parent, _, own = name.rpartition(".")
        holder = type(model.get_submodule(parent)).__name__
        if _MULTIPLIED_BY_HAND.get(holder) == own:
            raise GaugeError(
                f"{type(model).__name__} cannot be trained quantized: its {holder} multiplies by the weight of {own} "
                f"directly, which fails on packed weights; train it unquantized (lora instead of qlora)"
            )


def _quantized_layer(
    linear: nn.Linear, quant_format: str, double_quant: bool, compute_dtype: torch.dtype, storage: torch.dtype
) -> nn.Module:
    eight_bit = quant_format == "int8"
    # The constructors allocate a weight; on meta, outside any fake mode, this takes no memory.
    with unset_fake_temporarily():
        if eight_bit:
            layer = _empty_8bit(linear)
        else:
            layer = _empty_4bit(linear, quant_format, double_quant, compute_dtype, storage)
    weight = linear.weight.detach()
    if weight.is_meta or is_fake(weight):
        layer.weight = _fake_weight(weight, quant_format, double_quant, storage)
        layer.quant_state = getattr(layer.weight, "quant_state", None)  # which a sharded weight loses
    elif eight_bit:
        # bitsandbytes quantizes an 8-bit weight only when it is moved from the CPU.
        layer.weight = load_bitsandbytes().nn.Int8Params(weight.cpu(), requires_grad=False).to(weight.device)
    else:
        make: Any = load_bitsandbytes().nn.Params4bit
        settings = {"quant_type": quant_format, "compress_statistics": double_quant, "blocksize": BLOCK_SIZE}
        layer.weight = make(weight, module=layer, quant_storage=storage, **settings).to(weight.device)
    layer.bias = linear.bias
    trained: nn.Module = layer.train(linear.training)
    return trained


def _empty_8bit(linear: nn.Linear) -> Any:
    return load_bitsandbytes().nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=False,
        has_fp16_weights=False,
        threshold=6.0,  # LLM.int8()'s outlier threshold, transformers' default too
        device="meta",
    )


def _empty_4bit(
    linear: nn.Linear, quant_format: str, double_quant: bool, compute_dtype: torch.dtype, storage: torch.dtype
) -> Any:
    return load_bitsandbytes().nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=compute_dtype,
        compress_statistics=double_quant,
        quant_type=quant_format,
        quant_storage=storage,
        device="meta",
    )


class Params4bit(nn.Parameter):
    """A packed weight without data. PEFT's preparation recognizes it by the name of its class, and casts no part of
    it, even if it is stored as numbers of 16 bit."""


def _fake_weight(weight: Tensor, quant_format: str, double_quant: bool, storage: torch.dtype) -> nn.Parameter:
    """A parameter without data, with the attributes of ``Params4bit`` / ``Int8Params`` that layers and PEFT read."""
    attributes: dict[str, Any]
    if quant_format == "int8":
        data, row_scales, _ = load_bitsandbytes().functional.int8_vectorwise_quant(weight.half())
        attributes = {"CB": data, "SCB": row_scales, "has_fp16_weights": False}
    else:
        with _fake_dynamic_code(weight.device):
            data, state = pack(weight, quant_format, double_quant=double_quant, storage=storage)
        attributes = {"quant_state": state, "bnb_quantized": True, "quant_storage": data.dtype}
        attributes |= {"quant_type": quant_format, "compress_statistics": double_quant, "blocksize": BLOCK_SIZE}
    parameter = (nn.Parameter if quant_format == "int8" else Params4bit)(data, requires_grad=False)
    for name, value in attributes.items():
        setattr(parameter, name, value)
    return parameter


@contextmanager
def _fake_dynamic_code(device: torch.device) -> Iterator[None]:
    """Give bitsandbytes a fake copy of its cached 8-bit code while active: in a fake mode it can neither compute the
    code nor use the real one.
    """
    load_bitsandbytes()
    books = code_books()
    books["dynamic"] = torch.empty(256, device=device)
    try:
        yield
    finally:
        del books["dynamic"]  # bitsandbytes computes it again when needed


def _mark(
    model: nn.Module, quant_format: str, double_quant: bool, compute_dtype: torch.dtype, skip: Sequence[str]
) -> None:
    from transformers import BitsAndBytesConfig, PreTrainedModel

    eight_bit = quant_format == "int8"
    config = BitsAndBytesConfig(
        load_in_8bit=eight_bit,
        load_in_4bit=not eight_bit,
        llm_int8_skip_modules=list(skip),
        bnb_4bit_quant_type="nf4" if eight_bit else quant_format,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    marks = {
        f"is_loaded_in_{8 if eight_bit else 4}bit": True,
        "is_quantized": True,
        "quantization_method": config.quant_method,
    }
    for name, value in marks.items():
        setattr(model, name, value)
    if isinstance(model, PreTrainedModel):
        model.config.quantization_config = config
        mark_quantized(model.config, model.dtype)
