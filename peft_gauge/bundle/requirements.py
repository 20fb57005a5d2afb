"""The project's requirements, from its own metadata, on a node that may have another Python than this machine."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from peft_gauge import __version__, paths
from peft_gauge.errors import GaugeError

NAME = "peft-gauge"
OPTIONAL = {
    "test": "pytest -n (cases on several GPUs at once) and the tests of it",
    "report": "peft-gauge report as a page or as pictures, and peft-gauge memory-curve",
}
"""Extras used by tests and benchmarks -> the features that need them. `dev` is for the project's developers."""


@dataclass(frozen=True)
class Project:
    """``requirements``: all from the metadata; those of an extra have a marker with its name."""

    version: str
    requires_python: SpecifierSet
    requirements: tuple[Requirement, ...]

    def core(self, environment: Mapping[str, str]) -> tuple[Requirement, ...]:
        """The requirements of a plain install in ``environment`` (PEP 508)."""
        return tuple(each for each in self.requirements if is_active(each, environment))

    def extra(self, name: str, environment: Mapping[str, str]) -> tuple[Requirement, ...]:
        """The additional requirements of the extra ``name``, including other extras of this project that it names."""
        found: list[Requirement] = []
        for each in self.requirements:
            if is_active(each, environment) or not is_active(each, environment, name):
                continue
            if canonicalize_name(each.name) == NAME:
                found += [other for own in sorted(each.extras) for other in self.extra(own, environment)]
            else:
                found.append(each)
        return tuple(found)

    def optional(self, environment: Mapping[str, str]) -> dict[str, tuple[Requirement, ...]]:
        """The extras of `OPTIONAL` that this project has, most important first."""
        extras = {name: self.extra(name, environment) for name in OPTIONAL}
        return {name: needed for name, needed in extras.items() if needed}


def is_active(requirement: Requirement, environment: Mapping[str, str], extra: str = "") -> bool:
    """Whether ``requirement`` applies in ``environment``, which is complete: no value comes from this interpreter."""
    return requirement.marker is None or requirement.marker.evaluate({**environment, "extra": extra})


def read_project() -> Project:
    """This project, from the checkout's pyproject.toml or from the installed package's metadata.

    The checkout comes first: an editable install keeps the metadata from the day it was made.
    """
    file = paths.PROJECT / "pyproject.toml"
    if file.is_file():
        return _from_pyproject(file)
    try:
        found = metadata.metadata(NAME)
        requirements = tuple(map(Requirement, metadata.requires(NAME) or ()))
    except metadata.PackageNotFoundError as error:
        raise GaugeError(f"the requirements of {NAME} are unknown: it is neither a checkout nor installed") from error
    return Project(found["Version"], SpecifierSet(found["Requires-Python"] or ""), requirements)


def _from_pyproject(file: Path) -> Project:
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    requirements = [Requirement(text) for text in project["dependencies"]]
    for extra, texts in project["optional-dependencies"].items():
        requirements += [_of_extra(Requirement(text), extra) for text in texts]
    return Project(project.get("version", __version__), SpecifierSet(project["requires-python"]), tuple(requirements))


def _of_extra(requirement: Requirement, extra: str) -> Requirement:
    """``requirement`` with the marker that a built package's metadata has."""
    condition = f"extra == '{extra}'"
    marker = condition if requirement.marker is None else f"({requirement.marker}) and {condition}"
    requirement.marker = Marker(marker)
    return requirement
