"""The storages of one rank of a sharded step, and the bytes that its collectives move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from peft_gauge._internals.distributed import is_distributed, local_of, resizes_seen
from peft_gauge._internals.torch import storage_key
from peft_gauge.memory.categories import (
    ADAPTER_WEIGHTS,
    BASE_WEIGHTS,
    COMMUNICATION_BUFFERS,
    GATHERED_WEIGHTS,
    GRADIENTS,
    HOST,
    OPTIMIZER,
    UNREDUCED_GRADIENTS,
)
from peft_gauge.memory.tracker import StorageTracker

if TYPE_CHECKING:
    from peft_gauge.memory.operators import OperatorPlan

ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE = "all_gather", "reduce_scatter", "all_reduce"

COLLECTIVES = {
    "c10d::_allgather_base_": ALL_GATHER,
    "c10d::_reduce_scatter_base_": REDUCE_SCATTER,
    "c10d::allreduce_": ALL_REDUCE,
    "_c10d_functional::all_reduce": ALL_REDUCE,
}
"""Name of the operator -> collective."""

ROUNDS = {ALL_GATHER: 1, REDUCE_SCATTER: 1, ALL_REDUCE: 2}
"""Times that a rank sends (ranks - 1) / ranks of the whole buffer, by the ring algorithm (Patarasuk and Yuan 2009)."""


class ShardedTracker(StorageTracker):
    """A `StorageTracker` of one rank. A `DTensor` counts with this rank's part.

    Attributes:
        ranks: processes in all; replicas: groups of them that each hold all shards (FSDP2's hybrid sharding).
        calls, sent_bytes: by collective, since `start_over`: how often it was called, and the bytes that this rank
            sends by the ring algorithm.
        reduces: whether gradients of whole weights exist next to this rank's shard (FSDP2, ZeRO-3).
        gathers_in_place: whether the buffers of an all-gather become the gathered weights (ZeRO-3).
        offloads_shards: whether shards of weights are in host memory: each gather copies one to the GPU.
        offloads_gradients: whether their gradients are, too, as soon as they are reduced (FSDP2's `CPUOffloadPolicy`).
        offloads_update: whether all that the update allocates is in host memory.
        bucket_elements: size of the buffers in which ZeRO's gradients wait to be reduced; 0 without any.
    """

    def __init__(
        self, *, ranks: int, reduces: bool, gathers_in_place: bool = False, replicas: int = 1, **options: Any
    ) -> None:
        super().__init__(**options)
        self.ranks = ranks
        self.replicas = replicas
        self.reduces = reduces
        self.gathers_in_place = gathers_in_place
        self.bucket_elements = 0
        self.offloads_shards = self.offloads_gradients = self.offloads_update = False
        self.calls: Counter[str] = Counter()
        self.sent_bytes: Counter[str] = Counter()

    def adopt(self, tensors: torch.Tensor | Iterable[torch.Tensor], category: str) -> None:
        """As `StorageTracker.adopt`."""
        each = (tensors,) if isinstance(tensors, torch.Tensor) else tensors
        if self.bucket_elements and category in (GRADIENTS, UNREDUCED_GRADIENTS):
            each = [tensor for tensor in each if not self._is_bucket(tensor)]  # its gradients are views of it
        super().adopt(map(local_of, each), category)

    def _is_bucket(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().nbytes() == self.bucket_elements * tensor.element_size()

    def storages(self, tensors: Iterable[torch.Tensor]) -> frozenset[int]:
        """As `StorageTracker.storages`."""
        return super().storages(map(local_of, tensors))

    def start_over(self) -> None:
        """As `StorageTracker.start_over`."""
        super().start_over()
        self.calls.clear()
        self.sent_bytes.clear()

    @contextmanager
    def resizing(self) -> Iterator[None]:
        """Record resizes of storages in the block."""

        def seen(storage: torch.UntypedStorage) -> None:
            key = storage_key(storage)
            if key in self._ledger.alive:
                self._ledger.resized(storage, key)

        with resizes_seen(seen):
            yield

    def note_collective(self, collective: str, whole: Sequence[torch.Tensor]) -> None:
        """Count a call of ``collective`` over ``whole``, its unsharded side, whose storages are buffers for it."""
        self.calls[collective] += 1
        nbytes = sum(buffer.nbytes for buffer in whole)
        averages_replicas = collective == ALL_REDUCE and self.replicas > 1
        members = self.replicas if averages_replicas else self.ranks // self.replicas
        self.sent_bytes[collective] += ROUNDS[collective] * nbytes * (members - 1) // members
        if averages_replicas:
            return  # in place, of this rank's gradients
        gathers_weights = self.gathers_in_place and collective == ALL_GATHER
        category = GATHERED_WEIGHTS if gathers_weights else COMMUNICATION_BUFFERS
        self.label([buffer for buffer in whole if not self._is_weight(buffer)], category)

    def _is_weight(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is a view of weights, which ZeRO-1 and -2 gather in place."""
        watch = self._ledger.alive.get(storage_key(local_of(tensor).untyped_storage()))
        return watch is not None and self._ledger.records[watch.record].category in (BASE_WEIGHTS, ADAPTER_WEIGHTS)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(map(is_distributed, types)):
            return NotImplemented  # its own operators follow, on this rank's parts
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _plan(self, func: Any) -> OperatorPlan:
        plan = super()._plan(func)
        if plan.name in COLLECTIVES or (self.bucket_elements and plan.name == "aten::empty"):
            plan.special = True
        return plan

    def _after(self, plan: OperatorPlan, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        collective = COLLECTIVES.get(plan.name)
        if collective is None:
            super()._after(plan, args, kwargs, out)
            if self.bucket_elements and plan.name == "aten::empty" and self._is_bucket(out):
                self.label(out, COMMUNICATION_BUFFERS)
            return
        whole = args[1] if collective == REDUCE_SCATTER else args[0]
        self.note_collective(collective, list(whole) if isinstance(whole, (list, tuple)) else [whole])
        if collective == REDUCE_SCATTER:
            self.label(args[0], HOST if self.offloads_gradients else GRADIENTS)
        if collective == ALL_GATHER and self.offloads_shards:  # this rank's part was copied to the GPU for it
            self._ledger.end(self._ledger.note(args[1].nbytes, COMMUNICATION_BUFFERS, plan.name))

    def _category(self, tensor: torch.Tensor, plan: OperatorPlan, args: Sequence[Any]) -> str:
        if self.offloads_update and self._ledger.phase == OPTIMIZER:
            return HOST
        return super()._category(tensor, plan, args)

    def _gradient_category(self) -> str:
        return UNREDUCED_GRADIENTS if self.reduces else GRADIENTS
