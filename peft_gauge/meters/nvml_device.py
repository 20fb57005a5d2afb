"""A GPU or MIG instance in the driver's management library (NVML), found by UUID.

NVML has its own numbering and ignores ``CUDA_VISIBLE_DEVICES``, so torch's index cannot be used with NVML.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from peft_gauge.clock.steadiness import DeviceState
from peft_gauge.errors import GaugeError

T = TypeVar("T")

# Reasons for a lower clock that make timings unsteady; idling and clocks set by the user do not.
_SLOWDOWNS = ("SwPowerCap", "HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown")


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the device. ``used_bytes`` excludes the driver's own reserve."""

    total_bytes: int
    used_bytes: int
    reserved_bytes: int


class NvmlDevice:
    """A GPU or MIG instance.

    Args:
        handle: its NVML handle.
        card: NVML's handle of the whole GPU; equal to ``handle`` except for a MIG instance.
    """

    def __init__(self, handle: Any, card: Any) -> None:
        import pynvml

        self._handle = handle
        self._card = card
        self.uuid: str = pynvml.nvmlDeviceGetUUID(handle)

    def memory(self) -> DeviceMemory | None:
        """By version 2 of the struct (version 1 counts the driver's reserve as used); ``None`` if unavailable."""
        import pynvml

        info = _told(lambda: pynvml.nvmlDeviceGetMemoryInfo(self._handle, version=pynvml.nvmlMemory_v2))
        return None if info is None else DeviceMemory(info.total, info.used, info.reserved)

    def processes(self) -> dict[int, int | None] | None:
        """Process id -> bytes, for processes that compute here; ``None`` for unavailable bytes, or for all.

        A container without the host's process ids sees no processes or foreign ids; under WSL2 and on Windows the bytes
        are unavailable.
        """
        import pynvml

        entries = _told(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle))
        if entries is None:
            return None
        by_pid: dict[int, int | None] = {}
        for entry in entries:
            so_far = by_pid.get(entry.pid, 0)
            known = so_far is not None and entry.usedGpuMemory is not None
            by_pid[entry.pid] = so_far + entry.usedGpuMemory if known else None
        return by_pid

    def state(self) -> DeviceState:
        """Clock, power, temperature and slowdowns now; for a MIG instance, those of the whole GPU."""
        import pynvml

        return DeviceState(
            _told(lambda: pynvml.nvmlDeviceGetClockInfo(self._card, pynvml.NVML_CLOCK_SM)),
            _told(lambda: pynvml.nvmlDeviceGetPowerUsage(self._card)),
            _told(lambda: pynvml.nvmlDeviceGetTemperature(self._card, pynvml.NVML_TEMPERATURE_GPU)),
            self._slowdowns(),
        )

    def _slowdowns(self) -> tuple[str, ...] | None:
        import pynvml

        reasons = _told(lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(self._card))
        if reasons is None:  # drivers before 535 have only the older name
            reasons = _told(lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._card))
        if reasons is None:
            return None
        return tuple(name for name in _SLOWDOWNS if reasons & getattr(pynvml, f"nvmlClocksThrottleReason{name}"))


def find_device(index: int = 0, *, uuid: str | None = None, environment: Mapping[str, str] = os.environ) -> NvmlDevice:
    """The NVML device that CUDA calls ``index`` in this process (NVML must be initialized).

    Identified by the first available of: ``uuid``; a UUID in ``CUDA_VISIBLE_DEVICES``; torch's UUID, if CUDA is already
    in use in this process (otherwise the query would create a context); the index in ``CUDA_VISIBLE_DEVICES`` or,
    without the variable, the index itself. On a GPU that is divided (MIG), CUDA sees one instance.

    Raises `GaugeError` if there is no such device or it is ambiguous.
    """
    entry = uuid or _visible_entry(index, environment)
    if not entry.isdecimal():
        return _by_uuid(entry)
    from_torch = _torch_uuid(index)
    if from_torch is not None:
        return _by_uuid(from_torch)
    return _by_index(int(entry), environment)


def _visible_entry(index: int, environment: Mapping[str, str]) -> str:
    """The entry of ``CUDA_VISIBLE_DEVICES`` at ``index``: a CUDA index, a UUID, or the beginning of one."""
    variable = environment.get("CUDA_VISIBLE_DEVICES")
    if variable is None:
        return str(index)
    entries: list[str] = []
    for entry in map(str.strip, variable.split(",")):
        if not entry.isdecimal() and not entry.startswith(("GPU-", "MIG-")):
            break  # CUDA, too, stops at the first invalid entry; -1 is customary
        entries.append(entry)
    if index >= len(entries):
        shown = f"CUDA_VISIBLE_DEVICES={variable!r}"
        raise GaugeError(f"there is no device {index}: {shown} makes {len(entries)} device(s) visible; change it")
    return entries[index]


def _torch_uuid(index: int) -> str | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return str(torch.cuda.get_device_properties(index).uuid)


def _by_uuid(uuid: str) -> NvmlDevice:
    """The device whose UUID starts with ``uuid``; torch omits the prefix ``GPU-`` or ``MIG-``."""
    import pynvml

    if uuid.startswith("MIG-"):
        instance = _told(lambda: pynvml.nvmlDeviceGetHandleByUUID(uuid))
        if instance is None:
            raise GaugeError(f"NVML finds no MIG instance {uuid}; nvidia-smi -L lists them")
        return NvmlDevice(instance, pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(instance))
    wanted = uuid.removeprefix("GPU-").lower()
    devices = [device for card in _cards() for device in (NvmlDevice(card, card), *_instances(card))]
    matching = [device for device in devices if _bare(device.uuid).startswith(wanted)]
    if len(matching) != 1:
        found = "no device" if not matching else f"{len(matching)} devices"
        raise GaugeError(f"NVML finds {found} with a UUID that starts with {uuid}; nvidia-smi -L lists them")
    return _sole_instance(matching[0])


def _by_index(number: int, environment: Mapping[str, str]) -> NvmlDevice:
    import pynvml

    cards = list(_cards())
    if number >= len(cards):
        raise GaugeError(f"there is no device {number}: NVML finds {len(cards)}; check CUDA_VISIBLE_DEVICES")
    names = {pynvml.nvmlDeviceGetName(card) for card in cards}
    if len(names) > 1 and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        raise GaugeError(
            "CUDA numbers different GPUs by speed and NVML by bus, so an index is ambiguous; "
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID or put the UUID in CUDA_VISIBLE_DEVICES"
        )
    return _sole_instance(NvmlDevice(cards[number], cards[number]))


def _sole_instance(device: NvmlDevice) -> NvmlDevice:
    """The only MIG instance of a divided GPU; otherwise the device itself."""
    if device._handle is not device._card or not _is_divided(device._card):
        return device
    instances = list(_instances(device._card))
    if len(instances) != 1:
        raise GaugeError(
            f"GPU {device.uuid} is divided into {len(instances)} MIG instances; name one in CUDA_VISIBLE_DEVICES"
        )
    return instances[0]


def _cards() -> Iterator[Any]:
    import pynvml

    for number in range(pynvml.nvmlDeviceGetCount()):
        card = _told(lambda n=number: pynvml.nvmlDeviceGetHandleByIndex(n))  # type: ignore[misc]
        if card is not None:  # None: no permission, or fallen off the bus
            yield card


def _instances(card: Any) -> Iterator[NvmlDevice]:
    import pynvml

    if not _is_divided(card):
        return
    for number in range(_told(lambda: pynvml.nvmlDeviceGetMaxMigDeviceCount(card)) or 0):
        instance = _told(lambda n=number: pynvml.nvmlDeviceGetMigDeviceHandleByIndex(card, n))  # type: ignore[misc]
        if instance is not None:  # slots for instances can be free
            yield NvmlDevice(instance, card)


def _is_divided(card: Any) -> bool:
    import pynvml

    mode = _told(lambda: pynvml.nvmlDeviceGetMigMode(card))  # unavailable for GPUs that cannot be divided
    return mode is not None and mode[0] == pynvml.NVML_DEVICE_MIG_ENABLE


def _bare(uuid: str) -> str:
    return uuid.removeprefix("GPU-").removeprefix("MIG-").lower()


def _told(ask: Callable[[], T]) -> T | None:
    """The result of ``ask``; ``None`` if NVML returns an error."""
    import pynvml

    try:
        return ask()
    except pynvml.NVMLError:
        return None
