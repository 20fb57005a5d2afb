"""The requirements of one side of a comparison: pip requirements, several in one text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from peft_gauge.errors import GaugeError

AS_INSTALLED = "as installed"
_OPERATOR = re.compile(r"[<>=!~]")
_SEPARATOR = re.compile(r"[\s,]+(?![^\[]*\])")  # not within the brackets of extras


@dataclass(frozen=True)
class Side:
    """The requirements of one side, one per library, sorted; none of them means the installed packages."""

    requirements: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name in tables and saved runs."""
        return " ".join(self.requirements) or AS_INSTALLED

    @property
    def parsed(self) -> tuple[Requirement, ...]:
        return tuple(map(Requirement, self.requirements))

    @property
    def is_pinned(self) -> bool:
        """Whether it resolves to the same releases tomorrow: every requirement names one version."""
        return all(
            any(each.operator in ("==", "===") and "*" not in each.version for each in requirement.specifier)
            for requirement in self.parsed
        )

    def with_requirement(self, text: str) -> Side:
        """This side and one more requirement."""
        return parse_side(" ".join([*self.requirements, text]))


def parse_side(text: str) -> Side:
    """Parse one side: requirements separated by spaces or commas; empty or ``.`` for the installed packages.

    Raises `GaugeError` for an invalid requirement, a library named twice, or a marker (``; python_version…``).
    """
    if text.strip() in ("", "."):
        return Side(())
    if ";" in text:
        raise GaugeError(f"{text!r}: markers after ';' are not supported; leave them out")
    found: dict[str, Requirement] = {}
    for part in _parts(text):
        try:
            requirement = Requirement(part)
        except InvalidRequirement as error:
            raise GaugeError(f"{part!r} is not a valid requirement; write it as for pip: 'peft==0.20.0'") from error
        name = canonicalize_name(requirement.name)
        if name in found:
            raise GaugeError(f"{text!r} names {requirement.name} twice; give one requirement per library")
        if name == "peft-gauge":
            raise GaugeError("peft-gauge measures both sides and cannot be compared itself; compare other libraries")
        found[name] = requirement
    return Side(tuple(str(found[name]) for name in sorted(found)))


def _parts(text: str) -> list[str]:
    """One text per requirement. Spaces and commas may occur within one: ``peft >= 0.18, < 0.20``, ``peft @ URL``."""
    parts: list[str] = []
    for token in filter(None, _SEPARATOR.split(text.strip())):
        if parts and (parts[-1].endswith("@ ") or _OPERATOR.search(parts[-1][-1])):
            parts[-1] += token
        elif parts and token == "@":
            parts[-1] += " @ "
        elif parts and _OPERATOR.match(token):
            parts[-1] += f",{token}" if _OPERATOR.search(parts[-1]) else token
        else:
            parts.append(token)
    return parts


def parse_library(text: str) -> str:
    """The canonical name of a library, such as ``bitsandbytes``; raises `GaugeError` for anything but a name."""
    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        raise GaugeError(f"{text!r} is not a valid library name") from error
    if str(requirement) != requirement.name:
        raise GaugeError(f"{text!r}: give the library's name alone, then the releases as FIRST..LAST")
    return canonicalize_name(requirement.name)


def parse_range(text: str) -> tuple[Version, Version]:
    """``"0.46.0..0.50.2"`` as two versions; raises `GaugeError` if it is invalid or the first is not lower."""
    first, _, last = text.partition("..")
    try:
        low, high = Version(first), Version(last)
    except InvalidVersion as error:
        raise GaugeError(f"{text!r} is not a valid range; write FIRST..LAST, such as 0.46.0..0.50.2") from error
    if not low < high:
        raise GaugeError(f"{text}: the first release must be older than the last")
    return low, high
