"""The quantization instruments against hand-computed blocks, published levels, theory and a toy model."""

from __future__ import annotations

import gc
import logging
import math
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_gauge import counting
from peft_gauge.errors import GaugeError
from peft_gauge.training import quantization
from peft_gauge.training.quantization import formats, layers, library
from peft_gauge.training.quantization.comparison import (
    DISTRIBUTIONS,
    FormatComparison,
    Samples,
    already_rounded,
    compare_nf4,
    drawn_weight,
    nf4_against_int4,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Builds, plans or trains models: seconds, which are too long for the unit tests.
pytestmark = pytest.mark.integration
# QLoRA (arXiv:2305.14314v1), appendix E.
PUBLISHED_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """bitsandbytes compiles its operators for layers that no kernel takes, which takes seconds and changes nothing."""
    with quantization.uncompiled():
        yield


def toy_llama(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    quantization.load_bitsandbytes()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).train()
    # Module.to() does not work under FakeTensorMode, even to the same dtype.
    return model if dtype == torch.float32 else model.to(dtype)


def token_ids() -> Tensor:
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(1))


def layers_of(model: nn.Module, class_name: str) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == class_name]


# --- formats


def test_nf4_levels_are_the_published_ones() -> None:
    assert formats.levels("nf4").tolist() == pytest.approx(PUBLISHED_NF4, abs=1e-7)


def test_fp4_levels_are_a_sign_two_exponent_bits_and_one_mantissa_bit() -> None:
    positive = [0, 0.0625, 2, 3, 4, 6, 8, 12]
    expected = sorted({sign * value / 12 for value in positive for sign in (1, -1)})
    assert formats.levels("fp4").tolist() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("quant_format", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("absmax", [1.0, 0.25, 3.0])
def test_a_block_of_levels_comes_back_unchanged(quant_format: str, absmax: float) -> None:
    levels = formats.levels(quant_format)
    block = absmax * levels.repeat(5)[-64:].reshape(1, 64)

    restored = formats.dequantized(block, quant_format)
    # Some releases keep FP4's levels to 4 digits on CPU.
    assert torch.allclose(restored, block, rtol=0, atol=5e-5 * absmax)


@pytest.mark.parametrize("quant_format", formats.FOUR_BIT_FORMATS)
@pytest.mark.parametrize("value", [0.0, 0.5, -0.5])
def test_a_constant_block_comes_back_unchanged(quant_format: str, value: float) -> None:
    block = torch.full((1, 64), value)
    assert torch.equal(formats.dequantized(block, quant_format), block)


def test_symmetric_int4_of_a_hand_computed_block() -> None:
    # absmax 7, so the step is 1: halves round to even, and there are no levels beyond -7 and 7.
    block = torch.tensor([7.0, -7.0, 0.4, 0.6, -3.2, 2.5, 3.5, 0.0]).repeat(8).reshape(1, 64)
    expected = torch.tensor([7.0, -7.0, 0.0, 1.0, -3.0, 2.0, 4.0, 0.0]).repeat(8).reshape(1, 64)

    assert torch.equal(formats.dequantized(block, "int4"), expected)
    assert formats.quantization_error(block, "int4").max_over_absmax == pytest.approx(0.5 / 7)


def test_minmax_int4_of_a_hand_computed_block() -> None:
    # From -3 to 12 in 15 steps of 1; a symmetric format would have spent half its levels below -3.
    block = torch.tensor([-3.0, 12.0, 0.25, 7.75, 11.5, -2.6, 5.0, 0.0]).repeat(8).reshape(1, 64)
    expected = torch.tensor([-3.0, 12.0, 0.0, 8.0, 11.0, -3.0, 5.0, 0.0]).repeat(8).reshape(1, 64)

    assert torch.equal(formats.dequantized(block, "int4-minmax"), expected)


def test_minmax_int4_keeps_its_constants_in_float16() -> None:
    # Both ends are levels, but neither the minimum nor the step is a float16 number.
    block = torch.tensor([-0.1, 0.2]).repeat(32).reshape(1, 64)
    low = torch.tensor(-0.1).half().float()
    step = ((0.2 - low) / 15).half().float()

    expected = torch.stack([low, low + 15 * step]).repeat(32).reshape(1, 64)
    assert torch.equal(formats.dequantized(block, "int4-minmax"), expected)
    assert not torch.equal(expected, block)


def test_each_block_has_its_own_scale() -> None:
    weight = torch.cat([torch.full((1, 64), 1.0), torch.full((1, 64), 1e-3)])
    for quant_format in ("nf4", "fp4", "int4"):
        assert formats.quantization_error(weight, quant_format).relative_rms < 1e-6
        assert formats.quantization_error(weight, quant_format, block_size=128).relative_rms > 1e-4


@pytest.mark.parametrize(("quant_format", "steps"), [("int4", 7), ("int4-minmax", 7.5)])
def test_uniform_rounding_of_uniform_weights_loses_step_over_root_twelve(quant_format: str, steps: float) -> None:
    # Both ends are put into each block, so that every step is 1/steps; the other 62 weights are uniform.
    weight = torch.rand((2048, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    weight[:, 0], weight[:, 1] = -1.0, 1.0
    change = formats.dequantized(weight, quant_format)[:, 2:] - weight[:, 2:]

    assert change.square().mean().sqrt().item() == pytest.approx(1 / steps / math.sqrt(12), rel=0.01)


def test_errors_of_a_hand_computed_change() -> None:
    # One weight of 64 moves by 0.4; absmax and all others are levels.
    block = torch.zeros(1, 64)
    block[0, 0], block[0, 1] = 7.0, 2.4
    error = formats.quantization_error(block, "int4")

    assert error.relative_rms == pytest.approx(0.4 / math.hypot(7, 2.4))
    assert error.max_over_absmax == pytest.approx(0.4 / 7)
    assert error.mean_abs == pytest.approx(0.4 / 64)


@pytest.mark.parametrize("quant_format", formats.FOUR_BIT_FORMATS)
def test_no_weight_moves_further_than_the_bound_and_some_come_near(quant_format: str) -> None:
    weight = drawn_weight("uniform", 0)
    bound = formats.error_bound(quant_format)
    assert 0.95 * bound < formats.quantization_error(weight, quant_format).max_over_absmax <= bound * (1 + 2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_are_rounded_as_their_float32_values(dtype: torch.dtype) -> None:
    weight = drawn_weight("normal", 0).to(dtype)
    for quant_format in formats.FOUR_BIT_FORMATS:
        restored = formats.dequantized(weight, quant_format)
        assert restored.dtype == torch.float32
        assert torch.equal(restored, formats.dequantized(weight.float(), quant_format))


# --- bits


def test_bits_by_arithmetic() -> None:
    assert formats.bits_per_parameter("nf4") == 4.5
    assert formats.bits_per_parameter("int4-minmax") == 4.5
    assert formats.bits_per_parameter("nf4", double_quant=True) == 4 + 8 / 64 + 32 / (64 * 256)
    assert formats.bits_per_parameter("nf4", block_size=128) == 4.25
    # The published saving of double quantization, in bits (QLoRA, section 3).
    saving = formats.bits_per_parameter("nf4") - formats.bits_per_parameter("nf4", double_quant=True)
    assert saving == pytest.approx(0.373, abs=5e-4)


@pytest.mark.parametrize("shape", [(2, 64), (3, 192), (64, 64), (192, 576), (257, 64)])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_format", ["nf4", "fp4"])
def test_bits_by_arithmetic_are_the_bits_stored(shape: tuple[int, int], double_quant: bool, quant_format: str) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stored = formats.stored_bytes(*formats.pack(weight, quant_format, double_quant=double_quant))

    computed = formats.bits_per_parameter(quant_format, double_quant=double_quant, numel=weight.numel())
    assert stored.bits_per_parameter == computed
    assert stored.codebook_bytes == 4 * (16 + 256 * double_quant)
    with_codebooks = stored.bits_per_parameter_with_codebooks - stored.bits_per_parameter
    assert with_codebooks == pytest.approx(8 * stored.codebook_bytes / weight.numel())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_double_quantization_moves_absmax_by_at_most_half_an_8_bit_step(distribution: str) -> None:
    shift, bound = formats.absmax_shift(drawn_weight(distribution, 0))
    # bitsandbytes divides in float32, so a value near the middle of a gap may go to the farther side.
    assert 0 < shift <= bound * 1.005
    # The code's upper decade, 0.1 to 1, has 64 values; some releases move the last one from -0.993 to -1 on CPU.
    step = 0.9 / 64
    assert bound in (pytest.approx(step / 2, rel=1e-3), pytest.approx(step * 3 / 4, rel=1e-3))


# --- distributions and the claim


@pytest.mark.parametrize(("distribution", "kurtosis"), [("normal", 3.0), ("uniform", 1.8)])
def test_drawn_weights_have_the_moments_of_their_distribution(distribution: str, kurtosis: float) -> None:
    weight = drawn_weight(distribution, 0).double()
    assert weight.mean().item() == pytest.approx(0, abs=2e-4)
    assert weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert ((weight / weight.std()) ** 4).mean().item() == pytest.approx(kurtosis, rel=0.02)


def test_student_t3_has_its_quantiles() -> None:
    # Its variance is 3 and its 75 % and 97.5 % quantiles are 0.7649 and 3.1824 (any table of t).
    weight = drawn_weight("student-t3", 0).flatten() / 0.02 * math.sqrt(3)
    quantiles = torch.tensor([weight.kthvalue(round(q * weight.numel())).values.item() for q in (0.75, 0.975)])
    assert quantiles.tolist() == pytest.approx([0.7649, 3.1824], rel=0.02)


def test_a_seed_gives_the_same_weights_and_another_seed_others() -> None:
    once, again, other = (drawn_weight("normal", seed) for seed in (3, 3, 4))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_weights_read_from_a_4_bit_file_are_told_from_others() -> None:
    weight = drawn_weight("normal", 0)
    assert not already_rounded(weight)
    assert not already_rounded(weight.bfloat16())
    rounded = formats.dequantized(weight, "int4-minmax", block_size=32)  # what Q4_1 does
    assert already_rounded(rounded)
    assert already_rounded(rounded.bfloat16())
    assert not already_rounded(torch.cat([rounded, weight]))
    assert already_rounded(torch.arange(32) % 16)
    assert not already_rounded(torch.arange(32) % 17)


def comparison(nf4: list[float], rival: list[float], **extra: Any) -> FormatComparison:
    return FormatComparison("int4", tuple(nf4), tuple(rival), 4.5, 4.5, **extra)


@pytest.mark.parametrize(
    ("wins", "losses", "p_value", "holds"),
    [
        (8, 0, 2 / 256, True),
        (0, 8, 2 / 256, False),
        (6, 0, 2 / 64, True),
        (5, 0, 2 / 32, None),
        (6, 2, 2 * (1 + 8 + 28) / 256, None),
        (4, 4, 1.0, None),
        (0, 0, 1.0, None),
    ],
)
def test_the_sign_test_by_hand(wins: int, losses: int, p_value: float, holds: bool | None) -> None:
    compared = comparison([1.0] * wins + [3.0] * losses + [2.0], [2.0] * (wins + losses + 1))  # the last is a tie
    assert compared.p_value == pytest.approx(p_value)
    assert compared.holds is holds


def test_unfair_samples_decide_nothing() -> None:
    assert comparison([1.0] * 9, [2.0] * 9).holds is True
    assert comparison([1.0] * 9, [2.0] * 9, unfair="rounded before").holds is None


def test_a_4_bit_grid_favours_uniform_formats_and_is_declared_unfair() -> None:
    fresh = [drawn_weight("normal", seed) for seed in range(6)]
    rounded = [formats.dequantized(weight, "int4-minmax", block_size=32) for weight in fresh]

    on_fresh = compare_nf4(Samples(fresh), rival="int4-minmax")
    on_rounded = compare_nf4(Samples(rounded), rival="int4-minmax")

    assert on_fresh.unfair is None
    assert on_rounded.unfair is not None
    assert on_rounded.holds is None
    assert min(on_rounded.ratios) > max(on_fresh.ratios)


def test_each_error_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[tuple[str, bool]] = []

    def error(weight: Tensor, quant_format: str, *, double_quant: bool) -> Any:
        computed.append((quant_format, double_quant))
        return formats.quantization_error(weight, quant_format, double_quant=double_quant)

    monkeypatch.setattr("peft_gauge.training.quantization.comparison.quantization_error", error)
    samples = Samples(drawn_weight("normal", seed) for seed in (0, 1))
    for rival in ("fp4", "int4"):
        for double_quant in (False, True):
            compared = compare_nf4(samples, rival=rival, double_quant=double_quant)
            nf4 = [
                formats.quantization_error(drawn_weight("normal", seed), "nf4", double_quant=double_quant).relative_rms
                for seed in (0, 1)
            ]
            assert list(compared.nf4_errors) == nf4
    assert computed == [
        each
        for pair in (("nf4", False), ("fp4", False), ("nf4", True), ("fp4", True), ("int4", False))
        for each in [pair] * 2
    ]


def test_the_comparison_takes_the_formats_that_it_names() -> None:
    weight = drawn_weight("normal", 7)
    compared = nf4_against_int4("normal", (7,), rival="fp4", double_quant=True)

    assert compared.nf4_errors == (formats.quantization_error(weight, "nf4", double_quant=True).relative_rms,)
    assert compared.rival_errors == (formats.quantization_error(weight, "fp4", double_quant=True).relative_rms,)
    assert compared.nf4_bits == compared.rival_bits == formats.bits_per_parameter("nf4", double_quant=True)
    assert nf4_against_int4("normal", (7,), double_quant=True).rival_bits == 4.5
    assert compared.metrics()["samples"] == 1


# --- a model's layers


@pytest.mark.parametrize(
    ("quant_format", "double_quant", "class_name", "tolerance"),
    [
        ("nf4", True, "Linear4bit", 0.25),
        ("fp4", False, "Linear4bit", 0.35),
        ("int8", False, "Linear8bitLt", 0.03),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_computes_nearly_the_same(
    quant_format: str, double_quant: bool, class_name: str, tolerance: float, dtype: torch.dtype
) -> None:
    model, exact = toy_llama(dtype=dtype), toy_llama(dtype=dtype)
    quantization.quantize_(model, quant_format=quant_format, double_quant=double_quant, compute_dtype=dtype)

    assert len(layers_of(model, class_name)) == 2 * 7
    assert [type(layer) for layer in layers_of(model, "Linear")] == [nn.Linear]  # lm_head
    expected, found = exact(token_ids()).logits.float(), model(token_ids()).logits.float()
    assert 0 < ((found - expected).norm() / expected.norm()).item() < tolerance


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_4_bit_layer_multiplies_with_the_dequantized_weight(double_quant: bool) -> None:
    linear = nn.Linear(128, 32)
    weight, bias = linear.weight.detach().clone(), linear.bias
    model = nn.Sequential(linear)
    quantization.quantize_(model, double_quant=double_quant)
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)

    y = model(x)
    y.sum().backward()

    restored = formats.dequantized(weight, "nf4", double_quant=double_quant)
    assert model[0].bias is bias
    assert torch.allclose(y, nn.functional.linear(x, restored, bias), atol=1e-5)
    assert x.grad is not None
    assert torch.allclose(x.grad, restored.sum(dim=0).expand(4, -1), atol=1e-5)
    assert model[0].weight.grad is None


def unpacked(weight: Tensor, double_quant: bool) -> Tensor:
    """``weight`` (out×in) through NF4 by the definition: blocks of 64 in the order of memory, the last one short."""
    blocks = nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    absmax = formats.pack(weight, "nf4")[1].absmax
    assert torch.equal(absmax, blocks.abs().amax(dim=1))
    if double_quant:
        state = formats.pack(weight, "nf4", double_quant=True)[1]
        functional = quantization.load_bitsandbytes().functional
        absmax_of_state = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    levels = formats.levels("nf4")
    nearest = (blocks / absmax[:, None]).unsqueeze(-1).sub(levels).abs().argmin(dim=-1)
    scale = absmax_of_state if double_quant else absmax
    return (levels[nearest] * scale[:, None]).flatten()[: weight.numel()].view_as(weight)


@pytest.mark.parametrize(("inputs", "outputs"), [(4304, 32), (100, 60), (96, 64), (5, 3)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_row_that_is_no_multiple_of_a_block_is_computed_right_or_refused(
    inputs: int, outputs: int, double_quant: bool
) -> None:
    """Blocks run across rows. bitsandbytes 0.50 unpacks some of these wrongly on a CPU (4304 and 96 inputs)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear = nn.Linear(inputs, outputs)
        x = torch.randn(4, inputs, requires_grad=True)
    restored = unpacked(linear.weight.detach(), double_quant)
    model = nn.Sequential(linear)
    if not layers._unpacks(inputs, "nf4"):
        with pytest.raises(GaugeError, match=f"0 has {inputs} inputs, .* unpacks such rows wrongly; use a GPU"):
            quantization.quantize_(model, double_quant=double_quant)
        packed, state = formats.pack(linear.weight.detach(), "nf4")
        wrong = quantization.load_bitsandbytes().functional.dequantize_4bit(packed, state)
        assert not torch.allclose(wrong, unpacked(linear.weight.detach(), False), atol=1e-3)
        return
    quantization.quantize_(model, double_quant=double_quant)

    y = model(x)
    y.sum().backward()

    torch.testing.assert_close(y, nn.functional.linear(x, restored, linear.bias), rtol=1e-5, atol=1e-5)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, restored.sum(dim=0).expand(4, -1), rtol=1e-5, atol=1e-5)


def test_sizes_that_the_cpu_unpacks_wrongly_are_planned_all_the_same() -> None:
    model = nn.Sequential(nn.Linear(4304, 1152, device="meta"))
    quantization.quantize_(model, double_quant=False)
    layer: Any = model[0]
    assert layer.weight.numel() == 4304 * 1152 // 2
    assert [constant.numel() for constant in counting.quantization_constants(layer.weight)] == [4304 * 1152 // 64, 16]


def test_a_weight_is_rounded_block_by_block_whatever_its_rows() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(formats.dequantized(weight, "nf4"), unpacked(weight, False), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("inputs", [64, 576, 4096])
def test_whole_blocks_in_a_row_are_unpacked_right(inputs: int) -> None:
    assert layers._unpacks(inputs, "nf4")
    assert layers._unpacks(inputs, "fp4")


@pytest.mark.parametrize("quant_format", ["nf4", "int8"])
def test_a_conv1d_is_quantized_as_the_linear_layer_that_it_is(quant_format: str) -> None:
    from transformers.pytorch_utils import Conv1D

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = Conv1D(192, 64)  # outputs, inputs; its weight is (64, 192)
        nn.init.normal_(conv.bias)
        linear = nn.Linear(64, 192)
    linear.weight, linear.bias = nn.Parameter(conv.weight.detach().t().contiguous()), conv.bias
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    exact = conv(x)
    models = [nn.Sequential(conv), nn.Sequential(linear)]
    for model in models:
        quantization.quantize_(model, quant_format=quant_format)

    assert models[0][0].weight.shape == models[1][0].weight.shape
    assert (models[0][0].in_features, models[0][0].out_features) == (64, 192)
    torch.testing.assert_close(models[0](x), models[1](x), rtol=0, atol=0)
    assert ((models[0](x) - exact).norm() / exact.norm()).item() < 0.2


def gpt2(**changes: Any) -> PreTrainedModel:
    quantization.load_bitsandbytes()
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **changes)).train()


def test_gpt2_is_quantized_layer_by_layer_and_peft_adapts_it() -> None:
    model = gpt2()
    quantization.quantize_(model)
    assert len(layers_of(model, "Linear4bit")) == 2 * 4
    from peft_gauge.training import methods

    attached = methods.attach(model, methods.LORA)
    attached(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad is not None for p in attached.parameters() if p.requires_grad)


def test_the_output_head_is_left_alone_whatever_its_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.embed_out = nn.Linear(64, 64), nn.Linear(64, 64)

        def get_output_embeddings(self) -> nn.Module:
            return self.embed_out

    model = Named()
    quantization.quantize_(model)
    assert [type(module).__name__ for module in model.children()] == ["Linear4bit", "Linear"]
    assert quantization.output_heads(toy_llama()) == ["lm_head"]
    assert quantization.output_heads(nn.Sequential()) == ["lm_head"]


def test_what_is_left_is_named_once_for_all_layers() -> None:
    model = toy_llama()
    quantization.quantize_(model)
    left = {where: sum(p.numel() for p in held) for where, held in quantization.left_unquantized(model).items()}
    assert left == {"model.embed_tokens": 256 * 64, "lm_head": 256 * 64, "norms and biases": (2 * 2 + 1) * 64}


def test_a_mixer_that_multiplies_by_a_weight_itself_is_refused_whole() -> None:
    quantization.load_bitsandbytes()
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=1, state_size=8))
    with pytest.raises(GaugeError, match="its MambaMixer multiplies by the weight of dt_proj directly"):
        quantization.quantize_(model)
    assert not layers_of(model, "Linear4bit")


def test_falcons_own_linear_class_is_named() -> None:
    quantization.load_bitsandbytes()
    from transformers import FalconConfig, FalconForCausalLM

    sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(GaugeError, match="linear layers are of its own class FalconLinear, which transformers'"):
        quantization.quantize_(FalconForCausalLM(FalconConfig(**sizes)))


@pytest.mark.parametrize(
    ("quant_format", "lora_class"), [("nf4", "Linear4bit"), ("fp4", "Linear4bit"), ("int8", "Linear8bitLt")]
)
def test_peft_attaches_its_quantized_lora_layer_and_trains_it(quant_format: str, lora_class: str) -> None:
    model = toy_llama(dtype=torch.bfloat16)
    quantization.quantize_(model, quant_format=quant_format, compute_dtype=torch.bfloat16)
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    prepared = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert prepared.is_gradient_checkpointing  # PEFT turns it on only for a model that it takes for quantized
    adapted = get_peft_model(prepared, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.train()
    layers = [m for m in adapted.modules() if type(m).__module__ == "peft.tuners.lora.bnb"]
    assert [type(layer).__name__ for layer in layers] == [lora_class] * 4

    adapted(input_ids=token_ids(), labels=token_ids()).loss.backward()

    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 4
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trainable.values())


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_model_takes_the_bytes_that_arithmetic_says(double_quant: bool) -> None:
    model = toy_llama()
    before = counting.count(model)
    quantization.quantize_(model, double_quant=double_quant)
    after = counting.count(model)

    # A layer: q 64×64, k and v 32×64, o 64×64, gate, up and down 128×64; with one set of codebooks a weight.
    numels = 2 * [64 * 64, 32 * 64, 32 * 64, 64 * 64, 128 * 64, 128 * 64, 128 * 64]
    bits = [n * formats.bits_per_parameter("nf4", double_quant=double_quant, numel=n) for n in numels]
    codebook_bytes = 4 * (16 + 256 * double_quant)
    assert after.total_params == before.total_params
    assert before.weight_bytes - after.weight_bytes == sum(
        4 * n - b / 8 - codebook_bytes for n, b in zip(numels, bits, strict=True)
    )


def test_full_precision_weights_are_let_go() -> None:
    model = toy_llama()
    weights = [weakref.ref(layer.weight) for layer in layers_of(model, "Linear")]
    quantization.quantize_(model)
    gc.collect()
    assert [weight() is None for weight in weights] == [True] * 14 + [False]  # lm_head keeps its own


def test_marks_are_those_that_transformers_sets() -> None:
    four, eight = toy_llama(dtype=torch.bfloat16), toy_llama()
    quantization.quantize_(four, quant_format="fp4", double_quant=False, compute_dtype=torch.bfloat16)
    quantization.quantize_(eight, quant_format="int8")

    assert four.is_quantized
    assert four.is_loaded_in_4bit
    assert four.quantization_method == "bitsandbytes"
    config = four.config.quantization_config
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "fp4", False)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert eight.is_loaded_in_8bit
    assert not getattr(eight, "is_loaded_in_4bit", False)


def test_a_tied_head_stays_tied_even_if_not_skipped() -> None:
    model = toy_llama(tied=True)
    quantization.quantize_(model, skip=())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len(layers_of(model, "Linear4bit")) == 14


def test_skipped_layers_are_left_alone() -> None:
    model = toy_llama()
    quantization.quantize_(model, skip=("lm_head", "down_proj", "model.layers.0.self_attn.q_proj", "proj"))
    left = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert left == {
        "lm_head",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.0.self_attn.q_proj",
    }


def test_a_subclass_of_linear_is_left_alone() -> None:
    # Multi-head attention reads the weight of such a layer and never calls it.
    model = nn.Sequential(nn.Linear(64, 64), nn.MultiheadAttention(64, 2))
    quantization.quantize_(model)
    assert [type(m).__name__ for m in model.modules()][1:] == [
        "Linear4bit",
        "MultiheadAttention",
        "NonDynamicallyQuantizableLinear",
    ]


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_keeps_its_mode(training: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 64)).train(training)
    quantization.quantize_(model)
    assert model[0].training is training


@pytest.mark.parametrize("quant_format", ["nf4", "int8"])
@pytest.mark.parametrize("mode", ["before real", "after real"])
def test_a_fake_model_has_the_shapes_and_bytes_of_a_real_one(quant_format: str, mode: str) -> None:
    def quantized() -> tuple[list[tuple[str, tuple[int, ...], torch.dtype]], counting.ParameterCount]:
        model = toy_llama()
        quantization.quantize_(model, quant_format=quant_format)
        counted = counting.count(model)
        model(input_ids=torch.zeros((1, 8), dtype=torch.long)).logits.sum().backward()
        gradient = model.get_input_embeddings().weight.grad
        assert gradient is not None
        assert gradient.shape == (256, 64)
        return [(name, tuple(p.shape), p.dtype) for name, p in model.named_parameters()], counted

    real = quantized() if mode == "after real" else None
    with FakeTensorMode():
        fake = quantized()
    # A codebook that was left fake in bitsandbytes' cache would break a real call that follows.
    assert fake == (real or quantized())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_format", quantization.LAYER_FORMATS)
@pytest.mark.parametrize("sizes", [(128, 192), (100, 60), (5, 3)])
def test_on_meta_layers_and_constants_are_those_of_real_ones(
    quant_format: str, double_quant: bool, sizes: tuple[int, int]
) -> None:
    def described(device: str) -> tuple[list[Any], counting.ParameterCount]:
        model = nn.Sequential(nn.Linear(*sizes, device=device))
        quantization.quantize_(model, quant_format=quant_format, double_quant=double_quant)
        layer: Any = model[0]
        constants = [(tuple(t.shape), t.dtype) for t in counting.quantization_constants(layer.weight)]
        return [type(layer), tuple(layer.weight.shape), layer.weight.dtype, *constants], counting.count(model)

    assert described("meta") == described("cpu")


# --- errors


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv1d(4, 4, 1)), "no linear layer"),
        (nn.Sequential(nn.MultiheadAttention(64, 2)), "its own class NonDynamicallyQuantizableLinear"),
        (nn.Sequential(nn.Linear(64, 64, dtype=torch.float64)), "float64"),
    ],
)
def test_a_model_that_cannot_be_quantized_is_refused_whole(model: nn.Module, message: str) -> None:
    classes = [type(module) for module in model.modules()]
    with pytest.raises(GaugeError, match=message):
        quantization.quantize_(model)
    assert [type(module) for module in model.modules()] == classes


def test_a_second_quantization_is_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    quantization.quantize_(model)
    with pytest.raises(GaugeError, match="quantized already"):
        quantization.quantize_(model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantization.quantize_(nn.Sequential(nn.Linear(64, 64)), quant_format="nf3"), "'nf3'.*nf4"),
        (lambda: formats.dequantized(torch.ones(64), "int5"), "'int5'.*int4"),
        (lambda: formats.dequantized(torch.ones(65), "nf4"), "65 weights"),
        (lambda: formats.dequantized(torch.ones(64), "int4", double_quant=True), "double quantization"),
        (lambda: formats.quantization_error(torch.zeros(64), "nf4"), "zero"),
        (lambda: formats.levels("int4-minmax"), "int4-minmax"),
        (lambda: formats.bits_per_parameter("int8"), "int8"),
        (lambda: drawn_weight("cauchy", 0), "cauchy"),
        (lambda: already_rounded(torch.ones(33)), "33 weights"),
        (lambda: Samples([]), "no weights"),
    ],
)
def test_bad_input_is_one_clear_line(call: Any, message: str) -> None:
    with pytest.raises(GaugeError, match=message):
        call()


def test_an_old_bitsandbytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_installed", lambda: "0.45.5")
    with pytest.raises(GaugeError, match=r"0\.45\.5 is too old"):
        quantization.load_bitsandbytes()
    monkeypatch.setattr(library, "_installed", lambda: "0.47.0.dev0")
    quantization.load_bitsandbytes()


def test_a_missing_bitsandbytes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(GaugeError, match="bitsandbytes cannot be imported"):
        quantization.load_bitsandbytes()


def test_only_the_notice_about_the_optional_kernel_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    quantization.load_bitsandbytes()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    monkeypatch.setattr(handler, "emit", lambda record: messages.append(record.getMessage()))
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "propagate", False)
    logging.getLogger("bitsandbytes").setLevel(logging.WARNING)  # a plan may have raised it; it is put back
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. More", "No module")
    logger.warning("the library could not be loaded")
    assert messages == ["the library could not be loaded"]
