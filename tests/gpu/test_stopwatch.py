"""The stopwatch on a CUDA device: kernels whose duration is known beforehand, and the speed of the GPU."""

from __future__ import annotations

import time
from functools import partial

import pytest

from peft_gauge.clock.rounds import Stopwatch


def spin(seconds: float, mhz: int) -> None:
    import torch

    torch.cuda._sleep(int(seconds * mhz * 1e6))


def busy_sm_clock_mhz() -> int:
    """The SM clock while a kernel spins: an idle GPU has a lower one, and takes a while to raise it."""
    import torch

    from peft_gauge.meters.nvml import NvmlMeter

    spin(3.0, 1500)
    time.sleep(1.0)
    mhz = NvmlMeter().state().sm_clock_mhz
    torch.cuda.synchronize()
    if mhz is None:
        pytest.skip("NVML does not tell the SM clock of this GPU")
    return mhz


@pytest.mark.gpu
def test_a_kernel_of_known_duration() -> None:
    mhz = busy_sm_clock_mhz()
    stopwatch = Stopwatch("cuda")
    for seconds in (0.02, 0.2):
        one = stopwatch.time(partial(spin, seconds, mhz))
        assert one.device_seconds == pytest.approx(seconds, rel=0.2)


@pytest.mark.gpu
def test_events_and_host_agree_on_a_long_kernel() -> None:
    mhz = busy_sm_clock_mhz()
    one = Stopwatch("cuda").time(partial(spin, 0.2, mhz))
    assert one.device_seconds == pytest.approx(one.host_seconds, rel=0.05)


@pytest.mark.gpu
def test_a_second_product_is_within_the_measured_speed() -> None:
    import torch

    from peft_gauge.clock import peak_throughput

    speed = peak_throughput.measure_peak_throughput("cuda", "bfloat16")
    side = speed.product_shape[0]
    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    stopwatch = Stopwatch("cuda")
    product = stopwatch.time(lambda: torch.mm(left, right))
    product = stopwatch.time(lambda: torch.mm(left, right))
    share = peak_throughput.mfu(2 * side**3, product.seconds, speed)
    assert 0.25 < share <= 1
