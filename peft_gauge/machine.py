"""What this machine is, as far as it changes a result: versions, processor, memory, accelerator; no live clocks."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

from peft_gauge.errors import GaugeError, one_line

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


@dataclass(frozen=True)
class Accelerator:
    """A CUDA device as torch sees it; ``uuid`` names it whatever ``CUDA_VISIBLE_DEVICES`` says, with NVML's prefix."""

    name: str
    memory_bytes: int
    compute_capability: tuple[int, int]
    uuid: str | None


_ASK_TORCH = """
import json, torch
found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
print(json.dumps([[each.name, each.total_memory, each.major, each.minor, str(getattr(each, "uuid", ""))]
                  for each in found]))
"""


@cache
def accelerators() -> tuple[Accelerator, ...]:
    """The CUDA devices that torch can use here, in its order; none where `why_no_cuda` has a reason.

    A process of its own asks: this one has to stay without a CUDA context, which would take memory on the very card
    that is measured, and count there as another process. Raises `GaugeError` where torch fails at it.
    """
    if why_no_cuda() is not None:
        return ()
    done = subprocess.run([sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise GaugeError(f"torch cannot read the CUDA devices here: {one_line(last[0])}; run peft-gauge doctor")
    return tuple(
        Accelerator(name, memory_bytes, (major, minor), _with_prefix(uuid) if uuid else None)
        for name, memory_bytes, major, minor, uuid in json.loads(done.stdout)
    )


def _with_prefix(uuid: str) -> str:
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def _accelerator() -> dict[str, Any]:
    """The first CUDA device and its driver; all ``None`` without one."""
    import torch

    cards = accelerators()
    if not cards:
        return {"name": None, "memory_bytes": None, "driver": None, "cuda": torch.version.cuda}
    return {
        "name": cards[0].name,
        "memory_bytes": cards[0].memory_bytes,
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
