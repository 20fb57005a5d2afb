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
    """What the node lacks. ``needed``: canonical name -> who needs it; ``never``: the same, of what is never fetched.

    ``unknown_extras``: (package, extra) of packages that the node has, where something needs that extra of them.
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
    """Walk from the project's needs along those of what is to be fetched; what the node has ends a path.

    ``optional``: by extra of the project. ``releases`` are those that pip chose; ``extras``: what an extra of a package
    on the node needs.
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
            raise GaugeError(f"pip's answer has no {requirement}, which {by} needs on the node")
        found.needed.setdefault(name, set()).add(by)
        for extra in ["", *wanted]:
            if (name, extra) not in seen:
                seen.add((name, extra))
                todo += [(each, name) for each in releases[name].requires if is_active(each, environment, extra)]
    return found


@dataclass(frozen=True)
class Answer:
    """``lacking`` of the project alone and ``optional`` with each extra besides, out of the same ``releases``.

    ``unusable``: the extras that cannot be had, with the reason.
    """

    releases: Mapping[str, Release]
    lacking: Lacking
    optional: Mapping[str, Lacking]
    unusable: Mapping[str, str]


def ask(pip: Pip, project: Project, having: Having) -> Answer:
    """What pip says the node lacks. Raises as `Pip.resolve` does; an extra that cannot be had costs nothing else."""
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
        # The node has the package and perhaps not what this extra of it needs.
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
    """Whether pip need not be asked for it: it is on the node, or never fetched. An extra of it is asked for apart."""
    name = canonicalize_name(requirement.name)
    return name in having or comes_with_torch(name)


def check(project: Project, having: Having, target: Target) -> None:
    """Raise `GaugeError` for a node without torch, and for what is there and too old (or too new) for the project."""
    if TORCH not in having:
        raise GaugeError(
            "torch has to be on the node, since a bundle never holds it: name it in --have, as in --have torch==2.11.0"
        )
    reason = _too_old(project.core(target.markers()), having)
    if reason is not None:
        raise GaugeError(f"{reason}; install another one there first")


def _too_old(requirements: Iterable[Requirement], having: Having) -> str | None:
    """Why what the node has does not do; ``None`` where it does."""
    known = having.known()
    for each in requirements:
        version = known.get(canonicalize_name(each.name))
        if version is not None and not each.specifier.contains(version, prereleases=True):
            return f"the node has {each.name} {version}, and peft-gauge needs {each.name}{each.specifier}"
    return None


@dataclass(frozen=True)
class Brought:
    """``names``: what the named packages need in turn. ``notes``: where that could not be found out."""

    names: frozenset[str]
    notes: tuple[str, ...] = ()


def brought_by(pip: Pip, having: Having, torch_needs: Iterable[Requirement]) -> Brought:
    """What is on the node because the packages that were named one by one need it.

    pip resolves these in their versions; where that cannot be, each for itself. ``torch_needs``: what torch needs,
    which pip is not asked, since that is gigabytes where an index gives no metadata.
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
                f"what {', '.join(map(str, asked))} needs could not be found out, and is taken to be lacking "
                f"({reason}); --have @FILE says all that the node has"
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
    """The extras that stay: the one that would save most is left out, again and again, until the rest fits.

    ``core`` and ``optional`` are names of wheels with ``sizes`` in bytes; ``other_bytes`` is what else is in the bundle
    when these extras stay. The core stays in any case: the caller looks whether that fits.
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
