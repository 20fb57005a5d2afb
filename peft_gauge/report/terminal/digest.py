"""The digest of a run: its last lines in the terminal, as plain text of at most `LINES` lines and `WIDTH` columns."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft_gauge.errors import one_line
from peft_gauge.report.format import ABSENT, shown, shown_bytes, shown_seconds
from peft_gauge.report.rows import by_model, conditions, label, method_rows
from peft_gauge.report.terminal.memory_table import share_of_plan

if TYPE_CHECKING:
    from peft_gauge.history.schema import CaseRecord

LINES = 20
WIDTH = 80
MOST_FAILURES = 3
MOST_REASONS = 3
MORE = "  and"
"""Begins a line with the number of things that are left out."""
HEADINGS = ("method", "trainable", "peak", "of plan", "step", "step/forward")
ELSEWHERE = {"plan": "plan", "published": "published metric", "pareto": "sweep", "rank_peak_bytes": "shared step"}
"""A metric of cases whose tables only ``--details`` shows -> the name of such a case."""


@dataclass(frozen=True)
class Ending:
    """How a run ended, apart from its cases.

    ``notes``: lines on the run, such as its comparison's verdict; ``saved``: the saved run's path or address, if it
    was saved; ``advice``: the commands to type next, each with its purpose.
    """

    notes: Sequence[str] = ()
    saved: str | None = None
    advice: Sequence[str] = field(default_factory=tuple)


def digest(
    cases: Iterable[CaseRecord], claims: Iterable[Mapping[str, Any]], ending: Ending, width: int = WIDTH
) -> list[str]:
    """The lines: results, claims, unsteady times, failures, skips, notes, the saved file, what to type next.

    The results take the lines that the rest leaves; if these are too few for all methods, each failure and reason has
    one line in place of two. Words are never broken: only a path can make a line longer than ``width``.
    """
    cases, claims, width = list(cases), list(claims), min(width, WIDTH)
    rows = [row for row in method_rows(cases) if row.keys() & {"trainable_params", "tensor_peak_bytes", "step_seconds"}]
    lines: list[str] = []
    for each, reasons in ((2, MOST_REASONS), (1, MOST_REASONS - 1)):
        rest = [
            *_elsewhere(cases, width),
            *_claims(claims, width),
            *_unsteady(rows, width, each),
            *_failures(cases, width, each),
            *_skips(cases, width, each, reasons),
            *(line for note in ending.notes for line in wrapped(note, width)),
            *([f"saved {ending.saved}"] if ending.saved else []),
            *(line for advice in ending.advice for line in wrapped(advice, width)),
        ]
        lines = [*_results(rows, LINES - len(rest)), *rest]
        if len(lines) <= LINES and not (lines and lines[0].startswith(MORE)):
            break
    return lines


def wrapped(text: str, width: int) -> list[str]:
    """``text`` in lines of ``width`` columns, the later ones indented; a longer word, such as a path, stays whole."""
    return textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def _results(rows: Sequence[dict[str, Any]], most: int) -> list[str]:
    """A small table for each model and device, in at most ``most`` lines."""
    lines: list[str] = []
    groups = by_model(list(rows))
    left = len(rows)
    for (model, device), group in groups.items():
        room = most - len(lines) - 2
        kept = len(group) if left == len(group) <= room else min(len(group), room - 1)
        if kept < 1:
            break
        lines += [one_line(f"{model} on {device}, {conditions(group)}", WIDTH), *_table(group[:kept])]
        left -= kept
        if kept < len(group):
            break
    return [*lines, f"{MORE} {left} more rows (--details)"] if left else lines


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Heading and one line per row, in columns; a column without a value is left out."""
    found = [HEADINGS, *map(_cells, rows)]
    columns = [column for column in zip(*found, strict=True) if any(cell != ABSENT for cell in column[1:])]
    widths = [max(map(len, column)) for column in columns]
    return [
        "  " + "  ".join(cell.rjust(size) if place else cell.ljust(size) for place, (cell, size) in enumerate(line))
        for line in (list(zip(cells, widths, strict=True)) for cells in zip(*columns, strict=True))
    ]


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    peak = row.get("allocated_peak_bytes") if row["device"] == "cuda" else row.get("tensor_peak_bytes")
    return (
        label(row) + " *" * bool(row.get("unsteady")),
        shown(row.get("trainable_params"), "{:,}"),
        shown_bytes(peak),
        share_of_plan(row),
        shown_seconds(row.get("step_seconds")),
        shown(row.get("step_over_control"), "{:.2f}"),
    )


def _elsewhere(cases: Iterable[CaseRecord], width: int) -> list[str]:
    """One line with the numbers of cases whose tables only ``--details`` shows."""
    passed = [case for case in cases if case.outcome == "passed"]
    numbers = {name: sum(bool(case.metrics.get(metric)) for case in passed) for metric, name in ELSEWHERE.items()}
    parts = [f"{number} {name}{'s' * (number != 1)}" for name, number in numbers.items() if number]
    return wrapped(f"also measured or planned: {', '.join(parts)} (--details)", width) if parts else []


def _claims(claims: Iterable[Mapping[str, Any]], width: int) -> list[str]:
    numbers = Counter(str(claim["verdict"]) for claim in claims)
    counted = ", ".join(f"{verdict} {number}" for verdict, number in numbers.most_common())
    return wrapped(f"claims: {counted}", width) if numbers else []


def _unsteady(rows: Sequence[Mapping[str, Any]], width: int, most: int) -> list[str]:
    """How many times are unreliable, and why, in at most ``most`` lines."""
    unsteady = [row for row in rows if row.get("unsteady")]
    if not unsteady:
        return []
    timed = sum("step_seconds" in row for row in rows)
    reasons = together(reason for row in unsteady for reason in row["unsteady"])
    text = f"* unsteady times of {len(unsteady)} of {timed} methods: {'; '.join(reasons)}"
    return _in_lines(text, width, most)


def _failures(cases: Iterable[CaseRecord], width: int, each: int) -> list[str]:
    """The cases that failed, the first few with reasons in ``each`` lines; pytest's own report above has all."""
    failed = [case for case in cases if case.outcome not in ("passed", "skipped")]
    lines = [
        line
        for case in failed[:MOST_FAILURES]
        for line in _in_lines(f"{case.outcome}: {_name(case)}: {one_line(case.reason or ABSENT)}", width, each)
    ]
    more = len(failed) - MOST_FAILURES
    return [*lines, f"{MORE} {more} more that did not pass"] if more > 0 else lines


def _name(case: CaseRecord) -> str:
    return case.id.removeprefix("benchmarks/")


def _skips(cases: Iterable[CaseRecord], width: int, each: int, most: int) -> list[str]:
    """Skipped cases by their ``most`` most frequent reasons, in at most ``each`` lines."""
    groups: dict[str, list[str]] = {}
    for reason in (case.reason or ABSENT for case in cases if case.outcome == "skipped"):
        groups.setdefault(FILE.sub("", reason.partition(": ")[0]), []).append(reason)
    largest = sorted(groups.items(), key=lambda group: -len(group[1]))
    lines = [
        line
        for kind, reasons in largest[:most]
        for line in _in_lines(f"{len(reasons)} skipped: {kind if len({*reasons}) > 1 else reasons[0]}", width, each)
    ]
    more = sum(len(reasons) for _, reasons in largest[most:])
    return [*lines, f"{MORE} {more} more skipped for other reasons (--details)"] if more else lines


def _in_lines(text: str, width: int, most: int) -> list[str]:
    """``text`` in at most ``most`` lines; a longer one ends with … at a word."""
    lines = wrapped(text, width)
    if len(lines) <= most:
        return lines
    words = lines[most - 1].rsplit(" ", 1)[0] if len(lines[most - 1]) > width - 2 else lines[most - 1]
    return [*lines[: most - 1], f"{words} …"]


FILE = re.compile(r" benchmarks/\S+")
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def together(reasons: Iterable[str]) -> list[str]:
    """``reasons`` that differ only in their numbers as one, with the range of each number, most frequent first."""
    kinds: dict[str, list[list[str]]] = {}
    for reason in reasons:
        kinds.setdefault(NUMBER.sub("\0", reason), []).append(NUMBER.findall(reason))
    joined = []
    for kind, found in sorted(kinds.items(), key=lambda each: -len(each[1])):
        parts = kind.split("\0")
        ranges = [_range(numbers) for numbers in zip(*found, strict=True)]
        joined.append("".join(part + number for part, number in zip(parts, [*ranges, ""], strict=True)))
    return joined


def _range(numbers: Iterable[str]) -> str:
    ordered = sorted(set(numbers), key=float)
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"
