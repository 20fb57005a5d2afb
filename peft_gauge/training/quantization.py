"""4-bit weights: bitsandbytes' layers put into a model, and the number formats as instruments of their own.

The first half quantises a model in place, so that QLoRA (Dettmers et al. 2023, arXiv:2305.14314) can be
measured on any weights: drawn, GGUF or safetensors. The second half takes single weight matrices and says
what a format loses on them and how many bits it takes.
"""

from __future__ import annotations

import logging
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_gauge._internals.bitsandbytes import NOTICES, code_books, native_library
from peft_gauge._internals.torch import is_fake, unset_fake_temporarily
from peft_gauge._internals.transformers import mark_quantised
from peft_gauge.errors import GaugeError, one_line, unknown
from peft_gauge.training.targets import sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import ModuleType

BLOCK_SIZE = 64  # weights that share one absmax: QLoRA's choice and bitsandbytes' default
NESTED_BLOCK_SIZE = 256  # absmax values that share one second-level absmax; fixed in bitsandbytes
LAYER_FORMATS = ("nf4", "fp4", "int8")
FOUR_BIT_FORMATS = ("nf4", "fp4", "int4", "int4-minmax")
MINIMUM_BITSANDBYTES = (0, 46, 1)  # the first that trains 4-bit layers on CPU


# --- bitsandbytes -------------------------------------------------------------------------------------------


def load_bitsandbytes(device: str = "cpu") -> ModuleType:
    """The bitsandbytes module, imported without its notice about an optional CPU kernel and without the traceback that
    it prints where its CUDA library is missing; its other messages pass.

    Call it before PEFT is imported, which imports bitsandbytes by itself. Raises `GaugeError` where bitsandbytes is
    missing or older than 0.46.1, and, with a CUDA ``device``, where it has no kernels for this torch's CUDA.
    """
    for name in NOTICES:
        logging.getLogger(name).addFilter(_is_no_notice)
    try:
        installed = version("bitsandbytes")
        # bitsandbytes makes lookup tables when imported; made under a fake mode they would stay fake for good.
        with unset_fake_temporarily():
            import bitsandbytes
    except (ImportError, PackageNotFoundError) as error:
        raise GaugeError(f"bitsandbytes cannot be imported ({error}); run: pip install bitsandbytes") from error
    numbers = tuple(int(part) for part in installed.split(".")[:3] if part.isdigit())
    if numbers < MINIMUM_BITSANDBYTES:
        raise GaugeError(f"bitsandbytes {installed} is too old for 4 bit on CPU; 0.46.1 or newer is needed")
    if torch.device(device).type == "cuda":
        _check_cuda_kernels(installed)
    module: ModuleType = bitsandbytes
    return module


def _check_cuda_kernels(installed: str) -> None:
    """bitsandbytes imports without its CUDA library too, and fails at the first kernel, with a page of advice."""
    lib = native_library()
    if lib.compiled_with_cuda:
        return
    # What stands in for a library that did not load gives a function for any name that it has not itself.
    facts = vars(lib)
    told = re.sub(r"\S*/", "", one_line(facts.get("error_msg", "it loaded its library for CPUs only"), 160))
    versions = ", ".join(facts.get("available_versions", ()))
    raise GaugeError(
        f"bitsandbytes {installed} has no kernels for this torch's CUDA {torch.version.cuda}: {told}"
        + (f"; it comes with CUDA {versions}" if versions else "")
        + "; install a release of bitsandbytes or of torch that fits the other (python -m bitsandbytes tells more)"
    )


def _is_no_notice(message: logging.LogRecord) -> bool:
    return not str(message.msg).startswith(NOTICES[message.name])


# --- a model's layers ---------------------------------------------------------------------------------------


def quantize_(
    model: nn.Module,
    *,
    quant_format: str = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.float32,
    skip: Sequence[str] | None = None,
    device: str | None = None,
) -> None:
    """Replace ``model``'s linear layers in place by bitsandbytes' ``Linear4bit`` (``"int8"``: ``Linear8bitLt``).

    The layers are those that transformers' integration replaces: ``nn.Linear`` itself, and GPT-2's ``Conv1D`` with its
    weight transposed. Left alone are layers whose name is, or ends in, an entry of ``skip`` (default: the output head,
    whatever its name); layers whose weight is tied to another module's; subclasses of ``nn.Linear``; and what is no
    layer at all, such as the experts of a mixture, one 3-D parameter a layer (`left_unquantised` lists all these).

    Each weight is quantised in blocks of 64 on ``device`` (default: where it is) and its full-precision tensor is let
    go before the next one is touched; so a model that does not fit a GPU in 16 bit is brought there in 4. Where a row
    is no multiple of a block, blocks run across rows, and the last one of a weight may be short. Biases stay as they
    are. ``double_quant`` and ``compute_dtype`` concern the 4-bit formats. The backward pass dequantises to the dtype
    that the weight had before. The model is marked as transformers marks one that it loaded quantised, so PEFT picks
    its own layers for it.

    Two things to know when reading memory:

    - Under ``FakeTensorMode`` and on ``meta`` the layers are the same, but each weight is a plain parameter
      (bitsandbytes' own parameter classes cannot hold a fake tensor) with the same shape, dtype and
      attributes as the real one.
    - On a CPU with AVX-512 BF16, recent bitsandbytes repacks a layer on its first forward in ``eval()`` mode
      without input gradients: double quantisation is undone and the layer then computes in bfloat16. Steps in
      ``train()`` mode are not touched by this.

    Raises `GaugeError` for an unknown format, a model without such a layer, one that is quantised already, weights that
    are not 16- or 32-bit floats, and, on a CPU, rows that this bitsandbytes unpacks wrongly there.
    """
    if quant_format not in LAYER_FORMATS:
        raise unknown("quantised layer format", quant_format, LAYER_FORMATS)
    if getattr(model, "is_quantized", False):
        raise GaugeError("the model is quantised already; start from one in 16 or 32 bit")
    kernels_device = _kernels_device(model, device)
    load_bitsandbytes(kernels_device)
    skip = output_heads(model) if skip is None else skip
    names = _linear_names(model, skip)
    if not names:
        raise GaugeError(_why_none(model, skip))
    _check_mixers(model, names)
    for name in names:  # all are checked first: a refused model is left whole
        _check(name, model.get_submodule(name))
    if quant_format != "int8" and kernels_device == "cpu" and _has_data(model):
        _check_unpacking(model, names, quant_format)
    for name in names:
        linear = _as_linear(model.get_submodule(name))
        if device is not None:
            linear.to(device)
        model.set_submodule(name, _quantised_layer(linear, quant_format, double_quant, compute_dtype))
    _mark(model, quant_format, double_quant, compute_dtype, skip)


def output_heads(model: nn.Module) -> list[str]:
    """The names of ``model``'s output head (lm_head, in RWKV head), which QLoRA does not quantise; ``lm_head`` where
    the model does not tell."""
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    return [name for name, module in model.named_modules() if module is head] if head is not None else ["lm_head"]


def left_unquantised(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The floating-point parameters of ``model`` that are not quantised, by the module or parameter that holds them.

    Names have no layer numbers: the same thing in all layers is one entry. A module's own matrices count under its name
    (``lm_head``), parameters that are no ``weight`` under their own (``mlp.experts.gate_up_proj``), and vectors (norms,
    biases) together under ``norms and biases``.
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
    """Where ``model`` is going to be quantised; weights without data run no kernels, wherever they say they are."""
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
        # A subclass may be used for its weight only, without a call to its forward.
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
    """Why nothing of ``model`` can be quantised, by what stands where its linear layers would be."""
    own = sorted({type(module).__name__ for module in model.modules() if isinstance(module, nn.Linear)} - {"Linear"})
    architecture = type(model).__name__
    if own:
        return (
            f"no layer of {architecture} can be quantised: its linear layers are of a class of its own, "
            f"{', '.join(own)}, which transformers' bitsandbytes integration leaves in 16 bit; train it unquantised "
            f"(lora instead of qlora)"
        )
    return (
        f"no layer of {architecture} can be quantised: it has no linear layers beside those left alone "
        f"({', '.join(skip)}, and weights that are tied)"
    )


def _as_linear(layer: nn.Module) -> nn.Linear:
    """``layer`` itself, or a ``Conv1D`` as the linear layer that it is, its weight transposed (a copy)."""
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
        raise GaugeError(f"{name} is {weight.dtype}; only float32, float16 and bfloat16 weights can be quantised")


def _check_unpacking(model: nn.Module, names: Sequence[str], quant_format: str) -> None:
    """Raise `GaugeError` for a layer whose weight would come back from the CPU's kernel as another one: some releases
    (0.50 among them) take the next block's scale for the end of a block that ends inside a row."""
    for name in names:
        inputs, _ = sizes(model.get_submodule(name))
        if inputs % BLOCK_SIZE and not _unpacks(inputs, quant_format):
            raise GaugeError(
                f"{name} has {inputs} inputs, no multiple of the block size {BLOCK_SIZE}, and the CPU kernel of "
                f"bitsandbytes {version('bitsandbytes')} unpacks such rows wrongly; use a GPU, or int8"
            )


@cache
def _unpacks(inputs: int, quant_format: str) -> bool:
    """Whether rows of ``inputs`` weights are unpacked on the CPU as the same weights are in rows of a block each."""
    functional = load_bitsandbytes().functional
    with unset_fake_temporarily():
        weight = torch.linspace(-1, 1, BLOCK_SIZE * inputs).sin().view(BLOCK_SIZE, inputs)
        packed, state = pack(weight, quant_format)
        by_row = functional.dequantize_4bit(packed, state)
        state.shape = torch.Size((inputs, BLOCK_SIZE))
        return torch.equal(by_row.flatten(), functional.dequantize_4bit(packed, state).flatten())


_MULTIPLIED_BY_HAND = {"MambaMixer": "dt_proj", "FalconMambaMixer": "dt_proj"}
"""Modules of transformers that multiply by the weight of one of their layers in place of calling it."""


def _check_mixers(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        parent, _, own = name.rpartition(".")
        holder = type(model.get_submodule(parent)).__name__
        if _MULTIPLIED_BY_HAND.get(holder) == own:
            raise GaugeError(
                f"{type(model).__name__} cannot be trained quantised: its {holder} multiplies by the weight of {own} "
                f"itself, which is packed then; train it unquantised (lora instead of qlora)"
            )


def _quantised_layer(linear: nn.Linear, quant_format: str, double_quant: bool, compute_dtype: torch.dtype) -> nn.Module:
    eight_bit = quant_format == "int8"
    # The constructors allocate a weight of their own; on meta, outside any fake mode, that costs nothing.
    with unset_fake_temporarily():
        layer = _empty_8bit(linear) if eight_bit else _empty_4bit(linear, quant_format, double_quant, compute_dtype)
    weight = linear.weight.detach()
    if weight.is_meta or is_fake(weight):
        layer.weight = _fake_weight(weight, quant_format, double_quant)
    elif eight_bit:
        # bitsandbytes quantises an 8-bit weight only on its way from the CPU.
        layer.weight = load_bitsandbytes().nn.Int8Params(weight.cpu(), requires_grad=False).to(weight.device)
    else:
        make: Any = load_bitsandbytes().nn.Params4bit
        settings = {"quant_type": quant_format, "compress_statistics": double_quant, "blocksize": BLOCK_SIZE}
        layer.weight = make(weight, module=layer, **settings).to(weight.device)
    layer.bias = linear.bias
    return layer.train(linear.training)


def _empty_8bit(linear: nn.Linear) -> Any:
    return load_bitsandbytes().nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=False,
        has_fp16_weights=False,
        threshold=6.0,  # LLM.int8()'s outlier threshold, transformers' default too
        device="meta",
    )


def _empty_4bit(linear: nn.Linear, quant_format: str, double_quant: bool, compute_dtype: torch.dtype) -> Any:
    return load_bitsandbytes().nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=compute_dtype,
        compress_statistics=double_quant,
        quant_type=quant_format,
        device="meta",
    )


def _fake_weight(weight: Tensor, quant_format: str, double_quant: bool) -> nn.Parameter:
    """A parameter without data, with the attributes of ``Params4bit`` / ``Int8Params`` that layers and PEFT read."""
    attributes: dict[str, Any]
    if quant_format == "int8":
        data, row_scales, _ = load_bitsandbytes().functional.int8_vectorwise_quant(weight.half())
        attributes = {"CB": data, "SCB": row_scales, "has_fp16_weights": False}
    else:
        with _fake_dynamic_code(weight.device):
            data, state = pack(weight, quant_format, double_quant=double_quant)
        attributes = {"quant_state": state, "bnb_quantized": True, "quant_storage": data.dtype}
        attributes |= {"quant_type": quant_format, "compress_statistics": double_quant, "blocksize": BLOCK_SIZE}
    parameter = nn.Parameter(data, requires_grad=False)
    for name, value in attributes.items():
        setattr(parameter, name, value)
    return parameter


@contextmanager
def _fake_dynamic_code(device: torch.device) -> Iterator[None]:
    """Lend bitsandbytes a fake copy of its cached 8-bit code: it cannot compute one in a fake mode nor use
    the real.
    """
    load_bitsandbytes()
    books = code_books()
    books["dynamic"] = torch.empty(256, device=device)
    try:
        yield
    finally:
        del books["dynamic"]  # bitsandbytes computes it again when it next needs one


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
        mark_quantised(model.config, model.dtype)


# --- the formats --------------------------------------------------------------------------------------------


def pack(
    weight: Tensor, quant_format: str, *, double_quant: bool = False, block_size: int = BLOCK_SIZE
) -> tuple[Tensor, Any]:
    """``weight`` as bitsandbytes stores it in ``"nf4"`` or ``"fp4"``: the packed bytes and their
    ``QuantState``.
    """
    packed, state = load_bitsandbytes().functional.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=double_quant, quant_type=quant_format
    )
    return packed, state


def dequantised(
    weight: Tensor, quant_format: str, *, double_quant: bool = False, block_size: int = BLOCK_SIZE
) -> Tensor:
    """``weight`` rounded to ``quant_format`` in blocks and back, as a float32 tensor of the same shape.

    ``"nf4"`` and ``"fp4"`` are bitsandbytes' own. Two kinds of uniform 4-bit integer stand beside them,
    because "INT4" names both: ``"int4"``, symmetric, -7 to 7 times absmax/7 (15 levels, zero among them; a
    float32 absmax, so 4.5 bits a weight in blocks of 64); and ``"int4-minmax"``, 16 levels in equal steps
    from the block's minimum to its maximum, minimum and step in float16 as in GGUF's Q4_1 (4.5 bits too).

    Raises `GaugeError` for an unknown format, a number of weights that is no multiple of ``block_size``, and
    ``double_quant`` with an integer format, which nobody stores that way.
    """
    if quant_format not in FOUR_BIT_FORMATS:
        raise unknown("4-bit format", quant_format, FOUR_BIT_FORMATS)
    if weight.numel() % block_size:
        raise GaugeError(f"{weight.numel()} weights do not divide into blocks of {block_size}")
    weight = weight.detach().float().contiguous()
    if quant_format in ("nf4", "fp4"):
        # A block a row: the CPU's kernel gets rows wrong that are no multiple of a block (`_check_unpacking`).
        blocks = weight.view(-1, block_size)
        packed, state = pack(blocks, quant_format, double_quant=double_quant, block_size=block_size)
        restored: Tensor = load_bitsandbytes().functional.dequantize_4bit(packed, state)
        return restored.view_as(weight)
    if double_quant:
        raise GaugeError(f"double quantisation belongs to nf4 and fp4, not to {quant_format}")
    blocks = weight.view(-1, block_size)
    return (_symmetric(blocks) if quant_format == "int4" else _minmax(blocks)).view_as(weight)


def _symmetric(blocks: Tensor) -> Tensor:
    step = _no_zero(blocks.abs().amax(dim=1, keepdim=True) / 7)
    return (blocks / step).round() * step


def _minmax(blocks: Tensor) -> Tensor:
    low = blocks.amin(dim=1, keepdim=True).half().float()
    step = _no_zero(((blocks.amax(dim=1, keepdim=True) - low) / 15).half().float())
    return ((blocks - low) / step).round().clamp(0, 15) * step + low


def _no_zero(step: Tensor) -> Tensor:
    """A block of equal weights can have step 0; with 1 in its place they are 0 steps away instead of NaN."""
    return step.where(step > 0, 1.0)


def levels(quant_format: str) -> Tensor:
    """The values that ``quant_format`` has for a block of absmax 1, ascending; not for ``"int4-minmax"``,
    whose levels depend on the block.
    """
    if quant_format == "int4":
        return torch.arange(-7, 8) / 7
    if quant_format not in ("nf4", "fp4"):
        raise unknown("4-bit format with levels of its own", quant_format, ("nf4", "fp4", "int4"))
    code: Tensor = load_bitsandbytes().functional.get_4bit_type(quant_format, device="cpu")
    return code.unique()  # sorted; fp4 has two codes for zero


def error_bound(quant_format: str) -> float:
    """The most that one weight can change, in units of its block's absmax, without double quantisation.

    Half the widest gap between two levels. For ``"int4-minmax"`` the range is at most twice absmax, so 1/15,
    and rounding minimum and step to float16 adds at most 2⁻¹¹ of absmax and of the range (constants of normal
    size).
    """
    if quant_format == "int4-minmax":
        return 1 / 15 + 3 * 2**-11
    return levels(quant_format).diff().max().item() / 2


@dataclass(frozen=True)
class QuantisationError:
    """What rounding to a format lost: ``relative_rms`` is ‖W − Q(W)‖ / ‖W‖, ``max_over_absmax`` the largest
    change of one weight in units of its block's absmax, ``mean_abs`` the mean change in the weights' own
    unit.
    """

    relative_rms: float
    max_over_absmax: float
    mean_abs: float


def quantisation_error(
    weight: Tensor, quant_format: str, *, double_quant: bool = False, block_size: int = BLOCK_SIZE
) -> QuantisationError:
    """The error of `dequantised` on ``weight``; raises `GaugeError` as it does, and for a weight of zeros."""
    weight = weight.detach().float()
    norm = weight.norm().item()
    if norm == 0:
        raise GaugeError("all weights are zero: a relative error has no meaning")
    change = (weight - dequantised(weight, quant_format, double_quant=double_quant, block_size=block_size)).abs()
    absmax = _no_zero(weight.reshape(-1, block_size).abs().amax(dim=1))
    largest = change.view(-1, block_size).amax(dim=1)
    return QuantisationError(change.norm().item() / norm, (largest / absmax).max().item(), change.mean().item())


def absmax_shift(weight: Tensor, quant_format: str = "nf4") -> tuple[float, float]:
    """How far double quantisation moves a block's absmax, and how far it may: both in units of the nested
    absmax.

    The largest shift found in ``weight``, and half the widest gap of bitsandbytes' 8-bit dynamic code.
    """
    functional = load_bitsandbytes().functional
    exact = pack(weight, quant_format)[1].absmax
    state = pack(weight, quant_format, double_quant=True)[1]
    rounded = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    unit = state.state2.absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: exact.numel()]
    code = state.state2.code.cpu()
    # Where the code ends short of -1, what lies beyond its first value is rounded up to it: the whole way.
    allowed = max(code.diff().max().item() / 2, code[0].item() + 1)
    return ((rounded - exact).abs() / unit).max().item(), allowed


# --- bits a parameter ---------------------------------------------------------------------------------------


def bits_per_parameter(
    quant_format: str, *, double_quant: bool = False, block_size: int = BLOCK_SIZE, numel: int | None = None
) -> float:
    """Bits that one weight takes with its share of the quantisation constants, by arithmetic.

    For ``"nf4"``, ``"fp4"`` and ``"int4"`` 4 + 32/64 = 4.5; with double quantisation 4 + 8/64 + 32/(64·256) ≈
    4.127 (QLoRA, section 3); for ``"int4-minmax"`` 4 + (16 + 16)/64. That is the limit for a large matrix;
    with ``numel`` weights the last, partly filled blocks and the 32-bit offset of double quantisation count
    too. Codebooks are not in it.
    """
    if quant_format not in FOUR_BIT_FORMATS:
        raise unknown("4-bit format", quant_format, FOUR_BIT_FORMATS)
    if numel is None:
        constants = 8 / block_size + 32 / (block_size * NESTED_BLOCK_SIZE) if double_quant else 32 / block_size
        return 4 + constants
    blocks = math.ceil(numel / block_size)
    constant_bits = 8 * blocks + 32 * math.ceil(blocks / NESTED_BLOCK_SIZE) + 32 if double_quant else 32 * blocks
    return (8 * math.ceil(numel / 2) + constant_bits) / numel


@dataclass(frozen=True)
class StoredBytes:
    """The bytes of one packed 4-bit weight of ``params`` parameters, tensor by tensor.

    ``codebook_bytes`` hold the same values in every layer, though bitsandbytes stores a copy with each: the
    16 levels in float32 and, with double quantisation, the 256 values of the 8-bit code.
    """

    params: int
    packed_bytes: int
    absmax_bytes: int
    nested_absmax_bytes: int
    offset_bytes: int
    codebook_bytes: int

    @property
    def bits_per_parameter(self) -> float:
        """All but the codebooks, which do not grow with the weight."""
        held = self.packed_bytes + self.absmax_bytes + self.nested_absmax_bytes + self.offset_bytes
        return 8 * held / self.params

    @property
    def bits_per_parameter_with_codebooks(self) -> float:
        """As `bits_per_parameter`, with the copy of the codebooks that this weight carries."""
        return self.bits_per_parameter + 8 * self.codebook_bytes / self.params


def stored_bytes(packed: Tensor, state: Any) -> StoredBytes:
    """Count the tensors that hold a packed weight: what `pack` returns, or a layer's weight and its
    ``quant_state``.
    """
    nested = getattr(state, "state2", None)
    return StoredBytes(
        params=math.prod(state.shape),
        packed_bytes=packed.nbytes,
        absmax_bytes=state.absmax.nbytes,
        nested_absmax_bytes=nested.absmax.nbytes if nested is not None else 0,
        offset_bytes=state.offset.nbytes if nested is not None else 0,
        codebook_bytes=state.code.nbytes + (nested.code.nbytes if nested is not None else 0),
    )


# --- weights to try them on, and the claim ------------------------------------------------------------------

SAMPLE_SHAPE = (256, 1024)
WEIGHT_STD = 0.02  # Llama's initialisation; the relative error does not depend on it


def _normal(generator: torch.Generator) -> Tensor:
    return torch.randn(SAMPLE_SHAPE, generator=generator)


def _uniform(generator: torch.Generator) -> Tensor:
    return (torch.rand(SAMPLE_SHAPE, generator=generator) * 2 - 1) * math.sqrt(3)


def _student_t3(generator: torch.Generator) -> Tensor:
    """Student's t with 3 degrees of freedom (heavy tails) over its standard deviation, which is √3."""
    chi_squared = torch.randn((3, *SAMPLE_SHAPE), generator=generator).square().sum(dim=0)
    return torch.randn(SAMPLE_SHAPE, generator=generator) / chi_squared.sqrt()


DISTRIBUTIONS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "normal": _normal,
    "uniform": _uniform,
    "student-t3": _student_t3,
}


def drawn_weight(distribution: str, seed: int) -> Tensor:
    """A 256×1024 float32 weight from ``distribution`` with mean 0 and standard deviation 0.02."""
    if distribution not in DISTRIBUTIONS:
        raise unknown("weight distribution", distribution, DISTRIBUTIONS)
    return DISTRIBUTIONS[distribution](torch.Generator().manual_seed(seed)) * WEIGHT_STD


def already_rounded(weight: Tensor, block_size: int = 32) -> bool:
    """Whether no block of ``weight`` holds more than 16 different values, as after 4-bit rounding in such
    blocks.

    GGUF's 4-bit types have blocks of 32. Weights read from one lie on a uniform grid already, so rounding
    them to a uniform format again costs less than it cost the first time: no fair ground for a comparison of
    formats.
    """
    if weight.numel() % block_size:
        raise GaugeError(f"{weight.numel()} weights do not divide into blocks of {block_size}")
    ordered = weight.detach().float().reshape(-1, block_size).sort(dim=1).values
    most_values = 1 + (ordered.diff(dim=1) != 0).sum(dim=1).max().item()
    return most_values <= 16


@dataclass(frozen=True)
class Comparison:
    """NF4 against a rival format on the same weights, sample by sample.

    ``nf4_errors`` and ``rival_errors`` are relative RMS errors, in pairs; ``nf4_bits`` and ``rival_bits`` are
    bits a parameter; ``unfair`` says why the samples cannot decide, if they cannot.
    """

    rival: str
    nf4_errors: tuple[float, ...]
    rival_errors: tuple[float, ...]
    nf4_bits: float
    rival_bits: float
    unfair: str | None = None

    @property
    def ratios(self) -> tuple[float, ...]:
        """NF4's error over the rival's, a sample each: below 1 where NF4 loses less."""
        return tuple(ours / theirs for ours, theirs in zip(self.nf4_errors, self.rival_errors, strict=True))

    @property
    def p_value(self) -> float:
        """Two-sided sign test: how likely a split at least this uneven is if both formats were equally good."""
        decided = [ratio for ratio in self.ratios if ratio != 1]
        count, wins = len(decided), sum(ratio < 1 for ratio in decided)
        tail = sum(math.comb(count, k) for k in range(min(wins, count - wins) + 1)) / 2**count
        return min(1.0, 2 * tail)

    @property
    def holds(self) -> bool | None:
        """Whether NF4 loses less than the rival; ``None`` (cannot tell) at p ≥ 0.05 or on unfair samples."""
        if self.unfair is not None or self.p_value >= 0.05:
            return None
        return sum(ratio < 1 for ratio in self.ratios) * 2 > len(self.ratios)

    def figures(self) -> dict[str, float | str | None]:
        """The numbers behind `holds`, flat, for a result file."""
        return {
            "rival": self.rival,
            "samples": len(self.ratios),
            "nf4_relative_rms": mean(self.nf4_errors),
            "rival_relative_rms": mean(self.rival_errors),
            "ratio_least": min(self.ratios),
            "ratio_most": max(self.ratios),
            "nf4_bits_per_parameter": self.nf4_bits,
            "rival_bits_per_parameter": self.rival_bits,
            "p_value": self.p_value,
            "unfair": self.unfair,
        }


def compare_nf4(samples: Iterable[Tensor], *, rival: str = "int4", double_quant: bool = False) -> Comparison:
    """NF4 (``double_quant``: with double quantisation, as a ``"fp4"`` rival then has too) against ``rival``.

    Blocks of 64 on both sides. ``samples``: weight matrices, one pair of errors each; six or more are needed
    to tell.
    """
    rival_double_quant = double_quant and rival == "fp4"
    nf4_errors, rival_errors, rounded = [], [], 0
    for weight in samples:
        nf4_errors.append(quantisation_error(weight, "nf4", double_quant=double_quant).relative_rms)
        rival_errors.append(quantisation_error(weight, rival, double_quant=rival_double_quant).relative_rms)
        rounded += already_rounded(weight)
    if not nf4_errors:
        raise GaugeError("no weights to compare the formats on")
    unfair = f"{rounded} of {len(nf4_errors)} samples hold at most 16 values a block: rounded to 4 bit before"
    return Comparison(
        rival=rival,
        nf4_errors=tuple(nf4_errors),
        rival_errors=tuple(rival_errors),
        nf4_bits=bits_per_parameter("nf4", double_quant=double_quant),
        rival_bits=bits_per_parameter(rival, double_quant=rival_double_quant),
        unfair=unfair if rounded else None,
    )


def nf4_against_int4(
    distribution: str, seeds: Iterable[int] = range(8), *, rival: str = "int4", double_quant: bool = False
) -> Comparison:
    """`compare_nf4` on weights drawn from ``distribution``, one sample a seed.

    The literature's INT4 (QLoRA, table 4) is symmetric, here ``"int4"``; ``rival="int4-minmax"`` asks the
    harder question.
    """
    samples = (drawn_weight(distribution, seed) for seed in seeds)
    return compare_nf4(samples, rival=rival, double_quant=double_quant)
