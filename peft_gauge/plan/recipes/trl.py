"""Files of ``trl sft --config``, and of ``TrainingArguments`` or ``SFTConfig`` alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from peft_gauge._internals.liger import has_liger
from peft_gauge.errors import GaugeError
from peft_gauge.plan.recipes.adapter import adapter
from peft_gauge.plan.recipes.recipe import OLDER, STORED, Keys, Recipe, attention_name, known_keys
from peft_gauge.training import trainers

SCRIPT = frozenset(
    {
        "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_streaming",
        "ignore_bias_buffers", "datasets", "streaming", "test_split_size", "model_revision", "lora_task_type",
        "trust_remote_code", "gradient_accumulation_plugin", "bnb_4bit_quant_storage", "config", "env",
    }
)  # fmt: skip

NOT_MODELLED = {
    **trainers.NOT_PLANNED,
    "auto_find_batch_size": "the batch is planned as given",
    "lora_target_parameters": "adapters on parameters are planned from an adapter config only (--adapter)",
}

# Arguments on which the memory of a step depends and that no other name stands for.
ARGUMENTS = (
    "packing", "packing_strategy", "padding_free", "pad_to_multiple_of", "loss_type", "neftune_noise_alpha",
    "label_smoothing_factor", "router_aux_loss_coef", "optim_args", "optim_target_modules",
    "gradient_checkpointing_kwargs", "torch_empty_cache_steps", "average_tokens_across_devices", "full_determinism",
    "activation_offloading",
)  # fmt: skip


def not_modelled() -> dict[str, str]:
    """Keys that a plan does not follow, and why."""
    return {name: why for name, why in NOT_MODELLED.items() if not (name in trainers.OF_LIGER and has_liger())}


def arguments_of(keys: Keys, loop: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's arguments that ``keys`` give; the defaults of settings that they leave out are noted."""
    names = (*trainers.SETTINGS, *ARGUMENTS, *(trainers.OF_LIGER if has_liger() else ()))
    given = {name: keys.get(name) for name in names if name in keys and name in known}
    found = trainers.arguments(loop, given)  # type: ignore[arg-type]
    for name in trainers.SETTINGS:
        if name not in given:
            value = getattr(found, name)
            keys.defaults[name] = getattr(value, "value", value)
    return given


def read_trl(values: Mapping[str, Any]) -> Recipe:
    """The recipe of ``trl sft --config``: fields of TRL's `ModelConfig`, `ScriptArguments` and `SFTConfig`."""
    from peft_gauge.training import methods

    config = trainers.config_fields("sft")
    model_fields = _model_defaults()
    keys = Keys("TRL", values, {*config, *model_fields, *SCRIPT, *known_keys(OLDER)})
    given = arguments_of(keys, "sft", config)
    default = model_fields.get
    model = keys.get("model_name_or_path")
    dtype = str(keys.get("dtype", keys.get("torch_dtype") or default("dtype")))
    bits = 4 if keys.get("load_in_4bit") else 8 if keys.get("load_in_8bit") else None
    method = methods.FULL
    if keys.get("use_peft"):
        method = adapter(
            {
                "r": keys.whole("lora_r", default("lora_r")),
                "lora_alpha": keys.get("lora_alpha", default("lora_alpha")),
                "lora_dropout": keys.get("lora_dropout", default("lora_dropout")),
                "target_modules": _targets(keys.get("lora_target_modules")),
                "modules_to_save": keys.get("lora_modules_to_save"),
                "use_rslora": keys.get("use_rslora"),
                "use_dora": keys.get("use_dora"),
            },
            bits=bits,
            quant_format=str(keys.get("bnb_4bit_quant_type", default("bnb_4bit_quant_type")) if bits else "nf4"),
            double_quant=bool(keys.get("use_bnb_nested_quant")),
        )
        if bits == 4 and dtype == STORED:
            raise GaugeError("TRL refuses dtype: auto for a base in 4 bit; name the data type in the recipe")
    elif bits is not None:
        raise GaugeError("the TRL recipe quantizes the base and trains all of it; add use_peft: true")
    keys.refuse(not_modelled())
    seq = keys.whole("max_length", config["max_length"])
    attention = attention_name(keys.get("attn_implementation"))
    return keys.recipe(
        model=model,
        method=method,
        dtype=dtype,
        loop="sft",
        fields={"seq": seq},
        arguments=given,
        attention=attention,
    )


def read_arguments(values: Mapping[str, Any]) -> Recipe:
    """A file of ``TrainingArguments``, or of ``SFTConfig`` if it has a key of that."""
    plain = trainers.config_fields("trainer")
    of_sft = trainers.config_fields("sft")
    loop = "sft" if values.keys() & (of_sft.keys() - plain.keys()) else "trainer"
    config = of_sft if loop == "sft" else plain
    tool = "TrainingArguments" if loop == "trainer" else "SFTConfig"
    keys = Keys(tool, values, {*config, *known_keys(OLDER)})
    given = arguments_of(keys, loop, config)
    keys.refuse(not_modelled())
    length = {"seq": keys.whole("max_length", config["max_length"])} if loop == "sft" else {}
    return keys.recipe(
        model=None,
        method=None,
        dtype="float32" if loop == "sft" else None,
        loop=loop,
        fields=length,
        arguments=given,
    )


def _model_defaults() -> dict[str, Any]:
    from trl import ModelConfig

    return {each.name: each.default for each in fields(ModelConfig)}


def _targets(value: Any) -> Any:
    """TRL's ``lora_target_modules``: names, in a list or separated by spaces, or ``all-linear``."""
    if isinstance(value, str) and value != "all-linear":
        value = value.replace(",", " ").split()
    return "all-linear" if value == ["all-linear"] else value
