"""LoRA: initialisations that read the base weights, and its variants KaSA, MonteCLoRA and aLoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from peft_gauge._internals import peft as peft_internals
from peft_gauge.plan.policies.patches import asks_for

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from peft_gauge.plan.policies.patches import Patches


def attach(patches: Patches, config: Mapping[str, Any]) -> None:
    def default_values(layer: Any, adapter_name: str, *_: Any, **__: Any) -> None:
        layer.reset_lora_parameters(adapter_name, True)

    inits = {"PiSSA": "0.18.0", "OLoRA": "0.18.0", "CorDA": "0.18.0", "MiCA": "0.20.0", "LoftQ": "0.18.0"}
    for title, since in inits.items():
        patches.replace(
            f"peft.tuners.lora.layer:LoraLayer.{title.lower()}_init",
            lambda _: default_values,
            since=since,
            wanted=asks_for(config, title.lower()),
            warning=f"{title} initialisation from the base weights is skipped: shapes only.",
        )

    def not_truncated(original: Callable[..., None]) -> Callable[..., None]:
        def init(module: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
            original(module, adapter_name, *args, **kwargs)
            peft_internals.kasa_deferred(module).discard(adapter_name)

        return init

    patches.replace(
        "peft.tuners.lora.variants:KasaLinearVariant.init",
        not_truncated,
        since="0.21.0",
        wanted=asks_for(config, "kasa"),
        warning="KaSA's truncation of the base weights (one SVD per layer) is skipped: shapes only.",
    )

    montecloras: dict[str, Any] = {"since": "0.20.0", "wanted": asks_for(config, "monteclora")}
    patches.replace("peft.tuners.lora.variants:MontecloraLinearVariant.init", _with_sampler, **montecloras)
    patches.replace(
        "peft.tuners.lora.monteclora:BufferedMontecloraSampler.__init__",
        lambda _: _unfilled_sampler,
        **montecloras,
        warning="MonteCLoRA's samples are not drawn; a refill of their buffers (two at once) is not planned.",
    )


def _with_sampler(original: Callable[..., None]) -> Callable[..., None]:
    """PEFT would create the sampler in the first forward, after the optimizer was given its parameters."""

    def init(module: Any, adapter_name: str, config: Any, **kwargs: Any) -> None:
        original(module, adapter_name, config, **kwargs)
        if adapter_name not in module.lora_monteclora_sampler:
            with torch.device("meta"):
                sampler = peft_internals.montecloras_sampler(module, adapter_name, config.monteclora_config)
            module.lora_monteclora_sampler[adapter_name] = sampler

    return init


def _unfilled_sampler(sampler: Any, model: Any, buffer_size: int = 150, device: Any = None) -> None:
    rank, dtype = model.out_features, model.dtype
    sampler.model, sampler.device, sampler.buffer_size, sampler.index = model, device, buffer_size, 0
    weights = torch.empty(buffer_size, model.num_samples, model.in_features, rank, dtype=dtype, device=device)
    priors = torch.empty(buffer_size, model.num_samples, dtype=dtype, device=device)
    sampler.buffer = [
        {"z_mvn": mvn, "z_wishart": torch.empty(rank, rank, dtype=dtype, device=device), "z_dirichlet": dirichlet}
        for mvn, dirichlet in zip(weights, priors, strict=True)
    ]


def whole_sequence_alora(patches: Patches, *, wanted: bool) -> None:
    def every_token(peft_config: Any, active_adapter: str, input_ids: torch.Tensor, *_: Any, **__: Any) -> list[int]:
        return [input_ids.shape[1]] * input_ids.shape[0]

    patches.replace(
        "peft.tuners.lora.variants:calculate_alora_offsets",
        lambda _: every_token,
        wanted=wanted,
        warning="aLoRA's invocation is assumed at the first token: an upper bound.",
    )
