"""Private parts of PEFT, used by the policies that plan a tuner without values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def buffer_dict() -> Any:
    """The container of FRoD's projections: a dictionary of persistent or other buffers. Guarded by FRoD's policy."""
    from peft.tuners._buffer_dict import BufferDict

    return BufferDict


def frod_category() -> Callable[[str], str]:
    """FRoD's name for a layer's kind, from the module's name: one projection per kind. Guarded by FRoD's policy."""
    from peft.tuners.frod.model import _category_from_key

    return _category_from_key


def settings_of(tuner: Any, config: Any) -> Any:
    """An adapter's config with its default targets filled in and "all-linear" expanded, a tuner's first step."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    settings = tuner._prepare_adapter_config(config, tuner.get_model_config(tuner.model))
    return _maybe_include_all_linear_layers(settings, tuner.model)


def is_target(tuner: Any, settings: Any, name: str) -> bool:
    """Whether a tuner adapts the module ``name``. Unguarded."""
    return bool(tuner._check_target_module_exists(settings, name))


def montecloras_sampler(module: Any, adapter: str, config: Any) -> Any:
    """MonteCLoRA's sampler of a layer, which PEFT creates in the first forward. Unguarded."""
    from peft.tuners.lora.variants import MontecloraLinearVariant

    return MontecloraLinearVariant._create_sampler(module, adapter, config)


def kasa_deferred(module: Any) -> set[str]:
    """The adapters of a layer whose base KaSA truncates later, in the first forward. Unguarded."""
    deferred: set[str] = module._lora_kasa_truncation_deferred
    return deferred
