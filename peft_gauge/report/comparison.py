"""A comparison of two runs for the terminal, as Markdown and as JSON; all numbers are formatted in one place."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from peft_gauge.errors import one_line
from peft_gauge.history.metrics import is_number
from peft_gauge.report.format import ABSENT, shown_seconds

if TYPE_CHECKING:
    from peft_gauge.history.comparison import Row, RunComparison

SCHEMA = 2  # 1: verdict "cannot tell" in place of "inconclusive", heading "figure" in place of "metric"
HEADINGS = ("verdict", "case", "metric", "before", "after", "change", "judged", "cause or note")
OVER = " over "
TEXT_LIMIT = 48
NARROWEST = 40  # columns; a terminal that reports fewer is ignored

FEW = 3
"""Up to this many similar rows have a line each; more share one."""
TOLD_FILES = 4


@dataclass(frozen=True)
class Cells:
    """One row as text, as in all outputs."""

    verdict: str
    case: str
    metric: str
    before: str
    after: str
    change: str
    judged: str
    remark: str

    def __iter__(self) -> Any:
        return iter(asdict(self).values())


def cells(row: Row) -> Cells:
    """The text for ``row``. Percentages have one decimal; counts and bytes are exact."""
    return Cells(
        verdict=row.says if row.label in (None, row.says) else f"{row.says}: {row.label}",
        case=row.test.removeprefix("benchmarks/"),
        metric=row.metric,
        before=_value(row.before, row.metric),
        after=_value(row.after, row.metric),
        change=_change(row),
        judged=_judged(row),
        remark="; ".join(one_line(part) for part in (row.cause, row.note) if part) or ABSENT,
    )


def _value(value: object, metric: str) -> str:
    if value is None:
        return ABSENT
    if not is_number(value):
        return one_line(value if isinstance(value, str) else json.dumps(value), TEXT_LIMIT)
    if metric == "seconds" or metric.endswith("_seconds"):
        return shown_seconds(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.7g}"


def _change(row: Row) -> str:
    """For a time, the change in per cent; for a number the difference, and per cent unless the base is 0."""
    parts = []
    numbers = is_number(row.before) and is_number(row.after)
    if numbers and row.judged is None and row.before != row.after and not row.metric.endswith("seconds"):
        difference = row.after - row.before
        parts.append(f"{difference:+,}" if isinstance(difference, int) else f"{difference:+,.7g}")
    if row.ratio is not None and (row.judged is not None or row.ratio != 1):
        parts.append(_percent(row.ratio))
    return ", ".join(parts) or ABSENT


def _judged(row: Row) -> str:
    """The ratio behind the verdict, with its interval."""
    if row.judged is None:
        return ABSENT
    judged = row.judged
    interval = f"{_percent(judged.ratio)} [{_percent(judged.low)}, {_percent(judged.high)}]"
    return interval if row.relative_to is None else f"{interval}{OVER}{row.relative_to}"


def _percent(ratio: float) -> str:
    percent = 100 * (ratio - 1)
    return "> +999 %" if percent > 999 else f"{percent:+.1f} %"


@dataclass(frozen=True)
class Line:
    """One line of a table: one row, or several similar ones.

    ``summary``: the text of a terminal's one line in place of the cells.
    """

    rows: tuple[Row, ...]
    cells: Cells
    summary: str = ""


def shown_lines(comparison: RunComparison, *, everything: bool) -> list[Line]:
    """The lines of ``comparison``, worst first; with ``everything``, all rows one by one.

    Otherwise unchanged rows are left out, inconclusive times share a line, and so do more than `FEW` cases with the
    same label for the same reason.
    """
    if everything:
        return [Line((row,), cells(row)) for row in comparison.rows]
    groups: dict[Hashable, list[Row]] = {}
    for row in comparison.rows:
        if row.verdict != "same" or row.label is not None:
            groups.setdefault(_group(row), []).append(row)
    return [line for key, rows in groups.items() for line in _together(key, rows)]


UNDECIDED = "undecided times"


def _group(row: Row) -> Hashable:
    """The key that rows in a shared line have in common."""
    if row.label is None:
        return UNDECIDED if row.verdict == "inconclusive" and row.metric.endswith("seconds") else row
    if row.verdict in ("worse", "better") or row.judged is not None or row.cause is not None:
        return row
    return row.verdict, row.label, row.metric, row.note


def _together(key: Hashable, rows: Sequence[Row]) -> list[Line]:
    if key == UNDECIDED and len(rows) > 1:
        found = _undecided(rows)
        change = found.change.partition(OVER)[0]
        return [Line(tuple(rows), found, f"{found.case}, {change}; --all shows each")]
    if len(rows) > FEW:
        return [Line(tuple(rows), _alike(rows))]
    return [Line((row,), cells(row)) for row in rows]


def _undecided(rows: Sequence[Row]) -> Cells:
    """One line for undecided times: their number, their largest change, and the processes that would decide them."""
    metrics = Counter(row.metric for row in rows)
    judged = [row for row in rows if row.judged is not None]
    ratios = sorted(row.judged.ratio if row.judged is not None else row.ratio or 1.0 for row in rows)
    over = sorted({row.relative_to for row in judged if row.relative_to is not None})
    further = [row.judged.further for row in judged if row.judged is not None and row.judged.further is not None]
    unjudged = Counter(str(row.note) for row in rows if row.judged is None)
    unsteady = sum("unsteady" in (row.note or "") for row in rows)
    remarks = [
        *([f"about {min(further)} more processes per side would decide the clearest"] if further else []),
        *(f"{number} of them: {note}" for note, number in unjudged.items()),
        *([f"{unsteady} of them unsteady"] if unsteady else []),
        "--all shows each",
    ]
    return Cells(
        verdict="inconclusive",
        case=f"{len(rows)} times of {len({row.test for row in rows})} cases",
        metric=", ".join(f"{metric} ({number})" for metric, number in metrics.items()),
        before=ABSENT,
        after=ABSENT,
        change=f"{_percent(ratios[0])} to {_percent(ratios[-1])}" + (f"{OVER}{', '.join(over)}" if over else ""),
        judged=ABSENT,
        remark="; ".join(remarks),
    )


def _alike(rows: Sequence[Row]) -> Cells:
    """One line for cases with the same label and reason: their number and their files."""
    files = Counter(row.test.partition("::")[0].removeprefix("benchmarks/") for row in rows).most_common()
    named = ", ".join(f"{name} ({number})" for name, number in files[:TOLD_FILES])
    more = f" and {len(files) - TOLD_FILES} more files" if len(files) > TOLD_FILES else ""
    outcomes = [", ".join(sorted({str(getattr(row, side)) for row in rows} - {"None"})) for side in ("before", "after")]
    shown = [one_line(each, TEXT_LIMIT) if each and rows[0].metric != "id" else ABSENT for each in outcomes]
    return Cells(
        verdict=cells(rows[0]).verdict,
        case=f"{len(rows)} cases: {named}{more}",
        metric=rows[0].metric,
        before=shown[0],
        after=shown[1],
        change=ABSENT,
        judged=ABSENT,
        remark=one_line(rows[0].note) if rows[0].note else ABSENT,
    )


def heading(comparison: RunComparison) -> list[str]:
    """The lines above a table: the runs, the differences between them, and notes."""
    lines = [f"{comparison.new} against {comparison.base}"]
    lines += [f"differs: {change}" for change in comparison.environment]
    lines += [f"note: {note}" for note in comparison.notes]
    if comparison.incomparable is not None:
        lines.append(f"NOT COMPARABLE: {comparison.incomparable}")
    return lines


def counts(comparison: RunComparison) -> str:
    """One line: the number of metrics with each verdict, and the number of rows with each label."""
    return ", ".join(f"{number} {name}" for name, number in comparison.counts.items())


def as_terminal(comparison: RunComparison, width: int, *, everything: bool = False) -> str:
    """``comparison`` as text within ``width`` columns: the overall verdict, then for each row's verdict its subject,
    values and remarks."""
    width = max(width, NARROWEST)
    first, *rest = heading(comparison)
    lines = [*_wrapped(overall(comparison), width, hanging=2), first]
    lines += [part for line in rest for part in _wrapped(line, width, hanging=2)]
    shown = shown_lines(comparison, everything=everything)
    indent = max((len(line.cells.verdict) for line in shown), default=0) + 2
    for line in shown:
        beside = line.cells.verdict.ljust(indent)
        for text in [line.summary] if line.summary else _told(line.cells):
            lines += [f"{beside}{part}" for part in _wrapped(text, width - indent, hanging=2)][:1]
            lines += [f"{' ' * indent}{part}" for part in _wrapped(text, width - indent, hanging=2)[1:]]
            beside = " " * indent
    return "\n".join(lines) + "\n"


def overall(comparison: RunComparison) -> str:
    """One line: whether the runs are comparable and there is a regression, and the counts."""
    if comparison.incomparable is not None:
        verdict = "NOT COMPARABLE"
    else:
        verdict = "REGRESSION" if comparison.exit_code() else "no regression found"
    return f"{verdict}: {counts(comparison)}"


def _told(told: Cells) -> list[str]:
    """The lines of one row: the case; its metric before and after, and the change; the judged ratio; remarks."""
    values = f"{told.before} → {told.after}" if (told.before, told.after) != (ABSENT, ABSENT) else ""
    metric = told.metric if told.metric != "outcome" else ""
    change = told.change if told.change != ABSENT else ""
    about = ": ".join(filter(None, (metric, ", ".join(filter(None, (values, change))))))
    judged = f"judged {told.judged}" if told.judged != ABSENT else ""
    return [told.case, *filter(None, (about, judged, told.remark if told.remark != ABSENT else ""))]


def _wrapped(text: str, width: int, *, hanging: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=" " * hanging, break_on_hyphens=False) or [""]


def as_markdown(comparisons: Iterable[RunComparison], *, everything: bool = False) -> str:
    """All comparisons as Markdown, each under its own heading, for a job's summary on GitHub."""
    return "\n".join(_markdown(comparison, everything) for comparison in comparisons)


def _markdown(comparison: RunComparison, everything: bool) -> str:
    first, *rest = map(in_markdown, heading(comparison))
    lines = [f"### {first}", "", f"**{counts(comparison)}**", ""]
    lines += [f"- {line}" for line in rest] + ([""] if rest else [])
    shown = shown_lines(comparison, everything=everything)
    if shown:
        lines += [_line(HEADINGS), _line(["---"] * len(HEADINGS))]
        lines += [_line([in_markdown(cell) for cell in line.cells]) for line in shown] + [""]
    return "\n".join(lines)


def _line(parts: Sequence[str]) -> str:
    return f"| {' | '.join(parts)} |"


def in_markdown(text: str) -> str:
    """``text`` with special characters of Markdown and HTML escaped."""
    for mark in ("\\", "|", "*", "_", "[", "]", "`", "~"):
        text = text.replace(mark, f"\\{mark}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


CSV_COLUMNS = (
    "base",
    "new",
    "test",
    "metric",
    "verdict",
    "label",
    "before",
    "after",
    "ratio",
    "judged_ratio",
    "judged_low",
    "judged_high",
    "relative_to",
    "cause",
    "note",
)


def csv_rows(comparisons: Iterable[RunComparison]) -> list[dict[str, Any]]:
    """Every metric of every comparison with its raw values, by `CSV_COLUMNS`."""
    rows = []
    for comparison in comparisons:
        for row in comparison.rows:
            judged = {} if row.judged is None else asdict(row.judged)
            about = {f"judged_{name}": judged.get(name) for name in ("ratio", "low", "high")}
            rows.append({**asdict(row), **about, "base": comparison.base, "new": comparison.new})
    return rows


def as_json(comparisons: Iterable[RunComparison], *, strict: bool = False) -> str:
    """The full comparison for programs::

        {"schema": 2, "comparisons": [{
            "base": path, "new": path, "environment": [text], "notes": [text],
            "incomparable": text or null, "exit_code": 0, 1 or 2, "counts": {verdict or label: number},
            "rows": [{
                "test": id, "metric": name, "verdict": "same", "better", "worse" or "inconclusive",
                "label": NEW, MISSING, … or null, "before": value, "after": value, "ratio": after / before or null,
                "judged": null or {"verdict", "ratio", "low", "high", "error", "further"}  (see `Judgement`),
                "relative_to": the factor divided out of the judged ratio, or null,
                "cause": text or null, "note": text or null,
                "shown": {heading: the text in the tables}}]}]}

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
