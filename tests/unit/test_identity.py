"""The LoRA identity's bounds against truths known beforehand.

Honest computations, in every dtype and at every size, stay inside them (the truth being exact rational arithmetic
where that is affordable, and float64 beyond); planted errors, down to a single unit in the last place, do not.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from peft_gauge import identity
from peft_gauge.errors import GaugeError
from peft_gauge.identity import Adapter, Bounded, IdentityCheck, LoraCase

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 3, 8, 17, 64, 200, 512, 2048)
# What an error planted in one layer is looked for in: a layer of each dtype and size.
LAYERS = [(dtype, size) for dtype in DTYPES for size in SIZES]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32 - 1)
# As many short sums as long ones are drawn: a plain choice from all lengths would hold hardly any short one.
lengths = st.one_of(st.integers(1, 20), st.integers(21, 256))


def also_the_longest(test: Callable[..., None]) -> Callable[..., None]:
    """With one layer of each dtype as wide as those of a large model; a bound of it takes a while."""
    for dtype in DTYPES:
        test = example(dtype=dtype, size=2048, seed=0)(test)
    return test


def random_case(size: int, dtype: torch.dtype, *, num_adapters: int = 1, **changes: Any) -> LoraCase:
    """`size` inputs, a few outputs, rank 8, scaling 2."""
    shape = {"out_features": 24, "in_features": size, "ranks": [8] * num_adapters, "scalings": [2.0] * num_adapters}
    return identity.random_case(**{**shape, "dtype": dtype, **changes})


def dyadic_case(size: int, dtype: torch.dtype, *, seed: int = 0) -> LoraCase:
    return identity.dyadic_case(
        out_features=24, in_features=size, ranks=[8, 4], scalings=[0.25, 4.0], dtype=dtype, seed=seed
    )


# Exact rational arithmetic.

Rows = list[list[Fraction]]


def rational(tensor: torch.Tensor) -> Rows:
    return [[Fraction(float(element)) for element in row] for row in tensor.double()]


def product(left: Rows, right: Rows) -> Rows:
    columns = list(zip(*right, strict=True))
    return [[sum((a * b for a, b in zip(row, column, strict=True)), Fraction()) for column in columns] for row in left]


def rational_output(case: LoraCase) -> Rows:
    """(W0 + s B A) x, row by row of the input, without any rounding; s is the factor that the kernels take."""
    weight = rational(case.weight)
    for adapter in case.adapters:
        taken = torch.tensor(adapter.scaling, dtype=identity.accumulator(case.weight.dtype))
        update = product(rational(adapter.up), rational(adapter.down))
        scale = Fraction(float(taken))
        weight = [[w + scale * d for w, d in zip(ws, ds, strict=True)] for ws, ds in zip(weight, update, strict=True)]
    return product(rational(case.x), [list(column) for column in zip(*weight, strict=True)])


def within(computed: torch.Tensor, exact: Rows, bound: torch.Tensor) -> bool:
    errors = [
        abs(Fraction(float(got)) - wanted) <= Fraction(float(most))
        for got_row, wanted_row, most_row in zip(computed.double(), exact, bound, strict=True)
        for got, wanted, most in zip(got_row, wanted_row, most_row, strict=True)
    ]
    return all(errors)


@given(dtype=dtypes, size=st.integers(1, 12), input_size=st.sampled_from([2.0**-16, 1.0]), seed=seeds)
def test_neither_side_leaves_its_bound_of_the_exact_value(
    dtype: torch.dtype, size: int, input_size: float, seed: int
) -> None:
    case = random_case(
        size, dtype, num_adapters=2, out_features=6, ranks=[3, 2], scalings=[2 / 3, 5.0], input_size=input_size,
        batch_shape=(3,), seed=seed,
    )  # fmt: skip
    exact = rational_output(case)

    assert within(case.decomposed(), exact, case.decomposed_bound().bound)
    assert within(case.merged(), exact, case.merged_bound().bound)


@every_dtype
def test_the_worst_case_holds_for_data_that_is_not_random(dtype: torch.dtype) -> None:
    """Equal terms round the same way at each step, against which no quadrature helps."""
    ones = torch.full((3, 4000), 1 / 3, dtype=dtype)
    tracked = Bounded.of(ones) @ Bounded.of(ones).T

    error = (ones @ ones.T).double() - 4000 * ones[0, 0].double() ** 2

    assert (error.abs() <= tracked.worst).all()


@also_the_longest
@given(dtype=dtypes, size=lengths, seed=seeds)
def test_honest_sides_agree(dtype: torch.dtype, size: int, seed: int) -> None:
    found = random_case(size, dtype, num_adapters=2, seed=seed).check()

    assert found.holds, found
    assert found.bound > 0


@example(dtype=torch.bfloat16, size=2048, seed=0)
@given(dtype=st.sampled_from([torch.bfloat16, torch.float16]), size=lengths, seed=seeds)
def test_float32_adapters_over_a_16bit_base(dtype: torch.dtype, size: int, seed: int) -> None:
    case = random_case(size, dtype, adapter_dtype=torch.float32, seed=seed)

    assert case.decomposed().dtype == case.decomposed_bound().dtype == dtype
    assert case.check().holds


# Planted errors.


@also_the_longest
@given(dtype=dtypes, size=lengths, seed=seeds)
def test_on_dyadic_numbers_one_unit_in_the_last_place_fails(dtype: torch.dtype, size: int, seed: int) -> None:
    case = dyadic_case(size, dtype, seed=seed)
    expected = case.merged()
    planted = case.decomposed()
    assert case.check() == IdentityCheck(max_error=0, bound=0, share_of_bound=0)

    planted[-1, -1] = torch.nextafter(planted[-1, -1], torch.tensor(math.inf, dtype=dtype))

    assert not identity.check(planted, expected, case.decomposed_bound(), case.merged_bound()).holds


@cache
def layer(dtype: torch.dtype, size: int, num_adapters: int) -> tuple[LoraCase, torch.Tensor, Bounded, Bounded]:
    """A layer of random numbers, its output once it is merged, and the bounds of the two sides."""
    case = random_case(size, dtype, num_adapters=num_adapters)
    return case, case.merged(), case.decomposed_bound(), case.merged_bound()


def passed(dtype: torch.dtype, size: int, wrong: Callable[[LoraCase], torch.Tensor], num_adapters: int) -> bool:
    """Whether ``wrong``'s output of a layer passes for the one of the merged layer."""
    case, merged, *bounds = layer(dtype, size, num_adapters)
    return identity.check(wrong(case), merged, *bounds).holds


def test_a_few_units_fail() -> None:
    """A unit: unit roundoff × length of the sums × magnitudes, written out here without the code under test."""

    def planted(case: LoraCase) -> torch.Tensor:
        (adapter,) = case.adapters
        x, weight, down, up = (one.double().abs() for one in (case.x, case.weight, adapter.down, adapter.up))
        magnitudes = x @ weight.T + adapter.scaling * (x @ down.T @ up.T)
        summed = case.weight.shape[1] + adapter.down.shape[0]
        unit = torch.finfo(case.weight.dtype).eps / 2 * summed * magnitudes
        output = case.decomposed().double()
        output[0, 0] += 4 * unit[0, 0]
        return output

    assert [each for each in LAYERS if passed(*each, planted, num_adapters=1)] == []


def test_the_bound_grows_like_the_square_root_of_the_size() -> None:
    """In units of roundoff × the output's typical size: what is hidden from the check, at most."""
    for dtype, size in LAYERS:
        case, merged, *_ = layer(dtype, size, 1)
        unit = torch.finfo(dtype).eps / 2 * merged.double().square().mean().sqrt()
        summed_in_float32 = dtype in (torch.bfloat16, torch.float16)
        allowed = 120.0 if summed_in_float32 else 120.0 + 60 * math.sqrt(size)

        assert case.check().bound <= allowed * unit, (dtype, size)


def in_each(change: Callable[[Adapter[torch.Tensor]], Adapter[torch.Tensor]]) -> Callable[[LoraCase], LoraCase]:
    return lambda case: replace(case, adapters=tuple(change(adapter) for adapter in case.adapters))


MISTAKES: dict[str, Callable[[LoraCase], LoraCase]] = {
    "alpha over the root of the rank": in_each(lambda one: one._replace(scaling=one.scaling * math.sqrt(8))),
    "no scaling": in_each(lambda one: one._replace(scaling=1.0)),
    "a scaling 10% off": in_each(lambda one: one._replace(scaling=one.scaling * 1.1)),
    "a rank component dropped": in_each(lambda one: one._replace(down=one.down[1:], up=one.up[:, 1:])),
    "B in another order": in_each(lambda one: one._replace(up=one.up.flip(1))),
    "B transposed in memory": in_each(lambda one: one._replace(up=one.up.T.reshape(one.up.shape))),
    "B negated": in_each(lambda one: one._replace(up=-one.up)),
    "an adapter forgotten": lambda case: replace(case, adapters=case.adapters[:-1]),
    "an adapter added twice": lambda case: replace(case, adapters=case.adapters + case.adapters[-1:]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistaken_layer_fails(mistake: str) -> None:
    def wrong(case: LoraCase) -> torch.Tensor:
        return MISTAKES[mistake](case).decomposed()

    assert [each for each in LAYERS if passed(*each, wrong, num_adapters=2)] == []


def test_tf32_fails_as_float32() -> None:
    """TF32 keeps 10 of float32's 23 stored significand bits of each operand; here they are cut off by hand."""

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.view(torch.int32) & ~0x1FFF).view(torch.float32)

    for size in SIZES:
        case = dyadic_case(size, torch.float32)
        rounded = replace(case, weight=cut(case.weight)).decomposed()

        assert not torch.equal(cut(case.weight), case.weight)
        found = identity.check(rounded, case.merged(), case.decomposed_bound(), case.merged_bound())
        assert not found.holds, size


# Merging and unmerging.


def merge_and_unmerge(case: LoraCase, taken_off: Sequence[torch.Tensor] | None = None) -> IdentityCheck:
    deltas = [identity.delta(adapter) for adapter in case.adapters]
    restored = identity.unmerge(identity.merge(case.weight, deltas), deltas if taken_off is None else taken_off)
    exact = [Bounded.of(one) for one in deltas]
    bound = identity.unmerge(identity.merge(Bounded.of(case.weight), exact), exact)
    torch.testing.assert_close(bound.value, case.weight.double(), rtol=1e-12, atol=1e-12)
    return identity.check(restored, case.weight, bound)


@also_the_longest
@given(dtype=dtypes, size=lengths, seed=seeds)
def test_unmerging_restores_the_weight(dtype: torch.dtype, size: int, seed: int) -> None:
    case = random_case(size, dtype, num_adapters=2, seed=seed)
    deltas = [identity.delta(adapter) for adapter in case.adapters]

    assert merge_and_unmerge(case).holds
    assert not merge_and_unmerge(case, taken_off=[]).holds
    assert not merge_and_unmerge(case, taken_off=[deltas[0], deltas[1] * 1.1]).holds


@every_dtype
def test_unmerging_dyadic_numbers_leaves_nothing_behind(dtype: torch.dtype) -> None:
    assert merge_and_unmerge(dyadic_case(64, dtype)) == IdentityCheck(0, 0, 0)


# The parts.


def test_scaling() -> None:
    assert identity.scaling(8, 16) == 2
    assert identity.scaling(16, 16, rank_stabilised=True) == 4


def test_gamma() -> None:
    assert identity.gamma(1, 0.25) == pytest.approx(1 / 3)
    assert identity.gamma(512, 2.0**-24) == pytest.approx(512 / (2**24 - 512))
    with pytest.raises(GaugeError, match="use a wider dtype"):
        identity.gamma(4, 0.25)


@pytest.mark.parametrize(
    ("dtype", "digits"), [(torch.float64, 53), (torch.float32, 24), (torch.bfloat16, 8), (torch.float16, 11)]
)
def test_the_unit_roundoff_is_half_a_unit_in_the_last_place(dtype: torch.dtype, digits: int) -> None:
    assert identity.precision(dtype).unit == 2.0**-digits


@every_dtype
def test_a_python_factor_is_taken_in_the_accumulators_dtype(dtype: torch.dtype) -> None:
    """What the bounds say of `tensor * scaling`, asked of the kernels."""
    numbers = torch.randn(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = numbers.to(identity.accumulator(dtype))

    assert torch.equal(numbers * 0.3, (wide * torch.tensor(0.3, dtype=wide.dtype)).to(dtype))


@pytest.mark.parametrize(
    ("values", "grid"),
    [([6.0, -20.0], 2.0), ([0.75, 1024.0, 0.0], 0.25), ([1 / 3], 2.0**-54), ([5e-324], 5e-324), ([0.0], math.inf)],
)
def test_the_grid_is_the_last_digit_in_use(values: list[float], grid: float) -> None:
    assert Bounded.of(torch.tensor(values, dtype=torch.float64)).grid == grid


@every_dtype
def test_integers_up_to_the_significand_are_added_exactly_and_no_further(dtype: torch.dtype) -> None:
    most = round(1 / identity.precision(dtype).unit)
    one = Bounded.of(torch.ones(1, dtype=dtype))

    assert (one + Bounded.of(torch.tensor([most - 2], dtype=dtype))).bound.item() == 0
    beyond = one + Bounded.of(torch.tensor([most], dtype=dtype))
    assert beyond.bound.item() >= 1  # most + 1 is rounded to most


def test_subnormal_float16_results_are_excused_by_underflow() -> None:
    small = torch.tensor([[2.0**-13 + 2.0**-23]], dtype=torch.float16)
    exact = Bounded.of(small) * (2.0**-10 + 2.0**-20)

    found = identity.check(small * (2.0**-10 + 2.0**-20), exact.value, exact)

    assert 0 < found.max_error <= 2.0**-25
    assert found.holds


def test_values_that_overflow_are_refused() -> None:
    case = random_case(8, torch.float16, scalings=[1e5])

    with pytest.raises(GaugeError, match=r"overflows torch\.float16"):
        case.check()


def test_share_of_bound() -> None:
    def share(error: float, bound: float) -> float:
        return identity.share_of_bound(torch.tensor([0.1, error]), torch.tensor([1.0, bound]))

    assert share(1, 4) == 0.25
    assert share(0, 0) == pytest.approx(0.1)
    assert share(1, 0) == share(math.nan, 1) == share(math.inf, 1) == math.inf
    assert identity.share_of_bound(torch.ones(0), torch.ones(0)) == 0


def test_an_output_that_is_not_a_number_does_not_hold() -> None:
    case = random_case(8, torch.float32)
    broken = case.decomposed()
    broken[0, 0] = math.nan

    assert not identity.check(broken, case.merged(), case.merged_bound()).holds


def test_tensors_of_two_shapes_are_refused() -> None:
    case = random_case(8, torch.float32)

    with pytest.raises(GaugeError, match="differ"):
        identity.check(case.decomposed(), case.merged()[0], case.merged_bound())


def test_an_empty_batch_holds() -> None:
    assert random_case(8, torch.float32, batch_shape=(0,)).check() == IdentityCheck(0, 0, 0)


def test_the_textbook_case() -> None:
    found = identity.textbook_case()

    assert found.holds
    assert 0 < found.max_error < found.bound < 1e-3
    assert found == identity.textbook_case(seed=0) != identity.textbook_case(seed=1)


def test_full_precision_is_restored() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with identity.full_precision():
            inside = torch.get_float32_matmul_precision()
        after = torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)

    assert (inside, after) == ("highest", "medium")
