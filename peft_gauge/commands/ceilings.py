"""``peft-gauge ceilings``: are the memory ceilings what the planner says today, and, with ``--write``, make them so."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path  # typer reads the annotations at run time
from typing import TYPE_CHECKING, Annotated

import typer

from peft_gauge.errors import GaugeError, unknown
from peft_gauge.plan import ceilings as table_file
from peft_gauge.plan.ceilings import Ceiling, CeilingKey, CeilingTable, Margins

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft_gauge.plan.record import PlanRequest

DEVICE = "cuda"
DTYPE = "bfloat16"

SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "tinyllama": ((2, 384), (2, 768), (4, 384), (4, 768)),
    "llama-2-7b": ((1, 512), (4, 768)),
}
"""The (batch, seq) of each model's ceilings. Of TinyLlama: the measured step's, and the grid of which the growth by row
and by token is read. Of 7B: a single row of the usual length, and the measured step's shape."""


def ceilings(
    write: Annotated[bool, typer.Option("--write/--check", help="Write the file, or say what would change.")] = False,
    model: Annotated[
        list[str] | None, typer.Option(help=f"{' or '.join(SHAPES)}; repeatable. Default: all. The rest is kept.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Where the ceilings are. Default: fixtures/ceilings.toml.")] = None,
) -> None:
    """Plan every case that has a ceiling; takes some minutes.

    Exit code 1 where the file is out of date and is not written.
    """
    for name in model or []:
        if name not in SHAPES:
            raise unknown("model with ceilings", name, SHAPES)
    path = file or table_file.default_path()
    chosen = tuple(model or SHAPES)
    versions = {name: public_version(name) for name in table_file.LIBRARIES}
    old = _standing(path, replaced=write and model is None)
    rest = {key: ceiling for key, ceiling in old.ceilings.items() if key.model not in chosen} if model else {}
    if write and rest and (old.versions, old.margins) != (versions, Margins()):
        raise GaugeError(f"{path} was planned with other versions or margins; write all of it: leave out --model")
    new = CeilingTable(rest | planned(chosen), Margins(), versions)
    lines = table_file.changes(old.ceilings, new.ceilings)
    for line in [*lines, *_notes(old, new, bool(lines))]:
        print(line)
    if write:
        table_file.write(path, new)
        print(f"wrote {path}: {len(new.ceilings)} ceilings")
    elif lines or old.margins != new.margins:
        print(f"{path} is out of date; if this is meant, run: peft-gauge ceilings --write")
        raise typer.Exit(1)
    else:
        print(f"{path} is up to date: {len(new.ceilings)} ceilings")


def planned(models: Sequence[str]) -> dict[CeilingKey, Ceiling]:
    """The ceilings of the seven methods on each of ``models``, planned now in one process of its own."""
    from peft_gauge.plan.record import PlanRequest
    from peft_gauge.plan.sweep import sweep
    from peft_gauge.training import methods
    from peft_gauge.training.models import resolve
    from peft_gauge.training.step import StepSettings

    # Weights do not change a plan; random ones are the same on every machine.
    requests = [
        PlanRequest(record, method, StepSettings(batch, seq), dtype=DTYPE)
        for record in [resolve(name, weights="random") for name in models]
        for batch, seq in SHAPES[record.name]
        for method in methods.SEVEN
    ]
    return {_key(request): Margins().ceiling(plan) for request, plan in zip(requests, sweep(requests), strict=True)}


def _key(request: PlanRequest) -> CeilingKey:
    settings = request.settings
    return CeilingKey(request.model.name, request.method.name, DEVICE, request.dtype, settings.batch, settings.seq)


def public_version(library: str) -> str:
    """The installed version without its build's label: a plan is the same with a CPU and a CUDA build of torch."""
    return version(library).partition("+")[0]


def _standing(path: Path, *, replaced: bool) -> CeilingTable:
    """The table there is; an empty one where there is none, or where an unusable one is about to be ``replaced``."""
    try:
        if path.exists():
            return table_file.read(path)
    except GaugeError as error:
        if not replaced:
            raise
        print(f"replaced: {error}")
    return CeilingTable({}, Margins(), {})


def _notes(old: CeilingTable, new: CeilingTable, changed: bool) -> list[str]:
    """What explains a change, or does not cause one."""
    notes = []
    for name, now in new.versions.items():
        before = old.versions.get(name, now)
        if before != now:
            notes.append(f"{name} was {before} and is {now}" + ("" if changed else ": every ceiling is the same"))
    if old.margins != new.margins:
        notes.append(f"the margins were {old.margins} and are {new.margins}")
    return notes
