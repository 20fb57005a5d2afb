"""FRoD: a joint decomposition of the base weights, and a sparse matrix whose size torch reads from its indices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from peft_gauge._internals import peft as peft_internals
from peft_gauge._internals.torch import modules_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from peft_gauge.plan.policies.patches import Patches


def attach(patches: Patches, config: Mapping[str, Any]) -> None:
    def factors(layer: Any, V: torch.Tensor, W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # PEFT makes copies on the CPU, which `meta` does not support; memory that is never written uses none.
        return torch.empty(W.shape, dtype=V.dtype), torch.empty(W.shape[1])

    patches.replace("peft.tuners.frod.layer:FrodLayer._calculate_frod_u_and_lambda", lambda _: factors, since="0.20.0")
    patches.replace(
        "peft.tuners.frod.model:FrodModel._init_frod_projections",
        lambda _: _frod_projections,
        since="0.20.0",
        warning="FRoD's joint decomposition of the base weights is skipped: shapes only.",
    )


def _frod_projections(tuner: Any, config: Any, adapter_name: str) -> None:
    """`FrodModel._init_frod_projections` without values: V (in×in), COO indices and size for each category of layer."""
    from torch import nn

    category_of, buffers = peft_internals.frod_category(), peft_internals.buffer_dict()
    settings = peft_internals.settings_of(tuner, config)
    if not hasattr(tuner, "frod_V"):
        tuner.frod_V, tuner.frod_s_indices, tuner.frod_s_size = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
    for key, module in tuner.model.named_modules():
        category = category_of(key)
        if not isinstance(module, nn.Linear) or not peft_internals.is_target(tuner, settings, key):
            continue
        if adapter_name in modules_of(tuner.frod_V).get(category, ()):
            continue
        width = module.in_features
        most = width * width - width
        count = min(int(width * width * config.sparse_rate), most)
        if config.sparse_rate > 0 and most:
            count = max(1, count)
        made = {
            "frod_V": torch.empty(width, width, dtype=module.weight.dtype),
            "frod_s_indices": torch.empty(2, count, dtype=torch.long),
            "frod_s_size": torch.tensor([width, width]),
        }
        for name, value in made.items():
            holder = getattr(tuner, name)
            holder[category] = buffers({}, persistent=config.save_projection)
            holder[category][adapter_name] = value


def fixed_sparse_size(patches: Patches, *, wanted: bool) -> None:
    def size_of_projection(original: Callable[..., Any]) -> Callable[..., Any]:
        def tensors(layer: Any, adapter: str, *, device: Any, dtype: torch.dtype) -> tuple[Any, Any, Any, Any]:
            U = layer.frod_U[adapter].to(device=device, dtype=dtype)
            V = layer.frod_V[adapter].to(device=device, dtype=dtype)
            indices = layer.frod_s_indices[adapter].to(device=device, dtype=torch.long)
            values = layer.frod_lambda_s_values[adapter].to(device=device, dtype=dtype)
            lambda_l = layer.frod_lambda_l[adapter].to(device=device, dtype=dtype)
            return U, V, torch.sparse_coo_tensor(indices, values, tuple(V.shape)).coalesce(), lambda_l

        return tensors

    owner = "peft.tuners.frod.layer:Linear._get_frod_tensors"
    patches.replace(owner, size_of_projection, since="0.20.0", wanted=wanted)
