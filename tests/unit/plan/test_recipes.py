"""Recipes: each tool's own defaults and casts, and every key in one of three groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.version import Version

from peft_gauge.commands.plan_step import base_of, described_step
from peft_gauge.errors import GaugeError
from peft_gauge.plan.recipes import STORED, Recipe, read
from peft_gauge.plan.record import PlanRequest
from peft_gauge.training import methods, models
from peft_gauge.training.settings import StepSettings

# Imports trainers: seconds, which are too long for the unit tests.
pytestmark = pytest.mark.integration

TRL = {"model_name_or_path": "meta-llama/Llama-3.2-3B", "dataset_name": "trl-lib/Capybara", "use_peft": True}
AXOLOTL = {
    "base_model": "NousResearch/Llama-2-7b-hf", "adapter": "qlora", "load_in_4bit": True, "lora_r": 32,
    "lora_alpha": 16, "lora_target_linear": True, "datasets": [{"path": "mine", "type": "alpaca"}],
}  # fmt: skip
LLAMA_FACTORY = {
    "model_name_or_path": "meta-llama/Llama-2-7b-hf", "stage": "sft", "finetuning_type": "lora", "template": "llama2",
    "quantization_bit": 4, "bf16": True, "dataset": "identity",
}  # fmt: skip

FREEZE = {"model_name_or_path": "toy-llama", "stage": "sft", "finetuning_type": "freeze", "template": "llama2"}
CUT = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"

DEFAULT_OPTIMIZER = "adamw-fused" if Version(torch.__version__) >= Version("2.8") else "adamw"
"""Trainer's, by its version of torch."""


def recipe(tmp_path: Path, content: dict[str, Any], **changes: Any) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return read(path, changes)


def step_of(found: Recipe) -> dict[str, Any]:
    return described_step({}, found, {})


# The tools' defaults --------------------------------------------------------------------------------------------------


def test_trl_by_its_defaults(tmp_path: Path) -> None:
    """TRL 1.16: float32 weights, bf16 autocast, checkpointing, fused AdamW, clipping to 1, 8 rows of 1024 tokens."""
    found = recipe(tmp_path, TRL)
    step = step_of(found)
    assert (found.tool, step["loop"], step["dtype"]) == ("TRL", "sft", "float32")
    assert step["settings"] == StepSettings(
        8, 1024, learning_rate=2e-5, optimizer=DEFAULT_OPTIMIZER, grad_checkpointing=True, clip_grad_norm=1.0,
        mixed_precision="bf16",
    )  # fmt: skip
    assert found.method is not None
    config = found.method.peft_config
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.05)
    assert "target_modules" not in config  # PEFT's own
    assert found.method.quantization is None
    assert found.without_effect == ("dataset_name",)
    assert not found.unknown


def test_trl_quantizes_without_preparation_and_without_nested_constants(tmp_path: Path) -> None:
    found = recipe(tmp_path, {**TRL, "load_in_4bit": True, "packing": True, "lora_target_modules": "q_proj v_proj"})
    assert found.method is not None
    assert found.method.quantization == methods.Quantization("nf4", double_quant=False)
    assert not found.method.prepare_kbit
    assert found.method.peft_config["target_modules"] == ["q_proj", "v_proj"]
    assert found.arguments == {"packing": True}


def test_axolotl_by_its_defaults(tmp_path: Path) -> None:
    """axolotl 0.19: one row of 512 tokens, bf16 autocast, fused AdamW, clipping to 1, no checkpointing, dropout 0."""
    found = recipe(tmp_path, AXOLOTL)
    step = step_of(found)
    assert (found.tool, step["loop"], step["dtype"], step["loss"]) == ("axolotl", "trainer", "bfloat16", "full")
    settings = step["settings"]
    assert (settings.batch, settings.seq, settings.grad_accumulation) == (1, 512, 1)
    assert (settings.optimizer, settings.clip_grad_norm) == (DEFAULT_OPTIMIZER, 1.0)
    assert (settings.mixed_precision, settings.grad_checkpointing) == ("bf16", False)
    assert found.method is not None
    config = found.method.peft_config
    assert (config["r"], config["lora_dropout"], config["target_modules"]) == (32, 0.0, (methods.LINEAR_LAYERS,))
    # It prepares for k-bit training, and casts norms and embeddings back.
    assert (found.method.quantization, found.method.prepare_kbit) == (methods.Quantization("nf4", True), True)
    assert found.method.casts[-2:] != ()
    assert all(each.dtype == "bfloat16" for each in found.method.casts[-2:])


@pytest.mark.parametrize(
    ("given", "precision", "dtype"),
    [
        ({"bf16": "auto"}, "bf16", "bfloat16"),
        ({"bf16": True}, "bf16", "bfloat16"),
        ({"fp16": True}, "fp16", "float16"),
        ({"bf16": False, "fp16": False}, "no", "float32"),
        ({"bf16": False, "bfloat16": True}, "bf16", "bfloat16"),
    ],
)
def test_axolotls_weights_follow_its_precision(
    tmp_path: Path, given: dict[str, Any], precision: str, dtype: str
) -> None:
    step = step_of(recipe(tmp_path, {"base_model": "x/y", **given}))
    assert (step["settings"].mixed_precision, step["dtype"]) == (precision, dtype)


def test_axolotls_checkpointing_is_reentrant_unless_told_otherwise(tmp_path: Path) -> None:
    asked = {**AXOLOTL, "gradient_checkpointing": True}
    assert recipe(tmp_path, asked).reentrant is True
    assert recipe(tmp_path, {**asked, "gradient_checkpointing_kwargs": {"use_reentrant": False}}).reentrant is False
    assert recipe(tmp_path, AXOLOTL).reentrant is None


def test_llama_factory_by_its_defaults(tmp_path: Path) -> None:
    """LLaMA-Factory 0.9: 8 rows of 2048 tokens, reentrant checkpointing, r 8 on all linear layers, nested constants."""
    found = recipe(tmp_path, LLAMA_FACTORY)
    step = step_of(found)
    assert (found.tool, step["loop"], step["dtype"]) == ("LLaMA-Factory", "trainer", STORED)
    settings = step["settings"]
    assert (settings.batch, settings.seq, settings.optimizer) == (8, 2048, "adamw-fused")
    assert (settings.clip_grad_norm, settings.mixed_precision) == (1.0, "bf16")
    assert (settings.grad_checkpointing, step["checkpoint_reentrant"]) == (True, True)
    assert found.method is not None
    config = found.method.peft_config
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.0)
    assert config["target_modules"] == (methods.LINEAR_LAYERS,)
    assert found.method.quantization == methods.Quantization("nf4", True, "bfloat16")
    assert not found.method.prepare_kbit
    assert (found.method.autocast_adapter_dtype, found.method.trained_in_float32) == (True, True)


def test_llama_factory_without_mixed_precision(tmp_path: Path) -> None:
    plain = {**LLAMA_FACTORY, "bf16": False}
    assert step_of(recipe(tmp_path, plain))["settings"].mixed_precision == "no"
    pure = recipe(tmp_path, {**plain, "pure_bf16": True})
    assert step_of(pure)["settings"].mixed_precision == "no"
    assert pure.method is not None
    # Adapters stay in float32, as PEFT makes them; other trained modules do not.
    assert (pure.method.autocast_adapter_dtype, pure.method.trained_in_float32) == (True, False)
    # Full fine-tuning casts what it trains to float32, unless it is pure.
    full = {key: value for key, value in LLAMA_FACTORY.items() if key != "quantization_bit"} | {
        "finetuning_type": "full"
    }
    for changes, in_float32 in (({}, True), ({"pure_bf16": True}, False)):
        found = recipe(tmp_path, {**full, **changes})
        assert found.method is not None
        assert (found.dtype, found.method.trained_in_float32) == (STORED, in_float32)


def test_training_arguments_alone_leave_base_and_method_to_the_options(tmp_path: Path) -> None:
    path = tmp_path / "arguments.json"
    path.write_text(json.dumps({"per_device_train_batch_size": 2, "bf16": True, "optim": "lion_8bit", "seed": 3}))
    found = read(path, {})
    step = described_step({"seq": 64, "method": ["lora"]}, found, {})
    assert (found.tool, found.model, found.method) == ("TrainingArguments", None, None)
    assert (step["settings"].batch, step["settings"].seq, step["settings"].optimizer) == (2, 64, "lion_8bit")
    assert found.without_effect == ("seed",)
    path.write_text(json.dumps({"per_device_train_batch_size": 2, "packing": True}))
    assert read(path, {}).loop == "sft"


def test_a_saved_adapter_is_a_recipe(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "tinyllama"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = read(tmp_path, {})
    assert (found.tool, found.model, found.loop) == ("PEFT", "tinyllama", "plain")
    assert described_step({"batch": 2}, found, {})["settings"] == StepSettings(2, 768)


# Keys -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [TRL, AXOLOTL, LLAMA_FACTORY], ids=["trl", "axolotl", "llama-factory"])
def test_every_key_is_in_one_group(tmp_path: Path, content: dict[str, Any]) -> None:
    asked = {**content, "learning_rate": 1e-4, "deepspeed": "zero2.json", "wieght_decay": 0.1}
    found = recipe(tmp_path, asked)
    groups = [set(found.understood), set(found.without_effect), set(found.not_modelled)]
    of_defaults = {*found.not_modelled} - {*asked}  # axolotl's kernels, which are on by themselves
    assert all(name.endswith("_kernel") for name in of_defaults)
    assert set().union(*groups) - of_defaults == asked.keys() - {"wieght_decay"}
    assert sum(map(len, groups)) - len(of_defaults) == len(asked) - 1
    assert found.unknown == ("'wieght_decay' (did you mean weight_decay?)",)
    assert "deepspeed" in found.not_modelled
    assert "learning_rate" in found.without_effect


def test_a_switched_off_key_needs_no_model(tmp_path: Path) -> None:
    found = recipe(tmp_path, {**AXOLOTL, "deepspeed": None, "torch_compile": False, "lora_mlp_kernel": False})
    assert not found.not_modelled
    assert "torch_compile" in found.without_effect


def test_a_fused_loss_is_planned_in_chunks(tmp_path: Path) -> None:
    found = recipe(tmp_path, {**AXOLOTL, "chunked_cross_entropy": True})
    assert step_of(found)["loss"] == "chunked"
    assert "chunked_cross_entropy" in found.not_modelled


CUT_PLUGIN = {"plugins": [CUT]}


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize(
    ("keys", "loss"),
    [
        ({"cut_cross_entropy": True, **CUT_PLUGIN}, "cce"),
        (CUT_PLUGIN, "cce"),
        ({**CUT_PLUGIN, "cut_cross_entropy": False}, "full"),
        ({"plugins": ["axolotl.integrations.liger.LigerPlugin"]}, "full"),
    ],
)
def test_cut_cross_entropy_is_a_plugin_of_axolotl(
    keys: dict[str, object], loss: str, installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_gauge.plan.recipes.axolotl.has_cut_cross_entropy", lambda: installed)
    found = recipe(tmp_path, {**AXOLOTL, **keys})
    assert step_of(found)["loss"] == loss
    assert ("cut_cross_entropy" in found.not_modelled) == (loss == "cce" and not installed)
    assert not found.unknown


@pytest.mark.parametrize("key", ["cut_cross_entropy", "liger_fused_linear_cross_entropy", "liger_rope"])
def test_a_key_of_a_plugin_that_is_not_listed_changes_nothing(tmp_path: Path, key: str) -> None:
    found = recipe(tmp_path, {**AXOLOTL, key: True})
    assert step_of(found)["loss"] == "full"
    assert not found.arguments
    assert "axolotl leaves it out unless plugins has" in found.not_modelled[key]


def test_set_changes_one_key(tmp_path: Path) -> None:
    found = recipe(tmp_path, AXOLOTL, micro_batch_size=3, lora_r=8)
    assert step_of(found)["settings"].batch == 3
    assert found.method is not None
    assert found.method.peft_config["r"] == 8


def test_a_hub_id_of_a_known_architecture_needs_no_network(tmp_path: Path) -> None:
    assert base_of(None, recipe(tmp_path, AXOLOTL)) == "llama-2-7b"
    assert base_of("tinyllama", recipe(tmp_path, AXOLOTL)) == "tinyllama"
    assert base_of(None, recipe(tmp_path, {**AXOLOTL, "base_model": "someone/else"})) == "someone/else"


def test_a_recipes_step_is_a_plan_request(tmp_path: Path) -> None:
    found = recipe(tmp_path, LLAMA_FACTORY)
    assert found.method is not None
    asked = PlanRequest(models.resolve("toy-llama"), found.method, **step_of(found))
    assert (asked.loop, asked.checkpoint_reentrant, asked.packed) == ("trainer", True, False)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"base_model": "x/y", "adapter": "qlora", "load_in_4bit": True}, "has no lora_r, which has no default"),
        ({**AXOLOTL, "micro_batch_size": "many"}, "micro_batch_size in the axolotl recipe must be a whole number"),
        ({**AXOLOTL, "load_in_4bit": False}, "needs load_in_4bit"),
        ({**AXOLOTL, "adapter": "llama-adapter"}, "'llama-adapter' cannot be planned"),
        ({"base_model": "x/y", "load_in_4bit": True}, "has no adapter"),
        ({**LLAMA_FACTORY, "stage": "dpo"}, "stage 'dpo' cannot be planned"),
        ({**LLAMA_FACTORY, "finetuning_type": "freeze"}, "quantizes the base and trains it"),
        ({**LLAMA_FACTORY, "finetuning_type": "prefix"}, "finetuning_type 'prefix' cannot be planned"),
        ({**FREEZE, "freeze_trainable_layers": 0}, "must be a whole number other than 0, not 0"),
        ({"base_model": "x/y", "bf16": "full"}, "axolotl refuses bf16: full"),
        ({"base_model": "x/y", "unfrozen_parameters": 3}, "must be a list of patterns, not 3"),
        ({"base_model": "x/y", "unfrozen_parameters": ["("]}, "is not a valid pattern"),
        ({**TRL, "load_in_4bit": True, "dtype": "auto"}, "TRL refuses dtype: auto for a base in 4 bit"),
        ({**LLAMA_FACTORY, "finetuning_type": "full"}, "quantizes the base and trains it"),
        ({**LLAMA_FACTORY, "pure_bf16": "yes"}, "pure_bf16 in the LLaMA-Factory recipe must be true or false"),
        ({**LLAMA_FACTORY, "quantization_method": "hqq"}, "'hqq' cannot be planned"),
        ({**LLAMA_FACTORY, "quantization_bit": 2}, "2 bit cannot be planned"),
        ({"model_name_or_path": "x/y", "load_in_4bit": True}, "add use_peft"),
        ({**TRL, "optim": "adamx"}, "adamx is not a valid OptimizerNames"),
        ({"zero_optimization": {"stage": 3}}, "is a file of DeepSpeed"),
        ({"a": 1}, "is not a recipe"),
    ],
)
def test_what_cannot_be_planned_is_one_line(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(GaugeError, match=message) as caught:
        recipe(tmp_path, content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "- a\n- b", "{", "a: [", "\x00"])
def test_a_file_that_is_no_mapping_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(GaugeError) as caught:
        read(path, {})
    assert "\n" not in str(caught.value)
    with pytest.raises(GaugeError, match="no recipe at"):
        read(tmp_path / "nowhere.yaml", {})


def test_an_option_that_the_recipe_decides_is_refused(tmp_path: Path) -> None:
    found = recipe(tmp_path, AXOLOTL)
    for given in ({"batch": 2}, {"optimizer": "sgd"}, {"method": ["lora"]}, {"dtype": "float32"}, {"loop": "sft"}):
        with pytest.raises(GaugeError, match="is decided by the axolotl recipe; change its key with --set"):
            described_step(given, found, {})


def test_a_recipe_without_a_base_needs_one(tmp_path: Path) -> None:
    with pytest.raises(GaugeError, match="names no base model; add --model"):
        base_of(None, recipe(tmp_path, {**LLAMA_FACTORY, "model_name_or_path": None}))
    with pytest.raises(GaugeError, match="--model, or a config file with --recipe"):
        base_of(None, None)


LIGER_KEYS = [
    (
        "axolotl",
        "base_model: m\nadapter: lora\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\nliger_rope: true\n"
        "liger_fused_linear_cross_entropy: true\nplugins: [axolotl.integrations.liger.LigerPlugin]\n",
        {"rope": True, "rms_norm": False, "swiglu": False, "fused_linear_cross_entropy": True},
    ),
    ("LLaMA-Factory", "model_name_or_path: m\nstage: sft\nfinetuning_type: lora\nenable_liger_kernel: true\n", {}),
    ("TRL", "model_name_or_path: m\ndataset_name: d\nuse_peft: true\nuse_liger_kernel: true\n", {}),
]


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize(("tool", "text", "options"), LIGER_KEYS, ids=[tool for tool, _, _ in LIGER_KEYS])
def test_liger_is_planned_where_it_is_installed(
    tool: str, text: str, options: dict[str, bool], installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("trl", "axolotl", "llama_factory"):
        monkeypatch.setattr(f"peft_gauge.plan.recipes.{name}.has_liger", lambda: installed)
    file = tmp_path / "recipe.yml"
    file.write_text(text)
    found = read(file, {})
    assert found.tool == tool
    keys = {line.partition(":")[0] for line in text.splitlines() if "liger" in line.partition(":")[0]}
    if installed:
        assert found.arguments["use_liger_kernel"] is True
        assert options.items() <= found.arguments.get("liger_kernel_config", {}).items()
        assert keys <= set(found.understood)
        assert not keys & set(found.not_modelled)
        assert found.loss == "full"
    else:
        assert "use_liger_kernel" not in found.arguments
        assert keys <= set(found.not_modelled)


def test_names_of_plugins_and_of_earlier_releases_are_known(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yml"
    file.write_text(
        "base_model: m\nmodel_type: LlamaForCausalLM\nadapter: lora\nlora_r: 8\nlora_alpha: 16\n"
        "lora_target_linear: true\nuse_swanlab: true\nuse_scattermoe: true\nbse_model_config: x\n"
        "attn_implementation: kernels-community/vllm-flash-attn3\n"
    )
    found = read(file, {})
    assert {"model_type", "use_swanlab"} <= set(found.without_effect)
    assert "use_scattermoe" in found.not_modelled
    assert [name.partition(" ")[0] for name in found.unknown] == ["'bse_model_config'"]
    assert found.attention == "flash_attention_2"


def test_a_misspelt_argument_does_not_change_the_trainer(tmp_path: Path) -> None:
    file = tmp_path / "arguments.json"
    values = {"per_device_train_batch_size": 2, "warmup_ratio": 0.1, "gradient_acumulation_steps": 2}
    file.write_text(json.dumps(values))
    found = read(file, {})
    assert (found.tool, found.loop) == ("TrainingArguments", "trainer")
    assert "warmup_ratio" in found.without_effect
    assert len(found.unknown) == 1
    file.write_text(json.dumps({**values, "max_length": 512}))
    assert read(file, {}).loop == "sft"
