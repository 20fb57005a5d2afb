"""Autocast as CUDA does it, on a machine without CUDA.

Autocast is a dispatch key of each device: its kernels decide which operators are cast, and how. Plans run on fake
tensors whose device is ``cpu``, so they would follow the CPU's list, which lacks CUDA's layer_norm and softmax. Every
build of torch also registers CUDA's kernels. `cuda_lists` reads from there which operators CUDA has, and from torch's
header how it casts each, and gives them to the CPU's key. Casts, the cache of 16-bit weights and its use in
recomputation are torch's own.

Source: aten/src/ATen/autocast_mode.h and autocast_mode.cpp (torch 2.6 to 2.13).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_gauge._internals import moved
from peft_gauge._internals.torch import (
    autocast_operators,
    autocast_policies,
    end_library,
    operator_named,
    override,
    schema,
    without_cpu_autocast,
)

Kernel = Callable[..., Any]


@contextlib.contextmanager
def as_on_cuda() -> Iterator[tuple[str, ...]]:
    """Make autocast on the CPU what it is on CUDA: its operators, and the state of CUDA's autocast.

    PEFT and bitsandbytes ask ``torch.is_autocast_enabled()``, which is about CUDA: it returns the CPU's state. Yields a
    warning for each operator of CUDA's list whose cast torch's header does not state: it is left as it is.
    """
    with cuda_lists() as warnings, _cuda_answers():
        yield warnings


@contextlib.contextmanager
def _cuda_answers() -> Iterator[None]:
    is_enabled, dtype_of = torch.is_autocast_enabled, torch.get_autocast_dtype
    torch.is_autocast_enabled = lambda device_type="cuda": is_enabled("cpu" if device_type == "cuda" else device_type)
    torch.get_autocast_dtype = lambda device_type: dtype_of("cpu" if device_type == "cuda" else device_type)
    try:
        yield
    finally:
        torch.is_autocast_enabled, torch.get_autocast_dtype = is_enabled, dtype_of


@contextlib.contextmanager
def cuda_lists() -> Iterator[tuple[str, ...]]:
    """Give autocast on the CPU the operators that it has on CUDA; warnings as of `as_on_cuda`."""
    policies, cpu, cuda = autocast_policies(), autocast_operators("CPU"), autocast_operators("CUDA")
    library = torch.library.Library("aten", "IMPL")
    try:
        for name in sorted(cpu - cuda):
            override(library, _unqualified(name), torch.library.fallthrough_kernel, "AutocastCPU")
        for name in sorted(cuda & policies.keys()):
            # torch's own kernel of the CPU casts to 16 bit as CUDA's does, and keeps its cache of weights.
            if policies[name] != "lower_precision_fp" or name not in cpu:
                kernel = _KERNELS[policies[name]](operator_named(name))
                override(library, _unqualified(name), kernel, "AutocastCPU")
        unknown = sorted(name for name in cuda - policies.keys() if name not in _NOT_NEEDED)
        yield tuple(moved("torch", f"policy in its header for autocast of {name}") for name in unknown)
    finally:
        end_library(library)


# cuDNN's own operators are below autocast, or in layers that no causal LM has; CUDA refuses binary_cross_entropy.
_NOT_NEEDED = frozenset(
    {
        "aten::_cudnn_rnn",
        "aten::binary_cross_entropy",
        "aten::cudnn_convolution",
        "aten::cudnn_convolution_transpose",
    }
)


def _unqualified(name: str) -> str:
    return name.removeprefix("aten::")


def _is_eligible(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(each, dtype) for each in value)
    return value.to(dtype) if _is_eligible(value) else value


def _casting(dtype_for: Callable[[Sequence[Any]], torch.dtype]) -> Callable[[Any], Kernel]:
    """Kernels that cast every eligible argument to ``dtype_for(arguments)``; without the cache of weights, which only
    torch's own kernels reach."""

    def kernel_of(operator: Any) -> Kernel:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            dtype = dtype_for([*args, *kwargs.values()])
            with without_cpu_autocast():
                return operator(*_cast(args, dtype), **{name: _cast(each, dtype) for name, each in kwargs.items()})

        return kernel

    return kernel_of


def _lower(arguments: Sequence[Any]) -> torch.dtype:
    return torch.get_autocast_dtype("cpu")


def _widest(arguments: Sequence[Any]) -> torch.dtype:
    wide = any(_is_eligible(each) and each.dtype == torch.float32 for each in _flat(arguments))
    return torch.float32 if wide else _lower(arguments)


def _float32_result(operator: Any) -> Kernel:
    """The operator's own ``dtype`` argument is float32, unless the caller gave one: no copy of the input is made."""
    position = [argument.name for argument in schema(operator).arguments].index("dtype")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = args[position] if len(args) > position else kwargs.get("dtype")
        with without_cpu_autocast():
            if given is None and _is_eligible(args[0]):
                return operator(*args[:position], **{**kwargs, "dtype": torch.float32})
            return operator(*args, **kwargs)

    return kernel


def _float32_appended(operator: Any) -> Kernel:
    """``norm``, by its overload that takes a ``dtype``."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with without_cpu_autocast():
            if _is_eligible(args[0]):
                return torch.ops.aten.norm(*args, **{**kwargs, "dtype": torch.float32})
            return operator(*args, **kwargs)

    return kernel


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


_KERNELS: dict[str, Callable[[Any], Kernel]] = {
    "lower_precision_fp": _casting(_lower),
    "fp32": _casting(lambda arguments: torch.float32),
    "fp32_set_opt_dtype": _float32_result,
    "fp32_append_dtype": _float32_appended,
    "promote": _casting(_widest),
}
