"""The report's plots as files, one per panel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peft_gauge.errors import GaugeError
from peft_gauge.files import slug, write_whole
from peft_gauge.report.charts.plots import altair, labels_of, panels, prepared, spec, vega_lite_version
from peft_gauge.report.html.page_data import PLOTTED

if TYPE_CHECKING:
    from peft_gauge.report.html.page_data import Report, Row

FORMATS = ("png", "svg")
WIDTH = 640  # of the plot, in pixels


def picture(kind: str, title: str, rows: Sequence[Row], labels: Sequence[str], form: str) -> bytes:
    """One panel as an image in the format ``form``, one of `FORMATS`."""
    altair()
    import vl_convert

    document = spec(kind, labels) | {
        "width": WIDTH,
        "autosize": "pad",
        "background": "white",
        "title": {"text": title, "anchor": "start"},
        "datasets": {kind: prepared(kind, rows)},
    }
    if form == "svg":
        return vl_convert.vegalite_to_svg(document, vl_version=vega_lite_version()).encode()
    return vl_convert.vegalite_to_png(document, vl_version=vega_lite_version(), scale=2)


def save_pictures(report: Report, folder: Path, form: str) -> list[Path]:
    """Save every panel to ``folder``, creating it; raises `GaugeError` if it cannot be written."""
    saved = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for kind in PLOTTED:
            rows = report.rows(kind)
            for number, (title, own) in enumerate(panels(rows).items(), start=1):
                out = folder / f"{kind}-{number:02d}-{slug(title)[:80]}.{form}"
                write_whole(out, picture(kind, title, own, labels_of(rows), form))
                saved.append(out)
    except OSError as error:
        raise GaugeError(f"cannot write to {folder}: {error.strerror or error}") from error
    return saved
