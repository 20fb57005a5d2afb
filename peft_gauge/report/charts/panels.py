"""The content of the report's plots: rows as a spec reads them, in panels with axes, and a question as the title."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from peft_gauge.report.charts import axes
from peft_gauge.report.charts.looks import METHODS
from peft_gauge.report.charts.plots import CATEGORIES, KINDS, OTHER, category_name
from peft_gauge.report.format import shown_bytes, shown_seconds
from peft_gauge.report.html import tasks

if TYPE_CHECKING:
    from peft_gauge.report.html.page_rows import Row

PLOTTED = ("times", "memory", "quality", "planned", "sequence")
TITLES = {
    "times": "Which method is fastest?",
    "memory": "Where does the memory go?",
    "quality": "What does quality cost?",
    "planned": "How far are plans from measurements?",
    "sequence": "How does memory grow with the sequence?",
    "history": "How did a metric develop?",
}
OVER_BASE = " / base forward"


def prepared(kind: str, rows: Iterable[Row]) -> list[Row]:
    """``rows`` of a report as the plot ``kind`` reads them; each has a ``panel``."""
    made: dict[str, Callable[[Iterable[Row]], Iterator[Row]]] = {
        "memory": _memory,
        "planned": _planned,
        "sequence": _sequence,
        "times": _times,
        "quality": _quality,
    }
    return list(made[kind](rows))


def panels(kind: str, rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """For each panel of prepared ``rows``, in order: ``where`` it was measured, ``what`` is shown, and its axes."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["panel"], []).append(row)
    return {panel: _panel(kind, own) for panel, own in found.items()}


def _panel(kind: str, rows: Sequence[Row]) -> dict[str, Any]:
    about = {name: rows[0][name] for name in ("where", "what") if name in rows[0]}
    return about | {"axes": _AXES[kind](rows)}


def _memory(rows: Iterable[Row]) -> Iterator[Row]:
    """Segments with the category's letter, name and place in the bar, below the bar's name with its total."""
    rows = list(rows)
    totals: dict[tuple[str, str], int] = {}
    for row in rows:
        key = row["panel"], row["label"]
        totals[key] = totals.get(key, 0) + row["bytes"]
    places = {name: place for place, name in enumerate(CATEGORIES)}
    for row in rows:
        known = row["category"] if row["category"] in CATEGORIES else "other"
        yield {
            **_subject(row),
            "name": f"{row['label']} · {shown_bytes(totals[row['panel'], row['label']])}",
            "category": category_name(known),
            "letter": CATEGORIES[known][0],
            "place": places[known],
            "bytes": row["bytes"],
            "shown": shown_bytes(row["bytes"]),
        }


def _subject(row: Row) -> Row:
    return {name: row[name] for name in ("method", "model", "machine", "where", "panel", "label") if name in row}


def _planned(rows: Iterable[Row]) -> Iterator[Row]:
    """One row for each kind (measured, planned, ceiling), from rows with all three."""
    for row in rows:
        error = row["relative_error"]
        name = row["label"] if error is None else f"{row['label']} · {100 * error:+.2f} %"
        for kind in KINDS:
            value = row[f"{kind}_bytes"]
            if value is not None:
                yield {**_subject(row), "name": name, "kind": kind, "bytes": value, "shown": shown_bytes(value)}


def _sequence(rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        more = {"source": row["source"], "seq": row["seq"], "bytes": row["bytes"], "shown": shown_bytes(row["bytes"])}
        yield {**_subject(row), **more}


def _times(rows: Iterable[Row]) -> Iterator[Row]:
    """Ratios to the base's forward first, which are free of most of the machine's noise, then seconds; the step before
    its phases, and within a panel the fastest first."""
    rows = list(rows)
    found = [*filter(None, map(_ratio, rows)), *map(_seconds, rows)]
    found.sort(key=lambda row: not row["what"].startswith("step "))
    found.sort(key=lambda row: not row["what"].endswith(OVER_BASE))
    order = {row["panel"]: place for place, row in reversed([*enumerate(found)])}
    yield from sorted(found, key=lambda row: (order[row["panel"]], row["value"]))


def _ratio(row: Row) -> Row | None:
    if row["over_control"] is None:
        return None
    what = row["metric"].removesuffix("_seconds") + OVER_BASE
    shown = f"{row['over_control']:.2f} ×"
    return _time(
        row, what, shown, row["over_control"], row["over_control_low"], row["over_control_high"], "{:.2f}".format
    )


def _seconds(row: Row) -> Row:
    what = f"{row['metric'].removesuffix('_seconds').replace('_', ' ')} time"
    seconds = row["seconds"]
    return _time(row, what, shown_seconds(seconds), seconds, row["low_seconds"], row["high_seconds"], shown_seconds)


def _time(
    row: Row, what: str, shown: str, value: float, low: float | None, high: float | None, words: Callable[[float], str]
) -> Row:
    return {
        **_subject(row),
        "panel": f"{what}: {row['where']}",
        "what": what,
        "name": f"{row['label']} · {shown}",
        "value": value,
        "low": low,
        "high": high,
        "shown": shown,
        "interval": None if low is None or high is None else f"{words(low)} to {words(high)}",
        "rounds": row["rounds"],
        "unsteady": row["unsteady"],
    }


def _quality(rows: Iterable[Row]) -> Iterator[Row]:
    """Points with a quality; those that diverged are in the table only."""
    for row in rows:
        if row["quality"] is None:
            continue
        method = row["label"].lower().split(" ")[0]
        kept = ("task", "cost", "value", "quality_is", "quality", "quality_low", "quality_high", "seeds", "front")
        yield {
            **_subject(row),
            **{name: row[name] for name in kept},
            "look": method if method in METHODS else OTHER,
            "unsteady": row["unsteady"],
            "shown": _cost(row["cost"], row["value"]),
        }


def _cost(cost: str, value: float) -> str:
    unit = tasks.unit(cost)
    return {"B": shown_bytes, "s": shown_seconds}.get(unit, "{:,}".format)(value)


def _memory_axes(rows: Sequence[Row]) -> dict[str, Any]:
    totals: dict[str, int] = {}
    for row in rows:
        totals[row["label"]] = totals.get(row["label"], 0) + row["bytes"]
    return {"x": axes.linear("peak memory of one step (bytes)", totals.values(), zero=True) | {"unit": "B"}}


def _planned_axes(rows: Sequence[Row]) -> dict[str, Any]:
    return {"x": axes.linear("peak memory (bytes)", [row["bytes"] for row in rows], zero=True) | {"unit": "B"}}


def _sequence_axes(rows: Sequence[Row]) -> dict[str, Any]:
    lengths = sorted({row["seq"] for row in rows})
    x = axes.logarithmic("sequence length (tokens, logarithmic)", lengths)
    if len(lengths) <= axes.MOST_TICKS:
        x["ticks"] = lengths  # the lengths that were measured or planned
    y = axes.logarithmic("peak memory (bytes, logarithmic)", [row["bytes"] for row in rows])
    return {"x": x | {"unit": ""}, "y": y | {"unit": "B"}}


def _times_axes(rows: Sequence[Row]) -> dict[str, Any]:
    what = rows[0]["what"]
    is_ratio = what.endswith(OVER_BASE)
    ends = [row[name] for row in rows for name in ("value", "low", "high") if row[name] is not None]
    title = f"{what} (times, 95 % interval)" if is_ratio else f"{what} (seconds, 95 % interval)"
    return {"x": axes.linear(title, ends, zero=True) | {"unit": "" if is_ratio else "s"}}


def _quality_axes(rows: Sequence[Row]) -> dict[str, Any]:
    cost = rows[0]["cost"]
    unit = tasks.unit(cost)
    about = {"B": "bytes, ", "s": "seconds, "}.get(unit, "")
    x = axes.logarithmic(f"{tasks.cost_words(cost)} ({about}logarithmic)", [row["value"] for row in rows])
    names = ("quality", "quality_low", "quality_high")
    ends = [row[name] for row in rows for name in names if row[name] is not None]
    y = axes.linear(f"{rows[0]['quality_is']} (higher is better)", ends)
    return {"x": x | {"unit": unit}, "y": y | {"unit": ""}}


_AXES: dict[str, Callable[[Sequence[Row]], dict[str, Any]]] = {
    "memory": _memory_axes,
    "planned": _planned_axes,
    "sequence": _sequence_axes,
    "times": _times_axes,
    "quality": _quality_axes,
}
