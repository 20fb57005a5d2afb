"""Every storage's birth and death during a training step, for real and for fake tensors alike.

A tensor is a view of a storage; only storages take memory. The tracker sees each operator's outputs (a dispatch
mode), notes storages that are new, and learns of their end from a weak reference on the storage itself. It keeps
a log and nothing else: live bytes, peaks and their breakdown are worked out by replaying the log, so a storage
whose purpose shows only later (a gradient, an optimizer state) counts under its right name from its birth on.

What happens inside one operator (a kernel's scratch memory) is not dispatched and cannot be seen; `workspaces`
takes formulas for operators where it is known.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from peft_gauge._internals.torch import ACCUMULATE_GRAD, DispatchMode, current_node, sparse_parts, storage_key
from peft_gauge.memory.accumulation import ADD, engine_accumulates, lone_holders
from peft_gauge.memory.categories import (
    ACTIVATIONS,
    BACKWARD,
    DEQUANTIZED_TEMPORARIES,
    FORWARD,
    GRADIENTS,
    HOST,
    LOGITS_AND_LOSS,
    OPERATOR_CATEGORY,
    OPTIMIZER_STATE,
    OTHER,
    OUTSIDE,
    PHASE_CATEGORY,
)
from peft_gauge.memory.ledger import Event, Ledger, Snapshot, StorageRecord, Where, rounded
from peft_gauge.memory.operators import BORN_BEFORE, OperatorPlan, Workspace

_ADD_IN_PLACE = torch.ops.aten.add_.Tensor
_DEVICE_OF = torch.ops.prim.device.default


@contextmanager
def no_collector() -> Iterator[None]:
    """When Python's collector ends storages depends on what ran before; what is followed in the block does not."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class StorageTracker(DispatchMode):
    """Follows storages while active (``with tracker:``); nest it *inside* a `FakeTensorMode` if there is one.

    Args:
        vocabulary: width of the logits; tensors of two or more dimensions whose last one has this width and that
            are born in forward or backward count as logits and loss.
        operator_categories: operator name ("namespace::name") -> category of what it makes.
        workspaces: operator name -> scratch memory of its kernel.
        device_type: follow only storages on such a device; None follows all (fake tensors: all).
        where: asked at each birth for what `StorageRecord` keeps of it; costs time.
    """

    def __init__(
        self,
        *,
        vocabulary: int | None = None,
        operator_categories: Mapping[str, str] = OPERATOR_CATEGORY,
        workspaces: Mapping[str, Workspace] | None = None,
        device_type: str | None = None,
        where: Where | None = None,
    ) -> None:
        super().__init__()
        lone_holders()  # measured now, since it cannot be from within an operator
        self.flops = 0
        self.flops_by_phase: Counter[str] = Counter()
        self.operators_without_flops: Counter[str] = Counter()
        self._vocabulary = vocabulary
        self._operator_categories = operator_categories
        self._workspaces = workspaces or {}
        self._device_type = device_type
        self._ledger = Ledger()
        self._ledger.where = where
        self._kept: dict[str, list[int]] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._plans: dict[Any, OperatorPlan] = {}

    # What the caller knows

    def adopt(self, tensors: torch.Tensor | Iterable[torch.Tensor], category: str) -> None:
        """Registers storages that exist already (a second adoption relabels): views and ties count once."""
        for tensor in _each(tensors):
            if self._follows(tensor):
                storage = tensor.untyped_storage()
                key = storage_key(storage)
                watch = self._ledger.alive.get(key)
                if watch is None:
                    self._ledger.born(storage, key, category, "")
                else:
                    self._ledger.records[watch.record].category = category

    def storages(self, tensors: Iterable[torch.Tensor]) -> frozenset[int]:
        """The numbers, as `Event.storage` has them, of the followed storages of ``tensors`` in the log as it is now."""
        alive = self._ledger.alive
        keys = (storage_key(tensor.untyped_storage()) for tensor in tensors)
        return frozenset(alive[key].record for key in keys if key in alive)

    def label(self, tensors: torch.Tensor | Iterable[torch.Tensor], category: str) -> None:
        """Names storages, followed already or not, also in every event that is past."""
        self.adopt(tensors, category)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on, each phase ends by naming what `optimizer.state` holds (gradients need no such help)."""
        self._optimizer = optimizer

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything until the end of the block happens in phase `name`."""
        before, self._ledger.phase = self._ledger.phase, name
        self._ledger.log.append((0, -1, name))
        try:
            yield
        finally:
            self._name_optimizer_state()
            born_here = {i for i, r in enumerate(self._ledger.records) if r.phase == name}
            self._kept[name] = [w.record for w in self._ledger.alive.values() if w.record in born_here]
            self._ledger.phase = before
            self._ledger.log.append((0, -1, before))

    def start_over(self) -> None:
        """Forgets all events so far; what is alive becomes the start of a new log (as `reset_peak_memory_stats`)."""
        ledger = self._ledger
        watches = sorted(ledger.alive.values(), key=lambda watch: watch.record)
        records = [ledger.records[watch.record] for watch in watches]
        for record, watch in enumerate(watches):
            watch.record = record
        for entry in records:
            entry.phase = OUTSIDE
        ledger.records[:] = records
        ledger.log[:] = [(1, record, ledger.phase) for record in range(len(records))]
        self._kept.clear()
        self.flops = 0
        self.flops_by_phase.clear()
        self.operators_without_flops.clear()

    def close(self) -> None:
        """Stops following; the log stays readable."""
        self._ledger.alive.clear()
        self._ledger.where = None
        self._optimizer = None

    # What was seen

    @property
    def events(self) -> list[Event]:
        """The log with the categories as they are known now; host storages are left out."""
        records = self._ledger.records
        return [
            Event(sign, i, records[i].nbytes, records[i].category, phase)
            for sign, i, phase in self._ledger.log
            if sign and records[i].category != HOST
        ]

    @property
    def records(self) -> Sequence[StorageRecord]:
        """Every storage of this log; `Event.storage` is the index."""
        return self._ledger.records

    def live(self, *, blocks: bool = False) -> Snapshot:
        """What is alive now; with `blocks`, each storage rounded up to 512 bytes."""
        totals: Counter[str] = Counter()
        for watch in self._ledger.alive.values():
            record = self._ledger.records[watch.record]
            if record.category != HOST:
                totals[record.category] += rounded(record.nbytes) if blocks else record.nbytes
        return Snapshot(sum(totals.values()), dict(totals), self._ledger.phase, len(self._ledger.log) - 1)

    def peak(self, phase: str | None = None, *, blocks: bool = False) -> Snapshot:
        """The first moment of most live bytes, in all or within one phase (its start included).

        Raises:
            ValueError: the phase did not occur.
        """
        size = rounded if blocks else int
        records = self._ledger.records
        live, most, at = 0, -1, -1
        for index, (sign, i, now) in enumerate(self._ledger.log):
            if sign and records[i].category != HOST:
                live += sign * size(records[i].nbytes)
            if live > most and (phase is None or now == phase):
                most, at = live, index
        if at < 0:
            raise ValueError(f"no event in phase {phase!r}")
        totals: Counter[str] = Counter()
        for sign, i, _ in self._ledger.log[: at + 1]:
            if sign and records[i].category != HOST:
                totals[records[i].category] += sign * size(records[i].nbytes)
        breakdown = {category: nbytes for category, nbytes in totals.items() if nbytes}
        return Snapshot(most, breakdown, self._ledger.log[at][2], at)

    def kept_bytes(self, phase: str = FORWARD, categories: Iterable[str] = (ACTIVATIONS,)) -> int:
        """Bytes born in the last run of `phase` and alive at its end: for forward, the saved activations."""
        wanted = set(categories)
        records = (self._ledger.records[i] for i in self._kept.get(phase, ()))
        return sum(record.nbytes for record in records if record.category in wanted)

    # The watching itself

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE_OF:  # fake tensors ask for their device this way, more often than for anything else
            return args[0].fake_device if hasattr(args[0], "fake_device") else func(*args)
        plan = self._plans.get(func) or self._plan(func)
        if func is ADD and self._ledger.phase != FORWARD and engine_accumulates(args, kwargs):
            return _ADD_IN_PLACE(*args)
        for arg in args:
            if isinstance(arg, torch.Tensor):
                self._see(arg, BORN_BEFORE)
            elif isinstance(arg, (list, tuple)):
                for item in arg:
                    if isinstance(item, torch.Tensor):
                        self._see(item, BORN_BEFORE)
        out = func(*args, **kwargs) if kwargs else func(*args)
        if isinstance(out, torch.Tensor):
            self._see(out, plan, args)
        elif isinstance(out, (tuple, list)):
            for item in out:
                if isinstance(item, torch.Tensor):
                    self._see(item, plan, args)
        if plan.special:
            self._after(plan, args, kwargs or {}, out)
        return out

    def _follows(self, tensor: torch.Tensor) -> bool:
        return self._device_type is None or tensor.device.type == self._device_type

    def _plan(self, func: Any) -> OperatorPlan:
        plan = self._plans[func] = OperatorPlan(func, self._operator_categories, self._workspaces)
        return plan

    def _see(self, tensor: torch.Tensor, plan: OperatorPlan, args: Sequence[Any] = ()) -> None:
        if tensor.layout is not torch.strided:
            self._see_parts(tensor, plan)
            return
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        ledger = self._ledger
        if key in ledger.alive:
            if plan.resizes:
                ledger.resized(storage, key)
        elif self._device_type is None or tensor.device.type == self._device_type:
            ledger.born(storage, key, self._category(tensor, plan, args), plan.name)

    def _see_parts(self, tensor: torch.Tensor, plan: OperatorPlan) -> None:
        if tensor.layout is torch.sparse_coo:
            for part in sparse_parts(tensor):
                self._see(part, plan)

    def _category(self, tensor: torch.Tensor, plan: OperatorPlan, args: Sequence[Any]) -> str:
        if plan.category is not None:
            return plan.category
        phase = self._ledger.phase
        if plan.copies and args and isinstance(args[0], torch.Tensor):
            source = self._ledger.alive.get(storage_key(args[0].untyped_storage()))
            if source is not None:
                category = self._ledger.records[source.record].category
                if category == DEQUANTIZED_TEMPORARIES:
                    return category
        if phase in (FORWARD, BACKWARD) and tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary:
            return LOGITS_AND_LOSS
        return PHASE_CATEGORY.get(phase, OTHER)

    def _after(self, plan: OperatorPlan, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        if plan.reaches_gradient and self._ledger.phase == BACKWARD:
            node = current_node()
            if node is not None and node.name() == ACCUMULATE_GRAD:
                self.label((t for t in (*args[:2], out) if isinstance(t, torch.Tensor)), GRADIENTS)
        if plan.workspace is not None:
            scratch = [
                self._ledger.note(n, PHASE_CATEGORY.get(self._ledger.phase, OTHER), plan.name)
                for n in plan.workspace(args, out)
            ]
            for record in scratch:
                self._ledger.end(record)
        if plan.flops is not None:
            flops = plan.flops(args, kwargs, out)
            self.flops += flops
            self.flops_by_phase[self._ledger.phase] += flops
        elif plan.foreign:
            self.operators_without_flops[plan.name] += 1

    def _name_optimizer_state(self) -> None:
        if self._optimizer is not None:
            for state in self._optimizer.state.values():
                self.label((t for t in state.values() if isinstance(t, torch.Tensor)), OPTIMIZER_STATE)


def _each(tensors: torch.Tensor | Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    return (tensors,) if isinstance(tensors, torch.Tensor) else tensors
