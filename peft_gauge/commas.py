"""Lists separated by commas in options, which can also be repeated."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def listed(values: Iterable[str] | None) -> list[str]:
    """The names in ``values``; each value may hold several."""
    return [name.strip() for value in values or () for name in value.split(",") if name.strip()]


def listed_paths(values: Iterable[str | Path] | None) -> list[Path]:
    """The paths in ``values``; each value may hold several. A path that exists is one, also with a comma."""
    found: list[Path] = []
    for value in map(Path, values or ()):
        found += [value] if value.exists() else map(Path, listed([str(value)]))
    return found
