"""All private parts of libraries that the project uses, one module per library; callers import them from here.

Each entry states its purpose and its guard. `tests/internals/test_internals.py` checks every entry in seconds; if a
release moves one, the test with the entry's name fails.
"""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version


def released(library: str, since: str) -> bool:
    """Whether the installed ``library`` is the release ``since`` or a later one."""
    return Version(version(library)) >= Version(since)


def moved(library: str, piece: str) -> str:
    """The warning of a plan that cannot replace ``piece`` because this release does not have it."""
    return (
        f"{library} {version(library)} has no {piece}, which plans replace by the GPU's behaviour: metrics may be "
        f"wrong, usually too small; plan with an older release of {library}."
    )
