"""What is finished of a long piece of work, kept in the user's cache so that the same command goes on from there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from peft_gauge import paths
from peft_gauge.errors import GaugeError
from peft_gauge.history.writing import write_whole


class Kept:
    """A file of finished parts by name; what is put is on the disk before `put` returns.

    ``work``: all that changes what the parts would be, as JSON; other work has another file.
    """

    def __init__(self, kind: str, work: Any) -> None:
        text = json.dumps(work, sort_keys=True)
        self.path: Path = paths.cache() / kind / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        self._parts: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            parts = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise GaugeError(f"{self.path} cannot be read; remove it to begin anew") from error
        if not isinstance(parts, dict):
            raise GaugeError(f"{self.path} holds no finished work; remove it to begin anew")
        return parts

    def __len__(self) -> int:
        return len(self._parts)

    def get(self, name: str) -> Any:
        """The part called ``name``, or ``None``."""
        return self._parts.get(name)

    def put(self, name: str, value: Any) -> None:
        self._parts[name] = value
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps(self._parts, allow_nan=False))
        except OSError as error:
            raise GaugeError(f"cannot keep what is finished in {self.path}: {error.strerror or error}") from error

    def forget(self) -> None:
        """Remove the file: the work is done."""
        self._parts = {}
        self.path.unlink(missing_ok=True)
