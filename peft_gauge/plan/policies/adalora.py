"""AdaLoRA, and the importance statistics that it and AdaMSS keep between steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from peft_gauge.plan.policies.patches import Patches


def attach(patches: Patches, config: Mapping[str, Any]) -> None:
    patches.warn("AdaLoRA's rank counters count as trainable: PEFT does so for every base except float32 on the CPU.")


def keeps_importance(model: nn.Module) -> bool:
    """Whether ``model`` has an adapter for which `update_importance` does anything."""
    return getattr(getattr(model, "base_model", None), "rankallocator", None) is not None or bool(_scored_layers(model))


def _scored_layers(model: nn.Module) -> list[Any]:
    """The layers of AdaMSS, which score their subspaces."""
    return [module for module in model.modules() if hasattr(module, "exp_avg_ipt_A")]


def update_importance(model: nn.Module) -> None:
    """Create the state that AdaLoRA and AdaMSS keep between steps, as their `update_and_allocate` does.

    Call it where a training loop calls that: between the optimizer's step and `zero_grad`. Ranks are not reallocated,
    since this changes no shape. The state is among `fakes.plain_tensors(model)`. Does nothing for other types.
    """
    tuner = getattr(model, "base_model", None)
    allocator = getattr(tuner, "rankallocator", None)
    if allocator is not None:
        allocator.update_ipt(tuner.model)  # type: ignore[union-attr]
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    for layer in _scored_layers(model):
        for adapter in layer.exp_avg_ipt_A:
            asa = configs[adapter]
            layer.update_importance(adapter, asa.asa_importance_beta, asa.asa_uncertainty_beta)
