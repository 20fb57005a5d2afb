"""Prose uses the field's words: no docstring, comment, message or document matches a pattern of ``WORDS``.

``python tests/unit/test_words.py`` prints every match and counts them by room, the rooms in
``TO_DO`` included.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())

WORDS: tuple[tuple[str, str], ...] = (
    # Case is ignored, except for None. A space matches any white space, so that a match may cross lines.
    (r"(?<!there )(?-i:\b(?:is|are) none\b)(?! of)", "is not a valid …, or: there is no …"),
    (r"(?<!there )\bis no (?!longer\b|more\b|less\b|other\b|different\b)", "is not a (valid) …"),
    (r"\bthat there (?:is|are)\b", "name the things: 'the options', 'all releases'"),
    (r"\bof (?:which|whom)\b", "start a new sentence"),
    (r"\A\W*what (?![^.:;]*\?)", "a noun: 'the memory a step allocates'"),
    (r"\b(?:of|with|by|from|for|to|in|on|than|without|is|are) what\b", "a noun: 'the memory a step allocates'"),
    (r"\b(?:all|everything|anything|nothing) there is\b", "everything, or the name of the thing"),
    (r"(?<!cannot )\b(?:told|tells?|telling)\b", "report, show, state, distinguish"),
    (r"\b(?:said|says?|saying)\b", "state, name, print, report, show"),
    (r"\b(?:asked|asks|asking)\b", "request, specify, need"),
    (r"\bask (?:for|of|about)\b", "request, specify, need"),
    (
        r"\banswered\b|\b(?:not|to|will|can|cannot) answer\b|\banswers (?:with|for|by|to|no|nothing)\b",
        "respond, return",
    ),
    (r"\bones? that\b", "repeat the noun: 'a method that'"),
    (r"\b(?:nobody|whoever)\b", "name the actor, or use the passive: 'no caller', 'the user'"),
    (r"\bmend(?:s|ed|ing)?\b", "fix"),
    (r"\b(?:cannot|can|could|not|to) be had\b", "is unavailable, is available"),
    (r"\bmoods?\b", "drift, state, load"),
    (r"\bwithout reproach\b", "passes …"),
    (r"\b(?:has|have|had) not (?:an?|the|this|that|these|those|any)\b", "does not have"),
    (r"\bstands? (?:in(?! for\b)|beside|under|above|below|there|between|at|on|behind|before|after)\b", "is in, is at"),
    (r"\bbesides?\b", "next to, in addition to, with"),
    (r"\b(?:surely|truly)\b", "leave it out"),
    (r"\b(?:de|re)?quantis", "quantiz…"),
    (
        r"\b(?:bytes|bits|seconds|tokens|rows|parameters) an? (?:token|parameter|element|weight|value|step|file)\b",
        "per",
    ),
    (
        r"\b(?:one|object|line|list|row) an? (?:case|run|row|second|process|library|method|module|file|folder)\b",
        "one per",
    ),
    (r"\b(?:carr(?:y|ies) no|without) noise\b", "is deterministic"),
    (r"\bbirths? and deaths?\b", "allocation and release"),
)

# Words of saved records, which stay readable under the name that they were saved by.
DATA = ("saved by double quantisation",)

# Still to be rewritten; take a line out when its prose is done.
TO_DO = ()

PATTERNS = tuple((re.compile("(?i)" + pattern.replace(" ", r"\s")), better) for pattern, better in WORDS)


class Prose(NamedTuple):
    """A piece of text for people, and the line of its file on which it begins."""

    line: int
    text: str


class Match(NamedTuple):
    """Words that a pattern bans, where they are, and the better words."""

    place: str
    words: str
    better: str


def matches(prose: Prose, file: str) -> Iterator[Match]:
    """The banned words in ``prose``, without the code that it quotes."""
    text = re.sub(r"[ \t]*\n[ \t]*", "\n", prose.text)  # one white space between words, also across lines
    text = re.sub(r"(`+)[^`]+?\1", lambda code: "…" + "\n" * code[0].count("\n"), text)
    for data in DATA:
        text = text.replace(data, "…")
    for pattern, better in PATTERNS:
        for found in pattern.finditer(text):
            line = prose.line + text.count("\n", 0, found.start())
            yield Match(f"{file}:{line}", " ".join(found[0].split()), better)


def python_prose(source: str) -> Iterator[Prose]:
    """Docstrings, messages (every string of several words) and blocks of comments in ``source``."""
    yield from _strings(ast.parse(source))
    block: list[str] = []
    begin = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if block and token.start[0] != begin + len(block):
            yield Prose(begin, "\n".join(block))
            block = []
        if not block:
            begin = token.start[0]
        block.append(token.string.lstrip("#: "))
    if block:
        yield Prose(begin, "\n".join(block))


def _strings(node: ast.AST) -> Iterator[Prose]:
    if isinstance(node, ast.JoinedStr):
        # What is filled in reads as one word.
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        yield Prose(node.lineno, text)
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                yield from _strings(part.value)
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search(r"\w\W*\s\W*\w", node.value):
        yield Prose(node.lineno, node.value)
    for child in ast.iter_child_nodes(node):
        yield from _strings(child)


def markdown_prose(source: str) -> Iterator[Prose]:
    """Paragraphs, list items and table rows of ``source``; code and the table of claims are left out."""
    left_out = r"(?ms)^\s*```.*?^\s*```|^<!-- claims:.*?^<!-- end of claims -->"
    lines = re.sub(left_out, lambda found: "\n" * found[0].count("\n"), source).split("\n")
    block: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        if block and (not line.strip() or re.match(r"\s*([|#]|[-*] )", line)):
            yield Prose(number - len(block), "\n".join(block))
            block = []
        if line.strip():
            block.append(line)


def matches_in(path: Path) -> list[Match]:
    """All banned words in the file at ``path``."""
    read = python_prose if path.suffix == ".py" else markdown_prose
    file = path.relative_to(ROOT).as_posix()
    return [match for prose in read(path.read_text(encoding="utf-8")) for match in matches(prose, file)]


def files() -> list[Path]:
    """Every file whose prose a user or a contributor reads; the tests' own is not checked."""
    folders = ("peft_gauge", "fixtures", "benchmarks")
    code = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    documents = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    return sorted([*code, *documents, ROOT / "conftest.py"])


def done() -> list[Path]:
    """The files in rooms that are not `TO_DO` any more."""
    return [path for path in files() if not path.relative_to(ROOT).as_posix().startswith(TO_DO)]


@pytest.mark.parametrize("path", done(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_prose_uses_the_fields_words(path: Path) -> None:
    found = matches_in(path)

    assert not found, "\n".join(f"{place}: '{words}'; better: {better}" for place, words, better in found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a budget of 0 s is none", "is none"),
        ("… is no text in UTF-8", "is no"),
        ("the options that\n    there are", "that there are"),
        ("two runs, of which one is new", "of which"),
        ("What a step needs.", "What"),
        ("the sum of what is allocated", "of what"),
        ("the run that asked it", "asked"),
        ("… cannot be had", "cannot be had"),
        ("use --results or mend its permissions", "mend"),
        ("the host's mood of some minutes", "mood"),
        ("a CPU build has not the kernels", "has not the"),
        ("the table stands in README.md", "stands in"),
        ("a quantised base", "quantis"),
        ("16 bytes a parameter", "bytes a parameter"),
        ("surely", "surely"),
    ],
)
def test_a_banned_pattern_is_found(text: str, words: str) -> None:
    assert words in [match.words for match in matches(Prose(1, text), "x.py")]


@pytest.mark.parametrize(
    "text",
    [
        "there is no GPU",
        "the value is None",
        "none of them is read",
        "What does a method cost?",
        "a fake tensor stands in for the weights",
        "the checkpoint has not been read",
        "``ask_for`` and `what_is_none` are names",
        "quantization",
    ],
)
def test_plain_prose_passes(text: str) -> None:
    assert list(matches(Prose(1, text), "x.py")) == []


def test_every_kind_of_prose_is_read_with_its_line() -> None:
    source = '"""Doc."""\n\nx = f"{1} is none"  # one\n# what\n# is said\ny = ("a b"\n     " c d")\n'

    assert set(python_prose(source)) == {
        Prose(3, "… is none"),
        Prose(3, "one\nwhat\nis said"),
        Prose(6, "a b c d"),
    }
    page = "# Head\n\ntext\nmore\n\n```\nis none\n```\n- item\n| a | b |\n"
    assert [*markdown_prose(page)] == [
        Prose(1, "# Head"),
        Prose(3, "text\nmore"),
        Prose(9, "- item"),
        Prose(10, "| a | b |"),
    ]


if __name__ == "__main__":
    every = [match for path in files() for match in matches_in(path)]
    for match in every:
        print(*match, sep="\t")
    for room, count in sorted(Counter("/".join(match.place.split(":")[0].split("/")[:2]) for match in every).items()):
        print(f"{count:5} {room}")
