"""The paired verdict: intervals by hand, as often right as they promise, and no verdict without the numbers for one."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from peft_gauge.errors import GaugeError
from peft_gauge.quality.non_inferiority import Difference, compare, difference

MARGIN = 0.02


def seeds(*qualities: float | None) -> dict[int, float | None]:
    return dict(enumerate(qualities))


def whole(*qualities: float) -> dict[int, float]:
    return dict(enumerate(qualities))


# --- the interval ---------------------------------------------------------------------------------------------


def test_three_pairs_by_hand() -> None:
    """Differences of -0.03, -0.01 and 0.01: mean -0.01, standard deviation 0.02. Student's t at 2 degrees of freedom
    has the closed form 0.95·√(2 / (1 - 0.95²)) = 4.30265."""
    found = difference(whole(0.90, 0.80, 0.70), whole(0.87, 0.79, 0.71))

    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) * 0.02 / math.sqrt(3)
    assert half == pytest.approx(4.30265 * 0.0115470, rel=1e-5)
    assert (found.mean, found.pairs) == (pytest.approx(-0.01), 3)
    assert (found.low, found.high) == pytest.approx((-0.01 - half, -0.01 + half))


def test_five_pairs_by_hand() -> None:
    """Differences of 1 to 5: standard deviation √2.5; t at 4 degrees of freedom is 2.776, at 1 % 4.604."""
    base, new = whole(0, 0, 0, 0, 0), whole(1, 2, 3, 4, 5)
    assert difference(base, new).low == pytest.approx(3 - 2.776 * math.sqrt(0.5), abs=1e-3)
    assert difference(base, new, error=0.01).high == pytest.approx(3 + 4.604 * math.sqrt(0.5), abs=1e-3)


def test_pairs_are_of_seeds_and_not_of_places() -> None:
    assert difference({0: 0.1, 1: 0.5, 2: 0.9}, {2: 0.9, 1: 0.5, 0: 0.1}) == Difference(0.0, 0.0, 0.0, 3)


@pytest.mark.parametrize("pairs", [3, 5])
def test_the_interval_misses_as_often_as_it_says(pairs: int) -> None:
    """Seeds differ by ten times what is asked for. 2,000 intervals of 95 %: the share of misses has a standard
    deviation of 0.5 %. With 1.96 standard errors three pairs would miss 19 %, five 12 %."""
    generator = np.random.default_rng(0)
    of_seed = generator.normal(0.8, 0.1, (2000, pairs))
    base = of_seed + generator.normal(0, 0.01, (2000, pairs))
    new = of_seed - 0.015 + generator.normal(0, 0.01, (2000, pairs))

    found = [difference(whole(*b), whole(*n)) for b, n in zip(base.tolist(), new.tolist(), strict=True)]

    misses = sum(not each.low < -0.015 < each.high for each in found) / len(found)
    assert misses == pytest.approx(0.05, abs=0.015)


# --- the verdict ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "holds"),
    [
        (-0.019, 0.01, True),
        (-0.019, -0.001, True),  # worse for certain, but by less than the margin
        (0.01, 0.02, True),
        (-0.03, -0.021, False),
        (-0.021, 0.05, None),
        (-0.03, -0.019, None),
        (-0.02, 0.0, None),  # neither side of a margin that is just met
        (-0.03, -0.02, None),
    ],
)
def test_a_verdict_is_what_the_whole_interval_says(low: float, high: float, holds: bool | None) -> None:
    assert Difference((low + high) / 2, low, high, 3).no_worse_than(MARGIN) is holds


@pytest.mark.parametrize(
    ("new", "holds"),
    [((0.88, 0.80, 0.71), True), ((0.81, 0.72, 0.60), False), ((0.80, 0.81, 0.69), None)],
)
def test_a_comparison_gives_its_verdict_with_the_figures(new: tuple[float, ...], holds: bool | None) -> None:
    base = (0.88, 0.79, 0.70)
    found = compare(seeds(*base), seeds(*new), margin=MARGIN, names=("LoRA", "QLoRA"))

    assert found.holds is holds
    assert found.difference == difference(whole(*base), whole(*new))
    assert found.metric.startswith(f"quality: LoRA 0.7900, QLoRA {sum(new) / 3:.4f}; {found.difference.mean:+.4f} (")
    json.dumps(found.as_json(), allow_nan=False)


def test_a_method_on_the_margin_is_rarely_called_no_worse_or_worse() -> None:
    """With the true difference at the margin either verdict is an error: 2.5 % of each, with a standard deviation of
    0.35 % over 2,000."""
    generator = np.random.default_rng(1)
    drawn = generator.normal(-MARGIN, 0.01, (2000, 3)).tolist()

    verdicts = [compare(seeds(0.0, 0.0, 0.0), seeds(*each), margin=MARGIN).holds for each in drawn]

    for verdict in (True, False):
        assert sum(found is verdict for found in verdicts) / len(verdicts) == pytest.approx(0.025, abs=0.0105)


def test_a_diverged_training_is_no_quality_of_zero_and_no_seed_less() -> None:
    good = seeds(0.9, 0.8, 0.7, 0.8)
    broken = seeds(0.9, None, 0.7, None)

    for found in (compare(good, broken, margin=MARGIN), compare(broken, good, margin=MARGIN)):
        assert (found.holds, found.difference) == (None, None)
    assert compare(good, broken, margin=MARGIN, names=("LoRA", "QLoRA")).metric == "QLoRA diverged under seed 1 and 3"
    assert compare(broken, good, margin=MARGIN, names=("LoRA", "QLoRA")).metric == "LoRA diverged under seed 1 and 3"


@pytest.mark.parametrize("number", [0, 1, 2])
def test_fewer_than_three_seeds_cannot_tell(number: int) -> None:
    same = seeds(*[0.9] * number)
    found = compare(same, same, margin=MARGIN)
    assert (found.holds, found.difference) == (None, None)
    assert found.metric == f"{number} seeds are too few, at least 3 are needed"


def test_a_base_that_learned_nothing_has_no_quality_to_keep() -> None:
    base, new = seeds(0.01, 0.02, 0.03), seeds(0.01, 0.02, 0.03)
    assert compare(base, new, margin=MARGIN).holds
    found = compare(base, new, margin=MARGIN, least_base=0.5)
    assert found.holds is None
    assert found.metric.endswith("; base learned too little, less than 0.5")
    assert compare(seeds(0.5, 0.4, 0.6), seeds(0.5, 0.4, 0.6), margin=MARGIN, least_base=0.5).holds


def test_what_cannot_be_compared_is_one_line() -> None:
    with pytest.raises(GaugeError, match="trained under seed 2 and 5"):
        compare({0: 0.9, 1: 0.9, 2: 0.9}, {0: 0.9, 1: 0.9, 5: 0.9}, margin=MARGIN)
    with pytest.raises(GaugeError, match="at least 2"):
        difference(whole(0.9), whole(0.9))
    with pytest.raises(GaugeError, match="not finite"):
        difference(whole(0.9, 0.9, 0.9), whole(0.9, math.nan, 0.9))
    for margin in (0.0, -0.02, math.inf, math.nan):
        with pytest.raises(GaugeError, match="positive and finite"):
            Difference(0.0, -0.1, 0.1, 3).no_worse_than(margin)
