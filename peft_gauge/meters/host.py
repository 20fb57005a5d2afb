"""Resident memory of this process on the host."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from peft_gauge.meters.sampling import OpenPhases, SampledPhases

if TYPE_CHECKING:
    import psutil

_RESET_PEAK = "5"  # proc(5): writing 5 to clear_refs sets VmHWM to the present VmRSS and does nothing else


class HostMeter:
    """Resident set size of this process by phase.

    On Linux the kernel keeps the peak (``VmHWM``, reset through ``/proc/self/clear_refs``): no peak is missed, and no
    thread disturbs the measured work. Where the kernel does not keep it or denies the reset, a thread samples instead.
    The reset also resets ``getrusage().ru_maxrss``.

    Metrics (bytes): ``rss_bytes`` at the end of the phase, ``rss_peak_bytes`` within it.

    Args:
        period_seconds: time between two samples of the thread.
        proc: folder of this process in the proc file system.
    """

    name = "host"
    sees = "resident pages of this process, shared ones and libraries included; not its children, not swapped pages"

    def __init__(self, period_seconds: float = 0.005, *, proc: Path = Path("/proc/self")) -> None:
        self._period_seconds = period_seconds
        self._proc = proc
        self._phases = OpenPhases()
        self._sampled = SampledPhases(self._read_psutil, period_seconds)

    @property
    def resolution(self) -> str:
        if self._kernel_keeps_peak:
            return "pages, to the precision of the kernel's counters; continuous (VmHWM)"
        return f"pages; sampled every {self._period_seconds * 1e3:g} ms and at phase ends, a shorter peak can be missed"

    def why_unavailable(self) -> str | None:
        import psutil

        try:
            self._process.memory_info()
        except psutil.Error as error:
            return f"the memory of this process cannot be read: {error}"
        return None

    def start_phase(self, name: str) -> None:
        if not self._kernel_keeps_peak:
            self._sampled.start(name)
            return
        if self._phases:  # a nested phase: save the outer phases' peak before the counter is reset
            self._phases.note(_peak(self._read_status()))
        self._reset_peak()
        self._phases.start(name, _peak(self._read_status()))

    def end_phase(self, name: str) -> Mapping[str, int | None]:
        if not self._kernel_keeps_peak:
            greatest, last = self._sampled.end(name)
            return {"rss_bytes": last["rss_bytes"], "rss_peak_bytes": greatest["rss_bytes"]}
        status = self._read_status()
        return {"rss_bytes": status.get("VmRSS"), **self._phases.end(name, _peak(status))}

    @cached_property
    def _process(self) -> psutil.Process:
        import psutil

        return psutil.Process()

    @cached_property
    def _kernel_keeps_peak(self) -> bool:
        """Whether the kernel's peak rises by a temporary 16 MiB and can be reset; some sandboxes only pretend."""
        nbytes = 16 * 2**20
        try:
            self._reset_peak()
            before = self._read_status()["VmHWM"]
            with mmap.mmap(-1, nbytes) as pages:
                for start in range(0, nbytes, mmap.PAGESIZE):
                    pages[start] = 1
            risen = self._read_status()["VmHWM"] - before
            self._reset_peak()
            return min(risen, self._peak_fell(before + risen)) > nbytes // 2
        except (OSError, KeyError):
            return False

    def _peak_fell(self, peak_bytes: int) -> int:
        return peak_bytes - self._read_status()["VmHWM"]

    def _reset_peak(self) -> None:
        (self._proc / "clear_refs").write_text(_RESET_PEAK)

    def _read_status(self) -> dict[str, int]:
        """Field of ``/proc/self/status`` -> bytes, for fields in kB (1024 bytes in the kernel's units)."""
        fields: dict[str, int] = {}
        for line in (self._proc / "status").read_text().splitlines():
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                fields[name] = int(value.removesuffix(" kB")) * 1024
        return fields

    def _read_psutil(self) -> dict[str, int | None]:
        return {"rss_bytes": self._process.memory_info().rss}


def _peak(status: Mapping[str, int]) -> dict[str, int | None]:
    return {"rss_peak_bytes": status.get("VmHWM")}
