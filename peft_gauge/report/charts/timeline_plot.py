"""A plot of memory over a planned step: a stacked area by category, its phases, and the peak by name."""

from __future__ import annotations

import csv
import io
from itertools import groupby
from typing import TYPE_CHECKING, Any

from peft_gauge.report.charts.memory_picture import GB, GREY, save_plot
from peft_gauge.report.charts.plots import CATEGORIES, altair
from peft_gauge.report.terminal.plan_table import LOOKS
from peft_gauge.report.terminal.timeline_picture import peak_sentence, total

if TYPE_CHECKING:
    from pathlib import Path

    from peft_gauge.report.terminal.timeline_picture import Timeline

COLUMNS = 240
WIDTH, HEIGHT = 760, 380


def save(title: str, found: Timeline, out: Path) -> Path:
    """Draw ``found`` to ``out`` (.svg or .png) and save its data next to it as CSV; returns the path of the data."""
    return save_plot(draw(title, found), as_csv(found), out)


def as_csv(found: Timeline) -> str:
    """One row per column of the plot: the event's position, its phase, the total, and bytes by category."""
    text = io.StringIO()
    names = _present(found)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["event", "phase", "live_bytes", *names])
    for moment in found["moments"]:
        row = [moment["position"], moment["phase"], total(moment)]
        writer.writerow([*row, *(moment["by_category"].get(name, 0) for name in names)])
    return text.getvalue()


def draw(title: str, found: Timeline) -> Any:
    """The plot as an Altair chart."""
    alt = altair()
    present = _present(found)
    headings = [LOOKS[name][0] for name in present]
    rows = [
        {
            "event": moment["position"],
            "category": LOOKS[name][0],
            "order": order,
            "gb": moment["by_category"].get(name, 0) / GB,
        }
        for moment in found["moments"]
        for order, name in enumerate(present)
    ]
    last = found["moments"][-1]["position"]
    x = alt.X(
        "event:Q",
        title="allocations and releases, in order",
        scale=alt.Scale(domain=[0, last], nice=False),
        axis=alt.Axis(grid=False, tickCount=6),
    )
    top = total(found["peak"]) / GB * 1.12
    y = alt.Y("gb:Q", stack="zero", title="live memory, GB", scale=alt.Scale(domain=[0, top], nice=False))
    colours = alt.Scale(domain=headings, range=[CATEGORIES[name][1] for name in present])
    area = (
        alt.Chart(alt.Data(values=rows))
        .mark_area(interpolate="step-after")
        .encode(
            x=x,
            y=y,
            color=alt.Color("category:N", scale=colours, sort=headings, title=None),
            order=alt.Order("order:Q"),
        )
    )
    starts = _starts(found)
    lines = alt.Chart(alt.Data(values=starts)).mark_rule(color=GREY, strokeDash=[3, 3]).encode(x="event:Q")
    names = (
        alt.Chart(alt.Data(values=starts))
        .mark_text(align="left", dx=4, baseline="top", fontSize=12, color="#333333")
        .encode(x="event:Q", y=alt.value(2), text="phase:N")
    )
    point = {"event": max(found["peak"]["position"], 0), "gb": total(found["peak"]) / GB}
    peak = (
        alt.Chart(alt.Data(values=[point]))
        .mark_point(shape="triangle-down", filled=True, size=90, color="#000000", yOffset=-7)
        .encode(x="event:Q", y=alt.Y("gb:Q"))
    )
    heading = alt.TitleParams(
        title, subtitle=f"{peak_sentence(found)}; 1 GB = 1,000,000,000 bytes", anchor="start", subtitleColor=GREY
    )
    chart = alt.layer(area, lines, names, peak).properties(
        width=WIDTH, height=HEIGHT, title=heading, background="white"
    )
    return (
        chart.configure_view(stroke=None)
        .configure_axis(gridColor="#eeeeee", labelFontSize=11, titleFontSize=12)
        .configure_legend(orient="bottom", columns=4, labelLimit=260)
    )


def _present(found: Timeline) -> list[str]:
    """The categories with memory at some moment, from below."""
    return [name for name in CATEGORIES if any(name in moment["by_category"] for moment in found["moments"])]


def _starts(found: Timeline) -> list[dict[str, Any]]:
    """Where each phase begins; short ones keep their line but not their name."""
    starts, last = [], found["moments"][-1]["position"]
    for phase, run in groupby(found["moments"], key=lambda moment: moment["phase"]):
        own = list(run)
        wide = (own[-1]["position"] - own[0]["position"]) / max(last, 1) > 0.06
        starts.append({"event": own[0]["position"], "phase": phase if wide else ""})
    return starts
