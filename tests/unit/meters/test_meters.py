"""Meters against amounts known beforehand: real tensors and host memory, invented CUDA allocators and GPUs."""

from __future__ import annotations

import inspect
import itertools
import math
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml as real_pynvml
import pytest
import torch

from peft_gauge import meters
from peft_gauge.errors import GaugeError
from peft_gauge.memory import categories
from peft_gauge.meters import FORWARD, OPTIMIZER, WHOLE_STEP, Phases, overhead_seconds
from peft_gauge.meters.cuda import _COUNTS, _LAST, _PEAKS, CudaMeter
from peft_gauge.meters.host import HostMeter
from peft_gauge.meters.nvml import NvmlMeter
from peft_gauge.meters.nvml_device import NvmlDevice, find_device
from peft_gauge.meters.sampling import OpenPhases, SampledPhases
from peft_gauge.meters.tensors import TensorMeter
from tests.support import fake_pynvml
from tests.support.fake_pynvml import Card, Machine

MB = 10**6
NEVER = 3600.0  # a sampling period so long that only starts and ends of phases are samples


# The driver of all meters


class Scripted:
    """A meter that gives prepared metrics and keeps what it was asked."""

    sees = resolution = "scripted"

    def __init__(self, name: str, *metrics: Mapping[str, int | None], reason: str | None = None) -> None:
        self.name, self.reason = name, reason
        self.metrics = iter(metrics)
        self.asked: list[str] = []

    def why_unavailable(self) -> str | None:
        return self.reason

    def start_phase(self, name: str) -> None:
        self.asked.append(f"start {name}")

    def end_phase(self, name: str) -> Mapping[str, int | None]:
        self.asked.append(f"end {name}")
        return next(self.metrics)


class Broken(Scripted):
    def end_phase(self, name: str) -> Mapping[str, int | None]:
        raise OSError("read error")


def test_every_meter_is_driven_and_unread_figures_are_absent() -> None:
    one, two = Scripted("one", {"a_peak_bytes": 5, "b_peak_bytes": None}), Scripted("two", {"c": 0})
    phases = Phases([one, two])
    with phases.phase(FORWARD):
        assert phases.readings == []

    (reading,) = phases.readings
    assert reading.phase == "forward"
    assert reading.by_meter == {"one": {"a_peak_bytes": 5}, "two": {"c": 0}}
    assert one.asked == two.asked == ["start forward", "end forward"]


def test_an_unavailable_meter_is_not_driven_and_says_why() -> None:
    absent = Scripted("absent", reason="no driver")
    phases = Phases([absent, Scripted("there", {"a": 1})])
    with phases.phase(FORWARD):
        pass

    assert phases.unavailable == {"absent": "no driver"}
    assert absent.asked == []
    assert phases.readings[0].by_meter == {"there": {"a": 1}}


def test_meters_are_read_when_the_body_raises() -> None:
    phases = Phases([Scripted("one", {"a": 1})])
    with pytest.raises(MemoryError), phases.phase(FORWARD):
        raise MemoryError
    assert phases.readings[0].by_meter == {"one": {"a": 1}}


def test_a_meter_that_fails_takes_no_other_with_it() -> None:
    first, last = Scripted("first", {"a": 1}), Scripted("last", {"b": 2})
    phases = Phases([first, Broken("broken"), last])
    with pytest.raises(OSError, match="read error"), phases.phase(FORWARD):
        pass
    assert phases.readings[0].by_meter == {"first": {"a": 1}, "last": {"b": 2}}


def test_peaks_are_the_greatest_of_all_runs_of_a_phase() -> None:
    phases = Phases([Scripted("m", {"x_peak_bytes": 3, "x": 9}, {"x_peak_bytes": 7}, {"x_peak_bytes": 5})])
    for _ in range(3):
        with phases.phase(FORWARD):
            pass
    assert phases.peaks() == {"forward": {"m": {"x_peak_bytes": 7}}}


def test_phases_have_the_names_by_which_the_tracker_sorts() -> None:
    assert (meters.FORWARD, meters.BACKWARD, meters.OPTIMIZER) == (
        categories.FORWARD,
        categories.BACKWARD,
        categories.OPTIMIZER,
    )


def test_overhead_is_the_metered_time_less_the_bare_one() -> None:
    now = itertools.accumulate(itertools.cycle([0, 10, 0, 4, 0, 12, 0, 4, 0, 30, 0, 4]))  # differences 6, 8, 26
    meter = Scripted("m", *[{}] * 4)
    assert overhead_seconds(meter, rounds=3, clock=lambda: float(next(now))) == 8
    assert meter.asked.count("end overhead") == 4  # three rounds, and one before that counts for nothing


def test_overhead_of_real_meters_is_a_time() -> None:
    for meter in (HostMeter(), TensorMeter()):
        assert math.isfinite(overhead_seconds(meter))  # below 0 where it is smaller than the noise


# Sampling


def test_open_phases_keep_the_greatest_and_none_is_no_amount() -> None:
    phases = OpenPhases()
    phases.start("outer", {"a": 5, "b": None})
    phases.start("inner", {"a": 2, "b": None})
    phases.note({"a": 3, "b": None})
    assert phases.end("inner", {"a": 1, "b": None}) == {"a": 3, "b": None}
    assert phases.end("outer", {"a": None, "b": 0}) == {"a": 5, "b": 0}


def test_ending_another_phase_than_the_innermost_is_an_error() -> None:
    phases = OpenPhases()
    phases.start("outer", {})
    phases.start("inner", {})
    with pytest.raises(ValueError, match="cannot end phase 'outer': the innermost open phase is 'inner'"):
        phases.end("outer", {})
    phases.end("inner", {})
    phases.end("outer", {})
    with pytest.raises(ValueError, match="None"):
        phases.end("outer", {})


def test_the_thread_samples_between_start_and_end_and_stops_then() -> None:
    amounts = itertools.chain([1, 2, 9], itertools.repeat(3))
    seen = threading.Event()

    def read() -> dict[str, int | None]:
        amount = next(amounts)
        if amount == 9:
            seen.set()
        return {"a": amount}

    sampled = SampledPhases(read, 0.001)
    sampled.start("x")
    assert seen.wait(10)
    assert "peft-gauge-sampler" in [thread.name for thread in threading.enumerate()]
    assert sampled.end("x") == ({"a": 9}, {"a": 3})
    assert "peft-gauge-sampler" not in [thread.name for thread in threading.enumerate()]


def test_the_last_moment_is_a_sample() -> None:
    amounts = iter([1, 8])
    sampled = SampledPhases(lambda: {"a": next(amounts)}, NEVER)
    sampled.start("x")
    assert sampled.end("x") == ({"a": 8}, {"a": 8})


def test_what_stops_the_thread_is_raised_at_the_end() -> None:
    def read() -> dict[str, int | None]:
        if threading.current_thread() is not threading.main_thread():
            raise OSError("gone")
        return {"a": 1}

    sampled = SampledPhases(read, 0.001)
    sampled.start("x")
    deadline = time.monotonic() + 10
    while any(t.name == "peft-gauge-sampler" for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.001)
    with pytest.raises(OSError, match="gone"):
        sampled.end("x")


# Host memory, for real


def hold(nbytes: int, seconds: float) -> None:
    """Map memory and write to every page; the allocator's heap may have resident pages to give, a new mapping not."""
    with mmap.mmap(-1, nbytes) as block:
        for start in range(0, nbytes, mmap.PAGESIZE):
            block[start] = 1
        time.sleep(seconds)


needs_kernel_peak = pytest.mark.skipif(
    not HostMeter()._kernel_keeps_peak, reason="this kernel does not let a process reset its own VmHWM"
)


@needs_kernel_peak
@pytest.mark.parametrize("seconds", [0.02, 0.0])
def test_200_mb_for_20_ms_are_seen_by_the_kernels_peak(seconds: float) -> None:
    meter = HostMeter()
    meter.start_phase(FORWARD)
    hold(200 * MB, seconds)
    metrics = meter.end_phase(FORWARD)
    assert rise(metrics) == pytest.approx(200 * MB, abs=8 * MB)
    assert "VmHWM" in meter.resolution


def test_200_mb_for_20_ms_are_seen_by_samples(tmp_path: Path) -> None:
    meter = HostMeter(proc=tmp_path)  # no such files there, as on a system without proc
    assert "sampled every 5 ms" in meter.resolution

    def risen() -> float:
        meter.start_phase(FORWARD)
        hold(200 * MB, 0.02)
        return rise(meter.end_phase(FORWARD))

    # A busy machine may not let the thread run within 20 ms, so one of a few tries has to see it.
    assert any(risen() == pytest.approx(200 * MB, abs=8 * MB) for _ in range(5))


def test_samples_alone_miss_what_falls_between_them(tmp_path: Path) -> None:
    meter = HostMeter(NEVER, proc=tmp_path)
    meter.start_phase(FORWARD)
    hold(200 * MB, 0)
    assert rise(meter.end_phase(FORWARD)) < 100 * MB


def test_a_sandbox_that_only_pretends_to_reset_is_sampled(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t  500000 kB\nVmRSS:\t  400000 kB\n")
    assert "sampled" in HostMeter(proc=tmp_path).resolution
    assert (tmp_path / "clear_refs").read_text() == "5"


@needs_kernel_peak
def test_a_host_peak_belongs_to_its_phase_and_to_those_around_it() -> None:
    phases = Phases([HostMeter()])
    with phases.phase(WHOLE_STEP):
        hold(200 * MB, 0)
        with phases.phase(FORWARD):
            hold(80 * MB, 0)
        with phases.phase(OPTIMIZER):
            pass
    forward, optimizer, step = (reading.by_meter["host"] for reading in phases.readings)
    assert rise(forward) == pytest.approx(80 * MB, abs=8 * MB)
    assert rise(optimizer) == pytest.approx(0, abs=8 * MB)
    assert rise(step) == pytest.approx(200 * MB, abs=8 * MB)


def rise(metrics: Mapping[str, int | None]) -> int:
    peak, last = metrics["rss_peak_bytes"], metrics["rss_bytes"]
    assert peak is not None
    assert last is not None
    return peak - last


# Tensors, for real


def test_tensor_peak_by_hand_also_when_the_body_raises() -> None:
    meter = TensorMeter()
    weight = torch.zeros(100)  # 400 bytes
    meter.tracker.adopt(weight, categories.BASE_WEIGHTS)
    phases = Phases([meter])
    kept = []

    def fails() -> None:
        kept.append(weight + 1)  # 400 bytes
        (kept[0] * 2).sum()  # 400 and 4 bytes at once
        raise RuntimeError

    with pytest.raises(RuntimeError), phases.phase(FORWARD):
        fails()
    metrics = phases.readings[0].by_meter["tensors"]
    assert metrics["tensor_peak_bytes"] == 400 + 400 + 400 + 4
    assert metrics["live_bytes"] == 400 + 400
    assert metrics["base_weights_bytes_at_peak"] == 400
    assert metrics["activations_bytes_at_peak"] == 804
    assert metrics["gradients_bytes_at_peak"] == 0


def test_tensor_peaks_of_nested_and_later_phases() -> None:
    phases = Phases([TensorMeter()])
    with phases.phase(WHOLE_STEP):
        torch.zeros(1000)
        kept = torch.zeros(10)
        with phases.phase(FORWARD):
            torch.zeros(500)
        with phases.phase(OPTIMIZER):
            pass
    del kept
    with phases.phase(FORWARD):
        torch.zeros(3)
    peaks = [(r.phase, r.by_meter["tensors"]["tensor_peak_bytes"]) for r in phases.readings]
    assert peaks == [("forward", 2040), ("optimizer", 40), ("step", 4000), ("forward", 12)]


def test_the_tensor_meter_refuses_to_end_another_phase() -> None:
    meter = TensorMeter()
    with pytest.raises(ValueError, match="None"):
        meter.end_phase(FORWARD)


# torch's CUDA allocator, invented


class Allocator:
    """Statistics under the real keys; what is allocated stays reserved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, initialised: bool = True, backend: str = "native") -> None:
        self.initialised = initialised
        self.stats = dict.fromkeys([*_PEAKS.values(), *_LAST.values(), *_COUNTS.values()], 0)
        for name, stand_in in {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "is_initialized": lambda: self.initialised,
            "memory_stats": lambda device=None: dict(self.stats) if self.initialised else {},
            "reset_peak_memory_stats": self.reset,
            "get_allocator_backend": lambda: backend,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def take(self, nbytes: int) -> None:
        self.initialised = True
        self._change("allocated_bytes", nbytes)
        self._change("reserved_bytes", max(0, self._now("allocated_bytes") - self._now("reserved_bytes")))
        self._fragment()

    def give(self, nbytes: int) -> None:
        self._change("allocated_bytes", -nbytes)
        self._fragment()

    def reset(self, device: int | None = None) -> None:
        assert self.initialised, "torch raises if CUDA is not initialised"
        for key in _PEAKS.values():
            self.stats[key] = self.stats[key.replace(".peak", ".current")]

    def _fragment(self) -> None:
        free = self._now("reserved_bytes") - self._now("allocated_bytes")
        self._change("inactive_split_bytes", free - self._now("inactive_split_bytes"))

    def _now(self, what: str) -> int:
        return self.stats[f"{what}.all.current"]

    def _change(self, what: str, nbytes: int) -> None:
        self.stats[f"{what}.all.current"] += nbytes
        self.stats[f"{what}.all.peak"] = max(self.stats[f"{what}.all.peak"], self._now(what))


def test_the_statistics_have_these_keys_in_torch() -> None:
    documented = torch.cuda.memory_stats.__doc__ or ""
    for key in [*_PEAKS.values(), *_LAST.values()]:
        name, pool, metric = key.split(".")
        assert f'"{name}.{{all,large_pool,small_pool}}.{{current,peak,allocated,freed}}"' in documented
        assert (pool, metric in ("current", "peak")) == ("all", True)
    for key in _COUNTS.values():
        assert f'"{key}"' in documented


def test_allocator_figures_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch)
    allocator.take(5000)
    allocator.give(4000)
    allocator.stats["num_ooms"] = 1  # before the phase: not the phase's
    phases = Phases([CudaMeter()])
    with phases.phase(WHOLE_STEP):
        allocator.take(1000)
        allocator.give(1000)
        with phases.phase(FORWARD):
            allocator.take(300)
            allocator.stats["num_alloc_retries"] += 2
    forward, step = (reading.by_meter["cuda allocator"] for reading in phases.readings)
    assert forward == {
        "allocated_bytes": 1300,
        "allocated_peak_bytes": 1300,
        "reserved_bytes": 5000,
        "reserved_peak_bytes": 5000,
        "fragmented_bytes": 3700,
        "fragmented_peak_bytes": 4000,
        "alloc_retries": 2,
        "ooms": 0,
    }
    assert step["allocated_peak_bytes"] == 2000  # from before the inner phase reset the counter, not the 5000
    assert step["alloc_retries"] == 2


def test_allocator_figures_are_absent_before_cuda_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch, initialised=False)
    phases = Phases([CudaMeter()])
    with phases.phase(meters.PREPARE):
        pass
    with phases.phase(meters.LOAD):
        allocator.take(700)
        allocator.give(700)
        allocator.stats["num_ooms"] = 1
    prepare, load = (reading.by_meter["cuda allocator"] for reading in phases.readings)
    assert prepare == {}
    assert (load["allocated_peak_bytes"], load["allocated_bytes"], load["ooms"]) == (700, 0, 1)


def test_the_drivers_own_pool_tells_no_fragmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch, backend="cudaMallocAsync")
    phases = Phases([CudaMeter()])
    with phases.phase(FORWARD):
        allocator.take(10)
    metrics = phases.readings[0].by_meter["cuda allocator"]
    assert set(metrics) == {"allocated_bytes", "allocated_peak_bytes", "reserved_bytes", "reserved_peak_bytes"}


def test_cuda_meter_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA device" in str(CudaMeter().why_unavailable())
    Allocator(monkeypatch)
    assert CudaMeter(0).why_unavailable() is None
    assert CudaMeter(1).why_unavailable() == "there is no CUDA device 1; torch finds 1"


# NVML, invented


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with two equal GPUs; tests change it."""
    machine = Machine([Card("GPU-aaaa-1111"), Card("GPU-bbbb-2222")])
    monkeypatch.setattr(fake_pynvml, "machine", machine)
    monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    return machine


def found(index: int = 0, **environment: str) -> str:
    fake_pynvml.nvmlInit()
    return find_device(index, environment=environment).uuid


def names_of(module: Any, kind: Callable[[Any], bool]) -> dict[str, Any]:
    return {n: v for n, v in vars(module).items() if n.lower().startswith("nvml") and kind(v)}


@pytest.mark.parametrize("function", fake_pynvml.FUNCTIONS, ids=lambda function: function.__name__)
def test_stand_in_has_the_signatures_of_the_real_module(function: Callable[..., Any]) -> None:
    def shape(call: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(call).parameters.values()]

    assert shape(function) == shape(getattr(real_pynvml, function.__name__))


def test_stand_in_has_the_constants_and_errors_of_the_real_module() -> None:
    constants = names_of(fake_pynvml, lambda value: isinstance(value, int))
    assert constants == {name: getattr(real_pynvml, name) for name in constants}
    errors = names_of(fake_pynvml, inspect.isclass)
    assert len(errors) > 5
    for name in errors.keys() - {"NVMLError"}:
        real, ours = getattr(real_pynvml, name), errors[name]
        assert issubclass(real, real_pynvml.NVMLError)
        assert issubclass(ours, fake_pynvml.NVMLError)
        assert (ours().value, str(ours())) == (real().value, str(real()))


def test_stand_in_has_the_fields_of_the_real_structs(nvml: Machine) -> None:
    fake_pynvml.nvmlInit()
    for version, real in (
        (None, real_pynvml.c_nvmlMemory_t),
        (real_pynvml.nvmlMemory_v2, real_pynvml.c_nvmlMemory_v2_t),
    ):
        info = fake_pynvml.nvmlDeviceGetMemoryInfo(nvml.cards[0], version)
        assert set(vars(info)) == {field[0] for field in real._fields_}
    real_fields = {field[0] for field in real_pynvml.c_nvmlProcessInfo_v3_t._fields_}
    assert {"pid", "usedGpuMemory"} <= real_fields


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (fake_pynvml.NVMLError_LibraryNotFound, "NVML does not respond: NVML Shared Library Not Found"),
        (fake_pynvml.NVMLError_DriverNotLoaded, "NVML does not respond: Driver Not Loaded"),
        (fake_pynvml.NVMLError_NoPermission, "NVML does not respond: Insufficient Permissions"),
    ],
)
def test_no_driver(nvml: Machine, error: type[fake_pynvml.NVMLError], text: str) -> None:
    nvml.broken = error
    meter = NvmlMeter()
    assert meter.why_unavailable() == text
    assert Phases([meter]).unavailable == {"nvml": text}
    with pytest.raises(GaugeError, match="NVML does not respond"):
        meter.state()


def test_no_device(nvml: Machine) -> None:
    nvml.cards.clear()
    assert "NVML finds 0" in str(NvmlMeter().why_unavailable())


def test_a_driver_too_old_for_the_second_struct_is_not_read_by_the_first(nvml: Machine) -> None:
    nvml.cards[0].refuses["nvmlDeviceGetMemoryInfo"] = fake_pynvml.NVMLError_FunctionNotFound
    assert "does not report this device's memory" in str(NvmlMeter().why_unavailable())


@pytest.mark.parametrize(
    ("visible", "index", "uuid"),
    [
        (None, 1, "GPU-bbbb-2222"),
        ("1", 0, "GPU-bbbb-2222"),
        ("1,0", 1, "GPU-aaaa-1111"),
        (" 1 , 0", 0, "GPU-bbbb-2222"),
        ("GPU-bbbb-2222", 0, "GPU-bbbb-2222"),
        ("GPU-bb", 0, "GPU-bbbb-2222"),
        ("GPU-bbbb-2222,GPU-aaaa-1111", 1, "GPU-aaaa-1111"),
    ],
)
def test_the_visible_device_is_found(nvml: Machine, visible: str | None, index: int, uuid: str) -> None:
    assert found(index, **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})) == uuid


@pytest.mark.parametrize(
    ("visible", "text"),
    [
        ("", "makes 0 device"),
        ("-1", "makes 0 device"),
        ("-1,0", "makes 0 device"),
        ("nonsense", "makes 0 device"),
        ("7", "there is no device 7: NVML finds 2"),
        ("GPU-cccc", "no device with a UUID that starts with GPU-cccc"),
        ("GPU-", "2 devices with a UUID that starts"),
        ("MIG-9", "no MIG instance MIG-9"),
    ],
)
def test_a_device_that_is_not_visible_or_not_there(nvml: Machine, visible: str, text: str) -> None:
    with pytest.raises(GaugeError, match=text):
        found(CUDA_VISIBLE_DEVICES=visible)


def test_the_meter_reads_the_environment_of_this_process(nvml: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.cards[1].used = 77
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert read(NvmlMeter())["device_bytes"] == 77
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "makes 0 device" in str(NvmlMeter().why_unavailable())


def test_an_index_among_unlike_cards_needs_the_order_of_the_bus(nvml: Machine) -> None:
    nvml.cards[1].name = "Invented 24GB"
    with pytest.raises(GaugeError, match="PCI_BUS_ID"):
        found(1)
    assert found(1, CUDA_DEVICE_ORDER="PCI_BUS_ID") == "GPU-bbbb-2222"
    assert found(CUDA_VISIBLE_DEVICES="GPU-bbbb-2222") == "GPU-bbbb-2222"


def test_torch_is_asked_for_the_uuid_where_it_uses_cuda(nvml: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.cards[1].name = "Invented 24GB"  # an index would be ambiguous
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="bbbb-2222"))
    assert found(0) == "GPU-bbbb-2222"


def divide(card: Card, *uuids: str) -> None:
    instances = [Card(uuid, parent=card, total=10 * 2**30) for uuid in uuids]
    card.instances = [None, *instances, None]


def test_mig_instance_by_uuid_and_the_state_of_its_card(nvml: Machine) -> None:
    card = nvml.cards[1]
    divide(card, "MIG-3333", "MIG-4444")
    card.instances[2].used = 123  # type: ignore[index, union-attr]
    card.temperature_celsius = 61
    meter = NvmlMeter(uuid="MIG-4444")
    assert read(meter)["device_bytes"] == 123
    assert meter.state().temperature_celsius == 61
    assert found(CUDA_VISIBLE_DEVICES="MIG-3333") == "MIG-3333"


def test_mig_instance_by_index_only_where_there_is_one(nvml: Machine) -> None:
    divide(nvml.cards[0], "MIG-3333")
    assert found(0) == "MIG-3333"
    assert found(0, CUDA_VISIBLE_DEVICES="GPU-aaaa") == "MIG-3333"
    divide(nvml.cards[0], "MIG-3333", "MIG-4444")
    with pytest.raises(GaugeError, match="divided into 2 MIG instances"):
        found(0)
    nvml.cards[0].instances = []
    assert found(0) == "GPU-aaaa-1111"


def test_device_and_process_memory_by_phase(nvml: Machine) -> None:
    card = nvml.cards[0]
    meter = NvmlMeter(period_seconds=NEVER)
    card.used, card.processes = 500, [(os.getpid(), 400)]
    phases = Phases([meter])
    with phases.phase(WHOLE_STEP):
        card.used, card.processes = 900, [(os.getpid(), 700), (1, 100)]  # another process appears …
        with phases.phase(FORWARD):
            card.used, card.processes = 600, [(os.getpid(), 450)]  # … and goes
    forward, step = (reading.by_meter["nvml"] for reading in phases.readings)
    assert (
        forward
        == step
        == {
            "device_bytes": 600,
            "device_peak_bytes": 900,
            "driver_reserved_bytes": 600 * 2**20,
            "process_bytes": 450,
            "process_peak_bytes": 700,
            "other_processes": 0,
            "most_other_processes": 1,
        }
    )


def test_the_thread_sees_what_comes_and_goes_within_a_phase(nvml: Machine) -> None:
    meter = NvmlMeter(period_seconds=0.001)
    meter.why_unavailable()
    meter.start_phase(FORWARD)
    nvml.cards[0].used = 900
    before = nvml.calls.count("nvmlDeviceGetComputeRunningProcesses")
    deadline = time.monotonic() + 10
    while nvml.calls.count("nvmlDeviceGetComputeRunningProcesses") < before + 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    nvml.cards[0].used = 0
    metrics = meter.end_phase(FORWARD)
    assert (metrics["device_peak_bytes"], metrics["device_bytes"]) == (900, 0)


@pytest.mark.parametrize(
    "processes",
    [[], [(1, 100)], [(1, None)]],
    ids=["an empty list", "ids of another namespace", "another's, without bytes"],
)
def test_processes_are_absent_where_this_one_is_not_shown(nvml: Machine, processes: list[Any]) -> None:
    nvml.cards[0].processes = processes
    metrics = read(NvmlMeter())
    assert {"process_bytes", "process_peak_bytes", "other_processes", "most_other_processes"}.isdisjoint(metrics)
    assert metrics["device_bytes"] == 0  # a reading, unlike those


def test_bytes_of_processes_are_absent_under_wsl2(nvml: Machine) -> None:
    nvml.cards[0].processes = [(os.getpid(), None), (1, None)]
    metrics = read(NvmlMeter())
    assert "process_bytes" not in metrics
    assert metrics["other_processes"] == 1


def test_this_process_appears_with_its_context(nvml: Machine) -> None:
    meter = NvmlMeter(period_seconds=NEVER)
    phases = Phases([meter])
    with phases.phase(meters.LOAD):
        nvml.cards[0].processes = [(os.getpid(), 420)]
    assert phases.readings[0].by_meter["nvml"]["process_peak_bytes"] == 420


def test_a_card_that_is_lost_on_the_way_leaves_the_peak(nvml: Machine) -> None:
    card = nvml.cards[0]
    card.used = 900
    phases = Phases([NvmlMeter(period_seconds=NEVER)])
    with phases.phase(FORWARD):
        card.refuses = dict.fromkeys(
            ["nvmlDeviceGetMemoryInfo", "nvmlDeviceGetComputeRunningProcesses"], fake_pynvml.NVMLError_GpuIsLost
        )
    assert phases.readings[0].by_meter["nvml"] == {"device_peak_bytes": 900}


def test_a_process_in_two_places_counts_with_both(nvml: Machine) -> None:
    fake_pynvml.nvmlInit()
    card = nvml.cards[0]
    card.processes = [(1, 100), (1, 50), (2, None), (2, 70)]
    assert NvmlDevice(card, card).processes() == {1: 150, 2: None}


def test_state_names_what_holds_the_clock_down(nvml: Machine) -> None:
    card = nvml.cards[0]
    card.sm_clock_mhz, card.power_milliwatts, card.temperature_celsius = 1410, 299_000, 83
    card.reasons = 1 | 4 | 32  # idle, which slows nothing down, power cap, temperature
    state = NvmlMeter().state()
    assert (state.sm_clock_mhz, state.power_milliwatts, state.temperature_celsius) == (1410, 299_000, 83)
    assert state.slowdowns == ("SwPowerCap", "SwThermalSlowdown")
    card.reasons = 1
    assert NvmlMeter().state().slowdowns == ()


def test_an_older_driver_tells_throttling_by_its_former_name(nvml: Machine) -> None:
    card = nvml.cards[0]
    card.reasons = 8
    card.refuses["nvmlDeviceGetCurrentClocksEventReasons"] = fake_pynvml.NVMLError_FunctionNotFound
    assert NvmlMeter().state().slowdowns == ("HwSlowdown",)


def test_state_that_is_not_told_is_none(nvml: Machine) -> None:
    state = NvmlMeter().state()
    assert (state.sm_clock_mhz, state.power_milliwatts, state.temperature_celsius) == (None, None, None)
    assert state.slowdowns is None


def test_a_card_without_permission_is_passed_over(nvml: Machine) -> None:
    nvml.cards[0].refuses["nvmlDeviceGetHandleByIndex"] = fake_pynvml.NVMLError_NoPermission
    assert found(CUDA_VISIBLE_DEVICES="GPU-bbbb") == "GPU-bbbb-2222"


def read(meter: NvmlMeter) -> Mapping[str, int]:
    phases = Phases([meter])
    with phases.phase(FORWARD):
        pass
    return phases.readings[0].by_meter["nvml"]
