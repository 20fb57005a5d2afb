"""Verdicts on claims from sweeps: pure functions of training results.

The findings are for `peft_gauge.claims`; the thresholds come from the ledger of claims. Settings are compared by the
bits that they leave, per fact or per token of a text's responses. Intervals are Student's, paired by seed, with the
error of one look of a group-sequential test (`peft_gauge.quality.sequential`). A verdict is inconclusive where a
training diverged, or the best setting learned fewer bits than ``least`` (half of a fact's by default): it was too short
to compare anything.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import TYPE_CHECKING

from peft_gauge.claims import Finding
from peft_gauge.quality import non_inferiority
from peft_gauge.quality.facts import BITS
from peft_gauge.quality.saturation import enough
from peft_gauge.quality.sequential import LOOK_ERROR
from peft_gauge.quality.sweep import by_label

if TYPE_CHECKING:
    from peft_gauge.quality.non_inferiority import Difference
    from peft_gauge.quality.sweep import Trained

LEAST_STORED = BITS / 2
LEAST_LEFT = 0.1
"""Bits left per fact below which rates are alike."""


def best_rank(results: Sequence[Trained], conditions: str, *, margin: float, least: float = LEAST_STORED) -> Finding:
    """Whether some rank is the best trade-off of bits stored against parameters.

    ``results`` are those of the ranks alone. The claim holds if the curve of bits left comes within ``margin`` bits of
    its floor between the lowest and the highest rank, over the whole interval: fewer parameters cost bits, and more
    gain none. It is refuted if all ranks are within the margin of each other, or the curve has not flattened at the
    highest rank.
    """
    groups = by_label(results)
    shown = f"bits left: {_means(groups)}"
    missing = _missing(groups, least)
    if missing:
        return Finding.of(None, f"{shown}; {missing}", conditions)
    furthest = _furthest(groups, "bits_left")
    if furthest <= margin:
        return Finding.of(
            False, f"{shown}; rank hardly matters: all differ by at most {furthest:.3f} (interval)", conditions
        )
    ordered = sorted(groups.values(), key=lambda group: group[0].trainable_params)
    params = [group[0].trainable_params for group in ordered]
    bits = {
        result.seed: [{each.seed: each for each in group}[result.seed].scores["bits_left"] for group in ordered]
        for result in ordered[0]
    }
    found = enough(params, bits, margin=margin, error=LOOK_ERROR)
    if found is None:
        return Finding.of(None, f"{shown}; differences reach {furthest:.3f}, margin {margin:g}", conditions)
    reached = (
        f"{shown}; within {margin:g} bits of the floor at {found.params:,.0f} parameters "
        f"({found.low:,.0f} to {found.high:,.0f}): {_at(found.params, ordered)}"
    )
    if found.low >= params[-1]:
        return Finding.of(False, f"{shown}; still falling at {ordered[-1][0].label}", conditions)
    decided = found.low > params[0] and found.high < params[-1]
    return Finding.of(True if decided else None, reached, conditions)


def best_targets(results: Sequence[Trained], conditions: str, *, margin: float, least: float = LEAST_STORED) -> Finding:
    """Whether one of these sets of modules, with about equal numbers of trainable parameters, is the best.

    Compared by the logarithm of bits left. The claim is refuted if all differences lie within ±``margin`` (of the
    logarithm), and otherwise holds if one set leaves less than every other over the whole interval of each difference.
    """
    groups = by_label(results)
    shown = f"bits left, at about {_params(groups)} parameters: {_means(groups)}"
    missing = _missing(groups, least)
    if missing:
        return Finding.of(None, f"{shown}; {missing}", conditions)
    differences = {
        (first, second): _difference(groups[first], groups[second], "log_bits_left")
        for first, second in permutations(groups, 2)
    }
    widest = max(abs(end) for each in differences.values() for end in (each.low, each.high))
    shown += f"; intervals of their ratios reach {math.exp(widest):.2f}"
    if widest < margin:
        return Finding.of(False, shown, conditions)
    for label in groups:
        ahead = min(differences[label, other].low for other in groups if other != label)
        if ahead > 0:
            metric = f"{shown}; every other set leaves at least {math.exp(ahead):.2f} times {label}'s"
            return Finding.of(True, metric, conditions)
    return Finding.of(None, shown, conditions)


def keeps(
    base: Sequence[Trained],
    new: Sequence[Trained],
    conditions: str,
    *,
    margin: float,
    least: float = LEAST_STORED,
    quality: str = "bits stored per fact",
) -> Finding:
    """Whether ``new`` has at most ``margin`` bits of ``quality`` less than ``base``."""
    compared = non_inferiority.compare(
        stored(base),
        stored(new),
        margin=margin,
        least_base=least,
        names=(base[0].label, new[0].label),
        error=LOOK_ERROR,
        quality=quality,
    )
    return Finding.of(compared.holds, compared.metric, conditions)


def recovers(
    unrounded: Sequence[Trained],
    rounded: Sequence[Trained],
    conditions: str,
    *,
    least_share: float,
    least_lost_bits: float,
) -> Finding:
    """Whether training over a rounded base recovers the bits of the base's knowledge that rounding lost.

    Both were trained alike on that knowledge. Recovered is the share of the rounding loss (before training) by which
    ``rounded`` (after it) comes closer to ``unrounded``. The claim holds if the whole interval of the share is at least
    ``least_share``, and is refuted if all of it is below. It is inconclusive where rounding costs less than
    ``least_lost_bits`` per fact: nothing was lost.
    """
    groups = {"unrounded": list(unrounded), "rounded": list(rounded)}
    shown = f"bits left: {_means(by_label([*unrounded, *rounded]))}"
    missing = _missing(groups, least=0)
    if missing:
        return Finding.of(None, f"{shown}; {missing}", conditions)
    lost = {each.seed: each.scores["rounding_loss"] for each in rounded}
    shown += f"; rounding alone loses {statistics.fmean(lost.values()):.3f}"
    if min(lost.values()) < least_lost_bits:
        return Finding.of(None, f"{shown}, less than {least_lost_bits:g} under a seed: nothing to recover", conditions)
    before = {each.seed: each.scores["bits_left"] for each in unrounded}
    shares = {each.seed: 1 - (each.scores["bits_left"] - before[each.seed]) / lost[each.seed] for each in rounded}
    found = non_inferiority.difference(dict.fromkeys(shares, 0.0), shares, error=LOOK_ERROR)
    verdict = True if found.low >= least_share else False if found.high < least_share else None
    metric = f"{shown}; recovered {found.mean:.0%} ({found.low:.0%} to {found.high:.0%}) over {found.pairs} seeds"
    return Finding.of(verdict, metric, conditions)


def learns_more(base: Sequence[Trained], new: Sequence[Trained], conditions: str, *, margin: float) -> Finding:
    """Whether ``new`` leaves fewer bits than ``base``: it is refuted if the whole interval of the gain is below
    ``margin`` bits per fact (a gain that does not matter, or none), or if only ``new`` diverged; otherwise it holds if
    the whole interval is above 0."""
    groups = {"base": list(base), "new": list(new)}
    shown = f"bits left: {_means(by_label([*base, *new]))}"
    if any(each.divergence for each in new) and not any(each.divergence for each in base):
        return Finding.of(False, f"{shown}; {new[0].label} diverged", conditions)
    missing = _missing(groups)
    if missing:
        return Finding.of(None, f"{shown}; {missing}", conditions)
    gain = _difference(new, base, "bits_left")
    metric = f"{shown}; gain {_interval(gain)} over {gain.pairs} seeds, margin {margin:g}"
    verdict = False if gain.high < margin else True if gain.low > 0 else None
    return Finding.of(verdict, metric, conditions)


def forgets_less(full: Sequence[Trained], lora: Sequence[Trained], conditions: str, *, most_left: float) -> Finding:
    """Whether LoRA forgets less than full fine-tuning at equal learning: both left at most ``most_left`` bits under
    every seed, and the interval of the difference of forgetting has one sign."""
    left = [each.scores.get("bits_left", math.inf) for each in (*full, *lora)]
    forgotten = {
        label: statistics.fmean(each.scores["forgetting"] for each in group if each.scores)
        for label, group in ((full[0].label, full), (lora[0].label, lora))
        if any(each.scores for each in group)
    }
    shown = "forgetting in bits: " + ", ".join(f"{label} {value:.3f}" for label, value in forgotten.items())
    shown += f"; {_means(by_label([*full, *lora]))} bits left"
    if max(left) > most_left or len(full) < non_inferiority.LEAST_PAIRS:
        return Finding.of(None, f"{shown}; not learned equally under each of 3 seeds", conditions)
    less = _difference(full, lora, "forgetting")
    verdict = True if less.high < 0 else False if less.low > 0 else None
    return Finding.of(verdict, f"{shown}; difference {_interval(less)}", conditions)


def ten_times_the_rate(
    full: Sequence[Trained], ranks: Sequence[Trained], conditions: str, *, times: float, within: float
) -> Finding:
    """Whether the best LoRA rate is ``times`` full fine-tuning's, and nearly independent of rank.

    A rate was searched for each setting. The claim holds if every rank's is ``times`` full's, and the highest of the
    ranks' is the lowest, both within the factor ``within``; otherwise it is refuted. It is inconclusive where a setting
    stored nearly everything, since then several rates are as good.
    """
    of_full = full[0].search.chosen
    chosen = {label: group[0].search.chosen for label, group in by_label(ranks).items()}
    shown = "best rate " + ", ".join(
        f"{label} {rate:.2g}" for label, rate in {full[0].label: of_full, **chosen}.items() if rate is not None
    )
    searches = [full[0].search, *(group[0].search for group in by_label(ranks).values())]
    if of_full is None or any(rate is None for rate in chosen.values()) or any(each.at_edge for each in searches):
        return Finding.of(None, f"{shown}; a best rate is at the edge of its search", conditions)
    trained = (each for each in (*full, *ranks) if each.scores)
    complete = list(dict.fromkeys(each.label for each in trained if each.scores["bits_left"] < LEAST_LEFT))
    if complete:
        return Finding.of(
            None, f"{shown}; {', '.join(complete)} stored nearly everything, at more than one rate", conditions
        )
    rates = [rate for rate in chosen.values() if rate is not None]
    off = max(max(rate / of_full / times, of_full * times / rate) for rate in rates)
    spread = max(rates) / min(rates)
    metric = f"{shown}: {min(rates) / of_full:.2g} to {max(rates) / of_full:.2g} times full's"
    worst = max(off, spread)
    return Finding.of(worst <= within * 1.01, metric, conditions)  # rates are rounded to two digits


def capacity_decides(
    full: Mapping[int, Sequence[Trained]], ranks: Mapping[int, Sequence[Trained]], *, margin: float, within: float
) -> Finding:
    """Whether rank matters only where the data exceeds an adapter's capacity.

    ``full`` and ``ranks``: results by the number of random facts, which take 8 bits each. A setting suffices if it
    leaves at most ``margin`` bits per fact more than full fine-tuning over the whole interval, and is short if it
    leaves more. The claim holds if one number of bits required per parameter separates the two up to the factor
    ``within``: the most that sufficed is at most so many times the least that fell short. It is refuted if it is more,
    or if a higher rank falls short where a lower one suffices.
    """
    sufficed: dict[float, str] = {}
    short: dict[float, str] = {}
    crossed = []
    for number, results in ranks.items():
        groups = sorted(by_label(results).values(), key=lambda group: group[0].trainable_params)
        was_enough = False
        for group in groups:
            required = BITS * number / group[0].trainable_params
            where = f"{group[0].label} for {number}"
            extra = _difference(full[number], group, "bits_left") if not _missing({"": group}, least=0) else None
            if extra is not None and extra.high <= margin:
                sufficed[required] = where
                was_enough = True
            elif extra is None or extra.low > margin:
                short[required] = where
                crossed += [where] * was_enough
    conditions = f"random facts, {', '.join(map(str, ranks))} of them; {BITS:g} bits each; against full fine-tuning"
    if not sufficed or not short:
        return Finding.of(None, "all settings suffice, or none does: no capacity was reached", conditions)
    most, least = max(sufficed), min(short)
    metric = (
        f"within {margin:g} bits of full fine-tuning up to {most:.2f} bits required per parameter ({sufficed[most]}), "
        f"short of it from {least:.2f} ({short[least]})"
    )
    if crossed:
        return Finding.of(False, f"{metric}; short although a lower rank suffices: {', '.join(crossed)}", conditions)
    return Finding.of(most <= within * least, metric, conditions)


def stored(results: Sequence[Trained]) -> dict[int, float | None]:
    """Bits stored per fact by seed; ``None`` for a diverged training."""
    return {each.seed: each.scores.get("quality") for each in results}


def scaling_sets_size(
    sizes: Mapping[float, float], at_one_rate: Mapping[float, float | None], *, alike: float, grows: float
) -> Finding:
    """Whether α/r determines the size of the update if each α/r has its own learning rate.

    ``sizes``: norm of the learned update by α/r. The claim holds if the size at the greatest α/r is at least ``grows``
    times that at the least, and is refuted if all sizes lie within the factor ``alike``. ``at_one_rate``: the same at
    one learning rate for all (``None``: diverged), shown only: there α/r acts as a learning rate.
    """
    low, high = min(sizes), max(sizes)
    growth, spread = sizes[high] / sizes[low], max(sizes.values()) / min(sizes.values())
    shown = ", ".join(f"{scaling:g}: {size:.2f}" for scaling, size in sizes.items())
    shared = ", ".join(
        f"{scaling:g}: " + ("diverged" if size is None else f"{size:.2f}") for scaling, size in at_one_rate.items()
    )
    metric = f"norm of the update over that of the planted one, by α/r: {shown}; at one learning rate for all {shared}"
    verdict = True if growth >= grows else False if spread <= alike else None
    return Finding.of(
        verdict, metric, "an update of rank 4 planted in a small decoder, LoRA r=4 on q,v, rates searched"
    )


# --- parts ------------------------------------------------------------------------------------------------------------


def _value(result: Trained, score: str) -> float:
    if score == "log_bits_left":
        return math.log(result.scores["bits_left"])
    return result.scores[score]


def _difference(base: Sequence[Trained], new: Sequence[Trained], score: str) -> Difference:
    """``score`` of ``new`` minus that of ``base``, paired by seed, with the interval of one look."""
    of_base, of_new = ({each.seed: _value(each, score) for each in side} for side in (base, new))
    return non_inferiority.difference(of_base, of_new, error=LOOK_ERROR)


def _furthest(groups: Mapping[str, Sequence[Trained]], score: str) -> float:
    """The end of all pairwise intervals that is furthest from 0."""
    found = [_difference(groups[a], groups[b], score) for a, b in permutations(groups, 2)]
    return max(abs(end) for each in found for end in (each.low, each.high))


def _missing(groups: Mapping[str, Sequence[Trained]], least: float = LEAST_STORED) -> str:
    """Why these results decide nothing, if so."""
    results = [each for group in groups.values() for each in group]
    diverged = sorted({f"{each.label} under seed {each.seed}" for each in results if each.divergence})
    if diverged:
        return f"diverged: {', '.join(diverged)}"
    if min(len(group) for group in groups.values()) < non_inferiority.LEAST_PAIRS:
        return f"at least {non_inferiority.LEAST_PAIRS} seeds are needed"
    best = max(statistics.fmean(each.scores["quality"] for each in group) for group in groups.values())
    return f"no setting learned {least:g} bits" if best < least else ""


def _means(groups: Mapping[str, Sequence[Trained]]) -> str:
    def shown(group: Sequence[Trained]) -> str:
        known = [each.scores["bits_left"] for each in group if each.scores]
        if len(known) < len(group):
            return "diverged"
        spread = f" ± {statistics.stdev(known):.2g}" if len(known) > 1 else ""
        return f"{statistics.fmean(known):.3f}{spread}"

    return ", ".join(f"{label} {shown(group)}" for label, group in groups.items())


def _params(groups: Mapping[str, Sequence[Trained]]) -> str:
    numbers = [group[0].trainable_params for group in groups.values()]
    return f"{min(numbers):,}–{max(numbers):,}"


def _interval(found: Difference) -> str:
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def _at(params: float, ordered: Sequence[Sequence[Trained]]) -> str:
    """The lowest rank with at least ``params``."""
    labels = [group[0].label for group in ordered if group[0].trainable_params >= params]
    return labels[0] if labels else f"above {ordered[-1][0].label}"
