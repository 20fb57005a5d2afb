"""`peft-gauge --help` and each command's own can be read in a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

import pytest
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from peft_gauge.cli import app

COLUMNS = 80


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--help"], env={"COLUMNS": str(COLUMNS)}, terminal_width=COLUMNS)

    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= COLUMNS
    return result.output


def commands() -> dict[str, Any]:
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    return dict(group.commands)


def test_the_list_of_commands_is_not_cut_off() -> None:
    listed = shown().partition("Commands:")[2]

    assert "..." not in listed
    assert all(name in listed for name in commands())


@pytest.mark.parametrize("name", commands())
def test_every_option_of_a_command_is_named_in_full(name: str) -> None:
    text = shown(name)

    options = [option for each in commands()[name].params for option in (*each.opts, *each.secondary_opts)]
    assert [option for option in options if option.startswith("-") and option not in text] == []
    assert "…" not in text.replace("NAME[==VERSION],…", "")
