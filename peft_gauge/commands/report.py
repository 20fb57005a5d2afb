"""``peft-gauge report``: saved runs as an HTML page, as pictures, or as a Markdown summary."""

from __future__ import annotations

import sys
from pathlib import Path  # typer reads the annotations at run time
from typing import Annotated

import typer

from peft_gauge.errors import GaugeError, unknown
from peft_gauge.history import store

DEFAULT_PAGE, DEFAULT_FOLDER = Path("report.html"), Path("report")


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUNS...",
            help="Run files, folders of runs or their addresses, oldest first (default: results).",
            parser=store.place,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="HTML file, or folder of pictures (default: report.html or report/)."),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="html: one page; png or svg: a folder of at most a dozen pictures.")
    ] = "html",
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print each machine's newest results as Markdown, as for a CI summary.")
    ] = False,
    rules: Annotated[Path | None, typer.Option(help="Rules for metrics (default: fixtures/rules.toml).")] = None,
) -> None:
    """Show which method to use and what changed, from saved runs; each case is shown from the newest run that has it.

    Unreadable runs are listed on standard error and left out. Exit code 2: no run could be read.
    """
    paths = runs or [Path("results")]
    if form not in ("html", "png", "svg"):
        raise unknown("format", form, ("html", "png", "svg"))
    if markdown:
        if out is not None or form != "html":
            raise GaugeError("--markdown prints to standard output; leave out -o and --format")
        _print_markdown(paths)
    elif form == "html":
        _write_page(paths, out or DEFAULT_PAGE, rules)
    else:
        _draw(paths, out or DEFAULT_FOLDER, form, rules)


def _write_page(paths: list[Path], out: Path, rules: Path | None) -> None:
    from peft_gauge.files import write_whole
    from peft_gauge.history.rules import read_rules
    from peft_gauge.report.charts import plots
    from peft_gauge.report.html import page, page_data

    plots.altair()  # fails early where altair is missing, before a long history is read
    if out.is_dir():
        raise GaugeError(f"{out} is a folder; give a file name, such as {out / DEFAULT_PAGE}")
    found = page_data.gather(paths, read_rules(rules))
    _warn(found.left_out)
    text = page.render(found)
    try:
        write_whole(out, text)
    except OSError as error:
        raise GaugeError(f"cannot write {out}: {error.strerror or error}") from error
    print(f"wrote {out}, {len(text.encode()) / 1e6:.1f} MB")


def _draw(paths: list[Path], folder: Path, form: str, rules: Path | None) -> None:
    from peft_gauge.history.rules import read_rules
    from peft_gauge.report.charts import pictures, plots
    from peft_gauge.report.html import page_data

    plots.altair()
    if folder.exists() and not folder.is_dir():
        raise GaugeError(f"{folder} is a file; --format {form} needs a folder")
    found = page_data.gather(paths, read_rules(rules))
    _warn(found.left_out)
    saved = pictures.save_pictures(found, folder, form)
    if not saved:
        raise GaugeError("nothing to plot: the runs contain no memory, no times and no sweep")
    print(f"wrote {len(saved)} pictures to {folder}")


def _print_markdown(paths: list[Path]) -> None:
    from peft_gauge.report import markdown
    from peft_gauge.report.html import page_data

    files, left_out = page_data.find(paths)
    answers = page_data.newest_answers(files, left_out)
    if not answers:
        raise GaugeError(page_data.nothing_left(left_out))
    _warn(left_out)
    print("\n".join(markdown.summary(*each) for each in answers), end="")


def _warn(left_out: list[str]) -> None:
    for line in left_out:
        print(f"peft-gauge: left out: {line}", file=sys.stderr)
