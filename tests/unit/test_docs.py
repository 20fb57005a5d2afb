"""README and docs: commands parse, links lead somewhere, made pages are up to date, code fits a screen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs import make_reference
from peft_gauge import cli
from peft_gauge.pytest_plugin.options import GROUPS, add_options
from tests.support.documents import DOCS, PAGES, blocks, commands, commands_in_text
from tests.support.paths import ROOT

COMMANDS = cli.commands()


def names(pages: list[Path]) -> list[str]:
    return [page.relative_to(ROOT).as_posix() for page in pages]


OURS = [*commands("peft-gauge"), *commands_in_text("peft-gauge")]


@pytest.mark.parametrize(("page", "words"), [pytest.param(p, w, id=f"{p}: {' '.join(w)}") for p, w in OURS])
def test_every_command_of_ours_parses(page: str, words: list[str]) -> None:
    """As the program would parse it, with the real options; ``NAME`` and ``NAME...`` stand for values."""
    verb, *rest = words
    if verb.startswith("--") or verb == "COMMAND":
        return
    assert verb in COMMANDS, f"{page}: there is no peft-gauge {verb}"
    options = {name for parameter in COMMANDS[verb].params for name in (*parameter.opts, *parameter.secondary_opts)}
    if verb == "bench":
        options |= pytest_options()
    given = {word.partition("=")[0] for word in rest if re.match(r"--[a-z]", word)}
    assert given <= options, f"{page}: peft-gauge {verb} has no {', '.join(sorted(given - options))}"


def pytest_options() -> set[str]:
    from _pytest.config.argparsing import Parser

    parser = Parser(_ispytest=True)
    add_options(parser)
    groups = [parser.getgroup(f"peft-gauge {title}") for title in GROUPS]
    ours = {name for group in groups for option in group.options for name in option.names()}
    return ours | {"--hypothesis-profile", "--benchmark-only", "--durations", "--pyargs", "--resume"}


@pytest.mark.parametrize(
    ("page", "words"), [pytest.param(p, w, id=f"{p}: {' '.join(w)}") for p, w in commands("pytest")]
)
def test_every_pytest_command_has_our_options(page: str, words: list[str]) -> None:
    given = {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)}
    assert given <= pytest_options(), f"{page}: pytest has no {', '.join(sorted(given - pytest_options()))}"
    for word in words:
        if word.startswith(("benchmarks/", "tests/")) and page != "CONTRIBUTING.md":  # its recipes make new files
            assert (ROOT / word.partition("::")[0]).exists(), f"{page}: there is no {word}"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target} does not exist"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), f"{page.name}: {target} has no such heading"


def anchors(page: Path) -> set[str]:
    """The headings of a page, as GitHub and MkDocs name them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("name", make_reference.PAGES)
def test_made_pages_are_up_to_date(name: str) -> None:
    made = make_reference.PAGES[name]()
    assert (DOCS / name).read_text(encoding="utf-8") == made, "run python docs/make_reference.py"


def test_readme_is_short_and_its_code_fits_100_columns() -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= 200
    wide = [line for block in blocks(readme) for line in block.splitlines() if len(line) > 100]
    assert not [line for line in wide if not line.startswith("peft-gauge")], wide


def test_every_page_is_in_the_site() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(entries: Any) -> Iterator[str]:
        for entry in entries:
            values = entry.values() if isinstance(entry, dict) else [entry]
            for value in values:
                yield from [value] if isinstance(value, str) else pages(value)

    assert set(pages(site["nav"])) == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
