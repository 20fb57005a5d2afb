"""Files: names for them, and writing them whole or not at all."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path


def write_whole(target: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write ``content`` (a text as UTF-8) to ``target``, so that no reader ever sees a part of it.

    It is written under another name in the same folder, flushed to the disk and renamed; a file that was there stays
    whole until then. ``durable=False`` leaves out the flush, for a file that need not outlive a crash of the machine.
    Raises `OSError` where it cannot be written; nothing is left behind then.
    """
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp makes it private; a result is to be read by others
        Path(temporary).replace(target)
    except BaseException:  # also Ctrl-C: no broken file stays
        Path(temporary).unlink(missing_ok=True)
        raise


def slug(text: str) -> str:
    """``text`` as a file's name on any system: its ASCII letters in lower case and digits, hyphens between words."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
