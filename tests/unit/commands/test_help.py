"""`peft-gauge --help` and each command's own can be read in a terminal of 80 columns."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from peft_gauge.cli import app, commands
from peft_gauge.commands.groups import GROUPS
from peft_gauge.pytest_plugin.options import GROUPS as SUITE_GROUPS
from peft_gauge.pytest_plugin.options import file_options
from tests.support.paths import ROOT

COLUMNS = 80


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--help"], env={"COLUMNS": str(COLUMNS)}, terminal_width=COLUMNS)

    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= COLUMNS
    return result.output


def test_the_list_of_commands_is_not_cut_off() -> None:
    listed = shown().partition("Commands:")[2]

    assert "..." not in listed
    assert all(name in listed for name in commands())


@pytest.mark.parametrize("name", GROUPS)
def test_every_option_is_in_one_group(name: str) -> None:
    grouped = [option for options in GROUPS[name].values() for option in options]
    own = [each.name for each in commands()[name].params if each.param_type_name == "option"]
    assert sorted(grouped) == sorted(own)
    headings = [line for line in shown(name).splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert [heading for heading in GROUPS[name] if f"{heading}:" not in headings] == []


@pytest.mark.parametrize("name", commands())
def test_the_reference_has_the_headings_and_options_of_the_help(name: str) -> None:
    """Section by section, in the same order."""
    page = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {name}$(.*?)(?=^## |\Z)", page, re.M | re.S)
    assert section is not None
    of_page: dict[str, list[str]] = {}
    for heading, row in re.findall(r"^(?:\*\*(.+)\*\*|\| `([^`]+)`.*)$", section[1], re.M):
        if heading:
            of_page[heading] = []
        else:
            of_page[[*of_page][-1]].append(row)
    of_help: dict[str, list[str]] = {}
    for heading, option in re.findall(r"^(?:([A-Z].*):|  (-{0,2}\w[\w-]*).*)$", shown(name), re.M):
        if heading:
            of_help[heading] = []
        elif of_help:
            of_help[[*of_help][-1]].append(option)
    of_help = {heading: [each for each in options if each != "-h"] for heading, options in of_help.items()}
    of_help = {heading: options for heading, options in of_help.items() if options}
    assert [*of_page] == [*of_help]
    for heading, options in of_page.items():
        if heading != "Arguments":
            assert options == of_help[heading]


CHOICES = {
    "--dtype": ("float32", "float16", "bfloat16"),
    "--device": ("cpu", "cuda"),
    "--loop": ("plain", "trainer", "sft"),
    "--mixed-precision": ("no", "bf16", "fp16"),
    "--quantize": ("nf4", "fp4", "int8"),
    "--attention": ("sdpa", "eager", "flash_attention_2"),
    "--strategy": ("fsdp2", "ddp", "zero1", "zero2", "zero3"),
    "--loss": ("full", "chunked", "cce"),
    "--find": ("batch", "seq", "rank", "gpus"),
    "--format": ("html", "png", "svg"),
}


@pytest.mark.parametrize("name", commands())
def test_choices_are_listed(name: str) -> None:
    for parameter in commands()[name].params:
        for option in parameter.opts:
            integer = option == "--device" and name == "trace"  # the index of a CUDA device
            choices = () if integer else CHOICES.get(option, ())
            assert [choice for choice in choices if choice not in parameter.help] == [], f"{name} {option}"


def test_every_option_of_the_suite_is_in_one_group() -> None:
    grouped = [option for options in SUITE_GROUPS.values() for option in options]
    assert sorted(grouped) == sorted(f"--{name}" for name in file_options())


@pytest.mark.parametrize("name", commands())
def test_every_option_of_a_command_is_named_in_full(name: str) -> None:
    text = shown(name)

    options = [option for each in commands()[name].params for option in (*each.opts, *each.secondary_opts)]
    assert [option for option in options if option.startswith("-") and option not in text] == []
    assert "…" not in text.replace("NAME[==VERSION],…", "")
