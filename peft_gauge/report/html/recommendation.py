"""Which method should I use? From saved measurements of one setup, with the reason and how sure it is.

The rule, for the methods that leave the base frozen; they are compared with full fine-tuning:

1. Where quality was trained and scored, a method is out if all its seeds are below all seeds of another.
2. Of the rest, the method with the least memory; a difference of less than `ALIKE` counts as none.
3. Of these, the fastest; times whose intervals overlap are alike, and then the one with the fewest parameters.

Without quality nothing is recommended: memory and time alone always favour the method that learns least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peft_gauge.report.format import shown_bytes

if TYPE_CHECKING:
    from peft_gauge.report.html.setups import MethodResult, Quality, Setup

ALIKE = 0.02
"""Peaks that differ by less than this share are alike: a plan's own error is larger."""
FULL = "full"


@dataclass(frozen=True)
class Recommendation:
    """``method``: the recommended one, or ``None`` if the data do not decide. ``reasons`` and ``doubts`` are sentences.

    ``headline``: the recommendation in a few words.
    """

    headline: str
    method: str | None = None
    reasons: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)


def recommend(setup: Setup) -> Recommendation:
    """The recommendation for ``setup``."""
    candidates = [each for each in setup.methods if each.method != FULL]
    if not candidates:
        return Recommendation("Nothing to choose from", doubts=["No method with a frozen base was measured here."])
    if len(setup.methods) == 1:
        only = setup.methods[0]
        return Recommendation(
            f"Not decided: only {only.name} was {setup.source}", doubts=["There is nothing to compare it with."]
        )
    scored = [each for each in candidates if each.quality is not None]
    if len(scored) < 2:
        return _by_cost_alone(setup, candidates)
    return _by_quality(setup, candidates, scored)


def _by_quality(setup: Setup, candidates: Sequence[MethodResult], scored: Sequence[MethodResult]) -> Recommendation:
    kept = [each for each in scored if not any(_below(each, other) for other in scored)]
    chosen, why = _cheapest(kept)
    quality = _quality(chosen)
    reasons = [
        f"Quality on “{quality.task}”: {_scored(quality)}. "
        + (
            f"Every other method’s seeds are below: {_named([each for each in scored if each is not chosen])}."
            if len(kept) == 1
            else f"Their seeds overlap with its: {_named([each for each in kept if each is not chosen])}."
        ),
        *([why] if why else []),
    ]
    doubts = []
    full = next((each for each in setup.methods if each.method == FULL and each.quality is not None), None)
    if full is not None:
        reasons.append(_against_full(chosen, full))
    if not all(_quality(each).sure for each in kept):
        doubts.append("Some qualities are from one seed, or a seed diverged.")
    seeds = min(_quality(each).seeds for each in kept)
    doubts.append(
        f"One task and {_counted(seeds, 'seed')} a method (run {quality.run}); another task may order them otherwise."
    )
    unscored = [each for each in candidates if each.quality is None]
    if unscored:
        doubts.append(f"No quality of {_named(unscored)}.")
    return Recommendation(f"Use {chosen.name}", chosen.name, reasons, doubts)


def _cheapest(kept: Sequence[MethodResult]) -> tuple[MethodResult, str | None]:
    """The cheapest of ``kept``, and a sentence with the reason."""
    if len(kept) == 1:
        only = kept[0]
        return only, None if only.peak_bytes is None else f"It needs {shown_bytes(only.peak_bytes)}."
    known = [each for each in kept if each.peak_bytes is not None]
    if known:
        least = min(known, key=lambda each: each.peak_bytes or 0)
        alike = [each for each in known if (each.peak_bytes or 0) <= (least.peak_bytes or 0) * (1 + ALIKE)]
        if len(alike) == 1:
            rest = min(
                (each for each in known if each is not least), key=lambda each: each.peak_bytes or 0, default=None
            )
            next_best = "" if rest is None else f"; next is {rest.name} with {shown_bytes(rest.peak_bytes)}"
            return least, f"Of these it needs the least memory: {shown_bytes(least.peak_bytes)}{next_best}."
        kept = alike
    timed = [each for each in kept if each.ratio is not None]
    if timed:
        fastest = fastest_of(timed)
        if len(fastest) == 1:
            return fastest[0], f"Of these, which need alike memory, it is the fastest: {ratio(fastest[0])}."
        kept = fastest
    fewest = min(kept, key=lambda each: (each.trainable_params is None, each.trainable_params or 0))
    return fewest, "Memory and time of these are alike; it trains the fewest parameters."


def fastest_of(methods: Sequence[MethodResult]) -> list[MethodResult]:
    """The fastest of ``methods`` by step / base forward, and those whose interval overlaps with its; fastest first.

    Without intervals, only the smallest ratio.
    """
    timed = sorted((each for each in methods if each.ratio is not None), key=_ratio)
    return [each for each in timed if each is timed[0] or _overlap(each, timed[0])]


def _overlap(one: MethodResult, other: MethodResult) -> bool:
    return one.ratio is not None and other.ratio is not None and one.ratio.apart_from(other.ratio) is False


def _by_cost_alone(setup: Setup, candidates: Sequence[MethodResult]) -> Recommendation:
    """Without quality: the methods with the least memory and the fastest step, and the missing measurement."""
    leads, seen = [], [each for each in candidates if each.peak_bytes is not None]
    if seen:
        least = min(seen, key=lambda each: each.peak_bytes or 0)
        leads.append(f"Least memory: {least.name}, {shown_bytes(least.peak_bytes)}, {setup.source}.")
    fastest = fastest_of(candidates)
    if fastest:
        more = f"; alike: {_named(fastest[1:])}" if fastest[1:] else ""
        leads.append(f"Fastest step: {fastest[0].name}, {ratio(fastest[0])}{more}.")
    return Recommendation(
        "Not decided: no quality was measured here",
        reasons=leads,
        doubts=[
            "Memory and time alone favour the method that learns least. "
            f"Quality of these methods on {setup.model} would decide: benchmarks/test_methods_quality.py."
        ],
    )


def _against_full(chosen: MethodResult, full: MethodResult) -> str:
    ours, theirs = _quality(chosen), _quality(full)
    apart = ours.high < theirs.low or theirs.high < ours.low
    told = "the seeds’ ranges do not overlap" if apart else "the seeds’ ranges overlap"
    costs = []
    if chosen.peak_bytes and full.peak_bytes:
        costs.append(f"{full.peak_bytes / chosen.peak_bytes:.1f} × the memory")
    if chosen.ratio is not None and full.ratio is not None:
        costs.append(f"{full.ratio.value / chosen.ratio.value:.1f} × the time")
    price = f", for {' and '.join(costs)}" if costs else ""
    return f"Full fine-tuning reaches {_scored(theirs)}{price}; {told}."


def _below(one: MethodResult, other: MethodResult) -> bool:
    return one is not other and _quality(one).high < _quality(other).low


def _quality(each: MethodResult) -> Quality:
    assert each.quality is not None
    return each.quality


def _ratio(each: MethodResult) -> float:
    assert each.ratio is not None
    return each.ratio.value


def ratio(each: MethodResult) -> str:
    """Its step over the base's forward, such as "2.22 × a forward of the base"."""
    return f"{_ratio(each):.2f} × a forward of the base"


def _scored(quality: Quality) -> str:
    spread = f" ({quality.low:.3f} to {quality.high:.3f} over {_counted(quality.seeds, 'seed')})"
    return f"{quality.mean:.3f}{spread if quality.seeds > 1 else ' (one seed)'}"


def _named(methods: Sequence[MethodResult]) -> str:
    *most, last = [each.name for each in methods]
    return f"{', '.join(most)} and {last}" if most else last


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
