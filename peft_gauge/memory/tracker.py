"""The allocation and release of every storage during a training step, with real or fake tensors.

Only storages take memory; a tensor is a view of one. The tracker is a dispatch mode: it records new storages among the
outputs of each operator, and a weak reference on each storage records its release. It keeps only a log. Live bytes,
peaks and their breakdown come from replaying the log, so a storage whose category is known later (a gradient, an
optimizer state) counts under that category from its allocation on.

Memory inside an operator (a kernel's scratch memory) is not dispatched, so the tracker cannot see it. `workspaces`
takes formulas for operators whose scratch memory is known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from peft_gauge._internals.torch import (
    ACCUMULATE_GRAD,
    DispatchMode,
    FakeTensor,
    current_node,
    parts_of,
    sparse_parts,
    storage_key,
    wraps_tensors,
)
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


class StorageTracker(DispatchMode):
    """Tracks storages while active (``with tracker:``). Nest it *inside* a `FakeTensorMode` if there is one.

    Args:
        vocabulary: width of the logits. Tensors of two or more dimensions that are allocated in forward or backward and
            whose last dimension has this width count as logits and loss.
        operator_categories: operator name ("namespace::name") -> category of its outputs.
        workspaces: operator name -> scratch memory of its kernel.
        device_type: track only storages on this type of device; None tracks all (fake tensors: all).
        where: called at each allocation for the `module` and `site` of its `StorageRecord`; takes time.
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
        lone_holders()  # measure now, since it cannot be measured inside an operator
        self.restarts = 0
        self.flops = 0
        self.flops_by_phase: Counter[str] = Counter()
        self.operators_without_flops: Counter[str] = Counter()
        self.vocabulary = vocabulary
        self._operator_categories = operator_categories
        self._workspaces = workspaces or {}
        self._device_type = device_type
        self._ledger = Ledger()
        self._ledger.where = where
        self._kept: dict[str, list[int]] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._plans: dict[Any, OperatorPlan] = {}

    # Information from the caller

    def adopt(self, tensors: torch.Tensor | Iterable[torch.Tensor], category: str) -> None:
        """Registers existing storages, or gives them a new category; views and tied weights count once."""
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
        """The numbers (`Event.storage`) of the tracked storages of ``tensors`` in the present log."""
        alive = self._ledger.alive
        keys = (storage_key(tensor.untyped_storage()) for tensor in _each(tensors))
        return frozenset(alive[key].record for key in keys if key in alive)

    def number_of(self, storage: torch.UntypedStorage) -> int | None:
        """The number of ``storage`` in the present log; ``None`` if it is not tracked."""
        watch = self._ledger.alive.get(storage_key(storage))
        return None if watch is None else watch.record

    def log_since(self, position: int) -> list[tuple[int, int, int]]:
        """The entries of the present log from ``position`` on: sign (0 for the start of a phase), number, bytes."""
        records = self._ledger.records
        return [(sign, i, records[i].nbytes if sign else 0) for sign, i, _ in self._ledger.log[position:]]

    def label(self, tensors: torch.Tensor | Iterable[torch.Tensor], category: str) -> None:
        """Sets the category of storages, tracked already or not, in past events too."""
        self.adopt(tensors, category)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on, label the tensors in `optimizer.state` at the end of each phase (not needed for gradients)."""
        self._optimizer = optimizer

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the events of the block under phase `name`."""
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
        """Clears the log; live storages become the start of a new one (like `reset_peak_memory_stats`)."""
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
        self.restarts += 1
        self.flops = 0
        self.flops_by_phase.clear()
        self.operators_without_flops.clear()

    def close(self) -> None:
        """Stops tracking; the log stays readable."""
        self._ledger.alive.clear()
        self._ledger.where = None
        self._optimizer = None

    # Results

    @property
    def events(self) -> list[Event]:
        """The log with present categories, without host storages."""
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
        """The live bytes now; with `blocks`, each storage is rounded up to 512 bytes."""
        totals: Counter[str] = Counter()
        for watch in self._ledger.alive.values():
            record = self._ledger.records[watch.record]
            if record.category != HOST:
                totals[record.category] += rounded(record.nbytes) if blocks else record.nbytes
        return Snapshot(sum(totals.values()), dict(totals), self._ledger.phase, len(self._ledger.log) - 1)

    def peak(self, phase: str | None = None, *, blocks: bool = False) -> Snapshot:
        """The first moment with the most live bytes, in the whole log or within one phase (including its start).

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

    def host_peak_bytes(self) -> int:
        """The most live bytes in host memory, in the whole log."""
        live = most = 0
        for sign, i, _ in self._ledger.log:
            if sign and self._ledger.records[i].category == HOST:
                live += sign * self._ledger.records[i].nbytes
                most = max(most, live)
        return most

    def kept_bytes(self, phase: str = FORWARD, categories: Iterable[str] = (ACTIVATIONS,)) -> int:
        """Bytes allocated in the last run of `phase` and live at its end: for forward, the saved activations."""
        wanted = set(categories)
        records = (self._ledger.records[i] for i in self._kept.get(phase, ()))
        return sum(record.nbytes for record in records if record.category in wanted)

    # Tracking

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for kind in types:
            if kind is not FakeTensor and wraps_tensors(kind):
                return NotImplemented  # its operators on the tensors that it consists of come here, too
        if func is _DEVICE_OF:  # the most frequent operator: fake tensors read their device with it
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
        if phase in (FORWARD, BACKWARD) and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary:
            return LOGITS_AND_LOSS
        return PHASE_CATEGORY.get(phase, OTHER)

    def _after(self, plan: OperatorPlan, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        if plan.reaches_gradient and self._ledger.phase == BACKWARD:
            node = current_node()
            if node is not None and node.name() == ACCUMULATE_GRAD:
                held = (t for t in (*args[:2], out) if isinstance(t, torch.Tensor))
                self.label(held, self._gradient_category())
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

    def _gradient_category(self) -> str:
        """The category of the tensors in which autograd accumulates."""
        return GRADIENTS

    def _name_optimizer_state(self) -> None:
        if self._optimizer is not None:
            for state in self._optimizer.state.values():
                self.label((t for t in state.values() if isinstance(t, torch.Tensor)), OPTIMIZER_STATE)


def _each(tensors: torch.Tensor | Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    for tensor in (tensors,) if isinstance(tensors, torch.Tensor) else tensors:
        yield from parts_of(tensor)
