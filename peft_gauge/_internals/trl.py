"""Private parts of TRL. Nothing is imported before it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    import torch

# --- the fused output projection ----------------------------------------------------------------------------


class _Kernel:
    """A Triton kernel, which allocates nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


def has_fused_head() -> bool:
    """Whether the names that `fused_head_on_fakes` replaces exist; a plan warns if they do not."""
    try:
        from trl.kernels import chunked_logprob
        from trl.trainer import utils
    except ImportError:
        return False
    names = ("_use_triton", "_forward_kernel", "_backward_kernel", "_addmm_fp32")
    return hasattr(utils, "_use_triton") and all(hasattr(chunked_logprob, name) for name in names)


def lacks_fused_head() -> bool:
    """Whether this TRL has the fused head, but not the names that `fused_head_on_fakes` replaces."""
    from trl.trainer import utils

    return hasattr(utils, "add_fused_lm_head") and not has_fused_head()


@contextmanager
def fused_head_on_fakes() -> Iterator[None]:
    """While active, `SFTTrainer`'s tiled loss takes CUDA's path: its Triton kernels, without their numbers, and
    products that add to float32 without copies of their factors. Guarded by `has_fused_head`."""
    if not has_fused_head():
        yield
        return
    import torch
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    add = chunked_logprob._addmm_fp32

    def added(acc: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        if a.dtype == torch.float32:
            add(acc, a, b)
        else:  # cuBLAS writes float32 from 16-bit factors; here into the same bytes, since shapes are all that counts
            torch.mm(a, b, out=acc.view(a.dtype)[:, : acc.shape[1]])

    with ExitStack() as stack:
        for module in (chunked_logprob, utils):
            stack.enter_context(patch.object(module, "_use_triton", lambda device: True))
        for name in ("_forward_kernel", "_backward_kernel"):
            stack.enter_context(patch.object(chunked_logprob, name, _Kernel()))
        stack.enter_context(patch.object(chunked_logprob, "_addmm_fp32", added))
        cdiv = SimpleNamespace(cdiv=lambda number, divisor: -(-number // divisor))
        stack.enter_context(patch.object(chunked_logprob, "triton", cdiv, create=True))
        yield


# --- activation offloading ----------------------------------------------------------------------------------


class Offloaded:
    """Bytes of activations in host memory: now, and at most."""

    def __init__(self) -> None:
        self.nbytes = self.peak_bytes = 0

    def add(self, nbytes: int) -> None:
        self.nbytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.nbytes)


class _HostCopy:
    """In place of a tensor in pinned host memory: its copy on the device is new memory there."""

    def __init__(self, make: Any, nbytes: int, offloaded: Offloaded) -> None:
        self._make, self._nbytes, self._offloaded = make, nbytes, offloaded
        offloaded.add(nbytes)

    def copy_(self, source: Any, non_blocking: bool = False) -> _HostCopy:
        return self

    def to(self, device: Any, non_blocking: bool = False) -> torch.Tensor:
        made: torch.Tensor = self._make()
        return made

    def __del__(self) -> None:
        self._offloaded.add(-self._nbytes)


class _Stream:
    """A stream or an event, for which nothing waits."""

    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None: ...


class _TorchOfOffloading:
    """torch as TRL's module of activation offloading sees it: fakes are on the accelerator, and host memory is not."""

    def __init__(self, offloaded: Offloaded) -> None:
        self._offloaded = offloaded
        self.accelerator = SimpleNamespace(current_accelerator=lambda: SimpleNamespace(type="cpu"))

    def __getattr__(self, name: str) -> Any:
        import torch

        return getattr(torch, name)

    def get_device_module(self, device: Any) -> Any:
        stream = _Stream()
        return SimpleNamespace(
            Stream=lambda: stream,
            current_stream=lambda: stream,
            stream=lambda stream: nullcontext(),
            empty_cache=lambda: None,
        )

    def empty_like(self, tensor: torch.Tensor, **kwargs: Any) -> Any:
        import torch

        if "pin_memory" not in kwargs:
            return torch.empty_like(tensor, **kwargs)
        shape, dtype, nbytes = tensor.shape, tensor.dtype, tensor.nbytes
        return _HostCopy(lambda: torch.empty(shape, dtype=dtype), nbytes, self._offloaded)

    def empty(self, *size: Any, **kwargs: Any) -> Any:
        import torch

        if "pin_memory" not in kwargs:
            return torch.empty(*size, **kwargs)
        dtype = kwargs["dtype"]
        (number,) = size
        return _HostCopy(lambda: torch.empty(number, dtype=dtype), number * dtype.itemsize, self._offloaded)


OFFLOADING = ("OffloadActivations", "get_act_offloading_ctx_manager", "torch")
"""Names in TRL's module of activation offloading that `offloading_on_fakes` builds upon."""


def has_offloading() -> bool:
    """Whether `offloading_on_fakes` finds what it replaces; a plan is refused if it does not."""
    try:
        from trl.models import activation_offloading
    except ImportError:
        return False
    return all(hasattr(activation_offloading, name) for name in OFFLOADING)


@contextmanager
def offloading_on_fakes(address: Callable[[torch.UntypedStorage], int]) -> Iterator[Offloaded]:
    """While active, TRL's own activation offloading runs on fake tensors on the CPU as if these were on a GPU: what it
    offloads is released, and what it fetches is allocated. Guarded by `has_offloading`.

    ``address``: of a storage, by which TRL knows a tensor that it has offloaded already.
    """
    import torch
    from trl.models import activation_offloading

    offloaded = Offloaded()
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(patch.object(activation_offloading, "torch", _TorchOfOffloading(offloaded)))
        enter(patch.object(torch.UntypedStorage, "data_ptr", lambda storage: address(storage)))
        enter(patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None))
        yield offloaded
