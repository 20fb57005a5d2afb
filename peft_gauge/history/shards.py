"""Join the saved runs of shards (``pytest --shard i/n``) into one run, as a whole run is saved."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from peft_gauge.errors import GaugeError, one_line
from peft_gauge.history import schema, store
from peft_gauge.history.reader import Run, read_run
from peft_gauge.history.resumption import conditions, shown
from peft_gauge.history.schema import KEY, CaseRecord, Selection, Shards

SHOWN = 3


class Joined(NamedTuple):
    """``run``: the value to save; ``machine``: its folder; ``shards``: those it holds, ``None`` if these are all."""

    run: dict[str, Any]
    machine: str
    shards: Shards | None


def joined(files: Sequence[Path], *, partial: bool = False) -> Joined:
    """The one run whose shards ``files`` hold; its time is that of the shard that ended last.

    Raises `GaugeError` for a file that holds a whole run, for shards that do not belong together (the message names the
    difference), for a shard given twice and, unless ``partial``, for a missing one. A shard whose file is missing
    because it has no case is not missing.
    """
    runs = [read_run(file) for file in files]
    selections = [_selection(run) for run in runs]
    first = runs[0]
    for run, selection in zip(runs[1:], selections[1:], strict=True):
        found = _difference(first, selections[0], run, selection)
        if found is not None:
            raise GaugeError(f"{run.path.name} is not a shard of the same run as {first.path.name}: {found}")
    _check_disjoint(runs, selections)
    runs, selections = map(list, zip(*sorted(zip(runs, selections, strict=True), key=_number), strict=True))
    shards = _together(runs, [_shards(each) for each in selections])
    if shards is not None and not partial:
        raise GaugeError(_missing(shards))
    return Joined(_document(runs, selections, shards), str(first.machine["name"]), shards)


def _number(pair: tuple[Run, Selection]) -> int:
    return _shards(pair[1]).held[0]


def _selection(run: Run) -> Selection:
    if run.selection is None or run.selection.shards is None:
        raise GaugeError(f"{store.shown(run.path)} was saved without --shard; merge joins the shards of one run")
    return run.selection


def _shards(selection: Selection) -> Shards:
    assert selection.shards is not None  # `_selection` refuses other runs
    return selection.shards


def _difference(one: Run, selected: Selection, other: Run, selected_there: Selection) -> str | None:
    """The first differences of ``other`` from ``one``; ``None`` if both are of one run."""
    here, there = (_conditions(run, selection) for run, selection in ((one, selected), (other, selected_there)))
    different = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if not different:
        return None
    first = [f"{name} {_value(there.get(name))} instead of {_value(here.get(name))}" for name in different[:SHOWN]]
    return "; ".join([*first, *([f"{len(different) - SHOWN} more"] if len(different) > SHOWN else [])])


def _value(value: Any) -> str:
    return "none" if value is None else one_line(shown(value), 80)


def _conditions(run: Run, selection: Selection) -> dict[str, Any]:
    """Everything that the shards of one run have in common, by its name in messages."""
    options = {name: value for name, value in run.options.items() if name != "shard"}
    commit = str(run.commit.get("id")) + (", with uncommitted changes" if run.commit.get("dirty") else "")
    accelerator = run.machine.get("accelerator") or {}
    return {
        "number of shards": _shards(selection).of,
        "commit": commit,
        **conditions(run.schema, run.machine, options),
        "GPU memory": accelerator.get("memory_bytes"),
        "paths": list(selection.args),
        "-m": selection.markers or None,
        "-k": selection.keywords or None,
    }


def _check_disjoint(runs: Sequence[Run], selections: Sequence[Selection]) -> None:
    pairs = combinations(zip(runs, selections, strict=True), 2)
    for (one, here), (other, there) in pairs:
        twice = sorted({*_shards(here).held} & {*_shards(there).held})
        if twice:
            number = f"{twice[0]}/{_shards(here).of}"
            raise GaugeError(f"shard {number} is given twice: {one.path.name} and {other.path.name}; leave one out")
        shared = sorted({case.id for case in one.cases} & {case.id for case in other.cases})
        if shared:
            names = f"{one.path.name} and {other.path.name}"
            raise GaugeError(f"{names} both hold {one_line(shared[0], 120)}: they are not shards of one run")


def _together(runs: Sequence[Run], parts: Sequence[Shards]) -> Shards | None:
    """The shards that ``runs`` hold together; ``None`` if no case is left out.

    Raises `GaugeError` if the others did not leave out a case of one of them: their grids differ.
    """
    of, held = parts[0].of, tuple(sorted(number for part in parts for number in part.held))
    known = [(run, part.left_out) for run, part in zip(runs, parts, strict=True) if part.left_out is not None]
    for run, left_out in known:
        for other in runs:
            foreign = sorted({case.id for case in other.cases} - left_out) if other is not run else []
            if foreign:
                raise GaugeError(
                    f"{run.path.name} and {other.path.name} are not shards of one run: their tests differ, the first "
                    f"did not collect {one_line(foreign[0], 120)}"
                )
    if len(held) == of:
        return None
    if len(known) < len(runs):
        return Shards(held, of)
    # Every shard leaves out what the missing ones have; the tests of one given leave each other out.
    left_out = frozenset.intersection(*(ids for _, ids in known))
    return Shards(held, of, left_out) if left_out else None


def _missing(shards: Shards) -> str:
    numbers = shards.missing
    names = ", ".join(f"{number}/{shards.of}" for number in numbers[:SHOWN])
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    return (
        f"{'shard' if len(numbers) == 1 else 'shards'} {names}{more} {'is' if len(numbers) == 1 else 'are'} missing; "
        "give every shard, or add --partial"
    )


def _document(runs: Sequence[Run], selections: Sequence[Selection], shards: Shards | None) -> dict[str, Any]:
    newest = max(runs, key=lambda run: run.when)
    cases = [case for run in runs for case in run.cases]
    claims: dict[tuple[str, str], Mapping[str, Any]] = {}
    for claim in (claim for run in runs for claim in run.claims):
        claims.setdefault((claim["id"], claim["model"]), claim)
    options = {name: value for name, value in newest.options.items() if name != "shard"}
    whole: dict[str, Any] = json.loads(newest.path.read_bytes())
    return {
        **whole,
        "benchmarks": [dict(entry) for run in runs for entry in run.benchmarks],
        KEY: schema.as_json(
            cases,
            [dict(claim) for claim in claims.values()],
            options,
            interrupted=any(run.interrupted for run in runs),
            merged_from=[run.path.name for run in runs],
            selection=replace(selections[0], deselected=_deselected(selections, cases), shards=shards),
        ),
    }


def _deselected(selections: Iterable[Selection], cases: Iterable[CaseRecord]) -> frozenset[str] | None:
    """The ids that the shards deselected, but for cases that a resumed shard already had; ``None`` if a shard does not
    record them."""
    known = [selection.deselected for selection in selections]
    found = [each for each in known if each is not None]
    return frozenset().union(*found) - {case.id for case in cases} if len(found) == len(known) else None
