"""A comparison of two runs for the terminal, as Markdown, and as JSON; every number is put into words in one place."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from peft_gauge.errors import one_line
from peft_gauge.report.terminal import ABSENT, as_text, shown_seconds

if TYPE_CHECKING:
    from peft_gauge.history.comparing import Comparison, Row

SCHEMA = 1
HEADINGS = ("verdict", "case", "figure", "before", "after", "change", "judged", "cause, or what to know")
OVER = " over "
TEXT_LIMIT = 48
NARROW = 28  # columns of the terminal; any number fits, a text is folded


@dataclass(frozen=True)
class Cells:
    """One row in words, as all outputs show it."""

    verdict: str
    case: str
    figure: str
    before: str
    after: str
    change: str
    judged: str
    remark: str

    def __iter__(self) -> Any:
        return iter(asdict(self).values())


def cells(row: Row) -> Cells:
    """The words for ``row``. Percentages have one decimal; counts and bytes are exact."""
    return Cells(
        verdict=row.says if row.label in (None, row.says) else f"{row.says}: {row.label}",
        case=row.test.removeprefix("benchmarks/"),
        figure=row.metric,
        before=_value(row.before, row.metric),
        after=_value(row.after, row.metric),
        change=_change(row),
        judged=_judged(row),
        remark="; ".join(one_line(part) for part in (row.cause, row.note) if part) or ABSENT,
    )


def _value(value: object, metric: str) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, bool) or not isinstance(value, int | float):
        return one_line(value if isinstance(value, str) else json.dumps(value), TEXT_LIMIT)
    if metric == "seconds" or metric.endswith("_seconds"):
        return shown_seconds(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.7g}"


def _change(row: Row) -> str:
    """Of a time in per cent; of a number the difference, and per cent where it is not 0."""
    parts = []
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (row.before, row.after))
    if numbers and row.judged is None and row.before != row.after and not row.metric.endswith("seconds"):
        difference = row.after - row.before
        parts.append(f"{difference:+,}" if isinstance(difference, int) else f"{difference:+,.7g}")
    if row.ratio is not None and (row.judged is not None or row.ratio != 1):
        parts.append(_percent(row.ratio))
    return ", ".join(parts) or ABSENT


def _judged(row: Row) -> str:
    """The ratio that the verdict rests on, with its interval."""
    if row.judged is None:
        return ABSENT
    judged = row.judged
    interval = f"{_percent(judged.ratio)} [{_percent(judged.low)}, {_percent(judged.high)}]"
    return interval if row.relative_to is None else f"{interval}{OVER}{row.relative_to}"


def _percent(ratio: float) -> str:
    percent = 100 * (ratio - 1)
    return "> +999 %" if percent > 999 else f"{percent:+.1f} %"


def shown_rows(comparison: Comparison, *, everything: bool) -> list[Row]:
    """The rows worth a line: all but what stayed the same, unless ``everything`` is asked for."""
    return [row for row in comparison.rows if everything or row.verdict != "same" or row.label is not None]


def heading(comparison: Comparison) -> list[str]:
    """The lines above a table: which runs, what differs between them, what else to know."""
    lines = [f"{comparison.new} against {comparison.base}"]
    lines += [f"differs: {change}" for change in comparison.environment]
    lines += [f"note: {note}" for note in comparison.notes]
    if comparison.incomparable is not None:
        lines.append(f"NOT COMPARABLE: {comparison.incomparable}")
    return lines


def counts(comparison: Comparison) -> str:
    """One line: how many figures have which verdict, and how many rows are no plain figures."""
    return ", ".join(f"{number} {name}" for name, number in comparison.counts.items())


def as_terminal(comparison: Comparison, width: int, *, everything: bool = False) -> str:
    """``comparison`` as text of at least ``width`` columns."""
    from rich.table import Table

    lines = heading(comparison)
    rows = shown_rows(comparison, everything=everything)
    table = Table()
    table.add_column("verdict", max_width=NARROW, overflow="fold")
    table.add_column("case, figure, and what to know", overflow="fold")
    table.add_column("before, after", max_width=NARROW, overflow="fold")
    table.add_column("change, and as judged", no_wrap=True)
    for row in rows:
        told = cells(row)
        pairs = (told.before, told.after), (told.change, told.judged.replace(OVER, f"\n{OVER.lstrip()}"))
        about = [told.case, *(part for part in (told.figure, told.remark) if part not in (ABSENT, "outcome"))]
        table.add_row(told.verdict, "\n".join(about), *(_stacked(*pair) for pair in pairs))
    return "\n".join([*lines, *([as_text([table], width).rstrip()] if rows else []), counts(comparison)]) + "\n"


def _stacked(above: str, below: str) -> str:
    """Two cells in one, and a line saved where both are empty."""
    return ABSENT if above == below == ABSENT else f"{above}\n{below}"


def as_markdown(comparisons: Iterable[Comparison], *, everything: bool = False) -> str:
    """All comparisons as Markdown, each with a heading of its own: for a job's summary on GitHub."""
    return "\n".join(_markdown(comparison, everything) for comparison in comparisons)


def _markdown(comparison: Comparison, everything: bool) -> str:
    first, *rest = map(in_markdown, heading(comparison))
    lines = [f"### {first}", "", f"**{counts(comparison)}**", ""]
    lines += [f"- {line}" for line in rest] + ([""] if rest else [])
    rows = shown_rows(comparison, everything=everything)
    if rows:
        lines += [_line(HEADINGS), _line(["---"] * len(HEADINGS))]
        lines += [_line([in_markdown(cell) for cell in cells(row)]) for row in rows] + [""]
    return "\n".join(lines)


def _line(parts: Sequence[str]) -> str:
    return f"| {' | '.join(parts)} |"


def in_markdown(text: str) -> str:
    """``text`` with what Markdown and HTML would take for their own escaped."""
    for mark in ("\\", "|", "*", "_", "[", "]", "`", "~"):
        text = text.replace(mark, f"\\{mark}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def as_json(comparisons: Iterable[Comparison], *, strict: bool = False) -> str:
    """Everything, for machines::

        {"schema": 1, "comparisons": [{
            "base": path, "new": path, "environment": [text], "notes": [text],
            "incomparable": text or null, "exit_code": 0, 1 or 2, "counts": {verdict or label: number},
            "rows": [{
                "test": id, "metric": name, "verdict": "same", "better", "worse" or "cannot tell",
                "label": NEW, MISSING, … or null, "before": value, "after": value, "ratio": after / before or null,
                "judged": null or {"verdict", "ratio", "low", "high", "error", "further"}  (see `Judgement`),
                "relative_to": what was divided out of the judged ratio, or null,
                "cause": text or null, "note": text or null,
                "shown": {heading: the words that the tables show}}]}]}

    Times are in seconds, bytes are bytes, ratios are NEW / BASE.
    """
    document = {
        "schema": SCHEMA,
        "comparisons": [
            {
                "base": comparison.base,
                "new": comparison.new,
                "environment": comparison.environment,
                "notes": comparison.notes,
                "incomparable": comparison.incomparable,
                "exit_code": comparison.exit_code(strict=strict),
                "counts": comparison.counts,
                "rows": [
                    asdict(row) | {"shown": dict(zip(HEADINGS, cells(row), strict=True))} for row in comparison.rows
                ],
            }
            for comparison in comparisons
        ],
    }
    return json.dumps(document, indent=2, allow_nan=False) + "\n"
