"""Packages on the node: names with or without versions, or the node's output of ``pip freeze`` or ``pip list``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from peft_gauge.errors import GaugeError

TORCH = "torch"
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")  # PEP 508
_GPU_BUILDS = re.compile(r"torch|torchvision|torchaudio|pytorch-triton|triton|(nvidia|cuda|cupy)-.+")
_HOW = "python -m pip list --format=freeze"


def comes_with_torch(name: str) -> bool:
    """Whether ``name`` (canonical) is torch or part of CUDA: gigabytes that have to match the node's driver."""
    return name != "nvidia-ml-py" and _GPU_BUILDS.fullmatch(name) is not None  # nvidia-ml-py: NVML's bindings, 50 kB


@dataclass(frozen=True)
class Having:
    """``versions``: canonical name -> version, ``None`` if unknown.

    ``named``: packages named individually; their dependencies are on the node too. A file lists all packages.
    """

    versions: Mapping[str, Version | None]
    named: frozenset[str] = frozenset()

    def __contains__(self, name: str) -> bool:
        return name in self.versions

    def known(self) -> dict[str, Version]:
        """The packages with a known version."""
        return {name: version for name, version in self.versions.items() if version is not None}

    def together_with(self, names: Iterable[str]) -> Having:
        """This and ``names``, in unknown versions."""
        return Having({**dict.fromkeys(names), **self.versions}, self.named)


def parse_having(entries: Sequence[str]) -> Having:
    """The packages in the values of ``--have``: ``NAME[==VERSION],…``, ``@FILE``, or a file's path.

    Raises `GaugeError` for an invalid value, an unreadable file, and two versions of one package.
    """
    versions: dict[str, Version | None] = {}
    named: set[str] = set()
    for entry in entries:
        path = _file(entry)
        for name, version in _named(entry) if path is None else _listed(path):
            if versions.get(name) not in (None, version) and version is not None:
                raise GaugeError(f"--have gives {name} two versions, {versions[name]} and {version}")
            versions[name] = version or versions.get(name)
            if path is None:
                named.add(name)
    versions.pop("peft-gauge", None)  # the bundle has its own
    return Having(versions, frozenset(named & versions.keys()))


def _file(entry: str) -> Path | None:
    if entry.startswith("@"):
        return Path(entry[1:])
    try:
        is_file = re.search(r"[./]", entry) is not None and Path(entry).is_file()
    except OSError:  # a list longer than any file name
        is_file = False
    return Path(entry) if is_file else None  # a file called like a package is ignored


def _named(entry: str) -> Iterator[tuple[str, Version | None]]:
    tokens = [token.strip() for token in entry.split(",")]
    if not any(tokens):
        raise GaugeError(f"--have {entry!r} names no package; write NAME or NAME==VERSION, separated by commas")
    for token in filter(None, tokens):
        name, equals, text = token.partition("==")
        if _NAME.fullmatch(name.strip()) is None or (equals and not text.strip()):
            raise GaugeError(
                f"--have {token!r} is neither NAME nor NAME==VERSION; for a file with the node's packages write @FILE"
            )
        try:
            yield canonicalize_name(name.strip()), Version(text) if equals else None
        except InvalidVersion as error:
            raise GaugeError(f"--have {token!r}: {text!r} is not a valid version") from error


def _listed(path: Path) -> Iterator[tuple[str, Version | None]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise GaugeError(f"--have {path} is not valid UTF-8; write it with: {_HOW} > FILE") from error
    except OSError as error:
        raise GaugeError(f"--have {path} cannot be read: {error.strerror or error}") from error
    found = 0
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#") or (line.startswith("-") and "#egg=" not in line):
            continue
        try:
            yield _frozen(line)
        except ValueError as error:
            raise GaugeError(f"--have {path}, line {number}: {line[:80]!r} is not a line of {_HOW}") from error
        found += 1
    if not found:
        raise GaugeError(f"--have {path} names no package; write it with: {_HOW} > FILE")


def _frozen(line: str) -> tuple[str, Version | None]:
    """A line of ``pip freeze``: ``NAME==VERSION``, ``NAME @ URL`` (from conda, in containers), ``-e URL#egg=NAME``,
    or a ``NAME`` alone.

    Raises `ValueError` for any other line. A version that is invalid under PEP 440 counts as unknown.
    """
    if line.startswith("-"):
        name, text = line.partition("#egg=")[2].partition("&")[0], ""
    elif " @ " in line:
        name, _, url = line.partition(" @ ")
        text = _wheel_version(url)
    else:
        name, _, text = line.partition("==")
    if _NAME.fullmatch(name.strip()) is None:
        raise ValueError(line)
    try:
        return canonicalize_name(name.strip()), Version(text.lstrip("="))
    except InvalidVersion:
        return canonicalize_name(name.strip()), None


def _wheel_version(url: str) -> str:
    try:
        return str(parse_wheel_filename(url.partition("#")[0].rsplit("/", 1)[-1].replace("%2B", "+"))[1])
    except InvalidWheelFilename:
        return ""
