"""The report's plots as Vega-Lite, made with Altair: for the page, which inserts the rows itself, and for image files.

A spec names its data but does not contain it, so that a page has every row once. Colour is never the only distinction:
categories have letters in their segments, and methods and kinds have shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_gauge.errors import GaugeError
from peft_gauge.report.charts.memory_picture import LOOKS
from peft_gauge.report.terminal.plan_table import LOOKS as CATEGORY_NAMES

if TYPE_CHECKING:
    from peft_gauge.report.html.page_data import Row

# Tol's "muted" scheme, distinct for colour-blind readers, and three greys for categories that are always small. Each
# category also has a letter, shown in its segment.
CATEGORIES = {
    "base_weights": ("W", "#332288"),
    "quantization_constants": ("Q", "#88CCEE"),
    "adapter_weights": ("A", "#44AA99"),
    "gradients": ("G", "#117733"),
    "optimizer_state": ("S", "#999933"),
    "optimizer_temporaries": ("T", "#DDCC77"),
    "activations": ("V", "#CC6677"),
    "logits_and_loss": ("L", "#882255"),
    "dequantized_temporaries": ("D", "#AA4499"),
    "gathered_weights": ("H", "#6699CC"),
    "unreduced_gradients": ("U", "#661100"),
    "communication_buffers": ("C", "#AA4466"),
    "inputs": ("I", "#666666"),
    "buffers": ("B", "#999999"),
    "other": ("O", "#DDDDDD"),
}
LIGHT_TEXT = ("W", "G", "L", "D", "I", "U", "C")
"""Letters on a dark colour."""
LEAST_LETTERED = 0.03
"""The least share of the longest bar for which a letter fits into a segment."""

KINDS = {"measured": LOOKS[1], "planned": LOOKS[3], "ceiling": LOOKS[4]}
CHANGES = {"worse": ("#D55E00", "triangle-up"), "better": ("#0072B2", "triangle-down")}
GREY = "#777777"  # contrast 4.5:1 on white, 4.1:1 on the page's dark background

BYTES = "format(datum.value, '~s') + 'B'"
SECONDS = "format(datum.value, '~s') + 's'"
BAND = 26  # pixels of a bar and its gap
CONFIG = {
    "view": {"stroke": None},
    "axis": {"labelLimit": 220, "gridOpacity": 0.4, "domainColor": GREY, "tickColor": GREY, "gridColor": GREY},
    "legend": {"orient": "bottom", "columns": 3, "labelLimit": 260, "symbolStrokeWidth": 1.5},
}


def altair() -> Any:
    """The library; raises `GaugeError` if it or its renderer is not installed."""
    try:
        import altair as alt
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise GaugeError(f"a report needs {error.name}; install it: pip install -e '.[report]'") from error
    return alt


def vega_lite_version() -> str:
    """The version that Altair targets, as vl-convert names it: "6.1"."""
    return ".".join(altair().SCHEMA_VERSION.lstrip("v").split(".")[:2])


def categories(rows: Iterable[Row]) -> list[Row]:
    """Rows of memory with the plot's properties of the category: letter, name, and place in the bar."""
    places = {name: place for place, name in enumerate(CATEGORIES)}
    return [
        {**row, "letter": CATEGORIES[known][0], "name": category_name(known), "place": places[known]}
        for row in rows
        for known in [row["category"] if row["category"] in CATEGORIES else "other"]
    ]


def category_name(category: str) -> str:
    """The letter and the name of a category, such as "W base weights"."""
    known = category if category in CATEGORIES else "other"
    return f"{CATEGORIES[known][0]} {CATEGORY_NAMES[known][0]}"


def kinds(rows: Iterable[Row]) -> list[Row]:
    """One row for each kind (measured, planned, ceiling), from rows with all three."""
    return [
        {**row, "kind": kind, "bytes": row[f"{kind}_bytes"]}
        for row in rows
        for kind in KINDS
        if row[f"{kind}_bytes"] is not None
    ]


def prepared(kind: str, rows: Sequence[Row]) -> list[Row]:
    """``rows`` as the plot ``kind`` reads them."""
    if kind == "memory":
        return categories(rows)
    return kinds(rows) if kind == "planned" else list(rows)


def spec(kind: str, labels: Sequence[str]) -> dict[str, Any]:
    """The Vega-Lite spec of one panel of ``kind``, whose data has that name.

    ``labels``: of all panels, so that a method looks the same in each.
    """
    made = {
        "memory": _memory,
        "planned": _planned,
        "sequence": _sequence,
        "times": _times,
        "pareto": _pareto,
        "history": _history,
        "versions": _history,
    }[kind]
    alt = altair()
    chart = made(alt, kind, labels)
    fitted = chart.properties(width="container", autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
    document: dict[str, Any] = fitted.configure(**CONFIG).to_dict(validate=True)
    return document


def _chart(alt: Any, name: str) -> Any:
    return alt.Chart(alt.NamedData(name=name))


def _bytes_axis(alt: Any) -> Any:
    return alt.Axis(labelExpr=BYTES, tickCount=5)


def _bands(alt: Any) -> Any:
    return alt.Y("label:N", title=None, sort=None, axis=alt.Axis(labelLimit=170))


def _look(alt: Any, field: str, looks: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Colour and shape for each value of ``field``, in one legend."""
    names, colours, shapes = list(looks), [look[0] for look in looks.values()], [look[1] for look in looks.values()]
    legend = alt.Legend(title=None)
    return {
        "color": alt.Color(field, scale=alt.Scale(domain=names, range=colours), legend=legend),
        "shape": alt.Shape(field, scale=alt.Scale(domain=names, range=shapes), legend=legend),
    }


def _memory(alt: Any, name: str, _labels: Sequence[str]) -> Any:
    names = [category_name(category) for category in CATEGORIES]
    scale = alt.Scale(domain=names, range=[colour for _, colour in CATEGORIES.values()])
    x = alt.X("bytes:Q", title="bytes (1 GB = 1,000,000,000 bytes)", stack="zero", axis=_bytes_axis(alt))
    bars = _chart(alt, name).encode(x=x, y=_bands(alt), order=alt.Order("place:Q"))
    letter = alt.Color("name:N", scale=scale, legend=alt.Legend(title=None))
    tooltip = [alt.Tooltip(field) for field in ("label:N", "name:N", "bytes:Q")]
    dark = alt.FieldOneOfPredicate(field="letter", oneOf=list(LIGHT_TEXT))
    on_bars = (
        bars.transform_joinaggregate(whole="sum(bytes)", groupby=["label"])
        .transform_joinaggregate(longest="max(whole)")
        .transform_calculate(shown=f"datum.bytes < {LEAST_LETTERED} * datum.longest ? '' : datum.letter")
        .mark_text(fontSize=11, fontWeight="bold")
        .encode(
            x=alt.X("bytes:Q", stack="zero", bandPosition=0.5),
            text="shown:N",
            detail="place:Q",
            color=alt.condition(dark, alt.value("#FFFFFE"), alt.value("#000001")),
        )
    )
    segments = bars.mark_bar(stroke=GREY, strokeWidth=0.5).encode(color=letter, tooltip=tooltip)
    return alt.layer(segments, on_bars).properties(height=alt.Step(BAND))


def _planned(alt: Any, name: str, _labels: Sequence[str]) -> Any:
    base = _chart(alt, name).encode(
        x=alt.X(
            "bytes:Q",
            title="peak bytes (1 GB = 1,000,000,000 bytes)",
            axis=_bytes_axis(alt),
            scale=alt.Scale(zero=True),
        ),
        y=_bands(alt),
    )
    span = base.mark_line(color=GREY, strokeWidth=1).encode(detail="label:N")
    points = base.mark_point(size=80, opacity=1, strokeWidth=2).encode(
        **_look(alt, "kind:N", KINDS), tooltip=["label:N", "kind:N", "bytes:Q"]
    )
    return alt.layer(span, points).properties(height=alt.Step(BAND))


def method_looks(labels: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a shape for each label; the pairs differ for up to 49."""
    shapes = [shape for _, shape in LOOKS]
    return {
        each: (LOOKS[place % len(LOOKS)][0], shapes[(place + place // len(LOOKS)) % len(LOOKS)])
        for place, each in enumerate(labels)
    }


def _sequence(alt: Any, name: str, labels: Sequence[str]) -> Any:
    base = _chart(alt, name).encode(
        x=alt.X(
            "seq:Q",
            title="sequence length (tokens, logarithmic)",
            scale=alt.Scale(type="log", base=2, nice=False, padding=12),
            axis=alt.Axis(format="d", tickCount=6),
        ),
        y=alt.Y(
            "bytes:Q",
            title="peak bytes (logarithmic; 1 GB = 1,000,000,000 bytes)",
            scale=alt.Scale(type="log", nice=False, padding=12),
            axis=_bytes_axis(alt),
        ),
    )
    look = _look(alt, "label:N", method_looks(labels))
    dashes = alt.Scale(domain=["measured", "planned"], range=[[1, 0], [5, 3]])
    lines = base.mark_line().encode(
        color=look["color"], strokeDash=alt.StrokeDash("source:N", scale=dashes, legend=alt.Legend(title=None))
    )
    tooltip = ["label:N", "source:N", "seq:Q", "bytes:Q"]
    points = base.mark_point(size=60, opacity=1, strokeWidth=1.8).encode(**look, tooltip=tooltip)
    return alt.layer(lines, points).properties(height=320)


def _times(alt: Any, name: str, _labels: Sequence[str]) -> Any:
    base = _chart(alt, name).encode(y=_bands(alt))
    axis = alt.Axis(labelExpr=SECONDS, tickCount=5)
    title = "median with a 95 % interval (seconds)"
    interval = (
        base.transform_filter("isValid(datum.low_seconds)")
        .mark_rule(color=GREY, strokeWidth=3)
        .encode(x=alt.X("low_seconds:Q", title=title, axis=axis, scale=alt.Scale(zero=True)), x2="high_seconds:Q")
    )
    median = base.mark_point(size=80, filled=True, opacity=1, color=LOOKS[1][0]).encode(
        x=alt.X("seconds:Q", title=title, axis=axis),
        tooltip=["label:N", "metric:N", "seconds:Q", "low_seconds:Q", "high_seconds:Q", "rounds:Q"],
    )
    return alt.layer(interval, median).properties(height=alt.Step(BAND))


def _pareto(alt: Any, name: str, _labels: Sequence[str]) -> Any:
    chart = _chart(alt, name).transform_filter("isValid(datum.quality)")
    base = chart.encode(
        x=alt.X(
            "value:Q",
            title="cost (lower is better), logarithmic",
            # Adapters and full fine-tuning are orders of magnitude apart, and the knee is defined over the logarithm.
            scale=alt.Scale(type="log", nice=False, padding=40),
            axis=alt.Axis(format="~s"),
        ),
        y=alt.Y("quality:Q", title="quality (higher is better)", scale=alt.Scale(zero=False)),
    )
    front = base.transform_filter("datum.front").mark_line(color=GREY, interpolate="step-after")
    shape = alt.Shape(
        "front:N",
        scale=alt.Scale(domain=[True, False], range=["circle", "cross"]),
        legend=alt.Legend(title=None, labelExpr="datum.value ? 'not dominated' : 'dominated'"),
    )
    tooltip = ["label:N", "cost:N", "value:Q", "quality:Q"]
    points = base.mark_point(size=80, opacity=1, strokeWidth=2, color=LOOKS[1][0]).encode(shape=shape, tooltip=tooltip)
    names = base.mark_text(align="left", dx=8, dy=-6).encode(text="label:N")
    spread = base.transform_filter("isValid(datum.quality_low)").mark_rule(color=GREY)
    over_seeds = spread.encode(y=alt.Y("quality_low:Q", title="quality (higher is better)"), y2="quality_high:Q")
    return alt.layer(over_seeds, front, points, names).properties(height=320)


def _history(alt: Any, name: str, labels: Sequence[str]) -> Any:
    """One metric over dates, or over ``versions`` of libraries; ``labels`` are machines. The unit is a parameter."""
    if name == "history":
        x = alt.X("when:T", title="end of the run (UTC)", scale=alt.Scale(type="utc", padding=12))
    else:
        x = alt.X("versions:N", title=None, sort=None, axis=alt.Axis(labelAngle=-30, labelLimit=260))
    y = alt.Y(
        "value:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(labelExpr="format(datum.value, '~s') + unit")
    )
    base = _chart(alt, name).encode(x=x, y=y)
    look = _look(alt, "machine:N", method_looks(labels))
    tooltip = ["run:N", "when:N", "machine:N", "shown:N", "change:N", "libraries:N", "commit:N"]
    interval = (
        base.transform_filter("isValid(datum.low)")
        .mark_rule(opacity=0.45, strokeWidth=2)
        .encode(y=alt.Y("low:Q", title=None), y2="high:Q", color=look["color"])
    )
    line = base.mark_line(strokeWidth=1).encode(color=look["color"])
    points = base.mark_point(size=30, opacity=1, strokeWidth=1.5).encode(**look, tooltip=tooltip)
    layers = [
        line,
        points,
        *(each for change, look in CHANGES.items() for each in _changes(base, change, look, tooltip)),
    ]
    layers = [interval, *layers] if name == "history" else layers
    unit = alt.param(name="unit", value="")
    return alt.layer(*layers).add_params(unit).properties(height=320)


def _changes(base: Any, change: str, look: tuple[str, str], tooltip: list[str]) -> list[Any]:
    """A mark and a word at each point with this ``change``."""
    colour, shape = look
    changed = base.transform_filter(f"datum.change === '{change}'")
    mark = {"size": 180, "filled": True, "opacity": 1, "color": colour, "stroke": GREY, "shape": shape}
    return [
        changed.mark_point(**mark).encode(tooltip=tooltip),
        changed.mark_text(dy=-14, fontWeight="bold").encode(text="change:N"),
    ]


def panels(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """``rows`` by panel."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["panel"], []).append(row)
    return found


def labels_of(rows: Iterable[Row]) -> list[str]:
    """All labels, each once, in order of first appearance."""
    return list(dict.fromkeys(row["label"] for row in rows))
