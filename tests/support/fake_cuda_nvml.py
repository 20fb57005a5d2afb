"""`fake_pynvml` over the GPU of `fake_cuda`: its metrics are those of this process's allocator."""

from __future__ import annotations

import os
from typing import Any

from tests.support import fake_pynvml
from tests.support.fake_cuda import CONTEXT_BYTES, MIB, NAME, SM_CLOCK_MHZ, UUID, _cuda_getCompiledVersion, device
from tests.support.fake_pynvml import *  # noqa: F403
from tests.support.fake_pynvml import Card, Machine

ANOTHER_PROCESS = 1
DRIVER_RESERVE_BYTES = 300 * MIB


class _Card(Card):
    @property
    def used(self) -> int:
        return sum(nbytes or 0 for _, nbytes in self.processes)

    @used.setter
    def used(self, _: int) -> None:
        """`GPU` sets what it is given."""

    @property
    def processes(self) -> list[tuple[int, int | None]]:
        memory = device.memory
        own = [(os.getpid(), CONTEXT_BYTES + memory.allocator.reserved_bytes)] if device.in_use else []
        return [*own, *([(ANOTHER_PROCESS, memory.others_bytes)] if memory.others_bytes else [])]

    @processes.setter
    def processes(self, _: Any) -> None:
        """Likewise."""


fake_pynvml.machine = Machine(
    [
        _Card(
            f"GPU-{UUID}",
            name=NAME,
            total=device.memory.total_bytes + DRIVER_RESERVE_BYTES,
            reserved=DRIVER_RESERVE_BYTES,
            sm_clock_mhz=SM_CLOCK_MHZ,
            power_milliwatts=310_000,
            temperature_celsius=48,
            reasons=fake_pynvml.nvmlClocksThrottleReasonGpuIdle,
        )
    ]
)


def nvmlShutdown() -> None:
    fake_pynvml.machine.initialised -= 1


def nvmlSystemGetDriverVersion() -> str:
    return "580.65.06"


def nvmlSystemGetCudaDriverVersion() -> int:
    return _cuda_getCompiledVersion()
