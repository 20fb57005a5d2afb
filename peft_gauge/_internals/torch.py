"""Private parts of torch."""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses import fake_impls, fake_tensor
from torch.utils import _python_dispatch, flop_counter

# --- fake tensors -------------------------------------------------------------------------------------------

FakeTensor = fake_tensor.FakeTensor
"""A tensor with a shape and no data; plans consist of them. Unguarded: without it there is no plan."""

FakeTensorMode = fake_tensor.FakeTensorMode
"""The mode under which operators create fake tensors. Unguarded, too."""

is_fake = fake_tensor.is_fake
"""Whether a tensor is fake, or wraps a fake one. Unguarded."""

unset_fake_temporarily = fake_tensor.unset_fake_temporarily
"""Leaves the fake mode for a block that needs real values, such as a library's tables. Unguarded."""

NEEDS_VALUES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedOperatorException,
)
"""Exceptions of a fake tensor where an operator needs values; they become `CannotPlan`. Unguarded."""


def shape_rules() -> dict[Any, Callable[..., Any]]:
    """The table of fake implementations by operator overload; a plan adds entries and removes them afterwards."""
    return fake_impls.op_implementations_dict


# --- dispatch -----------------------------------------------------------------------------------------------

TorchDispatchMode = _python_dispatch.TorchDispatchMode
"""Sees every dispatched operator. Unguarded: torch documents it, although in a private module."""

without_modes = _python_dispatch._disable_current_modes
"""Leaves all dispatch modes for a block: the tracker's probe of reference counts needs real tensors. Unguarded."""


class DispatchMode(TorchDispatchMode):
    """A dispatch mode without the guard against a compiler (none runs here), which would double the cost of each call.

    A torch without that guard never calls this.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def schema(func: Any) -> Any:
    """The schema of an operator overload: its qualified name and its arguments. Unguarded."""
    return func._schema


def packet(func: Any) -> Any:
    """The operator that ``func`` is an overload of: FLOP formulas are registered for it. Unguarded."""
    return func._overloadpacket


def composite(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """The operator's own decomposition, bypassing any registered override. Unguarded."""
    return operator._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)


def below_autograd() -> Any:
    """A context in which operators are called below autograd, as from a backend's kernel. Unguarded."""
    return torch._C._AutoDispatchBelowAutograd()


def end_library(library: torch.library.Library) -> None:
    """Removes a library's kernels at once instead of at garbage collection. Unguarded."""
    library._destroy()


def flop_formulas() -> dict[Any, Callable[..., Any]]:
    """torch's table of FLOP formulas by operator packet; `register_flop_formula`, which is public, adds to it.
    Unguarded."""
    return flop_counter.flop_registry


# --- autocast -----------------------------------------------------------------------------------------------

_POLICY_MACROS = {
    "AT_FORALL_LOWER_PRECISION_FP": "lower_precision_fp",
    "AT_FORALL_FP32": "fp32",
    "AT_FORALL_FP32_SET_OPT_DTYPE": "fp32_set_opt_dtype",
    "AT_FORALL_PROMOTE": "promote",
}


@cache
def autocast_operators(device: str) -> frozenset[str]:
    """The operators for which autocast has a kernel on ``device`` (``"CPU"``, ``"CUDA"``), in any build of torch.
    Held by a contract test."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = torch._C._dispatch_get_all_op_names()
    return frozenset(name for name in names if name.startswith("aten::") and has_kernel(name, f"Autocast{device}"))


@cache
def autocast_policies() -> dict[str, str]:
    """Operator of CUDA's list -> its policy, by torch's own name, from torch's header; empty without the header.
    Held by a contract test."""
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    text = header.read_text(encoding="utf-8", errors="replace") if header.is_file() else ""
    found: dict[str, str] = {}
    for macro, policy in _POLICY_MACROS.items():
        body = re.search(rf"#define {macro}\(_\)((?:[^\n]*\\\n)*[^\n]*)", text)
        for name, overload in re.findall(r"_\((\w+)(?:,\s*(\w+))?\)", body[1] if body else ""):
            found[f"aten::{name}" + (f".{overload}" if overload else "")] = policy
    appended = re.search(r"#define AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE\(_\)((?:[^\n]*\\\n)*[^\n]*)", text)
    for name in re.findall(r'"([\w.]+)"', appended[1] if appended else ""):
        found[f"aten::{name}"] = "fp32_append_dtype"
    return found


def operator_named(name: str) -> Any:
    """The overload that torch registers as ``name``, such as ``aten::softmax.int``. Unguarded."""
    packet_name, _, overload = name.removeprefix("aten::").partition(".")
    return getattr(getattr(torch.ops.aten, packet_name), overload or "default")


def override(library: torch.library.Library, name: str, kernel: Any, key: str) -> None:
    """Registers ``kernel`` in place of torch's own for this dispatch key. torch 2.6 has no argument to allow that, and
    only warns."""
    allowed = {"allow_override": True} if "allow_override" in inspect.signature(library.impl).parameters else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        library.impl(name, kernel, key, **allowed)


def without_cpu_autocast() -> Any:
    """A block in which autocast's kernels for the CPU are passed by, as they do it themselves. Unguarded."""
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU))


def scaler_tensors(scaler: torch.amp.GradScaler) -> list[torch.Tensor]:
    """The scale and its growth counter, which a `GradScaler` creates with its first loss. Held by a contract test."""
    return [each for each in (scaler._scale, scaler._growth_tracker) if each is not None]


def without_overflow(scaler: torch.amp.GradScaler) -> None:
    """Lets a `GradScaler` step without reading whether a gradient overflowed, a value that a fake tensor does not have.
    Held by a contract test."""

    def step(optimizer: torch.optim.Optimizer, state: Any, *args: Any, **kwargs: Any) -> Any:
        return optimizer.step(*args, **kwargs)

    scaler._maybe_opt_step = step  # type: ignore[assignment]


# --- the compiler ------------------------------------------------------------------------------------------


@contextmanager
def compiled_when_called() -> Iterator[None]:
    """While active, ``torch.compile`` compiles a function at its first call. bitsandbytes compiles two of its functions
    as it is imported, which imports torch's whole compiler: more than a second, in every process."""
    at_once = torch.compile

    def when_called(function: Any = None, **options: Any) -> Any:
        if function is None:
            return lambda function: when_called(function, **options)
        if not inspect.isfunction(function):
            return at_once(function, **options)
        compiled = cache(lambda: at_once(function, **options))

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return (function if _as_written else compiled())(*args, **kwargs)

        return call

    with patch.object(torch, "compile", when_called):
        yield


_as_written = 0
"""The number of `uncompiled` blocks that are active."""


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run functions as they are written, which ``torch.compile`` would compile, without importing torch's compiler."""
    global _as_written
    # Those compiled at once have imported it; `compiled_when_called` has the others.
    with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
        _as_written += 1
        try:
            yield
        finally:
            _as_written -= 1


@contextmanager
def no_initial_values() -> Iterator[None]:
    """Leave new weights of modules as they are allocated. On ``meta`` they have no values, but the functions that draw
    them take a third of the time to build a model, and PEFT draws an adapter's before it moves them to ``meta``."""

    def unfilled(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return tensor

    with ExitStack() as stack:
        for name in ("kaiming_uniform_", "normal_", "uniform_", "zeros_"):
            stack.enter_context(patch.object(nn.init, name, unfilled))
        yield


# --- operators of aten without a public name ----------------------------------------------------------------


def flash_attention(*args: Any, **kwargs: Any) -> Any:
    """CUDA's flash attention, whose shape rule every build of torch has; the CPU's attention is routed to it."""
    return torch.ops.aten._scaled_dot_product_flash_attention(*args, **kwargs)


def efficient_attention(*args: Any, **kwargs: Any) -> Any:
    """CUDA's memory-efficient attention; used in the same way."""
    return torch.ops.aten._scaled_dot_product_efficient_attention(*args, **kwargs)


@cache
def flash_broadcasts_one_head() -> bool:
    """Whether this torch passes a single key head to flash attention without ``enable_gqa``, according to its own
    header; False for a torch without the header."""
    header = Path(torch.__file__).parent / "include/ATen/native/transformers/sdp_utils_cpp.h"
    return header.is_file() and "supports_mqa" in header.read_text(encoding="utf-8", errors="replace")


def safe_softmax(*args: Any, **kwargs: Any) -> Any:
    """The softmax of attention's math path, with zeros for a fully masked row. Unguarded."""
    return torch.ops.aten._safe_softmax(*args, **kwargs)


def sparse_coo(*args: Any, **kwargs: Any) -> torch.Tensor:
    """A sparse tensor from its parts, without reading values to check ``is_coalesced``. Unguarded."""
    made: torch.Tensor = torch.ops.aten._sparse_coo_tensor_with_dims_and_tensors.default(*args, **kwargs)
    return made


def sparse_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and values of a sparse tensor, coalesced or not (the public names reject the latter). Unguarded."""
    return tensor._indices(), tensor._values()


# --- autograd -----------------------------------------------------------------------------------------------

ACCUMULATE_GRAD = "torch::autograd::AccumulateGrad"
"""The name of the node that writes a gradient; a tensor that passes through it is a gradient. Guarded by a test."""


def current_node() -> Any:
    """The autograd node that runs now in this thread; `None` outside a backward pass. Unguarded."""
    return torch._C._current_autograd_node()


def next_sequence_number() -> int:
    """The number of this thread's next autograd node: it identifies forward's modules in backward."""
    return torch._C._autograd._get_sequence_nr()


def sequence_number(node: Any) -> int:
    """The number of an autograd node. Unguarded."""
    return int(node._sequence_nr())


def called_by_engine(frame: Any) -> bool:
    """Whether no Python code runs between the engine and a mode's dispatch (device threads have no frames at all).

    Based on names of torch's own Python functions; without them gradients are not summed in place (contract test).
    """
    frame = frame.f_back  # from the mode's dispatch to its caller; None on a device's thread
    while frame is not None and frame.f_code.co_filename.endswith("eval_frame.py"):
        frame = frame.f_back
    return frame is None or frame.f_code.co_name == "_engine_run_backward"


def hooks_of(tensor: torch.Tensor) -> tuple[list[Any], list[Any]]:
    """A tensor's gradient hooks, and those after accumulation: a fake of it gets them too. Unguarded."""
    after = tensor._post_accumulate_grad_hooks
    return list((tensor._backward_hooks or {}).values()), list((after or {}).values())


# --- storages -----------------------------------------------------------------------------------------------


def storage_key(storage: torch.UntypedStorage) -> int:
    """The address of a storage's implementation: the same for every view, and valid for fakes without data pointer."""
    return int(storage._cdata)


def holders(tensor: torch.Tensor) -> tuple[int, int]:
    """Reference counts of a tensor and of its storage. Guarded by a probe: only differences from its counts matter."""
    count = tensor._use_count()  # type: ignore[attr-defined]
    return count, torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def wraps_tensors(kind: type) -> bool:
    """Whether ``kind`` is a subclass of tensors that consist of others, such as torchao's quantized states."""
    return hasattr(kind, "__tensor_flatten__")


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that ``tensor`` consists of, if its class wraps others; else itself. By torch's protocol for such
    classes, which a contract test holds."""
    if not wraps_tensors(type(tensor)):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [part for name in names for part in parts_of(getattr(tensor, name))]


# --- modules ------------------------------------------------------------------------------------------------


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """A module's own parameters by name, to replace without `setattr`, which would check and reorder. Unguarded."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """A module's own buffers by name; used in the same way."""
    return module._buffers


def modules_of(module: nn.Module) -> dict[str, Any]:
    """A module's own children by name; used in the same way."""
    return module._modules


@contextmanager
def moves_fakes() -> Iterator[None]:
    """While active, `nn.Module.to` assigns ``data`` where a tensor changes: torch would swap a fake for another, which
    their weak references forbid. Guarded by the plans of trainers, which move every model."""

    def apply(module: Any, function: Callable[[Any], Any], recurse: bool = True) -> Any:
        for child in module.children() if recurse else ():
            child._apply(function)
        with torch.no_grad():
            for parameter in filter(lambda each: each is not None, module._parameters.values()):
                moved = function(parameter)
                if (moved.dtype, moved.device) != (parameter.dtype, parameter.device):
                    parameter.data = moved
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = function(buffer)
        return module

    with patch.object(nn.Module, "_apply", apply):
        yield


# --- optimizers ---------------------------------------------------------------------------------------------


@contextmanager
def foreach_on_fakes() -> Iterator[None]:
    """While active, optimizers and clipping choose for fakes on the CPU as for tensors on CUDA: by lists of tensors.
    A missing name raises `AttributeError`."""
    from torch.optim import optimizer
    from torch.utils import _foreach_utils as utils

    devices = [*utils._get_foreach_kernels_supported_devices(), "cpu"]
    with ExitStack() as stack:
        for module in (optimizer, utils):
            types = [*module._foreach_supported_types, FakeTensor]
            stack.enter_context(patch.object(module, "_foreach_supported_types", types))
            stack.enter_context(patch.object(module, "_get_foreach_kernels_supported_devices", lambda: devices))
        yield


# --- the CUDA allocator's history -----------------------------------------------------------------------------


def memory_history(on: bool, most_events: int) -> None:
    """Turns the record of allocations and frees on, with the stack of each allocation, or off (which clears it).

    Used for the trace of a step. Guarded by a contract test of its arguments; torch's documentation names it.
    """
    if on:
        torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python", max_entries=most_events)
    else:
        torch.cuda.memory._record_memory_history(None)


def memory_snapshot() -> dict[str, Any]:
    """The recorded history and the blocks in use, as plain values. Guarded by a contract test."""
    found: dict[str, Any] = torch.cuda.memory._snapshot()
    return found


# --- CUDA ---------------------------------------------------------------------------------------------------


def in_bad_fork() -> bool:
    """Whether this process was forked from a process that had initialized CUDA, which then cannot be used here.

    True if torch does not have the check: a process is then spawned that could have been forked.
    """
    ask = getattr(torch.cuda, "_is_in_bad_fork", None)
    return True if ask is None else bool(ask())
