"""An environment for one side: the installed one, with a folder before it that holds what differs.

The folder is an overlay, filled by ``pip install --target`` and put first on a child's path. So everything that does
not differ is shared, torch above all, which is never changed. pip's own resolver says what has to differ: it is given
the side's requirements beside the libraries that are installed, and keeps those wherever they still fit.
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
"""The library that an overlay never changes: gigabytes, and its compiled parts are what all others were built for."""
MEASURED = ("accelerate", "bitsandbytes", "datasets", "peft", "transformers")
"""What a case imports: resolved together with every side, so that all of it fits together."""

_MANIFEST = "peft-gauge.json"
_RETRIES = "2"  # pip's default of 5 makes a machine without a network wait for half a minute


class NoEnvironment(GaugeError):
    """A side that cannot be had: no such release, one that does not install, one that contradicts the rest."""


@dataclass(frozen=True)
class Package:
    """One distribution of an overlay; ``source`` is what pip is to install it from: ``name==version``, or a URL."""

    name: str
    version: str
    source: str


@dataclass(frozen=True)
class Environment:
    """Where a side's libraries are. ``folder``: the overlay, ``None`` where what is installed will do.

    ``packages``: the distributions in the overlay by name, with their versions.
    """

    side: Side
    folder: Path | None
    packages: Mapping[str, str]

    def path(self) -> str:
        """The child's PYTHONPATH: the overlay, then this package, then what the user has there.

        An installed package stays off, since its folder holds all other libraries; it is found there last, as ever.
        """
        ours = Path(__file__).resolve().parents[2]
        package = None if ours.name in ("site-packages", "dist-packages") else str(ours)
        overlay = None if self.folder is None else str(self.folder)
        return os.pathsep.join(filter(None, (overlay, package, os.environ.get("PYTHONPATH"))))


def overlays() -> Path:
    """The folder in the user's cache that holds the overlays; removing it costs no more than building them again."""
    return paths.cache() / "environments"


def installed() -> dict[str, str]:
    """The distributions of this interpreter by canonical name, with their versions, of two of a name the first."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name is not None:
            found.setdefault(canonicalize_name(name), distribution.version)
    found.pop("peft-gauge", None)
    return found


def prepare(side: Side, *, say: Callable[[str], object] = lambda text: None) -> Environment:
    """The environment of ``side``, built or, where it was built before, found; ``say`` is told what takes time.

    Raises `GaugeError` for another torch than the installed one, and `NoEnvironment` with pip's reason where pip
    cannot do it.
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
    # A range, or a branch, means other releases one day: then the folder is filled anew.
    if known is None or known != wanted or any("://" in each.source for each in packages):
        say(f"installing {', '.join(f'{each.name} {each.version}' for each in packages)}")
        _install(packages, folder)
    return Environment(side, folder, wanted)


def _check_torch(side: Side, base: Mapping[str, str]) -> None:
    for requirement in side.parsed:
        if canonicalize_name(requirement.name) == FIXED and not _satisfies(requirement, base.get(FIXED)):
            raise GaugeError(
                f"{requirement} is another torch than the installed {base.get(FIXED)}, which both sides share here; "
                "make an environment of its own for it (nox does) and compare two saved runs with peft-gauge compare"
            )


def _fits(side: Side, base: Mapping[str, str]) -> bool:
    return all(_satisfies(each, base.get(canonicalize_name(each.name))) for each in side.parsed)


def _satisfies(requirement: Any, version: str | None) -> bool:
    return version is not None and requirement.url is None and requirement.specifier.contains(version, prereleases=True)


def _key(side: Side, base: Mapping[str, str]) -> str:
    """A folder's name: for other requirements, another Python or another base, another one."""
    text = json.dumps([side.requirements, sys.version, sys.prefix, sorted(base.items())])
    words = re.sub(r"[^A-Za-z0-9.]+", "-", side.name).strip("-")[:60]
    return f"{words}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _manifest(folder: Path) -> dict[str, str] | None:
    """What a finished overlay holds; ``None`` where there is none."""
    try:
        packages = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent, or not ours: it is built anew
        return None
    return packages if isinstance(packages, dict) else None


# pip -----------------------------------------------------------------------------------------------------------------


def _resolve(side: Side, base: Mapping[str, str]) -> list[Package]:
    """What has to be installed beside ``base``, so that ``side`` and all that a case imports fit together."""
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
        raise NoEnvironment(f"{side.name} would change {FIXED}, which both sides share here")
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
    """Fill ``folder``: it is there whole or not at all."""
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
    """The releases of ``library`` for this Python, the oldest first; pip leaves out pre-releases and yanked ones.

    Raises `NoEnvironment` where pip knows none.
    """
    done = _pip("index", "versions", library)
    if done.returncode != 0 or from_pip.no_answer(done.stderr):  # pip carries on with what another index has
        raise _refusal(f"the releases of {library} cannot be listed", done.stderr)
    listed = re.search(r"^Available versions: (.+)$", done.stdout, re.MULTILINE)
    if listed is None:
        raise NoEnvironment(f"the releases of {library} cannot be listed: pip printed none")
    return sorted(Version(text.strip()) for text in listed[1].split(","))


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "--retries", _RETRIES]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, errors="replace", check=False)


def _refusal(what: str, complaint: str) -> GaugeError:
    """The error for ``what`` pip could not do, with its last error; `NoEnvironment` where the side is to blame."""
    if from_pip.is_missing(complaint):
        return GaugeError(f"{what}: this Python has no pip; run: python -m ensurepip")
    said = one_line(from_pip.last_error(complaint), 250)
    if from_pip.no_answer(complaint):
        return GaugeError(f"{what}: no answer from the package index; is there a network? ({said})")
    return NoEnvironment(f"{what}: {said}")
