"""The meters on a CUDA device: a tensor of known size, and the GPU that NVML and torch agree on."""

from __future__ import annotations

import pytest
import torch

from peft_gauge.memory.ledger import rounded
from peft_gauge.meters import FORWARD, OPTIMIZER, Phases
from peft_gauge.meters.cuda import CudaMeter
from peft_gauge.meters.nvml import NvmlMeter


@pytest.mark.gpu
def test_a_tensor_of_known_size_to_the_block() -> None:
    torch.zeros(1, device="cuda")
    phases = Phases([CudaMeter(), NvmlMeter()])
    with phases.phase(FORWARD):
        pass
    with phases.phase(OPTIMIZER):
        tensor = torch.zeros(3 * 2**20 + 1, dtype=torch.uint8, device="cuda")
    before, after = (reading.by_meter["cuda allocator"] for reading in phases.readings)
    assert after["allocated_peak_bytes"] - before["allocated_bytes"] == rounded(tensor.nbytes) == 3_146_240
    assert phases.readings[1].by_meter["nvml"]["device_bytes"] > after["reserved_bytes"]  # the context is in it


@pytest.mark.gpu
def test_the_device_of_nvml_is_the_one_of_torch() -> None:
    torch.zeros(1, device="cuda")
    meter = NvmlMeter()
    assert meter.why_unavailable() is None
    assert str(torch.cuda.get_device_properties(0).uuid) in meter._device().uuid
    assert meter.state().sm_clock_mhz
