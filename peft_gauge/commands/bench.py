"""``peft-gauge bench``: run the benchmarks, from a checkout or from an installed wheel."""

from __future__ import annotations

from typing import Annotated

import typer

EXTRA = {"ignore_unknown_options": True}
"""Settings of the command: unknown options are passed to pytest."""


def bench(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PYTEST_ARGUMENTS",
            help="Paths, node ids and options of pytest and of the suite: --model, --method, --rounds, -k, -m.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run the benchmarks in this folder: pytest on the suite, with pytest's own arguments.

    `peft-gauge bench -h` lists all options. Runs are saved under ./results (--results=DIR). Exit code 0: everything
    passed; 1: a benchmark failed; 2: bad input, or no benchmark selected; 3: an error in collection; 130: interrupted.
    """
    from peft_gauge.pytest_plugin.bench import bench as run

    code = run(arguments or [])
    if code != 0:
        raise typer.Exit(code)
