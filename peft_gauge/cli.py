"""The ``peft-gauge`` command."""

from __future__ import annotations

import platform
import sys
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.main

from peft_gauge.collector import end_quickly
from peft_gauge.commands.ab import ab
from peft_gauge.commands.accuracy import accuracy
from peft_gauge.commands.bench import EXTRA, bench
from peft_gauge.commands.bisect import bisect
from peft_gauge.commands.bundle import bundle
from peft_gauge.commands.calibrate import calibrate
from peft_gauge.commands.ceilings import ceilings
from peft_gauge.commands.claims import claims
from peft_gauge.commands.compare import compare
from peft_gauge.commands.defaults import defaults
from peft_gauge.commands.groups import GroupedCommand
from peft_gauge.commands.lists import gpus, methods, models, runs
from peft_gauge.commands.memory_bars import memory_bars
from peft_gauge.commands.memory_curve import memory_curve
from peft_gauge.commands.merge import merge
from peft_gauge.commands.plan import plan
from peft_gauge.commands.report import report
from peft_gauge.commands.tables import AsCsv, AsJson, AsMarkdown, form_of
from peft_gauge.commands.trace import trace
from peft_gauge.errors import GaugeError, file_errors
from peft_gauge.history import store

app = typer.Typer(
    help="Measure, predict and compare parameter-efficient fine-tuning.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # plain help: in 80 columns the boxes cut option names off
    pretty_exceptions_enable=False,
)
command = partial(app.command, cls=GroupedCommand)
command(short_help="Predict the memory of a training step.")(plan)
command(short_help="Run the benchmarks, from a checkout or an installed wheel.", context_settings=EXTRA)(bench)
command(short_help="A/B-test a training step under two sets of package versions.")(ab)
command(short_help="Find the release of a library that made a step worse.")(bisect)
command(short_help="Measure a GPU's memory overheads and speed for plans.")(calibrate)
command(short_help="Collect this project and its wheels for an offline node.")(bundle)
command(short_help="Check or rewrite the memory ceilings.")(ceilings)
command(short_help="Show each claim with its newest measured verdict.")(claims)
command(short_help="Compare saved runs with a base run.")(compare)
command(short_help="List the models that --model knows by name.")(models)
command(short_help="List the methods that --method knows.")(methods)
command(short_help="List the GPUs that --gpu knows by name.")(gpus)
command(short_help="List saved runs.")(runs)
command(short_help="Join the saved shards of one run.")(merge)
command(short_help="Plot saved plans as bars, by category.")(memory_bars)
command(short_help="Plot planned memory against sequence length.")(memory_curve)
command(short_help="Plot planned against measured memory.")(accuracy)
command(short_help="Show saved runs as a page, plots or Markdown.")(report)
command(short_help="Compare a recorded step's allocations with its plan.")(trace)


def _print_versions(given: bool) -> None:
    """Print this package, Python, and the libraries that change a result, without importing them."""
    if given:
        from peft_gauge import __version__
        from peft_gauge.machine import LIBRARIES, installed_version

        found = {"peft-gauge": __version__, "Python": platform.python_version()}
        found |= {name: installed_version(name) or "not installed" for name in LIBRARIES}
        print("\n".join(f"{name} {version}" for name, version in found.items()))
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_versions, is_eager=True, help="Print the version, Python's and the libraries'."
        ),
    ] = False,
) -> None:
    """Measure, predict and compare parameter-efficient fine-tuning."""


@command(short_help="Check what this machine can run and what is missing.")
def doctor(
    results: Annotated[
        Path, typer.Option(help="Folder or address to save runs to.", metavar="DIR", parser=store.place)
    ] = Path("results"),
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Check what this machine can run; for each missing part, print how to install it."""
    from peft_gauge.commands.doctor import config_line, examine, print_lines

    form = form_of(as_json, as_csv, as_markdown)
    lines = [config_line(commands()), *examine(results)]
    print_lines(lines, form)
    if any(line.status == "missing" for line in lines):
        raise typer.Exit(1)


@command(short_help="Download pretrained weights.")
def fetch(
    name: Annotated[str, typer.Argument(help="Weights to download: smollm2.")],
) -> None:
    """Download pretrained weights into the user's cache, verify their checksum and dequantize them for later runs."""
    from peft_gauge.training.fetch import fetch as fetch_weights
    from peft_gauge.training.fetch import prepare

    weights = fetch_weights(name)
    print(weights)
    print(prepare(weights))


@cache
def _group() -> Any:
    """All commands as Typer builds them, once: it reads the type hints of each, which takes 30 ms."""
    return typer.main.get_command(app)


def commands() -> dict[str, Any]:
    """All commands by name."""
    return dict(_group().commands)


def main() -> None:
    """The entry point: bad input is one line on standard error and exit code 2."""
    end_quickly()
    try:
        with file_errors():
            _group()(default_map=defaults(sys.argv[1:], commands()))
    except GaugeError as error:
        print(f"peft-gauge: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
