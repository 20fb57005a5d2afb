"""Planted throttling, clock drops, neighbours and steal: each gives its line, and what is not known gives none."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from typing import Any

import psutil
import pytest

from peft_gauge.clock.steadiness import DeviceState, HostState, device_unsteady, host_state, host_unsteady

STEADY = DeviceState(sm_clock_mhz=1980, power_milliwatts=500_000, temperature_celsius=60, slowdowns=())
UNKNOWN = DeviceState(None, None, None, None)

BEFORE = HostState(wall_seconds=1000.0, cores=4, busy_seconds=5000.0, process_seconds=30.0, stolen_seconds=8.0)


def after(wall: float = 10.0, busy: float = 0.0, own: float = 0.0, stolen: float = 0.0) -> HostState:
    """The host so many seconds after ``BEFORE``."""
    return HostState(1000.0 + wall, 4, 5000.0 + busy, 30.0 + own, 8.0 + stolen)


# The GPU


def test_a_steady_card_gives_no_reason() -> None:
    assert device_unsteady(STEADY, STEADY, other_processes=0) == ()


def test_throttling_is_named_with_its_moment() -> None:
    capped = replace(STEADY, slowdowns=("SwPowerCap", "SwThermalSlowdown"))
    assert device_unsteady(capped, STEADY) == ("throttled at the start: SwPowerCap, SwThermalSlowdown",)
    assert device_unsteady(STEADY, capped) == ("throttled at the end: SwPowerCap, SwThermalSlowdown",)
    assert len(device_unsteady(capped, capped)) == 2


@pytest.mark.parametrize(
    ("first", "last", "reasons"),
    [
        (1980, 1410, ("SM clock fell from 1980 to 1410 MHz",)),
        (2000, 1899, ("SM clock fell from 2000 to 1899 MHz",)),
        (2000, 1900, ()),  # 5 % is allowed
        (1410, 1980, ()),  # a GPU that was idle at the start
        (None, 1410, ()),
        (1980, None, ()),
    ],
)
def test_a_fall_of_the_clock(first: int | None, last: int | None, reasons: tuple[str, ...]) -> None:
    assert device_unsteady(replace(STEADY, sm_clock_mhz=first), replace(STEADY, sm_clock_mhz=last)) == reasons


@pytest.mark.parametrize(
    ("others", "reasons"),
    [
        (None, ()),
        (0, ()),
        (1, ("1 other process computes on this GPU",)),
        (3, ("3 other processes compute on this GPU",)),
    ],
)
def test_other_processes(others: int | None, reasons: tuple[str, ...]) -> None:
    assert device_unsteady(STEADY, STEADY, other_processes=others) == reasons


def test_a_card_that_tells_nothing_gives_no_reason() -> None:
    assert device_unsteady(UNKNOWN, UNKNOWN) == ()


def test_all_reasons_are_given() -> None:
    slow = replace(STEADY, sm_clock_mhz=990, slowdowns=("HwSlowdown",))
    assert device_unsteady(STEADY, slow, other_processes=1) == (
        "throttled at the end: HwSlowdown",
        "SM clock fell from 1980 to 990 MHz",
        "1 other process computes on this GPU",
    )


# The host


def test_a_host_that_only_we_keep_busy_is_steady() -> None:
    assert host_unsteady(BEFORE, after(busy=40.0, own=40.0)) == ()


def test_other_processes_are_what_is_busy_without_us() -> None:
    """10 s on 4 cores are 40 core-seconds; 4 of them are allowed."""
    assert host_unsteady(BEFORE, after(busy=14.0, own=10.0)) == ()
    assert host_unsteady(BEFORE, after(busy=15.0, own=10.0)) == ("other processes took 12.5 % of 4 cores",)


def test_stolen_time() -> None:
    assert host_unsteady(BEFORE, after(stolen=0.75)) == ()
    assert host_unsteady(BEFORE, after(stolen=1.25)) == ("the hypervisor kept back 3.1 % of 4 cores (steal)",)


def test_one_core_is_spelt_in_the_singular() -> None:
    one = replace(BEFORE, cores=1)
    assert host_unsteady(one, replace(after(busy=5.0), cores=1)) == ("other processes took 50.0 % of 1 core",)


@pytest.mark.parametrize("name", ["cores", "busy_seconds", "process_seconds", "stolen_seconds"])
def test_what_is_not_known_gives_no_reason(name: str) -> None:
    end = after(busy=30.0, stolen=20.0)
    whole = host_unsteady(BEFORE, end)
    assert len(whole) == 2
    blamed = {"cores": (), "stolen_seconds": whole[:1]}.get(name, whole[1:])
    nothing: dict[str, Any] = {name: None}
    assert host_unsteady(BEFORE, replace(end, **nothing)) == blamed
    if name != "cores":
        assert host_unsteady(replace(BEFORE, **nothing), end) == blamed


def test_readings_too_close_together_give_no_reason() -> None:
    assert host_unsteady(BEFORE, after(wall=0.25, busy=1.0)) == ()
    assert host_unsteady(BEFORE, after(wall=0.5, busy=1.0)) == ("other processes took 50.0 % of 4 cores",)


# Reading it


LinuxTimes = namedtuple("LinuxTimes", "user nice system idle iowait irq softirq steal guest guest_nice")
MacTimes = namedtuple("MacTimes", "user nice system idle")
ProcessTimes = namedtuple("ProcessTimes", "user system children_user children_system")


class FakeProcess:
    def __init__(self, *times: float, children: tuple[FakeProcess, ...] = (), fails: Exception | None = None) -> None:
        self._times, self._children, self._fails = times, children, fails

    def cpu_times(self) -> ProcessTimes:
        if self._fails is not None:
            raise self._fails
        return ProcessTimes(*self._times)

    def children(self, recursive: bool = False) -> list[FakeProcess]:
        assert recursive
        return list(self._children)


@pytest.fixture
def psutil_says(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``psutil_says(times, process)``: what psutil will say."""

    def say(times: object, process: FakeProcess) -> None:
        monkeypatch.setattr(psutil, "cpu_times", lambda: times)
        monkeypatch.setattr(psutil, "Process", lambda: process)
        monkeypatch.setattr(psutil, "cpu_count", lambda: 8)
        monkeypatch.setattr(time, "monotonic", lambda: 77.0)

    return say


def test_busy_is_work_without_idling_steal_and_what_would_count_twice(psutil_says: Any) -> None:
    psutil_says(LinuxTimes(1, 2, 4, 8, 16, 32, 64, 128, 256, 512), FakeProcess(1, 2, 4, 8))
    assert host_state() == HostState(77.0, 8, 1 + 2 + 4 + 32 + 64, 15, 128)


def test_a_system_that_knows_no_steal(psutil_says: Any) -> None:
    psutil_says(MacTimes(1, 2, 4, 8), FakeProcess(1, 2, 0, 0))
    assert host_state() == HostState(77.0, 8, 7, 3, None)


def test_living_descendants_count_and_one_that_just_ended_does_not(psutil_says: Any) -> None:
    children = (FakeProcess(16, 32, 64, 128), FakeProcess(fails=psutil.NoSuchProcess(5)), FakeProcess(256, 0, 0, 0))
    psutil_says(MacTimes(0, 0, 0, 0), FakeProcess(1, 2, 4, 8, children=children))
    assert host_state().process_seconds == 1 + 2 + 4 + 8 + 16 + 32 + 64 + 128 + 256


@pytest.mark.parametrize(
    "process",
    [
        FakeProcess(fails=psutil.AccessDenied(5)),
        FakeProcess(1, 2, 4, 8, children=(FakeProcess(fails=psutil.AccessDenied(6)),)),
    ],
    ids=["itself", "child"],
)
def test_a_process_that_cannot_be_read_is_not_known(psutil_says: Any, process: FakeProcess) -> None:
    psutil_says(MacTimes(1, 2, 4, 8), process)
    assert host_state().process_seconds is None


def test_a_sandbox_without_cpu_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def withheld() -> None:
        raise PermissionError("/proc/stat")

    monkeypatch.setattr(psutil, "cpu_times", withheld)
    state = host_state()
    assert (state.busy_seconds, state.stolen_seconds) == (None, None)
    assert state.process_seconds is not None


def test_the_time_that_this_process_and_its_children_burn_is_its_own() -> None:
    """CPU time, not time on the wall: it is right however busy the machine is."""
    before = host_state()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    middle = host_state()
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    last = host_state()
    seconds = [state.process_seconds for state in (before, middle, last)]
    assert seconds[0] is not None
    assert seconds[1] is not None
    assert seconds[2] is not None
    assert 0.25 < seconds[1] - seconds[0] < 0.6
    assert 0.25 < seconds[2] - seconds[1] < 0.8
    assert last.wall_seconds > middle.wall_seconds > before.wall_seconds
