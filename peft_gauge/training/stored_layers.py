"""Layers that hold weights as a checkpoint stores them, for models on ``meta``, and their kernels on fake tensors.

The layers follow the library that transformers loads the checkpoint with: bitsandbytes, transformers' own FP8 layers
or gptqmodel. Where that library needs a GPU or is not installed, a layer below has the same tensors, and the same
memory for dequantized weights and for the backward pass; its docstring names the source.
"""

from __future__ import annotations

import math
import re
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from peft_gauge._internals.torch import FakeTensor, flop_formulas, parameters_of
from peft_gauge._internals.transformers import mark_quantized, replace_layers
from peft_gauge.errors import GaugeError
from peft_gauge.training.stored_formats import STORED_FORMAT, StoredFormat

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

PACKED_BITS = 32  # GPTQ and AWQ pack weights and zero points into 32-bit words
AWQ_FUSED_ROWS = 1024  # up to this many rows, gptqmodel multiplies by AWQ weights without a dequantized copy


def format_of(model: nn.Module) -> StoredFormat | None:
    """The format that the weights of ``model`` are stored in; ``None`` for a base in 16 or 32 bit."""
    found: StoredFormat | None = getattr(model, STORED_FORMAT, None)
    return found


def store_(model: PreTrainedModel, stored: StoredFormat) -> None:
    """Replace ``model``'s layers in place by layers with weights in the format ``stored``, and mark the model.

    bitsandbytes' formats quantize the existing weights, on any device; for other formats the model must be on
    ``meta``. The same layers stay in 16 bit as in transformers. Raises `GaugeError` if no layer can be replaced, or if
    the installed transformers cannot train over the format.
    """
    if stored.kind == "bitsandbytes":
        _store_bitsandbytes(model, stored)
    elif stored.kind == "fp8":
        _store_fp8(model, stored)
    elif stored.kind in ("gptq", "awq"):
        _store_grouped(model, stored)
    setattr(model, STORED_FORMAT, stored)


def check_adapter(stored: StoredFormat, peft_type: str) -> None:
    """Raise `GaugeError` if PEFT has no layers of ``peft_type`` for a base in the format ``stored``."""
    if stored.kind not in ("gptq", "awq"):
        return
    from peft_gauge.training.quantization import import_peft

    import_peft()  # before these import it
    from peft import PeftType
    from peft.config import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if peft_type not in list(PeftType):
        return
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)]
    if issubclass(config, PromptLearningConfig) or find_spec(f"peft.tuners.{peft_type.lower()}.{stored.kind}"):
        return
    raise GaugeError(f"PEFT has no {peft_type} layers for {stored.title} weights; use LORA")


# ---- which layers ----------------------------------------------------------------------------------------------------


def kept_names(model: PreTrainedModel, skipped: Sequence[str] | None, *, add_defaults: bool = False) -> list[str]:
    """Names of the layers that transformers does not quantize if a checkpoint's config skips ``skipped``.

    If ``skipped`` is ``None`` (or with ``add_defaults``) they include the output projection and layers tied to it.
    """
    from transformers.quantizers.base import HfQuantizer

    in_float32 = getattr(model, "_keep_in_fp32_modules", None)
    patterns = HfQuantizer.get_modules_to_not_convert(model, skipped, in_float32, add_defaults)
    return [name for name, _ in model.named_modules() if name and any(_names(each, name) for each in patterns)]


def _names(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches the layer called ``name`` in transformers: as its suffix, or as a regular expression
    whose match ends at a dot (``quantizers_utils.should_convert_module``)."""
    if name.endswith(pattern):
        return True
    try:
        return re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name) is not None
    except re.error:
        return False


def _linears(model: PreTrainedModel, kept: Sequence[str]) -> Iterator[tuple[str, nn.Linear]]:
    left_out = set(kept)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name not in left_out:
            yield name, module


# ---- bitsandbytes ----------------------------------------------------------------------------------------------------


def _store_bitsandbytes(model: PreTrainedModel, stored: StoredFormat) -> None:
    from peft_gauge.training.quantization import quantize_

    settings = stored.settings
    compute = str(settings.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch.")
    quantize_(
        model,
        quant_format=settings["quant_format"],
        double_quant=bool(settings.get("bnb_4bit_use_double_quant", False)),
        compute_dtype=getattr(torch, compute),
        skip=kept_names(model, settings.get("llm_int8_skip_modules")),
    )


# ---- FP8 -------------------------------------------------------------------------------------------------------------


def _store_fp8(model: PreTrainedModel, stored: StoredFormat) -> None:
    """transformers' own FP8 layers. Scales become buffers, so that they do not count as parameters."""
    from transformers import FineGrainedFP8Config
    from transformers.quantizers.auto import AutoHfQuantizer

    fp8 = _fp8_layers()
    if fp8 is None:
        raise GaugeError(
            f"transformers {version('transformers')} has no backward pass for FP8 weights; install a newer release, or "
            f"use a 16-bit checkpoint"
        )
    dtype = model.dtype
    quantizer = AutoHfQuantizer.from_config(FineGrainedFP8Config.from_dict(dict(stored.settings)), pre_quantized=True)
    replace_layers(quantizer, model)
    found = False
    for module in model.modules():
        if isinstance(module, (fp8.FP8Linear, fp8.FP8Experts)):
            found = True
            parameters = parameters_of(module)
            scales = [name for name in parameters if name.endswith(("scale_inv", "activation_scale"))]
            for name in scales:
                scale = parameters.pop(name)
                module.register_buffer(name, None if scale is None else scale.detach())
            module.quantization_buffers = tuple(scales)
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
            if parameters.get("bias") is not None:
                module.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
    if not found:
        raise GaugeError(f"no layer of {type(model).__name__} is stored in FP8: its config skips all of them")
    _mark(model, quantizer.quantization_config, dtype)


def _fp8_layers() -> Any:
    """transformers' module of FP8 layers; ``None`` if they have no backward pass or (before 5) triton is missing."""
    try:
        from transformers.integrations import finegrained_fp8 as fp8
    except ImportError:
        return None
    return fp8 if hasattr(fp8, "FP8LinearFunction") else None


def _mark(model: PreTrainedModel, config: Any, dtype: torch.dtype) -> None:
    """Set the attributes of a model that transformers loaded quantized; PEFT reads them."""
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.config.quantization_config = config
    mark_quantized(model.config, dtype)


# ---- GPTQ and AWQ ----------------------------------------------------------------------------------------------------


def _store_grouped(model: PreTrainedModel, stored: StoredFormat) -> None:
    from transformers import AwqConfig, GPTQConfig

    settings = stored.settings
    kept = kept_names(model, settings.get("modules_to_not_convert"), add_defaults=stored.kind == "awq")
    inside = settings.get("modules_in_block_to_quantize")  # GPTQ: lists of names; only these are quantized
    wanted = None if inside is None else [name for part in inside for name in ([part] if type(part) is str else part)]
    layer = GptqLinear if stored.kind == "gptq" else AwqLinear
    found = False
    for name, linear in _linears(model, kept):
        if wanted is None or any(name.endswith(f".{each}") for each in wanted):
            model.set_submodule(name, layer(linear, settings["bits"], settings["group_size"]))
            found = True
    if not found:
        raise GaugeError(f"no layer of {type(model).__name__} is stored as {stored.title}")
    kind = GPTQConfig if stored.kind == "gptq" else AwqConfig
    _mark(model, kind(bits=settings["bits"], group_size=settings["group_size"]), model.dtype)


class GroupedLinear(nn.Linear):
    """A linear layer with weights in groups of ``group_size`` along the input, each with its scale and zero point.

    The tensors are those of AutoGPTQ's and AutoAWQ's checkpoints: ``qweight`` has ``bits`` bits per weight, packed into
    int32; ``qzeros`` (packed likewise) and ``scales`` (float16) are of shape (groups, out). ``weight`` is ``None``.
    """

    quantization_buffers: tuple[str, ...] = ("qzeros", "scales")

    def __init__(self, linear: nn.Linear, bits: int, group_size: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits = bits
        group = self.in_features if group_size == -1 else group_size
        groups, device = -(-self.in_features // group), linear.weight.device
        self.weight = None  # type: ignore[assignment]
        words = self._packed_shape()
        self.qweight = nn.Parameter(torch.empty(words, dtype=torch.int32, device=device), requires_grad=False)
        zeros = (groups, -(-self.out_features * bits // PACKED_BITS))
        self.register_buffer("qzeros", torch.empty(zeros, dtype=torch.int32, device=device))
        scales = torch.empty(groups, self.out_features, dtype=torch.float16, device=device)
        self.register_buffer("scales", scales)
        # The shape before packing, for parameter counts: numel() counts 32-bit words.
        self.qweight.logical_shape = (self.out_features, self.in_features)  # type: ignore[attr-defined]
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(torch.float16), requires_grad=False)

    def _packed_shape(self) -> tuple[int, int]:
        raise NotImplementedError


class GptqLinear(GroupedLinear):
    """GPTQ as in gptqmodel's training: `TorchLinear.forward` (nn_modules/qlinear/torch.py, gptqmodel 7.7).

    Weights are packed along the input; ``g_idx`` holds the group of each input. The product with dequantized weights
    runs under autograd, which keeps these weights for the input's gradient.
    """

    quantization_buffers = ("qzeros", "scales", "g_idx")

    def __init__(self, linear: nn.Linear, bits: int, group_size: int) -> None:
        super().__init__(linear, bits, group_size)
        self.register_buffer("g_idx", torch.empty(self.in_features, dtype=torch.int32, device=self.qweight.device))

    def _packed_shape(self) -> tuple[int, int]:
        return -(-self.in_features * self.bits // PACKED_BITS), self.out_features

    def forward(self, input: Tensor) -> Tensor:
        weight = dequantize(self.qweight, self.scales, self.in_features, self.out_features).to(input.dtype)
        out = torch.matmul(input.reshape(-1, self.in_features), weight).reshape(*input.shape[:-1], self.out_features)
        if self.bias is not None:
            out.add_(self.bias.to(out.dtype))
        return out


class AwqLinear(GroupedLinear):
    """AWQ as in gptqmodel's training: `AwqGEMMLinear` (nn_modules/qlinear/gemm_awq.py, gptqmodel 7.7).

    Weights are packed along the output. Only the packed weights are kept for the backward pass, which dequantizes them;
    the forward pass dequantizes them for more than 1024 rows.
    """

    def _packed_shape(self) -> tuple[int, int]:
        return self.in_features, -(-self.out_features * self.bits // PACKED_BITS)

    def forward(self, input: Tensor) -> Tensor:
        half = input.dtype in (torch.float16, torch.bfloat16)
        rows = input if half else input.to(torch.float16)
        apply: Any = _AwqProduct.apply
        out: Tensor = apply(rows, self.qweight, self.scales, self.out_features, self.bias)
        return out if out.dtype == input.dtype else out.to(input.dtype)


class _AwqProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, qweight: Tensor, scales: Tensor, out_features: int, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(qweight, scales)
        ctx.shape, ctx.out_features = input.shape, out_features
        rows = input.reshape(-1, input.shape[-1])
        if rows.shape[0] > AWQ_FUSED_ROWS:
            out = torch.matmul(rows, dequantize(qweight, scales, rows.shape[1], out_features).to(input.dtype))
        else:
            out = stored_product(rows, qweight, out_features)
        if bias is not None:
            out = out + bias.to(out.dtype)
        return out.reshape(*input.shape[:-1], out_features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        qweight, scales = ctx.saved_tensors
        (gradient,) = gradients
        weight = dequantize(qweight, scales, ctx.shape[-1], ctx.out_features).to(gradient.dtype)
        rows = gradient.reshape(-1, ctx.out_features)
        return torch.matmul(rows, weight.transpose(0, 1)).reshape(ctx.shape), None, None, None, None


# ---- kernels without a fake implementation ---------------------------------------------------------------------------
# These are torch operators, so that a plan of a step sees one kernel each, as on a GPU.

DEQUANTIZE, PRODUCT = "peft_gauge::dequantize", "peft_gauge::stored_product"


@torch.library.custom_op(DEQUANTIZE, mutates_args=())
def dequantize(packed: Tensor, scales: Tensor, rows: int, columns: int) -> Tensor:
    """``packed`` weights dequantized: shape (rows, columns), the scales' dtype; fake tensors only."""
    raise GaugeError("dequantizing stored weights is available in plans only")


@dequantize.register_fake
def _(packed: Tensor, scales: Tensor, rows: int, columns: int) -> Tensor:
    return scales.new_empty(rows, columns)


@torch.library.custom_op(PRODUCT, mutates_args=())
def stored_product(input: Tensor, packed: Tensor, columns: int) -> Tensor:
    """``input`` (…, k) times ``packed`` weights: shape (…, columns), in one kernel; fake tensors only."""
    raise GaugeError("multiplying by stored weights is available in plans only")


@stored_product.register_fake
def _(input: Tensor, packed: Tensor, columns: int) -> Tensor:
    return input.new_empty(*input.shape[:-1], columns)


def _product_flops(input: Sequence[int], packed: Sequence[int], columns: int, *args: Any, **kwargs: Any) -> int:
    """Two FLOPs per multiply-add; torch's counter passes shapes."""
    return 2 * columns * math.prod(input)


if torch.ops.peft_gauge.stored_product not in flop_formulas():
    register_flop_formula(torch.ops.peft_gauge.stored_product)(_product_flops)


@contextmanager
def kernels() -> Iterator[None]:
    """While active, transformers' FP8 layers run on fake tensors: their kernels are replaced by the operators above.

    A product first quantizes its input to FP8, with a float32 scale per block. DeepGEMM, which transformers prefers
    from Hopper on, does so in a separate kernel; the Triton kernel does both.
    """
    fp8 = _fp8_layers()
    if fp8 is None:
        yield
        return
    patched = {
        "load_finegrained_fp8_kernel": lambda: _Fp8Kernels,
        "is_deepgemm_loadable": lambda: False,
        "_dequantize_fp8_weight": _dequantized_fp8,
    }
    originals = {name: getattr(fp8, name) for name in patched}
    for name, replacement in patched.items():
        setattr(fp8, name, replacement)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(fp8, name, original)


class _Fp8Kernels:
    """The functions that transformers looks up in its FP8 kernels, for fake tensors."""

    @staticmethod
    def matmul(input: Tensor, weight: Tensor, scale: Tensor, block_size: Any, dtype: Any, **how: Any) -> Tensor:
        quantized = _quantized_input(input, block_size)
        out: Tensor = stored_product(input, weight, weight.shape[-2])
        del quantized
        return out

    @staticmethod
    def grouped_matmul(input: Tensor, weight: Tensor, scale: Tensor, *, block_size: Any, **how: Any) -> Tensor:
        return _Fp8Kernels.matmul(input, weight, scale, block_size, input.dtype)


def _quantized_input(input: Tensor, block_size: Any) -> tuple[Tensor, Tensor]:
    blocks = 1 if block_size is None else -(-input.shape[-1] // block_size[1])
    scales = input.new_empty(*input.shape[:-1], blocks, dtype=torch.float32)
    return torch.empty_like(input, dtype=torch.float8_e4m3fn), scales


def _dequantized_fp8(weight: Tensor, scale: Tensor, block_size: Any, dtype: torch.dtype) -> Tensor:
    if not isinstance(weight, FakeTensor):
        raise GaugeError("dequantizing stored weights is available in plans only")
    scales = scale.to(dtype)
    *others, columns = weight.shape
    dense: Tensor = dequantize(weight, scales, math.prod(others), columns).view(weight.shape)
    return dense
