"""A training job that is driven by `transformers.Trainer` or `trl.SFTTrainer`, step by step.

Their ``train()`` runs unmodified in a greenlet. It is suspended at the end of each phase, so that a meter can begin or
end there, and continues with the next phase. All of a trainer's work belongs to a phase: fetching micro-batches to
forward, clipping to the optimizer.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from greenlet import GreenletExit, greenlet

from peft_gauge.errors import GaugeError
from peft_gauge.memory.categories import BACKWARD, FORWARD, OPTIMIZER
from peft_gauge.training import trainers
from peft_gauge.training.loops import check_device
from peft_gauge.training.step import TrainingJob

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from peft_gauge.training.loops import Loop
    from peft_gauge.training.settings import StepSettings

STEPS = 1_000_000
"""The length of a trainer's run; only its first steps are taken. The learning rate decreases over it."""

_CLEARED = "cleared"  # the point after a step: gradients are dropped


class TrainerJob(TrainingJob):
    """``model`` in training by ``loop``; a `TrainingJob` else.

    Args:
        batches: as for `TrainingJob`. The trainer's own collator makes its micro-batches from their rows, in their
            order.
        arguments: of ``TrainingArguments`` or ``SFTConfig``, beyond those that ``settings`` has a field for.

    One such job can live in a process, since accelerate's state is global. Raises `GaugeError` if the trainer refuses
    the model or the settings.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Tensor]],
        settings: StepSettings,
        *,
        loop: Loop,
        arguments: Mapping[str, Any],
    ) -> None:
        if not batches:
            raise GaugeError("there is no batch to train on")
        device = batches[0]["input_ids"].device.type
        check_device(loop, settings.mixed_precision, device)
        self._loop, self._arguments = loop, dict(arguments)
        self._stack = ExitStack()
        folder = self._stack.enter_context(trainers.alone())
        given = {**trainers.arguments_of(_fields(settings)), **self._arguments}
        self._trainer = trainers.build(
            loop,
            model,
            trainers.arguments(loop, given, folder, device),
            steps=STEPS,
            seq=settings.seq,
            rows=_rows_of(batches),
        )
        optimizer = self._trainer.create_optimizer() or self._trainer.optimizer
        super().__init__(self._trainer.model, batches, settings, optimizer=optimizer)
        self._prepared: Sequence[Mapping[str, Any]] = self._trainer.train_dataset.rows
        self._rows, self._next_row = self._prepared, 0
        self._collate = self._trainer.data_collator
        self._trainer.data_collator = self._next_batch
        self._reached: str | None = None
        self._run = greenlet(self._train)

    def train_on(self, batches: Sequence[Mapping[str, Tensor]], settings: StepSettings) -> None:
        """Continue with other ``batches``; takes a few steps, since a trainer has fetched micro-batches ahead."""
        own = {key: value for key, value in self._prepared[0].items() if key not in ("input_ids", "labels")}
        rows = _rows_of(batches)
        labels = "labels" in self._prepared[0]
        if any(key != "seq_lengths" for key in own):
            raise GaugeError(f"rows with {', '.join(own)} have one length; measure this loop without other shapes")
        further = {"seq_lengths": [len(rows[0])]} if own else {}
        super().train_on(batches, settings)
        self._rows = [{"input_ids": row, **({"labels": row} if labels else {}), **further} for row in rows]
        self._next_row = 0
        for _ in range(2):
            self.step()
        self.clear()

    def forward(self) -> Tensor:
        """Run to the end of the next micro-batch's forward; returns its loss."""
        if self._reached == OPTIMIZER:
            self.clear()
        self._until(FORWARD)
        assert self.loss is not None
        return self.loss

    def backward(self) -> None:
        """Run to the end of the micro-batch's backward."""
        self._until(BACKWARD)
        assert self.loss is not None
        self.loss = self.loss.detach()

    def optimizer_step(self) -> None:
        """Clip the gradients as the trainer does, and update the trainable parameters."""
        self._until(OPTIMIZER)

    def clear(self) -> None:
        """Run to the end of the step, at which the trainer drops the gradients; without effect within a step."""
        if self._reached == OPTIMIZER:
            self._until(_CLEARED)
            self.loss = None

    def close(self) -> None:
        """End the trainer's run, after which another job can begin."""
        if self._run:
            self._run.throw(GreenletExit)
        self._stack.close()

    def effective_settings(self) -> dict[str, Any]:
        """As `TrainingJob.effective_settings`, and the loop with its arguments."""
        loop = {"loop": self._loop, **({"trainer_arguments": self._arguments} if self._arguments else {})}
        return {**super().effective_settings(), **loop}

    def _until(self, point: str) -> None:
        reached = self._run.switch()
        if reached != point:
            raise GaugeError(f"the trainer went on to {reached or 'its end'} where {point} was expected")
        self._reached = point

    def _train(self) -> None:
        self._waiting = self._run.parent
        trainers.run(self._trainer, self)

    def _suspend(self, point: str) -> None:
        assert self._waiting is not None
        self._waiting.switch(point)

    def _next_batch(self, rows: Sequence[Any]) -> dict[str, Any]:
        """A collator: the trainer's own, with the rows of this job in place of those that the trainer has drawn."""
        places = range(self._next_row, self._next_row + self.settings.batch)
        self._next_row = places.stop % len(self._rows)
        collated: dict[str, Any] = self._collate([dict(self._rows[place % len(self._rows)]) for place in places])
        return collated

    # The trainer's listener (`trainers.Listener`).

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield
        self._suspend(name)

    def loss_computed(self, loss: Tensor) -> None:
        self.loss = loss

    def step_begins(self, number: int, optimizer: Optimizer) -> None:
        pass

    def updated(self, number: int) -> None:
        self._suspend(OPTIMIZER)

    def step_ended(self, number: int) -> None:
        self._suspend(_CLEARED)


def _fields(settings: StepSettings) -> dict[str, Any]:
    """The fields that have an argument of the trainer; a norm of 0 turns clipping off."""
    return {**asdict(settings), "clip_grad_norm": settings.clip_grad_norm or 0.0}


def _rows_of(batches: Sequence[Mapping[str, Tensor]]) -> list[list[int]]:
    return [row for batch in batches for row in batch["input_ids"].tolist()]
