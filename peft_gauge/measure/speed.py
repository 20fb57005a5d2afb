"""The time pass: rounds of whole steps by both clocks, and whether the machine was steady meanwhile.

No memory meter is active. A round is one step, timed as a whole and at the ends of its phases, so that the phases are
those of one step and add up to it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from peft_gauge.clock.rounds import Rounds, StoppingRule, Stopwatch, WarmUp, measure
from peft_gauge.clock.steadiness import device_unsteady, host_state, host_unsteady
from peft_gauge.errors import GaugeError
from peft_gauge.meters.nvml import NvmlMeter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from peft_gauge.clock.steadiness import DeviceState
    from peft_gauge.training.step import TrainingJob

PHASES = ("forward", "backward", "optimizer")


def speed_pass(
    job: TrainingJob,
    rule: StoppingRule,
    warm_up: WarmUp,
    bare: PreTrainedModel | None,
    earlier_seconds: Sequence[float] = (),
) -> dict[str, Any]:
    """Time steps of ``job``, which is warmed up. ``bare``: the base alone, whose forward is the control.

    ``earlier_seconds``: of steps of ``job`` shortly before, with which the warm-up compares its first rounds.

    The record: ``samples`` (``forward_seconds``, … ``step_seconds`` -> seconds by round, by the device's clock if it
    has one), ``host_step_seconds`` (of whole steps by the host's clock, for CUDA), ``control_seconds`` by round,
    ``warm_up_rounds``, ``warmed_up``, ``stopped``, ``relative_noise`` of whole steps, ``unsteady`` (reasons),
    ``states`` of the GPU at both ends, and ``weights_read_bytes``, a lower bound of the bytes that a forward reads.
    """
    device = job.trainable[0].device.type
    card = _Card() if device == "cuda" else None
    phases = [job.forward, job.backward, job.optimizer_step]
    if job.settings.grad_accumulation > 1:  # forward and backward alternate
        phases = [job.step]
    before, host_before = _read(card), host_state()
    control = None if bare is None else _forward_of(bare, job)
    found = measure(
        phases, job.clear, Stopwatch(device), rule, control=control, warm_up=warm_up, earlier_seconds=earlier_seconds
    )
    after, host_after = _read(card), host_state()
    job.clear()
    unsteady = list(host_unsteady(host_before, host_after))
    record = _record(found)
    if card is not None and before is not None and after is not None:
        unsteady += device_unsteady(before, after, other_processes=card.other_processes)
        record["states"] = {"before": asdict(before), "after": asdict(after)}
    if not found.warmed_up:
        unsteady.append(f"still getting faster after {found.warm_up_rounds} warm-up rounds")
    if card is not None and card.unavailable is not None:
        record["states_unavailable"] = card.unavailable
    return {**record, "unsteady": unsteady, "weights_read_bytes": weights_read_bytes(job)}


class _Card:
    """The GPU's state by NVML, if available; read between rounds only."""

    def __init__(self) -> None:
        self._meter = NvmlMeter()
        self.unavailable = self._meter.why_unavailable()
        self.other_processes: int | None = None

    def read(self) -> DeviceState | None:
        if self.unavailable is not None:
            return None
        self._meter.start_phase("state")
        others = self._meter.end_phase("state").get("most_other_processes")
        if others is not None:
            self.other_processes = max(others, self.other_processes or 0)
        try:
            return self._meter.state()
        except GaugeError as error:
            self.unavailable = str(error)
            return None


def _read(card: _Card | None) -> DeviceState | None:
    return None if card is None else card.read()


def _forward_of(bare: PreTrainedModel, job: TrainingJob) -> Callable[[], None]:
    bare.eval()
    ids = job.batches[0]["input_ids"]

    def forward() -> None:
        with torch.no_grad():
            bare(input_ids=ids, use_cache=False)

    return forward


def _record(found: Rounds) -> dict[str, Any]:
    names = PHASES if len(found.rounds[0].laps) == len(PHASES) else ()
    samples = {f"{name}_seconds": [each.laps[i].seconds for each in found.rounds] for i, name in enumerate(names)}
    record: dict[str, Any] = {
        "samples": {**samples, "step_seconds": list(found.seconds)},
        "control_seconds": list(found.control_seconds),
        "warm_up_rounds": found.warm_up_rounds,
        "warmed_up": found.warmed_up,
        "stopped": found.stopped,
        "relative_noise": found.relative_noise,
    }
    if found.rounds[0].device_seconds is not None:
        record["host_step_seconds"] = [each.host_seconds for each in found.rounds]
    return record


def weights_read_bytes(job: TrainingJob) -> int:
    """Bytes of all weights except those only looked up: a forward reads each at least once."""
    looked_up = {id(module.weight) for module in job.model.modules() if isinstance(module, torch.nn.Embedding)} - {
        id(module.weight) for module in job.model.modules() if isinstance(module, torch.nn.Linear)
    }
    return sum(each.nbytes for each in job.model.parameters() if id(each) not in looked_up)
