"""Which wheels the node lacks, and which of them go into a bundle of limited size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from peft_gauge.bundle.installed import TORCH, Having, comes_with_torch
from peft_gauge.bundle.requirements import NAME, Project, is_active
from peft_gauge.bundle.resolution import Pip, Release, Unresolvable
from peft_gauge.errors import GaugeError

if TYPE_CHECKING:
    from packaging.version import Version

    from peft_gauge.bundle.target import Target

Extras = Mapping[tuple[str, str], tuple[Requirement, ...]]


@dataclass
class Lacking:
    """Wheels that the node lacks. ``needed``: canonical name -> packages that need it; ``never``: the same for packages
    that are never downloaded.

    ``unknown_extras``: pairs (package, extra) where the node has the package and something needs that extra.
    """

    needed: dict[str, set[str]] = field(default_factory=dict)
    never: dict[str, set[str]] = field(default_factory=dict)
    unknown_extras: set[tuple[str, str]] = field(default_factory=set)


def lacking(
    core: Iterable[Requirement],
    optional: Mapping[str, Iterable[Requirement]],
    having: Having,
    releases: Mapping[str, Release],
    environment: Mapping[str, str],
    extras: Extras,
) -> Lacking:
    """Follow requirements from the project through the wheels to download; a package on the node ends a path.

    ``optional``: by the project's extra. ``releases``: chosen by pip. ``extras``: the requirements of an extra of a
    package on the node.
    """
    found = Lacking()
    todo = [(each, NAME) for each in core]
    todo += [(each, f"{NAME}[{extra}]") for extra, needs in optional.items() for each in needs]
    seen: set[tuple[str, str]] = set()
    while todo:
        requirement, by = todo.pop()
        name = canonicalize_name(requirement.name)
        wanted: list[str] = [canonicalize_name(extra) for extra in requirement.extras]
        if name in having:
            for extra in wanted:
                if (name, extra) not in extras:
                    found.unknown_extras.add((name, extra))
                elif (name, extra) not in seen:
                    seen.add((name, extra))
                    todo += [(each, f"{name}[{extra}]") for each in extras[name, extra]]
            continue
        if comes_with_torch(name):
            found.never.setdefault(name, set()).add(by)
            continue
        if name not in releases:
            raise GaugeError(f"pip returned no {requirement}, which {by} needs on the node")
        found.needed.setdefault(name, set()).add(by)
        for extra in ["", *wanted]:
            if (name, extra) not in seen:
                seen.add((name, extra))
                todo += [(each, name) for each in releases[name].requires if is_active(each, environment, extra)]
    return found


@dataclass(frozen=True)
class Answer:
    """``lacking`` for the project alone and ``optional`` with each extra added, from the same ``releases``.

    ``unusable``: unavailable extras, each with the reason.
    """

    releases: Mapping[str, Release]
    lacking: Lacking
    optional: Mapping[str, Lacking]
    unusable: Mapping[str, str]


def ask(pip: Pip, project: Project, having: Having) -> Answer:
    """The wheels that the node lacks. Raises as `Pip.resolve` does; an unavailable extra leaves the others intact."""
    environment = pip.target.markers()
    core, optional = project.core(environment), project.optional(environment)
    unusable = {name: reason for name, needs in optional.items() if (reason := _too_old(needs, having)) is not None}
    optional = {name: needs for name, needs in optional.items() if name not in unusable}
    try:
        return _ask(pip, core, optional, having, unusable)
    except Unresolvable:
        if not optional:
            raise
    usable: dict[str, tuple[Requirement, ...]] = {}
    for name, needs in optional.items():
        try:
            _ask(pip, core, {**usable, name: needs}, having, {})
            usable[name] = needs
        except Unresolvable as error:
            unusable[name] = str(error)
    return _ask(pip, core, usable, having, unusable)


def _ask(
    pip: Pip,
    core: Sequence[Requirement],
    optional: Mapping[str, tuple[Requirement, ...]],
    having: Having,
    unusable: Mapping[str, str],
) -> Answer:
    environment = pip.target.markers()
    roots = [*core, *(each for needs in optional.values() for each in needs)]
    extras: dict[tuple[str, str], tuple[Requirement, ...]] = {}
    while True:
        asked = [each for each in roots if not _is_there(each, having)]
        asked += [each for needs in extras.values() for each in needs if not _is_there(each, having)]
        releases = pip.resolve(asked, having.known())
        whole = lacking(core, optional, having, releases, environment, extras)
        if not whole.unknown_extras:
            break
        # The node has the package, but perhaps not the requirements of this extra.
        for name, extra in whole.unknown_extras:
            needs = pip.requires(name, having.versions[name])
            extras[name, extra] = tuple(
                each for each in needs if is_active(each, environment, extra) and not is_active(each, environment)
            )
    return Answer(
        releases,
        lacking(core, {}, having, releases, environment, extras),
        {name: lacking(core, {name: needs}, having, releases, environment, extras) for name, needs in optional.items()},
        dict(unusable),
    )


def _is_there(requirement: Requirement, having: Having) -> bool:
    """Whether pip need not resolve it: it is on the node or never downloaded. Its extras are resolved separately."""
    name = canonicalize_name(requirement.name)
    return name in having or comes_with_torch(name)


def check(project: Project, having: Having, target: Target) -> None:
    """Raise `GaugeError` for a node without torch, or with a package in a version that the project does not support."""
    if TORCH not in having:
        raise GaugeError(
            "a bundle never includes torch, so the node needs it: give its version, as in --have torch==2.11.0"
        )
    reason = _too_old(project.core(target.markers()), having)
    if reason is not None:
        raise GaugeError(f"{reason}; install another version there first")


def _too_old(requirements: Iterable[Requirement], having: Having) -> str | None:
    """The first package on the node in an unsupported version, as a message; ``None`` if all are supported."""
    known = having.known()
    for each in requirements:
        version = known.get(canonicalize_name(each.name))
        if version is not None and not each.specifier.contains(version, prereleases=True):
            return f"the node has {each.name} {version}, but peft-gauge needs {each.name}{each.specifier}"
    return None


@dataclass(frozen=True)
class Brought:
    """``names``: dependencies of the named packages. ``notes``: packages whose dependencies could not be resolved."""

    names: frozenset[str]
    notes: tuple[str, ...] = ()


def brought_by(pip: Pip, having: Having, torch_needs: Iterable[Requirement]) -> Brought:
    """Packages that are on the node as dependencies of the packages named individually.

    pip resolves the named versions together or, if they conflict, one by one. ``torch_needs``: torch's requirements;
    pip does not resolve torch, since an index without metadata would make it download gigabytes.
    """
    environment = pip.target.markers()
    of_torch = [each for each in torch_needs if TORCH in having.named and is_active(each, environment)]
    roots = [each for each in of_torch if not comes_with_torch(canonicalize_name(each.name))]
    named = sorted(name for name in having.named if not comes_with_torch(name))
    fixed = {name: version for name, version in having.known().items() if comes_with_torch(name)}
    if not named and not roots:
        return Brought(frozenset())
    pinned = [_pinned(name, having) for name in named]
    try:
        return Brought(frozenset(pip.resolve([*roots, *pinned], fixed)) - having.versions.keys())
    except Unresolvable:
        return _brought_by_each(pip, roots, named, having, fixed)


def _brought_by_each(
    pip: Pip, roots: Sequence[Requirement], named: Sequence[str], having: Having, fixed: Mapping[str, Version]
) -> Brought:
    names: set[str] = set()
    notes: list[str] = []
    for asked in filter(None, [roots, *([_pinned(name, having)] for name in named)]):
        for attempt in (asked, [Requirement(each.name) for each in asked]):
            try:
                names |= pip.resolve(attempt, fixed).keys()
                break
            except Unresolvable as error:
                reason = str(error)
        else:
            notes.append(
                f"the dependencies of {', '.join(map(str, asked))} could not be resolved and count as missing "
                f"({reason}); list all of the node's packages with --have @FILE"
            )
    return Brought(frozenset(names - having.versions.keys()), tuple(notes))


def _pinned(name: str, having: Having) -> Requirement:
    version = having.versions[name]
    return Requirement(name if version is None else f"{name}=={version.public}")


def fit(
    core: Iterable[str],
    optional: Mapping[str, Iterable[str]],
    sizes: Mapping[str, int],
    most_bytes: float,
    other_bytes: Callable[[Sequence[str]], int],
) -> list[str]:
    """The extras to keep: the extra that saves most is dropped, repeatedly, until the rest fits.

    ``core`` and ``optional`` name wheels with ``sizes`` in bytes; ``other_bytes`` returns the size of everything else
    for the kept extras. The core is always kept; the caller checks whether it fits.
    """
    kept = list(optional)
    core = set(core)

    def names(extras: Iterable[str]) -> set[str]:
        return core.union(*(optional[extra] for extra in extras))

    def total(extras: Sequence[str]) -> int:
        return sum(sizes[name] for name in names(extras)) + other_bytes(extras)

    while kept and total(kept) > most_bytes:
        kept.remove(min(kept, key=lambda extra: total([other for other in kept if other != extra])))
    return kept
