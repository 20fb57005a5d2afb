"""pip's resolver, run for the node's Python and platform, taking the node's packages into account.

pip receives each package that the node has in a known version as an empty wheel with its name and version. pip then
chooses versions that fit it, and neither downloads it nor its dependencies.
"""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from peft_gauge._internals import pip as from_pip
from peft_gauge.errors import GaugeError, one_line

if TYPE_CHECKING:
    from packaging.version import Version

    from peft_gauge.bundle.target import Target


class Unresolvable(GaugeError):
    """No set of wheels meets the request: no release for the node, or conflicting requirements."""


@dataclass(frozen=True)
class Release:
    """One distribution chosen by pip: canonical name, version, requirements with their markers.

    ``sha256`` is the index's, ``None`` if it gives none.
    """

    name: str
    version: str
    requires: tuple[Requirement, ...] = ()
    sha256: str | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Pip:
    """pip for ``target``; ``index_options`` select the index (default: pip's configuration)."""

    target: Target
    index_options: tuple[str, ...] = ()
    _known: dict[str, tuple[Requirement, ...]] = field(default_factory=dict)

    def resolve(self, requirements: Sequence[Requirement], known: Mapping[str, Version]) -> dict[str, Release]:
        """The releases that ``requirements`` need in addition to the ``known`` packages, which are not returned.

        Markers of ``requirements`` are ignored. Raises `Unresolvable`, and `GaugeError` where an index does not
        respond or this pip cannot do it.
        """
        with _stand_ins(known) as wheels:
            return self._resolve([*wheels, *map(_without_marker, requirements)])

    def requires(self, name: str, version: Version | None) -> tuple[Requirement, ...]:
        """The requirements of a release of ``name``: of this version if an index has it, otherwise of the newest."""
        wanted = name if version is None else f"{name}=={version.public}"
        if wanted not in self._known:
            try:
                self._known[wanted] = self._resolve(["--no-deps", wanted])[name].requires
            except Unresolvable:
                self._known[wanted] = () if version is None else self.requires(name, None)
        return self._known[wanted]

    def download(self, releases: Sequence[Release], folder: Path) -> dict[str, Path]:
        """Download the wheels of ``releases`` to ``folder``, by canonical name; raises as `resolve` does."""
        if not releases:
            return {}
        pinned = [f"{each.name}=={each.version}" for each in releases]
        self._run("download", "--no-deps", "--progress-bar", "off", "--dest", str(folder), *pinned)
        found = {_name_of(path): path for path in sorted(folder.glob("*.whl"))}
        lacking = [str(each) for each in releases if each.name not in found]
        if lacking:
            raise GaugeError(f"pip downloaded no wheel of {', '.join(lacking)}")
        return found

    def _resolve(self, arguments: Sequence[str]) -> dict[str, Release]:
        with tempfile.TemporaryDirectory(prefix="peft-gauge-") as name:
            report = Path(name) / "report.json"
            # A dry run installs nothing, but older releases of pip require --target for another platform.
            dry = ["--dry-run", "--ignore-installed", "--target", str(Path(name) / "nothing")]
            self._run("install", *dry, "--report", str(report), *arguments)
            found = json.loads(report.read_text(encoding="utf-8"))
        if not from_pip.was_for(self.target.markers(), found):
            raise GaugeError(
                f"pip {found.get('pip_version', '')} evaluates environment markers for this Python, not for Python "
                f"{self.target.series}; run: python -m pip install --upgrade pip"
            )
        releases = [_release(each) for each in found["install"] if not each["is_direct"]]
        return {each.name: each for each in releases}

    def _run(self, verb: str, *arguments: str) -> None:
        done = from_pip.run_for(
            self.target.markers(), verb, *self.target.pip_options(), *self.index_options, *arguments
        )
        if done.returncode == 0:
            return
        if from_pip.is_missing(done.stderr):
            raise GaugeError("this Python has no pip, which collects the wheels; run: python -m ensurepip")
        if from_pip.no_answer(done.stderr):
            raise GaugeError("the package index does not respond; bundle where there is a network, or give --index-url")
        said = one_line(_contradiction(from_pip.causes(done.stdout)) or from_pip.last_error(done.stderr), 300)
        raise Unresolvable(f"pip finds no set of wheels for {self.target}: {said}")


def _release(entry: Mapping[str, Any]) -> Release:
    """An entry of pip's installation report (pypa specification "pip installation report", version 1)."""
    described, archive = entry["metadata"], entry["download_info"].get("archive_info", {})
    return Release(
        canonicalize_name(described["name"]),
        described["version"],
        tuple(map(Requirement, described.get("requires_dist", ()))),
        archive.get("hashes", {}).get("sha256"),
    )


def _contradiction(causes: Sequence[str]) -> str:
    """pip's causes of a conflict, reworded: to pip, the node's packages are files and our requirements the user's."""
    told = [re.sub(r"^The user requested (\S+ \S+) \(from .+\)$", r"the node has \1", cause) for cause in causes]
    return "; ".join(dict.fromkeys(re.sub("^The user requested ", "peft-gauge needs ", cause) for cause in told))


def _without_marker(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}" + (f" @ {requirement.url}" if requirement.url else str(requirement.specifier))


def _name_of(wheel: Path) -> str:
    try:
        return parse_wheel_filename(wheel.name)[0]
    except InvalidWheelFilename as error:
        raise GaugeError(f"pip downloaded {wheel.name}, which is not a valid wheel name") from error


@contextmanager
def _stand_ins(known: Mapping[str, Version]) -> Iterator[list[str]]:
    """An empty wheel for each of ``known``, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="peft-gauge-") as folder:
        yield [str(_stand_in(Path(folder), name, version)) for name, version in sorted(known.items())]


def _stand_in(folder: Path, name: str, version: Version) -> Path:
    """A wheel (PyPA specification "binary distribution format") that contains only its own metadata."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: peft-gauge\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for inside, text in [*files.items(), (f"{info}/RECORD", record)]:
            wheel.writestr(inside, text)
    return path
