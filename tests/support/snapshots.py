"""A device's memory history in torch's own format, written by hand: snapshots of the caching allocator."""

from __future__ import annotations

from typing import Any

SITE_PACKAGES = "/opt/env/lib/python3.12/site-packages/"
MIB = 1 << 20


def frame(path: str, line: int, function: str) -> dict[str, Any]:
    return {"filename": SITE_PACKAGES + path, "line": line, "name": function}


CALL = frame("torch/nn/modules/module.py", 1790, "_call_impl")
EMBEDDING = [frame("torch/nn/functional.py", 2567, "embedding"), CALL]
LINEAR = [frame("torch/nn/modules/linear.py", 134, "forward"), CALL]
GRADS = [frame("torch/autograd/__init__.py", 231, "_make_grads"), frame("torch/_tensor.py", 631, "backward")]
ADAM = [frame("torch/optim/adam.py", 791, "_multi_tensor_adam"), frame("torch/optim/adam.py", 248, "step")]
DATA = [frame("accelerate/utils/operations.py", 160, "send_to_device")]


class Device:
    """A device's trace as torch writes it: both events of a free, and the driver's segments among them."""

    def __init__(self, base: int = 0x7F0000000000) -> None:
        self.trace: list[dict[str, Any]] = []
        self._base = base
        self._time = 0

    def _entry(self, action: str, address: int, size: int, frames: Any = None) -> None:
        self._time += 3
        entry = {
            "action": action, "addr": self._base + address, "size": size, "stream": 0, "time_us": self._time,
            "compile_context": "N/A", "user_metadata": "",
        }  # fmt: skip
        self.trace.append(entry if frames is None else {**entry, "frames": frames})

    def segment(self, size: int) -> None:
        self._entry("segment_alloc", 0, size)

    def take(self, address: int, size: int, frames: Any = ()) -> None:
        self._entry("alloc", address, size, list(frames))

    def give(self, address: int, size: int) -> None:
        self._entry("free_requested", address, size)
        self._entry("free_completed", address, size)

    def block(self, address: int, asked: int, size: int, state: str = "active_allocated") -> dict[str, Any]:
        return {"address": self._base + address, "size": size, "requested_size": asked, "state": state, "frames": []}


def snapshot(*devices: Device, blocks: list[list[dict[str, Any]]] | None = None) -> dict[str, Any]:
    segments = [
        {
            "device": number, "address": each[0]["address"], "total_size": sum(block["size"] for block in each),
            "allocated_size": sum(block["size"] for block in each if block["state"] == "active_allocated"),
            "active_size": 0, "requested_size": 0, "stream": 0, "segment_type": "large", "segment_pool_id": (0, 0),
            "is_expandable": False, "frames": [], "blocks": each,
        }
        for number, each in enumerate(blocks or [])
    ]  # fmt: skip
    return {
        "segments": segments,
        "device_traces": [device.trace for device in devices],
        "allocator_settings": {
            "PYTORCH_CUDA_ALLOC_CONF": "",
            "max_split_size": -1,
            "roundup_power2_divisions": {"1": 0},
        },
        "external_annotations": [],
    }


def one_step(device: Device, base: int = 0) -> Device:
    """Inputs are sent, a linear layer keeps its output, backward makes a gradient, the update a temporary."""
    device.segment(20 * MIB)
    device.take(base + 0x1000, 100, DATA)
    device.take(base + 0x2000, 2000, EMBEDDING)
    device.take(base + 0x3000, 3000, LINEAR)
    device.give(base + 0x2000, 2000)
    device.take(base + 0x4000, 4, GRADS)
    device.take(base + 0x5000, 5000)  # the engine's thread has no Python
    device.give(base + 0x3000, 3000)
    device.give(base + 0x4000, 4)
    device.take(base + 0x6000, 6000, ADAM)
    device.give(base + 0x6000, 6000)
    device.give(base + 0x5000, 5000)
    return device
