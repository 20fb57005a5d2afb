"""Was the machine steady during a measurement? Two readings, before and after, give the reasons for doubt.

Only the ends are read: an event in between is visible only in CPU time, which is cumulative.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

MOST_CLOCK_FALL = 0.05
"""Largest relative drop of the SM clock between start and end."""

MOST_OTHER_CPU = 0.10
"""Largest share of all cores' time that other processes may use."""

MOST_STEAL = 0.02
"""Largest share of all cores' time that the hypervisor may withhold."""

# Counters of CPU time have ticks of 10 ms; over a shorter time than this a few ticks would look like a load.
_LEAST_WALL_SECONDS = 0.5


@dataclass(frozen=True)
class DeviceState:
    """The state that sets a GPU's speed at one moment; ``None`` for values that its driver does not report.

    ``slowdowns``: NVML's names of the reasons for a reduced clock; empty if there are none.
    """

    sm_clock_mhz: int | None
    power_milliwatts: int | None
    temperature_celsius: int | None
    slowdowns: tuple[str, ...] | None


def device_unsteady(before: DeviceState, after: DeviceState, *, other_processes: int | None = None) -> tuple[str, ...]:
    """Why the GPU was not steady between two readings, one line per reason; empty if it was.

    Args:
        before, after: taken while the GPU was at work or just had been, since an idle one lowers its clock.
        other_processes: number of other processes that compute on the GPU; ``None`` if unknown.

    A ``None`` in a reading gives no reason: unknown is not the same as steady.
    """
    reasons = []
    for state, moment in ((before, "start"), (after, "end")):
        if state.slowdowns:
            reasons.append(f"throttled at the {moment}: {', '.join(state.slowdowns)}")
    first, last = before.sm_clock_mhz, after.sm_clock_mhz
    if first is not None and last is not None and first - last > MOST_CLOCK_FALL * first:
        reasons.append(f"SM clock fell from {first} to {last} MHz")
    if other_processes is not None and other_processes > 0:
        others = "1 other process computes" if other_processes == 1 else f"{other_processes} other processes compute"
        reasons.append(f"{others} on this GPU")
    return tuple(reasons)


@dataclass(frozen=True)
class HostState:
    """The host's cumulative seconds at one moment; ``None`` for values that it does not report.

    Attributes:
        wall_seconds: a monotonic clock, of use as a difference only.
        cores: logical processors.
        busy_seconds: CPU time of all processes and of the kernel, summed over cores.
        process_seconds: CPU time of this process, its living descendants, and children that it waited for.
        stolen_seconds: time in which the hypervisor ran other guests, summed over cores; Linux only.
    """

    wall_seconds: float
    cores: int | None
    busy_seconds: float | None
    process_seconds: float | None
    stolen_seconds: float | None


def host_state() -> HostState:
    """The host's state now, by psutil. In a container, busy and stolen seconds are those of the whole machine."""
    import psutil

    try:
        times = psutil.cpu_times()
    except (psutil.Error, OSError):  # a sandbox can hide /proc/stat
        times = None
    return HostState(
        wall_seconds=time.monotonic(),
        cores=psutil.cpu_count(),
        busy_seconds=None if times is None else _busy(times),
        process_seconds=_process_seconds(psutil.Process()),
        stolen_seconds=getattr(times, "steal", None),
    )


def _busy(times: object) -> float:
    # Only "user" and "system" exist on every system. "user" includes guests; waiting for a disk is idle time.
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))


def _process_seconds(process: psutil.Process) -> float | None:
    import psutil

    try:
        total = _cpu_seconds(process)
        descendants = process.children(recursive=True)
    except (psutil.Error, OSError):
        return None
    for each in descendants:
        try:
            total += _cpu_seconds(each)
        except psutil.NoSuchProcess:  # it has ended; its parent counts it after waiting for it
            continue
        except (psutil.Error, OSError):
            return None
    return total


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system + times.children_user + times.children_system


def host_unsteady(before: HostState, after: HostState) -> tuple[str, ...]:
    """Why the host was not steady between two readings, one line per reason; empty if it was.

    Readings less than half a second apart are too coarse to give a reason, and ``None`` gives none either.
    """
    wall_seconds = after.wall_seconds - before.wall_seconds
    if after.cores is None or wall_seconds < _LEAST_WALL_SECONDS:
        return ()
    core_seconds = wall_seconds * after.cores
    cores = "1 core" if after.cores == 1 else f"{after.cores} cores"
    reasons = []
    busy = _difference(before.busy_seconds, after.busy_seconds)
    own = _difference(before.process_seconds, after.process_seconds)
    if busy is not None and own is not None and busy - own > MOST_OTHER_CPU * core_seconds:
        reasons.append(f"other processes took {100 * (busy - own) / core_seconds:.1f} % of {cores}")
    stolen = _difference(before.stolen_seconds, after.stolen_seconds)
    if stolen is not None and stolen > MOST_STEAL * core_seconds:
        reasons.append(f"the hypervisor kept back {100 * stolen / core_seconds:.1f} % of {cores} (steal)")
    return tuple(reasons)


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before
