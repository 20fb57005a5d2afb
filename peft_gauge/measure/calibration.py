"""Measure the GPU overheads that plans assume: memory outside tensors, and the allocator's sizes; and the GPU's peak
throughput."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from peft_gauge.clock.peak_throughput import measure_peak_throughput
from peft_gauge.errors import GaugeError
from peft_gauge.memory import allocator
from peft_gauge.memory.ledger import rounded
from peft_gauge.meters.nvml import NvmlMeter

if TYPE_CHECKING:
    from peft_gauge.memory.overheads import DeviceOverheads

SIDE = 256
"""Rows and columns of the products: small, since cuBLAS allocates its whole workspace for a product of any size."""


@dataclass(frozen=True)
class Reading:
    """GPU memory at one moment; ``process_bytes`` is ``None`` if the driver does not list this process.

    ``reserved_bytes``: memory of torch's caching allocator, which is part of the other two.
    """

    device_bytes: int
    process_bytes: int | None
    reserved_bytes: int


def calibrate() -> dict[str, Any]:
    """Calibrate this process's first CUDA device; the result suits `overheads.write_calibration`.

    `measure_overheads`, ``usable_bytes`` (the driver's metric of the device's memory) and the records ``workspaces``
    (`FURTHER`), ``allocator`` (`allocator_sizes`, compute capability), ``nvml`` (the device's bytes before and after,
    whether the driver lists this process) and ``speed`` (`PeakThroughput`, in 16 bit). Raises as
    `measure_overheads` and `measure_peak_throughput` do.
    """
    found = measure_overheads()
    workspaces = {name: found.pop(name) for name in FURTHER}
    properties = torch.cuda.get_device_properties(0)
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    dtype = "bfloat16" if (properties.major, properties.minor) >= (8, 0) else "float16"
    return {
        "usable_bytes": properties.total_memory,
        "workspaces": workspaces,
        "allocator": {**found.pop("allocator"), "compute_capability": [properties.major, properties.minor]},
        "nvml": {**found.pop("nvml"), "cuda_used_bytes": total_bytes - free_bytes, "cuda_total_bytes": total_bytes},
        "speed": measure_peak_throughput("cuda", dtype).as_json(),
        **found,
    }


FURTHER = ("bare_context_bytes", "forward_workspace_bytes", "further_stream_bytes", "further_thread_bytes")
"""Results of `measure_overheads` that plans do not read."""


def measure_overheads() -> dict[str, Any]:
    """The overheads of one process on its first CUDA device.

    Call it before CUDA is in use: `peft_gauge.isolation.run` provides such a process. Keys: ``gpu_name``,
    ``torch_version``, ``measured_on`` (ISO date), ``context_bytes`` (outside the allocator, after a training step of a
    linear layer), ``cublas_workspace_bytes`` (of forward and backward together: a workspace belongs to a handle and a
    stream, a handle to a thread, and autograd runs backward in its own thread), ``cublaslt_workspace_bytes`` (the
    additional workspace of a product with a bias, 0 where the two share one), ``nvml``, ``allocator``
    (`allocator_sizes`), and `FURTHER`: ``bare_context_bytes``, outside the allocator after the first tensor; cuBLAS's
    ``forward_workspace_bytes`` before the first backward; and the workspaces of a product in a further stream and in a
    further thread.

    If the driver does not list this process, the context is the growth of the whole GPU's memory, so no other process
    may start or end on it meanwhile. Raises `GaugeError` if CUDA is in use already or NVML does not respond.
    """
    if torch.cuda.is_initialized():
        raise GaugeError("CUDA is already in use in this process; measure overheads in a new one")
    meter = NvmlMeter()
    reason = meter.why_unavailable()
    if reason is not None:
        raise GaugeError(f"the CUDA context cannot be measured: {reason}")
    before = _read(meter)
    torch.zeros(1, device="cuda")
    bare = _read(meter)
    sizes = allocator_sizes()
    forward_bytes, both_bytes = _cublas_bytes()
    cublaslt_bytes = _cublaslt_bytes()
    _train_a_layer()
    trained = _read(meter)
    return {
        "gpu_name": torch.cuda.get_device_name(),
        "torch_version": torch.__version__,
        "measured_on": datetime.date.today().isoformat(),
        "context_bytes": outside_bytes(before, trained),
        "cublas_workspace_bytes": both_bytes,
        "cublaslt_workspace_bytes": cublaslt_bytes,
        "nvml": {
            "device_bytes_before": before.device_bytes,
            "device_bytes_after": trained.device_bytes,
            "shows_this_process": trained.process_bytes is not None,
        },
        "allocator": sizes,
        "bare_context_bytes": outside_bytes(before, bare),
        "forward_workspace_bytes": forward_bytes,
        "further_stream_bytes": _product_bytes_in(torch.cuda.Stream()),
        "further_thread_bytes": _product_bytes_in_a_thread(),
    }


def allocator_sizes() -> dict[str, int]:
    """The sizes by which the caching allocator allocates, named as in `peft_gauge.memory.allocator`.

    Each is derived from `torch.cuda.memory_stats` after one request: one byte gives the block and the small segment,
    the first size beyond the small pool the large segment, and a size above `MIN_OWN_SEGMENT_BYTES` the multiple to
    which a separate segment is rounded. Call it before a library allocates a workspace: a request would be served from
    the rest of its segment.
    """
    block, small_segment = _taken_by(1)
    _, large_segment = _taken_by(allocator.SMALL_REQUEST_BYTES + 1)
    _, still_small = _taken_by(allocator.SMALL_REQUEST_BYTES)
    own_bytes = allocator.MIN_OWN_SEGMENT_BYTES
    _, own_segment = _taken_by(own_bytes)
    _, rounded_segment = _taken_by(own_bytes + 1)
    return {
        "MIN_BLOCK_BYTES": block,
        "SMALL_SEGMENT_BYTES": small_segment,
        "SMALL_REQUEST_BYTES": allocator.SMALL_REQUEST_BYTES if still_small == small_segment else 0,
        "LARGE_SEGMENT_BYTES": large_segment,
        "MIN_OWN_SEGMENT_BYTES": own_segment,
        "ROUND_LARGE_BYTES": rounded_segment - own_segment,
    }


def _taken_by(nbytes: int) -> tuple[int, int]:
    """Bytes allocated and reserved by a tensor of ``nbytes`` with an empty cache."""
    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    tensor = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    taken = torch.cuda.memory_allocated() - allocated, torch.cuda.memory_reserved() - reserved
    del tensor
    return taken


@dataclass(frozen=True)
class Assumption:
    """One overhead in bytes: as plans assume it (``planned``, with its ``origin``) and as it was ``measured``."""

    name: str
    planned: int
    measured: int
    origin: str

    @property
    def holds(self) -> bool:
        return abs(self.measured - self.planned) <= TOLERANCE.get(self.name, 0) * self.planned


TOLERANCE = {"CUDA context": 0.05, "usable memory": 0.005}
"""Relative difference that is not reported: a context grows with the loaded kernels, and drivers reserve different
amounts of memory. All other values are exact."""


def assumptions(found: Mapping[str, Any], planned: DeviceOverheads, usable_bytes: int | None) -> list[Assumption]:
    """The overheads that plans assume, next to those that `calibrate` ``found``.

    ``planned``: the overheads of a plan without calibration; ``usable_bytes``: the memory in the table of GPUs,
    ``None`` if it lacks this one.
    """
    fields = {
        "CUDA context": "context_bytes",
        "cuBLAS workspaces": "cublas_workspace_bytes",
        "cuBLASLt workspace": "cublaslt_workspace_bytes",
    }
    rows = [
        Assumption(name, getattr(planned, field), found[field], planned.origins[field])
        for name, field in fields.items()
    ]
    if usable_bytes is not None:
        rows.append(Assumption("usable memory", usable_bytes, found["usable_bytes"], "fixtures/gpus.toml"))
    names = {
        "MIN_BLOCK_BYTES": "allocator: block",
        "SMALL_REQUEST_BYTES": "allocator: largest small request",
        "SMALL_SEGMENT_BYTES": "allocator: small segment",
        "LARGE_SEGMENT_BYTES": "allocator: large segment",
        "MIN_OWN_SEGMENT_BYTES": "allocator: least segment of its own",
        "ROUND_LARGE_BYTES": "allocator: its rounding",
    }
    rows += [
        Assumption(title, getattr(allocator, name), found["allocator"][name], "PyTorch's CUDACachingAllocator.cpp")
        for name, title in names.items()
    ]
    return rows


def outside_bytes(before: Reading, now: Reading) -> int:
    """Bytes of this process on the GPU outside the allocator; ``before`` was read before the process used CUDA."""
    own_bytes = now.device_bytes - before.device_bytes if now.process_bytes is None else now.process_bytes
    return own_bytes - now.reserved_bytes


def workspace_bytes(before_bytes: int, after_bytes: int, result_bytes: int) -> int:
    """Bytes an operation allocated in addition to its result, from the allocator's count before and after it (or at its
    peak)."""
    return after_bytes - before_bytes - rounded(result_bytes)


def _read(meter: NvmlMeter) -> Reading:
    """NVML's and the allocator's readings once the device is idle; does not initialize CUDA."""
    reserved_bytes = 0
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        reserved_bytes = torch.cuda.memory_reserved()
    meter.start_phase("overheads")
    metrics: Mapping[str, int | None] = meter.end_phase("overheads")
    device_bytes = metrics["device_bytes"]
    if device_bytes is None:
        raise GaugeError("the CUDA context cannot be measured: the driver no longer reports this device's memory")
    return Reading(device_bytes, metrics["process_bytes"], reserved_bytes)


def _matrices(requires_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Two 16-bit matrices, as in a training step."""
    like: dict[str, Any] = {"dtype": torch.float16, "device": "cuda", "requires_grad": requires_grad}
    return torch.ones(SIDE, SIDE, **like), torch.ones(SIDE, SIDE, **like)


def _cublas_bytes() -> tuple[int, int]:
    """Bytes that stay allocated after a first product, without its result; and after its backward."""
    left, right = _matrices(requires_grad=True)
    before_bytes = torch.cuda.memory_allocated()
    product = torch.mm(left, right)
    forward_bytes = workspace_bytes(before_bytes, torch.cuda.memory_allocated(), product.nbytes)
    product.backward(torch.ones_like(product))
    left.grad = right.grad = None
    del product
    return forward_bytes, workspace_bytes(before_bytes, torch.cuda.memory_allocated(), 0)


def _product_bytes_in(stream: torch.cuda.Stream) -> int:
    """Bytes that stay allocated after a product in ``stream``, without its result."""
    left, right = _matrices(requires_grad=False)
    torch.cuda.synchronize()
    before_bytes = torch.cuda.memory_allocated()
    with torch.cuda.stream(stream):
        product = torch.mm(left, right)
    torch.cuda.synchronize()
    return workspace_bytes(before_bytes, torch.cuda.memory_allocated(), product.nbytes)


def _product_bytes_in_a_thread() -> int:
    """As `_product_bytes_in`, for the current stream of a new thread."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(_product_bytes_in(torch.cuda.current_stream())))
    thread.start()
    thread.join()
    if not found:
        raise GaugeError("a product in a further thread failed; see the traceback above")
    return found[0]


def _cublaslt_bytes() -> int:
    """As `_product_bytes_in`, for a product with a bias; at its peak, since some releases of torch free it."""
    left, right = _matrices(requires_grad=False)
    bias = torch.ones(SIDE, dtype=torch.float16, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated()
    result = torch.addmm(bias, left, right)
    return workspace_bytes(before_bytes, torch.cuda.max_memory_allocated(), result.nbytes)


def _train_a_layer() -> None:
    """Forward, backward and optimizer step, so that the kernels of all three are loaded."""
    layer = torch.nn.Linear(SIDE, SIDE, device="cuda", dtype=torch.float16)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(SIDE, SIDE, device="cuda", dtype=torch.float16)).float().square().mean().backward()
    optimizer.step()
