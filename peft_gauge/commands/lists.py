"""``peft-gauge models``, ``methods``, ``gpus`` and ``runs``: the names that other commands take."""

from __future__ import annotations

import sys
from pathlib import Path  # typer reads the annotations at run time
from typing import Annotated

import typer

from peft_gauge.commands.tables import AsCsv, AsJson, AsMarkdown, form_of, print_rows
from peft_gauge.errors import GaugeError
from peft_gauge.history import store


def models(as_json: AsJson = False, as_csv: AsCsv = False, as_markdown: AsMarkdown = False) -> None:
    """List the models that --model knows by name, smallest first; it also takes a folder, a file or a Hub id."""
    from peft_gauge.training.models import logical_params, record_names, resolve

    found = []
    for name in record_names():
        record = resolve(name, weights="random")
        config = record.config
        found.append(
            {
                "model": name,
                "parameters": logical_params(record),
                "layers": config.get("num_hidden_layers"),
                "width": config.get("hidden_size"),
                "positions": record.max_positions,
            }
        )
    print_rows(sorted(found, key=lambda row: row["parameters"]), form_of(as_json, as_csv, as_markdown))


def methods(as_json: AsJson = False, as_csv: AsCsv = False, as_markdown: AsMarkdown = False) -> None:
    """List the methods that --method knows; the first seven are the default."""
    from peft_gauge.training.methods import DEFAULT_METHODS, METHODS

    default = {method.name for method in DEFAULT_METHODS}
    rows = [
        {"method": name, "description": method.title, "default": "yes" if name in default else ""}
        for name, method in METHODS.items()
    ]
    print_rows(rows, form_of(as_json, as_csv, as_markdown))


def gpus(as_json: AsJson = False, as_csv: AsCsv = False, as_markdown: AsMarkdown = False) -> None:
    """List the GPUs that --gpu knows by name, smallest first; it also takes a size, such as 24GB."""
    from peft_gauge.memory.gpus import table

    rows = [
        {
            "gpu": gpu.name,
            "sold as": gpu.marketing_memory,
            "usable bytes": gpu.usable_bytes,
            "usable is": "of the data sheet" if gpu.nominal else "reported by a driver",
        }
        for gpu in table()
    ]
    print_rows(rows, form_of(as_json, as_csv, as_markdown))


def runs(
    results: Annotated[
        Path, typer.Argument(help="Folder or address of saved runs.", metavar="DIR", parser=store.place)
    ] = Path("results"),
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """List the saved runs under a folder, machine by machine, the newest last."""
    from peft_gauge.history.reader import read_run, runs_in

    rows, broken = [], []
    for path in runs_in(results):
        try:
            run = read_run(path)
        except GaugeError as error:
            broken.append(str(error))
            continue
        passed = sum(case.outcome == "passed" for case in run.cases)
        rows.append(
            {
                "machine": path.parent.name,
                "run": path.stem.partition("_")[0],
                "when": f"{run.when:%Y-%m-%d %H:%M}",
                "cases": len(run.cases),
                "passed": passed,
                "torch": run.libraries.get("torch"),
            }
        )
    print_rows(rows, form_of(as_json, as_csv, as_markdown))
    for line in broken:
        print(f"peft-gauge: {line}", file=sys.stderr)
    if broken and not rows:
        raise typer.Exit(2)
