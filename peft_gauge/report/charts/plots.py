"""The report's plots as Vega-Lite, made with Altair: for the page, which inserts the rows itself, and for image files.

A spec names its data but does not contain it, so that a page has every row once; axes differ from panel to panel and
are added by `fitted`. Colour is never the only distinction: categories have letters in their segments, and methods and
kinds have shapes. What is unsteady is hollow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_gauge.errors import GaugeError
from peft_gauge.report.charts.looks import BETTER, BLACK, GREY, METHODS, WORSE
from peft_gauge.report.terminal.plan_table import LOOKS as CATEGORY_NAMES

if TYPE_CHECKING:
    from peft_gauge.report.charts.looks import Look

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
OTHER = "other"
"""Stands for every point of a sweep that is not a method."""
LIGHT_TEXT = ("W", "G", "L", "D", "I", "U", "C")
"""Letters on a dark colour."""
LEAST_LETTERED = 0.03
"""The least share of the longest bar for which a letter fits into a segment."""

KINDS = {
    "measured": (BETTER[0], "square"),
    "planned": (WORSE[0], "diamond"),
    "ceiling": (GREY[0], "cross"),
}
CHANGES = {"worse": (WORSE[0], "triangle-up"), "better": (BETTER[0], "triangle-down")}
PLAIN, PALE = BLACK[0], GREY[0]

UNITS = {
    "B": "replace(format(datum.value, '~s'), regexp('([kMGTP]?)$'), ' $1') + 'B'",
    "s": "replace(format(datum.value, '~s'), regexp('([mµnk]?)$'), ' $1') + 's'",
    "": "abs(datum.value) >= 10000 ? format(datum.value, '~s') : format(datum.value, ',.10~g')",
}
"""Labels of ticks by unit, as Vega's expressions."""
BAND = 26  # pixels of a bar and its gap
CONFIG = {
    "view": {"stroke": None},
    "axis": {
        "labelLimit": 220,
        "labelOverlap": "greedy",
        "labelSeparation": 8,
        "labelFlush": True,
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelColor": PLAIN,
        "titleColor": PLAIN,
        "gridOpacity": 0.35,
        "domainColor": PALE,
        "tickColor": PALE,
        "gridColor": PALE,
    },
    "text": {"color": PLAIN},
    "title": {"color": PLAIN, "subtitleColor": PALE},
    "legend": {
        "orient": "bottom",
        "columns": 3,
        "labelLimit": 260,
        "symbolStrokeWidth": 1.5,
        "labelColor": PLAIN,
        "titleColor": PLAIN,
    },
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


def category_name(category: str) -> str:
    """The letter and the name of a category, such as "W base weights"."""
    known = category if category in CATEGORIES else "other"
    return f"{CATEGORIES[known][0]} {CATEGORY_NAMES[known][0]}"


def spec(kind: str, looks: Mapping[str, Look]) -> dict[str, Any]:
    """The Vega-Lite spec of one panel of ``kind``, whose data has that name; `fitted` adds the panel's axes.

    ``looks``: of all labels of the page, so that a method looks the same in each panel.
    """
    made = {
        "memory": _memory,
        "planned": _planned,
        "sequence": _sequence,
        "times": _times,
        "quality": _quality,
        "history": _history,
        "versions": _versions,
    }[kind]
    alt = altair()
    chart = made(alt, kind, looks).properties(
        width="container", autosize=alt.AutoSizeParams(type="fit-x", contains="padding"), background="transparent"
    )
    document: dict[str, Any] = chart.configure(**CONFIG).to_dict(validate=True)
    return document


def fitted(node: Any, axes: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Any:
    """``node`` of a spec for the panel of ``rows``: with the title, ends and ticks of each of ``axes``, and legends of
    only those values that occur. plots.js does the same."""
    if isinstance(node, list):
        return [fitted(each, axes, rows) for each in node]
    if not isinstance(node, dict):
        return node
    found = {name: fitted(each, axes, rows) for name, each in node.items()}
    encoding = found.get("encoding", {})
    for name, axis in axes.items():
        channel = encoding.get(name)
        if channel is not None:
            channel["title"] = axis["title"]
            channel["axis"] = {**channel.get("axis", {}), "values": axis["ticks"], "labelExpr": UNITS[axis["unit"]]}
            scale = channel.get("scale", {})
            zero = {} if scale.get("type") == "log" else {"zero": False}
            channel["scale"] = {**scale, "domain": axis["domain"], "nice": False, **zero}
    for name in ("color", "shape", "strokeDash"):
        scale = encoding.get(name, {}).get("scale")
        if scale:
            occurring = {row.get(encoding[name]["field"]) for row in rows}
            kept = [pair for pair in zip(scale["domain"], scale["range"], strict=True) if pair[0] in occurring]
            scale["domain"], scale["range"] = [pair[0] for pair in kept], [pair[1] for pair in kept]
    return found


def _chart(alt: Any, name: str) -> Any:
    return alt.Chart(alt.NamedData(name=name))


def _bands(alt: Any) -> Any:
    return alt.Y(
        "name:N",
        title=None,
        sort=None,
        axis=alt.Axis(labelLimit=240, labelOverlap=False, labelFlush=False, ticks=False, domain=False),
    )


def _look(alt: Any, field: str, looks: Mapping[str, tuple[str, str]], *, legend: bool = True) -> dict[str, Any]:
    """Colour and shape for each value of ``field``, in one legend."""
    names, colours, shapes = list(looks), [look[0] for look in looks.values()], [look[1] for look in looks.values()]
    shown = alt.Legend(title=None) if legend else None
    return {
        "color": alt.Color(field, scale=alt.Scale(domain=names, range=colours), legend=shown),
        "shape": alt.Shape(field, scale=alt.Scale(domain=names, range=shapes), legend=shown),
    }


def _pairs(looks: Mapping[str, Look]) -> dict[str, tuple[str, str]]:
    return {name: (look.light, look.shape) for name, look in looks.items()}


def _points(base: Any, unsteady: str, **encoding: Any) -> list[Any]:
    """Filled points, and hollow ones where the expression ``unsteady`` holds."""
    mark = {"size": 80, "opacity": 1, "strokeWidth": 2}
    return [
        base.transform_filter(f"!({unsteady})").mark_point(filled=True, **mark).encode(**encoding),
        base.transform_filter(unsteady).mark_point(filled=False, **mark).encode(**encoding),
    ]


def _memory(alt: Any, name: str, _looks: Mapping[str, Look]) -> Any:
    names = [category_name(category) for category in CATEGORIES]
    scale = alt.Scale(domain=names, range=[colour for _, colour in CATEGORIES.values()])
    bars = _chart(alt, name).encode(x=alt.X("bytes:Q", stack="zero"), y=_bands(alt), order=alt.Order("place:Q"))
    letter = alt.Color("category:N", scale=scale, legend=alt.Legend(title=None))
    tooltip = [alt.Tooltip(field) for field in ("label:N", "category:N", "shown:N")]
    dark = alt.FieldOneOfPredicate(field="letter", oneOf=list(LIGHT_TEXT))
    on_bars = (
        bars.transform_joinaggregate(whole="sum(bytes)", groupby=["label"])
        .transform_joinaggregate(longest="max(whole)")
        .transform_calculate(lettered=f"datum.bytes < {LEAST_LETTERED} * datum.longest ? '' : datum.letter")
        .mark_text(fontSize=11, fontWeight="bold")
        .encode(
            x=alt.X("bytes:Q", stack="zero", bandPosition=0.5),
            text="lettered:N",
            detail="place:Q",
            color=alt.condition(dark, alt.value("#FFFFFE"), alt.value("#000001")),
        )
    )
    segments = bars.mark_bar(stroke=PALE, strokeWidth=0.5).encode(color=letter, tooltip=tooltip)
    return alt.layer(segments, on_bars).properties(height=alt.Step(BAND))


def _planned(alt: Any, name: str, _looks: Mapping[str, Look]) -> Any:
    base = _chart(alt, name).encode(x=alt.X("bytes:Q"), y=_bands(alt))
    span = base.mark_line(color=PALE, strokeWidth=1).encode(detail="label:N")
    tooltip = ["label:N", "kind:N", "shown:N"]
    points = _points(base, "datum.kind !== 'measured'", **_look(alt, "kind:N", KINDS), tooltip=tooltip)
    return alt.layer(span, *points).properties(height=alt.Step(BAND))


def _sequence(alt: Any, name: str, looks: Mapping[str, Look]) -> Any:
    base = _chart(alt, name).encode(
        x=alt.X("seq:Q", scale=alt.Scale(type="log")), y=alt.Y("bytes:Q", scale=alt.Scale(type="log"))
    )
    look = _look(alt, "label:N", _pairs(looks))
    dashes = alt.Scale(domain=["measured", "planned"], range=[[1, 0], [5, 3]])
    lines = base.mark_line().encode(
        color=look["color"], strokeDash=alt.StrokeDash("source:N", scale=dashes, legend=alt.Legend(title=None))
    )
    tooltip = ["label:N", "source:N", "seq:Q", "shown:N"]
    points = _points(base, "datum.source === 'planned'", **look, tooltip=tooltip)
    return alt.layer(lines, *points).properties(height=300)


def _times(alt: Any, name: str, looks: Mapping[str, Look]) -> Any:
    base = _chart(alt, name).encode(y=_bands(alt))
    look = _look(alt, "label:N", _pairs(looks), legend=False)
    interval = (
        base.transform_filter("isValid(datum.low)")
        .mark_rule(strokeWidth=3, opacity=0.55)
        .encode(x=alt.X("low:Q"), x2="high:Q", color=look["color"])
    )
    tooltip = ["label:N", "shown:N", "interval:N", "rounds:Q", "unsteady:N"]
    medians = _points(base.encode(x=alt.X("value:Q")), "isValid(datum.unsteady)", **look, tooltip=tooltip)
    return alt.layer(interval, *medians).properties(height=alt.Step(BAND))


def _quality(alt: Any, name: str, looks: Mapping[str, Look]) -> Any:
    base = _chart(alt, name).encode(x=alt.X("value:Q", scale=alt.Scale(type="log")), y=alt.Y("quality:Q"))
    front = base.transform_filter("datum.front").mark_line(color=PALE, interpolate="step-after", strokeDash=[4, 3])
    own = _pairs({label: look for label, look in looks.items() if label in METHODS}) | {OTHER: (PLAIN, "circle")}
    look = _look(alt, "look:N", own, legend=False)
    seeds = base.transform_filter("isValid(datum.quality_low)").mark_rule(strokeWidth=2, opacity=0.55)
    over_seeds = seeds.encode(y=alt.Y("quality_low:Q"), y2="quality_high:Q", color=look["color"])
    tooltip = ["label:N", "shown:N", "quality:Q", "quality_low:Q", "quality_high:Q", "seeds:Q", "unsteady:N"]
    points = _points(base, "isValid(datum.unsteady)", **look, tooltip=tooltip)
    names = base.mark_text(align="left", dx=9, fontSize=11).encode(text="label:N")
    return alt.layer(over_seeds, front, *points, names).properties(height=320)


def _history(alt: Any, name: str, looks: Mapping[str, Look]) -> Any:
    """One metric over dates; the labels of ``looks`` are machines."""
    x = alt.X(
        "when:T", title="end of the run (UTC)", axis=alt.Axis(tickCount=5), scale=alt.Scale(type="utc", padding=12)
    )
    base = _chart(alt, name).encode(x=x, y=alt.Y("value:Q"))
    look = _look(alt, "machine:N", _pairs(looks))
    interval = (
        base.transform_filter("isValid(datum.low)")
        .mark_rule(opacity=0.45, strokeWidth=2)
        .encode(y=alt.Y("low:Q"), y2="high:Q", color=look["color"])
    )
    line = base.mark_line(strokeWidth=1).encode(color=look["color"])
    return alt.layer(interval, line, *_over_runs(base, look)).properties(height=280)


def _versions(alt: Any, name: str, looks: Mapping[str, Look]) -> Any:
    """One metric over versions of the libraries."""
    y = alt.Y("versions:N", title=None, sort=None, axis=alt.Axis(labelLimit=260, labelOverlap=False, labelFlush=False))
    base = _chart(alt, name).encode(x=alt.X("value:Q"), y=y)
    return alt.layer(*_over_runs(base, _look(alt, "machine:N", _pairs(looks)))).properties(height=alt.Step(34))


def _over_runs(base: Any, look: Mapping[str, Any]) -> list[Any]:
    """A point for each run, and a larger mark at each change."""
    tooltip = ["run:N", "when:N", "machine:N", "shown:N", "change:N", "libraries:N", "commit:N"]
    marks = [base.mark_point(size=30, opacity=1, filled=True).encode(**look, tooltip=tooltip)]
    for change, (colour, shape) in CHANGES.items():
        changed = base.transform_filter(f"datum.change === '{change}'")
        mark = {"size": 180, "filled": True, "opacity": 1, "color": colour, "stroke": PALE, "shape": shape}
        marks.append(changed.mark_point(**mark).encode(tooltip=tooltip))
    return marks
