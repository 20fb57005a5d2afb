"""Install a bundle next to a node's own packages: ``python on_node.py BUNDLE [FOLDER]``, called by `run.sh`.

This file is copied into the bundle and runs on the node with Python 3.11 or newer and the standard library (and
`packaging`, once installed). It prints the folder that contains ``site`` (packages), ``checkout`` and ``bin``. An error
is one line on standard error and exit code 2; it leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

MARK = "peft-gauge-bundle.json"
COMMANDS: dict[str, list[str]] = {"python": [], "pytest": ["-m", "pytest"], "peft-gauge": ["-m", "peft_gauge.cli"]}
FREEZE = "python -m pip list --format=freeze"

Distributions = Mapping[str, metadata.Distribution]


class Refusal(Exception):
    """The reason, in one line, why the bundle cannot be installed here."""


def main(arguments: Sequence[str]) -> int:
    bundle, folder = Path(arguments[0]).resolve(), "".join(arguments[1:2])
    try:
        print(install(bundle, Path(folder) if folder else None))
    except Refusal as error:
        print(f"run.sh: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def install(bundle: Path, wanted: Path | None) -> Path:
    """Install the parts of ``bundle`` that this node lacks, under ``wanted`` or a default place; returns the folder.

    The folder is named after the bundle, this Python and the missing wheels, so that nodes with other packages can
    share a place. It is complete or absent; an existing one is reused.
    """
    text = (bundle / "manifest.json").read_bytes()
    manifest = json.loads(text)
    node = present()
    lacking = [wheel for wheel in manifest["wheels"] if canonical(wheel["name"]) not in node]
    facts = [hashlib.sha256(text).hexdigest(), sys.version, sys.prefix, [wheel["file"] for wheel in lacking]]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    with refusing("cannot be installed"):
        place = _place(bundle, wanted)
        folder = place / key
        if folder.is_dir():
            return folder
        verify(bundle, manifest)
        part = Path(tempfile.mkdtemp(dir=place, prefix=".part-"))
        try:
            part.chmod(0o755)
            _fill(part, bundle, manifest, lacking, node)
            try:
                part.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another call was as far in the meantime
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn an operating system error into a `Refusal`."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise Refusal(f"the bundle {what}: {error.strerror or error}{where}; give another folder with --to") from error


def canonical(name: str) -> str:
    """A distribution's name, normalized by PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def present() -> dict[str, metadata.Distribution]:
    """This node's own distributions; packages that a bundle installed do not count, even if they are on PYTHONPATH."""
    return _distributions([entry for entry in sys.path if not (Path(entry).parent / MARK).is_file()])


def _distributions(path: list[str]) -> dict[str, metadata.Distribution]:
    """Distributions by canonical name; of duplicates, the imported one."""
    found: dict[str, metadata.Distribution] = {}
    for distribution in metadata.distributions(path=path):
        name = distribution.metadata["Name"]
        if name is not None:
            found.setdefault(canonical(name), distribution)
    return found


def _place(bundle: Path, wanted: Path | None) -> Path:
    """A writable folder: ``wanted``, created if necessary, or a default."""
    if wanted is not None:
        place = wanted.resolve()
        place.mkdir(parents=True, exist_ok=True)
        return place
    beside = bundle.parent / f"{bundle.name}-installed"
    try:
        beside.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=beside).close()  # a test by permissions is not enough: root on a read-only system
        return beside
    except OSError:
        own = Path(tempfile.gettempdir()) / f"peft-gauge-{os.getuid()}"
        own.mkdir(mode=0o700, exist_ok=True)
        if own.stat().st_uid != os.getuid():
            raise Refusal(f"{own} belongs to another user; give a folder with --to") from None
        return own


def verify(bundle: Path, manifest: Mapping[str, Any]) -> None:
    """Raise `Refusal` for a file of the bundle that is missing or has another checksum."""
    files = list(manifest["wheels"])
    if manifest["checkout"] is not None:
        files.append(manifest["checkout"])
    for each in files:
        path = bundle / each["file"]
        if not path.is_file():
            raise Refusal(f"{each['file']} is missing from the bundle; copy the bundle again")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != each["sha256"]:
            raise Refusal(f"{each['file']} is damaged (its sha256 differs from the manifest's); copy the bundle again")


def _fill(
    part: Path, bundle: Path, manifest: Mapping[str, Any], lacking: Sequence[Mapping[str, Any]], node: Distributions
) -> None:
    """Write the whole installation to the folder ``part``."""
    site = part / "site"
    site.mkdir()
    if lacking:
        _install([bundle / wheel["file"] for wheel in lacking], site)
    _check(manifest, node, _distributions([str(site)]), site)
    if manifest["checkout"] is not None:
        with tarfile.open(bundle / manifest["checkout"]["file"]) as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # since 3.11.4; default since 3.14
            archive.extractall(part / "checkout")
    (part / "bin").mkdir()
    for name, arguments in COMMANDS.items():
        command = part / "bin" / name
        command.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, *arguments])} "$@"\n', encoding="utf-8")
        command.chmod(0o755)
    kept = [canonical(wheel["name"]) for wheel in manifest["wheels"] if wheel not in lacking]
    mark = {"bundle": str(bundle), "python": sys.executable, "site": [wheel["file"] for wheel in lacking], "kept": kept}
    (part / MARK).write_text(json.dumps(mark, indent=2), encoding="utf-8")
    if kept:
        there = ", ".join(f"{name} {node[name].version}" for name in kept)
        print(f"run.sh: already on this node and left unchanged: {there}", file=sys.stderr)


def _install(wheels: Sequence[Path], site: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise Refusal(f"{sys.executable} has no pip, which installs the wheels; give a Python with pip with --python")
    scratch = site.parent / "scratch"  # pip unpacks here first: a node's /tmp may be small
    scratch.mkdir()
    # --isolated, no configuration file: settings such as --user or --index-url must not apply here.
    settings = {"PIP_CONFIG_FILE": os.devnull, "TMPDIR": str(scratch)}
    quiet = ["--isolated", "--quiet", "--no-input", "--no-cache-dir", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pip", "install", *quiet, "--no-index", "--no-deps", "--target", str(site)]
        + [str(wheel) for wheel in wheels],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    shutil.rmtree(scratch, ignore_errors=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip gave no reason"]
        raise Refusal(f"pip cannot install the bundle's wheels: {lines[-1]}")


def _check(manifest: Mapping[str, Any], node: Distributions, site: Distributions, folder: Path) -> None:
    """Check that every requirement of the project and of the installed wheels is installed, by this node's markers.

    A missing package is a refusal; a wrong version is only printed, since it often works.
    """
    sys.path.append(str(folder))
    try:
        from packaging.requirements import Requirement
    except ImportError:
        raise Refusal("node and bundle lack packaging; make the bundle again without packaging in --have") from None

    def active(requirement: Requirement, extra: str) -> bool:
        return requirement.marker is None or requirement.marker.evaluate({"extra": extra})

    roots = [(Requirement(text), extra) for text, extra in manifest["requirements"]]
    todo = [(each, "peft-gauge") for each, extra in roots if active(each, extra)]
    seen: set[tuple[str, str]] = set()
    missing: dict[str, set[str]] = {}
    while todo:
        requirement, by = todo.pop()
        name = canonical(requirement.name)
        found = node.get(name) or site.get(name)
        if found is None:
            missing.setdefault(name, set()).add(by)
            continue
        if requirement.specifier and not requirement.specifier.contains(found.version, prereleases=True):
            print(f"run.sh: {by} needs {requirement}; the node has {name} {found.version}", file=sys.stderr)
        ours = name not in node
        for extra in [*([""] if ours else []), *sorted(requirement.extras)]:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            needs = [each for each in map(Requirement, found.requires or ()) if active(each, extra)]
            # The node's packages are not checked, except for an extra that something installed here needs.
            todo += [(each, name) for each in needs if ours or not active(each, "")]
    if missing:
        raise Refusal(
            f"this node lacks {_told(missing)}; bundle again with --have @FILE, the output of {FREEZE} on this node"
        )


def _told(missing: Mapping[str, Iterable[str]]) -> str:
    return ", ".join(f"{name} (for {', '.join(sorted(by))})" for name, by in sorted(missing.items()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
