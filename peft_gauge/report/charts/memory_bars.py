"""A plot of planned memory per GPU: one stacked bar per plan, by category, and the usable memory of GPUs.

A bar is as long as the device memory of its plan: the peak by category, the rest of the allocator's segments, and the
CUDA context.
"""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Any

from peft_gauge.errors import GaugeError
from peft_gauge.report.charts.memory_picture import GB, GREY, Card, save_plot, shown_gb
from peft_gauge.report.charts.plots import BAND, CATEGORIES, LIGHT_TEXT, altair
from peft_gauge.report.format import step_parts
from peft_gauge.report.terminal.plan_table import LOOKS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    Plan = Mapping[str, Any]
    """A plan as ``peft-gauge plan --json`` prints it."""

WIDTH = 620
LEAST_LETTERED = 0.02  # of the plot's width: room for a letter
LEAST_LISTED = 0.002  # of the longest bar: the legend leaves out categories that no bar shows

# Categories and the bytes of a device beyond the peak, each as (letter, name, colour), from the left.
SEGMENTS = {
    **{category: (letter, LOOKS[category][0], colour) for category, (letter, colour) in CATEGORIES.items()},
    "kept_by_allocator": ("K", "kept by the allocator", "#BBBBBB"),
    "outside_allocator": ("X", "CUDA context", "#777777"),
}


def read(files: Sequence[Path]) -> list[Plan]:
    """The plans in ``files``, each printed by ``peft-gauge plan --json``, in their order.

    Raises `GaugeError` for a file without plans, for a case that could not be planned, and for plans of different
    models or steps, whose bars would not be comparable.
    """
    plans = [plan for file in files for plan in _plans(file)]
    for plan in plans[1:]:
        for part in ("model", "step"):
            first, other = (_identity(each)[part] for each in (plans[0], plan))
            if first != other:
                raise GaugeError(f"the plans are not comparable: one {part} is {first}, another {other}")
    return plans


def _plans(file: Path) -> list[Plan]:
    hint = "; save one with: peft-gauge plan … --json > plan.json"
    try:
        plans = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise GaugeError(f"cannot read {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise GaugeError(f"{file} is not valid JSON{hint}") from error
    if not isinstance(plans, list) or not plans or not all(isinstance(plan, dict) for plan in plans):
        raise GaugeError(f"{file} is not a list of plans{hint}")
    for plan in plans:
        if "error" in plan:
            raise GaugeError(f"{file}: {plan.get('method')} could not be planned: {plan['error']}")
        missing = sorted({"model", "method", "settings", "device", "peak_by_category", "gpus"} - plan.keys())
        if missing:
            raise GaugeError(f"{file} has no {missing[0]} in a plan{hint}")
    return plans


def _identity(plan: Plan) -> dict[str, str]:
    settings = {**plan["settings"], "sharding": None}
    return {"model": plan["model"], "step": ", ".join(step_parts(settings))}


def segments(plan: Plan) -> dict[str, int]:
    """Bytes of the device by segment (`SEGMENTS`); their sum is the planned device memory."""
    found = dict.fromkeys(SEGMENTS, 0)
    for category, nbytes in plan["peak_by_category"].items():
        found[category if category in CATEGORIES else "other"] += nbytes
    found["kept_by_allocator"] = plan["device"]["reserved_bytes"] - sum(plan["peak_by_category"].values())
    found["outside_allocator"] = plan["device_bytes_estimate"] - plan["device"]["reserved_bytes"]
    return found


def label(plan: Plan) -> str:
    """The GPUs of a plan and how they share the step, such as "8 GPUs, FSDP2"."""
    sharding = plan["settings"].get("sharding")
    if not sharding:
        return "1 GPU"
    ranks, strategy = sharding["gpus"] * sharding["nodes"], str(sharding["strategy"]).upper()
    parts = {
        f"{ranks} GPUs": True,
        strategy.replace("ZERO", "ZeRO-"): True,
        f"{sharding.get('replicas')} replicas": sharding.get("replicas", 1) > 1,
        "kept": not sharding["reshard_after_forward"],
        "offloaded": sharding.get("offload"),
    }
    return ", ".join(part for part, is_given in parts.items() if is_given)


def cards_of(plans: Sequence[Plan]) -> list[Card]:
    """The GPUs that ``plans`` were compared with, each once."""
    return list({fit["gpu"]: Card(fit["gpu"], fit["usable_bytes"]) for plan in plans for fit in plan["gpus"]}.values())


def save(plans: Sequence[Plan], titles: Mapping[str, str], cards: Sequence[Card], out: Path) -> Path:
    """Draw ``plans`` to ``out`` (.svg or .png) and save their data next to it as CSV; returns the path of the data."""
    return save_plot(draw(plans, titles, cards), as_csv(plans), out)


def as_csv(plans: Sequence[Plan]) -> str:
    """One row per bar: the step, its device memory, and the bytes of each segment that some bar has."""
    found = [segments(plan) for plan in plans]
    present = [name for name in SEGMENTS if any(each[name] for each in found)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "step", "method", "gpus", "phase_of_peak", "device_bytes_estimate", *present])
    for plan, each in zip(plans, found, strict=True):
        step = [*_identity(plan).values(), plan["method"], label(plan), plan["phase_of_peak"]]
        writer.writerow([*step, plan["device_bytes_estimate"], *(each[name] for name in present)])
    return text.getvalue()


def draw(plans: Sequence[Plan], titles: Mapping[str, str], cards: Sequence[Card]) -> Any:
    """The plot as an Altair chart, with a panel per method; ``titles`` are the names of methods for readers.

    Colour is not the only distinction: a wide segment shows its category's letter. Raises `GaugeError` for two plans
    of the same method and GPUs.
    """
    alt = altair()
    if len({(plan["method"], label(plan)) for plan in plans}) < len(plans):
        raise GaugeError("two plans are of the same method and GPUs; give each only once")
    devices = [plan["device_bytes_estimate"] / GB for plan in plans]
    right = max(*devices, *(card.usable_bytes / GB for card in cards), 0) * 1.16
    listed = [
        name for name in SEGMENTS if any(segments(plan)[name] >= LEAST_LISTED * max(devices) * GB for plan in plans)
    ]
    methods = list(dict.fromkeys(plan["method"] for plan in plans))
    panels = [
        _panel(
            alt,
            [plan for plan in plans if plan["method"] == method],
            listed,
            cards,
            right,
            name=titles.get(method, method),
            first=method == methods[0],
            last=method == methods[-1],
        )
        for method in methods
    ]
    identity = _identity(plans[0])
    title = alt.TitleParams(
        f"{identity['model']}: planned memory of each GPU at the peak of a training step",
        subtitle=f"{identity['step']}, on each GPU; 1 GB = 1,000,000,000 bytes",
        anchor="start",
        subtitleColor=GREY,
        offset=14,
    )
    chart = alt.vconcat(*panels, spacing=12).properties(title=title, background="white")
    return (
        chart.configure_view(stroke=None)
        .configure_axis(gridColor="#eeeeee", labelFontSize=11, titleFontSize=12, labelLimit=220)
        .configure_legend(orient="bottom", columns=4, labelLimit=260)
    )


def _panel(
    alt: Any,
    plans: Sequence[Plan],
    listed: Sequence[str],
    cards: Sequence[Card],
    right: float,
    *,
    name: str,
    first: bool,
    last: bool,
) -> Any:
    """The bars of one method. The first panel has the names of GPUs above it, the last one the axis's labels."""
    parts: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    for plan in plans:
        begin = 0.0
        for place, (segment, nbytes) in enumerate(segments(plan).items()):
            letter, heading, _ = SEGMENTS[segment]
            end = begin + nbytes / GB
            wide = nbytes / GB >= LEAST_LETTERED * right
            parts.append(
                {
                    "bar": label(plan),
                    "segment": f"{letter} {heading}",
                    "letter": letter if wide else "",
                    "place": place,
                    "begin": begin,
                    "middle": (begin + end) / 2,
                    "end": end,
                }
            )
            begin = end
        ends.append({"bar": label(plan), "end": begin, "text": shown_gb(begin)})
    headings = [f"{SEGMENTS[segment][0]} {SEGMENTS[segment][1]}" for segment in listed]
    colours = alt.Scale(domain=headings, range=[SEGMENTS[segment][2] for segment in listed])
    scale = alt.Scale(domain=[0, right], nice=False)
    axis = alt.Axis(labels=last, ticks=last, tickCount=8)
    x_title = "device memory of each GPU (GB)" if last else None
    x = alt.X("begin:Q", title=x_title, scale=scale, axis=axis)
    y = alt.Y("bar:N", sort=None, title=None, axis=alt.Axis(domain=False, ticks=False, minExtent=120))
    shown = [part for part in parts if part["segment"] in headings and part["end"] > part["begin"]]
    lettered = [part for part in shown if part["letter"]]
    dark = alt.FieldOneOfPredicate(field="letter", oneOf=[*LIGHT_TEXT, "X"])
    lines = [
        {"gb": card.usable_bytes / GB, "name": f"{card.name}: {shown_gb(card.usable_bytes / GB)} usable"}
        for card in cards
    ]
    limits = alt.Chart(_values(alt, lines)).encode(x=alt.X("gb:Q", scale=scale))
    layers = [
        alt.Chart(_values(alt, shown))
        .mark_bar(stroke="white", strokeWidth=0.5)
        .encode(x=x, x2="end:Q", y=y, color=alt.Color("segment:N", scale=colours, sort=headings, title=None)),
        alt.Chart(_values(alt, lettered))
        .mark_text(fontSize=11, fontWeight="bold")
        .encode(
            x="middle:Q",
            y=y,
            text="letter:N",
            color=alt.condition(dark, alt.value("#FFFFFE"), alt.value("#000001")),
        ),
        alt.Chart(_values(alt, ends)).mark_text(align="left", dx=5, fontSize=11).encode(x="end:Q", y=y, text="text:N"),
        limits.mark_rule(color="#000000", strokeWidth=1.2, strokeDash=[5, 3]),
    ]
    if first:
        names = limits.mark_text(align="left", dx=4, fontSize=11, color="#333333")
        layers.append(names.encode(y=alt.value(-6), text="name:N"))
    heading = alt.TitleParams(name, anchor="start", fontSize=12, offset=4)
    return alt.layer(*layers).properties(width=WIDTH, height=alt.Step(BAND), title=heading)


def _values(alt: Any, rows: Sequence[dict[str, Any]]) -> Any:
    return alt.Data(values=list(rows))
