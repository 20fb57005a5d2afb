"""This machine, as far as it affects a result: versions, processor, memory, accelerator; no current clock rates."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from peft_gauge.errors import GaugeError, one_line
from peft_gauge.files import slug

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "pytest-benchmark")
"""The libraries that most often change a result; a comparison names each of them that differs."""


@cache
def machine_info() -> dict[str, Any]:
    """The record of this machine that is saved with every run; unavailable values are ``None``, never 0."""
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
        "distributions": distributions(),
    }


def machine_name(cpu: str | None, cpus: int | None, accelerator: str | None) -> str:
    """The folder name of a machine's results: processor, number of cores, accelerator (``cpu`` without one).

    It omits the host name: CI hosts get a new one every night, and results of equal machines belong together.
    """
    words = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*$|\d+-core", " ", (cpu or "unknown").lower())
    parts = [words, f"{cpus or 'x'}c", (accelerator or "cpu").lower()]
    return "-".join(slug(part) for part in parts)


# Device files of a GPU under /dev, on Linux and WSL2.
_DEVICE_FILES = ("nvidia[0-9]*", "nvidiactl", "dxg")


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver, as reported by NVML; ``None`` for unavailable values.

    Fields:
        version: as in ``550.54.14``.
        cuda: the latest CUDA version it supports, as (12, 4).
        cards: number of GPUs visible to this process, whatever ``CUDA_VISIBLE_DEVICES`` is; ``uuids``: their UUIDs.
        error: NVML's message if it does not respond.
        absent: whether nothing else indicates a GPU either, so that torch need not be imported.
    """

    version: str | None = None
    cuda: tuple[int, int] | None = None
    cards: int | None = None
    uuids: tuple[str, ...] = ()
    error: str | None = None
    absent: bool = False


@cache
def nvidia_driver() -> Driver:
    """The driver of this machine, queried once per process."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        nothing = isinstance(error, (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded))
        return Driver(error=str(error), absent=nothing and not _has_device_files())
    try:
        cuda = _told(pynvml.nvmlSystemGetCudaDriverVersion)
        cards = _told(pynvml.nvmlDeviceGetCount)
        handles = [_told(lambda n=number: pynvml.nvmlDeviceGetHandleByIndex(n)) for number in range(cards or 0)]  # type: ignore[misc]
        uuids = [_told(lambda h=handle: pynvml.nvmlDeviceGetUUID(h)) for handle in handles if handle is not None]  # type: ignore[misc]
        return Driver(
            version=_told(pynvml.nvmlSystemGetDriverVersion),
            cuda=None if cuda is None else _cuda_version(cuda),
            cards=cards,
            uuids=tuple(uuid for uuid in uuids if uuid is not None),
        )
    finally:
        pynvml.nvmlShutdown()


def _told(ask: Callable[[], Any]) -> Any:
    """The result of ``ask``; ``None`` if NVML returns an error."""
    import pynvml

    try:
        return ask()
    except pynvml.NVMLError:
        return None


def _has_device_files(folder: Path = Path("/dev")) -> bool:
    return any(any(folder.glob(pattern)) for pattern in _DEVICE_FILES)


def _cuda_version(number: int) -> tuple[int, int]:
    """CUDA encodes version 12.4 as 12040."""
    return number // 1000, number % 1000 // 10


@cache
def why_no_cuda() -> str | None:
    """Why CUDA is unavailable here, in one line; ``None`` if it is available.

    torch decides. It is not imported if both NVML and the device files indicate a machine without GPU. A failing NVML
    alone does not count, since CUDA may still work (in a container without permission for NVML); only the driver's
    metrics are then unavailable.
    """
    driver = nvidia_driver()
    if driver.absent:
        return f"no CUDA device: no NVIDIA driver responds (NVML: {driver.error})"
    import torch

    if torch.version.cuda is None:
        return f"no CUDA device: this torch ({torch.__version__}) was built without CUDA; install a CUDA build"
    # torch explains the failure in a warning, once per process; under pytest it would be an error.
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        return None
    words = " ".join(str(each.message) for each in said)
    reason = (
        why_hidden(os.environ.get("CUDA_VISIBLE_DEVICES"), driver)
        or _why_too_old(driver, torch.version.cuda, words)
        or _why_otherwise(driver, words)
    )
    return f"no CUDA device that torch can use: {reason}"


def why_hidden(visible: str | None, driver: Driver) -> str | None:
    """The error in ``visible``, the value of ``CUDA_VISIBLE_DEVICES`` (``None``: unset), in one line.

    CUDA stops at the first invalid entry and hides that GPU and all after it. ``None`` if the value is valid or, for a
    MIG instance or an NVML that does not list the GPUs, cannot be checked.
    """
    if visible is None:
        return None
    shown = f"CUDA_VISIBLE_DEVICES={visible!r}"
    entries = [entry.strip() for entry in visible.split(",")]
    if not entries[0].isdecimal() and not entries[0].startswith(("GPU-", "MIG-")):
        return f"{shown} hides every GPU; unset it, or name one"
    for entry in entries:
        if driver.cards is None:
            continue
        numbered = entry.isdecimal() and int(entry) >= driver.cards
        listed = [uuid.lower().startswith(entry.lower()) for uuid in driver.uuids]
        named = entry.startswith("GPU-") and len(listed) == driver.cards and not any(listed)
        if numbered or named:
            there = "is 1 GPU" if driver.cards == 1 else f"are {driver.cards} GPUs"
            return f"{shown} names GPU {entry}, but there {there} here, numbered from 0; nvidia-smi -L lists them"
    return None


def _why_too_old(driver: Driver, built_for: str, words: str) -> str | None:
    """``words``: torch's warning, empty if an earlier check consumed it; ``built_for``: torch's CUDA version."""
    found = re.search(r"driver on your system is too old \(found version (\d+)\)", words)
    runs = _cuda_version(int(found[1])) if found else driver.cuda
    # A driver also runs code built for a later minor version of its major CUDA version.
    if runs is None or (not found and runs[0] >= int(built_for.split(".")[0])):
        return None
    upto = f"{runs[0]}.{runs[1]}"
    return (
        f"the NVIDIA driver{_version_of(driver)} is too old: it supports CUDA up to {upto}, and this torch was built "
        f"for CUDA {built_for}; update the driver, or install a torch built for CUDA {upto} or older"
    )


def _why_otherwise(driver: Driver, words: str) -> str:
    if driver.cards == 0:
        return f"the NVIDIA driver{_version_of(driver)} shows no GPU here; in a container, pass the GPUs in"
    told = one_line(words.partition("(Triggered internally")[0], 240)
    nvml = f"NVML: {driver.error}" if driver.error else f"the NVIDIA driver{_version_of(driver)} does respond"
    return f"{told or 'torch gives no reason'} ({nvml}); run nvidia-smi for details"


def _version_of(driver: Driver) -> str:
    return f" {driver.version}" if driver.version else ""


def installed_version(distribution: str) -> str | None:
    """The installed version of ``distribution``; ``None`` if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def distributions() -> dict[str, str]:
    """Version of every installed distribution by normalised name, sorted.

    If a name occurs several times, the first on the path counts: Python imports that distribution. A distribution with
    unreadable metadata is left out.
    """
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        try:
            metadata = distribution.metadata
        except Exception:  # a broken package of somebody else must not lose a run
            continue
        if "Name" in metadata and "Version" in metadata:
            found.setdefault(canonicalize_name(metadata["Name"]), metadata["Version"])
    return dict(sorted(found.items()))


def _cpu() -> dict[str, Any]:
    import cpuinfo

    info = cpuinfo.get_cpu_info()
    return {"brand_raw": info.get("brand_raw"), "arch": info.get("arch"), "count": os.cpu_count()}


def _threads() -> int:
    import torch

    return torch.get_num_threads()


@dataclass(frozen=True)
class Accelerator:
    """A CUDA device as torch sees it; ``uuid``, with NVML's prefix, is independent of ``CUDA_VISIBLE_DEVICES``."""

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
    """The CUDA devices that torch can use here, in its order; none if `why_no_cuda` gives a reason.

    Queried in a separate process: a CUDA context in this one would use memory on the measured GPU and count there as
    another process. Raises `GaugeError` if torch fails.
    """
    if why_no_cuda() is not None:
        return ()
    done = subprocess.run([sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise GaugeError(f"torch cannot read the CUDA devices here: {one_line(last[0])}; run nvidia-smi for details")
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
    return nvidia_driver().version
