"""Cells of the page's tables: numbers, verdicts, methods and texts as HTML.

A number is in a ``<data>`` element whose value is the saved one, unrounded. ``data-`` attributes of a row name its
method, model and machine; the page filters by them.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft_gauge.errors import one_line
from peft_gauge.history.metrics import is_number, told
from peft_gauge.report.charts.looks import PATHS, Look
from peft_gauge.report.format import ABSENT, shown_bytes, shown_seconds

SUBJECT = ("method", "model", "machine")
SIGNS = {
    "worse": "▲",
    "better": "▼",
    "same": "=",
    "inconclusive": "?",
    "holds": "✓",
    "passed": "✓",
    "refuted": "✗",
    "failed": "✗",
    "out-of-memory": "✗",
    "crashed": "✗",
    "timed-out": "✗",
}
Line = tuple[Mapping[str, Any], Sequence[str]]
"""The subject of a row, and its cells as HTML."""


def text(value: object) -> str:
    """Any value as HTML text; a dash for ``None``."""
    return html.escape(ABSENT if value is None else str(value))


def number(value: float | None, shown: str) -> str:
    """A number in the form ``shown``, with its exact value for programs."""
    return ABSENT if value is None else f'<data value="{json.dumps(value)}">{html.escape(shown)}</data>'


def size(value: float | None) -> str:
    return number(value, shown_bytes(value))


def seconds(value: float | None) -> str:
    return number(value, shown_seconds(value))


def plain(value: float | None, form: str) -> str:
    return ABSENT if value is None else number(value, form.format(value))


def verdict(word: str | None) -> str:
    """A verdict with a sign in addition to its colour."""
    if word is None:
        return ABSENT
    return f'<span class="v {html.escape(word.replace(" ", "-"))}">{SIGNS.get(word, "·")} {html.escape(word)}</span>'


def swatch(look: Look) -> str:
    """The mark of a method, as in the drawings; its colour is that of the class."""
    path = PATHS[look.shape]
    return f'<svg class="dot m{look.place}" viewBox="-7 -7 14 14" aria-hidden="true"><path d="{path}"/></svg>'


def fits(known: bool | None) -> str:
    """✓ or ✗ with a word for screen readers."""
    if known is None:
        return ABSENT
    return f'<span class="v {"holds" if known else "refuted"}" data-sort="{int(known)}">' + (
        '✓<span class="sr"> fits</span></span>' if known else '✗<span class="sr"> does not fit</span></span>'
    )


def details(content: str, heading: str, name: str | None = None) -> str:
    """A part of the page that opens on demand."""
    id_ = f' id="{name}"' if name else ""
    return f"<details{id_}><summary>{text(heading)}</summary>{content}</details>"


def filterable(subject: Mapping[str, Any]) -> str:
    """The attributes by which an element is filtered."""
    return "".join(
        f' data-{name}="{html.escape(str(subject[name]))}"' for name in SUBJECT if subject.get(name) is not None
    )


def any_value(metric: str, value: object) -> str:
    """A metric as in a comparison, formatted by its name: bytes and seconds with units."""
    if not is_number(value):
        return text(None if value is None else one_line(told(value), 60))
    return number(value, shown_value(metric, value))


def shown_value(metric: str, value: float) -> str:
    """A number of ``metric`` as readers see it."""
    if metric == "seconds" or metric.endswith("_seconds"):
        return shown_seconds(value)
    if "bytes" in metric:
        return shown_bytes(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.7g}"


def table(name: str, caption: str, headings: Sequence[str], lines: Iterable[Line], *, sortable: bool = False) -> str:
    """A table that scrolls by touch and keyboard; the first cell of a row is its heading.

    With ``sortable``, each heading is a button.
    """
    lines = list(lines)
    if not lines:
        return f"<p>{text(caption)}: none.</p>"
    head = "".join(f'<th scope="col">{_heading(heading, sortable)}</th>' for heading in headings)
    body = "\n".join(_line(*line) for line in lines)
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{html.escape(caption)}">'
        f'<table id="{name}"{kind}><caption>{text(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _line(subject: Mapping[str, Any], cells: Sequence[str]) -> str:
    first, *rest = cells
    return f'<tr{filterable(subject)}><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'


def _heading(heading: str, sortable: bool) -> str:
    return f'<button type="button">{text(heading)}</button>' if sortable else text(heading)
