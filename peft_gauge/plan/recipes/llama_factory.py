"""Files of LLaMA-Factory. Defaults and casts as of its release 0.9.5 (`llamafactory/hparams`, `llamafactory/model`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peft_gauge._internals.liger import has_liger
from peft_gauge.errors import GaugeError
from peft_gauge.plan.recipes.adapter import adapter
from peft_gauge.plan.recipes.recipe import LESS, NO_LIGER, OLDER, STORED, Keys, Recipe, known_keys
from peft_gauge.training import trainers
from peft_gauge.training.methods import LINEAR_LAYERS, Blocks, Cast

if TYPE_CHECKING:
    from peft_gauge.training.methods import Method

VOCABULARY = "the vocabulary is planned as in the model's config, and embeddings as frozen"
NOT_MODELLED = {
    "deepspeed": "several GPUs and offloading are not planned",
    "fsdp": trainers.SEVERAL_GPUS,
    "fsdp_config": trainers.SEVERAL_GPUS,
    "use_unsloth": f"Unsloth {LESS}",
    "use_unsloth_gc": "checkpointing is planned, offloading to the host is not",
    "use_galore": "GaLore is not planned",
    "use_apollo": "APOLLO is not planned",
    "use_badam": "BAdam is not planned",
    "use_muon": "Muon is not planned",
    "use_adam_mini": "Adam-mini is not planned",
    "use_llama_pro": "block expansion is not planned",
    "shift_attn": "shifted attention is not planned",
    "mixture_of_depths": "mixture of depths is not planned",
    "upcast_lmhead_output": "logits are planned in the base's data type",
    "neat_packing": "the mask between the texts of a row is not planned",
    "torch_compile": "compiled steps are not planned",
    "fp8": "FP8 compute is not planned",
    "use_kt": "KTransformers is not planned",
    "use_mca": "Megatron is not planned",
    "use_hyper_parallel": trainers.SEVERAL_GPUS,
    "use_v1_kernels": f"a fused kernel {LESS}",
    "adapter_name_or_path": "a new adapter is planned; plan the one in the folder with --adapter",
    **dict.fromkeys(("resize_vocab", "add_tokens", "add_special_tokens", "new_special_tokens_config"), VOCABULARY),
    "moe_aux_loss_coef": "the loss of routers is not planned",
    "use_asft_loss": "the usual loss is planned, without a reference model",
    "use_dft_loss": "the usual loss is planned",
    "use_eaft_loss": "the usual loss is planned",
    "freeze_language_model": "the language model is planned as trained",
    "auto_find_batch_size": "the batch is planned as given",
    "use_liger_kernel": "LLaMA-Factory's own key, enable_liger_kernel, is planned",
}
OF_TRAINER = (
    "neftune_noise_alpha", "label_smoothing_factor", "optim_args", "optim_target_modules", "torch_empty_cache_steps",
)  # fmt: skip
"""Arguments of its trainer on which memory depends and that no field of the step stands for."""
NORMS = "norm|ln"
"""In the names of parameters that LLaMA-Factory holds for a norm's (`llamafactory.extras.constants`)."""
ATTENTIONS = {"auto": None, "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"}


def read_llama_factory(values: Mapping[str, Any]) -> Recipe:
    """The recipe of ``llamafactory-cli train``."""
    config = trainers.config_fields("trainer")
    keys = Keys("LLaMA-Factory", values, {*known_keys("llama-factory"), *known_keys(OLDER), *config})
    stage = keys.get("stage", "sft")
    if stage not in ("sft", "pt"):
        raise GaugeError(f"LLaMA-Factory's stage {stage!r} cannot be planned; sft and pt can")
    model = keys.get("model_name_or_path")
    pure = keys.flag("pure_bf16")
    autocast = "bf16" if keys.get("bf16") else "fp16" if keys.get("fp16") else "no"
    kind = keys.get("finetuning_type", "lora")
    # Without either, 4-bit layers compute in the data type of the checkpoint.
    computes = "bfloat16" if pure or autocast == "bf16" else "float16" if autocast == "fp16" else None
    method = _method(keys, str(kind), compute_dtype=computes)
    norms = (Cast(NORMS, "float32", vectors_only=True),) if keys.flag("upcast_layernorm") else ()
    method = replace(method, casts=norms, trained_in_float32=not pure)
    checkpointing = not keys.flag("disable_gradient_checkpointing")
    keys.refuse(NOT_MODELLED)
    fields = {
        "batch": keys.whole("per_device_train_batch_size", 8),
        "seq": keys.whole("cutoff_len", 2048),
        "grad_accumulation": keys.whole("gradient_accumulation_steps", 1),
        "optimizer": str(keys.get("optim", "adamw_torch_fused")),
        "grad_checkpointing": checkpointing,
        "clip_grad_norm": float(keys.get("max_grad_norm", 1.0)),
        "mixed_precision": autocast,
    }
    keys.get("packing")
    arguments: dict[str, Any] = {name: keys.get(name) for name in OF_TRAINER if name in keys}
    if keys.flag("enable_liger_kernel"):
        if has_liger():
            arguments["use_liger_kernel"] = True
        else:
            keys.not_modelled["enable_liger_kernel"] = NO_LIGER
    attention = ATTENTIONS.get(str(keys.get("flash_attn", "auto")))
    reentrant = keys.flag("use_reentrant_gc", True) if checkpointing else None
    return keys.recipe(
        model=model,
        method=method,
        dtype=STORED,
        loop="trainer",
        fields=fields,
        arguments=arguments,
        reentrant=reentrant,
        attention=attention,
    )


def _method(keys: Keys, kind: str, *, compute_dtype: str | None) -> Method:
    from peft_gauge.training import methods

    bits = keys.get("quantization_bit")
    if kind in ("full", "freeze"):
        if bits is not None:
            raise GaugeError("the LLaMA-Factory recipe quantizes the base and trains it; use finetuning_type: lora")
        return methods.FULL if kind == "full" else _freeze(keys)
    if kind not in ("lora", "oft"):
        raise GaugeError(f"LLaMA-Factory's finetuning_type {kind!r} cannot be planned; lora, oft, freeze and full can")
    by = str(keys.get("quantization_method", "bnb")).lower() if bits is not None else "bnb"
    if by not in ("bnb", "bitsandbytes"):
        raise GaugeError(f"LLaMA-Factory's quantization_method {by!r} cannot be planned; bnb can")
    return adapter(
        (_lora if kind == "lora" else _oft)(keys)
        | {
            # LLaMA-Factory does not read oft_target.
            "target_modules": _targets(keys.get("lora_target", "all")),
            "modules_to_save": _names(keys.get("additional_target")),
        },
        bits=None if bits is None else int(bits),
        quant_format=str(keys.get("quantization_type", "nf4")) if bits == 4 else "nf4",
        double_quant=bits == 4 and keys.flag("double_quantization", True),
        compute_dtype=compute_dtype,
    )


def _lora(keys: Keys) -> dict[str, Any]:
    rank = keys.whole("lora_rank", 8)
    return {
        "r": rank,
        "lora_alpha": keys.get("lora_alpha", 2 * rank),
        "lora_dropout": keys.get("lora_dropout", 0.0),
        "use_dora": keys.get("use_dora"),
        "use_rslora": keys.get("use_rslora"),
    }


def _oft(keys: Keys) -> dict[str, Any]:
    return {
        "peft_type": "OFT",
        "r": keys.get("oft_rank", 0),
        "oft_block_size": keys.get("oft_block_size", 32),
        "module_dropout": keys.get("module_dropout", 0.0),
    }


def _freeze(keys: Keys) -> Method:
    """Training of a part of the base: of its last (first, if negative) blocks, and of modules outside of them."""
    from peft_gauge.training import methods

    number = keys.get("freeze_trainable_layers", 2)
    if isinstance(number, bool) or not isinstance(number, int) or number == 0:
        raise GaugeError(
            f"freeze_trainable_layers in the LLaMA-Factory recipe must be a whole number other than 0, not {number!r}"
        )
    blocks = Blocks(
        number,
        tuple(_names(keys.get("freeze_trainable_modules", "all")) or ()),
        tuple(_names(keys.get("freeze_extra_modules")) or ()),
    )
    title = f"full fine-tuning of {abs(number)} blocks"
    return methods.FULL.variant("freeze", title, trains=blocks, checkpoints_trained_only=True)


def _targets(value: Any) -> Any:
    names = _names(value)
    return (LINEAR_LAYERS,) if names == ["all"] else names


def _names(value: Any) -> list[str] | None:
    if value is None or isinstance(value, list):
        return value
    return [name.strip() for name in str(value).split(",") if name.strip()]
