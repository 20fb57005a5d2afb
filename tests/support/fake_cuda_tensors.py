"""Tensors "on cuda" for `fake_cuda`: the CPU's, whose storages are marked; loaded once CUDA comes into use.

A dispatch mode at the bottom of the stack sees every operator, as a device's kernels would: it makes what is asked for
on "cuda" on the CPU, marks the storages that are born of marked ones, counts them in the allocator's model until they
die, and refuses operands of different devices, in torch's words. `Tensor.device` and its like tell the marked from the
others, in every thread.

Backward runs in a thread of its own, as the engine's threads of a CUDA device do: with the caller's modes, and without
any Python frame below the first operator.

What it does not see: what an operator's kernel allocates for itself. The default generator is the CPU's.
"""

from __future__ import annotations

import _thread
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from itertools import chain, starmap
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from peft_gauge._internals.torch import DispatchMode, current_node, holders, is_fake, schema, storage_key
from peft_gauge.memory.accumulation import dense, lone_holders
from tests.support.fake_cuda import WORKSPACE_BYTES, Device

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")

_aten = torch.ops.aten
_ADD, _ADD_IN_PLACE = _aten.add.Tensor, _aten.add_.Tensor

# What may take operands of both devices.
_MIXES = {"aten::copy_", "aten::_foreach_copy_", "aten::index", "aten::index_put", "aten::index_put_"}
_MIXES |= {"aten::_index_put_impl_", "aten::_unsafe_index", "aten::_unsafe_index_put"}
# The host waits for these.
_WAITS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select"}
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv", "aten::dot"}
_LOOKUPS = {"aten::embedding", "aten::index", "aten::index_select", "aten::gather"}
_OWN_KERNELS = {"aten", "prim", "prims"}

_real: dict[str, Any] = {}


class _Watch(weakref.ref):
    __slots__ = ("handle", "key")

    handle: int
    key: int


class OnCuda(DispatchMode):
    """The mode; one a process, and its ``alive`` are the storages on the GPU."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        lone_holders()  # measured now, since it cannot be from within an operator
        self.device = device
        self.alive: dict[int, _Watch] = {}
        self._local = threading.local()
        self._handles: set[object] = set()  # threads that have a handle of cuBLAS
        self._names: dict[Any, tuple[str, str]] = {}

    # Storages

    def holds(self, tensor: torch.Tensor) -> bool:
        if tensor.layout is not torch.strided:
            return False
        try:
            return storage_key(tensor.untyped_storage()) in self.alive
        except NotImplementedError:  # a tensor without a storage
            return False

    def shows(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is to say that it is on the GPU: to a kernel, which is the CPU's, it is not."""
        return not getattr(self._local, "in_kernel", False) and self.holds(tensor)

    def mark(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        if key not in self.alive:
            handle = self.device.memory.take(storage.nbytes())
            watch = _Watch(storage, self._died)
            watch.key, watch.handle = key, handle
            self.alive[key] = watch

    def _resized(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        watch = self.alive.get(storage_key(storage))
        if watch is not None:
            before, watch.handle = watch.handle, self.device.memory.take(storage.nbytes())
            self.device.memory.give(before)

    def _died(self, watch: Any) -> None:
        del self.alive[watch.key]
        self.device.memory.give(watch.handle)

    # Operators

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if types:  # a subclass that sees its operators itself
            return func(*args, **kwargs)
        name, namespace = self._named(func)
        operands = [*_tensors(args), *_tensors(kwargs.values())]
        inside = [tensor for tensor in operands if self.holds(tensor)]
        asked = kwargs.get("device")
        if asked is not None and asked.type == "cuda":
            _check_ordinal(asked)
            self.device.check()
            kwargs = {**kwargs, "device": CPU}
            born_inside = True
        elif name == "aten::_to_copy":
            born_inside = bool(inside) and not getattr(self._local, "leaving", False)
        else:
            composing = getattr(self._local, "composing", False)
            born_inside = bool(inside) or (not operands and (composing or _called_by_a_node()))
        if kwargs.get("pin_memory"):  # no copy is quicker for it here
            kwargs = {**kwargs, "pin_memory": False}
        if name == "aten::_pin_memory":
            func, args, kwargs = _aten.clone.default, args[:1], {}
        if inside:
            self.device.check()
            if name not in _MIXES:
                _check_devices(operands, inside)
            if name in _WAITS or (name == "aten::_to_copy" and not born_inside):
                self.device.synchronise()
        if func is _ADD and inside and not kwargs and _is_the_engines_sum(args):
            return _ADD_IN_PLACE(*args)
        if born_inside and name in _PRODUCTS:
            self._take_workspace()
        before = {storage_key(tensor.untyped_storage()) for tensor in operands if _has_storage(tensor)}
        out = self._run(func, namespace, args, kwargs, breaks=bool(inside) and name in _LOOKUPS)
        if born_inside:
            for tensor in _tensors((out,)):
                if _has_storage(tensor) and storage_key(tensor.untyped_storage()) not in before:
                    self.mark(tensor)
        if inside and ("resize" in name or name == "aten::set_"):
            self._resized(inside[0])
        return out

    def _named(self, func: Any) -> tuple[str, str]:
        if func not in self._names:
            name = schema(func).name
            self._names[func] = name, name.partition("::")[0]
        return self._names[func]

    def _run(self, func: Any, namespace: str, args: Any, kwargs: Any, *, breaks: bool) -> Any:
        self._local.in_kernel = namespace not in _OWN_KERNELS  # one in Python asks where its operands are
        try:
            return func(*args, **kwargs)
        except IndexError:
            if not breaks:
                raise
            self.device.broken = "device-side assert triggered"  # known to the host only when it asks next
            return _shaped(func, args, kwargs)
        finally:
            self._local.in_kernel = False

    def _take_workspace(self) -> None:
        thread: object = _thread.get_ident()
        place = _engine_threads.get(thread, (thread, self.device.stream))  # type: ignore[call-overload]
        if place not in self._handles:
            self._handles.add(place)
            self.device.memory.take(WORKSPACE_BYTES)

    @contextmanager
    def composing(self) -> Iterator[None]:
        """An operator of C++ that is made of others, and that makes tensors with the options of its operands."""
        self._local.composing = True
        try:
            yield
        finally:
            self._local.composing = False

    @contextmanager
    def leaving(self, leaving: bool) -> Iterator[None]:
        """A copy to the CPU, and not one that autograd makes with the options of a tensor that seems to be there."""
        self._local.leaving = leaving
        try:
            yield
        finally:
            self._local.leaving = False


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _has_storage(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided


def _check_ordinal(device: torch.device) -> None:
    if device.index not in (None, 0):
        raise RuntimeError("CUDA error: invalid device ordinal")


def _check_devices(operands: Sequence[torch.Tensor], inside: Sequence[torch.Tensor]) -> None:
    on_card = set(map(id, inside))
    for tensor in operands:
        if id(tensor) not in on_card and tensor.dim() > 0 and _real["device"].__get__(tensor).type == "cpu":
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
            )


def _called_by_a_node() -> bool:
    """Whether an autograd node of C++ makes a tensor, which it does with the options of its operands."""
    if current_node() is None:
        return False
    frame: Any = sys._getframe().f_back
    while frame is not None and (
        frame.f_code.co_name == "__torch_dispatch__" or frame.f_code.co_filename.endswith(("_ops.py", "eval_frame.py"))
    ):
        frame = frame.f_back
    return frame is None or frame.f_code.co_name == "_engine_run_backward"


def _is_the_engines_sum(args: Sequence[Any]) -> bool:
    """Whether the engine adds two gradients, of which nothing but itself holds the first: without a mode it does that
    in place (torch/csrc/autograd/input_buffer.cpp)."""
    if len(args) != 2 or torch.is_grad_enabled() or not _called_by_a_node():
        return False
    left, right = args
    alike = isinstance(right, torch.Tensor) and (left.shape, left.dtype) == (right.shape, right.dtype)
    if not alike or not dense(left):
        return False
    tensor_holders, storage_holders = holders(left)
    lone_tensor, lone_storage = lone_holders()
    return tensor_holders <= lone_tensor and storage_holders <= lone_storage


def _shaped(func: Any, args: Any, kwargs: Any) -> Any:
    """What the operator would have returned, with nothing in it."""
    from torch.utils._pytree import tree_map_only

    on_meta = func(*tree_map_only(torch.Tensor, lambda each: each.to("meta"), args), **kwargs)
    return tree_map_only(torch.Tensor, lambda each: torch.empty(each.shape, dtype=each.dtype), on_meta)


# Tensor's attributes --------------------------------------------------------------------------------------------------


def put_in_place(device: Device) -> None:
    """Push the mode below all others of this thread, and teach `torch.Tensor` to tell where it is."""
    mode = OnCuda(device)
    _push_at_the_bottom(mode)
    base = torch._C.TensorBase
    for name in ("device", "is_cuda", "is_cpu", "get_device", "to", "cpu", "cuda", "numpy", "new_tensor"):
        _real[name] = getattr(base, name)
    _real["__deepcopy__"] = torch.Tensor.__deepcopy__
    for name, value in _attributes(mode).items():
        setattr(torch.Tensor, name, value)
    _replace_groups(mode)
    functional: Any = torch.nn.functional
    functional.scaled_dot_product_attention = _composed(mode, functional.scaled_dot_product_attention)
    _join_new_threads(mode)
    torch.autograd.Variable._execution_engine = _Engine(torch.autograd.Variable._execution_engine, mode)  # type: ignore[assignment]


def _push_at_the_bottom(mode: OnCuda) -> None:
    above = []
    while torch._C._len_torch_dispatch_stack() > 0:
        above.append(torch._C._pop_torch_dispatch_stack(None))
    torch._C._push_on_torch_dispatch_stack(mode)
    for each in reversed(above):
        torch._C._push_on_torch_dispatch_stack(each)


def _composed(mode: OnCuda, function: Any) -> Any:
    """``function``, up to torch 2.7 attention in float32 with its causal mask."""

    @wraps(function)
    def call(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with mode.composing() if mode.holds(query) else nullcontext():
            return function(query, *args, **kwargs)

    return call


def _attributes(mode: OnCuda) -> dict[str, Any]:
    def place(tensor: torch.Tensor) -> torch.device:
        return CUDA if mode.shows(tensor) else _real["device"].__get__(tensor)

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        target, how = _parsed(args, kwargs)
        here = self.device
        if target is None or is_fake(self) or {here.type, target.type} - {"cpu", "cuda"}:
            return _real["to"](self, *args, **kwargs)
        if target.type == "cuda":
            torch.cuda._lazy_init()
            _check_ordinal(target)
        if target.type == here.type:
            dtype = how.pop("dtype", None) or self.dtype
            return _real["to"](self, dtype, **how)
        how.pop("copy", None)
        with mode.leaving(target.type == "cpu"):
            return _aten._to_copy.default(self, device=CUDA if target.type == "cuda" else CPU, **how)

    def cuda(self: torch.Tensor, device: Any = None, non_blocking: bool = False, **how: Any) -> torch.Tensor:
        return self.to(CUDA if device is None else device, non_blocking=non_blocking, **how)

    def cpu(self: torch.Tensor, **how: Any) -> torch.Tensor:
        return self.to(CPU, **how)

    def numpy(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if mode.shows(self):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory "
                "first."
            )
        return _real["numpy"](self, *args, **kwargs)

    def new_tensor(self: torch.Tensor, data: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.pop("device", self.device)
        return _real["new_tensor"](self, data, **kwargs).to(device)

    def deepcopy(self: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) in memo or type(self) is not torch.Tensor or not mode.holds(self) or not self.is_leaf:
            return _real["__deepcopy__"](self, memo)
        # torch copies the storage itself, past the dispatcher.
        memo[id(self)] = copied = self.detach().clone().requires_grad_(self.requires_grad)
        return copied

    def get_device(self: torch.Tensor) -> int:
        return 0 if mode.shows(self) else _real["get_device"](self)

    return {
        "device": property(place),
        "is_cuda": property(mode.shows),
        "is_cpu": property(lambda tensor: not mode.shows(tensor) and _real["is_cpu"].__get__(tensor)),
        "__deepcopy__": deepcopy,
        "get_device": get_device,
        "to": to,
        "cuda": cuda,
        "cpu": cpu,
        "numpy": numpy,
        "new_tensor": new_tensor,
    }


def _parsed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.device | None, dict[str, Any]]:
    """The device that `Tensor.to` is asked for, if any, and the rest of the call by name."""
    how = dict(kwargs)
    rest = list(args)
    target: Any = how.pop("device", None)
    other = how.pop("other", None)
    if rest and isinstance(rest[0], torch.Tensor):
        other = rest.pop(0)
    elif rest and not isinstance(rest[0], torch.dtype):
        target = rest.pop(0)
    if other is not None:
        target, how["dtype"] = other.device, other.dtype
    names = ("dtype", "non_blocking", "copy") if other is None else ("non_blocking", "copy")
    how.update(zip(names, rest, strict=False))
    if isinstance(target, int):
        target = torch.device("cuda", target)
    return None if target is None else torch.device(target), how


def _join_new_threads(mode: OnCuda) -> None:
    """Modes belong to a thread, and a device to all: threads that are started from now on have it too."""
    thread: Any = threading.Thread
    real = thread._bootstrap_inner

    def begin(self: threading.Thread) -> None:
        with mode:
            real(self)

    thread._bootstrap_inner = begin


def _replace_groups(mode: OnCuda) -> None:
    core: Any = torch._C
    real = core._group_tensors_by_device_and_dtype

    def group(lists: Any, with_indices: bool = False) -> Any:
        groups = real(lists, with_indices)
        return {
            (CUDA if any(mode.holds(each) for each in members[0][0]) else device, dtype): members
            for (device, dtype), members in groups.items()
        }

    core._group_tensors_by_device_and_dtype = group


# Backward -------------------------------------------------------------------------------------------------------------

_engine_threads: dict[int, tuple[str, int]] = {}
"""Threads of the engine that live; backward runs on the streams of forward, here on the caller's."""


class _Engine:
    """The engine, which runs what is on the GPU in a thread of its own."""

    def __init__(self, real: Any, mode: OnCuda) -> None:
        self._real_engine = real
        self._mode = mode

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real_engine, name)

    def _engine_run_backward(self, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        """Named as torch's own caller of the engine, which code that looks at frames goes by."""
        run = partial(self._real_engine.run_backward, tensors, *args, **kwargs)
        on_card = any(isinstance(root, torch.Tensor) and self._mode.holds(root) for root in tensors)
        if not on_card or _thread.get_ident() in _engine_threads:  # a reentrant one stays in the device's thread
            return run()
        return _in_a_thread_without_frames(run, self._mode.device.stream)

    run_backward = _engine_run_backward


def _in_a_thread_without_frames(run: Callable[[], Any], stream: int) -> Any:
    """What ``run`` returns or raises, called where no Python function is below it.

    All that the thread does is C: it takes the caller's modes, runs, gives the modes back (a mode that is left to a
    dying thread can deadlock it), and lets the caller go on.
    """
    dispatch = _get_current_dispatch_mode_stack()
    function = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
    known, done = _thread.allocate_lock(), _thread.allocate_lock()
    known.acquire()
    done.acquire()
    results: list[Any] = []
    failures: list[BaseException] = []
    pops: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        *[(torch._C._pop_torch_dispatch_stack, (None,)) for _ in dispatch],
        *[(torch._C._pop_torch_function_stack, ()) for _ in function],
    ]
    calls = chain(
        starmap(known.acquire, [()]),
        map(torch._C._push_on_torch_function_stack, function),
        map(torch._C._push_on_torch_dispatch_stack, dispatch),
        starmap(run, [()]),
        *[starmap(pop, [arguments]) for pop, arguments in pops],
        starmap(done.release, [()]),
    )
    work = results.extend

    def failed(unraisable: Any) -> None:
        """Called in that thread, in place of a message."""
        named = unraisable.object is None and "thread started by" in str(unraisable.err_msg)  # Python 3.13
        if unraisable.object is not work and not named:
            before(unraisable)
            return
        failures.append(unraisable.exc_value)
        for pop, arguments in pops:
            pop(*arguments)
        done.release()

    before, sys.unraisablehook = sys.unraisablehook, failed
    try:
        thread = _thread.start_new_thread(work, (calls,))
        _engine_threads[thread] = ("engine", stream)
        known.release()
        done.acquire()
    finally:
        sys.unraisablehook = before
    del _engine_threads[thread]
    if failures:
        raise failures[0]
    return results[1 + len(function) + len(dispatch)]
