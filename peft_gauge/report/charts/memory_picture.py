"""A plot of memory against sequence length: one line per method, and the memory of GPUs."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from peft_gauge.errors import GaugeError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from _typeshed import DataclassInstance

FORMATS = (".svg", ".png")
GB = 1e9

# Okabe and Ito's colours without yellow, which is faint on white: distinct also for colour-blind readers. Each has its
# own shape, so that the lines are distinct in grey.
LOOKS = (
    ("#000000", "circle"),
    ("#0072B2", "square"),
    ("#56B4E9", "triangle-up"),
    ("#D55E00", "diamond"),
    ("#009E73", "cross"),
    ("#CC79A7", "triangle-down"),
    ("#E69F00", "triangle-right"),
)
GREY = "#666666"

WIDTH, HEIGHT = 720, 480  # of the plot, in pixels, with the names to the right of the lines
POINT = {"size": 70, "strokeWidth": 1.8, "opacity": 1}
LABEL_DISTANCE = 15  # pixels between labels: one line of text


@dataclass(frozen=True)
class Point:
    """A planned step: ``title`` of its method, batch × seq tokens, and its memory in bytes."""

    model: str
    method: str
    title: str
    dtype: str
    batch: int
    seq: int
    phase_of_peak: str
    peak_bytes: int
    resident_bytes: int
    device_bytes_estimate: int


@dataclass(frozen=True)
class Card:
    """A GPU's name and its usable memory in bytes."""

    name: str
    usable_bytes: int


def check_destination(out: Path) -> None:
    """Raise `GaugeError` if nothing can be drawn, or not to ``out``: before minutes of planning, not after."""
    if out.suffix.lower() not in FORMATS:
        raise GaugeError(f"{out} is not a valid file name for a plot; end it with {' or '.join(FORMATS)}")
    if not out.parent.is_dir():
        raise GaugeError(f"there is no folder {out.parent} to save {out.name} in; create it first")
    _altair()


def save(points: Sequence[Point], cards: Sequence[Card], out: Path) -> Path:
    """Draw ``points`` to ``out`` and save their data next to it; returns the path of the data, a CSV file."""
    return save_plot(draw(points, cards), as_csv(points), out)


def save_plot(chart: Any, data: str, out: Path) -> Path:
    """Save ``chart`` to ``out`` and ``data``, its CSV, next to it; returns the path of the data."""
    file = out.with_suffix(".csv")
    try:
        chart.save(str(out), **({"scale_factor": 2} if out.suffix.lower() == ".png" else {}))
        file.write_text(data, encoding="utf-8")
    except OSError as error:
        raise GaugeError(f"cannot save {out}: {error.strerror or error}") from error
    return file


def as_csv(points: Sequence[DataclassInstance]) -> str:
    """The exact data of a plot, one row per point: dataclasses of one kind, at least one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(points[0])], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(point) for point in points)
    return text.getvalue()


def draw(points: Sequence[Point], cards: Sequence[Card]) -> Any:
    """The plot as an Altair chart; ``points`` belong to one model, dtype and batch.

    Both axes are logarithmic: a step has a constant part, the weights, and a part that grows with the sequence, and
    methods differ in both by factors. Raises `GaugeError` for more methods than there are distinct lines.
    """
    alt = _altair()
    frame = Frame.around(points, cards)
    layers = [*_card_layers(alt, frame, cards), *_method_layers(alt, frame, points)]
    first = points[0]
    title = alt.TitleParams(
        f"{first.model}: planned peak memory of one training step",
        subtitle=f"batch {first.batch}, {first.dtype}, AdamW, no gradient checkpointing; 1 GB = 1,000,000,000 bytes",
        anchor="start",
        subtitleColor=GREY,
    )
    chart = alt.layer(*layers).properties(width=WIDTH, height=HEIGHT, title=title, background="white")
    return chart.configure_view(stroke=None).configure_axis(gridColor="#eeeeee", labelFontSize=11, titleFontSize=12)


@dataclass(frozen=True)
class Frame:
    """The visible area: tokens from ``left`` to ``right`` with lines up to ``last``, and GB."""

    seqs: tuple[int, ...]
    left: float
    last: float
    right: float
    low: float
    high: float

    @classmethod
    def around(cls, points: Sequence[Point], cards: Sequence[Card]) -> Frame:
        """With space for the names to the right of the lines and above the highest GPU."""
        seqs = sorted({point.seq for point in points})
        sizes = [size / GB for size in (*(p.peak_bytes for p in points), *(card.usable_bytes for card in cards))]
        left, last = seqs[0] / 1.1, float(seqs[-1])
        # Names take the last third of the width, whatever the lengths are.
        right = last * (last / left) ** 0.5
        return cls(tuple(seqs), left, last, right, min(sizes) / 1.2, max(sizes) * 1.2)

    def right_of_last(self, share: float) -> float:
        """The x (tokens) at this share of the way from the lines' end to the right edge."""
        return float(self.last * (self.right / self.last) ** share)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times the powers of ten in range."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        every = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
        return [tick for tick in every if self.low <= tick <= self.high]

    def spread(self, heights: Sequence[float]) -> list[float]:
        """Heights for the names of lines that end at ``heights`` (GB, any order), at least `LABEL_DISTANCE` apart."""
        distance = math.log(self.high / self.low) * LABEL_DISTANCE / HEIGHT
        order = sorted(range(len(heights)), key=lambda i: heights[i])
        groups: list[tuple[float, list[int]]] = []  # (centre, members); members of a group are one distance apart
        for i in order:
            groups.append((math.log(heights[i]), [i]))
            while len(groups) > 1 and _overlap(groups[-2], groups[-1], distance):
                members = groups[-2][1] + groups[-1][1]
                groups[-2:] = [(sum(math.log(heights[member]) for member in members) / len(members), members)]
        placed = {
            member: centre + (position - (len(members) - 1) / 2) * distance
            for centre, members in groups
            for position, member in enumerate(members)
        }
        return [math.exp(placed[i]) for i in range(len(heights))]


def _overlap(below: tuple[float, list[int]], above: tuple[float, list[int]], distance: float) -> bool:
    return above[0] - below[0] < distance * (len(below[1]) + len(above[1])) / 2


def _method_layers(alt: Any, frame: Frame, points: Sequence[Point]) -> list[Any]:
    """Lines with their points, and next to the end of each its name, shape and last value."""
    titles = list(dict.fromkeys(point.title for point in points))
    if len(titles) > len(LOOKS):
        raise GaugeError(f"cannot plot {len(titles)} methods: only {len(LOOKS)} lines are distinct; give fewer methods")
    colours, shapes = zip(*LOOKS[: len(titles)], strict=True)
    rows: list[dict[str, Any]] = [
        {"method": point.title, "tokens": point.seq, "gb": point.peak_bytes / GB} for point in points
    ]
    ends = [max((row for row in rows if row["method"] == title), key=lambda row: row["tokens"]) for title in titles]
    heights = frame.spread([end["gb"] for end in ends])
    leaders, names = [], []
    for end, height in zip(ends, heights, strict=True):
        leaders += [end, end | {"tokens": frame.right_of_last(0.12), "gb": height}]
        name = f"{end['method']}, {shown_gb(end['gb'])}"
        names.append(end | {"tokens": frame.right_of_last(0.16), "gb": height, "name": name})
    encoded = {
        **_axes(alt, frame),
        "color": alt.Color("method:N", scale=alt.Scale(domain=titles, range=colours), legend=None),
    }
    shape = alt.Shape("method:N", scale=alt.Scale(domain=titles, range=shapes), legend=None)
    axes = _axes(alt, frame)
    return [
        alt.Chart(_values(alt, leaders)).mark_line(strokeWidth=0.7).encode(**encoded),
        alt.Chart(_values(alt, rows)).mark_line(strokeWidth=1.8).encode(**encoded),
        # Not filled, so that both shapes show where two methods need the same.
        alt.Chart(_values(alt, [*rows, *names])).mark_point(**POINT).encode(**encoded, shape=shape),
        alt.Chart(_values(alt, names)).mark_text(align="left", dx=9, fontSize=12).encode(**axes, text="name:N"),
    ]


def shown_gb(gb: float) -> str:
    """``gb`` to three digits, as in the plot's labels."""
    return f"{gb:#.3g}".rstrip(".") + " GB"


def _card_layers(alt: Any, frame: Frame, cards: Sequence[Card]) -> list[Any]:
    rows = [
        {"tokens": frame.left, "end": frame.last, "gb": gb, "name": f"{card.name}: {shown_gb(gb)} usable"}
        for card in cards
        for gb in [card.usable_bytes / GB]
    ]
    chart = alt.Chart(_values(alt, rows))
    axes = _axes(alt, frame)
    return [
        chart.mark_rule(color=GREY, strokeWidth=1, strokeDash=[5, 3]).encode(**axes, x2="end"),
        chart.mark_text(color=GREY, align="left", dx=4, dy=-7, fontSize=11).encode(**axes, text="name:N"),
    ]


def _axes(alt: Any, frame: Frame) -> dict[str, Any]:
    x_axis = alt.Axis(values=list(frame.seqs), format="d", grid=False)
    y_axis = alt.Axis(values=frame.ticks(), format="~g")
    return {
        "x": alt.X(
            "tokens:Q",
            title="sequence length (tokens, logarithmic)",
            scale=alt.Scale(type="log", base=2, domain=[frame.left, frame.right], nice=False),
            axis=x_axis,
        ),
        "y": alt.Y(
            "gb:Q",
            title="peak allocated memory (GB, logarithmic)",
            scale=alt.Scale(type="log", domain=[frame.low, frame.high], nice=False),
            axis=y_axis,
        ),
    }


def _values(alt: Any, rows: Sequence[dict[str, Any]]) -> Any:
    return alt.Data(values=list(rows))


def _altair() -> Any:
    try:
        import altair
        import vl_convert  # noqa: F401 - what altair saves pictures with
    except ImportError as error:
        raise GaugeError(
            f"a plot needs {error.name}; install it: python -m pip install 'peft-gauge[report]'"
        ) from error
    return altair
