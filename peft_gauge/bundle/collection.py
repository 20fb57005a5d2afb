"""A bundle: a folder with wheels, the checkout, a manifest with their checksums, and the script that installs them."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from peft_gauge.bundle import selection
from peft_gauge.bundle.checkout import Checkout, find_checkout
from peft_gauge.bundle.installed import TORCH, Having, parse_having
from peft_gauge.bundle.requirements import OPTIONAL, Project, read_project
from peft_gauge.bundle.resolution import Pip, Release
from peft_gauge.bundle.target import Target, parse_target
from peft_gauge.errors import GaugeError

KIND = "peft-gauge bundle"
VERSION = 1
MANIFEST, WHEELS, CHECKOUT = "manifest.json", "wheels", "checkout.tar.gz"
SCRIPTS = ("run.sh", "on_node.py")
MB = 1e6

Say = Callable[[str], object]


@dataclass(frozen=True)
class Wanted:
    """The options of ``peft-gauge bundle``, as given.

    ``most_megabytes``: size limit of the bundle in 10⁶ bytes; ``None`` for no limit.
    """

    python: str
    platform: str
    have: tuple[str, ...]
    out: Path
    most_megabytes: float | None = None
    checkout: bool = True
    index_options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bundle:
    """A bundle of ``size`` bytes in ``folder``; ``manifest`` is its saved manifest, ``notes`` are for its maker."""

    folder: Path
    size: int
    manifest: Mapping[str, Any]
    notes: tuple[str, ...]


def collect(wanted: Wanted, *, say: Say = lambda text: None) -> Bundle:
    """Make the bundle; ``say`` receives progress messages.

    ``wanted.out`` is either replaced by a complete bundle or left unchanged. Raises `GaugeError`, for example where
    ``wanted.out`` is neither empty nor an older bundle.
    """
    project = read_project()
    target = parse_target(wanted.python, wanted.platform, project.requires_python)
    limit = _checked_limit(wanted.most_megabytes)
    having = parse_having(wanted.have)
    selection.check(project, having, target)
    out = wanted.out.resolve()
    _check_out(out)
    checkout = find_checkout() if wanted.checkout else None
    having, notes = _with_torchs_version(having)
    with _beside(out) as part:
        pip = Pip(target, wanted.index_options)
        if having.named:
            say(f"resolving the dependencies of the {len(having.named)} named packages")
        brought = selection.brought_by(pip, having, _torch_needs())
        having = having.together_with(brought.names)
        say(f"resolving the wheels that a node with {target} lacks")
        answer = selection.ask(pip, project, having)
        names = sorted({*answer.lacking.needed}.union(*(each.needed for each in answer.optional.values())))
        say(f"fetching {len(names)} wheels")
        files = _fetch(pip, [answer.releases[name] for name in names], part)
        contents = _Contents(project, target, having, answer, files, checkout, _add_own_files(part, checkout))
        kept = contents.fitting(limit)
        size = contents.write(part, kept)
        if size > limit:
            raise _too_large(size, limit, contents.manifest(kept))
        _replace(part, out)
    never = _merged([answer.lacking.never, *(answer.optional[name].never for name in kept)])
    notes = [*notes, *brought.notes, *(_never(name, by) for name, by in never.items())]
    return Bundle(wanted.out, size, contents.manifest(kept), tuple(notes))


@dataclass(frozen=True)
class _File:
    """A file of the bundle; ``name`` is its path in the bundle. ``release`` is set for a wheel."""

    name: str
    size: int
    sha256: str
    release: Release | None = None

    @classmethod
    def of(cls, path: Path, bundle: Path, release: Release | None = None) -> _File:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(path.relative_to(bundle).as_posix(), path.stat().st_size, digest, release)

    def entry(self, **more: Any) -> dict[str, Any]:
        """The file's entry in the manifest."""
        release = {} if self.release is None else {"name": self.release.name, "version": self.release.version}
        return {"file": self.name, **release, "bytes": self.size, "sha256": self.sha256, **more}


@dataclass(frozen=True)
class _Contents:
    """All possible contents of the bundle. ``files``: wheels by canonical name; ``own``: the checkout and scripts."""

    project: Project
    target: Target
    having: Having
    answer: selection.Answer
    files: Mapping[str, _File]
    checkout: Checkout | None
    own: Mapping[str, _File]

    def fitting(self, limit: float) -> list[str]:
        """The extras that fit a bundle of at most ``limit`` bytes."""
        own = sum(file.size for file in self.own.values())
        return selection.fit(
            self.answer.lacking.needed,
            {name: each.needed for name, each in self.answer.optional.items()},
            {name: file.size for name, file in self.files.items()},
            limit,
            lambda extras: own + len(_as_text(self.manifest(extras)).encode()),
        )

    def write(self, part: Path, extras: Sequence[str]) -> int:
        """Turn ``part`` into the bundle with ``extras``; returns its size in bytes."""
        manifest = self.manifest(extras)
        stay = {wheel["file"] for wheel in manifest["wheels"]}
        for file in self.files.values():
            if file.name not in stay:
                (part / file.name).unlink()
        (part / MANIFEST).write_text(_as_text(manifest), encoding="utf-8")
        return sum(path.stat().st_size for path in part.rglob("*") if path.is_file())

    def manifest(self, extras: Sequence[str]) -> dict[str, Any]:
        """The manifest of the bundle with ``extras``."""
        answer = self.answer
        needed = _merged([answer.lacking.needed, *(answer.optional[name].needed for name in extras)])
        return {
            "kind": KIND,
            "version": VERSION,
            "project": {
                "version": self.project.version,
                "commit": None if self.checkout is None else self.checkout.commit,
            },
            "target": {"python": self.target.series, "glibc": self.target.glibc, "machine": self.target.machine},
            "requirements": self._requirements(extras),
            "have": {name: None if at is None else str(at) for name, at in sorted(self.having.versions.items())},
            "wheels": [self.files[name].entry(needed_by=sorted(needed[name])) for name in sorted(needed)],
            "checkout": self.own[CHECKOUT].entry() if CHECKOUT in self.own else None,
            "left_out": [
                *(self._left_out(name, needed) for name in answer.optional if name not in extras),
                *(_left_out(name, why, None, []) for name, why in answer.unusable.items()),
            ],
        }

    def _requirements(self, extras: Sequence[str]) -> list[tuple[str, str]]:
        """Pairs (requirement, extra that needs it); the node checks them against its own environment."""
        environment = self.target.markers()
        optional = self.project.optional(environment)
        core = [(str(each), "") for each in self.project.core(environment)]
        return [*core, *((str(each), name) for name in extras for each in optional[name])]

    def _left_out(self, extra: str, needed: Collection[str]) -> dict[str, Any]:
        files = [self.files[name] for name in self.answer.optional[extra].needed if name not in needed]
        files.sort(key=lambda file: -file.size)
        return _left_out(extra, "the limit", sum(file.size for file in files), [str(file.release) for file in files])


def _left_out(extra: str, why: str, size: int | None, wheels: list[str]) -> dict[str, Any]:
    return {"extra": extra, "why": why, "bytes": size, "wheels": wheels, "without": OPTIONAL[extra]}


def _add_own_files(part: Path, checkout: Checkout | None) -> dict[str, _File]:
    """Write the scripts and the checkout to ``part``."""
    for script in SCRIPTS:
        shutil.copyfile(Path(__file__).with_name(script), part / script)
    (part / SCRIPTS[0]).chmod(0o755)
    if checkout is not None:
        checkout.archive(part / CHECKOUT)
    return {path.name: _File.of(path, part) for path in part.iterdir() if path.is_file()}


def _fetch(pip: Pip, releases: Sequence[Release], part: Path) -> dict[str, _File]:
    """Download the wheels of ``releases`` to ``part``; returns them by canonical name."""
    folder = part / WHEELS
    folder.mkdir()
    paths = pip.download(releases, folder)
    files = {each.name: _File.of(paths[each.name], part, each) for each in releases}
    for each in releases:
        if each.sha256 not in (None, files[each.name].sha256):
            raise GaugeError(f"the wheel of {each} is corrupt (its sha256 differs from the index's); bundle again")
    return files


def _too_large(size: int, limit: float, manifest: Mapping[str, Any]) -> GaugeError:
    largest = sorted(manifest["wheels"], key=lambda each: -each["bytes"])[:3]
    told = ", ".join(f"{each['name']} {each['bytes'] / MB:.1f} MB" for each in largest)
    what = "the required wheels" + ("" if manifest["checkout"] is None else " and the checkout")
    return GaugeError(
        f"{what} do not fit into {limit / MB:g} MB; raise the limit to at least --most-megabytes "
        f"{math.ceil(size / MB * 10) / 10:g}" + (f" (largest: {told})" if told else "")
    )


def _checked_limit(most_megabytes: float | None) -> float:
    """The limit in bytes."""
    if most_megabytes is None:
        return math.inf
    if not most_megabytes > 0:
        raise GaugeError(f"--most-megabytes must be positive, got {most_megabytes:g}")
    return most_megabytes * MB


def _with_torchs_version(having: Having) -> tuple[Having, list[str]]:
    """``having`` with a version of torch, which other packages have to fit; by default the one installed here."""
    if having.versions[TORCH] is not None:
        return having, []
    try:
        version = Version(Version(metadata.version(TORCH)).public)
    except metadata.PackageNotFoundError as error:
        raise GaugeError("the node's version of torch is unknown; give it, as in --have torch==2.11.0") from error
    note = f"assuming the node's torch is {version}, as here; otherwise give --have torch==VERSION"
    return Having({**having.versions, TORCH: version}, having.named), [note]


def _torch_needs() -> list[Requirement]:
    """The requirements of the installed torch, as an estimate of the packages that came to the node with its torch."""
    try:
        return list(map(Requirement, metadata.requires(TORCH) or ()))
    except metadata.PackageNotFoundError:
        return []


def _never(name: str, by: Iterable[str]) -> str:
    return f"{', '.join(sorted(by))} needs {name}, which is never downloaded; install it on the node"


def _merged(parts: Iterable[Mapping[str, set[str]]]) -> dict[str, set[str]]:
    merged: dict[str, set[str]] = {}
    for part in parts:
        for name, by in part.items():
            merged.setdefault(name, set()).update(by)
    return merged


# Files ---------------------------------------------------------------------------------------------------------------


def _as_text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1) + "\n"


def _check_out(out: Path) -> None:
    """Raise `GaugeError` unless ``out`` is absent, an empty folder, or a bundle without foreign files."""
    if not out.exists():
        return
    if not out.is_dir():
        raise GaugeError(f"{out} is a file; give a folder with --out")
    try:
        foreign = sorted(_foreign(out))
    except OSError as error:
        raise GaugeError(f"{out} cannot be read: {error.strerror or error}") from error
    if foreign:
        raise GaugeError(f"{out} contains {foreign[0]}, not part of a bundle; give an empty or new folder with --out")


def _foreign(out: Path) -> Iterator[str]:
    names = {path.name for path in out.iterdir()}
    if names and not _is_manifest(out / MANIFEST):
        yield from names
        return
    yield from names - {MANIFEST, WHEELS, CHECKOUT, *SCRIPTS}
    if WHEELS in names:
        yield from (f"{WHEELS}/{path.name}" for path in (out / WHEELS).iterdir() if path.suffix != ".whl")


def _is_manifest(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["kind"] == KIND)
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A temporary folder next to ``out``; an operating system error becomes a `GaugeError`."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            tempfile.TemporaryFile(dir=out).close()  # fail early, before minutes of downloads
        part = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    except OSError as error:
        raise GaugeError(f"cannot write {out}: {error.strerror or error}; give another folder with --out") from error
    try:
        part.chmod(0o755)
        yield part
    except OSError as error:
        raise GaugeError(f"cannot write {out}: {error.strerror or error}; give another folder with --out") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _replace(part: Path, out: Path) -> None:
    """Move ``part`` to ``out``; if that fails, restore the old ``out``."""
    if not out.exists():
        part.rename(out)
        return
    _check_out(out)  # again: minutes have passed since the first check
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-")) / "old"
    try:
        out.rename(old)
        try:
            part.rename(out)
        except BaseException:
            old.rename(out)
            raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)
