"""The step, the base and the methods that options and a recipe describe, for ``plan`` and other commands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_gauge.errors import GaugeError, unknown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from peft_gauge.plan.recipes import Recipe
    from peft_gauge.training.methods import Method
    from peft_gauge.training.models import ModelRecord

OF_LORA = ("rank", "alpha", "target_modules", "dropout")
OF_BASE = ("quantize", "double_quant", "autocast_adapter_dtype", "prepare_kbit")
OF_METHOD = ("method", "adapter", *OF_LORA, *OF_BASE)
OF_TRAINER = ("batch", "grad_accumulation", "optimizer", "grad_checkpointing", "clip_grad_norm", "mixed_precision")


def lora_settings(
    rank: int | None, alpha: float | None, target_modules: str | None, dropout: float | None
) -> dict[str, Any]:
    """The settings of a LoRA config that are given. Raises `GaugeError` for impossible values."""
    if rank is not None and rank < 1:
        raise GaugeError(f"--rank must be at least 1, got {rank}")
    if dropout is not None and not 0 <= dropout < 1:
        raise GaugeError(f"--dropout must be at least 0 and below 1, got {dropout}")
    names = None if target_modules is None else [name.strip() for name in target_modules.split(",") if name.strip()]
    if names == []:
        raise GaugeError("--target-modules names no module; give names such as q_proj,v_proj, or all-linear")
    targets = "all-linear" if names == ["all-linear"] else names
    given = {"r": rank, "lora_alpha": alpha, "target_modules": targets, "lora_dropout": dropout}
    return {name: value for name, value in given.items() if value is not None}


def with_lora_settings(methods: Sequence[Method], settings: Mapping[str, Any], named: bool) -> list[Method]:
    """``methods`` with these settings of LoRA; of methods that the user did not name, only those that are LoRA change.

    Raises `GaugeError` if the user ``named`` another method, or if all are others.
    """
    if not settings:
        return list(methods)
    others = [method.name for method in methods if method.peft_config.get("peft_type") != "LORA"]
    if len(others) == len(methods) or (named and others):
        raise GaugeError(f"--rank, --alpha, --target-modules and --dropout are LoRA's, which {others[0]} is not")
    return [
        method if method.name in others else method.variant(method.name, method.title, peft_config=dict(settings))
        for method in methods
    ]


def described_step(given: Mapping[str, Any], recipe: Recipe | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `PlanRequest` that describe the step: from options, a recipe, and the defaults.

    Its data type is `recipes.STORED` if a recipe leaves it to the checkpoint (`in_stored_dtype`). Raises `GaugeError`
    for an option that the recipe decides.
    """
    from peft_gauge.plan import recipes
    from peft_gauge.training import models
    from peft_gauge.training.loops import step_settings

    loop, fields = given.get("loop", "plain"), {**FIELDS}
    values = {name: given.get(name) for name in ("dtype", "attention", "checkpoint_reentrant", "loss")}
    if recipe is not None:
        _check_undecided(given, recipe)
        loop, arguments = recipe.loop, recipe.arguments
        if loop != "plain":
            del fields["batch"]  # the trainer's own default
        decided = {"dtype": recipe.dtype, "attention": recipe.attention, "checkpoint_reentrant": recipe.reentrant}
        values |= {name: value for name, value in decided.items() if value is not None}
        values["loss"] = values["loss"] or recipe.loss
    fields |= {name: given[name] for name in STEP_OPTIONS if name in given}
    fields |= {} if recipe is None else recipe.fields
    dtype = str(values["dtype"] or ("float32" if loop == "sft" else "bfloat16"))
    if dtype != recipes.STORED:
        dtype = models.dtype_named(dtype)
    values |= {"dtype": dtype, "loss": values["loss"] or "full"}
    settings, further = step_settings(loop, fields, arguments)
    return {**values, "loop": loop, "settings": settings, "trainer_arguments": further}


def in_stored_dtype(step: Mapping[str, Any], record: ModelRecord) -> dict[str, Any]:
    """``step`` with the data type of ``record``'s checkpoint, if it has been left to that."""
    from peft_gauge.plan import recipes
    from peft_gauge.training import models

    return {**step, "dtype": models.stored_dtype(record) if step["dtype"] == recipes.STORED else step["dtype"]}


def within_positions(step: Mapping[str, Any], record: ModelRecord) -> dict[str, Any]:
    """``step`` with at most the positions of the model, for a sequence length that the user did not give."""
    settings, most = step["settings"], record.max_positions
    if most is None or settings.seq <= most:
        return dict(step)
    return {**step, "settings": replace(settings, seq=most)}


FIELDS = {"batch": 4, "seq": 768}
STEP_OPTIONS = (
    "batch",
    "seq",
    "optimizer",
    "grad_checkpointing",
    "grad_accumulation",
    "clip_grad_norm",
    "mixed_precision",
    "float32_outputs",
)
"""Options that are fields of `StepSettings`."""


def decided(recipe: Recipe) -> set[str]:
    """The options whose values ``recipe`` decides."""
    found = {"loop", *recipe.fields, *(OF_TRAINER if recipe.loop != "plain" else ())}
    found |= {*(OF_METHOD if recipe.method is not None else ())}
    found |= {name for name in ("dtype", "attention") if getattr(recipe, name) is not None}
    return found | ({"loss"} if recipe.loss != "full" else set())


def _check_undecided(given: Mapping[str, Any], recipe: Recipe) -> None:
    for name in given:
        if name in decided(recipe):
            option = name.replace("_", "-")
            raise GaugeError(f"--{option} is decided by the {recipe.tool} recipe; change its key with --set KEY=VALUE")


def base_of(model: str | None, recipe: Recipe | None) -> str:
    """The base to plan: the option, or the recipe's; a Hub id of a model that this suite has a record of is that."""
    if model is not None:
        return model
    if recipe is None:
        raise GaugeError("give the base with --model, or a config file with --recipe")
    if recipe.model is None:
        raise GaugeError(f"the {recipe.tool} recipe names no base model; add --model")
    from peft_gauge.training.models import record_names

    name = recipe.model.rpartition("/")[2].lower().removesuffix("-hf")
    is_hub_id = recipe.model.count("/") == 1 and not Path(recipe.model).expanduser().exists()
    return name if is_hub_id and name in record_names() else recipe.model


def adjusted(
    method: Method,
    quantize: str | None,
    double_quant: bool | None,
    autocast_adapter_dtype: bool | None,
    prepare_kbit: bool | None,
) -> Method:
    """``method`` with the given options applied; ``None`` leaves its own setting.

    A base that ``quantize`` quantizes is prepared for k-bit training, as for QLoRA, unless ``prepare_kbit`` is False.
    """
    from peft_gauge.training.methods import Quantization

    changes: dict[str, Any] = {}
    quantization = method.quantization
    if quantize is not None:
        from peft_gauge.training.quantization import LAYER_FORMATS

        if quantize not in LAYER_FORMATS:
            raise unknown("quantized layer format", quantize, LAYER_FORMATS)
        if quantization is None:
            changes["prepare_kbit"] = True
        quantization = replace(quantization or Quantization(), quant_format=quantize)  # type: ignore[arg-type]
    if double_quant is not None and quantization is not None:
        quantization = replace(quantization, double_quant=double_quant)
    changes["quantization"] = quantization
    if autocast_adapter_dtype is not None:
        changes["autocast_adapter_dtype"] = autocast_adapter_dtype
    if prepare_kbit is not None:
        changes["prepare_kbit"] = prepare_kbit
    return replace(method, **changes)
