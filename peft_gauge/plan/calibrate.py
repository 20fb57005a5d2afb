"""Measures, on the card itself, the device memory that no tensor accounts for: what `overheads` has estimates of."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from peft_gauge.errors import GaugeError
from peft_gauge.meters.nvml import NvmlMeter
from peft_gauge.plan.tracker import rounded

SIDE = 256
"""Rows and columns of the products: small, but cuBLAS takes its whole workspace for a product of any size."""


@dataclass(frozen=True)
class Reading:
    """The card at one moment; ``process_bytes`` is ``None`` where the driver does not show this process.

    ``reserved_bytes``: what torch's caching allocator holds, which is part of the other two.
    """

    device_bytes: int
    process_bytes: int | None
    reserved_bytes: int


def measure_overheads() -> dict[str, Any]:
    """The overheads of one process on its first CUDA device, as `overheads.write_calibration` takes them.

    To be called where CUDA is not in use yet: `peft_gauge.isolation.run` gives a process like that. Keys: ``gpu_name``,
    ``torch_version``, ``measured_on`` (ISO date), ``context_bytes`` (outside the allocator, after a linear layer was
    trained for a step), ``cublas_workspace_bytes`` (of forward and backward together: a workspace belongs to a handle,
    a handle to a thread, and autograd runs backward in one of its own), ``cublaslt_workspace_bytes`` (what a product
    with a bias takes on top, 0 where the two share one). No part of the record: ``bare_context_bytes``, outside the
    allocator after the first tensor, and ``forward_workspace_bytes``, cuBLAS's before there was a backward.

    Where the driver does not show this process, the context is what the whole card has more than before, so nobody
    else may start or end on it meanwhile. Raises `GaugeError` where CUDA is in use already or NVML does not answer.
    """
    if torch.cuda.is_initialized():
        raise GaugeError("CUDA is in use in this process already: overheads are measured in a fresh one")
    meter = NvmlMeter()
    reason = meter.why_unavailable()
    if reason is not None:
        raise GaugeError(f"the CUDA context cannot be measured: {reason}")
    before = _read(meter)
    torch.zeros(1, device="cuda")
    bare = _read(meter)
    forward_bytes, both_bytes = _cublas_bytes()
    cublaslt_bytes = _cublaslt_bytes()
    _train_a_layer()
    return {
        "gpu_name": torch.cuda.get_device_name(),
        "torch_version": torch.__version__,
        "measured_on": datetime.date.today().isoformat(),
        "bare_context_bytes": outside_bytes(before, bare),
        "context_bytes": outside_bytes(before, _read(meter)),
        "forward_workspace_bytes": forward_bytes,
        "cublas_workspace_bytes": both_bytes,
        "cublaslt_workspace_bytes": cublaslt_bytes,
    }


def outside_bytes(before: Reading, now: Reading) -> int:
    """What this process has on the card outside the allocator, where ``before`` is from before it used CUDA."""
    own_bytes = now.device_bytes - before.device_bytes if now.process_bytes is None else now.process_bytes
    return own_bytes - now.reserved_bytes


def workspace_bytes(before_bytes: int, after_bytes: int, result_bytes: int) -> int:
    """What an operation allocated besides its result, by the allocator's count before and after (or at the peak of)
    it."""
    return after_bytes - before_bytes - rounded(result_bytes)


def _read(meter: NvmlMeter) -> Reading:
    """NVML's and the allocator's figures once the device is idle; does not bring CUDA into use."""
    reserved_bytes = 0
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        reserved_bytes = torch.cuda.memory_reserved()
    meter.start_phase("overheads")
    figures: Mapping[str, int | None] = meter.end_phase("overheads")
    device_bytes = figures["device_bytes"]
    if device_bytes is None:
        raise GaugeError("the CUDA context cannot be measured: the driver stopped telling this device's memory")
    return Reading(device_bytes, figures["process_bytes"], reserved_bytes)


def _matrices(requires_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Two in 16 bit, as in a training step."""
    like: dict[str, Any] = {"dtype": torch.float16, "device": "cuda", "requires_grad": requires_grad}
    return torch.ones(SIDE, SIDE, **like), torch.ones(SIDE, SIDE, **like)


def _cublas_bytes() -> tuple[int, int]:
    """What stays allocated of a first product besides its result, and what of it with its backward."""
    left, right = _matrices(requires_grad=True)
    before_bytes = torch.cuda.memory_allocated()
    product = torch.mm(left, right)
    forward_bytes = workspace_bytes(before_bytes, torch.cuda.memory_allocated(), product.nbytes)
    product.backward(torch.ones_like(product))
    left.grad = right.grad = None
    del product
    return forward_bytes, workspace_bytes(before_bytes, torch.cuda.memory_allocated(), 0)


def _cublaslt_bytes() -> int:
    """Likewise of a product with a bias; at its peak, since some versions of torch give this workspace back."""
    left, right = _matrices(requires_grad=False)
    bias = torch.ones(SIDE, dtype=torch.float16, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated()
    result = torch.addmm(bias, left, right)
    return workspace_bytes(before_bytes, torch.cuda.max_memory_allocated(), result.nbytes)


def _train_a_layer() -> None:
    """Forward, backward and update, so that the kernels of all three are loaded."""
    layer = torch.nn.Linear(SIDE, SIDE, device="cuda", dtype=torch.float16)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(SIDE, SIDE, device="cuda", dtype=torch.float16)).float().square().mean().backward()
    optimizer.step()
