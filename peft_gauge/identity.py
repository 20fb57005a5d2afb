"""The LoRA identity, and bounds on the rounding error between its two sides.

LoRA (Hu et al. 2021, arXiv:2106.09685) rests on one identity, W0 x + s B A x = (W0 + s B A) x. Each side is
implemented once here and used twice: with tensors it is computed, with `Bounded` operands it yields a bound on
the error of that computation. So no tolerance is chosen by hand.

The bounds are a running error analysis in the standard model of floating-point arithmetic (Higham, Accuracy and
Stability of Numerical Algorithms, 2nd edition, 2002: model 2.4, underflow 2.8, inner products 3.1, running
analysis 3.3), element by element, of unit roundoff × length of the sums × magnitudes:

- The worst case. A sum of n products, in any order, with or without fused multiply-add, is off by at most
  gamma_n (|a| . |b|), gamma_n = n u / (1 - n u). It is certain, but grows like n where errors grow like sqrt(n).
- The probable case. Rounding errors of random data have mean zero and are independent, so they add in
  quadrature, and an error beyond `CONFIDENCE` times their spread has probability 2 exp(-CONFIDENCE² / 2)
  (Hoeffding's inequality, as in Higham and Mary 2019, doi:10.1137/18M1226312). The n additions of a sum
  each round a partial sum; with the terms in random order its mean square is at most S² + |p|², S the whole
  sum and |p| the 2-norm of the products (the random data of Higham and Mary 2020, doi:10.1137/20M1314355), so
  the spread is u sqrt(n) sqrt(S² + |p|²).
- No rounding at all, if every partial result is a multiple of one power of two and has few enough digits.
  For such dyadic data the bound is zero, and an error of a single unit in the last place fails at every size.

The bound of an element is the smallest of the three. 16-bit operands are summed in float32 and rounded once.

Shapes: base weight (d, k), down-projection A (r, k), up-projection B (d, r), input (..., k), output (..., d).
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import torch

from peft_gauge.errors import GaugeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Number = TypeVar("Number", torch.Tensor, "Bounded")

CONFIDENCE = 8.0
"""Limit of the probable error, in spreads: one element in 4e13 exceeds it by chance."""


# The algebra: for tensors, and for their bounds.


class Adapter(NamedTuple, Generic[Number]):
    """One low-rank update s B A of a linear layer's weight."""

    down: Number
    """A, the down-projection, (r, k)."""
    up: Number
    """B, the up-projection, (d, r)."""
    scaling: float
    """s, the factor before B A."""


def scaling(rank: int, alpha: float, *, rank_stabilised: bool = False) -> float:
    """The factor before B A: alpha/r (Hu et al. 2021); alpha/sqrt(r) for rsLoRA (Kalajdzievski 2023, 2312.03732)."""
    return alpha / math.sqrt(rank) if rank_stabilised else alpha / rank


def decomposed(x: Number, weight: Number, adapters: Sequence[Adapter[Number]]) -> Number:
    """W0 x + s B A x, one term after the other, as computed by an unmerged layer; (..., k) to (..., d)."""
    y = x @ weight.T
    for adapter in adapters:
        y = y + (x.to(adapter.down.dtype) @ adapter.down.T @ adapter.up.T) * adapter.scaling
    return y.to(weight.dtype)


def delta(adapter: Adapter[Number]) -> Number:
    """s B A, (d, k)."""
    return (adapter.up @ adapter.down) * adapter.scaling


def merge(weight: Number, deltas: Sequence[Number]) -> Number:
    """W0 with every delta added, each sum rounded to the weight's dtype, as in merging in place."""
    for one in deltas:
        weight = (weight + one).to(weight.dtype)
    return weight


def unmerge(weight: Number, deltas: Sequence[Number]) -> Number:
    """A merged weight with the same deltas subtracted, the last one first."""
    for one in reversed(deltas):
        weight = weight - one.to(weight.dtype)
    return weight


def merged(x: Number, weight: Number, adapters: Sequence[Adapter[Number]]) -> Number:
    """(W0 + s B A) x; (..., k) to (..., d)."""
    return x @ merge(weight, [delta(adapter) for adapter in adapters]).T


# The arithmetic that the bounds describe.


class Precision(NamedTuple):
    """The properties of a floating-point format that the error analysis uses."""

    unit: float
    """u, the unit roundoff: half the distance from 1 to the next number."""
    underflow: float
    """Largest loss of one operation near zero, a power of two."""
    largest: float
    """The largest finite number."""


def precision(dtype: torch.dtype) -> Precision:
    """The `Precision` of a floating-point dtype.

    Conversions to float16 keep subnormal numbers, so they lose less than the smallest of them. In the other
    formats some kernels flush subnormal numbers to zero (the AVX-512 bfloat16 dot product does), which loses up
    to the smallest normal number.
    """
    info = torch.finfo(dtype)
    underflow = info.tiny * info.eps if dtype == torch.float16 else info.tiny
    return Precision(info.eps / 2, underflow, info.max)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of accumulated sums: float32 for the 16-bit formats, otherwise the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def gamma(terms: int, unit: float) -> float:
    """gamma_n = n u / (1 - n u), the relative error of n roundings in a row (Higham 2002, lemma 3.1)."""
    if terms * unit >= 1:
        raise GaugeError(f"a sum of {terms} terms cannot be bounded at unit roundoff {unit:g}; use a wider dtype")
    return terms * unit / (1 - terms * unit)


@dataclass(frozen=True)
class Bounded:
    """A tensor within a computation: its exact value, and bounds on its error.

    The tensors are float64 and of one shape. For operands of float32 and below, their own rounding is under 1e-8
    of the bounds. For float64 operands `value` is no more accurate than the computation itself: compare two
    computed tensors instead, and use `value` for magnitudes only.
    """

    value: torch.Tensor
    """The result in exact arithmetic."""
    worst: torch.Tensor
    """Elementwise bound on |computed - exact|, whatever the data."""
    spread: torch.Tensor
    """Elementwise spread of computed - exact for random data (its sub-Gaussian parameter)."""
    grid: float
    """A power of two that divides every element, exact or computed; infinite for zeros."""
    dtype: torch.dtype
    """The dtype in which the computed tensor is stored."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Bounded:
        """An input tensor, hence exact."""
        value = tensor.detach().double()
        nothing = torch.zeros_like(value)
        return cls(value, nothing, nothing, _grid(value), tensor.dtype)

    @property
    def bound(self) -> torch.Tensor:
        """Elementwise bound on |computed - exact|: the smaller of the worst and the probable case."""
        return torch.minimum(self.worst, CONFIDENCE * self.spread)

    @cached_property
    def size(self) -> torch.Tensor:
        """Elementwise bound on the magnitude of the value, exact or computed.

        The error counts twice because `value` itself is computed, in float64.
        """
        return self.value.abs() + 2 * self.worst

    @property
    def T(self) -> Bounded:
        return Bounded(self.value.T, self.worst.T, self.spread.T, self.grid, self.dtype)

    def to(self, dtype: torch.dtype) -> Bounded:
        """Converted: exact into a wider format, rounded once into a narrower one."""
        widens = torch.promote_types(self.dtype, dtype) == dtype
        converted = Bounded(self.value, self.worst, self.spread, self.grid, dtype)
        return converted if widens else converted._rounded(dtype)

    def __matmul__(self, other: Bounded) -> Bounded:
        terms = self.value.shape[-1]
        inner = precision(accumulator(self.dtype))
        value = self.value @ other.value
        magnitudes = self.size @ other.size
        squares = self.size**2 @ other.size**2
        grid = self.grid * other.grid
        rounds = ~_is_exact(magnitudes, grid, inner)

        underflow = terms * inner.underflow
        summing = rounds * (gamma(terms, inner.unit) * magnitudes + underflow)
        worst = self.size @ other.worst + self.worst @ other.size + summing
        summing_variance = rounds * (terms * inner.unit**2 * (value**2 + squares) + underflow**2)
        variance = self.size**2 @ other.spread**2 + self.spread**2 @ other.size**2 + summing_variance
        product = Bounded(value, worst, variance.sqrt(), grid, self.dtype)
        return product if accumulator(self.dtype) == self.dtype else product._rounded(self.dtype)

    def __add__(self, other: Bounded) -> Bounded:
        return Bounded(
            self.value + other.value,
            self.worst + other.worst,
            self.spread.hypot(other.spread),
            min(self.grid, other.grid),
            torch.promote_types(self.dtype, other.dtype),
        )._computed()

    def __sub__(self, other: Bounded) -> Bounded:
        return self + Bounded(-other.value, other.worst, other.spread, other.grid, other.dtype)

    def __mul__(self, factor: float) -> Bounded:
        """Times a Python number, which kernels convert to the accumulator's dtype: that is the exact factor."""
        taken = torch.tensor(factor, dtype=accumulator(self.dtype)).double()
        scaled = Bounded(
            self.value * taken,
            self.worst * taken.abs(),
            self.spread * taken.abs(),
            self.grid * _grid(taken),
            self.dtype,
        )
        return scaled._computed()

    def _computed(self) -> Bounded:
        """After an elementwise operation: rounded to the accumulator's dtype, and from that to the stored one."""
        inner = self._rounded(accumulator(self.dtype))
        return inner if accumulator(self.dtype) == self.dtype else inner._rounded(self.dtype)

    def _rounded(self, dtype: torch.dtype) -> Bounded:
        """After one rounding to `dtype`."""
        target = precision(dtype)
        largest = float(self.size.max()) if self.size.numel() else 0.0
        if largest > target.largest:
            raise GaugeError(f"values may reach {largest:.3g}, which overflows {dtype}; scale the case down")
        rounding = ~_is_exact(self.size, self.grid, target) * (target.unit * self.size + target.underflow)
        return Bounded(self.value, self.worst + rounding, self.spread.hypot(rounding), self.grid, self.dtype)


def bounded(adapters: Sequence[Adapter[torch.Tensor]]) -> list[Adapter[Bounded]]:
    """Adapters whose projections are inputs, hence exact."""
    return [Adapter(Bounded.of(one.down), Bounded.of(one.up), one.scaling) for one in adapters]


def _is_exact(magnitudes: torch.Tensor, grid: float, target: Precision) -> torch.Tensor:
    """Where sums of multiples of `grid`, with total magnitude at most this, fit the significand."""
    if not grid >= target.underflow:  # also true for a grid that is NaN
        return torch.zeros_like(magnitudes, dtype=torch.bool)
    # Strictly less: a magnitude that was rounded, in float64, may have come down to the limit.
    return magnitudes * target.unit < grid


def _grid(value: torch.Tensor) -> float:
    """The largest power of two that divides every element of a float64 tensor; infinite for zeros."""
    mantissa, exponent = torch.frexp(value[value != 0])
    if mantissa.numel() == 0:
        return math.inf
    digits = (mantissa * 2.0**53).to(torch.int64)
    lowest_bit = (digits & -digits).double()
    # By exponents: ldexp of torch 2.6 is a product with a power of two, which can underflow.
    exponents = exponent - 53 + torch.frexp(lowest_bit).exponent - 1
    return math.ldexp(1.0, int(exponents.min()))


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 in float32: no TF32 on a GPU, no bfloat16 on a CPU, whatever the settings outside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# The comparison.


@dataclass(frozen=True)
class IdentityCheck:
    """Two tensors that should be equal, compared within the bound on the rounding error."""

    max_error: float
    """Largest absolute difference."""
    bound: float
    """Largest elementwise bound."""
    share_of_bound: float
    """Largest ratio of a difference to the bound of its own element."""

    @property
    def holds(self) -> bool:
        return self.share_of_bound <= 1


def share_of_bound(error: torch.Tensor, bound: torch.Tensor) -> float:
    """The largest error / bound.

    Zero error has share 0, even of a zero bound. A nonzero error with a zero bound has infinite share, and so
    has NaN.
    """
    if error.shape != bound.shape:
        raise GaugeError(f"errors of shape {tuple(error.shape)} do not match bounds of shape {tuple(bound.shape)}")
    ratio = torch.where(error == 0, 0.0, error / bound).nan_to_num(nan=math.inf, posinf=math.inf)
    return float(ratio.max()) if ratio.numel() else 0.0


def check(computed: torch.Tensor, expected: torch.Tensor, *bounds: Bounded) -> IdentityCheck:
    """Compare |computed - expected| with the sum of the bounds, element by element.

    Pass one bound if `expected` is exact, and two if both tensors are computed. All shapes must agree.
    """
    if computed.shape != expected.shape:
        raise GaugeError(f"shapes {tuple(computed.shape)} and {tuple(expected.shape)} differ")
    error = (computed.detach().double() - expected.detach().double()).abs()
    bound = torch.stack([one.bound for one in bounds]).sum(dim=0)
    share = share_of_bound(error, bound)
    if not error.numel():
        return IdentityCheck(0.0, 0.0, share)
    return IdentityCheck(float(error.max()), float(bound.max()), share)


# Data to check it on.


@dataclass(frozen=True, repr=False)
class LoraCase:
    """A linear layer's weight (d, k), its adapters, and an input (..., k)."""

    weight: torch.Tensor
    adapters: tuple[Adapter[torch.Tensor], ...]
    x: torch.Tensor

    def __repr__(self) -> str:
        ranks = "".join(f", r={one.down.shape[0]} s={one.scaling:.4g} {one.down.dtype}" for one in self.adapters)
        return f"LoraCase(W {tuple(self.weight.shape)} {self.weight.dtype}, x {tuple(self.x.shape)}{ranks})"

    def decomposed(self) -> torch.Tensor:
        return decomposed(self.x, self.weight, self.adapters)

    def merged(self) -> torch.Tensor:
        return merged(self.x, self.weight, self.adapters)

    def decomposed_bound(self) -> Bounded:
        return decomposed(Bounded.of(self.x), Bounded.of(self.weight), bounded(self.adapters))

    def merged_bound(self) -> Bounded:
        return merged(Bounded.of(self.x), Bounded.of(self.weight), bounded(self.adapters))

    def check(self) -> IdentityCheck:
        """The identity itself: both sides are computed, and their difference is compared with both bounds."""
        return check(self.decomposed(), self.merged(), self.decomposed_bound(), self.merged_bound())


def random_case(
    *,
    out_features: int,
    in_features: int,
    ranks: Sequence[int],
    scalings: Sequence[float],
    dtype: torch.dtype,
    adapter_dtype: torch.dtype | None = None,
    batch_shape: Sequence[int] = (4,),
    input_size: float = 1.0,
    seed: int = 0,
) -> LoraCase:
    """Normally distributed values, also in B: inputs of size `input_size`, matrices of 1/sqrt(their columns)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, size: float, to: torch.dtype) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * size).to(to)

    lora = adapter_dtype or dtype
    adapters = tuple(
        Adapter(
            down=normal(rank, in_features, size=in_features**-0.5, to=lora),
            up=normal(out_features, rank, size=rank**-0.5, to=lora),
            scaling=factor,
        )
        for rank, factor in zip(ranks, scalings, strict=True)
    )
    weight = normal(out_features, in_features, size=in_features**-0.5, to=dtype)
    return LoraCase(weight, adapters, normal(*batch_shape, in_features, size=input_size, to=dtype))


def dyadic_case(
    *,
    out_features: int,
    in_features: int,
    ranks: Sequence[int],
    scalings: Sequence[float],
    dtype: torch.dtype,
    batch_shape: Sequence[int] = (4,),
    seed: int = 0,
) -> LoraCase:
    """Values so few and so small that no partial result has more digits than `dtype`.

    The base weight has integers as wide as that allows. The rest are signs, at most eight in a row of the input
    and two in a row of an up-projection. With up to two adapters, scaled by powers of two from 1/4 to 4, both
    sides of the identity are then exact, in every order of summation.
    """
    generator = torch.Generator().manual_seed(seed)
    # Eight weights, and two adapters' share, counted in quarters: 2**(digits + 8) is the whole significand.
    digits = round(-math.log2(precision(dtype).unit)) - 8
    largest = 2**digits

    def signs(rows: int, columns: int, *, nonzeros: int) -> torch.Tensor:
        random = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
        chosen = random.argsort(dim=1).argsort(dim=1) < nonzeros
        sign = torch.randint(0, 2, (rows, columns), generator=generator) * 2 - 1
        return (sign * chosen).to(dtype)

    adapters = tuple(
        Adapter(signs(rank, in_features, nonzeros=in_features), signs(out_features, rank, nonzeros=2), factor)
        for rank, factor in zip(ranks, scalings, strict=True)
    )
    weight = torch.randint(-largest, largest + 1, (out_features, in_features), generator=generator).to(dtype)
    x = signs(math.prod(batch_shape), in_features, nonzeros=8).reshape(*batch_shape, in_features)
    return LoraCase(weight, adapters, x)


def textbook_case(seed: int = 0) -> IdentityCheck:
    """The identity as in textbooks: a 512 x 512 layer in float32, r = 8, alpha = 16; a batch of 4."""
    case = random_case(
        out_features=512,
        in_features=512,
        ranks=(8,),
        scalings=(scaling(rank=8, alpha=16),),
        dtype=torch.float32,
        seed=seed,
    )
    with full_precision():
        return case.check()
