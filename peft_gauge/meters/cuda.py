"""Memory that torch's CUDA caching allocator handed out, and memory that it reserved from the driver."""

from __future__ import annotations

from collections.abc import Mapping

from peft_gauge.meters.sampling import OpenPhases

_PEAKS = {
    "allocated_peak_bytes": "allocated_bytes.all.peak",
    "reserved_peak_bytes": "reserved_bytes.all.peak",
    "fragmented_peak_bytes": "inactive_split_bytes.all.peak",
}
_LAST = {
    "allocated_bytes": "allocated_bytes.all.current",
    "reserved_bytes": "reserved_bytes.all.current",
    "fragmented_bytes": "inactive_split_bytes.all.current",
}
_COUNTS = {"alloc_retries": "num_alloc_retries", "ooms": "num_ooms"}

# The driver's own pool has no split blocks and no retries; torch reports them as 0, which is not a reading.
_ONLY_NATIVE = {"fragmented_peak_bytes", "fragmented_bytes", "alloc_retries", "ooms"}


class CudaMeter:
    """``torch.cuda.memory_stats`` by phase.

    Metrics: ``allocated``, ``reserved`` and ``fragmented`` (free parts of split blocks, which cannot be returned), each
    as ``…_bytes`` at the end of the phase and ``…_peak_bytes`` within it; ``alloc_retries`` (failed ``cudaMalloc``
    calls after which the cache was emptied) and ``ooms`` within the phase. They are absent before CUDA is first used.

    Args:
        device: torch's index of the GPU; ``None`` for the current one.
    """

    name = "cuda allocator"
    sees = "memory served by torch's caching allocator, workspaces included; not the CUDA context or managed memory"
    resolution = "blocks of 512 bytes; every allocation"

    def __init__(self, device: int | None = None) -> None:
        self._device = device
        self._phases = OpenPhases()
        self._counts_before: list[Mapping[str, int]] = []

    def why_unavailable(self) -> str | None:
        import torch

        if not torch.cuda.is_available():
            return f"torch {torch.__version__} finds no usable CUDA device"
        count = torch.cuda.device_count()
        if self._device is not None and not 0 <= self._device < count:
            return f"there is no CUDA device {self._device}; torch finds {count}"
        return None

    def start_phase(self, name: str) -> None:
        import torch

        if self._phases:  # a nested phase: save the outer phases' peak before the counter is reset
            self._phases.note(_pick(self._stats(), _PEAKS))
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats(self._device)
        stats = self._stats()
        self._counts_before.append(stats)
        self._phases.start(name, _pick(stats, _PEAKS))

    def end_phase(self, name: str) -> Mapping[str, int | None]:
        stats = self._stats()
        peaks = self._phases.end(name, _pick(stats, _PEAKS))
        before = self._counts_before.pop()
        # No statistics at the start: there was no allocator yet, and its counters began at 0 within the phase.
        counts = {metric: stats[key] - before.get(key, 0) for metric, key in _COUNTS.items() if key in stats}
        metrics = {**_pick(stats, _LAST), **peaks, **dict.fromkeys(_COUNTS), **counts}
        if stats and not _is_native():
            metrics |= dict.fromkeys(_ONLY_NATIVE)
        return metrics

    def _stats(self) -> Mapping[str, int]:
        import torch

        return torch.cuda.memory_stats(self._device)  # empty before CUDA is initialized


def _pick(stats: Mapping[str, int], keys: Mapping[str, str]) -> dict[str, int | None]:
    return {metric: stats.get(key) for metric, key in keys.items()}


def _is_native() -> bool:
    import torch

    return torch.cuda.get_allocator_backend() == "native"
