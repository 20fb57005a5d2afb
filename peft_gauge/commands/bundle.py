"""``peft-gauge bundle``: collect everything that a node without network needs in a folder to copy there."""

from __future__ import annotations

import sys
from pathlib import Path  # typer reads the annotations at run time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_gauge.bundle.target import DEFAULT_PLATFORM

if TYPE_CHECKING:
    from peft_gauge.bundle.collection import Bundle


def bundle(
    python: Annotated[str, typer.Option(help="Python version of the node, such as 3.12.")],
    have: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[==VERSION],…|@FILE",
            help="Packages installed on the node; repeatable. A name includes its dependencies. "
            "@FILE: the node's output of `python -m pip list --format=freeze`.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write; an older bundle is replaced.")] = Path(
        "bundle"
    ),
    platform: Annotated[
        str, typer.Option(help="manylinux_2_GLIBC_MACHINE with the node's glibc version or an older one, or MACHINE.")
    ] = DEFAULT_PLATFORM,
    most_megabytes: Annotated[
        float | None,
        typer.Option(help="Size limit of the bundle in MB (10⁶ bytes); extras that exceed it are left out."),
    ] = None,
    checkout: Annotated[
        bool,
        typer.Option(
            "--checkout/--no-checkout",
            help="Include this checkout: the files that git tracks, with uncommitted changes. "
            "--no-checkout: wheels only, for a node that has a checkout.",
        ),
    ] = True,
    index_url: Annotated[str | None, typer.Option(help="Package index to use, as for pip.")] = None,
    find_links: Annotated[
        list[str] | None, typer.Option(help="Folder or page with more wheels, as for pip; repeatable.")
    ] = None,
) -> None:
    """Collect this project, the wheels that a node without network lacks, and a run.sh that installs them.

    run.sh installs into its own folder and leaves the node's packages unchanged. torch and CUDA are never included.

    Exit code 2: no bundle can be made; nothing is written.
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
        dirty = " and uncommitted changes" if commit["dirty"] else ""
        print(f"{_megabytes(manifest['checkout']['bytes']):>10}  the checkout: commit {commit['id'][:12]}{dirty}")
    for each in manifest["left_out"]:
        print(_left_out(each))
    for note in made.notes:
        print(f"note: {note}")
    print(f"copy {made.folder} to the node and run: sh {made.folder.name}/run.sh")


def _left_out(each: dict[str, Any]) -> str:
    what = f"left out: extra {each['extra']}"
    if each["bytes"] is not None:
        what += f", {_megabytes(each['bytes'])} ({', '.join(each['wheels'])})"
    else:
        what += f" ({each['why']})"
    return f"{what}; unavailable without it: {each['without']}"


def _megabytes(number: int) -> str:
    return f"{number / 1e6:.2f} MB"
