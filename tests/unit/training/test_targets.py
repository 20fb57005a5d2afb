"""What a method adapts in each kind of architecture: small cuts of published ones, built on ``meta``.

Counts are held against sums over the named layers' own sizes, not against what PEFT or the planner say.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import transformers
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from peft_gauge.errors import GaugeError
from peft_gauge.report.terminal.plan_table import adapted_modules
from peft_gauge.training import methods, models, targets

SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
OLD_SIZES = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

CUTS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "phi3": {**SIZES, "pad_token_id": 0},
    "minicpm3": {**SIZES, **LATENT, "q_lora_rank": 16},
    "deepseek_v2": {
        **SIZES, **LATENT, **EXPERTS, "q_lora_rank": None, "n_routed_experts": 4, "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "opt": {
        "vocab_size": 256, "hidden_size": 64, "word_embed_proj_dim": 32, "ffn_dim": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "gptj": {**OLD_SIZES, "rotary_dim": 8},
    "gpt2": OLD_SIZES,
    "falcon": {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bloom": {"vocab_size": 256, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "gpt_neox": {key: value for key, value in SIZES.items() if key != "num_key_value_heads"},
    "mpt": {"vocab_size": 256, "d_model": 64, "n_layers": 2, "n_heads": 4},
    "phi": {**SIZES, "num_key_value_heads": 4},
    "qwen3_5": {
        "text_config": {
            **SIZES, "num_hidden_layers": 4, "head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        }
    },
    "jamba": {
        **SIZES, "num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2, "num_experts": 4,
        "mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False, "pad_token_id": 0,
    },
    "nemotron_h": {
        **SIZES, **EXPERTS, "num_hidden_layers": 4, "head_dim": 16, "n_routed_experts": 4, "mamba_num_heads": 4,
        "layers_block_type": ["mamba", "moe", "attention", "mlp"], "mamba_head_dim": 16, "n_groups": 2,
        "ssm_state_size": 16, "moe_shared_expert_intermediate_size": 32,
    },
    "gemma3": {
        "text_config": {**SIZES, "head_dim": 16}, "mm_tokens_per_image": 4,
        "vision_config": {**VISION, "intermediate_size": 64, "image_size": 28, "patch_size": 14},
    },
    "gemma4": {
        "text_config": {
            **SIZES, "head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
            "attention_k_eq_v": True, "num_global_key_value_heads": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": {**VISION, "intermediate_size": 72, "num_key_value_heads": 2, "head_dim": 16},
    },
    "llama4": {
        "text_config": {
            **SIZES, "head_dim": 16, "intermediate_size_mlp": 128, "num_local_experts": 4, "moe_layers": [0, 1],
            "pad_token_id": 0,
        }
    },
    "mixtral": {**SIZES, "num_local_experts": 4},
    "qwen3_moe": {**SIZES, **EXPERTS, "head_dim": 16, "num_experts": 4},
    "rwkv": {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2},
    "mamba": {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 8},
}  # fmt: skip

QKVO = "self_attn.(q_proj, k_proj, v_proj, o_proj) in 2 of 2 layers"
ALL = "in 2 of 2 layers"

# By architecture: what lora, ia3 and bottleneck adapt.
MEANT: dict[str, tuple[list[str], list[str], list[str]]] = {
    "llama": ([QKVO], [f"self_attn.(k_proj, v_proj), mlp.down_proj {ALL}"], [f"self_attn, mlp {ALL}"]),
    "phi3": (
        [f"self_attn.(o_proj, qkv_proj) {ALL}"],
        [f"self_attn.qkv_proj, mlp.down_proj {ALL}"],
        [f"self_attn, mlp {ALL}"],
    ),
    "minicpm3": (
        [f"self_attn.(q_a_proj, q_b_proj, kv_a_proj_with_mqa, kv_b_proj, o_proj) {ALL}"],
        [f"self_attn.kv_b_proj, mlp.down_proj {ALL}"],
        [f"self_attn, mlp {ALL}"],
    ),
    "deepseek_v2": (
        [f"self_attn.(q_proj, kv_a_proj_with_mqa, kv_b_proj, o_proj) {ALL}"],
        [f"self_attn.kv_b_proj {ALL}", "mlp.down_proj, mlp.shared_experts.down_proj in 1 of 2 layers"],
        [f"self_attn, mlp {ALL}"],
    ),
    "opt": (
        [f"self_attn.(k_proj, v_proj, q_proj, out_proj) {ALL}"],
        [f"self_attn.(k_proj, v_proj), fc2 {ALL}"],
        [f"self_attn, fc2 {ALL}"],
    ),
    "gptj": (
        [f"attn.(k_proj, v_proj, q_proj, out_proj) {ALL}"],
        [f"attn.(k_proj, v_proj), mlp.fc_out {ALL}"],
        [f"attn, mlp {ALL}"],
    ),
    "gpt2": ([f"attn.(c_attn, c_proj) {ALL}"], [f"attn.c_attn, mlp.c_proj {ALL}"], [f"attn, mlp {ALL}"]),
    "falcon": (
        [f"self_attention.(query_key_value, dense) {ALL}"],
        [f"self_attention.query_key_value, mlp.dense_4h_to_h {ALL}"],
        [f"self_attention, mlp {ALL}"],
    ),
    "bloom": (
        [f"self_attention.(query_key_value, dense) {ALL}"],
        [f"self_attention.query_key_value, mlp.dense_4h_to_h {ALL}"],
        [f"self_attention.dense, mlp.dense_4h_to_h {ALL}"],
    ),
    "gpt_neox": (
        [f"attention.(query_key_value, dense) {ALL}"],
        [f"attention.query_key_value, mlp.dense_4h_to_h {ALL}"],
        [f"attention, mlp {ALL}"],
    ),
    "mpt": (
        [f"attn.(Wqkv, out_proj) {ALL}"],
        [f"attn.Wqkv, ffn.down_proj {ALL}"],
        [f"attn, ffn.down_proj {ALL}"],
    ),
    "phi": (
        [f"self_attn.(q_proj, k_proj, v_proj, dense) {ALL}"],
        [f"self_attn.(k_proj, v_proj), mlp.fc2 {ALL}"],
        [f"self_attn, mlp {ALL}"],
    ),
    "qwen3_5": (
        [
            "linear_attn.(out_proj, in_proj_qkv) in 3 of 4 layers",
            "self_attn.(q_proj, k_proj, v_proj, o_proj) in 1 of 4 layers",
        ],
        [
            "linear_attn.in_proj_qkv in 3 of 4 layers",
            "mlp.down_proj in 4 of 4 layers",
            "self_attn.(k_proj, v_proj) in 1 of 4 layers",
        ],
        ["linear_attn in 3 of 4 layers", "mlp in 4 of 4 layers", "self_attn in 1 of 4 layers"],
    ),
    "jamba": (
        ["self_attn.(q_proj, k_proj, v_proj, o_proj) in 1 of 4 layers"],
        ["feed_forward.down_proj in 2 of 4 layers", "self_attn.(k_proj, v_proj) in 1 of 4 layers"],
        ["mamba in 3 of 4 layers", "feed_forward in 4 of 4 layers", "self_attn in 1 of 4 layers"],
    ),
    "nemotron_h": (
        ["mixer.(q_proj, k_proj, v_proj, o_proj) in 1 of 4 layers"],
        ["mixer.shared_experts.down_proj, mixer.(k_proj, v_proj, down_proj) in 1 of 4 layers"],
        ["mixer in 4 of 4 layers"],
    ),
    "gemma3": ([QKVO], [f"self_attn.(k_proj, v_proj), mlp.down_proj {ALL}"], [f"self_attn, mlp {ALL}"]),
    "gemma4": (
        [f"self_attn.(q_proj, k_proj, o_proj) {ALL}", "self_attn.v_proj in 1 of 2 layers"],
        [f"self_attn.k_proj, mlp.down_proj {ALL}", "self_attn.v_proj in 1 of 2 layers"],
        [f"self_attn, mlp {ALL}"],
    ),
    "llama4": (
        [QKVO],
        [f"self_attn.(k_proj, v_proj), feed_forward.shared_expert.down_proj {ALL}"],
        [f"self_attn, feed_forward {ALL}"],
    ),
    "mixtral": ([QKVO], [f"self_attn.(k_proj, v_proj) {ALL}"], [f"self_attn, mlp {ALL}"]),
    "qwen3_moe": ([QKVO], [f"self_attn.(k_proj, v_proj) {ALL}"], [f"self_attn, mlp {ALL}"]),
    "rwkv": (
        [f"attention.(key, value, receptance, output) {ALL}"],
        [f"attention.(key, value), feed_forward.value {ALL}"],
        [f"attention, feed_forward {ALL}"],
    ),
    "mamba": ([f"mixer.(in_proj, x_proj) {ALL}"], [], [f"mixer {ALL}"]),
}
# In transformers 4 each expert is a module with linear layers of its own, and some of these architectures are missing.
CASES = [
    pytest.param(name, marks=pytest.mark.skipif(name not in CONFIG_MAPPING, reason="not in this transformers"))
    for name in CUTS
]

pytestmark = pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="names of transformers 5")


def record(architecture: str) -> models.ModelRecord:
    return models.ModelRecord(
        architecture, "folder", json.dumps({"model_type": architecture, **CUTS[architecture]}), "random"
    )


def base_of(architecture: str) -> Any:
    return models.build(record(architecture), device="meta", attn_implementation="eager")


def adapted_by(method: methods.Method, base: Any) -> tuple[list[str], Any]:
    places = targets.Places.of(base)
    attached = methods.attach(base, method)
    return adapted_modules([vars(place) for place in targets.adapted(attached, places)]), attached


def sizes_of(base: Any, names: list[str]) -> list[tuple[int, int]]:
    """(input, output) features of the layers, off their weights: Conv1D's is transposed."""
    layers = [base.get_submodule(name) for name in names]
    shapes = [tuple(layer.weight.shape) for layer in layers]
    return [shape if isinstance(layer, Conv1D) else shape[::-1] for layer, shape in zip(layers, shapes, strict=True)]


@pytest.mark.parametrize("architecture", CASES)
def test_lora_adapts_the_attention_projections_of_the_architecture(architecture: str) -> None:
    sizes = sizes_of(base_of(architecture), targets.attention_projections(base_of(architecture)))
    found, attached = adapted_by(methods.LORA, base_of(architecture))

    assert found == MEANT[architecture][0]
    if sizes:  # a model without attention has none of these, and other layers are adapted
        trained = sum(p.numel() for p in attached.parameters() if p.requires_grad)
        assert trained == sum(16 * (inputs + outputs) for inputs, outputs in sizes)


@pytest.mark.parametrize("architecture", CASES)
def test_ia3_scales_keys_values_and_what_enters_the_down_projection(architecture: str) -> None:
    if not MEANT[architecture][1]:
        with pytest.raises(GaugeError, match=f"ia3 on {architecture}: this architecture has no attention projections"):
            methods.attach(base_of(architecture), methods.IA3)
        return
    base = base_of(architecture)
    outputs = [size for _, size in sizes_of(base, targets.keys_and_values(base))]
    inputs = [size for size, _ in sizes_of(base, targets.down_projections(base))]
    found, attached = adapted_by(methods.IA3, base)

    assert found == MEANT[architecture][1]
    assert sum(p.numel() for p in attached.parameters() if p.requires_grad) == sum(outputs) + sum(inputs)


@pytest.mark.parametrize("architecture", CASES)
def test_bottleneck_adapters_stand_after_what_mixes_tokens_and_after_the_feed_forward(architecture: str) -> None:
    assert adapted_by(methods.BOTTLENECK, base_of(architecture))[0] == MEANT[architecture][2]


def test_query_and_value_alone() -> None:
    found = {name: adapted_by(methods.get("lora-qv"), base_of(name))[0] for name in ("llama", "phi3", "minicpm3")}
    assert found == {
        "llama": [f"self_attn.(q_proj, v_proj) {ALL}"],
        "phi3": [f"self_attn.qkv_proj {ALL}"],
        "minicpm3": [f"self_attn.(q_a_proj, q_b_proj, kv_a_proj_with_mqa, kv_b_proj) {ALL}"],
    }
    with pytest.raises(GaugeError, match="lora-qv on mamba: this architecture has no attention projections"):
        methods.attach(base_of("mamba"), methods.get("lora-qv"))


def test_a_vision_tower_is_left_alone() -> None:
    base = base_of("gemma3")
    assert any("vision" in name and name.endswith("q_proj") for name in targets.linear_layers(base))
    _, attached = adapted_by(methods.LORA, base)
    assert not any("vision" in name for name, p in attached.named_parameters() if p.requires_grad)


def test_targets_are_short_where_endings_are_enough() -> None:
    llama, gpt2, gemma3 = map(base_of, ("llama", "gpt2", "gemma3"))
    assert targets.as_targets(llama, targets.attention_projections(llama)) == [["k_proj", "o_proj", "q_proj", "v_proj"]]
    assert targets.as_targets(gpt2, targets.attention_projections(gpt2)) == [["attn.c_proj", "c_attn"]]
    assert targets.as_targets(gemma3, targets.attention_projections(gemma3)) == [
        r"model\.language_model\.layers\.\d+\.self_attn\.(?:k_proj|o_proj|q_proj|v_proj)"
    ]


def test_targets_match_what_was_asked_for_and_nothing_else() -> None:
    """Two of four equally named layers, one of them numbered as the others' block is."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    model = nn.Sequential(Block(), Block())
    [pattern] = targets.as_targets(model, ["0.inner.1", "1.inner.1"])
    matched = [name for name, _ in model.named_modules() if re.fullmatch(str(pattern), name)]
    assert matched == ["0.inner.1", "1.inner.1"]


def test_a_name_that_only_ends_like_a_target_is_unmatched() -> None:
    names = [name for name, _ in base_of("phi3").named_modules()]
    assert targets.unmatched(["q_proj", "v_proj", "qkv_proj", "self_attn.o_proj", "lm_head"], names) == [
        "q_proj",
        "v_proj",
    ]


def test_a_module_trained_as_a_whole_stands_outside_of_the_layers() -> None:
    config = {"r": 4, "modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
    found, _ = adapted_by(methods.LORA.variant("mine", "mine", peft_config=config), base_of("llama"))
    assert found == [f"self_attn.q_proj {ALL}", "lm_head"]


def test_virtual_tokens_adapt_no_module() -> None:
    assert adapted_by(methods.PROMPT, base_of("llama"))[0] == []


def test_an_architecture_that_is_not_known_is_refused_with_what_to_do() -> None:
    class Strange(nn.Module):
        config = type("Config", (), {"model_type": "strange"})()

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4)])

    with pytest.raises(GaugeError, match="lora on strange: .* use lora-all-linear"):
        methods.attach(Strange(), methods.LORA)
