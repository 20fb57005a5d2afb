"""A stand-in for the module `pynvml`: the real names, signatures, constants and error classes over invented GPUs.

A test describes a machine, puts it in `machine`, and gives this module to ``sys.modules["pynvml"]``. That names,
signatures, constants and errors are the real ones is itself a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

NVML_ERROR_UNINITIALIZED = 1
NVML_ERROR_NOT_SUPPORTED = 3
NVML_ERROR_NO_PERMISSION = 4
NVML_ERROR_NOT_FOUND = 6
NVML_ERROR_DRIVER_NOT_LOADED = 9
NVML_ERROR_LIBRARY_NOT_FOUND = 12
NVML_ERROR_FUNCTION_NOT_FOUND = 13
NVML_ERROR_GPU_IS_LOST = 15
NVML_ERROR_INVALID_ARGUMENT = 2

NVML_CLOCK_SM = 1
NVML_TEMPERATURE_GPU = 0
NVML_DEVICE_MIG_DISABLE = 0
NVML_DEVICE_MIG_ENABLE = 1

nvmlMemory_v2 = 33554472

nvmlClocksThrottleReasonGpuIdle = 1
nvmlClocksThrottleReasonSwPowerCap = 4
nvmlClocksThrottleReasonHwSlowdown = 8
nvmlClocksThrottleReasonSwThermalSlowdown = 32
nvmlClocksThrottleReasonHwThermalSlowdown = 64
nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 128


class NVMLError(Exception):
    value: int
    text: str

    def __init__(self) -> None:
        super().__init__(self.text)


def _error(value: int, text: str) -> type[NVMLError]:
    return type("NVMLError", (NVMLError,), {"value": value, "text": text})


NVMLError_Uninitialized = _error(NVML_ERROR_UNINITIALIZED, "Uninitialized")
NVMLError_InvalidArgument = _error(NVML_ERROR_INVALID_ARGUMENT, "Invalid Argument")
NVMLError_NotSupported = _error(NVML_ERROR_NOT_SUPPORTED, "Not Supported")
NVMLError_NoPermission = _error(NVML_ERROR_NO_PERMISSION, "Insufficient Permissions")
NVMLError_NotFound = _error(NVML_ERROR_NOT_FOUND, "Not Found")
NVMLError_DriverNotLoaded = _error(NVML_ERROR_DRIVER_NOT_LOADED, "Driver Not Loaded")
NVMLError_LibraryNotFound = _error(NVML_ERROR_LIBRARY_NOT_FOUND, "NVML Shared Library Not Found")
NVMLError_FunctionNotFound = _error(NVML_ERROR_FUNCTION_NOT_FOUND, "Function Not Found")
NVMLError_GpuIsLost = _error(NVML_ERROR_GPU_IS_LOST, "GPU is lost")


@dataclass(eq=False)
class Card:
    """A GPU, or a MIG instance if it has a ``parent``. Metrics left at ``None`` raise ``NVMLError_NotSupported``."""

    uuid: str
    name: str = "Invented 80GB"
    total: int = 80 * 2**30
    used: int = 0
    reserved: int = 600 * 2**20
    processes: list[tuple[int, int | None]] = field(default_factory=list)
    sm_clock_mhz: int | None = None
    power_milliwatts: int | None = None
    temperature_celsius: int | None = None
    reasons: int | None = None
    instances: list[Card | None] | None = None
    """Places for MIG instances; ``None`` for a GPU that knows nothing of MIG, an empty list for one undivided."""
    parent: Card | None = None
    refuses: dict[str, type[NVMLError]] = field(default_factory=dict)
    """Function's name -> the error that it raises for this GPU."""


@dataclass
class Machine:
    """The GPUs of a machine, in NVML's order, or the error that stops the driver from answering at all."""

    cards: list[Card] = field(default_factory=list)
    broken: type[NVMLError] | None = None
    initialised: int = 0
    calls: list[str] = field(default_factory=list)


machine = Machine()


def _asked(function: str, card: Card | None = None) -> None:
    machine.calls.append(function)
    if not machine.initialised:
        raise NVMLError_Uninitialized
    if card is not None and function in card.refuses:
        raise card.refuses[function]


def _figure(function: str, card: Card, value: int | None) -> int:
    _asked(function, card)
    if value is None:
        raise NVMLError_NotSupported
    return value


def nvmlInit() -> None:
    if machine.broken is not None:
        raise machine.broken
    machine.initialised += 1


def nvmlDeviceGetCount() -> int:
    _asked("nvmlDeviceGetCount")
    return len(machine.cards)


def nvmlDeviceGetHandleByIndex(index: int) -> Card:
    if index >= len(machine.cards):
        raise NVMLError_InvalidArgument
    _asked("nvmlDeviceGetHandleByIndex", machine.cards[index])
    return machine.cards[index]


def nvmlDeviceGetHandleByUUID(uuid: str) -> Card:
    _asked("nvmlDeviceGetHandleByUUID")
    instances = [instance for card in machine.cards for instance in card.instances or () if instance]
    for device in (*machine.cards, *instances):
        if device.uuid == uuid:  # in full: the library takes no beginnings
            return device
    raise NVMLError_NotFound


def nvmlDeviceGetUUID(handle: Card) -> str:
    _asked("nvmlDeviceGetUUID", handle)
    return handle.uuid


def nvmlDeviceGetName(handle: Card) -> str:
    _asked("nvmlDeviceGetName", handle)
    return handle.name


def nvmlDeviceGetMemoryInfo(handle: Card, version: int | None = None) -> Any:
    _asked("nvmlDeviceGetMemoryInfo", handle)
    if not version:  # the first version of the struct has no place for the driver's reserve and counts it as used
        used = handle.used + handle.reserved
        return SimpleNamespace(total=handle.total, free=handle.total - used, used=used)
    free = handle.total - handle.used - handle.reserved
    return SimpleNamespace(version=version, total=handle.total, reserved=handle.reserved, free=free, used=handle.used)


def nvmlDeviceGetComputeRunningProcesses(handle: Card) -> list[Any]:
    _asked("nvmlDeviceGetComputeRunningProcesses", handle)
    return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in handle.processes]


def nvmlDeviceGetMigMode(device: Card) -> list[int]:
    _asked("nvmlDeviceGetMigMode", device)
    if device.instances is None:
        raise NVMLError_NotSupported
    mode = NVML_DEVICE_MIG_ENABLE if device.instances else NVML_DEVICE_MIG_DISABLE
    return [mode, mode]


def nvmlDeviceGetMaxMigDeviceCount(device: Card) -> int:
    _asked("nvmlDeviceGetMaxMigDeviceCount", device)
    return len(device.instances or ())


def nvmlDeviceGetMigDeviceHandleByIndex(device: Card, index: int) -> Card:
    _asked("nvmlDeviceGetMigDeviceHandleByIndex", device)
    instance = (device.instances or [])[index]
    if instance is None:
        raise NVMLError_NotFound
    return instance


def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(migDevice: Card) -> Card:
    _asked("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", migDevice)
    if migDevice.parent is None:
        raise NVMLError_NotFound
    return migDevice.parent


def nvmlDeviceGetClockInfo(handle: Card, type: int) -> int:
    if type != NVML_CLOCK_SM:
        raise NVMLError_NotSupported
    return _figure("nvmlDeviceGetClockInfo", handle, handle.sm_clock_mhz)


def nvmlDeviceGetPowerUsage(handle: Card) -> int:
    return _figure("nvmlDeviceGetPowerUsage", handle, handle.power_milliwatts)


def nvmlDeviceGetTemperature(handle: Card, sensor: int) -> int:
    if sensor != NVML_TEMPERATURE_GPU:
        raise NVMLError_NotSupported
    return _figure("nvmlDeviceGetTemperature", handle, handle.temperature_celsius)


def nvmlDeviceGetCurrentClocksEventReasons(handle: Card) -> int:
    return _figure("nvmlDeviceGetCurrentClocksEventReasons", handle, handle.reasons)


def nvmlDeviceGetCurrentClocksThrottleReasons(handle: Card) -> int:
    return _figure("nvmlDeviceGetCurrentClocksThrottleReasons", handle, handle.reasons)


FUNCTIONS: list[Callable[..., Any]] = [
    value for name, value in list(globals().items()) if name.startswith("nvml") and callable(value)
]
