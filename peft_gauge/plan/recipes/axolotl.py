"""Files of axolotl. Defaults and casts as of its release 0.19 (`axolotl/utils/schemas`, `axolotl/loaders`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peft_gauge._internals.cut_cross_entropy import has_cut_cross_entropy
from peft_gauge._internals.liger import has_liger
from peft_gauge.errors import GaugeError
from peft_gauge.plan.recipes.adapter import adapter
from peft_gauge.plan.recipes.recipe import LESS, NO_LIGER, Keys, Recipe, attention_name, known_keys
from peft_gauge.training.methods import LINEAR_LAYERS, Cast
from peft_gauge.training.trainers import SEVERAL_GPUS

if TYPE_CHECKING:
    from peft_gauge.training.methods import Method

LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
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
    "lisa_n_layers": "LISA is not planned",
    "relora": "ReLoRA is not planned",
    "rl": "the step is planned as supervised fine-tuning",
    "unsloth_lora_mlp": f"Unsloth {LESS}",
    "unsloth_lora_qkv": f"Unsloth {LESS}",
    "unsloth_lora_o": f"Unsloth {LESS}",
    **dict.fromkeys(LORA_KERNELS, f"a fused LoRA kernel {LESS}"),
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
    "quantize_moe_experts": f"experts are planned unquantized; quantizing them {LESS}",
    "llama4_linearized_experts": "experts are planned as one tensor in each layer",
    "experts_implementation": "experts are planned by transformers' default implementation",
    "gemma4_fp8_nonexpert": "another quantization of the layers outside the experts is not planned",
    "gemma4_nf4_nonexpert": "another quantization of the layers outside the experts is not planned",
    "model_quantization_config": "the base is planned as its checkpoint's own config names it",
    "use_onebitllms": "1-bit layers are not planned",
    "fp32_norms": "norms in float32 need FSDP, which is not planned",
    "selective_checkpointing": "checkpointing of whole blocks is planned; a step needs more with it",
    "dynamic_checkpoint": "one step is planned",
    "tiled_mlp": f"a tiled MLP {LESS}",
    "fused_attn_kernel": f"a fused kernel for attention {LESS}",
    "flash_attn_fuse_mlp": f"a fused MLP {LESS}",
    "flash_attn_cross_entropy": f"a fused cross-entropy {LESS}",
    "flash_attn_rms_norm": f"a fused norm {LESS}",
    "flash_optimum": "BetterTransformer is not planned",
    "use_kernels": f"a kernel from the Hub {LESS}",
    "use_dsv4_kernels": f"a fused kernel {LESS}",
    "use_glm_dsa_kernels": f"a fused kernel {LESS}",
    "liger_rms_norm_gated": f"Liger's gated norm {LESS}",
    "sdpa_varlen": f"attention of packed texts {LESS}",
    "gemma4_hybrid_attn_impl": "attention is planned alike in all layers",
    "large_head_attention": "another attention is planned as sdpa",
    "scaling_softmax": "scaling of attention's logits is not planned",
    "batch_flattening": "rows are planned as given, not flattened",
    "auto_find_batch_size": "the batch is planned as given",
    "reward_model": "the step is planned as supervised fine-tuning",
    "process_reward_model": "the step is planned as supervised fine-tuning",
    "use_eaft": "the usual loss is planned",
    "trainer_cls": "the step of transformers.Trainer is planned",
    "lora_model_dir": "a new adapter is planned; plan the one in the folder with --adapter",
    "tokens": "the vocabulary is planned as in the model's config",
    "resize_token_embeddings_to_32x": "the vocabulary is planned as in the model's config",
    "shrink_embeddings": "the vocabulary is planned as in the model's config",
    "overrides_of_model_config": "the model is planned by its own config",
    "overrides_of_model_kwargs": "the model is planned by its own config",
    "ple_cpu_offload": f"offloading of embeddings {LESS}",
    "gpu_memory_limit": "all of the base is planned on one GPU",
    "max_memory": "all of the base is planned on one GPU",
}
PLUGINS = ("cut_cross_entropy", "liger", "swanlab", "lm_eval", "hatchery")
"""axolotl's plugins that the plan follows, or that do not change a step's memory."""
OF_TRAINER = ("neftune_noise_alpha", "optim_target_modules", "torch_empty_cache_steps")
"""Keys that axolotl hands to its trainer as they are."""

CUT = "cut_cross_entropy"
FUSED_LOSSES = (CUT, "liger_fused_linear_cross_entropy", "chunked_cross_entropy")
IN_CHUNKS = "planned as a loss in 8 chunks along the sequence, which needs somewhat more"
# axolotl's keys -> Liger's own options.
LIGER = {
    "liger_rope": ("rope",),
    "liger_rms_norm": ("rms_norm",),
    "liger_layer_norm": ("layer_norm",),
    "liger_glu_activation": ("swiglu", "geglu"),
    "liger_swiglu": ("swiglu", "geglu"),  # its former name
    "liger_cross_entropy": ("cross_entropy",),
    "liger_fused_linear_cross_entropy": ("fused_linear_cross_entropy",),
}
OF_PLUGINS = {
    CUT: "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin",
    **dict.fromkeys(LIGER, "axolotl.integrations.liger.LigerPlugin"),
}
"""Keys of plugins, which axolotl leaves out without a word if their plugin is not listed."""
PACKED = "rows of sequence_len tokens, planned without the mask between the texts of a row, as with flash attention"


def read_axolotl(values: Mapping[str, Any]) -> Recipe:
    """The recipe of ``axolotl train``."""
    keys = Keys("axolotl", values, known_keys("axolotl"))
    model = keys.get("base_model")
    attention, is_cast = _attention(keys)
    arguments = _liger(keys) | _of_trainer(keys)
    _plugins(keys)
    loss, is_cut = _loss(keys)
    bits = 4 if keys.get("load_in_4bit") else 8 if keys.get("load_in_8bit") else None
    precision, dtype = _precision(keys, bits)
    method = _method(keys, bits, dtype, in_16bit=is_cast or is_cut)
    checkpointing = keys.get("gradient_checkpointing", False)
    if isinstance(checkpointing, str):
        keys.not_modelled["gradient_checkpointing"] = "checkpointing is planned, offloading to the host is not"
    keys.refuse(NOT_MODELLED)
    if keys.get("sample_packing"):
        keys.get("pad_to_sequence_len")
        keys.not_modelled["sample_packing"] = PACKED
    fields = {
        "batch": keys.whole("micro_batch_size", 1),
        "seq": keys.whole("sequence_len", 512),
        "grad_accumulation": keys.whole("gradient_accumulation_steps", 1),
        "optimizer": str(keys.get("optimizer", "adamw_torch_fused")),
        "grad_checkpointing": bool(checkpointing),
        "clip_grad_norm": float(keys.get("max_grad_norm", 1.0)),
        "mixed_precision": precision,
    }
    return keys.recipe(
        model=model,
        method=method,
        dtype=dtype,
        loop="trainer",
        fields=fields,
        arguments=arguments,
        reentrant=_reentrant(keys) if checkpointing else None,
        attention=attention,
        loss=loss,
    )


def _reentrant(keys: Keys) -> bool:
    given = keys.get("gradient_checkpointing_kwargs")
    if given is None:
        return "unfrozen_parameters" not in keys
    return bool(given.get("use_reentrant", True))


def _precision(keys: Keys, bits: int | None) -> tuple[str, str]:
    """Autocast, and the data type of the weights (`axolotl.utils.config.resolve_dtype`)."""
    in_fp16 = bool(keys.get("fp16"))
    given = keys.get("bf16", None if in_fp16 or keys.is_empty("bf16") else "auto")
    if given not in (True, False, None, "auto"):
        raise GaugeError(f"axolotl refuses bf16: {given}; it takes true, false and auto")
    in_bf16 = given is True or (given == "auto" and not in_fp16)
    if in_bf16 or keys.get("bfloat16"):
        return "bf16", "bfloat16"
    in_float16 = in_fp16 or keys.get("float16") or bits == 8
    return "fp16" if in_fp16 else "no", "float16" if in_float16 else "float32"


def _method(keys: Keys, bits: int | None, dtype: str, *, in_16bit: bool) -> Method:
    """The method with axolotl's casts (`axolotl.loaders.model.ModelLoader._configure_embedding_dtypes`).

    ``in_16bit``: norms and embeddings are cast back to ``dtype`` also without an adapter.
    """
    from peft_gauge.training import methods

    adapter_type = keys.get("adapter") or None
    # Norms, embeddings, heads and routers are cast to float32; then, with an adapter, all but routers to the base's
    # data type. In between a base that is loaded in 8 or 4 bit is prepared, which leaves in float32 what else is not
    # quantized: biases, experts.
    skips_embeddings = bits == 4 and keys.flag("embeddings_skip_upcast")
    cast = (_norms, *(() if skips_embeddings else (_embeddings,)))
    casts = [each for one in (*cast, _routers) for each in one("float32")]
    further: dict[str, Any] = {"trains": _unfrozen(keys)}
    if adapter_type is None:
        if bits is not None:
            raise GaugeError("the axolotl recipe quantizes the base and has no adapter; add adapter: qlora")
        casts += [each for one in cast for each in one(dtype)] if in_16bit else []
        return methods.FULL.variant("full", methods.FULL.title, casts=tuple(casts), **further)
    if adapter_type not in ("lora", "qlora"):
        raise GaugeError(f"axolotl's adapter {adapter_type!r} cannot be planned; lora and qlora can")
    if adapter_type == "qlora" and bits != 4:
        raise GaugeError("axolotl's adapter qlora needs load_in_4bit: true")
    further |= {
        "prepare_kbit": bits is not None,
        "casts": (*casts, *(each for one in cast for each in one(dtype))),
        "autocast_adapter_dtype": bool(keys.get("peft_autocast_adapter_dtype", True)),
    }
    if adapter_type == "lora" and bits == 4:
        keys.not_modelled["load_in_4bit"] = (
            "axolotl quantizes to 4 bit for adapter: qlora only; for lora it loads the base in 16 bit, and casts it to "
            "float32, which is planned"
        )
        bits = None
    constants = keys.get("bnb_config_kwargs") or {}
    _kernels(keys, adapter_type, bits)
    return adapter(
        {
            "r": keys.whole("lora_r"),
            "lora_alpha": keys.get("lora_alpha"),
            "lora_dropout": keys.get("lora_dropout", 0.0),
            "target_modules": _targets(keys),
            **{theirs: keys.get(key) for key, theirs in OF_PEFT.items()},
        },
        bits=bits,
        quant_format=str(constants.get("bnb_4bit_quant_type", "nf4")),
        double_quant=bits == 4 and bool(constants.get("bnb_4bit_use_double_quant", True)),
        **further,
    )


OF_PEFT = {
    "lora_modules_to_save": "modules_to_save",
    "lora_exclude_modules": "exclude_modules",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_layers_pattern": "layers_pattern",
    "peft_layer_replication": "layer_replication",
    "peft_trainable_token_indices": "trainable_token_indices",
    "peft_ensure_weight_tying": "ensure_weight_tying",
}
"""axolotl's keys -> fields of PEFT's `LoraConfig`."""


def _norms(dtype: str) -> tuple[Cast, ...]:
    return (Cast(r"norm.*\.[^.]*$", dtype),)


def _routers(dtype: str) -> tuple[Cast, ...]:
    return (Cast(r"\.gate\.", dtype),)


def _embeddings(dtype: str) -> tuple[Cast, ...]:
    """By the names that `axolotl.loaders.utils.get_linear_embedding_layers` gives."""
    return (
        Cast(r"(embed_tokens|lm_head).*\.", dtype),
        Cast(r"(embed_in|embed_out).*\.", dtype, model_type="gpt_neox"),
        Cast(r"word_embeddings.*\.", dtype, model_type="falcon"),
        Cast(r"embeddings.*\.", dtype, model_type="nemotron_h"),
    )


def _unfrozen(keys: Keys) -> tuple[str, ...] | None:
    """``unfrozen_parameters`` as regular expressions, read as `axolotl.utils.freeze.LayerNamePattern` does: matched
    from the start of a name, with dots as they are. A range of rows at the end is left out: the other rows are trained
    too, with gradients of zero."""
    given = keys.get("unfrozen_parameters")
    if not given:
        return None
    if not isinstance(given, (list, str)):
        raise GaugeError(f"unfrozen_parameters in the axolotl recipe must be a list of patterns, not {given!r}")
    found = []
    for each in [given] if isinstance(given, str) else given:
        name = re.sub(r"\[[0-9]*(:[0-9]*)?\]$", "", str(each))
        pattern = re.sub(r"\.(?!\+)", r"\\.", name)
        try:
            re.compile(pattern)
        except re.error as error:
            raise GaugeError(
                f"unfrozen_parameters in the axolotl recipe: {each!r} is not a valid pattern: {error}"
            ) from None
        found.append(f"^(?:{pattern})")
    return tuple(found)


def _targets(keys: Keys) -> Any:
    named = keys.get("lora_target_modules")
    if not keys.get("lora_target_linear"):
        return named
    return (LINEAR_LAYERS, *([named] if isinstance(named, str) else named or ()))


def _kernels(keys: Keys, adapter_type: str, bits: int | None) -> None:
    """Note axolotl's fused LoRA kernels, which it turns on by itself unless a key names one."""
    by_default = not (
        any(name in keys for name in LORA_KERNELS)
        or keys.value("rl")
        or keys.value("trust_remote_code")
        or (adapter_type == "lora" and bits == 8)
    )
    if by_default:
        keys.not_modelled |= dict.fromkeys(LORA_KERNELS, f"on by default; a fused LoRA kernel {LESS}")


def _liger(keys: Keys) -> dict[str, Any]:
    """The trainer's arguments for the parts of the model that Liger replaces."""
    listed = OF_PLUGINS["liger_rope"] in str(keys.get("plugins") or "")
    chosen = {key: bool(keys.get(key)) for key in LIGER}
    if not listed:
        why = f"axolotl leaves it out unless plugins has {OF_PLUGINS['liger_rope']}"
        keys.not_modelled |= dict.fromkeys((key for key, on in chosen.items() if on), why)
        return {}
    if not any(chosen.values()):
        return {}
    if not has_liger():
        keys.not_modelled |= dict.fromkeys((key for key, on in chosen.items() if on), NO_LIGER)
        return {}
    options = {option: False for each in LIGER.values() for option in each}
    options |= {option: True for key, on in chosen.items() if on for option in LIGER[key]}
    return {"use_liger_kernel": True, "liger_kernel_config": options}


def _of_trainer(keys: Keys) -> dict[str, Any]:
    """Further arguments of the trainer."""
    found = {name: keys.get(name) for name in OF_TRAINER if name in keys}
    if "noisy_embedding_alpha" in keys:  # its former name
        found["neftune_noise_alpha"] = keys.get("noisy_embedding_alpha")
    options = keys.get("optim_args")
    if options:
        as_text = (
            ",".join(f"{name}={value}" for name, value in options.items()) if isinstance(options, dict) else options
        )
        found["optim_args"] = str(as_text)
    return found


def _plugins(keys: Keys) -> None:
    """Note plugins that the plan does not follow."""
    given = keys.get("plugins") or []
    listed = [given] if isinstance(given, str) else given
    others = [str(each) for each in listed if not any(f".{name}." in str(each) for name in PLUGINS)]
    if others:
        keys.not_modelled["plugins"] = f"the changes of these are not planned: {', '.join(others)}"


def _loss(keys: Keys) -> tuple[str, bool]:
    """The loss, and whether it is cut cross-entropy, for which axolotl casts norms and embeddings to 16 bit."""
    plugins = str(keys.get("plugins") or "")
    if "cut_cross_entropy" in plugins and keys.get(CUT, True) is not False:
        if not has_cut_cross_entropy():
            keys.not_modelled[CUT] = f"{IN_CHUNKS}; as itself where cut-cross-entropy is installed"
        return "cce", True
    for name in FUSED_LOSSES:
        if not keys.get(name):
            continue
        if name in OF_PLUGINS and OF_PLUGINS[name] not in plugins:
            keys.not_modelled[name] = f"axolotl leaves it out unless plugins has {OF_PLUGINS[name]}"
        elif not (name in LIGER and has_liger()):
            keys.not_modelled[name] = IN_CHUNKS
            return "chunked", False
    return "full", False


def _attention(keys: Keys) -> tuple[str | None, bool]:
    """The attention to plan, and whether axolotl casts norms and embeddings to 16 bit for the given one."""
    given = keys.get("attn_implementation")
    names = {"flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager"}
    others = ("xformers_attention", "flex_attention", "s2_attention", "sage_attention")
    for key in (*names, *others):
        if keys.get(key):
            given = given or names.get(key, key)
    keys.refuse(dict.fromkeys(others, "another attention is planned as sdpa"))
    is_cast = given not in (None, "sdpa", "eager", "s2_attention")
    given = attention_name(given)
    if given in (None, "sdpa", "eager", "flash_attention_2"):
        return (None if given is None else str(given)), is_cast
    if "attn_implementation" in keys:
        keys.not_modelled["attn_implementation"] = f"{given} is planned as sdpa"
    return None, is_cast
