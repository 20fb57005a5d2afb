"""The project's own files, as an archive: what git tracks, as it is on the disk."""

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
    """A checkout at ``root``; ``commit`` is as pytest-benchmark saves it with a run, ``files`` are relative paths."""

    root: Path
    commit: dict[str, Any]
    files: tuple[str, ...]

    def archive(self, target: Path) -> None:
        """Write the files to ``target``, a .tar.gz, with the commit in a file of its own: the node has no git history.

        Changes that are not committed are in it, files that git does not track are not. Nobody's name or number is.
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
    """The checkout at ``root``; raises `GaugeError` where git does not know it as one."""
    top = _git(root, "rev-parse", "--show-toplevel").strip()
    if Path(top).resolve() != root.resolve():
        raise GaugeError(f"{root} is not a checkout of its own but a part of {top}; {INSTEAD}")
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
        raise GaugeError(f"git, which lists the project's files, cannot be run: {error.strerror}; {INSTEAD}") from error
    if done.returncode != 0:
        raise GaugeError(f"{root} is not a git checkout ({one_line(done.stderr, 160)}); {INSTEAD}")
    return done.stdout
