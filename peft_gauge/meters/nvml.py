"""Memory in use on the whole device and by this process, as reported by the driver."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from peft_gauge.errors import GaugeError
from peft_gauge.meters.nvml_device import NvmlDevice, find_device
from peft_gauge.meters.sampling import SampledPhases

if TYPE_CHECKING:
    from peft_gauge.clock.steadiness import DeviceState

_PEAKS = {
    "device_peak_bytes": "device_bytes",
    "process_peak_bytes": "process_bytes",
    "most_other_processes": "other_processes",
}


class NvmlMeter:
    """Device memory by phase, including the CUDA context, library handles and managed memory.

    A thread samples while a phase is open, and every start and end of a phase is a sample too. torch's allocator keeps
    its segments, so its short peaks are still visible at the end; those of a library that frees at once may be missed.

    Metrics: ``device_bytes`` and ``process_bytes`` at the end of the phase, ``…_peak_bytes`` within it;
    ``driver_reserved_bytes``, which is in neither; ``other_processes``, the number of other processes that compute on
    the device at the end, and ``most_other_processes`` within the phase. Metrics of processes are absent where the
    driver does not list this process: under WSL2 and on Windows, in a container with its own process ids, and before
    CUDA is in use.

    Args:
        index: torch's index of the device (see `find_device`).
        uuid: the device's UUID, in place of ``index``; for a process that does not use CUDA itself.
        period_seconds: time between two samples.
    """

    name = "nvml"
    sees = "all memory in use on the device, by any process, and this process's share of it, CUDA context included"

    def __init__(self, index: int = 0, *, uuid: str | None = None, period_seconds: float = 0.01) -> None:
        self._index = index
        self._uuid = uuid
        self._period_seconds = period_seconds
        self._sampled = SampledPhases(self._read, period_seconds)
        self._found: NvmlDevice | None = None

    @property
    def resolution(self) -> str:
        period_ms = self._period_seconds * 1e3
        return (
            f"driver pages, usually 2 MiB; sampled every {period_ms:g} ms and at phase ends, "
            "a shorter peak can be missed"
        )

    def why_unavailable(self) -> str | None:
        try:
            device = self._device()
        except GaugeError as error:
            return str(error)
        if device.memory() is None:
            return "the driver does not report this device's memory (no permission, or no version 2 of the call)"
        return None

    def state(self) -> DeviceState:
        """Clock, power, temperature and slowdowns of the device now. Raises `GaugeError` if NVML is unavailable."""
        return self._device().state()

    def start_phase(self, name: str) -> None:
        self._sampled.start(name)

    def end_phase(self, name: str) -> Mapping[str, int | None]:
        greatest, last = self._sampled.end(name)
        return {**last, **{peak: greatest[metric] for peak, metric in _PEAKS.items()}}

    def _device(self) -> NvmlDevice:
        if self._found is None:
            import pynvml

            try:
                pynvml.nvmlInit()  # reference-counted by NVML; ends with the process
                self._found = find_device(self._index, uuid=self._uuid)
            except pynvml.NVMLError as error:
                raise GaugeError(f"NVML does not respond: {error}") from error
        return self._found

    def _read(self) -> dict[str, int | None]:
        device = self._device()
        memory, processes = device.memory(), device.processes() or {}
        own = os.getpid()
        return {
            "device_bytes": None if memory is None else memory.used_bytes,
            "driver_reserved_bytes": None if memory is None else memory.reserved_bytes,
            "process_bytes": processes.get(own),
            # A list without this process may show ids of another namespace, among them this process's.
            "other_processes": len(processes) - 1 if own in processes else None,
        }
