"""Device memory that no tensor of the model accounts for: the CUDA context and the BLAS workspaces.

The workspaces are allocated through the caching allocator at the first matrix product and never freed, so
they belong into the allocation sequence and count as allocated. The context lies outside the allocator: it
is taken off the device's capacity.

The defaults here can be overwritten by what was measured on a GPU: one JSON file each,
`<slug of the GPU's name>.json`, in the user's folder (`peft_gauge.paths.calibrations`) or one that is named:

    {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2.13.0", "measured_on": "2026-01-31",
     "context_bytes": 545259520, "cublas_workspace_bytes": 33554432, "cublaslt_workspace_bytes": 0,
     "usable_bytes": 84942979072, "workspaces": {…}, "allocator": {…}, "nvml": {…}, "speed": {…}}

The first three fields are required; of the others, those that are absent keep their default. Plans read the bytes; the
four records are for people, and for `peft-gauge calibrate`, which writes them.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft_gauge import paths
from peft_gauge.errors import GaugeError
from peft_gauge.files import slug, write_whole
from peft_gauge.memory import gpus

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

CONTEXT_BYTES = 512 << 20
"""Driver, CUDA context and loaded kernels of one process. An **unmeasured estimate**: with lazy module
loading (CUDA 11.7 and later) PyTorch's maintainers speak of about 300 MB (pytorch#107667) and 400 MB
(pytorch#109888) after the first operation; the kernels of a training step come on top."""

CONTEXT_HOPPER_BYTES = 794_820_608
"""The same as an H200 showed it under torch 2.11 for CUDA 13.0 (driver 580.159): NVML's metric for the process less the
allocator's segments, after training steps with cuDNN's attention; 778,043,392 without (2026-11-27)."""

CUBLAS_WORKSPACE_BYTES = 2 * (4096 << 10) + 8 * (16 << 10)
"""cuBLAS, per handle and stream, with the default `CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8`: two buffers of
4 MiB and eight of 16 KiB, 8,519,680 bytes. From `aten/src/ATen/cuda/CublasHandlePool.cpp`; the same metric
was observed on a device in pytorch#95668."""

CUBLAS_WORKSPACE_HOPPER_BYTES = 8 * (4096 << 10)
"""The same on compute capability 9.0, 32 MiB; an H200 took it twice, once for forward and once for backward. Blackwell
(10.0, 12.0) took the smaller default in the version of that file that was read (commit 26a3905)."""

CUBLASLT_WORKSPACE_BYTES = 1 << 20
"""cuBLASLt (a linear layer with a bias): 1 MiB unless `CUBLASLT_WORKSPACE_SIZE` says otherwise, same file.
An upper bound: versions with pytorch#168175 let it share the workspace of cuBLAS (then 0); before
pytorch#156495 it was allocated for each call and freed."""

CUBLAS_WORKSPACES = 2
"""Of a training step: handles belong to a thread, and backward runs in a thread of autograd's own, same file."""

_BYTE_FIELDS = ("context_bytes", "cublas_workspace_bytes", "cublaslt_workspace_bytes")
_USABLE = "usable_bytes"
_TEXT_FIELDS = ("gpu", "torch", "measured_on")
RECORDS = ("workspaces", "allocator", "nvml", "speed")
"""What a calibration has beside the bytes that plans read."""


@dataclass(frozen=True)
class DeviceOverheads:
    """The overheads of one process on one device; `origins` says for each field where it is from.

    ``calibration``: when and with what they were measured on this very device, and the file, if they were.
    ``cublas_workspace_bytes``: those of forward and of backward together. ``usable_bytes``: what the driver reports
    that this device has, where it was measured.
    """

    context_bytes: int
    cublas_workspace_bytes: int
    cublaslt_workspace_bytes: int
    origins: Mapping[str, str]
    usable_bytes: int | None = None
    calibration: str | None = None


def default_overheads(compute_capability: tuple[int, int] | None) -> DeviceOverheads:
    """What PyTorch's sources say for an architecture; None is treated as one that is not Hopper."""
    hopper = compute_capability == (9, 0)
    return DeviceOverheads(
        context_bytes=CONTEXT_HOPPER_BYTES if hopper else CONTEXT_BYTES,
        cublas_workspace_bytes=CUBLAS_WORKSPACES
        * (CUBLAS_WORKSPACE_HOPPER_BYTES if hopper else CUBLAS_WORKSPACE_BYTES),
        cublaslt_workspace_bytes=CUBLASLT_WORKSPACE_BYTES,
        origins={
            "context_bytes": "measured on an H200, torch 2.11, CUDA 13.0"
            if hopper
            else "unmeasured estimate (pytorch#107667, pytorch#109888)",
            "cublas_workspace_bytes": "PyTorch's CublasHandlePool.cpp",
            "cublaslt_workspace_bytes": "PyTorch's CublasHandlePool.cpp; an upper bound",
        },
    )


def overheads_for(gpu_name: str, calibration_folder: Path | None = None) -> DeviceOverheads:
    """The overheads on this GPU (a name or a size, as `gpus.lookup` takes it), measured ones first.

    ``calibration_folder``: by default the user's. Raises `GaugeError` for a broken calibration file, and for a GPU
    that has neither a row in the table nor a calibration file.
    """
    folder = calibration_folder or paths.calibrations()
    record = read_calibration(folder, gpu_name) or {}
    measured = {field: value for field, value in record.items() if field in (*_BYTE_FIELDS, _USABLE)}
    try:
        capability = gpus.lookup(gpu_name).compute_capability
    except GaugeError:
        if not measured:
            raise
        capability = None
    default = default_overheads(capability)
    values = {field: measured.get(field, getattr(default, field)) for field in _BYTE_FIELDS}
    name = calibration_path(folder, gpu_name).name
    calibration = f"{record['measured_on']} with torch {record['torch']} ({name})" if measured else None
    origins = {
        field: f"measured on {calibration}" if field in measured else default.origins[field] for field in _BYTE_FIELDS
    }
    return DeviceOverheads(**values, origins=origins, usable_bytes=measured.get(_USABLE), calibration=calibration)


def calibration_path(folder: Path, gpu_name: str) -> Path:
    """Where the calibration of a GPU lies; every spelling that `gpus.lookup` knows leads to one file."""
    return folder / f"{_file_name(gpu_name)}.json"


def write_calibration(
    folder: Path,
    gpu_name: str,
    *,
    torch_version: str,
    measured_on: str,
    context_bytes: int,
    cublas_workspace_bytes: int,
    cublaslt_workspace_bytes: int,
    **further: Any,
) -> Path:
    """Store what was measured on a GPU (`measured_on` is an ISO date) and return the file's path.

    ``further``: ``usable_bytes`` and any of `RECORDS`. Raises `GaugeError` where the file cannot be written; one that
    is there stays whole until the new one is.
    """
    path = calibration_path(folder, gpu_name)
    record = {
        "gpu": gpu_name,
        "torch": torch_version,
        "measured_on": measured_on,
        "context_bytes": context_bytes,
        "cublas_workspace_bytes": cublas_workspace_bytes,
        "cublaslt_workspace_bytes": cublaslt_workspace_bytes,
        **further,
    }
    _check(record, path, gpu_name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        reason = error.strerror or error
        raise GaugeError(f"the calibration cannot be kept as {path}: {reason}; name a folder with --folder") from error
    return path


def read_calibration(folder: Path, gpu_name: str) -> dict[str, Any] | None:
    """The calibration of a GPU as it was written, if there is one. Raises `GaugeError` where it is broken."""
    path = calibration_path(folder, gpu_name)
    return _read(path, gpu_name) if path.exists() else None


def _file_name(gpu_name: str) -> str:
    with contextlib.suppress(GaugeError):  # a GPU outside the table is calibrated under its own name
        gpu_name = gpus.lookup(gpu_name).name
    name = slug(gpu_name)
    if not name:
        raise GaugeError(f"{gpu_name!r} is no GPU name; give one such as 'H100 80GB'")
    return name


def _read(path: Path, gpu_name: str) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _broken(path, str(error)) from error
    if not isinstance(record, dict):
        raise _broken(path, "it holds no JSON object")
    return _check(record, path, gpu_name)


def _check(record: dict[str, Any], path: Path, gpu_name: str) -> dict[str, Any]:
    """``record``, which is sound."""
    unknown = sorted(set(record) - {*_BYTE_FIELDS, _USABLE, *_TEXT_FIELDS, *RECORDS})
    if unknown:
        raise _broken(path, f"unknown field {unknown[0]!r}")
    for field in _TEXT_FIELDS:
        if not isinstance(record.get(field), str):
            raise _broken(path, f"{field!r} must be a text")
    if _file_name(str(record["gpu"])) != _file_name(gpu_name):
        raise _broken(path, f"it was measured on {record['gpu']!r}")
    for field in (*_BYTE_FIELDS, _USABLE):
        value = record.get(field, 0)
        if type(value) is not int or value < 0:  # a bool is an int to isinstance
            raise _broken(path, f"{field!r} must be a whole number of bytes, not {value!r}")
    for field in RECORDS:
        if not isinstance(record.get(field, {}), dict):
            raise _broken(path, f"{field!r} must be a JSON object")
    return record


def _broken(path: Path, reason: str) -> GaugeError:
    return GaugeError(f"calibration file {path} cannot be used: {reason}; measure again or delete it")
