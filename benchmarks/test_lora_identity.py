"""Is a merged LoRA layer the same function as the unmerged layer?

In exact arithmetic, W0 x + s B A x = (W0 + s B A) x. In floating point the two sides differ by no more than rounding
explains: each comparison is checked against the bound that `peft_gauge.identity` derives for exactly the operations
that were run (unit roundoff × length of the sums × magnitudes, after Higham 2002; see there for the derivation and its
sources). With dyadic numbers nothing is rounded, and the two sides must agree to the last bit.

Checked for the bare algebra and for PEFT's own layers: one adapter and two, alpha/r and rsLoRA's alpha/sqrt(r), merged
and unmerged again, over a float base and a 4-bit one. The Hypothesis profile sets the number of drawn layers
(`fixtures/hypothesis_profiles.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from peft_gauge import identity
from peft_gauge.identity import Bounded, IdentityCheck, LoraCase
from peft_gauge.training.quantization import import_peft, load_bitsandbytes, uncompiled

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.quick

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, scope="module")
def full_precision() -> Iterator[None]:
    with identity.full_precision(), torch.no_grad():
        yield


# Strategies.


class Recipe(NamedTuple):
    """The settings of an adapter."""

    rank: int
    alpha: int
    rank_stabilised: bool

    @property
    def scaling(self) -> float:
        return identity.scaling(self.rank, self.alpha, rank_stabilised=self.rank_stabilised)


@dataclass(frozen=True)
class Layer:
    """A drawn layer: the settings of its adapters, and their values."""

    recipes: tuple[Recipe, ...]
    case: LoraCase


batch_shapes = st.sampled_from([(), (1,), (7,), (2, 5), (3, 1, 2)])
features = st.integers(1, 96) | st.sampled_from([128, 256, 512])
seeds = st.integers(0, 2**32 - 1)
recipes = st.builds(
    Recipe,
    rank=st.integers(1, 16) | st.sampled_from([32, 64]),
    alpha=st.integers(1, 64),
    rank_stabilised=st.booleans(),
)


@st.composite
def layers(
    draw: st.DrawFn, *, num_adapters: int = 1, dtypes: tuple[torch.dtype, ...] = DTYPES, mixed: bool = False
) -> Layer:
    """Layers of random numbers; `mixed` ones may have float32 adapters over a 16-bit base, as in PEFT."""
    chosen = tuple(draw(recipes) for _ in range(num_adapters))
    dtype = draw(st.sampled_from(dtypes))
    wide = torch.promote_types(dtype, torch.float32)
    case = identity.random_case(
        out_features=draw(features),
        in_features=draw(features),
        ranks=[recipe.rank for recipe in chosen],
        scalings=[recipe.scaling for recipe in chosen],
        dtype=dtype,
        adapter_dtype=draw(st.sampled_from([dtype, wide])) if mixed else dtype,
        batch_shape=draw(batch_shapes),
        # The smallest makes float16 results subnormal.
        input_size=draw(st.sampled_from([2.0**-16, 2.0**-6, 1.0, 4.0])),
        seed=draw(seeds),
    )
    return Layer(chosen, case)


@st.composite
def dyadic_layers(draw: st.DrawFn, *, num_adapters: int = 1) -> Layer:
    """Layers whose every partial result fits the significand; ranks are squares, so that rsLoRA's scalings fit too."""
    chosen = []
    for _ in range(num_adapters):
        rank, stabilised = draw(st.sampled_from([1, 4, 16, 64])), draw(st.booleans())
        # Scaling 1/4 needs alpha = r/4: PEFT only takes whole numbers.
        factors = [1, 2, 4] if stabilised or rank == 1 else [0.25, 0.5, 1, 2, 4]
        divisor = round(rank**0.5) if stabilised else rank
        chosen.append(Recipe(rank, round(draw(st.sampled_from(factors)) * divisor), stabilised))
    case = identity.dyadic_case(
        out_features=draw(features),
        in_features=draw(features),
        ranks=[recipe.rank for recipe in chosen],
        scalings=[recipe.scaling for recipe in chosen],
        dtype=draw(st.sampled_from(DTYPES)),
        batch_shape=draw(batch_shapes),
        seed=draw(seeds),
    )
    return Layer(tuple(chosen), case)


# The algebra.


@pytest.mark.untimed
def test_the_textbook_layer() -> None:
    found = identity.textbook_case()

    assert found.holds, found


@pytest.mark.untimed
@given(layer=layers())
def test_one_adapter(layer: Layer) -> None:
    found = layer.case.check()

    assert found.holds, found


@pytest.mark.untimed
@given(layer=layers(num_adapters=2))
def test_two_adapters_added(layer: Layer) -> None:
    found = layer.case.check()

    assert found.holds, found


@pytest.mark.untimed
@given(layer=dyadic_layers(num_adapters=2))
def test_dyadic_numbers_leave_no_error_at_all(layer: Layer) -> None:
    found = layer.case.check()

    assert found == IdentityCheck(max_error=0, bound=0, share_of_bound=0)


@pytest.mark.untimed
@given(layer=layers(num_adapters=2))
def test_merge_then_unmerge(layer: Layer) -> None:
    deltas = [identity.delta(adapter) for adapter in layer.case.adapters]

    restored = identity.unmerge(identity.merge(layer.case.weight, deltas), deltas)

    found = identity.check(restored, layer.case.weight, restored_bound(layer.case.weight, deltas))
    assert found.holds, found


# PEFT's own layers.


@pytest.mark.untimed
@given(layer=layers(mixed=True))
def test_one_adapter_in_peft(layer: Layer) -> None:
    assert_peft_keeps_the_identity(layer)


@pytest.mark.untimed
@given(layer=layers(num_adapters=2, mixed=True))
def test_two_adapters_in_peft(layer: Layer) -> None:
    assert_peft_keeps_the_identity(layer)


@pytest.mark.untimed
@given(layer=dyadic_layers(num_adapters=2))
def test_dyadic_numbers_leave_no_error_in_peft(layer: Layer) -> None:
    case, linear = layer.case, peft_linear(layer, float_base(layer.case))

    unmerged = linear(case.x)
    linear.merge()

    assert torch.equal(unmerged, linear(case.x))
    linear.unmerge()
    assert torch.equal(linear.get_base_layer().weight, case.weight)


@pytest.mark.skipif(
    Version(metadata.version("bitsandbytes")) < Version("0.49"),
    reason="before 0.49 bitsandbytes' CPU code fails or crashes on a 4-bit weight of few elements",
)
@given(layer=layers(dtypes=(torch.float32, torch.bfloat16, torch.float16)))
# bitsandbytes compiles some operators on a CPU, which takes 20 s the first time, even for a few elements.
@uncompiled()
def test_a_4bit_base(layer: Layer) -> None:
    """QLoRA's layer is a LoRA layer over the dequantized weight.

    The merge is done on that weight: PEFT's own merge into 4 bit quantizes again, which no rounding bound covers.
    """
    base = nf4_base(layer.case)
    dequantized = load_bitsandbytes().functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    # One packed byte, two elements, is a single row, which the library treats as a transposed weight.
    dequantized = dequantized.reshape(layer.case.weight.shape)
    case = LoraCase(dequantized, layer.case.adapters, layer.case.x)

    unmerged = peft_linear(layer, base)(case.x)

    found = identity.check(unmerged, case.merged(), case.decomposed_bound(), case.merged_bound())
    assert found.holds, found
    assert_is_what_the_algebra_says(unmerged, case.decomposed_bound())


def assert_peft_keeps_the_identity(layer: Layer) -> None:
    """Check the unmerged and the merged output against each other and the exact one, and the restored weight."""
    case, linear = layer.case, peft_linear(layer, float_base(layer.case))
    assert list(linear.scaling.values()) == [recipe.scaling for recipe in layer.recipes]
    deltas = [linear.get_delta_weight(name) for name in linear.active_adapters]

    unmerged = linear(case.x)
    linear.merge()
    merged = linear(case.x)
    linear.unmerge()
    restored = linear.get_base_layer().weight

    found = identity.check(unmerged, merged, case.decomposed_bound(), case.merged_bound())
    assert found.holds, found
    assert_is_what_the_algebra_says(unmerged, case.decomposed_bound())
    assert_is_what_the_algebra_says(merged, case.merged_bound())
    returned = identity.check(restored, case.weight, restored_bound(case.weight, deltas))
    assert returned.holds, returned


def assert_is_what_the_algebra_says(computed: torch.Tensor, expected: Bounded) -> None:
    """Compare with the float64 value, in case both sides are wrong together. A float64 layer's value has errors too."""
    bounds = [expected, expected] if expected.dtype == torch.float64 else [expected]
    found = identity.check(computed, expected.value, *bounds)
    assert found.holds, found


def restored_bound(weight: torch.Tensor, deltas: list[torch.Tensor]) -> Bounded:
    """The bound on the residue of a merge. Deltas are inputs: the same rounded ones are added and subtracted."""
    given_deltas = [Bounded.of(delta) for delta in deltas]
    return identity.unmerge(identity.merge(Bounded.of(weight), given_deltas), given_deltas)


def float_base(case: LoraCase) -> torch.nn.Module:
    base = torch.nn.Linear(case.weight.shape[1], case.weight.shape[0], bias=False, dtype=case.weight.dtype)
    base.weight.copy_(case.weight)
    return base


def nf4_base(case: LoraCase) -> Any:
    """The weight in 4-bit NormalFloat with double quantization, as in QLoRA."""
    bitsandbytes = load_bitsandbytes()
    out_features, in_features = case.weight.shape
    base = bitsandbytes.nn.Linear4bit(
        in_features, out_features, bias=False, compute_dtype=case.weight.dtype, quant_type="nf4"
    )
    base.weight = bitsandbytes.nn.Params4bit(case.weight, requires_grad=False, quant_type="nf4")
    return base.to("cpu")


def peft_linear(layer: Layer, base: torch.nn.Module) -> Any:
    """`base` wrapped by PEFT, with every adapter of the layer attached and active."""
    peft = import_peft()

    model: Any = torch.nn.Sequential(OrderedDict(projection=base))
    model.is_loaded_in_4bit = type(base).__name__ == "Linear4bit"  # PEFT chooses its 4-bit layer by this
    names = [f"adapter_{position}" for position in range(len(layer.recipes))]
    configs = [
        peft.LoraConfig(
            target_modules=["projection"],
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            use_rslora=recipe.rank_stabilised,
        )
        for recipe in layer.recipes
    ]
    wrapped: Any = peft.get_peft_model(model, configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        wrapped.add_adapter(name, config)
    linear: Any = wrapped.base_model.model.projection
    linear.set_adapter(names)
    # In the case's dtype, whatever PEFT cast its own to.
    for name, adapter in zip(names, layer.case.adapters, strict=True):
        linear.lora_A[name].weight = torch.nn.Parameter(adapter.down)
        linear.lora_B[name].weight = torch.nn.Parameter(adapter.up)
    return linear
