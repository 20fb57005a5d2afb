"""A plot of planned against measured memory: one point per step, and the line where both are equal."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from peft_gauge.errors import GaugeError
from peft_gauge.report.charts.memory_picture import GB, GREY, LOOKS, as_csv, save_plot
from peft_gauge.report.charts.plots import altair

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from peft_gauge.history.reader import Run

SIZE = 420
"""Width and height in pixels: equal scales make the line of equality a diagonal."""


@dataclass(frozen=True)
class Step:
    """A step that was measured and planned: ``name``, ``method``, and both peaks in whole bytes."""

    name: str
    method: str
    measured_bytes: int
    planned_bytes: int

    @property
    def difference_percent(self) -> float:
        """How much more is planned."""
        return 100 * (self.planned_bytes / self.measured_bytes - 1)


def steps_of(run: Run, methods: Sequence[str]) -> list[Step]:
    """The steps in ``run`` whose peak was compared with a measurement (`benchmarks/test_published.py`), of ``methods``.

    Raises `GaugeError` if there is none.
    """
    found = []
    for case in run.cases:
        metrics = case.metrics
        name = case.id.partition("[")[2].removesuffix("]")
        method = next((each for each in methods if f"{name}-".startswith(f"{each}-")), None)
        if metrics.get("unit") == "GB" and "planned" in metrics and method is not None:
            found.append(Step(name, method, round(GB * metrics["published"]), round(GB * metrics["planned"])))
    if not found:
        raise GaugeError(f"{run.name} has no step with a planned and a measured peak; run benchmarks/test_published.py")
    return found


def rows_of(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """One row per step: both peaks in bytes, and how much more is planned in percent, to four digits after the point.

    The difference is rounded here, so that a reader sees the same digits in every form.
    """
    return [{**asdict(step), "difference_percent": round(step.difference_percent, 4) + 0.0} for step in steps]


def save(steps: Sequence[Step], titles: dict[str, str], where: str, out: Path) -> Path:
    """Draw ``steps`` to ``out`` and save their data next to it; returns the path of the data, a CSV file."""
    return save_plot(draw(steps, titles, where), as_csv(steps), out)


def draw(steps: Sequence[Step], titles: dict[str, str], where: str) -> Any:
    """The plot as an Altair chart; ``titles`` name the methods, and ``where`` the device that was measured."""
    alt = altair()
    differences = [abs(step.difference_percent) for step in steps]
    title = alt.TitleParams(
        "Peak memory of a training step: planned without a GPU, and measured",
        subtitle=[
            f"{len(steps)} steps on {where}, bytes requested from PyTorch's allocator; they differ by at most",
            f"{_percent(max(differences))}, half of them by less than {_percent(statistics.median(differences))}",
        ],
        anchor="start",
        subtitleColor=GREY,
    )
    shown = list(dict.fromkeys(titles[step.method] for step in steps))
    colours, shapes = zip(*LOOKS[: len(shown)], strict=True)
    rows = [
        {"method": titles[step.method], "measured": step.measured_bytes / GB, "planned": step.planned_bytes / GB}
        for step in steps
    ]
    ends = _ends([size / GB for step in steps for size in (step.measured_bytes, step.planned_bytes)])
    scale = alt.Scale(type="log", domain=ends, nice=False)
    ticks = [float(f"{digit}e{power}") for power in range(-3, 4) for digit in (1, 2, 5)]
    axis = alt.Axis(values=[tick for tick in ticks if ends[0] <= tick <= ends[1]], format="~g")
    axes = {
        name: of(f"{field}:Q", title=f"{field} (GB, logarithmic)", scale=scale, axis=axis)
        for name, of, field in (("x", alt.X, "measured"), ("y", alt.Y, "planned"))
    }
    equal = [{"measured": end, "planned": end} for end in ends]
    domain = alt.Scale(domain=shown, range=colours)
    points = (
        alt.Chart(alt.Data(values=rows))
        .mark_point(size=70, strokeWidth=1.8, opacity=1)
        .encode(
            **axes,
            color=alt.Color("method:N", scale=domain, legend=alt.Legend(title=None)),
            shape=alt.Shape("method:N", scale=alt.Scale(domain=shown, range=shapes), legend=alt.Legend(title=None)),
        )
    )
    line = alt.Chart(alt.Data(values=equal)).mark_line(color=GREY, strokeWidth=1).encode(**axes)
    chart = alt.layer(line, points).properties(width=SIZE, height=SIZE, title=title, background="white")
    return chart.configure_view(stroke=None).configure_axis(gridColor="#eeeeee", labelFontSize=11, titleFontSize=12)


def _ends(values: Sequence[float]) -> list[float]:
    """The range of ``values``, with a margin."""
    margin = math.exp(0.04 * math.log(max(values) / min(values)) + 0.02)
    return [min(values) / margin, max(values) * margin]


def _percent(value: float) -> str:
    """To one digit more than 0.01, or two digits."""
    return f"{value:.2g} %"
