"""``peft-gauge calibrate``: measure the GPU overheads that plans assume, and keep them for later plans."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_gauge.commands.tables import AsCsv, AsJson, AsMarkdown, form_of, print_csv, print_json, print_markdown
from peft_gauge.errors import GaugeError

if TYPE_CHECKING:
    from peft_gauge.commands.tables import Form
    from peft_gauge.measure.calibration import Assumption

LIMIT_SECONDS = 180.0
ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def calibrate(
    folder: Annotated[
        Path | None, typer.Option(help="Folder for the calibration (default: the user's, which plans read).")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep/--no-keep", help="Save the calibration, or only show it.")] = True,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Measure a GPU's CUDA context, library workspaces, allocator sizes and speed; plans for this GPU then use them.

    Takes about 15 seconds. No other process may start or end on the GPU meanwhile. Measures the first visible device;
    select it with CUDA_VISIBLE_DEVICES. Exit code 2: the GPU cannot be measured.
    """
    from peft_gauge import paths
    from peft_gauge.measure.calibration import assumptions
    from peft_gauge.memory.gpus import lookup
    from peft_gauge.memory.overheads import default_overheads, write_calibration

    form = form_of(as_json, as_csv, as_markdown)
    found = _measured()
    name = found.pop("gpu_name")
    try:
        usable_bytes: int | None = lookup(name).usable_bytes
    except GaugeError:
        usable_bytes = None
    major, minor = found["allocator"]["compute_capability"]
    rows = assumptions(found, default_overheads((major, minor)), usable_bytes)
    file = write_calibration(folder or paths.calibrations(), name, **found) if keep else None
    if form is not None:
        _print(name, found, rows, form)
        return
    _show(name, found, rows)
    if file is not None:
        used = (
            "plans for this GPU use it from now on" if folder is None else f"plans use it with --calibration {folder}"
        )
        print(f"saved {file}; {used}")


def _print(name: str, found: dict[str, Any], rows: list[Assumption], form: Form) -> None:
    """JSON has everything; the other forms have each overhead as assumed and as measured."""
    columns = ("gpu", "overhead", "assumed_bytes", "measured_bytes", "holds")
    table = [(name, row.name, row.planned, row.measured, row.holds) for row in rows]
    if form == "json":
        print_json({"gpu": name, **found, "differences": [row.name for row in rows if not row.holds]})
    elif form == "csv":
        print_csv([dict(zip(columns, line, strict=True)) for line in table], columns)
    else:
        lines = [[f"{row.planned:,}", f"{row.measured:,}", "same" if row.holds else "differs"] for row in rows]
        cells = [[row.name, *line] for row, line in zip(rows, lines, strict=True)]
        print_markdown(("overhead", "assumed", "measured", ""), cells)


def _measured() -> dict[str, Any]:
    """The result of `peft_gauge.measure.calibration.calibrate` for the first visible GPU, run in its own process."""
    from peft_gauge import isolation, machine
    from peft_gauge.commands.progress import bar

    reason = machine.why_no_cuda()
    if reason is not None:
        raise GaugeError(f"there is no GPU to calibrate: {reason}")
    # Measure torch's own allocator sizes, whatever the caller configured.
    settings = {name: "" for name in ALLOCATOR_SETTINGS if name in os.environ}
    with bar(1, "measuring the GPU's overheads"):
        outcome = isolation.run(
            "peft_gauge.measure.calibration:calibrate", limit_seconds=LIMIT_SECONDS, environment=settings
        )
    if outcome.ended == "out-of-memory":
        raise GaugeError(f"not enough free GPU memory to calibrate ({outcome.reason}); wait for other processes to end")
    if outcome.ended != "done":
        raise GaugeError(f"this GPU cannot be calibrated: {outcome.reason}")
    return dict(outcome.value)


def _show(name: str, found: dict[str, Any], rows: list[Assumption]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{name}, torch {found['torch_version']}", title_justify="left")
    table.add_column("overhead assumed by plans")
    table.add_column("assumed", justify="right", no_wrap=True)
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_row(row.name, f"{row.planned:,}", f"{row.measured:,}", "same" if row.holds else "differs")
    Console(highlight=False).print(table)
    for row in rows:
        if not row.holds:
            print(f"{row.name}: plans assume {row.planned:,} bytes ({row.origin}); this GPU uses {row.measured:,}")
    speed = found["speed"]
    print(
        f"{speed['dtype']} matrix product: {speed['product_flops_per_second'] / 1e12:,.1f} TFLOP/s; "
        f"copy: {speed['copy_bytes_per_second'] / 1e9:,.0f} GB/s read and written"
    )
    shown = found["nvml"]["shows_this_process"]
    print(f"NVML {'lists' if shown else 'does not list'} this process; CUDA context = {_told_by(shown)}")


def _told_by(shown: bool) -> str:
    return "its memory minus the allocator's" if shown else "growth of the whole device's memory minus the allocator's"
