"""Training under equal conditions: one schedule, a learning rate per setting, and divergence as an outcome.

Comparing all settings at one learning rate measures which settings that rate suits. Therefore each setting uses the
best rate of a short search, which is recorded. A loss that becomes NaN or too large is a result, with its step and
learning rate; it raises no error.
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
"""A loss this many times the first one, or that of chance, has diverged: batches differ by less, and a good schedule
stays below."""

ROUNDING = 1e-6
"""A loss below this is rounding error, for example if teacher and student are equal; its ratios are meaningless."""

POINTS_KEPT = 50
"""Number of points of a loss curve that are saved."""

RATE_FACTOR = 10**0.5
"""Factor between neighbouring learning rates of a search: a finer grid is within the noise of a short run."""

RATE_EXTENSIONS = 3
"""Maximum number of extensions of a search whose best rate is its highest or lowest."""


@dataclass(frozen=True)
class Schedule:
    """``steps`` optimizer steps: the rate rises linearly to ``peak_rate`` over the first ``warm_up_share`` of them and
    falls to 0 along half a cosine.

    ``weight_decay`` is 0 by default: decoupled decay pulls full fine-tuning towards zero weights but an adapter towards
    the base model, which would be two different tasks.
    """

    steps: int
    peak_rate: float
    warm_up_share: float = 0.1
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise GaugeError(f"a training needs at least 1 step, got {self.steps}")
        if not (math.isfinite(self.peak_rate) and self.peak_rate > 0):
            raise GaugeError(f"the learning rate must be positive and finite, got {self.peak_rate}")
        if not 0 <= self.warm_up_share < 1:
            raise GaugeError(f"the warm-up share must be at least 0 and below 1, got {self.warm_up_share}")

    def rate(self, step: int) -> float:
        """The learning rate of ``step``, counted from 0."""
        warm_up = math.ceil(self.warm_up_share * self.steps)
        if step < warm_up:
            return self.peak_rate * (step + 1) / warm_up
        return self.peak_rate * (1 + math.cos(math.pi * (step - warm_up) / (self.steps - warm_up))) / 2


@dataclass(frozen=True)
class Divergence:
    """Where a training diverged: ``step``, counted from 0; the schedule's peak ``learning_rate``; and ``loss``,
    ``None`` if it was not finite."""

    step: int
    learning_rate: float
    loss: float | None


@dataclass(frozen=True)
class Curve:
    """A training's ``losses`` as (step, loss), thinned to `POINTS_KEPT`; ``step_seconds``, the median of its steps;
    ``divergence``, if any, which ends the curve."""

    losses: tuple[tuple[int, float], ...]
    step_seconds: float
    divergence: Divergence | None = None

    def as_json(self) -> dict[str, Any]:
        """The record as JSON."""
        return asdict(self)


def train(job: TrainingJob, schedule: Schedule, *, after_step: Callable[[int], None] | None = None) -> Curve:
    """Take ``schedule.steps`` steps of ``job``, or fewer if it diverges; ``after_step`` is called with each number.

    A job may state the loss of guessing as ``chance_loss``.
    """
    for group in job.optimizer.param_groups:
        group["weight_decay"] = schedule.weight_decay
    losses: list[float] = []
    seconds: list[float] = []
    divergence = None
    # A model that knows the task already begins near 0, and any update multiplies that.
    least = max(ROUNDING, getattr(job, "chance_loss", 0.0))
    for step in range(schedule.steps):
        for group in job.optimizer.param_groups:
            group["lr"] = schedule.rate(step) * group.get("rate_factor", 1.0)
        begun = time.perf_counter()
        job.step()
        assert job.loss is not None, "a step leaves its loss"
        loss = float(job.loss)  # waits for the device
        seconds.append(time.perf_counter() - begun)
        if not math.isfinite(loss) or (losses and loss > DIVERGED_OVER_START * max(losses[0], least)):
            divergence = Divergence(step, schedule.peak_rate, loss if math.isfinite(loss) else None)
            break
        losses.append(loss)
        if after_step is not None:
            after_step(step)
    job.clear()
    return Curve(thinned(losses), statistics.median(seconds), divergence)


def thinned(losses: Sequence[float], most: int = POINTS_KEPT) -> tuple[tuple[int, float], ...]:
    """At most ``most`` (at least 2) of ``losses``, evenly spread, with the first and the last; each with its step."""
    if len(losses) <= most:
        return tuple(enumerate(losses))
    steps = [round(k * (len(losses) - 1) / (most - 1)) for k in range(most)]
    return tuple((step, losses[step]) for step in steps)


@dataclass(frozen=True)
class RateSearch:
    """The learning rates ``tried``, ascending, each with its loss (``None``: diverged), and the ``chosen`` rate,
    ``None`` if all diverged. ``at_edge``: the best rate was the highest or lowest; a better one may lie beyond."""

    tried: tuple[tuple[float, float | None], ...]
    chosen: float | None
    at_edge: bool

    def as_json(self) -> dict[str, Any]:
        """The record as JSON."""
        return asdict(self)


def search_rate(
    outcome: Callable[[float], float | None],
    start: float,
    *,
    extensions: int = RATE_EXTENSIONS,
    finer: bool = False,
) -> RateSearch:
    """The learning rate with the least ``outcome`` (a loss, or ``None`` for divergence): ``start`` and its two
    neighbours are tried, then at most ``extensions`` more in the direction of the best; with ``finer``, also the two
    rates half a step from the best."""
    found: dict[float, float | None] = {}

    def look(exponent: float) -> None:
        loss = outcome(rate_at(exponent))
        found[exponent] = loss if loss is not None and math.isfinite(loss) else None

    def rate_at(exponent: float) -> float:
        # Rounding keeps 0.003162… out of records; neighbours stay a factor of about `RATE_FACTOR` apart.
        return float(f"{start * RATE_FACTOR**exponent:.2g}")

    def best() -> float | None:
        usable = {exponent: loss for exponent, loss in found.items() if loss is not None}
        # Of equal losses the lowest rate: it moves the weights least.
        return min(usable, key=lambda exponent: (usable[exponent], exponent)) if usable else None

    for first in (0, -1, 1):
        look(first)
    for _ in range(extensions):
        leader = best()
        if leader is not None and min(found) < leader < max(found):
            break
        # If everything diverged, a lower rate may help.
        look(max(found) + 1 if leader is not None and leader == max(found) else min(found) - 1)
    leader = best()
    if finer and leader is not None:
        for between in (leader - 0.5, leader + 0.5):
            look(between)
        leader = best()
    tried = tuple((rate_at(exponent), found[exponent]) for exponent in sorted(found))
    at_edge = leader is not None and leader in (min(found), max(found))
    return RateSearch(tried, None if leader is None else rate_at(leader), at_edge)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Disable dropout in the context and leave everything else in training mode.

    ``model.eval()`` cannot be used on a 4-bit model between two trainings: on a CPU with AVX512-BF16, bitsandbytes then
    repacks the weights for inference at the first forward without gradients, and can no longer train with them.
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
