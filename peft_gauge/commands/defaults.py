"""Defaults of commands from the user's file (`peft_gauge.config_file`)."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from peft_gauge import config_file
from peft_gauge.config_file import ConfigFile, Option


def defaults(arguments: Sequence[str], commands: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The defaults of the command that ``arguments`` name, by command and by the names of its parameters.

    ``commands``: of Typer, by name. Raises `GaugeError` for an invalid file.
    """
    name = next((each for each in arguments if not each.startswith("-")), "")
    if name not in commands:
        return {}
    found = config_file.find()
    if found is None:
        return {}
    found.check_sections(sections(commands))
    return {name: found.values(name, options_of(commands[name]))}


def sections(commands: Iterable[str]) -> list[str]:
    """The sections that a file can have; ``bench`` takes pytest's."""
    return [*(name for name in commands if name != "bench"), config_file.PYTEST]


def options_of(command: Any) -> dict[str, Option]:
    """The options of a Typer command that a file can set, by name with dashes."""
    kinds = _kinds(command.callback)
    found: dict[str, Option] = {}
    for parameter in command.params:
        names = [name.removeprefix("--") for name in parameter.opts if name.startswith("--")]
        if parameter.param_type_name == "option" and parameter.name in kinds and names:
            kind, many = kinds[parameter.name]
            found |= {name: Option(parameter.name, kind, many) for name in names}
    return found


def _kinds(function: Callable[..., Any]) -> dict[str, tuple[type, bool]]:
    """The type of each parameter of ``function``, and whether it is a list."""
    hints = get_type_hints(inspect.unwrap(function))
    return {
        name: _kind(hint) for name, hint in hints.items() if name != "return" and _kind(hint)[0] in config_file.KINDS
    }


def _kind(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = [each for each in get_args(hint) if each is not type(None)]
    if get_origin(hint) is list:
        return get_args(hint)[0], True
    return hint, False


def is_from_file(context: Any, name: str) -> bool:
    """Whether the parameter ``name`` of Typer's ``context`` has its value from the user's file."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "DEFAULT_MAP"


def check(found: ConfigFile, commands: Mapping[str, Any]) -> list[str]:
    """The names of the sections of ``found``. Raises `GaugeError` if one of them is invalid."""
    from peft_gauge.pytest_plugin.options import file_options

    found.check_sections(sections(commands))
    for name in found.sections:
        found.values(name, file_options() if name == config_file.PYTEST else options_of(commands[name]))
    return list(found.sections)
