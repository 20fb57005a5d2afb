"""X-LoRA: a mixture of LoRA adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from peft_gauge.plan.policies.patches import Patches


def attach(patches: Patches, config: Mapping[str, Any]) -> None:
    def uncached(original: Callable[..., None]) -> Callable[..., None]:
        def init(tuner: Any, model: Any, *args: Any, **kwargs: Any) -> None:
            model.config.use_cache = False  # X-LoRA rejects a base that has it on; a training step has it off anyway
            original(tuner, model, *args, **kwargs)

        return init

    patches.replace("peft.tuners.xlora.model:XLoraModel.__init__", uncached)
