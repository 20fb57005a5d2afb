"""``peft-gauge report``: saved runs as one page, as pictures, or as a Markdown summary."""

from __future__ import annotations

import sys
from pathlib import Path  # typer reads the annotations at run time
from typing import Annotated

import typer

from peft_gauge.errors import GaugeError, unknown

DEFAULT_PAGE, DEFAULT_FOLDER = Path("report.html"), Path("report")


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUNS...", help="Folders of runs, or runs, the oldest first. Default: results."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="The page, or the folder of pictures. Default: report.html, report/."),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="html: one page; png or svg: a folder with a picture of each plot.")
    ] = "html",
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print each machine's newest answers instead, as for a job's summary.")
    ] = False,
    rules: Annotated[Path | None, typer.Option(help="How figures are judged. Default: fixtures/rules.toml.")] = None,
) -> None:
    """Show saved runs: tables, plots and history, with what changed. Of each case, the newest run counts that ran it.

    What cannot be read is named on standard error and left out. Exit code 2 where nothing is left.
    """
    paths = runs or [Path("results")]
    if form not in ("html", "png", "svg"):
        raise unknown("format", form, ("html", "png", "svg"))
    if markdown:
        if out is not None or form != "html":
            raise GaugeError("--markdown prints; it goes with neither -o nor --format")
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

    plots.altair()  # before a long history is read
    if out.is_dir():
        raise GaugeError(f"{out} is a folder; name the page to write, such as {out / DEFAULT_PAGE}")
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
        raise GaugeError(f"{folder} is a file; --format {form} needs a folder for its pictures")
    found = page_data.gather(paths, read_rules(rules))
    _warn(found.left_out)
    saved = pictures.save_pictures(found, folder, form)
    if not saved:
        raise GaugeError("the runs hold no memory, no times and no sweep: there is nothing to draw")
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
