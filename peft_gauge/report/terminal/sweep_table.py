"""Sweeps as tables: cost and quality of each setting, over which seeds, and the knee of the curve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from peft_gauge.report.format import ABSENT, shown, shown_bytes, shown_seconds
from peft_gauge.report.terminal.summary import WIDTH, as_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from peft_gauge.history.schema import CaseRecord

NOTE = "quality: mean over seeds, higher is better; peak: planned"
ABOUT_QUALITY = frozenset({"quality", "quality_low", "quality_high", "seeds", "diverged"})
"""Keys of a sweep's point apart from its label and its costs."""


def summary(cases: Iterable[CaseRecord], width: int = WIDTH) -> str:
    """A table for each case that swept over settings, as text; empty without such cases."""
    return as_text(map(_table, swept(cases)), width)


def swept(cases: Iterable[CaseRecord]) -> list[CaseRecord]:
    """Those of ``cases`` that swept over settings."""
    return [case for case in cases if case.metrics.get("pareto")]


def _table(case: CaseRecord) -> Table:
    named = title(case)
    table = Table(title=named, title_justify="left", caption_justify="left", min_width=len(named))
    table.caption = "\n".join(filter(None, (knees(case), note(case))))
    headings, lines = told(case.metrics)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def title(case: CaseRecord) -> str:
    """The name of the sweep, with its model and task if it has them."""
    about = [str(case.metrics[name]) for name in ("model", "task") if name in case.metrics]
    return ": ".join(filter(None, (case.id.rpartition("::")[2], ", ".join(about))))


def note(case: CaseRecord) -> str:
    """Explains the table's quality: that of trained models, unless the sweep names another."""
    other = case.metrics.get("quality_is")
    return f"quality: {other}, higher is better" if other else NOTE


def told(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a line for each point of the sweep in ``metrics``: costs, learning rate, mean quality.

    Columns without values are omitted, such as learning rate and seeds of a sweep without training.
    """
    points: Sequence[Mapping[str, Any]] = metrics["pareto"]
    costs = list(dict.fromkeys(name for point in points for name in point if name not in {"label", *ABOUT_QUALITY}))
    rates = _rates(metrics)
    columns = [("setting", [str(point["label"]) for point in points])]
    columns += [(_heading(name), [_cost(name, point.get(name)) for point in points]) for name in costs]
    if any(point["label"] in rates for point in points):
        columns.append(("learning rate", [rates.get(point["label"], ABSENT) for point in points]))
    columns.append(("quality", [_quality(point.get("quality")) for point in points]))
    if any("seeds" in point for point in points):
        columns.append(("over seeds", [_spread(point) for point in points]))
        diverged = [f"{point.get('diverged', 0)} of {point.get('seeds', ABSENT)}" for point in points]
        columns.append(("diverged", diverged))
    return [heading for heading, _ in columns], [list(line) for line in zip(*(c for _, c in columns), strict=True)]


def _heading(cost: str) -> str:
    """``cost`` without its unit."""
    return cost.rpartition("_")[0].replace("_", " ") or cost


def _cost(name: str, value: float | None) -> str:
    if name.endswith("_bytes"):
        return shown_bytes(value)
    return shown_seconds(value) if name.endswith("_seconds") else shown(value, "{:,}")


def _spread(point: Mapping[str, Any]) -> str:
    low, high = point.get("quality_low"), point.get("quality_high")
    return ABSENT if low is None or high is None else f"{_quality(low)} to {_quality(high)}"


def _quality(value: float | None) -> str:
    """With four decimals; a nonzero value that would round to 0, as a power of ten."""
    tiny = value is not None and 0 < abs(value) < 0.00005
    return shown(value, "{:.1e}" if tiny else "{:.4f}")


def _rates(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The learning rates chosen by each setting's search, by label."""
    chosen: dict[str, list[float]] = {}
    for training in metrics.get("trainings") or ():
        rate = (training.get("search") or {}).get("chosen")
        if rate is not None:
            chosen.setdefault(training["label"], []).append(rate)
    return {label: ", ".join(f"{rate:g}" for rate in dict.fromkeys(rates)) for label, rates in chosen.items()}


def knees(case: CaseRecord) -> str:
    """The knee of quality against each cost and, with several seeds, the share of resamples that agree."""

    found = case.metrics.get("knees") or {}
    several = any(each["seeds"] > 1 for each in found.values())
    lines = [
        f"{_heading(cost)}: {each['knee'] or 'none'}" + f" in {100 * each['knee_share']:.0f} %" * several
        for cost, each in found.items()
    ]
    how_sure = ", with the share of resamples of seeds," if several else " of one seed"
    return f"knee{how_sure} by {'; by '.join(lines)}" if lines else ""
