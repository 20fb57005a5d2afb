"""``peft-gauge ceilings``: check the memory ceilings against today's plans, or rewrite them with ``--write``."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path  # typer reads the annotations at run time
from typing import TYPE_CHECKING, Annotated

import typer

from peft_gauge.commas import listed
from peft_gauge.errors import GaugeError, unknown
from peft_gauge.plan import ceilings as table_file
from peft_gauge.plan.ceilings import Ceiling, CeilingKey, CeilingTable, Margins

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from peft_gauge.plan.record import PlanRequest

DEVICE = "cuda"
DTYPE = "bfloat16"

SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "tinyllama": ((2, 384), (2, 768), (4, 384), (4, 768)),
    "llama-2-7b": ((1, 512), (4, 768)),
}
"""The (batch, seq) of each model's ceilings. TinyLlama: the measured step and a grid that gives the growth per row and
per token. 7B: one row of the usual length, and the measured step, which is the last of each."""

STEPS = (("plain", "bf16"), ("trainer", "no"), ("trainer", "bf16"))
"""Loop and autocast of further ceilings, for the measured step only."""


def ceilings(
    write: Annotated[bool, typer.Option("--write/--check", help="Write the file, or only list the changes.")] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{' or '.join(SHAPES)}, comma-separated or repeated (default: all). Other models' ceilings are kept."
        ),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="File of ceilings (default: fixtures/ceilings.toml).")] = None,
) -> None:
    """Plan every case that has a memory ceiling; takes a few minutes.

    Exit code 1: the file is out of date and --write is not given.
    """
    model = listed(model) or None
    for name in model or []:
        if name not in SHAPES:
            raise unknown("model with ceilings", name, SHAPES)
    path = file or table_file.default_path()
    chosen = tuple(model or SHAPES)
    versions = {name: public_version(name) for name in table_file.LIBRARIES}
    old = _standing(path, replaced=write and model is None)
    rest = {key: ceiling for key, ceiling in old.ceilings.items() if key.model not in chosen} if model else {}
    if write and rest and (old.versions, old.margins) != (versions, Margins()):
        raise GaugeError(f"{path} was planned with other versions or margins; rewrite all of it: leave out --model")
    new = CeilingTable(rest | planned(chosen), Margins(), versions)
    lines = table_file.changes(old.ceilings, new.ceilings)
    for line in [*lines, *_notes(old, new, bool(lines))]:
        print(line)
    if write:
        table_file.write(path, new)
        print(f"wrote {path}: {len(new.ceilings)} ceilings")
    elif lines or old.margins != new.margins:
        print(f"{path} is out of date; if the change is intended, run: peft-gauge ceilings --write")
        raise typer.Exit(1)
    else:
        print(f"{path} is up to date: {len(new.ceilings)} ceilings")


def planned(models: Sequence[str]) -> dict[CeilingKey, Ceiling]:
    """Ceilings of the default methods on each of ``models``, planned now in a separate process."""
    from peft_gauge.commands.progress import bar
    from peft_gauge.plan.record import PlanRequest
    from peft_gauge.plan.sweep import sweep
    from peft_gauge.training import methods
    from peft_gauge.training.loops import step_settings
    from peft_gauge.training.models import resolve

    # Weights do not change a plan; random ones are the same on every machine.
    requests = [
        PlanRequest(record, method, settings, dtype=DTYPE, loop=loop, trainer_arguments=further)  # type: ignore[arg-type]
        for record in [resolve(name, weights="random") for name in models]
        for loop, precision, batch, seq in _steps(record.name)
        for settings, further in [step_settings(loop, {"batch": batch, "seq": seq, "mixed_precision": precision}, {})]
        for method in methods.DEFAULT_METHODS
    ]
    with bar(len(requests), "planning") as display:
        plans = sweep(requests, display.advance)
    return {_key(request): Margins().ceiling(plan) for request, plan in zip(requests, plans, strict=True)}


def _steps(model: str) -> Iterator[tuple[str, str, int, int]]:
    """Loop, autocast, batch and sequence of each ceiling of ``model``."""
    shapes = SHAPES[model]
    yield from (("plain", "no", batch, seq) for batch, seq in shapes)
    yield from ((loop, precision, *shapes[-1]) for loop, precision in STEPS)


def _key(request: PlanRequest) -> CeilingKey:
    settings = request.settings
    return CeilingKey(
        request.model.name,
        request.method.name,
        DEVICE,
        request.dtype,
        settings.batch,
        settings.seq,
        request.loop,
        settings.mixed_precision,
    )


def public_version(library: str) -> str:
    """The installed version without its build label: CPU and CUDA builds of torch give the same plan."""
    return version(library).partition("+")[0]


def _standing(path: Path, *, replaced: bool) -> CeilingTable:
    """The existing table; empty if the file does not exist, or if it is invalid and is being ``replaced``."""
    try:
        if path.exists():
            return table_file.read(path)
    except GaugeError as error:
        if not replaced:
            raise
        print(f"replaced: {error}")
    return CeilingTable({}, Margins(), {})


def _notes(old: CeilingTable, new: CeilingTable, changed: bool) -> list[str]:
    """Changed versions and margins, whether or not they changed a ceiling."""
    notes = []
    for name, now in new.versions.items():
        before = old.versions.get(name, now)
        if before != now:
            notes.append(f"{name} was {before} and is {now}" + ("" if changed else ": every ceiling is the same"))
    if old.margins != new.margins:
        notes.append(f"the margins were {old.margins} and are {new.margins}")
    return notes
