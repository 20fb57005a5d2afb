"""Environments for one side: the installed packages, behind an overlay folder with the packages that differ.

The overlay is filled by ``pip install --target`` and comes first on a child's path. Everything else is shared,
including torch, which an overlay never changes. pip's resolver decides which packages differ: it receives the side's
requirements together with the installed libraries, and keeps those that still fit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.utils import canonicalize_name
from packaging.version import Version

from peft_gauge import paths
from peft_gauge._internals import pip as from_pip
from peft_gauge.errors import GaugeError, one_line

if TYPE_CHECKING:
    from peft_gauge.environments.requirements import Side

FIXED = "torch"
"""Never part of an overlay: torch is gigabytes large, and other libraries are compiled against the installed one."""
MEASURED = ("accelerate", "bitsandbytes", "datasets", "peft", "transformers")
"""Libraries that a case imports; they are resolved together with each side, so that they fit each other."""

_MANIFEST = "peft-gauge.json"
_RETRIES = "2"  # pip's default of 5 makes a machine without a network wait for half a minute


class NoEnvironment(GaugeError):
    """The environment of a side is unavailable: no such release, failed installation, or conflicting requirements."""


@dataclass(frozen=True)
class Package:
    """One distribution of an overlay; ``source`` is pip's argument to install it: ``name==version``, or a URL."""

    name: str
    version: str
    source: str


@dataclass(frozen=True)
class Environment:
    """The libraries of a side. ``folder``: the overlay, ``None`` if the installed packages meet the requirements.

    ``packages``: the overlay's distributions, name -> version.
    """

    side: Side
    folder: Path | None
    packages: Mapping[str, str]

    def path(self) -> str:
        """The child's PYTHONPATH: the overlay, this package, then the user's entries.

        If this package is installed it is not listed: its folder holds all other libraries, which must come last.
        """
        ours = Path(__file__).resolve().parents[2]
        package = None if ours.name in ("site-packages", "dist-packages") else str(ours)
        overlay = None if self.folder is None else str(self.folder)
        return os.pathsep.join(filter(None, (overlay, package, os.environ.get("PYTHONPATH"))))


def overlays() -> Path:
    """The folder of overlays in the user's cache; removing it only means rebuilding them."""
    return paths.cache() / "environments"


def installed() -> dict[str, str]:
    """This interpreter's distributions, canonical name -> version; of duplicates, the first."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name is not None:
            found.setdefault(canonicalize_name(name), distribution.version)
    found.pop("peft-gauge", None)
    return found


def prepare(side: Side, *, say: Callable[[str], object] = lambda text: None) -> Environment:
    """The environment of ``side``, built or reused; ``say`` receives progress messages.

    Raises `GaugeError` for a torch other than the installed one, and `NoEnvironment` with pip's reason if pip fails.
    """
    base = installed()
    _check_torch(side, base)
    if _fits(side, base):
        return Environment(side, None, {})
    folder = overlays() / _key(side, base)
    known = _manifest(folder)
    if known is not None and side.is_pinned:
        return Environment(side, folder, known)
    say(f"resolving {side.name}")
    packages = _resolve(side, base)
    wanted = {each.name: each.version for each in packages}
    # A range or a branch may resolve to other releases later; then the folder is rebuilt.
    if known is None or known != wanted or any("://" in each.source for each in packages):
        say(f"installing {', '.join(f'{each.name} {each.version}' for each in packages)}")
        _install(packages, folder)
    return Environment(side, folder, wanted)


def _check_torch(side: Side, base: Mapping[str, str]) -> None:
    for requirement in side.parsed:
        if canonicalize_name(requirement.name) == FIXED and not _satisfies(requirement, base.get(FIXED)):
            raise GaugeError(
                f"{requirement} differs from the installed torch {base.get(FIXED)}, which both sides share; "
                "make a separate environment for it (as nox does) and compare two saved runs with peft-gauge compare"
            )


def _fits(side: Side, base: Mapping[str, str]) -> bool:
    return all(_satisfies(each, base.get(canonicalize_name(each.name))) for each in side.parsed)


def _satisfies(requirement: Any, version: str | None) -> bool:
    return version is not None and requirement.url is None and requirement.specifier.contains(version, prereleases=True)


def _key(side: Side, base: Mapping[str, str]) -> str:
    """A folder name, unique to the requirements, the Python and the installed packages."""
    text = json.dumps([side.requirements, sys.version, sys.prefix, sorted(base.items())])
    words = re.sub(r"[^A-Za-z0-9.]+", "-", side.name).strip("-")[:60]
    return f"{words}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _manifest(folder: Path) -> dict[str, str] | None:
    """The packages of a finished overlay; ``None`` if there is none."""
    try:
        packages = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent or invalid: it is rebuilt
        return None
    return packages if isinstance(packages, dict) else None


# pip -----------------------------------------------------------------------------------------------------------------


def _resolve(side: Side, base: Mapping[str, str]) -> list[Package]:
    """The packages to install over ``base`` so that ``side`` and all imports of a case fit together."""
    asked = {canonicalize_name(each.name) for each in side.parsed}
    kept = [name for name in MEASURED if name in base and name not in asked]
    with tempfile.TemporaryDirectory(prefix="peft-gauge-") as name:
        report, constraint = Path(name) / "report.json", Path(name) / "constraint.txt"
        constraint.write_text(f"{FIXED}=={base[FIXED]}\n" if FIXED in base else "")
        done = _pip("install", "--dry-run", "--report", str(report), "-c", str(constraint), *side.requirements, *kept)
        if done.returncode != 0:
            raise _refusal(f"{side.name} cannot be resolved", done.stderr)
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    packages = [_package(each) for each in found]
    if any(each.name == FIXED for each in packages):  # the constraint forbids it
        raise NoEnvironment(f"{side.name} would change {FIXED}, which both sides share")
    return packages


def _package(entry: Mapping[str, Any]) -> Package:
    """An entry of pip's installation report (pypa specification "pip installation report", version 1)."""
    name, version = canonicalize_name(entry["metadata"]["name"]), str(entry["metadata"]["version"])
    if not entry["is_direct"]:
        return Package(name, version, f"{entry['metadata']['name']}=={version}")
    download = entry["download_info"]
    if "vcs_info" not in download:
        return Package(name, version, f"{name} @ {download['url']}")
    vcs = download["vcs_info"]
    return Package(name, version, f"{name} @ {vcs['vcs']}+{download['url']}@{vcs['commit_id']}")


def _install(packages: list[Package], folder: Path) -> None:
    """Fill ``folder``; it ends up complete or absent."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
    try:
        sources = [each.source for each in packages]
        done = _pip("install", "--no-deps", "--target", str(part), *sources)
        if done.returncode != 0:
            raise _refusal(f"{' '.join(sources)} does not install", done.stderr)
        (part / _MANIFEST).write_text(json.dumps({each.name: each.version for each in packages}), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
    except OSError as error:
        raise GaugeError(f"cannot build an environment in {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def releases(library: str) -> list[Version]:
    """The releases of ``library`` for this Python, oldest first, without pre-releases and yanked ones.

    Raises `NoEnvironment` if pip lists none.
    """
    done = _pip("index", "versions", library)
    if done.returncode != 0 or from_pip.no_answer(done.stderr):  # pip goes on with another index's releases
        raise _refusal(f"the releases of {library} cannot be listed", done.stderr)
    listed = re.search(r"^Available versions: (.+)$", done.stdout, re.MULTILINE)
    if listed is None:
        raise NoEnvironment(f"the releases of {library} cannot be listed: pip printed none")
    return sorted(Version(text.strip()) for text in listed[1].split(","))


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "--retries", _RETRIES]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, errors="replace", check=False)


def _refusal(what: str, complaint: str) -> GaugeError:
    """The error for a failed pip call, with pip's last error; `NoEnvironment` if the requirements are the cause."""
    if from_pip.is_missing(complaint):
        return GaugeError(f"{what}: this Python has no pip; run: python -m ensurepip")
    said = one_line(from_pip.last_error(complaint), 250)
    if from_pip.no_answer(complaint):
        return GaugeError(f"{what}: the package index does not respond; check the network ({said})")
    return NoEnvironment(f"{what}: {said}")
