"""Peak throughput of a GPU or CPU, measured by a matrix product and a copy, and the utilization that work reaches.

A time on its own is hard to check, but a time that implies more than the peak throughput is certainly wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from peft_gauge.clock.rounds import Round, Stopwatch
from peft_gauge.errors import GaugeError, unknown

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32", "float64")

_GIB = 2**30
# Side of the square matrices and bytes of the copy: large enough to make launch overhead negligible.
_SIZES = {"cuda": (8192, _GIB), "cpu": (1024, _GIB // 4)}
_LEAST_SIDE = 256
_LEAST_ROUNDS = 2


class TimesWork(Protocol):
    """The part of a stopwatch that is used here."""

    def time(self, work: Callable[[], object]) -> Round: ...


@dataclass(frozen=True)
class PeakThroughput:
    """The fastest product and the fastest copy that were measured.

    Attributes:
        device: "cuda" or "cpu".
        dtype: of the matrices.
        product_flops_per_second: 2·m·k·n over the seconds of the product of m×k and k×n.
        copy_bytes_per_second: bytes read plus bytes written, over the seconds of the copy.
        product_shape: m, k, n.
        copy_bytes: the bytes that were copied: each is read once and written once.
        float32_matmul_precision: torch's setting during the measurement; "highest" means full float32.
        allow_tf32: whether cuBLAS may multiply float32 as TF32; ``None`` on the CPU.
        threads: torch's CPU threads; ``None`` on a GPU.
    """

    device: str
    dtype: str
    product_flops_per_second: float
    copy_bytes_per_second: float
    product_shape: tuple[int, int, int]
    copy_bytes: int
    float32_matmul_precision: str | None = None
    allow_tf32: bool | None = None
    threads: int | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields by name, as JSON."""
        return asdict(self) | {"product_shape": list(self.product_shape)}


def measure_peak_throughput(
    device: str, dtype: str, *, stopwatch: TimesWork | None = None, seconds: float = 0.7
) -> PeakThroughput:
    """Measure torch's current ``device`` ("cuda" or "cpu") with matrices of ``dtype``, under the present settings.

    The fastest round counts, since the result is an upper limit. The product has 8192² matrices on a GPU and 1024² on
    the CPU, the copy 1 GiB and 256 MiB; both are halved until they fit in free memory. Product and copy take
    ``seconds`` each, or two rounds if these take longer (such as float16 on a CPU without instructions for it).

    Uses the caching allocator and empties its cache afterwards: run it before, not between, measurements of memory.

    Args:
        stopwatch: by default, a `Stopwatch` of the device.

    Raises `GaugeError` for an unknown device or dtype, a device that is missing or too full, and a clock too coarse.
    """
    import torch

    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if device not in _SIZES:
        raise unknown("device", device, _SIZES)
    watch = Stopwatch(device) if stopwatch is None else stopwatch
    torch_dtype: torch.dtype = getattr(torch, dtype)
    side, copy_bytes = _sizes(device, torch_dtype.itemsize, _free_bytes(device))
    product_seconds = _fastest(_product(device, torch_dtype, side), watch, seconds)
    copy_seconds = _fastest(_copy(device, copy_bytes), watch, seconds)
    if device == "cuda":
        torch.cuda.empty_cache()
    return PeakThroughput(
        device=device,
        dtype=dtype,
        product_flops_per_second=2 * side**3 / product_seconds,
        copy_bytes_per_second=2 * copy_bytes / copy_seconds,
        product_shape=(side, side, side),
        copy_bytes=copy_bytes,
        float32_matmul_precision=torch.get_float32_matmul_precision(),
        allow_tf32=torch.backends.cuda.matmul.allow_tf32 if device == "cuda" else None,
        threads=torch.get_num_threads() if device == "cpu" else None,
    )


def _sizes(device: str, itemsize: int, free_bytes: int) -> tuple[int, int]:
    """The side of the matrices and the bytes of the copy that fit in ``free_bytes`` together."""
    side, copy_bytes = _SIZES[device]
    # The allocator may still hold the product's three matrices when the copy needs its two buffers.
    while 3 * side**2 * itemsize + 2 * copy_bytes > free_bytes:
        side, copy_bytes = side // 2, copy_bytes // 2
        if side < _LEAST_SIDE:
            raise GaugeError(f"only {free_bytes:,} bytes are free on {device}, too few to measure its speed; free more")
    return side, copy_bytes


def _free_bytes(device: str) -> int:
    if device == "cuda":
        import torch

        free_bytes, _ = torch.cuda.mem_get_info()
        return free_bytes
    import psutil

    return psutil.virtual_memory().available


def _product(device: str, dtype: torch.dtype, side: int) -> Callable[[], object]:
    import torch

    # Random values: multiplying zeros needs less power, and a GPU would run at a clock that real work never reaches.
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, dtype=dtype, device=device, generator=generator) for _ in range(2))
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out)


def _copy(device: str, copy_bytes: int) -> Callable[[], object]:
    import torch

    # Not zeros, which on the CPU can be one page mapped repeatedly; a target written before needs no page faults.
    source, target = (torch.ones(copy_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def _fastest(work: Callable[[], object], watch: TimesWork, seconds: float) -> float:
    """Seconds of the fastest of the rounds that fit in ``seconds``, at least two."""
    rounds: list[Round] = []
    while len(rounds) < _LEAST_ROUNDS or sum(each.seconds for each in rounds) < seconds:
        rounds.append(watch.time(work))
        if rounds[-1].seconds <= 0:
            raise GaugeError("the clock is too coarse to measure the speed of this device: a round took 0 s")
    return min(each.seconds for each in rounds)


def mfu(flops: float, seconds: float, card: PeakThroughput) -> float:
    """``flops`` / ``seconds`` over the device's product speed. Raises `GaugeError` unless ``seconds`` is positive."""
    return _per_second(flops, seconds) / card.product_flops_per_second


def mbu(nbytes: float, seconds: float, card: PeakThroughput) -> float:
    """``nbytes``, read and written, / ``seconds`` over the device's copy speed. Raises as `mfu`."""
    return _per_second(nbytes, seconds) / card.copy_bytes_per_second


def _per_second(amount: float, seconds: float) -> float:
    if not seconds > 0:
        raise GaugeError(f"cannot compute throughput: the measured time is {seconds:g} s; time more work at once")
    return amount / seconds


def impossible(share: float, what: str) -> str | None:
    """A message that ``what`` or the clock is wrong, if ``share`` is above 1 or NaN; otherwise ``None``.

    The limit is measured: work on data in a cache can exceed the copy speed, and a GPU that was cold when measured and
    is hot now, or the reverse, can be off by a few percent.
    """
    if share <= 1:
        return None
    return f"{what}: {share:g} times this device's measured peak; this metric or the clock is wrong"
