"""SHiRA: a random mask selects the trained positions of each weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from peft_gauge.plan.policies.patches import Patches


def attach(patches: Patches, config: Mapping[str, Any]) -> None:
    def without_mask(original: Callable[..., None]) -> Callable[..., None]:
        def update_layer(layer: Any, adapter_name: str, mask: Any, *args: Any, **kwargs: Any) -> None:
            original(layer, adapter_name, None, *args, **kwargs)
            count = layer.shira_weight[adapter_name].numel()
            layer.shira_indices[adapter_name] = torch.empty(2, count, dtype=torch.int, device="meta")

        return update_layer

    patches.replace("peft.tuners.shira.config:random_mask", lambda _: lambda *args, **kwargs: None)
    patches.replace(
        "peft.tuners.shira.layer:ShiraLayer.update_layer",
        without_mask,
        warning="SHiRA's sparse masks are not drawn: only their number of positions matters.",
    )
