"""FourierFT and WaveFT: random positions of a spectrum are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peft_gauge.plan.policies.patches import Patches


def attach(patches: Patches, config: Mapping[str, Any]) -> None:
    patches.warn("The random positions of the trained frequencies are not drawn: only their number matters.")
    patches.stack.enter_context(_NoPermutations())


class _NoPermutations(TorchFunctionMode):
    """A permutation of all positions of a weight takes a second per layer of a 7B model; only its length is used."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.randperm:
            return torch.empty(args[0], dtype=torch.long)
        return func(*args, **(kwargs or {}))
