"""Published configs are read as transformers reads them, and planned; or refused with the sentence that is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_gauge._internals import released
from peft_gauge.errors import GaugeError
from peft_gauge.plan import planner
from peft_gauge.plan.record import Plan, PlanRequest
from peft_gauge.training import methods, models
from peft_gauge.training.settings import StepSettings
from tests.support import published_models as published
from tests.support.facts import lacking

# Builds, plans or trains models: seconds, which are too long for the unit tests.
pytestmark = pytest.mark.integration

# Name -> the class that transformers builds, its parameters, its attention, and the positions it has. Counted with
# transformers alone (AutoModelForCausalLM.from_config on meta); most are the counts that the publishers state.
BUILT: dict[str, tuple[str, int, str, int | None]] = {
    "bloom-560m": ("BloomForCausalLM", 559_214_592, "eager", 2048),
    "deepseek-v2-lite": ("DeepseekV2ForCausalLM", 15_706_484_224, "sdpa", 163_840),
    "falcon-7b": ("FalconForCausalLM", 6_921_720_704, "sdpa", 2048),
    "gemma-2-2b": ("Gemma2ForCausalLM", 2_614_341_888, "eager", 8192),
    "gemma-2b": ("GemmaForCausalLM", 2_506_172_416, "sdpa", 8192),
    "gemma-3-4b-it": ("Gemma3ForConditionalGeneration", 4_300_079_472, "sdpa", 131_072),
    "gemma-4-26b-a4b": ("Gemma4ForConditionalGeneration", 25_805_933_872, "sdpa", 262_144),
    "gpt-j-6b": ("GPTJForCausalLM", 6_050_882_784, "sdpa", 2048),
    "gpt-oss-20b": ("GptOssForCausalLM", 20_914_757_184, "eager", 131_072),
    "gpt2": ("GPT2LMHeadModel", 124_439_808, "sdpa", 1024),
    "jamba-tiny": ("JambaForCausalLM", 51_570_323_328, "sdpa", 262_144),
    "llama-2-7b-gptq": ("LlamaForCausalLM", 6_738_415_616, "sdpa", 4096),
    "llama-2-7b-long": ("LlamaForCausalLM", 6_738_415_616, "sdpa", 131_072),
    "llama-3-8b": ("LlamaForCausalLM", 8_030_261_248, "sdpa", 8192),
    "llama-3-8b-bnb-4bit": ("LlamaForCausalLM", 8_030_261_248, "sdpa", 8192),
    "llama-3.1-70b-instruct-fp8": ("LlamaForCausalLM", 70_553_706_496, "sdpa", 131_072),
    "llama-3.2-3b": ("LlamaForCausalLM", 3_212_749_824, "sdpa", 131_072),
    "llama-4-scout-17b-16e-instruct": ("Llama4ForCausalLM", 107_769_861_120, "sdpa", 10_485_760),
    "mamba-130m-hf": ("MambaForCausalLM", 129_135_360, "none", None),
    "minicpm3-4b": ("MiniCPM3ForCausalLM", 4_073_875_968, "sdpa", 32_768),
    "ministral-8b": ("MistralForCausalLM", 8_019_808_256, "sdpa", 32_768),
    "mistral-7b": ("MistralForCausalLM", 7_241_732_096, "sdpa", 32_768),
    "mixtral-8x7b-v0.1": ("MixtralForCausalLM", 46_702_792_704, "sdpa", 32_768),
    "nvidia-nemotron-3-nano-30b-a3b-bf16": ("NemotronHForCausalLM", 31_577_937_344, "sdpa", 262_144),
    "opt-350m": ("OPTForCausalLM", 331_196_416, "sdpa", 2048),
    "phi-2": ("PhiForCausalLM", 2_779_683_840, "sdpa", 2048),
    "phi-3-mini-4k": ("Phi3ForCausalLM", 3_821_079_552, "sdpa", 4096),
    "qwen2.5-1.5b": ("Qwen2ForCausalLM", 1_543_714_304, "sdpa", 32_768),
    "qwen2.5-vl-7b": ("Qwen2_5_VLForConditionalGeneration", 8_292_166_656, "sdpa", 128_000),
    "qwen3-0.6b": ("Qwen3ForCausalLM", 596_049_920, "sdpa", 40_960),
    "qwen3-30b-a3b-fp8": ("Qwen3MoeForCausalLM", 30_532_122_624, "sdpa", 40_960),
    "qwen3.5-27b": ("Qwen3_5ForCausalLM", 26_895_998_464, "sdpa", 262_144),
    "rwkv-4-169m": ("RwkvForCausalLM", 169_342_464, "none", 1024),
}

# Releases before 5 have sdpa for fewer or for other architectures.
# Releases differ in which architectures they have sdpa for; 5.17 has it for Gemma 2, not for GPT-J.
ATTENTION_AS_STATED = released("transformers", "5.24")

REFUSED = {
    "bert-base": r"model_type 'bert' is an encoder \(masked LM\), not a causal LM",
    "chatglm3-6b": r"needs custom code \(auto_map\), which peft-gauge does not run",
    "gemma-4-31b-it-nvfp4": r"'modelopt', for which transformers has no loader \(NVFP4 of NVIDIA's ModelOpt\)",
    "t5-base": "model_type 't5' is an encoder-decoder model; use a decoder-only causal LM",
}


@pytest.fixture(autouse=True)
def known_here(request: pytest.FixtureRequest) -> None:
    """Skips a model that is younger than the installed transformers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    config = {} if name is None else json.loads(published.path(name).read_text())
    if config and config["model_type"] not in CONFIG_MAPPING_NAMES and name != "chatglm3-6b":
        pytest.skip(f"this transformers does not know {config['model_type']}")


def test_every_published_config_is_built_or_refused() -> None:
    assert sorted({*BUILT, *REFUSED}) == published.names()


@pytest.mark.parametrize("name", BUILT)
def test_a_published_config_is_what_transformers_builds(name: str) -> None:
    record = models.resolve(str(published.path(name)))
    model = models.build(record, device="meta", as_stored=False)
    counted = sum(parameter.numel() for parameter in model.parameters())
    kind, parameters, attention, positions = BUILT[name]
    assert (type(model).__name__, counted, record.max_positions) == (kind, parameters, positions)
    has_attention = attention if ATTENTION_AS_STATED or attention == "none" else models.attention(model)
    assert models.attention(model) == has_attention
    assert record.vocab_size == model.get_input_embeddings().weight.shape[0]


@pytest.mark.parametrize("name", REFUSED)
def test_a_published_config_is_refused_for_the_right_reason(name: str) -> None:
    with pytest.raises(GaugeError, match=REFUSED[name]):
        models.resolve(str(published.path(name)))


def test_what_a_config_leaves_out_is_named() -> None:
    (falcon,) = models.remarks(models.resolve(str(published.path("falcon-7b"))))
    assert lacking(falcon, "falcon-7b's config", "FalconConfig's defaults", "max_position_embeddings 2048") == []
    gemma, _ = models.remarks(models.resolve(str(published.path("gemma-3-4b-it"))))
    assert (
        "Gemma3TextConfig's defaults are used: vocab_size 262208, num_attention_heads 8, num_key_value_heads 4" in gemma
    )


@pytest.mark.parametrize("name", ["bloom-560m", "gpt2", "rwkv-4-169m", "mamba-130m-hf", "mistral-7b"])
def test_an_alias_is_not_left_out(name: str) -> None:
    assert models.remarks(models.resolve(str(published.path(name)))) == []


def test_a_llama_without_sizes_says_what_it_became(tmp_path: Path) -> None:
    (tmp_path / "bare.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 1000}))
    (said,) = models.remarks(models.resolve(str(tmp_path / "bare.json")))
    sizes = ("hidden_size 4096", "num_hidden_layers 32", "num_attention_heads 32", "intermediate_size 11008")
    assert lacking(said, "bare's config", "LlamaConfig's defaults", *sizes, "max_position_embeddings 2048") == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gemma-3-4b-it", "its weights of vision are counted, but the batch is text only"),
        ("qwen2.5-vl-7b", "its weights of vision are counted, but the batch is text only"),
        ("llama-4-scout-17b-16e-instruct", "planned and measured without its weights of vision"),
        ("qwen3.5-27b", "planned and measured without its weights of vision"),
    ],
)
def test_a_multimodal_checkpoint_says_what_is_planned_of_it(name: str, said: str) -> None:
    assert models.remarks(models.resolve(str(published.path(name))))[-1].endswith(said)


def test_asking_for_attention_that_is_not_there_is_one_line() -> None:
    record = models.resolve(str(published.path("bloom-560m")))
    with pytest.raises(GaugeError, match=r"BloomForCausalLM has no sdpa attention in transformers [\d.]+; use eager"):
        models.build(record, device="meta", attn_implementation="sdpa")


def test_weights_of_a_config_file_are_not_at_hand() -> None:
    with pytest.raises(GaugeError, match="is a config without weights"):
        models.resolve(str(published.path("gpt2")), weights="real")


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}
LLAVA = {
    "model_type": "llava",
    "text_config": {"model_type": "llama", **SMALL},
    "vision_config": {"model_type": "clip_vision_model", "image_size": 28, **TOWER},
}
MPT = {"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 512, "max_seq_len": 128}


def small(config: dict[str, Any], folder: Path) -> Path:
    file = folder / f"{config['model_type']}.json"
    file.write_text(json.dumps(config))
    return file


@pytest.mark.parametrize(("config", "attention"), [(LLAVA, "sdpa"), (MPT, "eager")], ids=["llava", "mpt"])
def test_other_names_and_other_places_of_sizes_are_read(config: dict[str, Any], attention: str, tmp_path: Path) -> None:
    record = models.resolve(str(small(config, tmp_path)))
    found = plan_of(small(config, tmp_path))
    assert (record.vocab_size, record.max_positions, found.settings["attention"]) == (512, 128, attention)
    assert not any("missing from" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("whisper", "'whisper' is an encoder-decoder model"),
        ("florence2", "'florence2' is an encoder-decoder model"),
        ("blip-2", "is a vision-language model whose batches must have images"),
        ("clip", "'clip' is not a causal LM"),
    ],
)
def test_models_of_other_kinds_are_refused_as_what_they_are(model_type: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(GaugeError, match=said):
        models.resolve(str(small({"model_type": model_type}, tmp_path)))


def test_a_limit_of_no_positions_is_none(tmp_path: Path) -> None:
    config = {"model_type": "xlnet", "d_model": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512}
    assert models.resolve(str(small(config, tmp_path))).max_positions is None


# ---- plans -----------------------------------------------------------------------------------------------------------

# One of each kind whose reading or tracing differs; full fine-tuning, because it fits every architecture.
PLANNED = (
    "bloom-560m", "falcon-7b", "gemma-2-2b", "gemma-3-4b-it", "gemma-4-26b-a4b", "gpt-oss-20b", "jamba-tiny",
    "llama-4-scout-17b-16e-instruct", "mamba-130m-hf", "nvidia-nemotron-3-nano-30b-a3b-bf16", "qwen2.5-vl-7b",
    "qwen3.5-27b", "rwkv-4-169m",
)  # fmt: skip


def plan_of(file: Path, method: str = "full", **how: Any) -> Plan:
    return planner.plan(PlanRequest(models.resolve(str(file)), methods.get(method), StepSettings(1, 8), **how))


EVERY_DAY = ("falcon-7b", "gemma-4-26b-a4b", "mamba-130m-hf", "qwen3.5-27b")
"""Shared keys, experts, a state space and linear attention; the others' parts are among these, and weekly."""


@pytest.mark.integration
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.slow) for name in PLANNED]
)
def test_a_cut_of_a_published_model_is_planned(name: str, tmp_path: Path) -> None:
    file = published.cut_file(name, tmp_path)
    found, record = plan_of(file), models.resolve(str(file))
    built = models.build(record, device="meta", dtype="bfloat16")
    assert found.total_params == sum(p.numel() for p in built.parameters())
    assert found.base == (record.stored.description if record.stored else "bfloat16")
    weights = sum(-(-p.nbytes // 512) * 512 for p in built.parameters())
    assert found.resident_by_category["base_weights"] == weights
    assert found.settings["attention"] == BUILT[name][2] or not ATTENTION_AS_STATED


def test_logits_are_known_by_the_vocabulary_of_a_nested_config(tmp_path: Path) -> None:
    found = plan_of(published.cut_file("gemma-3-4b-it", tmp_path), "prompt")
    assert found.peak_by_category["logits_and_loss"] >= (8 + 20) * 262_208 * 4, "float32, with the 20 virtual tokens"


def test_recurrent_layers_are_said_to_be_planned_without_their_kernels(tmp_path: Path) -> None:
    said = "recurrent layers are planned as in transformers' PyTorch code"
    assert any(said in warning for warning in plan_of(published.cut_file("mamba-130m-hf", tmp_path)).warnings)
    assert not any(said in warning for warning in plan_of(published.cut_file("falcon-7b", tmp_path)).warnings)


def test_positions_of_a_nested_config_are_known(tmp_path: Path) -> None:
    file = published.cut_file("gemma-3-4b-it", tmp_path)
    config = json.loads(file.read_text())
    config["text_config"]["max_position_embeddings"] = 4
    file.write_text(json.dumps(config))
    assert "a sequence of 8 tokens exceeds gemma-3-4b-it's 4 positions" in plan_of(file).warnings


def test_the_dtype_of_a_published_config_is_not_taken_for_the_base(tmp_path: Path) -> None:
    """Both are built in the dtype that was asked for, whatever ``torch_dtype`` a config has."""
    model = models.build(models.resolve(str(published.cut_file("opt-350m", tmp_path))), device="meta")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
