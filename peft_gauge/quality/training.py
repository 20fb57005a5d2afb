"""Training under equal conditions: one schedule for all, a learning rate of its own for each, divergence as an outcome.

A comparison at one learning rate for all settings measures which of them that rate suits, so each gets the best of a
short search, which is recorded. A loss that becomes NaN or grows out of hand is a result, with the step and the rate at
which it happened; nothing here raises for it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from peft_gauge.errors import GaugeError

if TYPE_CHECKING:
    from torch import nn

    from peft_gauge.training.step import TrainingJob

DIVERGED_OVER_START = 3.0
"""A loss this many times the first one has diverged: batches differ by less, and no good schedule passes there."""

ROUNDING = 1e-6
"""A loss below it is rounding, as where teacher and student are the same, and its ratios mean nothing."""

POINTS_KEPT = 50
"""Points of a loss curve that are saved."""

RATE_FACTOR = 10**0.5
"""Between neighbouring learning rates of a search: a finer grid is within the noise of a short run."""

RATE_EXTENSIONS = 3
"""How often a search whose best rate is its highest or lowest goes on in that direction."""


@dataclass(frozen=True)
class Schedule:
    """``steps`` optimizer updates: the rate rises linearly to ``peak_rate`` over the first ``warm_up_share`` of them
    and falls to 0 along half a cosine.

    ``weight_decay`` is 0 unless asked for: decoupled decay pulls a full fine-tuning towards zero weights and an
    adapter towards the base model, which would be two different tasks.
    """

    steps: int
    peak_rate: float
    warm_up_share: float = 0.1
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise GaugeError(f"a training needs at least 1 step, not {self.steps}")
        if not (math.isfinite(self.peak_rate) and self.peak_rate > 0):
            raise GaugeError(f"the learning rate must be a positive number, not {self.peak_rate}")
        if not 0 <= self.warm_up_share < 1:
            raise GaugeError(f"the share of warm-up must be at least 0 and below 1, not {self.warm_up_share}")

    def rate(self, step: int) -> float:
        """The learning rate of ``step``, counted from 0."""
        warm_up = math.ceil(self.warm_up_share * self.steps)
        if step < warm_up:
            return self.peak_rate * (step + 1) / warm_up
        return self.peak_rate * (1 + math.cos(math.pi * (step - warm_up) / (self.steps - warm_up))) / 2


@dataclass(frozen=True)
class Divergence:
    """Where a training went wrong: the ``step`` whose loss showed it, counted from 0, and the schedule's peak
    ``learning_rate``; ``loss`` is ``None`` where it was no finite number."""

    step: int
    learning_rate: float
    loss: float | None


@dataclass(frozen=True)
class Curve:
    """What a training did: ``losses`` as (step, loss), thinned to `POINTS_KEPT`; ``step_seconds``, the median of its
    steps; ``divergence``, where there was one, which also ends the curve."""

    losses: tuple[tuple[int, float], ...]
    step_seconds: float
    divergence: Divergence | None = None

    def as_json(self) -> dict[str, Any]:
        """The record as JSON holds it."""
        return asdict(self)


def train(job: TrainingJob, schedule: Schedule, *, after_step: Callable[[int], None] | None = None) -> Curve:
    """Take ``schedule.steps`` steps of ``job``, or as many as until it diverges; ``after_step`` hears each number."""
    for group in job.optimizer.param_groups:
        group["weight_decay"] = schedule.weight_decay
    losses: list[float] = []
    seconds: list[float] = []
    divergence = None
    for step in range(schedule.steps):
        for group in job.optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        begun = time.perf_counter()
        job.step()
        assert job.loss is not None, "a step leaves its loss"
        loss = float(job.loss)  # waits for the device
        seconds.append(time.perf_counter() - begun)
        if not math.isfinite(loss) or (losses and loss > DIVERGED_OVER_START * max(losses[0], ROUNDING)):
            divergence = Divergence(step, schedule.peak_rate, loss if math.isfinite(loss) else None)
            break
        losses.append(loss)
        if after_step is not None:
            after_step(step)
    job.clear()
    return Curve(thinned(losses), statistics.median(seconds), divergence)


def thinned(losses: Sequence[float], most: int = POINTS_KEPT) -> tuple[tuple[int, float], ...]:
    """At most ``most`` of ``losses``, at least 2, evenly spread, with the first and the last; each with its step."""
    if len(losses) <= most:
        return tuple(enumerate(losses))
    steps = [round(k * (len(losses) - 1) / (most - 1)) for k in range(most)]
    return tuple((step, losses[step]) for step in steps)


@dataclass(frozen=True)
class RateSearch:
    """The learning rates that were ``tried``, ascending, with the loss that each led to (``None``: it diverged), and
    the ``chosen`` one, ``None`` where all diverged. ``at_edge``: the best was the highest or lowest tried, so a better
    one may lie beyond."""

    tried: tuple[tuple[float, float | None], ...]
    chosen: float | None
    at_edge: bool

    def as_json(self) -> dict[str, Any]:
        """The record as JSON holds it."""
        return asdict(self)


def search_rate(
    outcome: Callable[[float], float | None], start: float, *, extensions: int = RATE_EXTENSIONS
) -> RateSearch:
    """The learning rate of the least ``outcome``, a loss or ``None`` for divergence: ``start`` and its two neighbours
    are tried, then at most ``extensions`` further ones in the direction of the best."""
    found: dict[int, float | None] = {}

    def look(exponent: int) -> None:
        loss = outcome(rate_at(exponent))
        found[exponent] = loss if loss is not None and math.isfinite(loss) else None

    def rate_at(exponent: int) -> float:
        # The one rounding keeps 0.003162… out of records; neighbours stay a factor of about `RATE_FACTOR` apart.
        return float(f"{start * RATE_FACTOR**exponent:.2g}")

    def best() -> int | None:
        usable = {exponent: loss for exponent, loss in found.items() if loss is not None}
        return min(usable, key=usable.__getitem__) if usable else None

    for exponent in (0, -1, 1):
        look(exponent)
    for _ in range(extensions):
        leader = best()
        if leader is not None and min(found) < leader < max(found):
            break
        # Where everything diverged, a smaller step is what may help.
        look(max(found) + 1 if leader is not None and leader == max(found) else min(found) - 1)
    leader = best()
    tried = tuple((rate_at(exponent), found[exponent]) for exponent in sorted(found))
    at_edge = leader is not None and leader in (min(found), max(found))
    return RateSearch(tried, None if leader is None else rate_at(leader), at_edge)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Switch dropout off inside and leave everything else in training mode.

    ``model.eval()`` is no way to score a 4-bit model between two trainings: on a CPU with AVX512-BF16 bitsandbytes then
    repacks the weights for inference at the first forward without gradients, and cannot train through them any more.
    """
    from torch.nn.modules.dropout import _DropoutNd

    switched = [module for module in model.modules() if isinstance(module, _DropoutNd) and module.training]
    for module in switched:
        module.training = False
    try:
        yield
    finally:
        for module in switched:
            module.training = True
