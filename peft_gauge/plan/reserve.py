"""Estimate from a step's log the segments that CUDA's caching allocator reserves, and whether a GPU can hold them."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from peft_gauge.memory import gpus
from peft_gauge.memory.allocator import Event, ReplayResult, replay
from peft_gauge.memory.categories import BACKWARD, FORWARD, OPTIMIZER, OPTIMIZER_STATE, OUTSIDE
from peft_gauge.memory.overheads import CUBLAS_WORKSPACES, DeviceOverheads, default_overheads
from peft_gauge.plan.record import DeviceEstimate, GpuFit

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from peft_gauge.memory.ledger import Event as StorageEvent

PASSES = 3
"""Number of replayed steps. The first meets an allocator without cached blocks and creates the optimizer's state; a
later one may reserve more, if best fit has split a block that was whole in the step before."""


class Steps:
    """The allocations of a run of `PASSES` equal steps.

    The log starts with the storages that exist between two steps. Two kinds of them are allocated where a run does it:
    the optimizer's state in the optimizer phase of the first step, between the blocks that forward and backward left;
    and ``made_after_update`` (numbers of storages) right after that phase.
    """

    def __init__(self, events: Sequence[StorageEvent], made_after_update: frozenset[int] = frozenset()) -> None:
        self._made_after_update = made_after_update
        self._before = [event for event in events if event.phase == OUTSIDE and event.sign > 0]
        present = {event.storage for event in self._before}
        self._step = [event for event in events if not (event.sign > 0 and event.storage in present)]
        self._present = present

    def allocations(self, overheads: DeviceOverheads) -> Iterator[Event]:
        """The sequence for `replay`. Library workspaces come with the first step and are never freed: cuBLAS's first
        one with the first product, its second one, of autograd's thread, with the first backward."""
        after_update = [event for event in self._before if event.storage in self._made_after_update]
        late = [event for event in self._before if event.category == OPTIMIZER_STATE]
        lazy = {event.storage for event in (*late, *after_update)}
        early = [event for event in self._before if event.storage not in lazy]
        yield from (("alloc", event.storage, event.nbytes) for event in early)
        of_backward = overheads.cublas_workspace_bytes // CUBLAS_WORKSPACES
        yield ("alloc", "cublas", overheads.cublas_workspace_bytes - of_backward)
        yield ("alloc", "cublaslt", overheads.cublaslt_workspace_bytes)
        # Index in the first step -> permanent allocations there, before the event of that index.
        lazily: dict[int, list[Event]] = {}
        lazily.setdefault(self._backward_begins, []).append(("alloc", "cublas of backward", of_backward))
        lazily.setdefault(self._update_begins, []).extend(("alloc", state.storage, state.nbytes) for state in late)
        lazily.setdefault(self._update_ends, []).extend(("alloc", made.storage, made.nbytes) for made in after_update)
        left: dict[tuple[int, int], None] = {}
        for number in range(PASSES):
            alive: dict[tuple[int, int], None] = {}
            for index, event in enumerate(self._step):
                yield from lazily.pop(index, ())
                key = (number, event.storage)
                if event.sign > 0:
                    alive[key] = None
                    yield ("alloc", key, event.nbytes)
                elif event.storage not in self._present:
                    del alive[key]
                    yield ("free", key)
                elif number == 0:
                    yield ("free", event.storage)
            yield from lazily.pop(len(self._step), ())
            # A storage that a step replaced (a buffer assigned anew) is freed by the next step's replacement.
            yield from (("free", key) for key in left)
            left = alive

    @cached_property
    def _backward_begins(self) -> int:
        """The index of the step's first event in backward; its end if there is none."""
        return next((i for i, event in enumerate(self._step) if event.phase == BACKWARD), len(self._step))

    @cached_property
    def _update_begins(self) -> int:
        """The index of the first event after backward, where the optimizer's phase begins, even if an update creates no
        storage (a fused or an 8-bit AdamW) and the next event is the release of a gradient."""
        return self._after(FORWARD, BACKWARD)

    @cached_property
    def _update_ends(self) -> int:
        return self._after(FORWARD, BACKWARD, OPTIMIZER)

    def _after(self, *phases: str) -> int:
        return 1 + max((i for i, event in enumerate(self._step) if event.phase in phases), default=-1)

    @cached_property
    def _results(self) -> dict[tuple[int, int, int | None], ReplayResult]:
        return {}

    def replayed(self, overheads: DeviceOverheads, capacity_bytes: int | None = None) -> ReplayResult:
        """The allocator after these steps; equal replays are computed once."""
        key = (overheads.cublas_workspace_bytes, overheads.cublaslt_workspace_bytes, capacity_bytes)
        if key not in self._results:
            self._results[key] = replay(self.allocations(overheads), capacity_bytes=capacity_bytes)
        return self._results[key]


OFFLOADING_BYTES = 73_400_320
"""Of the device's memory for pinned host memory and a second stream, measured on an H100 (`fixtures/h100_steps.json`):
the driver's count for the process less the allocator's segments, against the same without offloading."""
OFFLOADING_ORIGIN = "measured on an H100 (fixtures/h100_steps.json)"


def device_estimate(
    steps: Steps, overheads: DeviceOverheads | None = None, *, offloads: bool = False
) -> DeviceEstimate:
    """The memory that a device without a limit would report, by parts. ``offloads``: whether the step keeps activations
    in host memory."""
    overheads = overheads or default_overheads(None)
    unlimited = steps.replayed(overheads)
    return DeviceEstimate(
        allocated_bytes=unlimited.peak_allocated_bytes,
        reserved_bytes=unlimited.peak_reserved_bytes,
        context_bytes=overheads.context_bytes,
        cublas_workspace_bytes=overheads.cublas_workspace_bytes,
        cublaslt_workspace_bytes=overheads.cublaslt_workspace_bytes,
        origins={**overheads.origins, **({"offloading_bytes": OFFLOADING_ORIGIN} if offloads else {})},
        offloading_bytes=OFFLOADING_BYTES if offloads else 0,
    )


def fit(steps: Steps, gpu_name: str, overheads: DeviceOverheads, *, offloads: bool = False) -> GpuFit:
    """Whether the steps fit the GPU called (or as large as) ``gpu_name``, which has these ``overheads``; raises
    `GaugeError` for an unknown GPU. ``offloads``: as for `device_estimate`."""
    gpu = gpus.lookup(gpu_name)
    usable_bytes = gpu.usable_bytes if overheads.usable_bytes is None else overheads.usable_bytes
    estimate = device_estimate(steps, overheads, offloads=offloads)
    device_bytes, fits, retries = estimate.total_bytes, estimate.total_bytes <= usable_bytes, 0
    if not fits:
        limited = steps.replayed(overheads, max(usable_bytes - estimate.outside_bytes, 0))
        if limited.out_of_memory is None:
            device_bytes = limited.peak_reserved_bytes + estimate.outside_bytes
            fits, retries = True, limited.num_alloc_retries
    return GpuFit(gpu.name, usable_bytes, device_bytes, fits, usable_bytes - device_bytes, retries)
