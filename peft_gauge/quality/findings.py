"""Verdicts on claims from sweeps: pure functions of training results.

The findings are for `peft_gauge.claims`; the thresholds come from the ledger of claims.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import TYPE_CHECKING

from peft_gauge.claims import Finding
from peft_gauge.quality import non_inferiority
from peft_gauge.quality.sweep import by_label, knees, pareto_rows

if TYPE_CHECKING:
    from peft_gauge.quality.sweep import Trained

COSTS = {"trainable_params": "parameters", "peak_bytes": "peak bytes", "step_seconds": "time"}


def best_rank(
    results: Sequence[Trained], peak_bytes: Mapping[str, int], conditions: str, *, least_share: float
) -> Finding:
    """Whether one rank is the best trade-off of quality against parameters: there is a stable knee.

    ``results`` are those of the ranks alone. The claim holds if the knee of quality against trainable parameters is the
    same in at least ``least_share`` of the resamples of seeds, and is refuted if as many resamples have no knee. With
    fewer than `paired.LEAST_PAIRS` seeds or a diverged rank the result is inconclusive.
    """
    rows = pareto_rows(results, peak_bytes)
    found = knees(results, rows)
    knee = found.get("trainable_params")  # absent if every rank diverged
    diverged = [row["label"] for row in rows if row["diverged"]]
    qualities = ", ".join(f"{row['label']} {row['quality']:.3f}" for row in rows if row["quality"] is not None)
    at = "; ".join(
        f"knee by {COSTS[cost]}: {each.label or 'none'} in {100 * each.share:.0f} % of resamples"
        for cost, each in found.items()
    )
    reached = f"quality {qualities}; {at}" if knee else ""
    metric = "; ".join(filter(None, (reached, f"diverged: {', '.join(diverged)}" if diverged else "")))
    if knee is None or diverged or knee.share < least_share or knee.seeds < non_inferiority.LEAST_PAIRS:
        return Finding.of(None, metric, conditions)
    return Finding.of(knee.label is not None, metric, conditions)


def best_targets(results: Sequence[Trained], conditions: str, *, margin: float) -> Finding:
    """Whether one of these sets of modules, with about equal numbers of trainable parameters, is the best.

    Compared per seed. The claim holds if one set's quality exceeds every other's over the whole interval of each
    difference; it is refuted if every pairwise difference lies within ±``margin``.
    """
    groups = by_label(results)
    qualities = {
        label: {each.seed: each.scores.get("quality") for each in group}  # None where it diverged
        for label, group in groups.items()
    }
    means = ", ".join(_mean(label, values) for label, values in qualities.items())
    compared = {
        (first, second): non_inferiority.compare(qualities[second], qualities[first], margin=margin).difference
        for first, second in permutations(qualities, 2)
    }
    metric = f"quality at equal parameters: {means}"
    if any(each is None for each in compared.values()):
        return Finding.of(None, f"{metric}; a set diverged, or there are too few seeds", conditions)
    differences = {pair: each for pair, each in compared.items() if each is not None}
    for label in qualities:
        ahead = [differences[label, other] for other in qualities if other != label]
        if all(each.low > 0 for each in ahead):
            nearest = min(each.low for each in ahead)
            return Finding.of(True, f"{metric}; {label} is ahead of every other by at least {nearest:.3f}", conditions)
    widest = max(abs(end) for each in differences.values() for end in (each.low, each.high))
    metric += f"; 95 % intervals of the differences reach ±{widest:.3f}"
    return Finding.of(False if widest < margin else None, metric, conditions)


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


def _mean(label: str, qualities: Mapping[int, float | None]) -> str:
    known = [quality for quality in qualities.values() if quality is not None]
    return f"{label} {statistics.fmean(known):.3f}" if known else f"{label} diverged"
