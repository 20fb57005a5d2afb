"""``peft-gauge bundle``: collect everything that a node without network needs in a folder to copy there."""

from __future__ import annotations

import sys
from pathlib import Path  # typer reads the annotations at run time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_gauge.bundle.target import DEFAULT_PLATFORM
from peft_gauge.commands.tables import AsCsv, AsJson, AsMarkdown, Form, form_of, print_json, print_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Collect this project, the wheels that a node without network lacks, and a run.sh that installs them.

    run.sh installs into its own folder and leaves the node's packages unchanged. torch and CUDA are never included.

    Exit code 2: no bundle can be made; nothing is written.
    """
    from peft_gauge.bundle.collection import Wanted, collect

    form = form_of(as_json, as_csv, as_markdown)
    index = [] if index_url is None else ["--index-url", index_url]
    links = [word for each in find_links or [] for word in ("--find-links", each)]
    wanted = Wanted(python, platform, tuple(have or []), out, most_megabytes, checkout, (*index, *links))
    made = collect(wanted, say=lambda text: print(f"peft-gauge: {text}", file=sys.stderr))
    if form is None:
        _show(made)
    else:
        _print(made, form)


def rows_of(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The wheels of a bundle's ``manifest``, largest first, the checkout, and the extras that were left out.

    ``bytes`` of an extra is ``None`` if pip could not choose its wheels.
    """

    def row(content: str, name: str, version: str | None, size: int | None, remark: str) -> dict[str, Any]:
        return {"content": content, "name": name, "version": version, "bytes": size, "remark": remark}

    rows = []
    for each in sorted(manifest["wheels"], key=lambda each: -each["bytes"]):
        rows.append(row("wheel", each["name"], each["version"], each["bytes"], f"for {', '.join(each['needed_by'])}"))
    if manifest["checkout"] is not None:
        commit = manifest["project"]["commit"]
        dirty = "with uncommitted changes" if commit["dirty"] else ""
        rows.append(row("checkout", "checkout", commit["id"][:12], manifest["checkout"]["bytes"], dirty))
    for each in manifest["left_out"]:
        why = each["why"] if each["bytes"] is None else ", ".join(each["wheels"])
        remark = f"{why}; unavailable without it: {each['without']}"
        rows.append(row("left out", f"extra {each['extra']}", None, each["bytes"], remark))
    return rows


def _print(made: Bundle, form: Form) -> None:
    """Print the contents in ``form``; JSON has the folder, the target, the whole size and the notes too."""
    rows = rows_of(made.manifest)
    if form == "json":
        whole = {"folder": str(made.folder), "bytes": made.size, "target": made.manifest["target"]}
        print_json({**whole, "contents": rows, "notes": list(made.notes)})
    else:
        print_rows(rows, form)
        for note in made.notes:
            print(f"peft-gauge: {note}", file=sys.stderr)


def _show(made: Bundle) -> None:
    target = made.manifest["target"]
    where = f"Python {target['python']}, Linux on {target['machine']} with glibc 2.{target['glibc']} or newer"
    print(f"{made.folder}: {_megabytes(made.size)} for {where}")
    for row in rows_of(made.manifest):
        size = "–" if row["bytes"] is None else _megabytes(row["bytes"])
        name = " ".join(word for word in (row["name"], row["version"]) if word)
        left_out = "left out: " if row["content"] == "left out" else ""
        print(f"{size:>10}  {left_out}{name}" + (f" ({row['remark']})" if row["remark"] else ""))
    for note in made.notes:
        print(f"note: {note}")
    print(f"copy {made.folder} to the node and run: sh {made.folder.name}/run.sh")


def _megabytes(number: int) -> str:
    return f"{number / 1e6:.2f} MB"
