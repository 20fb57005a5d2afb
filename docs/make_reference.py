"""Write ``docs/reference/cli.md`` and ``docs/reference/pytest-options.md`` from the code that defines the options.

    python docs/make_reference.py [--check]

``--check`` writes nothing, and exits with 1 if a page is out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
MADE = "<!-- made by python docs/make_reference.py -->"


def cli_page() -> str:
    """The commands of ``peft-gauge`` with their arguments and options, under the headings of ``--help``."""
    import typer.main

    from peft_gauge import cli
    from peft_gauge.commands import groups

    group: Any = typer.main.get_command(cli.app)
    parts = [
        "# Command line",
        MADE,
        "`peft-gauge COMMAND --help` prints the same. An error is one line on standard error with exit code 2. "
        "`peft-gauge --version` prints the versions; `peft-gauge --install-completion` completes commands in a shell.",
    ]
    for name, command in sorted(group.commands.items()):
        parts += [f"## {name}", _paragraphs(command.help or "")]
        for heading, parameters in groups.by_heading(name, command.params).items():
            rows = [row for parameter in parameters for row in _row(parameter)]
            if rows:
                kind = "argument" if heading == "Arguments" else "option"
                table = [f"| {kind} | meaning | default |", "|---|---|---|", *rows]
                parts += [f"**{heading}**", "\n".join(table)]
    return "\n\n".join(parts) + "\n"


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.replace("\b", "").split("\n\n")).strip()


def _row(parameter: Any) -> Iterator[str]:
    if parameter.name == "help" or getattr(parameter, "hidden", False):
        return
    is_argument = parameter.param_type_name == "argument"
    names = [(parameter.metavar or str(parameter.name)).upper()] if is_argument else parameter.opts
    names = [*names, *getattr(parameter, "secondary_opts", [])]
    default = parameter.default
    shown = "" if default in (None, False, (), []) or callable(default) else f"`{default}`"
    if is_argument and parameter.required:
        shown = "required"
    yield f"| {', '.join(f'`{name}`' for name in names)} | {_cell(parameter.help or '')} | {shown} |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", r"\|").split())


def pytest_page() -> str:
    """The suite's own options of pytest."""
    from _pytest.config.argparsing import Parser

    from peft_gauge.pytest_plugin.options import GROUPS, add_options

    parser = Parser(_ispytest=True)
    add_options(parser)
    parts = [
        "# Options of pytest",
        MADE,
        "These come with the suite; all options of pytest and pytest-benchmark work too. Write paths with `=`, as in "
        "`--model=DIR`: pytest looks for its configuration near a separate path argument. "
        "`-m` and `-k` select as in pytest's manual, with two defaults: see [benchmarks](benchmarks.md).",
    ]
    for title in GROUPS:
        parts += [f"## {title[0].upper()}{title[1:]}", _pytest_table(parser.getgroup(f"peft-gauge {title}").options)]
    return "\n\n".join(parts) + "\n"


def _pytest_table(options: Iterable[Any]) -> str:
    rows = []
    for option in options:
        attributes = option.attrs()
        value = attributes.get("metavar", "" if attributes.get("action") == "store_true" else "VALUE")
        names = ", ".join(f"`{name}{'=' + value if value else ''}`" for name in option.names())
        rows.append(f"| {names} | {_cell(str(attributes.get('help', '')))} |")
    return "\n".join(["| option | meaning |", "|---|---|", *rows])


PAGES = {"reference/cli.md": cli_page, "reference/pytest-options.md": pytest_page}


def main(check: bool) -> int:
    """Write the pages, or name those that are out of date."""
    old = [name for name, page in PAGES.items() if (DOCS / name).read_text(encoding="utf-8") != page()] if check else []
    for name in old:
        print(f"docs/{name} is out of date; run python docs/make_reference.py", file=sys.stderr)
    if not check:
        for name, page in PAGES.items():
            (DOCS / name).parent.mkdir(parents=True, exist_ok=True)
            (DOCS / name).write_text(page(), encoding="utf-8")
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
