"""Find the first release that is worse, by bisection; some releases may be impossible to judge.

A release is *good* (not worse than the first), *bad* (worse), or neither: it does not install, does not run, or the
result is inconclusive. Bisection keeps a good release below a bad one and probes the middle between them; if that is
neither, its nearest neighbours. If only such releases remain between the last good and the first bad one, the result
lists them. As with any bisection, the result is one change from good to bad; there may be others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Answer = Literal["good", "bad", "unusable", "inconclusive"]


@dataclass(frozen=True)
class Probe:
    """The result for one release, with a one-line reason."""

    release: str
    answer: Answer
    why: str


@dataclass(frozen=True)
class BisectionResult:
    """The result of a bisection.

    ``reference``: the release that all others are compared with, ``None`` if none ran; ``first_bad``: the first bad
    release, ``None`` if there is none; ``last_good``: the last good one below it; ``between``: the releases between the
    two, which could not be judged; ``end``: the result for the last usable release; ``probes``: all, in order.
    """

    reference: str | None
    first_bad: Probe | None
    last_good: str | None
    between: tuple[str, ...]
    end: Probe | None
    probes: tuple[Probe, ...]


def bisect(
    releases: Sequence[str], is_usable: Callable[[str], Probe], probe: Callable[[str], Probe]
) -> BisectionResult:
    """Bisect ``releases``, oldest first.

    ``is_usable`` is called for releases from the lower end until one is good: the reference. ``probe`` judges a release
    against the reference, which the caller knows from the last good ``is_usable``.
    """
    asked: list[Probe] = []

    def ask(question: Callable[[str], Probe], release: str) -> Probe:
        asked.append(question(release))
        return asked[-1]

    reference = next((i for i, each in enumerate(releases) if ask(is_usable, each).answer == "good"), None)
    if reference is None:
        return BisectionResult(None, None, None, (), None, tuple(asked))
    end, last = None, len(releases) - 1
    while last > reference:
        end = ask(probe, releases[last])
        if end.answer != "unusable":
            break
        last -= 1
    else:
        end = None
    if end is None or end.answer != "bad":
        return BisectionResult(releases[reference], None, None, (), end, tuple(asked))
    good, bad, first_bad, between = reference, last, end, list(range(reference + 1, last))
    while between:
        middle = between[(len(between) - 1) // 2]
        found = ask(probe, releases[middle])
        between.remove(middle)
        if found.answer == "bad":
            bad, first_bad = middle, found
        elif found.answer == "good":
            good = middle
        between = [each for each in between if good < each < bad]
    left = tuple(releases[good + 1 : bad])
    return BisectionResult(releases[reference], first_bad, releases[good], left, end, tuple(asked))


def expected_probes(releases: int) -> int:
    """Number of probes if all releases can be judged: one for each end, then halving."""
    return 2 + math.ceil(math.log2(max(1, releases - 1)))
