"""``peft-gauge merge``: join the saved runs of shards into one saved run."""

from __future__ import annotations

from pathlib import Path  # typer reads the annotations at run time
from typing import Annotated

import typer

from peft_gauge.history import store


def merge(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="The saved runs of pytest --shard I/N.", parser=store.place),
    ],
    results: Annotated[
        Path,
        typer.Option(help="Folder or address to save the whole run to.", metavar="DIR", parser=store.place),
    ] = Path("results"),
    partial: Annotated[
        bool, typer.Option("--partial", help="Save the run although shards are missing; it records which.")
    ] = False,
) -> None:
    """Join the saved shards of one run into one saved run, which is read as if one machine had run it.

    Shards of other library versions, commits, options or kinds of machine do not belong together, nor does a shard
    that is given twice. Exit code 2: such a shard, or a missing one.
    """
    from peft_gauge.history.shards import joined
    from peft_gauge.history.writer import write_run

    found = joined(files, partial=partial)
    path = write_run(results, found.machine, found.run)
    print(f"saved {store.shown(path)}" + ("" if found.shards is None else f", with {found.shards.name} only"))
