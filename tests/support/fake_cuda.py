"""A stand-in for a CUDA device: what lies beneath `torch.cuda`, so that code for a GPU runs to its end without one.

`torch.cuda` itself stays the real one. Its Python code calls functions and classes of `torch._C` that a CUDA build has
in C++; those that a run needs stand here, under their real names, and are put in place before `torch.cuda` is
imported. Whatever is not here fails by its own name: `torch._C` of a build for CPUs lacks it, and that of a CUDA build
has it replaced.

    environment = settings(folder, total_bytes=2 * GIB)   # for a process to be started; its children inherit it

Tensors "on cuda" are the CPU's; `fake_cuda_tensors` marks their storages, and is loaded when CUDA comes into use.
Memory is kept by `peft_gauge.memory.allocator`, which models torch's own allocator; NVML is `fake_cuda_nvml`,
whose metrics follow it. Nothing of this is known to the code under test.

What is not modelled: CUDA graphs, a second GPU, speed. Pinned memory is any memory. Of streams there is only which one
is current, and that each has a workspace of its own: their work is done at once, and their blocks lie in one pool.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from peft_gauge.memory.allocator import NULL_HANDLE, CachingAllocator, OutOfMemory, round_request
from tests.support.paths import ROOT

MIB = 2**20
GIB = 2**30

CUDA_VERSION = "13.0"
NAME = "NVIDIA Stand-in"
UUID = "5add1ed0-0000-4000-8000-000000000001"
CAPABILITY = (9, 0)
SM_CLOCK_MHZ = 1980
CONTEXT_BYTES = 758 * MIB  # as of an H200 under torch 2.11
WORKSPACE_BYTES = 32 * MIB  # of cuBLAS on Hopper, for each handle and stream; a handle belongs to a thread

TOTAL_VARIABLE = "FAKE_CUDA_TOTAL_BYTES"
OTHERS_VARIABLE = "FAKE_CUDA_OTHERS_BYTES"


def settings(folder: Path, *, total_bytes: int = 2 * GIB, others_bytes: int = 0) -> dict[str, str]:
    """The environment of a process that is to see the stand-in's GPU; what starts it is written into ``folder``.

    ``total_bytes``: the GPU's memory; ``others_bytes``: what another process holds of it.
    """
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.path.append({str(ROOT)!r})\nfrom tests.support.fake_cuda import start\nstart()\n"
    )
    (folder / "pynvml.py").write_text("from tests.support.fake_cuda_nvml import *\n")
    inherited = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    card = {TOTAL_VARIABLE: str(total_bytes), OTHERS_VARIABLE: str(others_bytes)}
    # A toy's operators are too small to be shared out: on a busy machine threads would wait for each other most of all.
    # Fresh memory is never zero, so a weight or buffer that nothing wrote shows in the loss.
    how = {"OMP_NUM_THREADS": "1", "MALLOC_PERTURB_": "1", "MALLOC_MMAP_THRESHOLD_": str(32 * MIB)}
    return {**inherited, **card, **how, "PYTHONPATH": path}


# The device -----------------------------------------------------------------------------------------------------------


class Memory:
    """The GPU's memory as torch's allocator has it, with the counters of ``torch.cuda.memory_stats``.

    Storages end wherever Python ends them, within an allocation too: what they give back waits until no one is at work.
    """

    def __init__(self, total_bytes: int, others_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.others_bytes = others_bytes
        self.fraction = 1.0
        self.allocator = CachingAllocator()
        self.history: list[dict[str, Any]] | None = None
        self._sizes: dict[int, int] = {}  # handle -> bytes that were asked for
        self._requested = _Counter()
        self._split = _Counter()
        self._mallocs = 0
        self._taken = 0
        self._lock = threading.Lock()
        self._given: deque[int] = deque()
        self._limit()

    @property
    def free_bytes(self) -> int:
        """What the driver would still hand out."""
        return self.total_bytes - self.others_bytes - CONTEXT_BYTES - self.allocator.reserved_bytes

    def set_fraction(self, fraction: float) -> None:
        self.fraction = fraction
        self._limit()

    def _limit(self) -> None:
        there = self.total_bytes - self.others_bytes - CONTEXT_BYTES
        self.allocator.capacity_bytes = max(0, min(there, int(self.fraction * self.total_bytes)))

    def take(self, nbytes: int) -> int:
        """A block for ``nbytes``; raises torch's error where there is none."""
        with self._lock:
            self._take_back()
            before, retries = self.allocator.reserved_bytes, self.allocator.num_alloc_retries
            try:
                handle = self.allocator.malloc(nbytes)
            except OutOfMemory as error:
                self._note("oom", 0, nbytes)
                raise _out_of_memory(self, error) from None
            if handle == NULL_HANDLE:
                return handle
            grown = self.allocator.reserved_bytes - before
            if grown > 0 and retries == self.allocator.num_alloc_retries:
                self._mallocs += 1
                self._note("segment_alloc", handle, grown)
            self._sizes[handle] = nbytes
            self._taken += 1
            self._requested.change(nbytes)
            self._note("alloc", handle, nbytes)
            self._count_split()
            return handle

    def give(self, handle: int) -> None:
        if handle == NULL_HANDLE:
            return
        self._given.append(handle)
        if self._lock.acquire(blocking=False):
            try:
                self._take_back()
            finally:
                self._lock.release()

    def _take_back(self) -> None:
        while self._given:
            handle = self._given.popleft()
            nbytes = self._sizes.pop(handle)
            self.allocator.free(handle)
            self._requested.change(-nbytes)
            self._note("free_requested", handle, nbytes)
            self._note("free_completed", handle, nbytes)
            self._count_split()

    def _count_split(self) -> None:
        """Free blocks of segments that hold others: they cannot be given back to the driver."""
        allocator = self.allocator
        blocks = [allocator._blocks[address] for pool in _pools(allocator) for _, address in pool]
        now = sum(block.size for block in blocks if block.prev is not None or block.next is not None)
        self._split.change(now - self._split.current)

    def empty_cache(self) -> None:
        with self._lock:
            self._take_back()
            before = {segment.address: segment.size_bytes for segment in self.allocator.segments()}
            self.allocator.empty_cache()
            for address in before.keys() - {segment.address for segment in self.allocator.segments()}:
                self._note("segment_free", address, before[address])
            self._count_split()

    def reset_peak(self) -> None:
        with self._lock:
            self._take_back()
            self.allocator.reset_peak()
            self._requested.peak = self._requested.current
            self._split.peak = self._split.current

    def stats(self) -> dict[str, Any]:
        """As ``torch._C._cuda_memoryStats`` has it; of the pools only "all"."""
        with self._lock:
            self._take_back()
            found = self.allocator
            allocated = {"current": found.allocated_bytes, "peak": found.peak_allocated_bytes}
            reserved = {"current": found.reserved_bytes, "peak": found.peak_reserved_bytes}
            return {
                "num_alloc_retries": found.num_alloc_retries,
                "num_ooms": found.num_ooms,
                "num_device_alloc": self._mallocs,
                "max_split_size": -1,
                "allocation": {"all": {"current": len(self._sizes), "allocated": self._taken}},
                "allocated_bytes": {"all": allocated},
                "active_bytes": {"all": dict(allocated)},
                "reserved_bytes": {"all": reserved},
                "requested_bytes": {"all": self._requested.as_dict()},
                "inactive_split_bytes": {"all": self._split.as_dict()},
            }

    def snapshot(self) -> dict[str, Any]:
        """As ``torch._C._cuda_memorySnapshot`` has it."""
        with self._lock:
            self._take_back()
            segments = []
            for segment in self.allocator.segments():
                blocks: list[dict[str, Any]] = [
                    {
                        "address": block.address,
                        "size": block.size_bytes,
                        "requested_size": self._sizes.get(block.address, 0) if block.allocated else 0,
                        "state": "active_allocated" if block.allocated else "inactive",
                        "frames": [],
                    }
                    for block in segment.blocks
                ]
                allocated = sum(block["size"] for block in blocks if block["state"] == "active_allocated")
                segments.append(
                    {
                        "device": 0,
                        "address": segment.address,
                        "total_size": segment.size_bytes,
                        "allocated_size": allocated,
                        "active_size": allocated,
                        "requested_size": sum(block["requested_size"] for block in blocks),
                        "stream": 0,
                        "segment_type": segment.pool,
                        "segment_pool_id": (0, 0),
                        "is_expandable": False,
                        "frames": [],
                        "blocks": blocks,
                    }
                )
            return {
                "segments": segments,
                "device_traces": [list(self.history or [])],
                "allocator_settings": {},
                "external_annotations": [],
            }

    def _note(self, action: str, address: int, size: int) -> None:
        if self.history is not None:
            self.history.append(
                {
                    "action": action,
                    "device": 0,
                    "addr": address,
                    "size": size if action.startswith("segment") else round_request(size) if size else 0,
                    "stream": 0,
                    "time_us": time.time_ns() // 1000,
                    "frames": [],
                }
            )


class _Counter:
    def __init__(self) -> None:
        self.current = self.peak = self.allocated = self.freed = 0

    def change(self, by: int) -> None:
        self.current += by
        self.peak = max(self.peak, self.current)
        if by > 0:
            self.allocated += by
        else:
            self.freed -= by

    def as_dict(self) -> dict[str, int]:
        return dict(vars(self))


def _pools(allocator: CachingAllocator) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    return allocator._free_small, allocator._free_large


def _out_of_memory(memory: Memory, error: OutOfMemory) -> Exception:
    """torch's error in torch's words (c10/cuda/CUDACachingAllocator.cpp, `malloc`)."""
    import torch

    allowed = f"{_size(error.capacity_bytes)} allowed; " if memory.fraction < 1 else ""
    return torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate {_size(error.segment_bytes)}. GPU 0 has a total capacity of "
        f"{_size(memory.total_bytes)} of which {_size(max(0, memory.free_bytes))} is free. {allowed}"
        f"Of the allocated memory {_size(error.allocated_bytes)} is allocated by PyTorch, and "
        f"{_size(error.fragmentation_bytes)} is reserved by PyTorch but unallocated. If reserved but unallocated "
        "memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See "
        "documentation for Memory Management  (https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
    )


def _size(nbytes: int) -> str:
    """As torch's `format_size` writes it."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (1024, "KiB")):
        if nbytes > unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes} bytes"


class Device:
    """The one GPU, as this process has it."""

    def __init__(self) -> None:
        self.initialised_in: int | None = None  # the process that brought CUDA into use
        self.hidden = False
        self.broken: str | None = None
        self.streams = itertools.count(1)
        self._current = threading.local()
        self.launched = 0  # what was enqueued, counted by recorded events
        self.completed = 0  # up to here the host has waited for it
        self.memory = Memory(int(os.environ.get(TOTAL_VARIABLE, 2 * GIB)), int(os.environ.get(OTHERS_VARIABLE, 0)))

    @property
    def in_use(self) -> bool:
        return self.initialised_in == os.getpid()

    @property
    def stream(self) -> int:
        """The number of this thread's current stream."""
        return getattr(self._current, "stream", 0)

    @stream.setter
    def stream(self, number: int) -> None:
        self._current.stream = number

    def check(self) -> None:
        """After a device-side assert every further call fails, as long as the process lives; in a forked child, all."""
        if _cuda_isInBadFork():
            raise RuntimeError(
                "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use the "
                "'spawn' start method"
            )
        if self.broken is not None:
            import torch

            kind = getattr(torch, "AcceleratorError", RuntimeError)
            raise kind(
                f"CUDA error: {self.broken}\nCUDA kernel errors might be asynchronously reported at some other API "
                "call, so the stacktrace below might be incorrect.\nFor debugging consider passing "
                "CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
            )

    def synchronise(self) -> None:
        self.check()
        self.completed = self.launched


device = Device()


# torch._C's functions -------------------------------------------------------------------------------------------------


def _cuda_init() -> None:
    import torch

    from tests.support import fake_cuda_tensors

    if _cuda_getDeviceCount() == 0:
        raise RuntimeError("No CUDA GPUs are available")
    device.initialised_in = os.getpid()
    torch.cuda._get_device_properties = _get_device_properties  # type: ignore[attr-defined]
    torch.cuda.default_generators = (torch.default_generator,)
    fake_cuda_tensors.put_in_place(device)


def _cuda_isInBadFork() -> bool:
    return device.initialised_in not in (None, os.getpid())


def _cuda_getDeviceCount() -> int:
    """CUDA stops at the first entry of CUDA_VISIBLE_DEVICES that it does not know."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = "0" if visible is None else visible.split(",")[0].strip()
    return 0 if device.hidden or (first != "0" and not f"GPU-{UUID}".startswith(first or "none")) else 1


def _valid(index: int) -> None:
    if not 0 <= index < _cuda_getDeviceCount():
        raise RuntimeError("CUDA error: invalid device ordinal")


def _cuda_getDevice() -> int:
    return 0


def _cuda_setDevice(index: int, /) -> None:
    _valid(index)


def _cuda_exchangeDevice(index: int, /) -> int:
    if index < 0:
        return -1
    _valid(index)
    return 0


def _cuda_hasPrimaryContext(index: int, /) -> bool:
    return device.in_use


def _cuda_synchronize() -> None:
    device.synchronise()


def _cuda_sleep(cycles: int, /) -> None:
    device.check()
    time.sleep(cycles / (SM_CLOCK_MHZ * 1e6))


def _cuda_getArchFlags() -> str:
    return "sm_90"


def _cuda_getCompiledVersion() -> int:
    major, minor = CUDA_VERSION.split(".")
    return 1000 * int(major) + 10 * int(minor)


def _get_device_properties(index: int, /) -> Any:
    _valid(index)
    return _CudaDeviceProperties()


class _Uuid:
    def __str__(self) -> str:
        return UUID


class _CudaDeviceProperties:
    """The names of torch's stub (`torch/_C/__init__.pyi`)."""

    name = NAME
    major, minor = CAPABILITY
    multi_processor_count = 132
    is_integrated = 0
    is_multi_gpu_board = 0
    max_threads_per_multi_processor = 2048
    warp_size = 32
    uuid = _Uuid()
    L2_cache_size = 50 * MIB

    @property
    def total_memory(self) -> int:
        return device.memory.total_bytes


# The allocator


def _cuda_memoryStats(index: int, /) -> dict[str, Any]:
    _valid(index)
    return device.memory.stats()


def _cuda_resetPeakMemoryStats(index: int, /) -> None:
    _valid(index)
    device.memory.reset_peak()


def _cuda_emptyCache() -> None:
    device.synchronise()
    device.memory.empty_cache()


def _cuda_setMemoryFraction(fraction: float, index: int, /) -> None:
    _valid(index)
    device.memory.set_fraction(fraction)


def _cuda_getMemoryFraction(index: int, /) -> float:
    _valid(index)
    return device.memory.fraction


def _cuda_getAllocatorBackend() -> str:
    return "native"


def _cuda_record_memory_history(enabled: str | None, *rest: Any) -> None:
    """``rest``: context, stacks, max_entries, clear_history, … by release; everything is kept, without frames."""
    clear = len(rest) > 3 and rest[3] is True
    if enabled is None:
        device.memory.history = None
    elif device.memory.history is None or clear:
        device.memory.history = []


def _cuda_isHistoryEnabled() -> bool:
    return device.memory.history is not None


def _cuda_memorySnapshot(*_: Any) -> dict[str, Any]:
    return device.memory.snapshot()


class _Cudart:
    """The module `torch._C._cudart`."""

    cudaError = SimpleNamespace(success=0)

    @staticmethod
    def cudaMemGetInfo(index: int, /) -> tuple[int, int]:
        _valid(index)
        return max(0, device.memory.free_bytes), device.memory.total_bytes


# Streams and events


class _CudaStreamBase:
    """A stream by its number, 0 for the default one; work on it is done as soon as it is launched."""

    device_index = 0
    device_type = 1
    stream_id: int
    priority: int

    def __new__(
        cls,
        priority: int = 0,
        stream_id: int | None = None,
        device_index: int = 0,
        device_type: int = 1,
        stream_ptr: int = 0,
    ) -> _CudaStreamBase:
        made = super().__new__(cls)
        made.priority = priority
        made.stream_id = next(device.streams) if stream_id is None else stream_id
        return made

    @property
    def cuda_stream(self) -> int:
        return self.stream_id

    @property
    def device(self) -> Any:
        import torch

        return torch.device("cuda", 0)

    def query(self) -> bool:
        return device.completed == device.launched

    def synchronize(self) -> None:
        device.synchronise()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _CudaStreamBase) and self.stream_id == other.stream_id

    def __hash__(self) -> int:
        return hash(self.stream_id)


class _CudaEventBase:
    """A mark in the stream. It is complete once the host has waited for it or for anything behind it."""

    enable_timing: bool
    cuda_event = 0

    def __new__(
        cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> _CudaEventBase:
        made = super().__new__(cls)
        made.enable_timing = enable_timing
        made._recorded = None
        made._place = 0
        return made

    _recorded: float | None
    _place: int

    def record(self, stream: Any) -> None:
        device.check()
        device.launched += 1
        self._place, self._recorded = device.launched, time.perf_counter()
        self.cuda_event = id(self)

    def wait(self, stream: Any) -> None:
        device.check()

    def query(self) -> bool:
        return self._recorded is None or self._place <= device.completed

    def synchronize(self) -> None:
        device.check()
        device.completed = max(device.completed, self._place)

    def elapsed_time(self, end_event: _CudaEventBase) -> float:
        """Raises in torch's words, for events without timing, unrecorded or not waited for."""
        device.check()
        if not (self.enable_timing and end_event.enable_timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self._recorded is None or end_event._recorded is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        if not (self.query() and end_event.query()):
            raise RuntimeError("CUDA error: device not ready")
        # As coarse as CUDA's own, about half a microsecond.
        return max(0.0005, round((end_event._recorded - self._recorded) * 2e6) / 2e3)


def _cuda_getCurrentStream(index: int, /) -> tuple[int, int, int]:
    _valid(index)
    return device.stream, index, 1


def _cuda_getDefaultStream(index: int, /) -> tuple[int, int, int]:
    _valid(index)
    return 0, index, 1


def _cuda_setStream(stream_id: int, device_index: int, device_type: int) -> None:
    _valid(device_index)
    device.stream = stream_id


def _cuda_getCurrentRawStream(index: int, /) -> int:
    _valid(index)
    return device.stream


def _cuda_isCurrentStreamCapturing() -> bool:
    return False


def _refused(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError(f"torch._C.{name} is not among what tests.support.fake_cuda stands in for")

    return refuse


_CUDAGraph = type("_CUDAGraph", (), {"__new__": _refused("_CUDAGraph")})

STAND_INS: dict[str, Any] = {
    **{
        name: value
        for name, value in list(globals().items())
        if name.startswith(("_cuda_", "_Cuda")) or name == "_CUDAGraph"
    },
    "_cuda_maybeExchangeDevice": _cuda_exchangeDevice,
    "_cudart": _Cudart,
    "_graph_pool_handle": _refused("_graph_pool_handle"),
    "_has_cuda": True,
}


# How it gets into a process -------------------------------------------------------------------------------------------


def start() -> None:
    """What `sitecustomize` calls: everything else happens when torch or bitsandbytes is imported, if ever."""
    sys.meta_path.insert(0, _Finder())


class _Finder:
    """Wraps the import of the modules that need something done around it; each is found by the other finders."""

    around = ("torch", "torch.cuda", "bitsandbytes")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self.around:
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if finder is not self else None
            if spec is not None and spec.loader is not None:
                self._wrap(name, spec.loader)
                return spec
        return None

    def _wrap(self, name: str, loader: Any) -> None:
        real = loader.exec_module
        surroundings = {
            "torch": _before_first_use,
            "torch.cuda": _beneath_torch_cuda,
            "bitsandbytes": _bitsandbytes_for_cpu,
        }[name]

        def exec_module(module: Any) -> None:
            with surroundings():
                real(module)

        loader.exec_module = exec_module


@contextmanager
def _beneath_torch_cuda() -> Iterator[None]:
    core: Any = sys.modules["torch._C"]
    version: Any = sys.modules["torch"].version
    theirs = [name for name in dir(core) if name.startswith("_cuda_")]  # of a CUDA build, which would ask the driver
    for name in theirs:
        theirs_is = getattr(core, name)
        if name in STAND_INS or not callable(theirs_is):
            continue
        # A class stays one: torch names some of them in annotations.
        is_class = isinstance(theirs_is, type)
        setattr(core, name, type(name, (), {"__new__": _refused(name)}) if is_class else _refused(name))
    for name, value in STAND_INS.items():
        setattr(core, name, value)
    version.cuda = CUDA_VERSION
    yield


@contextmanager
def _before_first_use() -> Iterator[None]:
    """Copies to a device that C++ itself makes, without asking the dispatcher, would find no CUDA."""
    yield
    import torch

    for name in ("to", "cuda"):
        setattr(torch.Tensor, name, _first(name, getattr(torch._C.TensorBase, name)))
    for name in ("tensor", "as_tensor", "asarray"):
        setattr(torch, name, _maker(getattr(torch, name)))
    torch.Generator = _generator_of_any_device()  # type: ignore[assignment,misc]


def _first(name: str, real: Any) -> Callable[..., Any]:
    """What brings CUDA into use where a tensor is sent there; then `fake_cuda_tensors` has taken its place."""

    def send(self: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        asked = [*args, *kwargs.values()] if name == "to" else ["cuda"]
        if not any(_is_cuda(each) for each in asked):
            return real(self, *args, **kwargs)
        torch.cuda.init()
        return getattr(self, name)(*args, **kwargs)

    return send


def _is_cuda(asked: Any) -> bool:
    named = asked.split(":")[0] if isinstance(asked, str) else getattr(asked, "type", None)
    return named == "cuda" or (isinstance(asked, int) and not isinstance(asked, bool))


def _maker(real: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        import torch

        if kwargs.get("device") is None and torch._C._len_torch_function_stack() > 0:
            # A device context fills in its device for torch's own function, and does not know this one.
            here = torch.empty(0).device
            kwargs |= {} if here.type == "cpu" else {"device": here}
        if not _is_cuda(kwargs.get("device")):
            return real(*args, **kwargs)
        device, requires_grad = kwargs.pop("device"), kwargs.pop("requires_grad", False)
        return real(*args, **kwargs, device="cpu").to(device).requires_grad_(requires_grad)

    return make


def _generator_of_any_device() -> type:
    import torch

    class Generator(torch._C.Generator):
        """One of the CPU's, which says where it was asked for."""

        place: Any

        def __new__(cls, device: Any = "cpu") -> Generator:
            made = super().__new__(cls, "cpu")  # type: ignore[call-arg]
            made.place = torch.device(device)
            return made

        @property
        def device(self) -> Any:  # type: ignore[override]
            return self.place

    return Generator


@contextmanager
def _bitsandbytes_for_cpu() -> Iterator[None]:
    """Its kernels for CPUs serve tensors that are the CPU's; its library says that it is the one for CUDA."""
    import torch

    torch.cuda.device_count()  # what is counted from now on must not be kept
    device.hidden = True
    try:
        yield
    finally:
        device.hidden = False
    library = sys.modules["bitsandbytes.cextension"].lib
    library.compiled_with_cuda = True
