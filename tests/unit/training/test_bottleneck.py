"""Bottleneck adapters against the library `adapters` (golden files), the papers' counts, and what must never change."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from peft_gauge.errors import GaugeError
from peft_gauge.training import models
from peft_gauge.training.bottleneck import (
    CONFIG_FILE,
    NONLINEARITIES,
    WEIGHTS_FILE,
    BottleneckConfig,
    Style,
    adapter_state,
    attach_,
    load,
    save,
)
from peft_gauge.training.bottleneck_layers import ACTIVATIONS, BottleneckAdapter, adapted_modules
from tests.support.paths import REFERENCE

STYLES: tuple[Style, ...] = ("houlsby", "pfeiffer")
TOKEN_IDS = torch.arange(20).reshape(2, 10)


def expected_params(hidden: int, layers: int, config: BottleneckConfig) -> int:
    """2md + d + m an adapter (Houlsby et al. 2019, section 2.1): two a block, or one (Pfeiffer)."""
    m = max(1, int(hidden // config.reduction_factor))
    return layers * {"houlsby": 2, "pfeiffer": 1}[config.style] * (2 * m * hidden + hidden + m)


def toy(**how: Any) -> Any:
    return models.build(models.resolve("toy-llama"), **how).eval()


def adapted(style: Style = "houlsby", *, seed: int = 0, **how: Any) -> Any:
    model = toy(**how)
    attach_(model, BottleneckConfig(style, reduction_factor=8), seed=seed)
    return model


def randomize_(model: nn.Module, seed: int = 7) -> None:
    """Give every adapter weight a value, so that each of them has a part in the output."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter_state(model).values():
        tensor.uniform_(-0.3, 0.3, generator=generator)


def logits(model: Any, token_ids: torch.Tensor = TOKEN_IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids).logits


def loss(model: Any) -> torch.Tensor:
    return model(TOKEN_IDS, labels=TOKEN_IDS).loss


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trainable_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# Against the library


def our_name(style: Style, name: str) -> str:
    """The golden file's name of an adapter weight as this package names it."""
    _, block, place, part, kind = name.split(".")
    sub_layer = {"attention": "self_attn.", "feed_forward": "mlp."}[place] if style == "houlsby" else ""
    return f"model.layers.{block}.{sub_layer}bottleneck_adapter.{part}.{kind}"


@pytest.mark.parametrize("style", STYLES)
def test_same_count_and_same_output_as_the_library(style: Style) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    path = REFERENCE / f"{style}.safetensors"
    golden = load_file(path)
    with safe_open(path, framework="pt") as file:
        described = file.metadata()
    assert described["style"] == style
    model = LlamaForCausalLM(LlamaConfig(**json.loads(described["model"]), attn_implementation="eager")).eval()
    model.load_state_dict({k.removeprefix("base."): v for k, v in golden.items() if k.startswith("base.")})
    config = BottleneckConfig(style, int(described["reduction_factor"]), described["nonlinearity"])

    attach_(model, config)
    rounding: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}  # logits are about 4, so some tens of float32 steps
    torch.testing.assert_close(logits(model, golden["token_ids"]), golden["base_logits"], **rounding)
    ours = adapter_state(model)
    library = {our_name(style, name): tensor for name, tensor in golden.items() if name.startswith("adapter.")}
    assert ours.keys() == library.keys()
    for name, tensor in library.items():
        assert ours[name].shape == tensor.shape
        ours[name].copy_(tensor)

    assert trainable_params(model) == int(described["trainable_params"])
    assert expected_params(32, 2, config) == int(described["trainable_params"])
    torch.testing.assert_close(logits(model, golden["token_ids"]), golden["logits"], **rounding)
    assert (golden["logits"] - golden["base_logits"]).abs().max() > 1, "the adapters of the golden file do nothing"


@pytest.mark.parametrize("name", NONLINEARITIES)
def test_nonlinearities_are_the_librarys(name: str) -> None:
    from transformers.activations import get_activation  # where `adapters` takes all but one of its names from

    expected = nn.LeakyReLU() if name == "leakyrelu" else get_activation(name)
    x = torch.linspace(-4, 4, 101)
    torch.testing.assert_close(ACTIVATIONS[name](x), expected(x))


def test_every_nonlinearity_has_a_function() -> None:
    assert set(ACTIVATIONS) == set(NONLINEARITIES)


# Counts


@pytest.mark.parametrize(
    ("style", "reduction_factor", "params"),
    [  # hidden 64, 2 blocks: 128m + 64 + m an adapter
        ("houlsby", 16, 4 * (128 * 4 + 64 + 4)),
        ("pfeiffer", 16, 2 * (128 * 4 + 64 + 4)),
        ("pfeiffer", 1, 2 * (128 * 64 + 64 + 64)),
        ("pfeiffer", 2.5, 2 * (128 * 25 + 64 + 25)),  # 25.6 is rounded down
        ("houlsby", 1000, 4 * (128 * 1 + 64 + 1)),  # never less than one
    ],
)
def test_counts(style: Style, reduction_factor: float, params: int) -> None:
    config = BottleneckConfig(style, reduction_factor)
    model = toy()
    attach_(model, config)
    assert expected_params(64, 2, config) == params
    assert trainable_params(model) == params
    assert sum(tensor.numel() for tensor in adapter_state(model).values()) == params


# The start, and what trains


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("style", STYLES)
def test_starts_as_the_base_in_the_bases_dtype_with_float32_adapters(style: Style, dtype: str) -> None:
    model = adapted(style, dtype=dtype)
    assert torch.equal(logits(model), logits(toy(dtype=dtype)))
    assert {tensor.dtype for tensor in adapter_state(model).values()} == {torch.float32}
    base_dtypes = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert base_dtypes == {logits(model).dtype} == {getattr(torch, dtype)}


def test_adapters_over_a_16_bit_base_add_in_their_own_dtype() -> None:
    # 1 + 2⁻⁸ is halfway between two bfloat16 numbers and rounds down; 2⁻¹⁷ more rounds up, but only if the sum is
    # taken in float32: bfloat16 cannot hold 2⁻⁸ + 2⁻¹⁷.
    generator = torch.Generator().manual_seed(0)
    adapter = BottleneckAdapter(1, 1, "relu", device=torch.device("cpu"), dtype=torch.float32, generator=generator)
    with torch.no_grad():
        adapter.up.bias.fill_(2**-8 + 2**-17)
        adapted_one = adapter(torch.ones(1, dtype=torch.bfloat16))
    assert adapted_one.dtype == torch.bfloat16
    assert adapted_one.item() == 1 + 2**-7


@pytest.mark.parametrize("style", STYLES)
def test_the_base_keeps_its_names_and_is_frozen(style: Style) -> None:
    model = adapted(style)
    base_names = set(toy().state_dict())
    assert set(model.state_dict()) == base_names | set(adapter_state(model))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapter_state(model))


@pytest.mark.parametrize("style", STYLES)
def test_only_adapters_move_and_all_of_them_do(style: Style) -> None:
    model = adapted(style).train()
    before = snapshot(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(2):  # the first step moves the up-projections alone: until then they are zero
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(adapter_state(model))


def test_the_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    first, random_state = adapter_state(adapted(seed=3)), torch.get_rng_state()
    torch.manual_seed(2)
    again, other = adapter_state(adapted(seed=3)), adapter_state(adapted(seed=4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if name.endswith("down.weight")]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    assert len({first[name].sum().item() for name in drawn}) == len(drawn), "two adapters are the same"
    torch.manual_seed(1)
    toy()
    assert torch.equal(torch.get_rng_state(), random_state), "attaching used the global random numbers"


def test_down_projection_is_uniform_within_its_bound() -> None:
    model = toy()
    attach_(model, BottleneckConfig(reduction_factor=1))
    drawn = [tensor for name, tensor in adapter_state(model).items() if name.endswith("down.weight")]
    values = torch.cat([tensor.flatten() for tensor in drawn])  # 16,384 numbers within ±1/√64
    assert values.abs().max() <= 1 / 8
    assert values.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.03)
    assert abs(values.mean().item()) < 0.003


# Copies


def test_a_deep_copy_is_independent() -> None:
    model = adapted()
    randomize_(model)
    twin = copy.deepcopy(model)
    original_logits = logits(model)
    assert torch.equal(logits(twin), original_logits)
    randomize_(twin, seed=8)
    assert torch.equal(logits(model), original_logits)
    assert not torch.equal(logits(twin), original_logits)
    assert isinstance(twin.model.layers[0].mlp, type(model.model.layers[0].mlp))


@pytest.mark.parametrize("style", STYLES)
def test_a_pickled_model_comes_back(style: Style) -> None:
    model = adapted(style)
    randomize_(model)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


# Gradient checkpointing


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("style", STYLES)
def test_gradient_checkpointing_recomputes_the_adapters_and_gives_the_same_gradients(
    style: Style, use_reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(style).train()
    randomize_(model)
    loss(model).backward()
    plain = gradients(model)
    model.zero_grad()

    model.enable_input_require_grads()  # reentrant checkpoints need an input with a gradient
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls: list[BottleneckAdapter] = []
    forward = BottleneckAdapter.forward

    def counted(self: BottleneckAdapter, hidden: torch.Tensor) -> torch.Tensor:
        calls.append(self)
        return forward(self, hidden)

    monkeypatch.setattr(BottleneckAdapter, "forward", counted)
    loss(model).backward()

    checkpointed = gradients(model)
    assert plain.keys() == checkpointed.keys() == adapter_state(model).keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name])
    assert len(calls) == 2 * len(plain) // 4, "an adapter outside of the checkpoint keeps its activations"


# Bases that are not plain float32 on a device


@pytest.mark.parametrize("style", STYLES)
def test_over_a_4_bit_base(style: Style) -> None:
    from peft_gauge.training.quantization import quantize_

    # bitsandbytes repacks the weights at a forward pass in eval mode on some CPUs, and then cannot backpropagate.
    model = toy().train()
    quantize_(model)
    base_logits = logits(model)
    attach_(model, BottleneckConfig(style, reduction_factor=8))
    assert torch.equal(logits(model), base_logits)
    assert trainable_params(model) == expected_params(64, 2, BottleneckConfig(style, reduction_factor=8))
    randomize_(model)
    loss(model).backward()
    found = gradients(model)
    assert found.keys() == adapter_state(model).keys()
    assert all(gradient.abs().max() > 0 for gradient in found.values())


@pytest.mark.parametrize("style", STYLES)
def test_on_the_meta_device(style: Style) -> None:
    model = models.build(models.resolve("tinyllama"), device="meta")
    config = BottleneckConfig(style)
    attach_(model, config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert trainable_params(model) == expected_params(2048, 22, config)


@pytest.mark.parametrize("style", STYLES)
def test_under_fake_tensors(style: Style) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import LlamaForCausalLM

    with FakeTensorMode():
        model = LlamaForCausalLM(models.hf_config(models.resolve("toy-llama")))
        attach_(model, BottleneckConfig(style, reduction_factor=8))
        token_ids = torch.zeros((2, 10), dtype=torch.long)
        model(token_ids, labels=token_ids).loss.backward()
        shapes = {name: tuple(gradient.shape) for name, gradient in gradients(model).items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in adapter_state(adapted(style)).items()}


def test_fake_tensors_of_a_device_that_is_not_here() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    generator, device = torch.Generator().manual_seed(0), torch.device("cuda")
    with FakeTensorMode():
        adapter = BottleneckAdapter(8, 2, "relu", device=device, dtype=torch.float32, generator=generator)
    assert {parameter.device.type for parameter in adapter.parameters()} == {"cuda"}


# Other architectures


def tiny(architecture: str) -> Any:
    import transformers

    config_class, model_class, sizes = {
        "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
        "opt": (
            "OPTConfig",
            "OPTForCausalLM",
            {
                "hidden_size": 32,
                "word_embed_proj_dim": 32,
                "ffn_dim": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
            },
        ),
        "bloom": ("BloomConfig", "BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 2}),
        "mpt": ("MptConfig", "MptForCausalLM", {"d_model": 32, "n_layers": 2, "n_heads": 2}),
        "bert": (
            "BertConfig",
            "BertForMaskedLM",
            {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
        ),
    }[architecture]
    config = getattr(transformers, config_class)(vocab_size=64, **sizes)
    return getattr(transformers, model_class)(config).eval()


@pytest.mark.parametrize(
    ("architecture", "style"), [(name, style) for name in ("gpt2", "opt", "bloom", "mpt") for style in STYLES]
)
def test_other_decoders(architecture: str, style: Style) -> None:
    model = tiny(architecture)
    base_logits = logits(model)
    config = BottleneckConfig(style, reduction_factor=8)
    attach_(model, config)
    assert torch.equal(logits(model), base_logits)
    assert trainable_params(model) == expected_params(32, 2, config)
    randomize_(model)
    assert not torch.allclose(logits(model), base_logits, atol=1e-3)


@pytest.mark.parametrize(
    ("architecture", "places"),
    [
        ("gpt2", ("attn", "mlp")),
        ("opt", ("self_attn", "fc2")),
        ("bloom", ("self_attention.dense", "mlp.dense_4h_to_h")),  # whose parents add the residual
        ("mpt", ("attn", "ffn.down_proj")),
    ],
)
def test_an_adapter_stands_before_its_residual(architecture: str, places: tuple[str, ...]) -> None:
    found = adapted_modules(tiny(architecture), "houlsby")
    assert [re.split(r"\.\d+\.", name)[1] for name in found] == [*places, *places]


def test_an_architecture_without_decoder_blocks_is_refused_by_name() -> None:
    model = tiny("bert")
    with pytest.raises(GaugeError, match="no list of decoder blocks found in BertForMaskedLM"):
        attach_(model, BottleneckConfig("pfeiffer"))
    assert all(parameter.requires_grad for parameter in model.parameters()), "a refused model was frozen"


# Saving and loading


@pytest.mark.parametrize("style", STYLES)
def test_saved_adapters_come_back_on_a_fresh_base(style: Style, tmp_path: Path) -> None:
    model = adapted(style)
    randomize_(model)
    save(model, tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]

    fresh = toy()
    load(fresh, tmp_path / "new" / "folder")
    assert torch.equal(logits(fresh), logits(model))
    assert {name for name, p in fresh.named_parameters() if p.requires_grad} == set(adapter_state(model))
    stored = load_file(tmp_path / "new" / "folder" / WEIGHTS_FILE)
    assert sum(tensor.numel() for tensor in stored.values()) == trainable_params(model), "more than the adapters saved"


def test_load_into_adapters_that_are_there_and_save_over_a_save(tmp_path: Path) -> None:
    model, other = adapted(), adapted()
    save(model, tmp_path)
    randomize_(model)
    save(model, tmp_path)
    load(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


def test_the_dtype_of_adapters_is_kept(tmp_path: Path) -> None:
    model = toy(dtype="bfloat16")
    attach_(model, BottleneckConfig(), dtype=torch.bfloat16)
    save(model, tmp_path)
    fresh = toy(dtype="bfloat16")
    load(fresh, tmp_path)
    assert {tensor.dtype for tensor in adapter_state(fresh).values()} == {torch.bfloat16}


def test_a_failed_save_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    randomize_(model)

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(GaugeError, match="No space left"):
        save(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def edit_config(folder: Path, **changes: Any) -> None:
    described = json.loads((folder / CONFIG_FILE).read_text()) | changes
    kept = {key: value for key, value in described.items() if value is not None}
    (folder / CONFIG_FILE).write_text(json.dumps(kept))


def edit_weights(folder: Path, drop: str = "", **changes: torch.Tensor) -> None:
    weights = {k: v for k, v in load_file(folder / WEIGHTS_FILE).items() if not drop or drop not in k}
    save_file(weights | changes, folder / WEIGHTS_FILE)


DAMAGES = {
    "no config": (lambda folder: (folder / CONFIG_FILE).unlink(), "cannot read .*adapter_config.json"),
    "no weights": (lambda folder: (folder / WEIGHTS_FILE).unlink(), "cannot read .*adapter_model.safetensors"),
    "broken config": (lambda folder: (folder / CONFIG_FILE).write_text("{"), "cannot read .*adapter_config.json"),
    "a list as config": (lambda folder: (folder / CONFIG_FILE).write_text("[]"), "does not describe bottleneck"),
    "a LoRA's config": (lambda folder: edit_config(folder, adapter_type="lora"), "does not describe bottleneck"),
    "truncated weights": (
        lambda folder: (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:-5]),
        "cannot read .*adapter_model.safetensors",
    ),
    "another hidden size": (lambda folder: edit_config(folder, hidden_size=128), "hidden_size 128; this one has 64"),
    "another depth": (lambda folder: edit_config(folder, num_hidden_layers=3), "num_hidden_layers 3; this one has 2"),
    "no style": (lambda folder: edit_config(folder, style=None), "no entry 'style'"),
    "an unknown style": (lambda folder: edit_config(folder, style="houlsbi"), "did you mean houlsby"),
    "the other style": (
        lambda folder: edit_config(folder, style="pfeiffer"),
        r"bottleneck_adapter.down.weight is missing \(and 23 more\)",
    ),
    "another width": (lambda folder: edit_config(folder, reduction_factor=4), r"\(8, 64\), expected \(16, 64\)"),
    "a weight missing": (lambda folder: edit_weights(folder, drop="0.mlp"), r"0.mlp.* is missing \(and 3 more\)"),
    "a weight too many": (lambda folder: edit_weights(folder, more=torch.ones(1)), "more is not in this model$"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_refused_in_one_line_and_changes_nothing(damage: str, tmp_path: Path) -> None:
    saved, model = adapted(), toy()
    save(saved, tmp_path)
    spoil, message = DAMAGES[damage]
    spoil(tmp_path)
    before = snapshot(model)
    with pytest.raises(GaugeError, match=message) as refusal:
        load(model, tmp_path)
    assert "\n" not in str(refusal.value)
    assert model.state_dict().keys() == before.keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_of_another_config_are_not_overwritten(tmp_path: Path) -> None:
    save(adapted("pfeiffer"), tmp_path)
    model = adapted("houlsby")
    before = snapshot(model)
    with pytest.raises(GaugeError, match=r"pfeiffer.* but the model has .*houlsby"):
        load(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "houlsbi"}, "did you mean houlsby"),
        ({"nonlinearity": "relux"}, "did you mean relu"),
        ({"nonlinearity": None}, "unknown nonlinearity"),
        ({"reduction_factor": 0.5}, "at least 1, got 0.5"),
        ({"reduction_factor": 0}, "at least 1, got 0"),
        ({"reduction_factor": float("nan")}, "at least 1, got nan"),
        ({"reduction_factor": float("inf")}, "at least 1, got inf"),
        ({"reduction_factor": "16"}, "at least 1, got '16'"),
        ({"reduction_factor": True}, "at least 1, got True"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GaugeError, match=message):
        BottleneckConfig(**options)


def test_attaching_twice_or_in_integers_is_refused() -> None:
    model = toy()
    with pytest.raises(GaugeError, match="floating-point"):
        attach_(model, BottleneckConfig(), dtype=torch.int8)
    attach_(model, BottleneckConfig())
    with pytest.raises(GaugeError, match="already"):
        attach_(model, BottleneckConfig("pfeiffer"))


def test_saving_or_loading_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GaugeError, match="no bottleneck adapters to save"):
        save(toy(), tmp_path)
    with pytest.raises(GaugeError, match="meta device have no weights"):
        save(adapted(device="meta"), tmp_path)
    save(adapted(), tmp_path)
    with pytest.raises(GaugeError, match="cannot be loaded onto the meta device"):
        load(toy(device="meta"), tmp_path)
