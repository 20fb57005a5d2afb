"""Finished parts of a long command, saved in the user's cache so that running the command again resumes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from peft_gauge import paths
from peft_gauge.errors import GaugeError
from peft_gauge.files import write_whole

FORMAT = 3
"""Format of a file: ``{"format": 3, "parts": {name: part}}``. Format 2 had other names of verdicts and metrics;
format 1 was the bare parts, and all its pairs of processes had A first. Neither can be used."""

Part = TypeVar("Part")


class Kept:
    """A file of finished parts by name; `put` returns after the part is on disk.

    ``work``: everything that determines the parts, as JSON; other work has another file. A file of another `FORMAT` is
    ignored and reported by `unused`.
    """

    def __init__(self, kind: str, work: Any) -> None:
        text = json.dumps(work, sort_keys=True)
        self.path: Path = paths.cache() / kind / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        self._parts: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            content = _content(self.path)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise GaugeError(f"cannot read {self.path}; remove it to start over") from error
        if not isinstance(content, dict):
            raise self._no_work()
        if content.get("format") != FORMAT:
            return {}
        if not isinstance(content.get("parts"), dict):
            raise self._no_work()
        parts: dict[str, Any] = content["parts"]
        return parts

    def _no_work(self) -> GaugeError:
        return GaugeError(f"{self.path} contains no finished work; remove it to start over")

    def unused(self) -> str | None:
        """One line on files of this kind that another version of the project saved, or ``None``.

        All files count: the file name depends on the work's description, which can change between versions.
        """
        found = [path for path in sorted(self.path.parent.glob("*.json")) if _is_of_another_format(path)]
        if not found:
            return None
        what = f"{found[0]} was" if len(found) == 1 else f"{len(found)} files in {self.path.parent} were"
        return f"{what} saved by another version of peft-gauge and cannot be used; remove {_them(len(found))}"

    def __len__(self) -> int:
        return len(self._parts)

    def get(self, name: str, read: Callable[[Any], Part] = lambda value: value) -> Part | None:
        """The part called ``name``, converted by ``read``, or ``None``; `GaugeError` if ``read`` raises `KeyError`,
        `TypeError` or `ValueError`."""
        if name not in self._parts:
            return None
        try:
            return read(self._parts[name])
        except (KeyError, TypeError, ValueError) as error:
            raise self._no_work() from error

    def put(self, name: str, value: Any) -> None:
        self._parts[name] = value
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps({"format": FORMAT, "parts": self._parts}, allow_nan=False))
        except OSError as error:
            raise GaugeError(f"cannot save finished work to {self.path}: {error.strerror or error}") from error

    def forget(self) -> None:
        """Remove the file after the work is done."""
        self._parts = {}
        self.path.unlink(missing_ok=True)


def _content(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _is_of_another_format(path: Path) -> bool:
    try:
        content = _content(path)
    except (OSError, ValueError):  # unreadable: reported where the file is used
        return False
    return isinstance(content, dict) and content.get("format") != FORMAT


def _them(number: int) -> str:
    return "it" if number == 1 else "them"
