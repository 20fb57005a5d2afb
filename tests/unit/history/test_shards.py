"""Saved shards are joined only where they belong together; what they lack is known to a comparison."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peft_gauge.errors import GaugeError
from peft_gauge.history.absent import OTHER_SHARD
from peft_gauge.history.comparison import compare
from peft_gauge.history.reader import read_run
from peft_gauge.history.rules import read_rules
from peft_gauge.history.schema import Selection, Shards
from peft_gauge.history.shards import joined
from peft_gauge.history.writer import write_run
from tests.support.facts import lacking
from tests.unit.history.test_resumption import OPTIONS, case, changed, claim, save, timed

NAMES = ("a", "b", "c")


def ids(*names: str) -> frozenset[str]:
    return frozenset(f"b.py::{name}" for name in names)


def shard(folder: Path, number: int, name: str, of: int = 3, **more: Any) -> Path:
    """The shard of a grid of `NAMES` that has the case ``name``."""
    left_out = ids(*NAMES) - ids(name) if of == 3 else frozenset()
    selection = more.pop("selection", Selection(("benchmarks",), deselected=ids("slow")))
    whole = replace(selection, shards=Shards((number,), of, left_out)).as_json()
    options = {**OPTIONS, "shard": f"{number}/{of}"} | more.pop("options", {})
    record = more.pop("case", case(name, trainable_params=1000 + number))
    return save(folder, record, options=options, selection=whole, **more)


def two(folder: Path) -> list[Path]:
    return [shard(folder, 1, "a", claims=(claim("x", "m"),)), shard(folder, 3, "c", benchmarks=(timed("c"),))]


def test_shards_in_any_order_are_one_run(tmp_path: Path) -> None:
    first, third = two(tmp_path)
    second = shard(tmp_path, 2, "b", claims=(claim("y", "m", "refuted"),), interrupted=True)
    found = joined([third, first, second])
    assert (found.machine, found.shards) == ("m", None)

    run = read_run(write_run(tmp_path, "m", found.run))
    assert [record.id for record in run.cases] == ["b.py::a", "b.py::b", "b.py::c"]
    assert [each["id"] for each in run.claims] == ["x", "y"]
    assert [each["fullname"] for each in run.benchmarks] == ["b.py::c"]
    assert run.options == OPTIONS
    assert run.selection == Selection(("benchmarks",), deselected=ids("slow"))
    assert run.interrupted
    assert found.run["peft_gauge"]["merged_from"] == [first.name, second.name, third.name]


def test_cases_that_a_resumed_shard_had_are_not_deselected(tmp_path: Path) -> None:
    again = Selection(("benchmarks",), deselected=ids("slow", "b"))
    files = [*two(tmp_path), shard(tmp_path, 2, "b", selection=again)]
    assert joined(files).run["peft_gauge"]["selection"]["deselected"] == ["b.py::slow"]


def test_a_missing_shard_is_recorded_and_shown(tmp_path: Path) -> None:
    files = two(tmp_path)
    with pytest.raises(GaugeError, match=r"^shard 2/3 is missing; .*--partial"):
        joined(files)
    found = joined(files, partial=True)
    assert found.shards == Shards((1, 3), 3, ids("b"))
    partial = read_run(write_run(tmp_path, "m", found.run))
    assert partial.shards == found.shards
    assert partial.shards.name == "shards 1, 3 of 3"

    whole = read_run(save(tmp_path, *(case(name, trainable_params=1001) for name in NAMES)))
    rows = [row for row in compare(whole, partial, read_rules()).rows if row.test == "b.py::b"]
    assert [(row.label, row.note) for row in rows] == [(OTHER_SHARD, "NEW is shards 1, 3 of 3 and left it to another")]
    # The missing shard completes it later.
    assert joined([partial.path, shard(tmp_path, 2, "b")]).shards is None


def test_a_shard_without_a_case_is_not_missing(tmp_path: Path) -> None:
    """Of four shards of three cases, one has nothing to save."""
    files = []
    for number, name in enumerate(NAMES, 1):
        part = Shards((number,), 4, ids(*NAMES) - ids(name))
        selection = replace(Selection(("benchmarks",)), shards=part).as_json()
        files.append(save(tmp_path, case(name), options={**OPTIONS, "shard": f"{number}/4"}, selection=selection))
    assert joined(files).shards is None


@pytest.mark.parametrize(
    ("other", "facts"),
    [
        ({"machine": changed("libraries.peft", "0.20.0")}, ("peft 0.20.0 instead of 0.21.2",)),
        ({"machine": changed("accelerator.name", "H200")}, ("accelerator H200 instead of H100",)),
        ({"machine": changed("accelerator.memory_bytes", 40)}, ("GPU memory 40 instead of 80",)),
        ({"machine": changed("name", "n")}, ("machine n instead of m",)),
        ({"machine": changed("threads", 1)}, ("threads 1 instead of 2",)),
        ({"options": {"seed": 1}}, ("--seed 1 instead of 0",)),
        ({"options": {"batch": 4}}, ("--batch 4 instead of none",)),
        ({"of": 4}, ("number of shards 4 instead of 3",)),
        ({"selection": Selection(("benchmarks",), markers="not slow")}, ("-m not slow instead of none",)),
        ({"selection": Selection(("benchmarks/test_speed.py",))}, ("paths benchmarks/test_speed.py instead of",)),
    ],
)
def test_shards_of_two_runs_are_refused_with_the_difference(
    other: dict[str, Any], facts: tuple[str, ...], tmp_path: Path
) -> None:
    files = [*two(tmp_path), shard(tmp_path, 2, "b", **other)]
    with pytest.raises(GaugeError) as refusal:
        joined(files, partial=True)
    assert lacking(str(refusal.value), files[2].name, "not a shard of the same run as", *facts) == []
    assert "\n" not in str(refusal.value)


def test_another_commit_is_refused(tmp_path: Path) -> None:
    files = two(tmp_path)
    changed_text = files[1].read_text().replace("0123456789abcdef", "fedcba9876543210")
    files[1].write_text(changed_text)
    with pytest.raises(GaugeError, match="commit fedcba9876543210 instead of 0123456789abcdef"):
        joined(files, partial=True)
    files[1].write_text(
        changed_text.replace("fedcba9876543210", "0123456789abcdef").replace('"dirty": false', '"dirty": true')
    )
    with pytest.raises(GaugeError, match="with uncommitted changes instead of"):
        joined(files, partial=True)


def test_the_same_shard_twice_is_refused(tmp_path: Path) -> None:
    files = [*two(tmp_path), shard(tmp_path, 1, "a")]
    with pytest.raises(GaugeError, match=r"^shard 1/3 is given twice: .*0001_.*0003_"):
        joined(files, partial=True)
    with pytest.raises(GaugeError, match="given twice"):
        joined([files[0], files[0]], partial=True)


def test_shards_of_different_grids_are_refused(tmp_path: Path) -> None:
    """A test that only one of them collected: the suites differ, whatever the commit is."""
    files = [*two(tmp_path), shard(tmp_path, 2, "d")]
    with pytest.raises(GaugeError, match=r"tests differ.*b.py::d"):
        joined(files)


def test_a_run_without_shards_is_refused(tmp_path: Path) -> None:
    whole = save(tmp_path, case("a"))
    with pytest.raises(GaugeError, match=r"0001_.* was saved without --shard"):
        joined([whole])


@pytest.mark.parametrize(
    "shards",
    [
        [],
        {"held": [], "of": 2},
        {"held": [2, 1], "of": 2},
        {"held": [3], "of": 2},
        {"held": [0], "of": 2},
        {"held": [True], "of": 2},
        {"held": [1], "of": 2.0},
        {"held": [1], "of": 2, "left_out": [1]},
        {"of": 2},
    ],
)
def test_malformed_shards_are_refused(shards: Any, tmp_path: Path) -> None:
    path = save(tmp_path, case("a"), selection={**Selection(("benchmarks",)).as_json(), "shards": shards})
    with pytest.raises(GaugeError, match="is malformed: peft_gauge.selection.shards"):
        read_run(path)
