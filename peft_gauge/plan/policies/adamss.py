"""AdaMSS: subspaces of the base weights by principal components and k-means."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from peft_gauge.plan.policies.patches import Patches


def attach(patches: Patches, config: Mapping[str, Any]) -> None:
    def factors(tensor: torch.Tensor, r: int, device: Any, dtype: torch.dtype, **_: Any) -> tuple[Any, Any]:
        batch, channels, rows, columns = tensor.shape
        rank = min(r, rows, columns)
        right = torch.empty(batch, channels, rank, columns, dtype=dtype, device=device)
        return right, torch.empty(batch, channels, rows, rank, dtype=dtype, device=device)

    def even_clusters(rows: torch.Tensor, num_subspaces: int, iternum: int) -> tuple[torch.Tensor, int]:
        clusters = min(num_subspaces, rows.shape[0])
        return torch.arange(rows.shape[0]) % clusters, clusters

    def fixed_rank(original: Callable[..., None]) -> Callable[..., None]:
        def update_layer(layer: Any, adapter_name: str, r: int, config: Any, **kwargs: Any) -> None:
            if config.use_dynamic_rank:
                patches.warn("AdaMSS's dynamic ranks depend on the weights: the largest, subspace_rank, is assumed.")
                config.use_dynamic_rank = False
            original(layer, adapter_name, r, config, **kwargs)

        return update_layer

    _without_sklearn(patches)
    layer = "peft.tuners.adamss.layer"
    patches.replace(f"{layer}:slice_pca", lambda _: factors, since="0.19.0")
    patches.replace(
        f"{layer}:clustering_Z",
        lambda _: even_clusters,
        since="0.19.0",
        warning="AdaMSS's k-means of the base weights is replaced by clusters of equal size.",
    )
    patches.replace(f"{layer}:AdamssLayer.update_layer", fixed_rank, since="0.19.0")


def _without_sklearn(patches: Patches) -> None:
    """Make scikit-learn seem importable, which AdaMSS's config requires; its k-means does not run here."""
    if "sklearn" not in sys.modules:
        sys.modules["sklearn"] = ModuleType("sklearn")
        patches.stack.callback(sys.modules.pop, "sklearn")
