"""Why a run lacks a case of another run: not requested, deselected, in another shard, not reached, or gone."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from peft_gauge.history.reader import Run

NOT_ASKED, DESELECTED, NOT_REACHED, MISSING = "NOT REQUESTED", "DESELECTED", "NOT REACHED", "MISSING"
OTHER_SHARD = "OTHER SHARD"
ABSENT = frozenset({NOT_ASKED, DESELECTED, OTHER_SHARD, NOT_REACHED, MISSING})

NAMING = ("model", "method", "adapter", "device")
"""The options that are part of test ids: with another value, a case has another id."""


class Absence(NamedTuple):
    """``label``: one of `ABSENT`; ``why``: continues after the run's name, as in "NEW did not run this benchmark"."""

    label: str
    why: str


class Absences:
    """``absences(id, benchmark, metrics)``: why ``run`` does not hold a case of ``held``.

    A run records what was selected and deselected (`Selection`). Older runs do not. For these, a benchmark without any
    case was not requested; a benchmark with cases, but none in common with the other run, was requested with others.
    """

    def __init__(self, held: Run, run: Run) -> None:
        self._run = run
        self._benchmarks = {case.benchmark for case in run.cases}
        ids = {case.id for case in held.cases}
        self._repeated = {case.benchmark for case in run.cases if case.id in ids}
        self._options = [
            f"--{name} {_told(run.options[name])}" if run.options.get(name) is not None else f"no --{name}"
            for name in NAMING
            if held.options.get(name) != run.options.get(name)
        ]

    def __call__(self, id_: str, benchmark: str, metrics: Mapping[str, Any]) -> Absence:
        run, selection = self._run, self._run.selection
        if selection is not None:
            if run.shards is not None and id_ in left_to_other_shards(run):
                return Absence(OTHER_SHARD, f"is {run.shards.name} and left it to another")
            if id_ in (selection.deselected or ()):
                by = selection.expressions or "slow, or of another device"
                return Absence(DESELECTED, f"left it out ({by})")
            if not selection.covers(id_):
                return Absence(NOT_ASKED, f"was limited to {', '.join(selection.args)}")
        # A case about no method has the same id under all options; a case without metrics may be about a method.
        if self._options and ("method" in metrics or not metrics):
            return Absence(NOT_ASKED, f"had {' and '.join(self._options)}")
        if run.shards is not None and run.shards.left_out is None:
            return Absence(OTHER_SHARD, f"is {run.shards.name}, and does not record which cases it left to others")
        if run.interrupted:
            return Absence(NOT_REACHED, "was interrupted before it")
        if benchmark not in self._benchmarks and not (selection is not None and selection.deselected is not None):
            return Absence(NOT_ASKED, "did not run this benchmark")
        if selection is None and benchmark not in self._repeated:
            return Absence(NOT_ASKED, "ran other cases of this benchmark")
        unsaid = "" if selection is not None else ", and does not record which cases it deselected"
        return Absence(MISSING, f"ran the benchmark without it{unsaid}")


def left_to_other_shards(run: Run) -> frozenset[str]:
    """The ids of the cases that only other shards than ``run`` have, as far as it records them."""
    return frozenset() if run.shards is None else run.shards.left_out or frozenset()


def _told(option: object) -> str:
    return ",".join(map(str, option)) if isinstance(option, list | tuple) else str(option)
