"""What training did to the weights: how large the update is, and how many ranks it really has."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch

from peft_gauge.errors import GaugeError

if TYPE_CHECKING:
    from torch import Tensor, nn


def lora_update_norm(model: nn.Module, adapter: str = "default") -> float | None:
    """Frobenius norm of (α/r)·B·A over all adapted layers together, as PEFT would merge it; ``None`` without any."""
    with torch.no_grad():
        norms = [
            float(torch.linalg.matrix_norm(cast("Any", module).get_delta_weight(adapter)))
            for module in model.modules()
            if hasattr(module, "get_delta_weight")
        ]
    return math.hypot(*norms) if norms else None


def energy_rank(update: Tensor, share: float = 0.9) -> int:
    """The least rank at which the best approximation of ``update`` (rows × columns) keeps ``share`` of its squared
    Frobenius norm; by Eckart and Young (1936) that is how many singular values it takes. Raises `GaugeError` for an
    update of nothing but zeros."""
    energy = torch.linalg.svdvals(update.double()).square()
    total = energy.sum()
    if total == 0:
        raise GaugeError("the weight was not updated, so its update has no rank")
    # The last sums may fall short of the whole by rounding.
    return min(int((energy.cumsum(0) < share * total).sum()) + 1, len(energy))


def update_ranks(base: nn.Module, trained: nn.Module, share: float = 0.9) -> dict[str, tuple[int, int]]:
    """`energy_rank` of each linear layer's update from ``base`` to ``trained``, and beside it that of a normally
    distributed random matrix of the same size. In ``trained`` a wrapper's name may stand before each path."""
    after = {path: module.weight for path, module in trained.named_modules() if isinstance(module, torch.nn.Linear)}
    found: dict[str, tuple[int, int]] = {}
    of_random: dict[torch.Size, int] = {}
    with torch.no_grad():
        for path, module in base.named_modules():
            if not isinstance(module, torch.nn.Linear):
                continue
            (weight,) = [candidate for name, candidate in after.items() if f".{name}".endswith(f".{path}")]
            if weight.shape not in of_random:
                drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
                of_random[weight.shape] = energy_rank(drawn, share)
            found[path] = energy_rank(weight.cpu() - module.weight.cpu(), share), of_random[weight.shape]
    return found
