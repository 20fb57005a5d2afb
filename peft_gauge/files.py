"""Writing files whole or not at all, and file names."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_whole(target: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write ``content`` (strings as UTF-8) to ``target`` atomically: readers never see a part of it.

    The content is written to a temporary file in the same folder, flushed to disk and renamed; an existing file stays
    whole until then. ``durable=False`` skips the flush, for a file that need not survive a crash of the machine. Raises
    `OSError` if the file cannot be written, and then leaves nothing behind.
    """
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp makes it private, but others need to read results
        Path(temporary).replace(target)
    except BaseException:  # Ctrl-C too must leave no partial file
        Path(temporary).unlink(missing_ok=True)
        raise


def make_once(folder: Path, fill: Callable[[Path], object]) -> None:
    """Make ``folder`` whole or not at all: ``fill`` gets the path of a new folder next to it, which is then renamed.

    Another process may be first; its folder stays. Raises `OSError` if it cannot be made.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as unfinished:
        copy = Path(unfinished) / "copy"
        fill(copy)
        try:
            copy.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def check_folder(folder: Path) -> Path:
    """Raise `OSError` unless a file can be written in ``folder``, which need not exist yet; creates nothing.

    Returns the nearest folder that exists.
    """
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    with tempfile.TemporaryFile(dir=there):
        return there


def slug(text: str) -> str:
    """``text`` as a file name for any system: lower-case ASCII letters and digits, with hyphens between words."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
