"""Files of axolotl. Defaults and casts as of its release 0.19 (`axolotl/utils/schemas`, `axolotl/loaders`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_gauge._internals.cut_cross_entropy import has_cut_cross_entropy
from peft_gauge._internals.liger import has_liger
from peft_gauge.errors import GaugeError
from peft_gauge.plan.recipes.lora import lora
from peft_gauge.plan.recipes.recipe import LESS, NO_LIGER, Keys, Recipe, attention_name, known_keys
from peft_gauge.training.trainers import SEVERAL_GPUS

NOT_MODELLED = {
    "deepspeed": "several GPUs and offloading are not planned",
    "fsdp": SEVERAL_GPUS,
    "fsdp_config": SEVERAL_GPUS,
    "fsdp_version": SEVERAL_GPUS,
    "context_parallel_size": SEVERAL_GPUS,
    "sequence_parallel_degree": SEVERAL_GPUS,
    "tensor_parallel_size": SEVERAL_GPUS,
    "dp_shard_size": SEVERAL_GPUS,
    "dp_replicate_size": SEVERAL_GPUS,
    "torch_compile": "compiled steps are not planned",
    "unfrozen_parameters": "parts of the base are not planned; all of it is",
    "lisa_n_layers": "LISA is not planned",
    "relora": "ReLoRA is not planned",
    "rl": "the step is planned as supervised fine-tuning",
    "unsloth_lora_mlp": f"Unsloth {LESS}",
    "unsloth_lora_qkv": f"Unsloth {LESS}",
    "unsloth_lora_o": f"Unsloth {LESS}",
    "lora_mlp_kernel": f"a fused LoRA kernel {LESS}",
    "lora_qkv_kernel": f"a fused LoRA kernel {LESS}",
    "lora_o_kernel": f"a fused LoRA kernel {LESS}",
    "activation_offloading": f"activation offloading {LESS}",
    "layer_offloading": f"layer offloading {LESS}",
    "gptq": "GPTQ is planned from the checkpoint's own config",
    "lora_target_parameters": "adapters on parameters are planned from an adapter config only (--adapter)",
    "expert_parallel_size": SEVERAL_GPUS,
    "use_scattermoe": f"a fused kernel for experts {LESS}",
    "use_sonicmoe": f"a fused kernel for experts {LESS}",
    "dense_mixer": "dense mixing of experts is not planned",
    "nonexpert_quantization": "another quantization of the layers outside the experts is not planned",
    "kd_trainer": "the step is planned as supervised fine-tuning, without the teacher's logits",
    "diffusion": "the step is planned as supervised fine-tuning",
    "use_mora": "MoRA is planned as LoRA",
    "spectrum_top_fraction": "parts of the base are not planned; all of it is",
    "qat": "quantization-aware training is not planned",
    "fp8": "FP8 compute is not planned",
}
CUT_CROSS_ENTROPY = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"
FUSED_LOSSES = ("liger_fused_linear_cross_entropy", "chunked_cross_entropy")
IN_CHUNKS = "planned as a loss in 8 chunks along the sequence, which needs somewhat more"
# axolotl's keys -> Liger's own options.
LIGER = {
    "liger_rope": ("rope",),
    "liger_rms_norm": ("rms_norm",),
    "liger_layer_norm": ("layer_norm",),
    "liger_glu_activation": ("swiglu", "geglu"),
    "liger_cross_entropy": ("cross_entropy",),
    "liger_fused_linear_cross_entropy": ("fused_linear_cross_entropy",),
}
PACKED = "rows of sequence_len tokens, planned without the mask between the texts of a row, as with flash attention"


def read_axolotl(values: Mapping[str, Any]) -> Recipe:
    """The recipe of ``axolotl train``."""
    keys = Keys("axolotl", values, known_keys("axolotl"))
    model = keys.get("base_model")
    precision, dtype = _precision(keys)
    method = _method(keys)
    checkpointing = keys.get("gradient_checkpointing", False)
    if isinstance(checkpointing, str):
        keys.not_modelled["gradient_checkpointing"] = "checkpointing is planned, offloading to the host is not"
    checkpointing_kwargs = keys.get("gradient_checkpointing_kwargs") or {}
    keys.refuse(NOT_MODELLED)
    arguments = _liger(keys)
    loss = _loss(keys)
    if keys.get("sample_packing"):
        keys.get("pad_to_sequence_len")
        keys.not_modelled["sample_packing"] = PACKED
    fields = {
        "batch": keys.whole("micro_batch_size", 1),
        "seq": keys.whole("sequence_len", 512),
        "grad_accumulation": keys.whole("gradient_accumulation_steps", 1),
        "optimizer": str(keys.get("optimizer", "adamw_torch_fused")),
        "grad_checkpointing": bool(checkpointing),
        "clip_grad_norm": float(keys.get("max_grad_norm") or 0),
        "mixed_precision": precision,
    }
    attention = _attention(keys)
    return keys.recipe(
        model=model,
        method=method,
        dtype=dtype,
        loop="trainer",
        fields=fields,
        arguments=arguments,
        reentrant=bool(checkpointing_kwargs.get("use_reentrant", True)) if checkpointing else None,
        attention=attention,
        loss=loss,
    )


def _precision(keys: Keys) -> tuple[str, str]:
    """Autocast, and the data type of the weights: bfloat16 or float16 as for autocast, else float32."""
    in_bf16 = keys.get("bf16", "auto" if not keys.get("fp16") else None)
    if in_bf16 == "full":
        return "no", "bfloat16"
    if in_bf16 in (True, "auto"):
        return "bf16", "bfloat16"
    if keys.get("fp16"):
        return "fp16", "float16"
    if keys.get("bfloat16"):
        return "no", "bfloat16"
    return ("no", "float16") if keys.get("float16") else ("no", "float32")


def _method(keys: Keys) -> Any:
    from peft_gauge.training import methods

    adapter = keys.get("adapter") or None
    bits = 4 if keys.get("load_in_4bit") else 8 if keys.get("load_in_8bit") else None
    if adapter is None:
        if bits is not None:
            raise GaugeError("the axolotl recipe quantizes the base and has no adapter; add adapter: qlora")
        return methods.FULL
    if adapter not in ("lora", "qlora"):
        raise GaugeError(f"axolotl's adapter {adapter!r} cannot be planned; lora and qlora can")
    if adapter == "qlora" and bits is None:
        raise GaugeError("axolotl's adapter qlora needs load_in_4bit: true")
    targets = "all-linear" if keys.get("lora_target_linear") else keys.get("lora_target_modules")
    return lora(
        {
            "r": keys.whole("lora_r"),
            "lora_alpha": keys.get("lora_alpha"),
            "lora_dropout": keys.get("lora_dropout", 0.0),
            "target_modules": targets,
            "modules_to_save": keys.get("lora_modules_to_save"),
            "use_dora": keys.get("peft_use_dora"),
            "use_rslora": keys.get("peft_use_rslora"),
            "layers_to_transform": keys.get("peft_layers_to_transform"),
        },
        bits=bits,
        double_quant=bits == 4,
        adapters_in_float32=bool(keys.get("peft_autocast_adapter_dtype", True)),
    )


def _liger(keys: Keys) -> dict[str, Any]:
    """The trainer's arguments for the parts of the model that Liger replaces."""
    chosen = {key: bool(keys.get(key)) for key in LIGER}
    if not any(chosen.values()):
        return {}
    if not has_liger():
        keys.not_modelled |= dict.fromkeys((key for key, on in chosen.items() if on), NO_LIGER)
        return {}
    options = {option: on for key, on in chosen.items() for option in LIGER[key]}
    return {"use_liger_kernel": True, "liger_kernel_config": options}


def _loss(keys: Keys) -> str:
    plugins = keys.get("plugins") or []
    in_plugin = isinstance(plugins, list) and CUT_CROSS_ENTROPY in plugins  # which turns it on unless its key does not
    if keys.get("cut_cross_entropy", True if in_plugin else None):
        if not has_cut_cross_entropy():
            keys.not_modelled["cut_cross_entropy"] = f"{IN_CHUNKS}; as itself where cut-cross-entropy is installed"
        return "cce"
    for name in FUSED_LOSSES:
        if keys.get(name) and not (name in LIGER and has_liger()):
            keys.not_modelled[name] = IN_CHUNKS
            return "chunked"
    return "full"


def _attention(keys: Keys) -> str | None:
    given = keys.get("attn_implementation")
    names = {"flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager"}
    for key, name in names.items():
        if keys.get(key):
            given = given or name
    others = ("xformers_attention", "flex_attention", "s2_attention", "sage_attention")
    keys.refuse(dict.fromkeys(others, "another attention is planned as sdpa"))
    given = attention_name(given)
    if given in (None, "sdpa", "eager", "flash_attention_2"):
        return None if given is None else str(given)
    keys.not_modelled["attn_implementation"] = f"{given} is planned as sdpa"
    return None
