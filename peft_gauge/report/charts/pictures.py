"""The report's plots as files: a few drawings with descriptive names, each for light and for dark backgrounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_gauge.errors import GaugeError
from peft_gauge.files import slug, write_whole
from peft_gauge.report.charts import panels
from peft_gauge.report.charts.looks import in_the_dark, looks_of
from peft_gauge.report.charts.plots import altair, fitted, spec, vega_lite_version
from peft_gauge.report.html.setups import setups_of

if TYPE_CHECKING:
    from peft_gauge.report.charts.looks import Look
    from peft_gauge.report.html.page_data import Report
    from peft_gauge.report.html.page_rows import Row

FORMATS = ("png", "svg")
WIDTH, HEIGHT = 640, 320  # of the plot, in pixels
DRAWN = ("times", "memory", "quality", "planned", "sequence", "memory")
"""The kinds to draw, each time the next panel of its kind: at most six drawings, and a dark variant of each."""
CHARACTER = 6.4  # pixels of a label's character, on average; a line is `LINE` high
LINE = 14
OFFSETS = ((9, -10), (9, 0), (9, 12), (0, -14), (0, 14), (-9, -10), (-9, 0), (-9, 12), (9, -24), (9, 24), (0, 26))
"""Places of a label around its point, the best first; to the left of the point if the first number is negative."""


def picture(kind: str, rows: Sequence[Row], looks: Mapping[str, Look], form: str, *, dark: bool = False) -> bytes:
    """One panel as an image in the format ``form``, one of `FORMATS`; ``rows`` are `panels.prepared`."""
    altair()
    import vl_convert

    (panel, about), *_ = panels.panels(kind, rows).items()
    what = f"{about['what']}: " if "what" in about else ""
    document = fitted(spec(kind, looks), about["axes"], rows) | {
        "width": WIDTH,
        "autosize": "pad",
        "padding": 8,
        "title": {
            "text": panels.TITLES[kind],
            "subtitle": panel if kind == "quality" else f"{what}{about['where']}",
            "anchor": "start",
            "fontSize": 15,
        },
        "datasets": {kind: rows},
    }
    if kind == "quality":
        _place_labels(document, rows, about["axes"])
    if dark:
        document = in_the_dark(document)
    if form == "svg":
        return vl_convert.vegalite_to_svg(document, vl_version=vega_lite_version()).encode()
    return vl_convert.vegalite_to_png(document, vl_version=vega_lite_version(), scale=2)


def save_pictures(report: Report, folder: Path, form: str) -> list[Path]:
    """Save the drawings to ``folder``, creating it; raises `GaugeError` if it cannot be written."""
    saved = []
    found = chosen(report)
    labels = [row["label"] for _, rows in found for row in rows]
    looks = looks_of(labels)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for kind, rows in found:
            name = slug(f"{panels.TITLES[kind]} {rows[0]['panel']}")[:100].strip("-")
            for dark in (False, True):
                out = folder / f"{name}{'-dark' if dark else ''}.{form}"
                write_whole(out, picture(kind, rows, looks, form, dark=dark))
                saved.append(out)
    except OSError as error:
        raise GaugeError(f"cannot write to {folder}: {error.strerror or error}") from error
    return saved


def chosen(report: Report) -> list[tuple[str, list[Row]]]:
    """The kind and the prepared rows of each drawing: the panels of the setups about which most is known."""
    setups = setups_of(report)
    order = {setup.where: place for place, setup in enumerate(setups)}
    order |= {setup.model: order[setup.where] for setup in reversed(setups)}  # a sweep has a model and no step
    ready: dict[str, list[list[Row]]] = {}
    for kind in panels.PLOTTED:
        by_panel: dict[str, list[Row]] = {}
        for row in panels.prepared(kind, report.rows(kind)):
            by_panel.setdefault(row["panel"], []).append(row)
        ready[kind] = sorted(by_panel.values(), key=lambda rows: _rank(rows, order))
    found = []
    for kind in DRAWN:
        if ready[kind]:
            found.append((kind, ready[kind].pop(0)))
    return found


def _rank(rows: Sequence[Row], order: Mapping[str, int]) -> tuple[Any, ...]:
    """Setups in their order, the step before its phases; sweeps over methods before others, with the most points."""
    first = rows[0]
    is_step = first.get("what", "").startswith("step")
    methods = sum(row.get("look") == row["label"] for row in rows)
    place = order.get(first.get("where") or first.get("model") or "", len(order))
    return place, not is_step, -methods, -len(rows)


def _place_labels(document: dict[str, Any], rows: Sequence[Row], axes: Mapping[str, Any]) -> None:
    """Give the text layer of a plot of quality its own rows, in pixels, where labels neither overlap nor leave it."""
    layer = next(each for each in document["layer"] if each["mark"]["type"] == "text")
    points = [(_x(row, axes), _y(row["quality"], axes), row["label"]) for row in rows]
    bars = [
        (_x(row, axes) - 1, _y(row["quality_high"], axes), _x(row, axes) + 1, _y(row["quality_low"], axes))
        for row in rows
        if row["quality_low"] is not None
    ]
    front = sorted((_x(row, axes), _y(row["quality"], axes)) for row in rows if row["front"])
    for (left, top), (right, end) in pairwise(front):  # a line that steps at the next point
        bars += [(left, top - 1, right, top + 1), (right - 1, min(top, end), right + 1, max(top, end))]
    placed = placed_labels(points, bars)
    layer["data"] = {"values": [{"px": x, "py": y, "label": label} for x, y, label in placed]}
    layer["mark"] = {**layer["mark"], "dx": 0, "baseline": "middle"}
    pixels = {"type": "quantitative", "scale": None}
    layer["encoding"]["x"] = {"field": "px", **pixels}
    layer["encoding"]["y"] = {"field": "py", **pixels}


def _x(row: Row, axes: Mapping[str, Any]) -> float:
    low, high = map(math.log, axes["x"]["domain"])
    return (math.log(row["value"]) - low) / (high - low) * WIDTH


def _y(quality: float, axes: Mapping[str, Any]) -> float:
    low, high = axes["y"]["domain"]
    return float((high - quality) / (high - low) * HEIGHT)


def placed_labels(
    points: Sequence[tuple[float, float, str]], bars: Sequence[Sequence[float]] = ()
) -> list[tuple[float, float, str]]:
    """The left end and the middle, in pixels, of a label for each of ``points`` that has room for it.

    A label covers no point, no interval (``bars``: left, top, right, bottom) and no other label, and stays within the
    plot. The table has those without room.
    """
    taken: list[Sequence[float]] = [*bars, *((x - 6, y - 6, x + 6, y + 6) for x, y, _ in points)]
    found = []
    for x, y, label in points:
        width = CHARACTER * len(label)
        for dx, dy in OFFSETS:
            left = x + dx - (width if dx < 0 else width / 2 if dx == 0 else 0)
            box = (left, y + dy - LINE / 2, left + width, y + dy + LINE / 2)
            inside = box[0] >= 0 and box[1] >= 0 and box[2] <= WIDTH and box[3] <= HEIGHT
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                found.append((left, y + dy, label))
                break
    return found


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
