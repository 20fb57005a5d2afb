"""User-facing errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class GaugeError(Exception):
    """Bad input or a missing capability; the message is one line: what is wrong and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: object, limit: int = 400) -> str:
    """``text`` folded to a single line of at most ``limit`` characters (library errors can be pages long)."""
    folded = " ".join(str(text).split())
    return folded if len(folded) <= limit else folded[: limit - 1] + "…"


@contextmanager
def file_errors() -> Iterator[None]:
    """Raises `GaugeError` for an error of the operating system with a file that no code has handled: a name too long
    for any file, a folder without permission, a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise GaugeError(f"{one_line(error.filename, 120)}: {error.strerror}") from error


def unknown(kind: str, name: str, known: Iterable[str]) -> GaugeError:
    """The error for a ``name`` that is not ``known``, with the nearest names (or all of a short list)."""
    choices = sorted(known)
    nearest = _nearest(name, choices, most=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"known: {', '.join(choices)}"
    return GaugeError(f"unknown {kind} {name!r}; {hint}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean …?)`` with the nearest of ``known``; empty if none is near."""
    nearest = _nearest(name, sorted(known), most=1, cutoff=0.7)
    return f" (did you mean {nearest[0]}?)" if nearest else ""


def _nearest(name: str, choices: Iterable[str], *, most: int, cutoff: float) -> list[str]:
    by_lower = {choice.lower(): choice for choice in choices}
    return [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=most, cutoff=cutoff)]
