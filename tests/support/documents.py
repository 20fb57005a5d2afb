"""The commands that README, CONTRIBUTING.md and docs show."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])


def blocks(page: Path) -> Iterator[str]:
    """The code blocks of a page."""
    yield from re.findall(r"^```[a-z]*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(program: str) -> Iterator[tuple[str, list[str]]]:
    """Every command of ``program`` in a code block: its page, and its words."""
    for page in PAGES:
        for line in (line for block in blocks(page) for line in block.splitlines()):
            for part in re.split(r"\s&&\s|\s\|\s|;\s", line.partition("  #")[0].replace("- run: ", "")):
                words = _words(part.partition(" >> ")[0])
                if words and words[0] == program and len(words) > 1:
                    yield page.relative_to(ROOT).as_posix(), words[1:]


def commands_in_text(program: str) -> Iterator[tuple[str, list[str]]]:
    """Every command of ``program`` in running text that has more than a verb: its page, and its words."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for code in re.findall(rf"`({program} [^`]+)`", text):
            words = _words(code)
            if len(words) > 2:
                yield page.relative_to(ROOT).as_posix(), words[1:]


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command, comments=True)
    except ValueError:  # not a command: a table, or a message
        return []
