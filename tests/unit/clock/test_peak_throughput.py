"""The speed of a GPU out of planted times, and the shares that cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from peft_gauge.clock import peak_throughput
from peft_gauge.clock.peak_throughput import PeakThroughput
from peft_gauge.clock.rounds import Round
from peft_gauge.errors import GaugeError

GIB = 2**30
SPEED = PeakThroughput("cuda", "bfloat16", 1024.0, 256.0, (8, 8, 8), 64)


class PlannedStopwatch:
    """Its rounds take what was planned; the last one is repeated. It does not run the work."""

    def __init__(self, *rounds: Round) -> None:
        self.rounds = list(rounds)
        self.asked = 0

    def time(self, work: Callable[[], object]) -> Round:
        self.asked += 1
        return self.rounds.pop(0) if len(self.rounds) > 1 else self.rounds[0]


def on_host(*seconds: float) -> PlannedStopwatch:
    return PlannedStopwatch(*(Round(each, None) for each in seconds))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So little memory that the matrices are 256² and the copy is 64 MiB."""
    monkeypatch.setattr(peak_throughput, "_free_bytes", lambda device: 2**27 + 2**20)


@pytest.mark.usefixtures("small")
def test_speeds_are_work_over_the_fastest_round() -> None:
    speed = peak_throughput.measure_peak_throughput(
        "cpu", "float32", stopwatch=on_host(3.0, 2.0, 0.5, 0.75), seconds=1.0
    )
    assert speed.product_shape == (256, 256, 256)
    assert speed.copy_bytes == 2**26
    # Two rounds at least, 3 s and 2 s, and none more once a second is spent.
    assert speed.product_flops_per_second == 2 * 256**3 / 2.0
    assert speed.copy_bytes_per_second == 2 * 2**26 / 0.5


@pytest.mark.usefixtures("small")
def test_rounds_go_on_until_the_time_is_spent() -> None:
    stopwatch = on_host(*[0.25] * 3, 0.125, 0.25, 1.0, 1.0)
    speed = peak_throughput.measure_peak_throughput("cpu", "float32", stopwatch=stopwatch, seconds=1.125)
    assert stopwatch.asked == 7
    assert speed.product_flops_per_second == 2 * 256**3 / 0.125
    assert speed.copy_bytes_per_second == 2 * 2**26 / 1.0


@pytest.mark.usefixtures("small")
def test_the_clock_of_the_device_counts_where_there_is_one() -> None:
    stopwatch = PlannedStopwatch(Round(host_seconds=9.0, device_seconds=0.5))
    speed = peak_throughput.measure_peak_throughput("cpu", "float32", stopwatch=stopwatch, seconds=0.5)
    assert speed.product_flops_per_second == 2 * 256**3 / 0.5


@pytest.mark.usefixtures("small")
def test_a_clock_too_coarse_is_refused() -> None:
    with pytest.raises(GaugeError, match="too coarse"):
        peak_throughput.measure_peak_throughput("cpu", "float32", stopwatch=on_host(0.0))


@pytest.mark.usefixtures("small")
def test_the_settings_in_force_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    speed = peak_throughput.measure_peak_throughput("cpu", "bfloat16", stopwatch=on_host(1.0))
    kept = speed.as_json()
    assert json.loads(json.dumps(kept)) == kept
    assert kept == {
        "device": "cpu",
        "dtype": "bfloat16",
        "product_flops_per_second": 2 * 256**3 / 1.0,
        "copy_bytes_per_second": 2.0 * 2**26,
        "product_shape": [256, 256, 256],
        "copy_bytes": 2**26,
        "float32_matmul_precision": "high",
        "allow_tf32": None,
        "threads": 3,
    }


def test_this_processor_is_measured_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_throughput, "_SIZES", {"cpu": (256, 2**22)})
    speed = peak_throughput.measure_peak_throughput("cpu", "float32", seconds=0.01)
    # Between what no computer is too slow for and what no core reaches.
    assert 1e7 < speed.product_flops_per_second < 1e15
    assert 1e7 < speed.copy_bytes_per_second < 1e13
    assert speed.threads == torch.get_num_threads()


def test_the_product_does_the_flops_that_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    product = peak_throughput._product("cpu", torch.float32, 64)
    with FlopCounterMode(display=False) as counter:
        out = product()
    assert counter.get_total_flops() == 2 * 64**3
    assert isinstance(out, torch.Tensor)
    assert out.shape == (64, 64)
    assert out.std() > 1  # 8 for random matrices; a product of zeros would be too easy on a GPU


def test_the_copy_moves_the_bytes_that_are_counted() -> None:
    copy = peak_throughput._copy("cpu", 4096)
    target = copy()
    assert isinstance(target, torch.Tensor)
    assert target.nbytes == 4096
    target.zero_()
    copy()
    assert target.sum(dtype=torch.int64) == 4096


@pytest.mark.parametrize(
    ("device", "itemsize", "free_bytes", "sizes"),
    [
        ("cuda", 2, 80 * GIB, (8192, GIB)),
        ("cuda", 2, 3 * 8192**2 * 2 + 2 * GIB, (8192, GIB)),
        ("cuda", 2, 3 * 8192**2 * 2 + 2 * GIB - 1, (4096, GIB // 2)),
        ("cuda", 4, 3 * 8192**2 * 2 + 2 * GIB, (4096, GIB // 2)),
        ("cuda", 4, GIB, (2048, GIB // 4)),
        ("cpu", 4, 16 * GIB, (1024, GIB // 4)),
    ],
)
def test_sizes_fit_in_free_memory(device: str, itemsize: int, free_bytes: int, sizes: tuple[int, int]) -> None:
    assert peak_throughput._sizes(device, itemsize, free_bytes) == sizes


def test_too_little_memory_is_one_line() -> None:
    with pytest.raises(GaugeError, match="1,000,000 bytes are free on cuda"):
        peak_throughput._sizes("cuda", 2, 1_000_000)


def test_unknown_names_are_one_line() -> None:
    with pytest.raises(GaugeError, match="unknown dtype 'bfloat'; did you mean bfloat16"):
        peak_throughput.measure_peak_throughput("cpu", "bfloat")
    with pytest.raises(GaugeError, match="unknown device 'tpu'"):
        peak_throughput.measure_peak_throughput("tpu", "float32", stopwatch=on_host(1.0))


# Shares


def test_shares_of_planted_work() -> None:
    assert peak_throughput.mfu(256.0, 0.5, SPEED) == 0.5
    assert peak_throughput.mbu(16.0, 0.25, SPEED) == 0.25


def test_the_measurement_itself_has_a_share_of_one() -> None:
    speed = PeakThroughput("cpu", "float32", 2 * 1024**3 / 0.125, 2 * GIB / 0.25, (1024,) * 3, GIB)
    assert peak_throughput.mfu(2 * 1024**3, 0.125, speed) == 1
    assert peak_throughput.mbu(2 * GIB, 0.25, speed) == 1


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_up_to_one_can_be(share: float) -> None:
    assert peak_throughput.impossible(share, "FLOPs") is None


@pytest.mark.parametrize(("share", "shown"), [(1.0001, "1.0001"), (140.0, "140"), (float("nan"), "nan")])
def test_a_share_above_one_is_refused(share: float, shown: str) -> None:
    line = peak_throughput.impossible(share, "FLOPs of a step")
    assert line is not None
    assert line.startswith(f"FLOPs of a step: {shown} times this device's measured peak")


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_no_speed_without_time(seconds: float) -> None:
    with pytest.raises(GaugeError, match="cannot compute throughput"):
        peak_throughput.mfu(1.0, seconds, SPEED)
    with pytest.raises(GaugeError, match="cannot compute throughput"):
        peak_throughput.mbu(1.0, seconds, SPEED)
