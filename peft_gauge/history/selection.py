"""Choose the saved runs to compare: the newest that have cases in common.

A default run, a slow run and a run of one benchmark follow each other in a history, so the newest two often have no
case in common. Two runs have a case in common if it ran in both; the comparison checks whether settings and machine
differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_gauge.errors import GaugeError
from peft_gauge.history import store
from peft_gauge.history.reader import Run, read_run
from peft_gauge.history.schema import NOT_RUN, CaseRecord


@dataclass(frozen=True)
class Chosen:
    """``runs``: BASE first; ``passed_over``: a line on newer files without common cases, and on each unreadable."""

    runs: tuple[Run, ...]
    passed_over: tuple[str, ...] = ()


def newest_in_common(files: Sequence[Path], number: int) -> Chosen:
    """Of ``files`` (oldest first), the newest ``number`` such that the oldest, BASE, has cases in common with each
    other.

    Raises `GaugeError` if there are none, or if the newest file cannot be read; other unreadable files are passed over.
    """
    known = _Known()
    newest_first = files[::-1]
    read_run(newest_first[0])
    found = _in_common(known, newest_first, number)
    if not found:
        fewer = next((less for less in range(number - 1, 1, -1) if _in_common(known, newest_first, less)), None)
        hint = f"; --last {fewer} finds some" if fewer is not None else ""
        raise GaugeError(
            f"no {number} of the {len(files)} runs in {store.shown(files[-1].parent)} have cases in common{hint}"
        )
    return known.chosen(found, looked_at=newest_first[: newest_first.index(found[0])])


def _in_common(known: _Known, newest_first: Sequence[Path], number: int) -> list[Path]:
    for place, newest in enumerate(newest_first):
        earlier = newest_first[place + 1 :]
        for depth, base in enumerate(earlier):
            if not known.share(base, newest):
                continue
            between = [file for file in earlier[:depth] if known.share(base, file)]
            if len(between) >= number - 2:
                return [base, *reversed(between[: number - 2]), newest]
    return []


def newest_base(files: Sequence[Path], new: Iterable[CaseRecord]) -> Chosen:
    """The newest of ``files`` (oldest first) that has a case in common with ``new``; no run if there is none."""
    known, names = _Known(), _names(new)
    base = next((file for file in reversed(files) if known.names(file) & names), None)
    return known.chosen([] if base is None else [base], looked_at=files[::-1])


def of_each(candidates: Sequence[Sequence[Path]]) -> Chosen:
    """BASE and each NEW from its ``candidates`` (oldest first): the newest with cases in common, else the newest.

    A single candidate is always chosen. Raises `GaugeError` if a chosen file cannot be read.
    """
    known = _Known()
    bases, *news = (each[::-1] for each in candidates)
    pairs = ((base, new) for new in news[0] for base in bases if base != new and known.share(base, new))
    base, first = next(pairs, (bases[0], news[0][0]))
    others = [next((new for new in each if new != base and known.share(base, new)), each[0]) for each in news[1:]]
    found = [base, first, *others]
    newer = [file for each, taken in zip(candidates, found, strict=True) for file in each[each.index(taken) :]]
    return known.chosen(found, looked_at=sorted(dict.fromkeys(newer), reverse=True))


def _names(cases: Iterable[CaseRecord]) -> frozenset[str]:
    """Names of the ``cases`` that ran: their ids, and these without the file, which may have moved."""
    ids = [case.id for case in cases if case.outcome not in NOT_RUN]
    return frozenset([*ids, *(name for id_ in ids if (name := id_.partition("::")[2]))])


class _Known:
    """The files read so far; only the names of their cases are kept, since a history can have a thousand files."""

    def __init__(self) -> None:
        self._names: dict[Path, frozenset[str]] = {}
        self._problems: dict[Path, str] = {}

    def names(self, file: Path) -> frozenset[str]:
        if file not in self._names:
            try:
                self._names[file] = _names(read_run(file).cases)
            except GaugeError as error:
                self._names[file], self._problems[file] = frozenset(), str(error)
        return self._names[file]

    def share(self, one: Path, other: Path) -> bool:
        return bool(self.names(one) & self.names(other))

    def chosen(self, files: Sequence[Path], *, looked_at: Sequence[Path]) -> Chosen:
        """The runs in ``files``, and notes on the other files that were ``looked_at`` (newest first) to find them."""
        left = [file for file in looked_at if file in self._names and file not in files]
        numbers = [file.stem.partition("_")[0] for file in left if file not in self._problems]
        disjoint = [f"passed over, without cases in common: {', '.join(numbers)}"] if numbers else []
        unreadable = [f"passed over: {self._problems[file]}" for file in left if file in self._problems]
        return Chosen(tuple(map(read_run, files)), (*disjoint, *unreadable))
