"""Clocks that are correct on every device, and statistics of their readings."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence

Clock = Callable[[], float]


def synchronised_clock() -> float:
    """Seconds on the host's monotonic clock, read after the current CUDA device has finished all launched work.

    CUDA launches return before the work is done, so a bare host clock times only the launch. If CUDA was never used in
    this process there is nothing to wait for, and torch is not imported.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], object], clock: Clock = synchronised_clock) -> float:
    """Duration of one call of ``work`` by ``clock``, in seconds."""
    start = clock()
    work()
    return clock() - start


def median_ratio(seconds: Sequence[float], control_seconds: Sequence[float]) -> float:
    """The median over rounds of ``seconds`` / ``control_seconds``, paired round by round.

    Each round is divided by a control timed right next to it, so that a change of the machine's speed hardly affects
    the ratio. Raises `ValueError` for unequal numbers of rounds.
    """
    return statistics.median(a / b for a, b in zip(seconds, control_seconds, strict=True))


def tokens_per_second(tokens: int, seconds: float) -> float:
    """Throughput: the ``tokens`` of one step over the ``seconds`` of that same step."""
    return tokens / seconds
