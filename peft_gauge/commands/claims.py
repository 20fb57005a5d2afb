"""``peft-gauge claims``: every claim with its newest measured verdict, as a table for the terminal or a file."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from pathlib import Path  # typer reads the annotations at run time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_gauge.commands.tables import AsCsv, AsJson, form_of, print_csv, print_json
from peft_gauge.errors import GaugeError
from peft_gauge.history import store

if TYPE_CHECKING:
    from peft_gauge.history.ledger import Source, Standing

DEFAULT_RUNS = Path("results")
START, END = "<!-- claims: made by peft-gauge claims --write docs/claims.md -->", "<!-- end of claims -->"
"""The marker lines around the table in a file. The text after the first marker's colon is free."""

HEADINGS = ("claim", "model", "verdict", "metric", "conditions", "date", "machine")
BEFORE_ROWS = 5
"""Lines between the first marker and the first claim's row: an empty line, the counts, an empty line, the heading."""
MOST_NAMED = 3


def claims(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUNS...",
            help="Run files, folders of runs or their addresses (default: results).",
            parser=store.place,
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table with conditions.")] = False,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    check: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Check whether the table in this file is up to date.")
    ] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the table into this file, between its two marker lines.")
    ] = None,
) -> None:
    """Show each claim with its newest verdict over all saved runs; mark verdicts that differ from the recorded one.

    Unreadable runs are listed on standard error and left out. Exit code 1: the table checked by --check is out of
    date; 2: no run or no marker line found.
    """
    form = form_of(as_json, as_csv, markdown)
    if sum((form is not None, check is not None, write is not None)) > 1:
        raise GaugeError("--json, --csv, --markdown, --check and --write exclude each other; give one")
    file = check or write
    lines = _read(file) if file is not None else []
    place = _between_markers(file, lines) if file is not None else slice(0)
    standings = _standings(runs or [DEFAULT_RUNS])
    block = ["", *as_markdown(standings), ""]
    if check is not None:
        _check(check, lines[place], block, standings, runs or [])
    elif write is not None:
        _write(write, lines[: place.start] + block + lines[place.stop :])
    elif form == "json":
        print_json(rows_of(standings))
    elif form == "csv":
        print_csv(rows_of(standings), COLUMNS)
    elif form == "markdown":
        print("\n".join(as_markdown(standings)))
    else:
        print(_as_terminal(standings), end="")


def _standings(paths: list[Path]) -> list[Standing]:
    from peft_gauge.claims import ledger
    from peft_gauge.history.ledger import NewestVerdicts
    from peft_gauge.history.reader import read_run
    from peft_gauge.report.html import page_data

    files, left_out = page_data.find(paths)
    newest = NewestVerdicts()
    was_read = False
    for file in files:  # read one at a time and released: a history can have a thousand runs
        try:
            newest.add(read_run(file))
            was_read = True
        except GaugeError as error:
            left_out.append(str(error))
    if not was_read:
        raise GaugeError(page_data.nothing_left(left_out))
    for line in left_out:
        print(f"peft-gauge: left out: {line}", file=sys.stderr)
    return newest.of_ledger(ledger())


# The table

COLUMNS = ("claim", "model", "verdict", "recorded", "metric", "conditions", "date", "machine", "run", "statement")


def rows_of(standings: Iterable[Standing]) -> list[dict[str, Any]]:
    """One row per claim and model; ``None`` where no run has decided it."""
    return [
        {
            "claim": one.id,
            "model": one.model,
            "verdict": one.verdict,
            "recorded": one.recorded,
            "metric": one.metric,
            "conditions": one.conditions,
            "date": None if one.source is None else f"{one.source.ended:%Y-%m-%d}",
            "machine": None if one.source is None else one.source.machine,
            "run": None if one.source is None else one.source.run,
            "statement": one.statement,
        }
        for one in standings
    ]


def as_markdown(standings: Sequence[Standing]) -> list[str]:
    """Lines of the table for GitHub: the counts before it, the runs it comes from after it.

    A cell that repeats the row above of the same claim is empty: GitHub makes these columns narrow, and each repeated
    sentence, condition or name costs three to six lines of height.
    """
    from peft_gauge.report import markdown

    rule = ["---"] * len(HEADINGS)
    return [
        f"{markdown.escape(_counted(standings))}. An empty cell repeats the one above.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in (HEADINGS, rule, *_markdown_rows(standings))),
        "",
        *(f"- {markdown.escape(_told(source))}" for source in _sources(standings)),
    ]


def _markdown_rows(standings: Sequence[Standing]) -> Iterable[list[str]]:
    from peft_gauge.report.format import ABSENT
    from peft_gauge.report.markdown import escape

    above: list[str] = []
    for one in standings:
        claim = f"**{escape(one.id)}**: {escape(one.statement)}"
        own = [escape(cell) for cell in (one.model, _verdict(one), one.metric or ABSENT)]
        often_shared = [claim, *map(escape, (one.conditions or ABSENT, _date(one), _machine(one)))]
        same_claim = above[:1] == [claim]
        first, *last = (
            "" if same_claim and cell == over else cell
            for cell, over in zip(often_shared, above or often_shared, strict=True)
        )
        yield [first, *own, *last]
        above = often_shared


def _as_terminal(standings: Sequence[Standing]) -> str:
    from rich.console import Console
    from rich.table import Table

    from peft_gauge.report.format import ABSENT
    from peft_gauge.report.terminal.summary import as_text

    caption = "\n".join([_counted(standings), *map(_told, _sources(standings))])
    table = Table(title="claims", title_justify="left", caption=caption, caption_justify="left")
    for heading in ("claim", "model"):
        table.add_column(heading, no_wrap=True)
    for heading in ("verdict", "metric"):
        table.add_column(heading, overflow="fold")
    table.add_column("date", no_wrap=True)
    table.add_column("machine", overflow="fold")
    for one in standings:
        cells = (one.id, one.model, _verdict(one), one.metric or ABSENT, _date(one), _machine(one))
        table.add_row(*cells)
    return as_text([table], Console().width)


def _counted(standings: Sequence[Standing]) -> str:
    from peft_gauge.report.html.page_data import counted

    claims = len({one.id for one in standings})
    differing = sum(one.differs for one in standings)
    told = f"{claims} claims, each on one or more models: {counted(one.verdict for one in standings)}"
    return f"{told}; differing from the recorded verdict: {differing}" if differing else told


def _verdict(standing: Standing) -> str:
    remarks = [f"recorded: {standing.recorded}"] if standing.differs else []
    remarks += ["of an earlier wording"] if standing.reworded else []
    return f"{standing.verdict} ({', '.join(remarks)})" if remarks else standing.verdict


def _date(standing: Standing) -> str:
    from peft_gauge.report.format import ABSENT

    return f"{standing.source.ended:%Y-%m-%d}" if standing.source is not None else ABSENT


def _machine(standing: Standing) -> str:
    from peft_gauge.report.format import ABSENT

    return standing.source.machine if standing.source is not None else ABSENT


def _sources(standings: Iterable[Standing]) -> list[Source]:
    """The runs that the verdicts come from, newest first."""
    found = {one.source for one in standings if one.source is not None}
    return sorted(found, key=lambda source: (source.ended, source.machine, source.run), reverse=True)


def _told(source: Source) -> str:
    from peft_gauge.report.html.page_tables import versions

    commit = f", commit {source.commit}" if source.commit is not None else ""
    installed = versions(source.libraries)
    told = f"{source.ended:%Y-%m-%d} on {source.machine}: run {source.run}{commit}"
    return f"{told}, {installed}" if installed else told


# The file that holds it


def _read(file: Path) -> list[str]:
    """The lines of ``file``."""
    try:
        return file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise GaugeError(f"cannot read {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise GaugeError(f"{file} is not valid UTF-8") from error


def _between_markers(file: Path, lines: Sequence[str]) -> slice:
    """The table's place among ``lines``; raises `GaugeError` unless both marker lines occur once, in order."""
    kind = START.partition(":")[0]
    starts = [place for place, line in enumerate(lines) if line.startswith(f"{kind}:")]
    ends = [place for place, line in enumerate(lines) if line.rstrip() == END]
    if len(starts) != 1 or len(ends) != 1 or starts > ends:
        raise GaugeError(f"{file} must contain the line '{START}' once and, after it, the line '{END}'; add them")
    return slice(starts[0] + 1, ends[0])


def _check(file: Path, standing: list[str], block: list[str], standings: Sequence[Standing], runs: list[Path]) -> None:
    """Print whether the table in ``file`` equals ``block``; raises `typer.Exit` with code 1 if it does not."""
    if standing == block:
        print(f"{file} is up to date: {len(standings)} verdicts")
        return
    command = shlex.join(["peft-gauge", "claims", *map(str, runs), "--write", str(file)])
    print(f"{file} is out of date: {_difference(standing, block, standings)}; to update it, run: {command}")
    raise typer.Exit(1)


def _difference(old: list[str], new: list[str], standings: Sequence[Standing]) -> str:
    """The claims whose rows changed from ``old`` to ``new``, the first few by name."""
    changed = [
        place - BEFORE_ROWS
        for kind, _, _, start, end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        for place in range(start, end)
        if kind != "equal" and 0 <= place - BEFORE_ROWS < len(standings)
    ]
    if not changed:
        return "lines outside the claims' rows differ"
    names = [f"{standings[row].id} on {standings[row].model}" for row in changed[:MOST_NAMED]]
    more = [f"{len(changed) - MOST_NAMED} more"] if len(changed) > MOST_NAMED else []
    return f"{', '.join([*names, *more])} {'differ' if len(changed) > 1 else 'differs'}"


def _write(file: Path, lines: list[str]) -> None:
    from peft_gauge.files import write_whole

    try:
        write_whole(file.resolve(), "\n".join(lines))  # resolved, so that a link stays one
    except OSError as error:
        raise GaugeError(f"cannot write {file}: {error.strerror or error}") from error
    print(f"wrote {file}")
