"""Prompt tuning and related methods: virtual tokens, and the extra inputs of their models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from peft_gauge.plan.policies.patches import Patches


def attach(patches: Patches, config: Mapping[str, Any]) -> None:
    init = config.get("prompt_tuning_init")
    if init not in (None, "RANDOM", "SAMPLE_VOCAB"):  # `methods.attach` makes random ones of the same shape on meta
        patches.warn(f"Virtual tokens are not initialised from {init}: shapes only.")


def extra_inputs(model: nn.Module, batch: int, seq: int) -> dict[str, torch.Tensor]:
    """The inputs of `model`'s PEFT type other than `input_ids` and `labels`; call it inside the fake mode.

    Poly and multitask prompt tuning: `task_ids` (batch,); CPT: `input_type_mask` (batch, seq); 64-bit integers.
    """
    kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in getattr(model, "peft_config", {}).values()}
    extra: dict[str, torch.Tensor] = {}
    if kinds & {"POLY", "MULTITASK_PROMPT_TUNING"}:
        extra["task_ids"] = torch.zeros(batch, dtype=torch.long)
    if "CPT" in kinds:
        extra["input_type_mask"] = torch.full((batch, seq), 4, dtype=torch.long)
    return extra
