"""Everything private in the libraries that the project leans on, one module a library; callers import it from here.

Each entry says what it is for and what holds it. `tests/internals/test_internals.py` asks every entry in seconds; a release that
moves one fails there, under the entry's own name.
"""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version


def released(library: str, since: str) -> bool:
    """Whether the installed ``library`` is of the release ``since`` or a later one."""
    return Version(version(library)) >= Version(since)


def moved(library: str, piece: str) -> str:
    """The warning of a plan that should have replaced ``piece``, and finds that this release has it no more."""
    return (
        f"{library} {version(library)} has no {piece}, which a plan replaces by what a GPU does: figures may be wrong, "
        f"too small above all; plan with an older release of {library}."
    )
