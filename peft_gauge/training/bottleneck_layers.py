"""The layers of a bottleneck adapter, and their attachment to modules of the base model.

They are apart from `peft_gauge.training.bottleneck` so that methods can be listed without importing torch.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from peft_gauge.errors import GaugeError
from peft_gauge.training.targets import MIXERS, decoder_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ADAPTER_NAME = "bottleneck_adapter"  # the submodule's name on the module whose output it adapts

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "leakyrelu": F.leaky_relu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


class BottleneckAdapter(nn.Module):
    """``hidden + up(activation(down(hidden)))``: ``down`` is (m, d), ``up`` is (d, m), both with a bias.

    A new adapter is the identity, because ``up`` is zero. ``down`` is drawn uniformly from ±1/√d with a zero bias, as
    in He et al. 2022 (arXiv:2110.04366) and as LoRA's A, so that both methods start at the same scale.
    """

    def __init__(
        self,
        hidden: int,
        bottleneck: int,
        nonlinearity: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.down = _linear(_drawn((bottleneck, hidden), device, dtype, generator))
        self.up = _linear(torch.zeros((hidden, bottleneck), device=device, dtype=dtype))
        self.nonlinearity = nonlinearity

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Adapt ``hidden`` (..., d); computed in the adapter's dtype, returned in the dtype of ``hidden``."""
        inner = hidden.to(self.down.weight.dtype)
        update = self.up(ACTIVATIONS[self.nonlinearity](self.down(inner)))
        adapted: torch.Tensor = (inner + update).to(hidden.dtype)
        return adapted

    def extra_repr(self) -> str:
        return f"nonlinearity={self.nonlinearity}"


def _linear(weight: torch.Tensor) -> nn.Linear:
    """A linear layer with ``weight`` and a zero bias; made on meta so that it does not use the global generator."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight)
    layer.bias = nn.Parameter(torch.zeros(weight.shape[0], device=weight.device, dtype=weight.dtype))
    return layer


def _drawn(
    shape: tuple[int, int], device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Uniform in ±1/√(columns), drawn in float32 on the CPU, so the same on every device."""
    weight = torch.empty(shape, device=device, dtype=dtype)
    if weight.is_meta or type(weight) is not torch.Tensor:
        return weight  # meta and fake tensors have no data
    bound = shape[1] ** -0.5
    return weight.copy_(torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator))


class _Adapted(nn.Module):
    """Mixin for the class of a base module: its output, or the first of its outputs, passes through the adapter."""

    base_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)  # the base module's own class is next in line
        adapter = getattr(self, ADAPTER_NAME)
        if isinstance(output, tuple):
            return (adapter(output[0]), *output[1:])
        return adapter(output)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle cannot find a class that was made at run time by name; unpickling makes it again from the base class.
        return _unpickled, (self.base_class,), self.__dict__


def _unpickled(base: type[nn.Module]) -> nn.Module:
    adapted = _adapted_class(base)
    return adapted.__new__(adapted)


_ADAPTED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    if base not in _ADAPTED_CLASSES:
        # Keep the name: transformers finds some classes by it (`_no_split_modules`).
        members = {"__module__": base.__module__, "base_class": base}
        _ADAPTED_CLASSES[base] = type(base.__name__, (_Adapted, base), members)
    return _ADAPTED_CLASSES[base]


def adapt_(module: nn.Module, adapter: BottleneckAdapter) -> None:
    """Pass the output of ``module`` through ``adapter`` from now on. ``module`` keeps its parameters and their names.

    This changes the module's class instead of adding a forward hook. Gradient checkpointing in transformers 5 wraps
    ``forward``: a hook on a decoder block would run outside it, and the adapter's activations would be kept.
    """
    module.add_module(ADAPTER_NAME, adapter.train(module.training))
    module.__class__ = _adapted_class(type(module))


def adapters(model: nn.Module) -> Iterator[tuple[str, BottleneckAdapter]]:
    """The adapters of ``model`` with their full names, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, BottleneckAdapter):
            yield name, module


_FEED_FORWARD = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "mlp_block", "shared_mlp", "moe")
_BARE_FEED_FORWARD = ("fc2",)  # in OPT, the feed-forward's layers belong to the block itself; this is the last one


def adapted_modules(model: nn.Module, style: str) -> dict[str, nn.Module]:
    """The modules whose output gets an adapter, by full name, block by block.

    houlsby: the token mixer (attention, or in a hybrid also linear attention or a state-space layer) and the
    feed-forward, before their residual is added. A block with only one of the two (Nemotron-H) gets one adapter.

    pfeiffer: the whole block, that is, the feed-forward's output with the residual added.

    Raises `GaugeError` for an architecture without such modules.
    """
    names = {module: name for name, module in model.named_modules()}
    blocks = decoder_blocks(model)
    if style == "pfeiffer":
        return {names[block]: block for block in blocks}
    found = [module for block in blocks for module in _sub_layers(model, block)]
    return {names[module]: module for module in found}


def _sub_layers(model: nn.Module, block: nn.Module) -> list[nn.Module]:
    parts = [_part(block, roles) for roles in (MIXERS, (*_FEED_FORWARD, *_BARE_FEED_FORWARD))]
    found = [part for part in parts if part is not None]
    if not found:
        raise GaugeError(
            f"a {type(block).__name__} of {type(model).__name__} has none of the sub-layers "
            f"{', '.join((*MIXERS, *_FEED_FORWARD))}; use the pfeiffer style, which adapts whole blocks"
        )
    return [_before_the_residual(model, part) for part in found]


def _part(block: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    parts = (getattr(block, name, None) for name in names)
    return next((part for part in parts if isinstance(part, nn.Module)), None)


def _before_the_residual(model: nn.Module, part: nn.Module) -> nn.Module:
    """``part``, or its last linear layer if the part adds the residual itself (BLOOM; MPT's feed-forward), since
    Houlsby's adapters come before the residual."""
    if "residual" not in inspect.signature(part.forward).parameters:
        return part
    last = ("dense", "dense_4h_to_h", "down_proj", "out_proj", "o_proj", "c_proj")
    output = _part(part, last)
    if output is None:
        raise GaugeError(
            f"{type(part).__name__} of {type(model).__name__} adds the residual itself and has none of the layers "
            f"{', '.join(last)}; use the pfeiffer style, which adapts whole blocks"
        )
    return output
