"""Resume an earlier run: which of its cases need not run again, and how new records are merged into it."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from peft_gauge.errors import GaugeError
from peft_gauge.history import store
from peft_gauge.history.reader import Run, read_run, runs_in
from peft_gauge.history.schema import VERSION, CaseRecord

Entry = TypeVar("Entry")

# A message names this many differences and counts the rest.
SHOWN = 3


@dataclass(frozen=True)
class Resumption:
    """An earlier run that can be resumed.

    ``done``: its cases that passed, by id; ``unreadable``: the problems of newer files of the same machine that were
    passed over, one line each.
    """

    run: Run
    done: Mapping[str, CaseRecord]
    unreadable: tuple[str, ...] = ()


class Merged(NamedTuple):
    """The records of a resumed run, as they are saved."""

    cases: list[CaseRecord]
    claims: list[dict[str, Any]]
    benchmarks: list[dict[str, Any]]


def resumable(results: Path, machine_info: Mapping[str, Any], options: Mapping[str, Any]) -> Resumption:
    """The newest run under ``results`` that was made on this machine, with these versions and ``options``.

    A case is done if it passed; a case that was skipped or ended otherwise runs again. Raises `GaugeError` if no run
    qualifies; the message names the differences of the newest one.
    """
    unreadable: list[str] = []
    obstacle: str | None = None
    for path in reversed(runs_in(results, machine_info["name"]) if store.is_folder(results) else []):
        try:
            run = read_run(path)
        except GaugeError as error:
            unreadable.append(str(error))
            continue
        difference = why_not(run, machine_info, options)
        if difference is None:
            return Resumption(run, _done(run), tuple(unreadable))
        if obstacle is None:
            obstacle = f"the last {'readable ' if unreadable else ''}run ({path.name}) had {difference}"
    if obstacle is None:
        obstacle = unreadable[0] if unreadable else f"{store.shown(results / machine_info['name'])} holds no run"
    raise GaugeError(f"nothing to resume: {obstacle}; run without --resume")


def why_not(run: Run, machine_info: Mapping[str, Any], options: Mapping[str, Any]) -> str | None:
    """The differences of ``run`` from a run made now, as "peft 0.20.0, now 0.21.2"; ``None`` if there are none."""
    was = conditions(run.schema, run.machine, run.options)
    # As it will be saved: there a tuple becomes a list.
    now = json.loads(json.dumps(conditions(VERSION, machine_info, options)))
    different = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    if not different:
        return None
    rest = [f"{len(different) - SHOWN} more differences"] if len(different) > SHOWN else []
    return "; ".join([*(_difference(name, was.get(name), now.get(name)) for name in different[:SHOWN]), *rest])


def merged(
    resumption: Resumption,
    cases: Iterable[CaseRecord],
    claims: Iterable[Mapping[str, Any]],
    benchmarks: Iterable[Mapping[str, Any]],
) -> Merged:
    """The resumed run's records, merged with the new ones.

    New records replace old ones of the same case (claims: of the same id and model); further ones follow.
    """
    cases, benchmarks = list(cases), list(benchmarks)
    again = {case.id for case in cases}
    timed = {entry["fullname"] for entry in benchmarks}
    # Drop the old times of a case that has now failed.
    kept = [entry for entry in resumption.run.benchmarks if entry["fullname"] not in again - timed]
    return Merged(
        cases=_joined(resumption.run.cases, cases, lambda case: case.id),
        claims=[dict(claim) for claim in _joined(resumption.run.claims, claims, lambda c: (c["id"], c["model"]))],
        benchmarks=[dict(entry) for entry in _joined(kept, benchmarks, lambda entry: entry["fullname"])],
    )


def _done(run: Run) -> dict[str, CaseRecord]:
    # A case that passed and then failed in its clean-up has two records.
    broken = {case.id for case in run.cases if case.outcome != "passed"}
    return {case.id: case for case in run.cases if case.id not in broken}


def conditions(schema: int | None, machine: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that must be equal for the cases of two runs to be in one file, by its name in messages.

    This includes the schema: an older one was measured by another protocol.
    """
    accelerator = machine.get("accelerator") or {}
    return {
        **(machine.get("libraries") or {}),
        "Python": machine.get("python_version"),
        "machine": machine.get("name"),
        "accelerator": accelerator.get("name"),
        "driver": accelerator.get("driver"),
        "CUDA": accelerator.get("cuda"),
        "threads": machine.get("threads"),
        **{f"--{name}": value for name, value in options.items() if name != "results"},
        "schema": schema,
    }


def _difference(name: str, was: Any, now: Any) -> str:
    before = f"no {name}" if was is None else f"{name} {shown(was)}"
    return f"{before}, now {'none' if now is None else shown(now)}"


def shown(value: Any) -> str:
    """An option's ``value`` as on the command line."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _joined(old: Iterable[Entry], new: Iterable[Entry], key: Callable[[Entry], Hashable]) -> list[Entry]:
    """``old``, in which the first entry of each key is replaced by all ``new`` ones of that key; further ones last."""
    groups: dict[Hashable, list[Entry]] = {}
    for entry in new:
        groups.setdefault(key(entry), []).append(entry)
    replaced = set(groups)
    joined: list[Entry] = []
    for entry in old:
        joined += groups.pop(key(entry), []) if key(entry) in replaced else [entry]
    return joined + [entry for group in groups.values() for entry in group]
