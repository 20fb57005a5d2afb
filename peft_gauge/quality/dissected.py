"""A task that also analyses the trained weights: the rank of each weight's update, and the score at each rank.

It wraps another task, can be swept like it, and returns that task's scores and these:

- ``quality_at_rank_R``, and the same for the others of `LEFT` that the task has: the score when the update of every
  linear layer is replaced by its best approximation of rank R, for each of `RANKS`, and for 0, the control: the score
  from training the other parameters (norms) alone;
- ``energy_rank_over_random`` and ``effective_rank_over_random``: the rank of an update over that of a random matrix of
  the same size (1: no structure), the median of all linear layers;
- ``KIND.FIGURE.least``, ``.median`` and ``.most`` over the ``KIND.layers`` layers of each kind (q_proj, …), with FIGURE
  one of ``energy_rank``, ``effective_rank`` and ``energy_rank_over_random``; of ``energy_at_rank_R`` the median; and
  ``KIND.random.FIGURE``, the value for a random matrix of that size;
- ``PATH.energy_at_rank_R`` for the two layers whose updates have the least and the greatest share of the random
  matrix's rank.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from peft_gauge.quality.sweep import Prepared
from peft_gauge.quality.updates import RANKS, Spectrum, Updates

if TYPE_CHECKING:
    from torch import nn

    from peft_gauge.training.methods import Method
    from peft_gauge.training.step import TrainingJob

    Spectra = Mapping[str, tuple[Spectrum, Spectrum]]


LEFT = ("quality", "loss_learned", "exact_match")
"""The scores that are evaluated again at each rank."""


class PreparedOnBase(Prepared, Protocol):
    """A prepared task that keeps the base model of its students."""

    @property
    def base(self) -> nn.Module: ...


class TaskOnBase(Protocol):
    """A task whose prepared form has its base model, and whose scores have a ``quality``."""

    def identity(self) -> dict[str, Any]: ...

    def prepared(self) -> PreparedOnBase: ...


@dataclass(frozen=True)
class Dissected:
    """``task`` with an analysis of the trained weights; for methods that train every linear layer itself."""

    task: TaskOnBase

    def identity(self) -> dict[str, Any]:
        """Everything that determines the task, as JSON."""
        return {"dissected_at_ranks": [0, *RANKS], **self.task.identity()}

    def prepared(self) -> PreparedDissected:
        """The task with its model and data built."""
        return PreparedDissected(self.task.prepared())


@dataclass(frozen=True)
class PreparedDissected:
    """A `Dissected` task ready for training."""

    whole: PreparedOnBase

    @property
    def notes(self) -> tuple[str, ...]:
        """Assumptions of the wrapped task."""
        return self.whole.notes

    def job(self, method: Method) -> TrainingJob:
        """The wrapped task's job."""
        return self.whole.job(method)

    def validation_loss(self, job: TrainingJob) -> float:
        """The wrapped task's validation loss."""
        return self.whole.validation_loss(job)

    def scores(self, job: TrainingJob) -> dict[str, float]:
        """The wrapped task's scores, and those listed in this module's docstring; ``job`` is unchanged afterwards."""
        scores = self.whole.scores(job)
        if not all(math.isfinite(score) for score in scores.values()):
            return scores  # diverged in the last step: the weights have no singular values
        updates = Updates(self.whole.base, job.model)
        left: dict[str, float] = {}
        for rank in (0, *RANKS):
            with updates.truncated(rank):
                cut = self.whole.scores(job)
            left |= {f"{name}_at_rank_{rank}": cut[name] for name in LEFT if name in cut}
        return {**scores, **left, **spectral_metrics(updates.spectra)}


def spectral_metrics(spectra: Spectra) -> dict[str, float]:
    """Metrics of `Updates.spectra`, named as in this module's docstring."""
    over_random = {path: own.energy_rank / random.energy_rank for path, (own, random) in spectra.items()}
    effective = [own.effective_rank / random.effective_rank for own, random in spectra.values()]
    metrics: dict[str, float] = {
        "energy_rank_over_random": statistics.median(over_random.values()),
        "effective_rank_over_random": statistics.median(effective),
    }
    kinds: dict[str, list[str]] = {}
    for path in spectra:
        kinds.setdefault(path.rpartition(".")[2], []).append(path)
    for kind, paths in kinds.items():
        own, random = ([spectra[path][which] for path in paths] for which in (0, 1))
        metrics |= {
            f"{kind}.layers": len(paths),
            **_spread(f"{kind}.energy_rank_over_random", [over_random[path] for path in paths]),
            **_spread(f"{kind}.energy_rank", [each.energy_rank for each in own]),
            **_spread(f"{kind}.effective_rank", [each.effective_rank for each in own]),
            **_median_energies(kind, own),
            f"{kind}.random.energy_rank": statistics.median(each.energy_rank for each in random),
            f"{kind}.random.effective_rank": statistics.median(each.effective_rank for each in random),
            **_median_energies(f"{kind}.random", random),
        }
    for path in (min(over_random, key=over_random.__getitem__), max(over_random, key=over_random.__getitem__)):
        metrics |= _median_energies(path, [spectra[path][0]])
    return metrics


def _spread(name: str, values: list[float]) -> dict[str, float]:
    return {f"{name}.least": min(values), f"{name}.median": statistics.median(values), f"{name}.most": max(values)}


def _median_energies(name: str, spectra: list[Spectrum]) -> dict[str, float]:
    return {
        f"{name}.energy_at_rank_{rank}": statistics.median(each.energy_at_rank[rank] for each in spectra)
        for rank in RANKS
    }
