"""What TRL, axolotl and LLaMA-Factory make of a recipe, by their own functions, for the planner to match.

For every case: the data type of each parameter and buffer, and whether it is trained, after the tool has loaded a small
model and prepared it for training; and the arguments of its trainer. Runs in an environment of the tool's own
(`nox -s tools`), since each pins other versions of transformers and PEFT:

    python make_answers.py TOOL FOLDER             write TOOL.json into FOLDER (TOOL: trl, axolotl or llama-factory)
    python make_answers.py TOOL FOLDER --check     compute it anew and compare with the one in FOLDER

Needs no GPU. Where a tool asks whether the GPU computes in bfloat16, the answer is yes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import sys
import tempfile
import traceback
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

SIZES = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "torch_dtype": "bfloat16", "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    # A checkpoint in float32.
    "llama-float32": {
        **SIZES, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32",
    },
    # Biases in the attention, norms of queries' kind aside, and tied embeddings.
    "qwen2": {**SIZES, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    # Experts in one tensor, with a router that is called gate; norms of queries and keys.
    "qwen3-moe": {
        **SIZES, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 16, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1,
    },
}  # fmt: skip

Recipe = dict[str, Any]
PLUGIN = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"


def _trl_cases() -> dict[str, tuple[str, Recipe]]:
    cases: dict[str, tuple[str, Recipe]] = {}
    methods: dict[str, Recipe] = {
        "full": {},
        "lora": {"use_peft": True},
        "qlora": {"use_peft": True, "load_in_4bit": True},
    }
    precisions: dict[str, Recipe] = {
        "default": {},
        "no": {"bf16": False},
        "fp16": {"bf16": False, "fp16": True},
        "bf16-weights": {"dtype": "bfloat16"},
        "auto-weights": {"dtype": "auto"},
    }
    for method, given in methods.items():
        for precision, values in precisions.items():
            cases[f"{method}/{precision}"] = ("llama", {**given, **values})
    lora = methods["lora"]
    return cases | {
        "qlora/nested-fp4": ("llama", {**methods["qlora"], "use_bnb_nested_quant": True, "bnb_4bit_quant_type": "fp4"}),
        "lora/8bit": ("llama", {**lora, "load_in_8bit": True}),
        "lora/all-linear": ("llama", {**lora, "lora_target_modules": ["all-linear"], "lora_r": 8, "use_dora": True}),
        "qlora/dora": ("llama", {**methods["qlora"], "use_dora": True}),
        "lora/saved-modules": ("llama", {**lora, "lora_modules_to_save": ["lm_head"], "dtype": "bfloat16"}),
        "lora/no-checkpointing": ("llama", {**lora, "gradient_checkpointing": False, "optim": "adamw_bnb_8bit"}),
        "lora/reentrant": ("llama", {**lora, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        "lora/auto-float32": ("llama-float32", {**lora, "dtype": "auto"}),
        "qlora/qwen2": ("qwen2", methods["qlora"]),
        "qlora/qwen2-bf16": ("qwen2", {**methods["qlora"], "dtype": "bfloat16"}),
        "lora/qwen3-moe": ("qwen3-moe", {**lora, "lora_target_modules": ["q_proj", "v_proj"]}),
    }  # fmt: skip


def _axolotl_cases() -> dict[str, tuple[str, Recipe]]:
    lora = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
    qlora = {**lora, "adapter": "qlora", "load_in_4bit": True}
    methods: dict[str, Recipe] = {"full": {}, "lora": lora, "qlora": qlora}
    precisions: dict[str, Recipe] = {
        "default": {},
        "bf16": {"bf16": True},
        "fp16": {"bf16": False, "fp16": True},
        "fp16-alone": {"fp16": True},
        "float32": {"bf16": False, "fp16": False},
        "bfloat16": {"bf16": False, "bfloat16": True},
        "float16": {"bf16": False, "float16": True},
    }
    cases: dict[str, tuple[str, Recipe]] = {}
    for method, given in methods.items():
        for precision, values in precisions.items():
            cases[f"{method}/{precision}"] = ("llama", {**given, **values})
    checkpointing = {"gradient_checkpointing": True}
    flash = {"attn_implementation": "flash_attention_2"}
    return cases | {
        "full/bf16-full": ("llama", {"bf16": "full"}),
        "full/flash": ("llama", flash),
        "full/flash-old-name": ("llama", {"flash_attention": True}),
        "full/sdpa": ("llama", {"attn_implementation": "sdpa"}),
        "full/cut-cross-entropy": ("llama", {"cut_cross_entropy": True, "bf16": True, "plugins": [PLUGIN]}),
        "full/plugin-alone": ("llama", {"bf16": True, "plugins": [PLUGIN]}),
        "full/no-plugin": ("llama", {"cut_cross_entropy": True}),
        "full/empty-precision": ("llama", {"bf16": None}),
        "qlora/kernels-off": ("llama", {**qlora, "lora_mlp_kernel": False}),
        "lora/remote-code": ("llama", {**lora, "trust_remote_code": True}),
        "full/qwen2": ("qwen2", {}),
        "full/qwen3-moe": ("qwen3-moe", {}),
        "full/unfrozen": ("llama", {"unfrozen_parameters": ["model.layers.2.", "^lm_head.weight$"], **checkpointing}),
        "full/unfrozen-attention": ("llama", {"unfrozen_parameters": ["layers.[12].self_attn"], **flash}),
        "lora/8bit": ("llama", {**lora, "load_in_8bit": True}),
        "lora/8bit-float32": ("llama", {**lora, "load_in_8bit": True, "bf16": False, "fp16": False}),
        "lora/4bit": ("llama", {**lora, "load_in_4bit": True}),
        "lora/targets": (
            "llama", {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"],
                      "lora_modules_to_save": ["embed_tokens", "lm_head"], "lora_dropout": 0.05}),
        "lora/dora": ("llama", {**lora, "peft_use_dora": True, "peft_use_rslora": True}),
        "lora/layers": ("llama", {**lora, "peft_layers_to_transform": [0, 2]}),
        "lora/16bit-adapters": ("llama", {**lora, "peft_autocast_adapter_dtype": False}),
        "lora/patterns": ("llama", {**lora, "lora_rank_pattern": {"q_proj": 2}, "lora_alpha_pattern": {"q_proj": 4}}),
        "lora/checkpointing": ("llama", {**lora, **checkpointing}),
        "lora/not-reentrant": (
            "llama", {**lora, **checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}}),
        "lora/qwen2": ("qwen2", lora),
        "lora/qwen3-moe": ("qwen3-moe", lora),
        "lora/kernels-off": (
            "llama", {**lora, "lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}),
        "lora/unfrozen": ("llama", {**lora, "unfrozen_parameters": ["lora_", "embed_tokens"]}),
        "qlora/checkpointing": ("llama", {**qlora, **checkpointing}),
        "qlora/skip-upcast": ("llama", {**qlora, "embeddings_skip_upcast": True}),
        "qlora/single-quant": ("llama", {**qlora, "bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}}),
        "qlora/qwen2": ("qwen2", qlora),
        "qlora/qwen3-moe": ("qwen3-moe", qlora),
        "full/settings": (
            "llama", {"micro_batch_size": 3, "gradient_accumulation_steps": 2, "sequence_len": 64,
                      "optimizer": "paged_adamw_8bit", "max_grad_norm": 0.5, **checkpointing}),
        "full/no-clipping": ("llama", {"max_grad_norm": 0.0}),
    }  # fmt: skip


def _llama_factory_cases() -> dict[str, tuple[str, Recipe]]:
    lora = {"finetuning_type": "lora"}
    methods: dict[str, Recipe] = {
        "full": {"finetuning_type": "full"},
        "lora": lora,
        "qlora": {**lora, "quantization_bit": 4},
        "freeze": {"finetuning_type": "freeze"},
        "oft": {"finetuning_type": "oft"},
    }
    precisions: dict[str, Recipe] = {
        "no": {},
        "bf16": {"bf16": True},
        "fp16": {"fp16": True},
        "pure": {"pure_bf16": True},
        "pure-and-bf16": {"pure_bf16": True, "bf16": True},
        "norms": {"bf16": True, "upcast_layernorm": True},
        "pure-norms": {"pure_bf16": True, "upcast_layernorm": True},
    }
    cases: dict[str, tuple[str, Recipe]] = {}
    for method, given in methods.items():
        for precision, values in precisions.items():
            cases[f"{method}/{precision}"] = ("llama", {**given, **values})
    bf16 = {"bf16": True}
    freeze = methods["freeze"]
    return cases | {
        "default": ("llama", {}),
        "full/float32-checkpoint": ("llama-float32", {**methods["full"], **bf16}),
        "full/float32-pure": ("llama-float32", {**methods["full"], "pure_bf16": True}),
        "lora/float32-checkpoint": ("llama-float32", {**lora, **bf16}),
        "qlora/float32-checkpoint": ("llama-float32", {**methods["qlora"], **bf16}),
        "qlora/8bit": ("llama", {**lora, **bf16, "quantization_bit": 8}),
        "qlora/fp4": ("llama", {**methods["qlora"], **bf16, "quantization_type": "fp4", "double_quantization": False}),
        "qlora/qwen2": ("qwen2", {**methods["qlora"], **bf16, "upcast_layernorm": True}),
        "qlora/qwen3-moe": ("qwen3-moe", {**methods["qlora"], **bf16, "upcast_layernorm": True}),
        "lora/targets": ("llama", {**lora, **bf16, "lora_target": "q_proj,v_proj", "additional_target": "lm_head"}),
        "lora/dora": ("llama", {**lora, **bf16, "use_dora": True, "use_rslora": True, "lora_rank": 4}),
        "lora/pure-saved": ("llama", {**lora, "pure_bf16": True, "additional_target": "embed_tokens,lm_head"}),
        "lora/no-checkpointing": ("llama", {**lora, **bf16, "disable_gradient_checkpointing": True}),
        "lora/not-reentrant": ("llama", {**lora, **bf16, "use_reentrant_gc": False}),
        "lora/eager": ("llama", {**lora, **bf16, "flash_attn": "disabled"}),
        "lora/settings": (
            "llama", {**lora, **bf16, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2,
                      "cutoff_len": 64, "optim": "adamw_8bit", "max_grad_norm": 0.5}),
        "lora/qwen3-moe": ("qwen3-moe", {**lora, **bf16}),
        "lora/pissa": ("llama", {**lora, **bf16, "pissa_init": True}),
        "lora/pretraining": ("llama", {**lora, **bf16, "stage": "pt"}),
        "freeze/last": ("llama", {**freeze, **bf16, "freeze_trainable_layers": 1}),
        "freeze/first": ("llama", {**freeze, **bf16, "freeze_trainable_layers": -1}),
        "freeze/modules": (
            "llama", {**freeze, **bf16, "freeze_trainable_modules": "self_attn,input_layernorm",
                      "freeze_extra_modules": "embed_tokens,norm"}),
        "freeze/qwen2": ("qwen2", {**freeze, **bf16, "freeze_trainable_layers": 1,
                                   "freeze_extra_modules": "embed_tokens"}),
        "freeze/not-checkpointed": ("llama", {**freeze, **bf16, "disable_gradient_checkpointing": True}),
        "oft/settings": ("llama", {**methods["oft"], **bf16, "oft_block_size": 16, "lora_target": "q_proj,v_proj"}),
        "oft/rank": ("llama", {**methods["oft"], **bf16, "oft_rank": 4, "oft_block_size": 0,
                               "lora_target": "q_proj", "additional_target": "lm_head"}),
        "oft/nf4": ("llama", {**methods["oft"], **bf16, "quantization_bit": 4}),
    }  # fmt: skip


CASES = {"trl": _trl_cases, "axolotl": _axolotl_cases, "llama-factory": _llama_factory_cases}
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
PACKAGES = {"trl": "trl", "axolotl": "axolotl", "llama-factory": "llamafactory"}


# The models -----------------------------------------------------------------------------------------------------------


def save_models(folder: Path) -> dict[str, Path]:
    """Each of `MODELS` with random weights in the data type of its config, and a tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, 256)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w3")),
        bos_token="<s>", eos_token="</s>", pad_token="<pad>",
    )  # fmt: skip
    found = {}
    for name, config in MODELS.items():
        found[name] = folder / name
        found[name].mkdir()
        (found[name] / "config.json").write_text(json.dumps(config))
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(found[name]))
        made.to(getattr(torch, config["torch_dtype"])).save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


# What is read from a prepared model -----------------------------------------------------------------------------------


def layers_of(model: Any) -> dict[str, str]:
    """Every parameter and buffer by name: its data type or 4-bit format, and a star if it is trained. The names of
    layers that agree have ``*`` for their number."""
    found = {name: f"{_format(each)}{' *' if each.requires_grad else ''}" for name, each in model.named_parameters()}
    found |= {f"buffer {name}": _format(each) for name, each in model.named_buffers() if not _is_constant(name)}
    return folded(found)


def _is_constant(name: str) -> bool:
    """Whether the buffer is part of a quantized weight, which bitsandbytes registers by its state."""
    return any(part in name for part in ("absmax", "quant_map", "quant_state", "nested_"))


def _format(tensor: Any) -> str:
    if hasattr(tensor, "quant_type"):
        return f"{tensor.quant_type}{' nested' if tensor.compress_statistics else ''}"
    return str(tensor.dtype).removeprefix("torch.")


def folded(found: dict[str, str]) -> dict[str, str]:
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, value in found.items():
        groups[re.sub(r"\blayers\.\d+\.", "layers.*.", name)].append((name, value))
    folded: dict[str, str] = {}
    for pattern, members in groups.items():
        same = len({value for _, value in members}) == 1 and len(members) > 1
        folded |= {pattern: f"{members[0][1]} ×{len(members)}"} if same else dict(members)
    return dict(sorted(folded.items()))


def compute_of(model: Any) -> list[str]:
    """The data types that 4-bit layers compute in."""
    kinds = [module for module in model.modules() if hasattr(getattr(module, "weight", None), "quant_type")]
    found = {str(module.compute_dtype) for module in kinds if hasattr(module, "compute_dtype")}
    return sorted(each.removeprefix("torch.") for each in found)


def checkpointing_of(model: Any) -> dict[str, Any]:
    """Whether the model's blocks are checkpointed once training has begun, and how: from the function they call."""
    functions = [
        module._gradient_checkpointing_func
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func")
    ]
    if not functions:
        return {"grad_checkpointing": False, "reentrant": None}
    function = functions[0]
    function = getattr(function, "__wrapped__", function)
    return {"grad_checkpointing": True, "reentrant": function.keywords.get("use_reentrant")}


def settings_of(arguments: Any) -> dict[str, Any]:
    """The arguments of a trainer on which memory depends."""
    return {
        "batch": arguments.per_device_train_batch_size,
        "grad_accumulation": arguments.gradient_accumulation_steps,
        "optim": str(getattr(arguments.optim, "value", arguments.optim)),
        "max_grad_norm": arguments.max_grad_norm,
        "autocast": "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "no",
    }


# The tools ------------------------------------------------------------------------------------------------------------


def answer_of_trl(model: Path, recipe: Recipe) -> dict[str, Any]:
    """As `trl.scripts.sft.main` does."""
    from datasets import Dataset
    from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

    given = {"model_name_or_path": str(model), "output_dir": str(model.parent / "out"), "report_to": [], **recipe}
    parser = TrlParser([SFTConfig, ModelConfig])  # type: ignore[list-item]
    settings, of_model = parser.parse_dict({**given, "use_cpu": True})
    settings.model_init_kwargs = {"attn_implementation": of_model.attn_implementation, "dtype": of_model.dtype}
    data = Dataset.from_dict({"input_ids": [[3, 4, 5, 2]] * 8})
    trainer = SFTTrainer(
        model=str(model), args=settings, train_dataset=data, quantization_config=get_quantization_config(of_model),
        peft_config=get_peft_config(of_model),
    )  # fmt: skip
    found = trainer.model
    if settings.gradient_checkpointing:  # Trainer turns it on as training begins
        found.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings.gradient_checkpointing_kwargs)
    return {
        "seq": settings.max_length,
        "settings": settings_of(settings),
        "checkpointing": checkpointing_of(found),
        "compute": compute_of(found),
        "weights": layers_of(found),
    }


def answer_of_axolotl(model: Path, recipe: Recipe) -> dict[str, Any]:
    """As `axolotl.train` does: `validate_config`, `normalize_config`, `ModelLoader.load`, `freeze_layers_except`, and
    the arguments of its trainer's builder."""
    import axolotl.utils.config as configs
    import torch
    import transformers
    from axolotl.core.builders.causal import HFCausalTrainerBuilder
    from axolotl.core.training_args import AxolotlTrainingArguments
    from axolotl.loaders.model import ModelLoader
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.freeze import freeze_layers_except

    given = {
        "base_model": str(model), "datasets": [{"path": "none", "type": "alpaca"}], "learning_rate": 1e-4,
        "output_dir": str(model.parent / "out"), **recipe,
    }  # fmt: skip
    given.setdefault("num_epochs", 1)
    device = {
        "bf16": True, "tf32": True, "fp8": False, "n_gpu": 1, "n_node": 1, "compute_capability": "sm_90",
    }  # fmt: skip
    versions = {"torch_version": str(torch.__version__).partition("+")[0]}
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(configs, "is_torch_bf16_gpu_available", lambda: True))
        asked = DictDefault(given)
        configs.prepare_plugins(asked)
        cfg = configs.validate_config(asked, capabilities=device, env_capabilities=versions)
        configs.normalize_config(cfg)
        kernels = [
            name for name in cfg if str(name).startswith("lora_") and str(name).endswith("_kernel") and cfg[name]
        ]
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        cfg.device_map = "cpu"
        loader = ModelLoader(cfg, tokenizer)
        loader.patch_manager = _NoPatches()
        stack.enter_context(patch("axolotl.loaders.model.PLUGIN_MANAGER", _NoPatches()))
        if str(cfg.attn_implementation).startswith("flash"):
            loader._set_attention_config = lambda: None
        found, _ = loader.load()
        if cfg.unfrozen_parameters:
            freeze_layers_except(found, cfg.unfrozen_parameters)
        arguments, _ = HFCausalTrainerBuilder(cfg, found, tokenizer)._set_base_training_args(4)
        wanted = {
            "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "max_grad_norm", "bf16", "fp16",
            "gradient_checkpointing", "gradient_checkpointing_kwargs", "output_dir",
        }  # fmt: skip
        settings = AxolotlTrainingArguments(
            **{name: value for name, value in arguments.items() if name in wanted}, use_cpu=True, report_to=[]
        )
    if settings.gradient_checkpointing:  # Trainer turns it on as training begins
        found.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings.gradient_checkpointing_kwargs)
    return {
        "seq": cfg.sequence_len,
        "settings": settings_of(settings),
        "checkpointing": checkpointing_of(found),
        "kernels": sorted(kernels),
        "compute": compute_of(found),
        "weights": layers_of(found),
    }


class _NoPatches:
    """axolotl's patches of attention and losses, left out: they need a GPU's kernels, and change no weight."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def answer_of_llama_factory(model: Path, recipe: Recipe) -> dict[str, Any]:
    """As `llamafactory.train.sft.workflow.run_sft` does: `get_train_args`, `load_tokenizer`, `load_model`."""
    import llamafactory.extras.misc as misc
    import llamafactory.hparams.parser as parser
    from llamafactory.model import load_model, load_tokenizer
    from transformers.training_args import ParallelMode

    given = {
        "model_name_or_path": str(model), "output_dir": str(model.parent / "out"), "template": "default",
        "dataset": "identity", "do_train": True, "report_to": "none", "use_cpu": True, **recipe,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(parser, "is_torch_bf16_gpu_available", lambda: True))
        stack.enter_context(patch.multiple(misc, _is_bf16_available=True, _is_fp16_available=True))
        # It is launched by torchrun, also on one GPU.
        stack.enter_context(patch.object(parser.TrainingArguments, "parallel_mode", ParallelMode.DISTRIBUTED))
        of_model, of_data, settings, of_tuning, _ = parser.get_train_args(given)
        tokenizer = load_tokenizer(of_model)["tokenizer"]
        found = load_model(tokenizer, of_model, of_tuning, is_trainable=True, add_valuehead=False)
    return {
        "seq": of_data.cutoff_len,
        "packing": of_data.packing,
        "settings": settings_of(settings),
        "checkpointing": checkpointing_of(found),
        "compute": compute_of(found),
        "weights": layers_of(found),
    }


ANSWERS = {"trl": answer_of_trl, "axolotl": answer_of_axolotl, "llama-factory": answer_of_llama_factory}


def answers(tool: str, only: str = "") -> dict[str, Any]:
    """The answer to every case of ``tool``, or the error that it ends in."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = save_models(Path(folder))
        for name, (model, recipe) in CASES[tool]().items():
            if only not in name:
                continue
            try:
                answer = ANSWERS[tool](models[model], recipe)
            except Exception as error:
                if os.environ.get("TRACE"):
                    traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {str(error).strip()[:200]}"}
            found[name] = {"model": model, "recipe": recipe, **answer}
    return {
        "tool": tool,
        "versions": {each: importlib.metadata.version(each) for each in (PACKAGES[tool], *LIBRARIES)},
        "models": MODELS,
        "cases": found,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=CASES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    asked = parser.parse_args()
    file = asked.folder / f"{asked.tool}.json"
    found = answers(asked.tool, asked.only)
    if not asked.check:
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return 0
    stored = json.loads(file.read_text(encoding="utf-8"))["cases"]
    differ = [name for name in found["cases"] if found["cases"][name] != stored.get(name)]
    print(f"{asked.tool}: {len(found['cases'])} cases, {len(differ)} differ from {file}", *differ, sep="\n")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
