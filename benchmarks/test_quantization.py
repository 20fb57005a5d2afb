"""What do 4-bit formats lose, on which weights, and how many bits per parameter do they take?

Four formats in blocks of 64: bitsandbytes' NF4 and FP4, with and without double quantization, and two kinds of uniform
integers, symmetric INT4 and 16 equal steps from minimum to maximum. The result on normal weights depends on which of
the two "INT4" means. SmolLM2's real weights come from a GGUF file whose projection matrices were already rounded to a
uniform 4-bit grid: their metrics are recorded with ``rounded_before`` and decide nothing.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest
import torch

from fixtures.weights import sampled, samples_of
from peft_gauge.training.quantization import formats
from peft_gauge.training.quantization.comparison import (
    DISTRIBUTIONS,
    already_rounded,
    compare_nf4,
    drawn_weight,
    nf4_against_int4,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    Record = Callable[..., None]

pytestmark = pytest.mark.untimed

VARIANTS = [
    pytest.param(quant_format, double_quant, id=quant_format + ("-double" if double_quant else ""))
    for quant_format in formats.FOUR_BIT_FORMATS
    for double_quant in ((False, True) if quant_format in ("nf4", "fp4") else (False,))
]
RIVALS = [name for name in formats.FOUR_BIT_FORMATS if name != "nf4"]

ROUNDING = 2e-4  # relative: float32 arithmetic, and FP4 levels that some CPU releases round to 4 digits

# Of the GGUF's matrices only the embedding has 8 bits; the others are examples of weights rounded to 4 bit.
REAL_MATRICES = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.15.mlp.up_proj.weight",
    "model.layers.29.mlp.down_proj.weight",
]


@pytest.mark.parametrize(("quant_format", "double_quant"), VARIANTS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_error_on_drawn_weights(distribution: str, quant_format: str, double_quant: bool, record: Record) -> None:
    weight = drawn_weight(distribution, seed=0)

    error = formats.quantization_error(weight, quant_format, double_quant=double_quant)

    bound = allowed_error(weight, quant_format, double_quant)
    record(**asdict(error), bound_over_absmax=bound)
    assert error.max_over_absmax <= bound * (1 + ROUNDING)


@pytest.mark.parametrize(("quant_format", "double_quant"), VARIANTS)
@pytest.mark.parametrize("matrix", REAL_MATRICES)
def test_error_on_real_weights(
    matrix: str, quant_format: str, double_quant: bool, real_matrices: Mapping[str, Tensor], record: Record
) -> None:
    weight = torch.cat(sampled(real_matrices[matrix]))

    error = formats.quantization_error(weight, quant_format, double_quant=double_quant)

    record(**asdict(error), rounded_before=already_rounded(weight))
    # Real blocks can be too small for float16 constants, and too uneven for the shared ones of double quantization.
    if quant_format != "int4-minmax" and not double_quant:
        assert error.max_over_absmax <= formats.error_bound(quant_format) * (1 + ROUNDING)


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_nf4_against_a_rival_on_drawn_weights(
    distribution: str, rival: str, double_quant: bool, record: Record
) -> None:
    comparison = nf4_against_int4(distribution, rival=rival, double_quant=double_quant)

    record(**comparison.metrics(), nf4_loses_less=comparison.holds)
    assert comparison.unfair is None, "drawn weights were taken for rounded ones"


@pytest.mark.usefixtures("real_matrices")  # which skips without them
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("rival", RIVALS)
def test_nf4_against_a_rival_on_the_real_embedding(rival: str, double_quant: bool, record: Record) -> None:
    samples = samples_of("smollm2-135m", "model.embed_tokens.weight")

    comparison = compare_nf4(samples, rival=rival, double_quant=double_quant)

    record(**comparison.metrics(), nf4_loses_less=comparison.holds)
    assert len(comparison.ratios) >= 6, "too few samples for the sign test"


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("quant_format", ["nf4", "fp4"])
@pytest.mark.parametrize(
    "shape", [(64, 64), (576, 576), (1536, 576), pytest.param((4096, 4096), marks=pytest.mark.slow)], ids=str
)
def test_bits_a_parameter(quant_format: str, double_quant: bool, shape: tuple[int, int], record: Record) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    stored = formats.stored_bytes(*formats.pack(weight, quant_format, double_quant=double_quant))

    computed = formats.bits_per_parameter(quant_format, double_quant=double_quant, numel=weight.numel())
    record(
        computed_bits_per_parameter=computed,
        stored_bits_per_parameter=stored.bits_per_parameter,
        stored_bits_per_parameter_with_codebooks=stored.bits_per_parameter_with_codebooks,
        large_matrix_bits_per_parameter=formats.bits_per_parameter(quant_format, double_quant=double_quant),
    )
    assert stored.bits_per_parameter == computed


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_double_quantization_keeps_absmax_within_its_own_step(distribution: str, record: Record) -> None:
    shift, bound = formats.absmax_shift(drawn_weight(distribution, seed=0))

    record(absmax_shift_over_nested_absmax=shift, bound_over_nested_absmax=bound)
    # bitsandbytes divides in float32: a value near the middle of a gap may go to the farther side.
    assert shift <= bound * 1.005


def allowed_error(weight: Tensor, quant_format: str, double_quant: bool) -> float:
    """The bound of the format, plus the largest relative shift of a block's absmax by double quantization."""
    bound = formats.error_bound(quant_format)
    if double_quant:
        exact = formats.pack(weight, quant_format)[1].absmax
        state = formats.pack(weight, quant_format, double_quant=True)[1]
        _, share = formats.absmax_shift(weight, quant_format)
        unit = state.state2.absmax.repeat_interleave(formats.NESTED_BLOCK_SIZE)[: exact.numel()]
        bound += 1.005 * share * (unit / exact).max().item()
    return bound
