"""Defaults for options in a file: ``peft-gauge.toml``, or ``[tool.peft-gauge]`` in ``pyproject.toml``.

The nearest file at or above the working directory counts, and in one folder ``peft-gauge.toml``. It has a section for
each command and one for pytest's options of the suite::

    [plan]
    model = "llama-2-7b"
    gpu = ["RTX 4090", "24GB"]
    grad-checkpointing = true

    [pytest]
    rounds = 9

Keys are the options' names without dashes in front. Lists are for options that can be repeated. Relative paths are
relative to the file. Options on the command line take precedence.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_gauge.errors import GaugeError, did_you_mean, one_line

OWN_FILE, PROJECT_FILE = "peft-gauge.toml", "pyproject.toml"
PYTEST = "pytest"
"""The section with pytest's options of the suite."""

KINDS: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
}


@dataclass(frozen=True)
class Option:
    """An option that a file can set: the name under which its command receives it, the type of a value, and whether it
    takes ``many``."""

    name: str
    kind: type
    many: bool = False


@dataclass(frozen=True)
class ConfigFile:
    """A file with its sections, whose keys are not checked yet. ``prefix``: of the sections' names in the file."""

    path: Path
    sections: Mapping[str, Any]
    prefix: str = ""

    def check_sections(self, known: Iterable[str]) -> None:
        """Raise `GaugeError` unless each section is ``known``."""
        known = list(known)
        for name, section in self.sections.items():
            if not isinstance(section, Mapping):
                raise GaugeError(
                    f"{self.path}: {name} is not in a section; options belong in one, such as [{self.prefix}plan]"
                )
            if name not in known:
                raise GaugeError(f"{self.path}: unknown section [{self.prefix}{name}]{did_you_mean(name, known)}")

    def values(self, section: str, options: Mapping[str, Option]) -> dict[str, Any]:
        """The values of ``section`` by the names of their options; ``options`` are by key, with dashes.

        Raises `GaugeError` for an unknown key or a value of another type.
        """
        found: dict[str, Any] = {}
        for key, value in self.sections.get(section, {}).items():
            option = options.get(key.replace("_", "-"))
            place = f"{self.path}: {key} in [{self.prefix}{section}]"
            if option is None:
                hint = did_you_mean(key.replace("_", "-"), options)
                raise GaugeError(f"{place} is not an option that a file can set{hint}")
            found[option.name] = self._converted(place, value, option)
        return found

    def _converted(self, place: str, value: Any, option: Option) -> Any:
        if option.many:
            values = value if isinstance(value, list) else [value]
            return [self._one(place, each, option) for each in values]
        return self._one(place, value, option)

    def _one(self, place: str, value: Any, option: Option) -> Any:
        kind = str if option.kind is Path else option.kind
        fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            several = " or a list" if option.many else ""
            raise GaugeError(f"{place} must be {KINDS[option.kind]}{several}, got {one_line(repr(value), 60)}")
        is_path = option.kind is Path or (kind is str and value.startswith(("./", "../")))
        if is_path and "://" not in value:
            return str(self.path.parent / Path(value).expanduser())
        return float(value) if kind is float else value


def find(start: Path | None = None) -> ConfigFile | None:
    """The nearest file at or above ``start``, by default the working directory; ``None`` without one.

    Raises `GaugeError` for a file that cannot be read.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        own, project = folder / OWN_FILE, folder / PROJECT_FILE
        if own.is_file():
            return ConfigFile(own, _read(own))
        if project.is_file():
            section = _read(project).get("tool", {}).get("peft-gauge")
            if section is not None:
                return ConfigFile(project, section, "tool.peft-gauge.")
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise GaugeError(f"{path} is not valid TOML: {error}") from error
    except OSError as error:
        raise GaugeError(f"cannot read {path}: {error.strerror or error}") from error
