"""The deterministic shape of a training step: operators, FLOPs, bytes, dtypes, and the first losses.

Timings vary between runs; the operations of a step do not. A fingerprint of the same job is the same in every process
and with any number of threads (losses up to rounding). A change between two library versions is therefore visible on
any machine without repetition. `peft_gauge.history.fingerprints` compares two fingerprints.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from peft_gauge._internals.torch import DispatchMode
from peft_gauge.collector import no_collector
from peft_gauge.counting import count, quantization_constants, trainable_dtypes
from peft_gauge.errors import GaugeError
from peft_gauge.fingerprint.module_attribution import ModuleAttribution
from peft_gauge.fingerprint.operators import Operator
from peft_gauge.memory.categories import (
    ADAPTER_WEIGHTS,
    BACKWARD,
    BASE_WEIGHTS,
    BUFFERS,
    FORWARD,
    LOGITS_AND_LOSS,
    OPTIMIZER,
    OPTIMIZER_STATE,
    QUANTIZATION_CONSTANTS,
)
from peft_gauge.memory.tracker import StorageTracker

if TYPE_CHECKING:
    from peft_gauge.memory.ledger import Snapshot

VERSION = 1
"""Version of the record's layout and meaning; records of different versions are not compared."""

PHASES = (FORWARD, BACKWARD, OPTIMIZER)
WARM_UP_STEPS = 2


class Job(Protocol):
    """The job to fingerprint: a training job that has not taken a step yet.

    ``forward`` runs the next batch and sets ``loss``, a scalar; ``backward`` adds its gradients; ``optimizer_step``
    updates the weights; ``clear`` drops gradients and graph.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Tensor | None

    def forward(self) -> Tensor: ...

    def backward(self) -> None: ...

    def optimizer_step(self) -> None: ...

    def clear(self) -> None: ...


def fingerprint(job: Job, *, adapter_bytes: int | None = None, micro_batches: int = 1) -> dict[str, Any]:
    """The operations of the third step of a new ``job``, and the losses of all three; JSON with keys in fixed order.

    ``micro_batches``: forward and backward passes per optimizer step; ``adapter_bytes``: size of the saved adapter, if
    it was saved. The record contains:

    - ``operators``: phase -> operator -> module (indices folded) -> calls;
    - ``flops``: phase -> operator -> FLOPs of matrix products; ``product_flops``: phase -> dtype of the operands ->
      FLOPs; ``flops_complete``: whether all products have a formula. If not, ``flops_unknown`` has the operators
      without one and their calls, and FLOPs are lower bounds;
    - ``bytes``: phase -> bytes that operators ``read`` and ``written``, and bytes of the storages ``allocated``;
    - ``peak_bytes`` and ``resident_bytes``: live storages at the peak of the step and after it, by category
      (``adapter_weights`` are the trainable ones); ``saved_activation_bytes``: storages allocated in forward and alive
      after it;
    - ``trainable``: parameters by dtype, and in total; ``adapter_bytes``;
    - ``losses``: before any update, after one, and after two.

    Raises `GaugeError` for a job that has already taken steps, and for a loss that is not finite.
    """
    if job.optimizer.state:
        raise GaugeError("this job has already taken a step, but a fingerprint needs initial weights; build a new job")
    losses = [_plain_step(job, micro_batches) for _ in range(WARM_UP_STEPS)]
    return record_step(job, losses, adapter_bytes=adapter_bytes, micro_batches=micro_batches)


def record_step(
    job: Job,
    losses: Sequence[float],
    *,
    adapter_bytes: int | None = None,
    micro_batches: int = 1,
    use: Callable[[StorageTracker, float], None] | None = None,
) -> dict[str, Any]:
    """The record of `fingerprint`, for a job that has taken exactly two steps; ``losses`` are theirs.

    ``use``: called at the end with the tracker of the recorded step, which may get other categories, and its seconds.

    Raises `GaugeError` for another number of losses, and for a loss that is not finite.
    """
    if len(losses) != WARM_UP_STEPS:
        raise GaugeError(f"a fingerprint records step {WARM_UP_STEPS + 1}, but this job has taken {len(losses)}")
    for number, loss in enumerate(losses, start=1):
        _check_loss(loss, number)
    recorder = _Recorder(ModuleAttribution(job.model))
    tracker = StorageTracker(vocabulary=_vocabulary(job.model))
    _adopt(tracker, job)
    with no_collector():
        start = time.perf_counter()
        last = _recorded_step(job, micro_batches, recorder, tracker)
        seconds = time.perf_counter() - start
        resident = tracker.live()
    record = {
        "version": VERSION,
        **recorder.as_json(),
        "bytes": {phase: _traffic(phase, recorder, tracker) for phase in PHASES},
        "peak_bytes": _by_category(tracker.peak()),
        "resident_bytes": _by_category(resident),
        "saved_activation_bytes": tracker.kept_bytes(FORWARD),
        "trainable": {"total": count(job.model).trainable_params, "by_dtype": trainable_dtypes(job.model)},
        "adapter_bytes": adapter_bytes,
        "losses": [*losses, last],
    }
    if use is not None:
        use(tracker, seconds)
    tracker.close()
    return record


# --- the steps ----------------------------------------------------------------------------------------------


def _plain_step(job: Job, micro_batches: int) -> float:
    job.clear()
    for _ in range(micro_batches):
        job.forward()
        job.backward()
    job.optimizer_step()
    loss = _loss(job)
    job.clear()
    return loss


def _recorded_step(job: Job, micro_batches: int, recorder: _Recorder, tracker: StorageTracker) -> float:
    """Take the same step with recording, and clear the job afterwards."""

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        recorder.phase = name
        # The tracker is innermost: it makes the engine add gradients in place, as without a mode, and the recorder has
        # to see that.
        with recorder, tracker, tracker.phase(name):
            yield

    tracker.start_over()
    with recorder.places:
        for _ in range(micro_batches):
            with phase(FORWARD):
                tracker.label(job.forward(), LOGITS_AND_LOSS)
            with phase(BACKWARD):
                job.backward()
        with phase(OPTIMIZER):
            job.optimizer_step()
    loss = _loss(job)
    _check_loss(loss, WARM_UP_STEPS + 1)
    job.clear()
    return loss


def _loss(job: Job) -> float:
    assert job.loss is not None, "forward sets the loss"
    return float(job.loss.detach())


def _check_loss(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise GaugeError(f"the loss of step {step} is {loss}; a fingerprint needs a job with finite losses")


# --- storages -----------------------------------------------------------------------------------------------


def _adopt(tracker: StorageTracker, job: Job) -> None:
    """Label the tensors from before the step; others (the batch) count from the first operator that uses them."""
    tracker.adopt(job.model.buffers(), BUFFERS)
    for parameter in job.model.parameters():
        tracker.adopt(parameter, ADAPTER_WEIGHTS if parameter.requires_grad else BASE_WEIGHTS)
        tracker.adopt(quantization_constants(parameter), QUANTIZATION_CONSTANTS)
    for state in job.optimizer.state.values():
        tracker.adopt((value for value in state.values() if isinstance(value, Tensor)), OPTIMIZER_STATE)
    tracker.follow(job.optimizer)


def _vocabulary(model: nn.Module) -> int | None:
    """The size by which the tracker recognizes logits; without it they count as activations."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return size if isinstance(size, int) else None


def _by_category(snapshot: Snapshot) -> dict[str, int]:
    return {"total": snapshot.bytes, **dict(sorted(snapshot.by_category.items()))}


def _traffic(phase: str, recorder: _Recorder, tracker: StorageTracker) -> dict[str, int]:
    # A storage without an operator existed before this step and was only discovered in it.
    born = (record.nbytes for record in tracker.records if record.phase == phase and record.operator)
    return {"read": recorder.read[phase], "written": recorder.written[phase], "allocated": sum(born)}


# --- operators ----------------------------------------------------------------------------------------------


class _Recorder(DispatchMode):
    """Counts all dispatched operators while it is active; the caller sets ``phase``."""

    def __init__(self, places: ModuleAttribution) -> None:
        super().__init__()
        self.places = places
        self.phase = ""
        self.calls: Counter[tuple[str, str, str]] = Counter()  # (phase, operator, module)
        self.flops: Counter[tuple[str, str]] = Counter()  # (phase, operator)
        self.product_flops: Counter[tuple[str, str]] = Counter()  # (phase, dtype)
        self.unknown: Counter[str] = Counter()
        self.read: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self._operators: dict[Any, Operator] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operator = self._operators.get(func)
        if operator is None:
            operator = self._operators[func] = Operator(func)
        if not operator.silent:
            self._count(operator, args, kwargs, out)
        return out

    def _count(self, operator: Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        phase, name = self.phase, operator.name
        self.calls[phase, name, self.places.now] += 1
        read, written = operator.traffic(args, kwargs, out)
        self.read[phase] += read
        self.written[phase] += written
        if operator.has_flops:
            flops = operator.flops(args, kwargs, out)
            self.flops[phase, name] += flops
            self.product_flops[phase, operator.product_type(args)] += flops
        elif operator.unknown_flops:
            self.unknown[name] += 1

    def as_json(self) -> dict[str, Any]:
        operators: dict[str, dict[str, dict[str, int]]] = {phase: defaultdict(dict) for phase in PHASES}
        for (phase, name, module), calls in sorted(self.calls.items()):
            operators[phase][name][module] = calls
        return {
            "operators": {phase: dict(by_name) for phase, by_name in operators.items()},
            "flops": _by_phase(self.flops),
            "product_flops": _by_phase(self.product_flops),
            "flops_complete": not self.unknown,
            "flops_unknown": dict(sorted(self.unknown.items())),
        }


def _by_phase(counted: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    return {phase: {name: number for (of, name), number in sorted(counted.items()) if of == phase} for phase in PHASES}
