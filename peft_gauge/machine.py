"""What this machine is, as far as it changes a result: versions, processor, memory, accelerator; no live clocks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from functools import cache
from typing import Any

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "pytest-benchmark")


@cache
def machine_info() -> dict[str, Any]:
    """The record of this machine that is stored with every run; what cannot be read is ``None``, never 0."""
    import psutil

    cpu = _cpu()
    accelerator = _accelerator()
    return {
        "name": machine_name(cpu["brand_raw"], cpu["count"], accelerator["name"]),
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "python_version": platform.python_version(),
        "python_implementation": platform.python_implementation(),
        "cpu": cpu,
        "ram_bytes": psutil.virtual_memory().total,
        "threads": _threads(),
        "accelerator": accelerator,
        "libraries": {name: installed_version(name) for name in LIBRARIES},
    }


def machine_name(cpu: str | None, cpus: int | None, accelerator: str | None) -> str:
    """The folder name of a machine's results: processor, number of cores, accelerator (``cpu`` where there is none).

    Not the host's name: CI hosts have a new one every night, and results from equal machines belong together.
    """
    words = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*$|\d+-core", " ", (cpu or "unknown").lower())
    parts = [words, f"{cpus or 'x'}c", (accelerator or "cpu").lower()]
    return "-".join(re.sub(r"[^a-z0-9]+", "-", part).strip("-") for part in parts)


@cache
def why_no_cuda() -> str | None:
    """Why nothing can run on CUDA here, in one line; ``None`` where it can.

    NVML is asked first: on a machine without a GPU it answers at once, and torch need not be imported.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"no CUDA device: no NVIDIA driver answers (NVML: {error})"
    pynvml.nvmlShutdown()
    import torch

    if torch.version.cuda is None:
        return f"no CUDA device: this torch ({torch.__version__}) was built without CUDA; install a CUDA build"
    if not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return f"no CUDA device that torch can use (CUDA_VISIBLE_DEVICES={visible!r}); run peft-gauge doctor"
    return None


def installed_version(distribution: str) -> str | None:
    """The installed version of ``distribution``; ``None`` where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    import cpuinfo

    info = cpuinfo.get_cpu_info()
    return {"brand_raw": info.get("brand_raw"), "arch": info.get("arch"), "count": os.cpu_count()}


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _accelerator() -> dict[str, Any]:
    """The first CUDA device and its driver; all ``None`` without one."""
    import torch

    if not torch.cuda.is_available():
        return {"name": None, "memory_bytes": None, "driver": None, "cuda": torch.version.cuda}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "driver": _driver_version(),
        "cuda": torch.version.cuda,
    }


def _driver_version() -> str | None:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
