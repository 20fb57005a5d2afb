"""One card or MIG instance as the driver's management library (NVML) shows it, found by UUID.

NVML numbers cards by itself and ignores ``CUDA_VISIBLE_DEVICES``, so an index of torch's is no index of NVML's.
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

# Reasons for a lower clock that make a timing unsteady; an idle card or clocks that the user set do not.
_SLOWDOWNS = ("SwPowerCap", "HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown")


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the device. ``used_bytes`` is without what the driver reserves for itself."""

    total_bytes: int
    used_bytes: int
    reserved_bytes: int


class NvmlDevice:
    """A card or MIG instance.

    Args:
        handle: NVML's handle of it.
        card: NVML's handle of the card as a whole; the same but for a MIG instance.
    """

    def __init__(self, handle: Any, card: Any) -> None:
        import pynvml

        self._handle = handle
        self._card = card
        self.uuid: str = pynvml.nvmlDeviceGetUUID(handle)

    def memory(self) -> DeviceMemory | None:
        """By version 2 of the struct (version 1 counts the driver's own reserve as used); ``None`` if not told."""
        import pynvml

        info = _told(lambda: pynvml.nvmlDeviceGetMemoryInfo(self._handle, version=pynvml.nvmlMemory_v2))
        return None if info is None else DeviceMemory(info.total, info.used, info.reserved)

    def processes(self) -> dict[int, int | None] | None:
        """Process id -> bytes, for processes that compute here; ``None`` for bytes, or for all, that are not told.

        A container without the host's process ids sees none of its processes, or foreign ids; under WSL2 and on Windows
        the bytes are not told.
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
        """Clock, power, temperature and slowdowns now; those of the whole card for a MIG instance."""
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
        if reasons is None:  # drivers before 535 know it by its former name only
            reasons = _told(lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._card))
        if reasons is None:
            return None
        return tuple(name for name in _SLOWDOWNS if reasons & getattr(pynvml, f"nvmlClocksThrottleReason{name}"))


def find_device(index: int = 0, *, uuid: str | None = None, environment: Mapping[str, str] = os.environ) -> NvmlDevice:
    """The NVML device that CUDA calls ``index`` in this process (NVML has to be initialised).

    The first that applies: ``uuid``; a UUID in ``CUDA_VISIBLE_DEVICES``; the UUID that torch gives, if CUDA is in use
    in this process already (asking would otherwise create a context); the index in ``CUDA_VISIBLE_DEVICES`` or, without
    the variable, the index itself. On a card that is divided (MIG) CUDA sees one instance.

    Raises `GaugeError` if there is no such device or it cannot be told which one it is.
    """
    entry = uuid or _visible_entry(index, environment)
    if not entry.isdecimal():
        return _by_uuid(entry)
    from_torch = _torch_uuid(index)
    if from_torch is not None:
        return _by_uuid(from_torch)
    return _by_index(int(entry), environment)


def _visible_entry(index: int, environment: Mapping[str, str]) -> str:
    """What ``CUDA_VISIBLE_DEVICES`` has in place ``index``: a number of CUDA's, or a UUID or the beginning of one."""
    variable = environment.get("CUDA_VISIBLE_DEVICES")
    if variable is None:
        return str(index)
    entries: list[str] = []
    for entry in map(str.strip, variable.split(",")):
        if not entry.isdecimal() and not entry.startswith(("GPU-", "MIG-")):
            break  # CUDA, too, stops at the first that it does not understand; -1 is the customary one
        entries.append(entry)
    if index >= len(entries):
        shown = f"CUDA_VISIBLE_DEVICES={variable!r}"
        raise GaugeError(f"{shown} makes {len(entries)} device(s) visible, so there is no device {index}; change it")
    return entries[index]


def _torch_uuid(index: int) -> str | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return str(torch.cuda.get_device_properties(index).uuid)


def _by_uuid(uuid: str) -> NvmlDevice:
    """The device whose UUID is ``uuid`` or begins with it; torch writes it without the prefix ``GPU-`` or ``MIG-``."""
    import pynvml

    if uuid.startswith("MIG-"):
        instance = _told(lambda: pynvml.nvmlDeviceGetHandleByUUID(uuid))
        if instance is None:
            raise GaugeError(f"NVML knows no MIG instance {uuid}; nvidia-smi -L lists those that there are")
        return NvmlDevice(instance, pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(instance))
    wanted = uuid.removeprefix("GPU-").lower()
    devices = [device for card in _cards() for device in (NvmlDevice(card, card), *_instances(card))]
    matching = [device for device in devices if _bare(device.uuid).startswith(wanted)]
    if len(matching) != 1:
        found = "no device" if not matching else f"{len(matching)} devices"
        raise GaugeError(f"NVML knows {found} whose UUID begins with {uuid}; nvidia-smi -L lists those that there are")
    return _sole_instance(matching[0])


def _by_index(number: int, environment: Mapping[str, str]) -> NvmlDevice:
    import pynvml

    cards = list(_cards())
    if number >= len(cards):
        raise GaugeError(f"device {number} is asked for, but NVML sees {len(cards)}; see CUDA_VISIBLE_DEVICES")
    names = {pynvml.nvmlDeviceGetName(card) for card in cards}
    if len(names) > 1 and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        raise GaugeError(
            "CUDA numbers unlike cards by speed and NVML by bus, so an index is ambiguous; "
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID or put the UUID in CUDA_VISIBLE_DEVICES"
        )
    return _sole_instance(NvmlDevice(cards[number], cards[number]))


def _sole_instance(device: NvmlDevice) -> NvmlDevice:
    """The one MIG instance of a card that is divided; the device itself if it is not, or is an instance."""
    if device._handle is not device._card or not _is_divided(device._card):
        return device
    instances = list(_instances(device._card))
    if len(instances) != 1:
        raise GaugeError(
            f"card {device.uuid} is divided into {len(instances)} MIG instances; name one in CUDA_VISIBLE_DEVICES"
        )
    return instances[0]


def _cards() -> Iterator[Any]:
    import pynvml

    for number in range(pynvml.nvmlDeviceGetCount()):
        card = _told(lambda n=number: pynvml.nvmlDeviceGetHandleByIndex(n))  # type: ignore[misc]
        if card is not None:  # without permission, or fallen off the bus
            yield card


def _instances(card: Any) -> Iterator[NvmlDevice]:
    import pynvml

    if not _is_divided(card):
        return
    for number in range(_told(lambda: pynvml.nvmlDeviceGetMaxMigDeviceCount(card)) or 0):
        instance = _told(lambda n=number: pynvml.nvmlDeviceGetMigDeviceHandleByIndex(card, n))  # type: ignore[misc]
        if instance is not None:  # places for instances can be free
            yield NvmlDevice(instance, card)


def _is_divided(card: Any) -> bool:
    import pynvml

    mode = _told(lambda: pynvml.nvmlDeviceGetMigMode(card))  # not told by cards that cannot be divided
    return mode is not None and mode[0] == pynvml.NVML_DEVICE_MIG_ENABLE


def _bare(uuid: str) -> str:
    return uuid.removeprefix("GPU-").removeprefix("MIG-").lower()


def _told(ask: Callable[[], T]) -> T | None:
    """What NVML answers; ``None`` where it refuses, for whatever reason."""
    import pynvml

    try:
        return ask()
    except pynvml.NVMLError:
        return None
