"""The project's own files as an archive: the files that git tracks, as they are on disk."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_gauge import paths
from peft_gauge.errors import GaugeError, one_line

INSTEAD = "run this from a clone of the project, or use --no-checkout and a checkout on the node"


@dataclass(frozen=True)
class Checkout:
    """A checkout at ``root``; ``commit`` has pytest-benchmark's format, ``files`` are relative paths."""

    root: Path
    commit: dict[str, Any]
    files: tuple[str, ...]

    def archive(self, target: Path) -> None:
        """Write the files to ``target``, a .tar.gz, with the commit in a separate file: the node has no git history.

        Uncommitted changes are included, untracked files are not. Owner names and ids are removed.
        """
        with tarfile.open(target, "w:gz") as archive:
            for file in self.files:
                archive.add(self.root / file, file, recursive=False, filter=_anonymous)
            text = json.dumps(self.commit, indent=2).encode()
            member = tarfile.TarInfo(paths.COMMIT.name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def find_checkout(root: Path = paths.PROJECT) -> Checkout:
    """The checkout at ``root``; raises `GaugeError` unless ``root`` is the top folder of a git checkout."""
    top = _git(root, "rev-parse", "--show-toplevel").strip()
    if Path(top).resolve() != root.resolve():
        raise GaugeError(f"{root} is a part of the checkout {top}, not a checkout of its own; {INSTEAD}")
    tracked = [name for name in _git(root, "ls-files", "-z").split("\0") if name]
    files = tuple(sorted(name for name in tracked if (root / name).is_symlink() or (root / name).is_file()))
    branch = _git(root, "rev-parse", "--abbrev-ref", "HEAD").strip()
    commit = {
        "id": _git(root, "rev-parse", "HEAD").strip(),
        "time": _git(root, "show", "-s", "--format=%cI").strip(),
        "author_time": _git(root, "show", "-s", "--format=%aI").strip(),
        "dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no").strip()),
        "project": "peft-gauge",
        "branch": "(detached head)" if branch == "HEAD" else branch,
    }
    return Checkout(root, commit, files)


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", "core.quotePath=off", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", check=False)
    except OSError as error:
        raise GaugeError(f"cannot run git to list the project's files: {error.strerror}; {INSTEAD}") from error
    if done.returncode != 0:
        raise GaugeError(f"{root} is not a git checkout ({one_line(done.stderr, 160)}); {INSTEAD}")
    return done.stdout
