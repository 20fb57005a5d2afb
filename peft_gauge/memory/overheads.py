"""Device memory outside the model's tensors: the CUDA context and the BLAS workspaces.

Workspaces are allocated through the caching allocator at the first matrix product and never freed, so they are part of
the allocation sequence and count as allocated. The context is outside the allocator: it is subtracted from the device's
capacity.

Measured values override the defaults here. They are in one JSON file per GPU, `<slug of the GPU's name>.json`, in the
user's folder (`peft_gauge.paths.calibrations`) or in a folder that the caller names:

    {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2.13.0", "measured_on": "2026-01-31",
     "context_bytes": 545259520, "cublas_workspace_bytes": 33554432, "cublaslt_workspace_bytes": 0,
     "usable_bytes": 84942979072, "workspaces": {…}, "allocator": {…}, "nvml": {…}, "speed": {…}}

The first three fields are required; missing bytes keep their defaults. Plans read only the bytes. The last four fields
are records for readers, written by `peft-gauge calibrate`.
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
"""Driver, CUDA context and loaded kernels of one process: an **unmeasured estimate**.

With lazy module loading (CUDA 11.7 and later), PyTorch's maintainers report about 300 MB (pytorch#107667) and 400 MB
(pytorch#109888) after the first operation. The kernels of a training step add to that."""

CONTEXT_HOPPER_BYTES = 794_820_608
"""The same, measured on an H200 and on an H100 with torch 2.11 for CUDA 13.0 (driver 580.159, November 2026).

The value is NVML's memory of the process minus the allocator's segments, after training steps with cuDNN's attention;
without that attention it is 778,043,392."""

CUBLAS_WORKSPACE_BYTES = 2 * (4096 << 10) + 8 * (16 << 10)
"""cuBLAS, per handle and stream, with the default `CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8`: two buffers of
4 MiB and eight of 16 KiB, 8,519,680 bytes. From `aten/src/ATen/cuda/CublasHandlePool.cpp`; pytorch#95668 reports the
same number from a device."""

CUBLAS_WORKSPACE_HOPPER_BYTES = 8 * (4096 << 10)
"""The same on compute capability 9.0: 32 MiB. An H200 allocated it twice, for forward and for backward. Blackwell
(10.0, 12.0) has the smaller default in that file at commit 26a3905."""

CUBLASLT_WORKSPACE_BYTES = 1 << 20
"""cuBLASLt (a linear layer with a bias): 1 MiB unless `CUBLASLT_WORKSPACE_SIZE` is set, same file.

This is an upper bound: with pytorch#168175 it shares the workspace of cuBLAS (0 bytes); before pytorch#156495 it was
allocated and freed at each call."""

CUBLAS_WORKSPACES = 2
"""The number of workspaces in a training step: handles belong to a thread, and autograd runs backward in its own
thread (same file)."""

_BYTE_FIELDS = ("context_bytes", "cublas_workspace_bytes", "cublaslt_workspace_bytes")
_USABLE = "usable_bytes"
_TEXT_FIELDS = ("gpu", "torch", "measured_on")
RECORDS = ("workspaces", "allocator", "nvml", "speed")
"""The fields of a calibration that plans do not read."""


@dataclass(frozen=True)
class DeviceOverheads:
    """The memory overheads of one process on one device.

    Attributes:
        cublas_workspace_bytes: of forward and backward together.
        origins: the source of each field.
        usable_bytes: the device's total memory by its driver, if measured.
        calibration: date, torch version and file of the measurement on this device, if there is one.
    """

    context_bytes: int
    cublas_workspace_bytes: int
    cublaslt_workspace_bytes: int
    origins: Mapping[str, str]
    usable_bytes: int | None = None
    calibration: str | None = None


def default_overheads(compute_capability: tuple[int, int] | None) -> DeviceOverheads:
    """The overheads from PyTorch's sources for a compute capability; None is treated as not Hopper."""
    hopper = compute_capability == (9, 0)
    return DeviceOverheads(
        context_bytes=CONTEXT_HOPPER_BYTES if hopper else CONTEXT_BYTES,
        cublas_workspace_bytes=CUBLAS_WORKSPACES
        * (CUBLAS_WORKSPACE_HOPPER_BYTES if hopper else CUBLAS_WORKSPACE_BYTES),
        cublaslt_workspace_bytes=CUBLASLT_WORKSPACE_BYTES,
        origins={
            "context_bytes": "measured on an H100 and an H200, torch 2.11, CUDA 13.0"
            if hopper
            else "unmeasured estimate (pytorch#107667, pytorch#109888)",
            "cublas_workspace_bytes": "PyTorch's CublasHandlePool.cpp",
            "cublaslt_workspace_bytes": "PyTorch's CublasHandlePool.cpp; an upper bound",
        },
    )


def overheads_for(gpu_name: str, calibration_folder: Path | None = None) -> DeviceOverheads:
    """The overheads on this GPU (a name or a size, as for `gpus.lookup`): measured values, otherwise defaults.

    ``calibration_folder`` defaults to the user's. Raises `GaugeError` for an invalid calibration file, and for a GPU
    with neither a row in the table nor a calibration file.
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
    """The path of a GPU's calibration, the same for every spelling that `gpus.lookup` accepts."""
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
    """Write the measured overheads of a GPU (`measured_on` is an ISO date) and return the file's path.

    ``further`` may hold ``usable_bytes`` and any of `RECORDS`. Raises `GaugeError` if the file cannot be written; an
    existing file is replaced only by a complete one.
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
        raise GaugeError(f"cannot write the calibration {path}: {reason}; name another folder with --folder") from error
    return path


def read_calibration(folder: Path, gpu_name: str) -> dict[str, Any] | None:
    """The calibration of a GPU as written, or None. Raises `GaugeError` if the file is invalid."""
    path = calibration_path(folder, gpu_name)
    return _read(path, gpu_name) if path.exists() else None


def _file_name(gpu_name: str) -> str:
    with contextlib.suppress(GaugeError):  # a GPU outside the table is calibrated under its own name
        gpu_name = gpus.lookup(gpu_name).name
    name = slug(gpu_name)
    if not name:
        raise GaugeError(f"{gpu_name!r} is not a GPU name; use one such as 'H100 80GB'")
    return name


def _read(path: Path, gpu_name: str) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _broken(path, str(error)) from error
    if not isinstance(record, dict):
        raise _broken(path, "it is not a JSON object")
    return _check(record, path, gpu_name)


def _check(record: dict[str, Any], path: Path, gpu_name: str) -> dict[str, Any]:
    """``record``, unchanged. Raises `GaugeError` if it is invalid."""
    unknown = sorted(set(record) - {*_BYTE_FIELDS, _USABLE, *_TEXT_FIELDS, *RECORDS})
    if unknown:
        raise _broken(path, f"unknown field {unknown[0]!r}")
    for field in _TEXT_FIELDS:
        if not isinstance(record.get(field), str):
            raise _broken(path, f"{field!r} must be a string")
    if _file_name(str(record["gpu"])) != _file_name(gpu_name):
        raise _broken(path, f"it was measured on {record['gpu']!r}")
    for field in (*_BYTE_FIELDS, _USABLE):
        value = record.get(field, 0)
        if type(value) is not int or value < 0:  # isinstance would accept a bool
            raise _broken(path, f"{field!r} must be a whole number of bytes, got {value!r}")
    for field in RECORDS:
        if not isinstance(record.get(field, {}), dict):
            raise _broken(path, f"{field!r} must be a JSON object")
    return record


def _broken(path: Path, reason: str) -> GaugeError:
    return GaugeError(f"calibration file {path} is invalid: {reason}; run peft-gauge calibrate again or delete it")
