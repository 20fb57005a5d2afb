"""``peft-gauge bundle``: everything that a node without network lacks, in a folder to copy there."""

from __future__ import annotations

import sys
from pathlib import Path  # typer reads the annotations at run time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_gauge.bundle.target import DEFAULT_PLATFORM

if TYPE_CHECKING:
    from peft_gauge.bundle.collection import Bundle


def bundle(
    python: Annotated[str, typer.Option(help="The node's Python, such as 3.12.")],
    have: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[==VERSION],…|@FILE",
            help="What the node has; repeatable. Names stand for themselves and for what they need. "
            "@FILE: all that the node has, as `python -m pip list --format=freeze` printed it there.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="The bundle's folder; an older bundle is replaced.")] = Path(
        "bundle"
    ),
    platform: Annotated[
        str, typer.Option(help="manylinux_2_GLIBC_MACHINE, with the glibc of the node or an older one, or a machine.")
    ] = DEFAULT_PLATFORM,
    most_megabytes: Annotated[
        float | None,
        typer.Option(help="The most that the bundle may take, in 10⁶ bytes; extras that are too much are left out."),
    ] = None,
    checkout: Annotated[
        bool,
        typer.Option(
            "--checkout/--no-checkout",
            help="Bring the project too: the files of this checkout that git tracks, with changes not yet committed. "
            "Without: wheels alone, for a checkout that is on the node.",
        ),
    ] = True,
    index_url: Annotated[str | None, typer.Option(help="A package index in place of pip's own, as for pip.")] = None,
    find_links: Annotated[
        list[str] | None, typer.Option(help="A folder or page with more wheels, as for pip; repeatable.")
    ] = None,
) -> None:
    """Collect the wheels that a node without network lacks, this project, and a run.sh that installs them there.

    run.sh installs into a folder of its own; the node's packages stay as they are. torch and CUDA are never collected.

    Exit code 2 where no bundle can be made; then nothing is written.
    """
    from peft_gauge.bundle.collection import Wanted, collect

    index = [] if index_url is None else ["--index-url", index_url]
    links = [word for each in find_links or [] for word in ("--find-links", each)]
    wanted = Wanted(python, platform, tuple(have or []), out, most_megabytes, checkout, (*index, *links))
    _show(collect(wanted, say=lambda text: print(f"peft-gauge: {text}", file=sys.stderr)))


def _show(made: Bundle) -> None:
    manifest = made.manifest
    target = manifest["target"]
    where = f"Python {target['python']}, Linux on {target['machine']} with glibc 2.{target['glibc']} or newer"
    print(f"{made.folder}: {_megabytes(made.size)} for {where}")
    for wheel in sorted(manifest["wheels"], key=lambda each: -each["bytes"]):
        by = ", ".join(wheel["needed_by"])
        print(f"{_megabytes(wheel['bytes']):>10}  {wheel['name']} {wheel['version']} (for {by})")
    if manifest["checkout"] is not None:
        commit = manifest["project"]["commit"]
        dirty = " and changes not yet committed" if commit["dirty"] else ""
        print(f"{_megabytes(manifest['checkout']['bytes']):>10}  the checkout: commit {commit['id'][:12]}{dirty}")
    for each in manifest["left_out"]:
        print(_left_out(each))
    for note in made.notes:
        print(f"note: {note}")
    print(f"copy {made.folder} to the node and run there: sh {made.folder.name}/run.sh")


def _left_out(each: dict[str, Any]) -> str:
    what = f"left out: extra {each['extra']}"
    if each["bytes"] is not None:
        what += f", {_megabytes(each['bytes'])} ({', '.join(each['wheels'])})"
    else:
        what += f" ({each['why']})"
    return f"{what}; will not work without it: {each['without']}"


def _megabytes(number: int) -> str:
    return f"{number / 1e6:.2f} MB"
