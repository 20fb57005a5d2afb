"""Weight updates of a training: their norm and their rank.

The update of a weight is the trained weight minus the initial one. A few singular values may carry what was learned,
yet none is zero: AdamW divides each gradient by its own size, so an entry that hardly matters moves about as far per
step as an important one, in a direction set by noise. Full fine-tuning therefore leaves a floor of many small singular
values, far above the rounding of float32 weights. The energy rank counts squared singular values and is little affected
by that floor; the effective rank is affected much. Both are compared with a random matrix of the same size, which is
an update without any structure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch

from peft_gauge.errors import GaugeError

if TYPE_CHECKING:
    from torch import Tensor, nn

RANKS = (1, 2, 4, 8, 16, 32, 64)
"""Ranks at which an update's spectrum is evaluated and to which it is truncated."""

ENERGY_SHARE = 0.9

RANDOM_SEEDS = (0, 1, 2)


def lora_update_norm(model: nn.Module, adapter: str = "default") -> float | None:
    """Frobenius norm of (α/r)·B·A over all adapted layers together, as merged by PEFT; ``None`` without LoRA."""
    with torch.no_grad():
        norms = [
            float(torch.linalg.matrix_norm(cast("Any", module).get_delta_weight(adapter)))
            for module in model.modules()
            if hasattr(module, "get_delta_weight")
        ]
    return math.hypot(*norms) if norms else None


# --- the spectrum of one update -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spectrum:
    """The rank of a matrix by several measures of its singular values.

    ``energy_at_rank``: for each of `RANKS`, the share of the squared Frobenius norm that the best approximation of that
    rank keeps; ``energy_rank``: the least rank that keeps `ENERGY_SHARE` of it; ``effective_rank``: the exponential of
    the entropy of the singular values divided by their sum (Roy and Vetterli 2007), from 1 to their number.
    """

    energy_at_rank: Mapping[int, float]
    energy_rank: int
    effective_rank: float

    @classmethod
    def of(cls, singular_values: Tensor) -> Spectrum:
        """From singular values in descending order. Raises `GaugeError` if all are zero."""
        energy = _energy(singular_values)
        shares = (energy.cumsum(0) / energy.sum()).clamp(max=1.0)
        probabilities = singular_values.double() / singular_values.double().sum()
        return cls(
            energy_at_rank={rank: float(shares[min(rank, len(shares)) - 1]) for rank in RANKS},
            energy_rank=_rank_of_share(energy, ENERGY_SHARE),
            effective_rank=math.exp(float(torch.special.entr(probabilities).sum())),
        )


@lru_cache
def random_spectrum(rows: int, columns: int) -> Spectrum:
    """The spectrum of a ``rows`` × ``columns`` matrix with independent normal entries, from the means of its singular
    values over `RANDOM_SEEDS`."""
    drawn = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) for seed in RANDOM_SEEDS)
    return Spectrum.of(torch.stack([torch.linalg.svdvals(matrix.double()) for matrix in drawn]).mean(0))


def _energy(singular_values: Tensor) -> Tensor:
    energy = singular_values.double().square()
    if energy.sum() == 0:
        raise GaugeError("the weight was not updated, so its update has no rank")
    return energy


def _rank_of_share(energy: Tensor, share: float) -> int:
    # Rounding can leave the last cumulative sums below the total.
    return min(int((energy.cumsum(0) < share * energy.sum()).sum()) + 1, len(energy))


# --- the updates of a model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weight:
    """A weight before and after; ``left`` (rows × kept) and ``right`` (kept × columns) as returned by `_decomposed`."""

    before: Tensor
    after: Tensor
    left: Tensor
    right: Tensor


class Updates:
    """The updates of the linear layers of ``base`` by full training, decomposed once.

    Paths in ``trained`` may have a wrapper's name as prefix; `truncated` works on its weights. An embedding tied to the
    output layer counts once, as the output layer. ``spectra``: for each layer's path, the spectrum of its update and of
    a random matrix of the same size. Singular values are computed in float64 on the CPU: half a minute on one core for
    135 M parameters.

    Raises `GaugeError` if a layer is missing from ``trained`` or was not updated.
    """

    def __init__(self, base: nn.Module, trained: nn.Module, ranks: Sequence[int] = RANKS) -> None:
        self.most_rank = max(ranks)
        self.spectra: dict[str, tuple[Spectrum, Spectrum]] = {}
        self._weights: list[_Weight] = []
        for path, before, after in _linear_weights(base, trained):
            values, left, right = _decomposed(_difference(before, after), self.most_rank)
            self.spectra[path] = Spectrum.of(values), random_spectrum(*before.shape)
            self._weights.append(_Weight(before, after, left, right))

    @contextmanager
    def truncated(self, rank: int) -> Iterator[None]:
        """In the context, each trained weight is its base plus the best approximation of ``rank`` of its update,
        rounded to the weight's dtype (the base itself for rank 0); afterwards it is restored to the last bit.

        Parameters outside linear layers (norms, biases, an untied embedding) stay as trained.
        """
        if not 0 <= rank <= self.most_rank:
            raise GaugeError(f"the rank must be from 0 to {self.most_rank}, got {rank}")
        whole = [weight.after.clone() for weight in self._weights]
        try:
            for weight in self._weights:
                kept = weight.left[:, :rank] @ weight.right[:rank]
                weight.after.copy_(weight.before.to(kept) + kept)
            yield
        finally:
            for weight, as_trained in zip(self._weights, whole, strict=True):
                weight.after.copy_(as_trained)


def _linear_weights(base: nn.Module, trained: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Path, weight before and weight after (both detached) of each linear layer of ``base``."""
    after = {path: module.weight for path, module in trained.named_modules() if isinstance(module, torch.nn.Linear)}
    for path, module in base.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        found = [weight for name, weight in after.items() if f".{name}".endswith(f".{path}")]
        if len(found) != 1:
            raise GaugeError(f"the trained model has {len(found)} linear layers called {path}, expected 1")
        yield path, module.weight.detach(), found[0].detach()


def _decomposed(update: Tensor, most_rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """All singular values of ``update`` in descending order, and two factors (rows × kept, kept × columns): the first r
    columns of one times the first r rows of the other are the best approximation of rank r ≤ ``most_rank``."""
    # The R of a QR decomposition has the same singular values and right vectors; for an output layer with a row per
    # word of the vocabulary it saves most of the work.
    tall = update.shape[0] > update.shape[1]
    core = torch.linalg.qr(update, mode="r").R if tall else update
    _, values, right = torch.linalg.svd(core, full_matrices=False)
    kept = right[:most_rank].clone()  # releases the other vectors
    return values, update @ kept.T, kept


def _difference(before: Tensor, after: Tensor) -> Tensor:
    """The update in float64, on the CPU."""
    return after.cpu().double() - before.cpu().double()
