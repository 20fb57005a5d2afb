"""A run goes on from another only where both were made under the same conditions."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from peft_gauge.errors import GaugeError
from peft_gauge.history import schema
from peft_gauge.history.resumption import merged, resumable, why_not
from peft_gauge.history.schema import KEY, CaseRecord
from peft_gauge.history.writer import write_run

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
MACHINE = {
    "name": "m",
    "python_version": "3.11.7",
    "threads": 2,
    "accelerator": {"name": "H100", "memory_bytes": 80, "driver": "570.1", "cuda": "12.8"},
    "libraries": {"torch": "2.13.0", "peft": "0.21.2", "bitsandbytes": None},
    "release": "6.1",
}
OPTIONS = {"method": ["lora", "qlora"], "batch": None, "seed": 0, "results": "results"}
OUTCOMES = ("passed", "failed", "skipped", "out-of-memory", "crashed", "timed-out", "interrupted")


def case(name: str, outcome: Any = "passed", **metrics: Any) -> CaseRecord:
    return CaseRecord(f"b.py::{name}", "b", outcome, None if outcome == "passed" else "why", metrics)


def claim(name: str, model: str, verdict: str = "holds") -> dict[str, Any]:
    return {"id": name, "model": model, "verdict": verdict}


def timed(name: str, median: float = 1.0) -> dict[str, Any]:
    return {"fullname": f"b.py::{name}", "stats": {"median": median}}


def save(
    results: Path,
    *cases: CaseRecord,
    claims: tuple[dict[str, Any], ...] = (),
    benchmarks: tuple[dict[str, Any], ...] = (),
    machine: dict[str, Any] = MACHINE,
    options: dict[str, Any] = OPTIONS,
    **changed: Any,
) -> Path:
    run = {
        "machine_info": machine,
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "benchmarks": list(benchmarks),
        "datetime": NOW.isoformat(),
        "version": "5.3.1",
        KEY: schema.as_json(list(cases), list(claims), options) | changed,
    }
    return write_run(results, "m", run, now=NOW)


def changed(part: str, value: Any) -> dict[str, Any]:
    """`MACHINE` with another value at a dotted path."""
    machine: dict[str, Any] = deepcopy(MACHINE)
    *parents, last = part.split(".")
    place = machine
    for name in parents:
        place = place[name]
    place[last] = value
    return machine


def test_only_cases_that_passed_are_done(tmp_path: Path) -> None:
    path = save(tmp_path, *(case(outcome, outcome) for outcome in OUTCOMES), interrupted=True)
    resumption = resumable(tmp_path, MACHINE, OPTIONS)
    assert resumption.run.path == path
    assert resumption.done == {"b.py::passed": case("passed")}
    assert resumption.unreadable == ()


def test_a_case_that_failed_after_it_passed_is_not_done(tmp_path: Path) -> None:
    save(tmp_path, case("a"), case("b"), case("a", "failed"))
    assert list(resumable(tmp_path, MACHINE, OPTIONS).done) == ["b.py::b"]


@pytest.mark.parametrize(
    ("part", "value", "difference"),
    [
        ("libraries.peft", "0.20.0", "peft 0.20.0, now 0.21.2"),
        ("libraries.peft", None, "no peft, now 0.21.2"),
        ("libraries.bitsandbytes", "0.50.2", "bitsandbytes 0.50.2, now none"),
        ("python_version", "3.12.1", "Python 3.12.1, now 3.11.7"),
        ("threads", 1, "threads 1, now 2"),
        ("name", "other", "machine other, now m"),
        ("accelerator.name", "H200", "accelerator H200, now H100"),
        ("accelerator.driver", "560.2", "driver 560.2, now 570.1"),
        ("accelerator.cuda", None, "no CUDA, now 12.8"),
    ],
)
def test_another_machine_or_version_is_not_gone_on_with(part: str, value: Any, difference: str, tmp_path: Path) -> None:
    path = save(tmp_path, case("a"), machine=changed(part, value))
    with pytest.raises(GaugeError) as caught:
        resumable(tmp_path, MACHINE, OPTIONS)
    assert str(caught.value) == f"nothing to resume: the last run ({path.name}) had {difference}; run without --resume"


@pytest.mark.parametrize(
    ("was", "difference"),
    [
        ({"seed": 1}, "--seed 1, now 0"),
        ({"batch": 8}, "--batch 8, now none"),
        ({"method": None}, "no --method, now lora,qlora"),
        ({"rounds": 5}, "--rounds 5, now none"),
    ],
)
def test_other_options_are_not_gone_on_with(was: dict[str, Any], difference: str, tmp_path: Path) -> None:
    save(tmp_path, case("a"), options=OPTIONS | was)
    with pytest.raises(GaugeError, match=rf"\) had {difference}; run without --resume$"):
        resumable(tmp_path, MACHINE, OPTIONS)


def test_an_older_schema_was_measured_otherwise(tmp_path: Path) -> None:
    save(tmp_path, case("a"), schema=1)
    with pytest.raises(GaugeError, match=f"had schema 1, now {schema.VERSION}; run"):
        resumable(tmp_path, MACHINE, OPTIONS)


@pytest.mark.parametrize(
    ("machine", "options"),
    [
        (changed("accelerator.memory_bytes", 81), OPTIONS),
        (changed("release", "6.2"), OPTIONS),
        (changed("libraries", {"torch": "2.13.0", "peft": "0.21.2"}), OPTIONS),
        (MACHINE, OPTIONS | {"results": "elsewhere"}),
        (MACHINE, OPTIONS | {"method": ("lora", "qlora")}),
        (MACHINE, {name: value for name, value in OPTIONS.items() if name != "batch"}),
    ],
)
def test_what_changes_no_result_may_differ(machine: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path, case("a"))
    assert why_not(resumable(tmp_path, machine, options).run, machine, options) is None


def test_many_differences_are_counted(tmp_path: Path) -> None:
    machine = changed("libraries", {"torch": "1", "peft": "2"}) | {"threads": 7, "python_version": "3.12", "name": "x"}
    save(tmp_path, case("a"), machine=machine)
    expected = "had torch 1, now 2.13.0; peft 2, now 0.21.2; Python 3.12, now 3.11.7; 2 more differences; run without"
    with pytest.raises(GaugeError, match=expected):
        resumable(tmp_path, MACHINE, OPTIONS)


def test_the_newest_run_that_fits_is_taken_and_the_newest_of_all_is_told(tmp_path: Path) -> None:
    save(tmp_path, case("oldest"))
    save(tmp_path, case("fits"))
    save(tmp_path, case("other"), options=OPTIONS | {"seed": 5})
    assert list(resumable(tmp_path, MACHINE, OPTIONS).done) == ["b.py::fits"]
    save(tmp_path, case("newest"), options=OPTIONS | {"seed": 6})
    with pytest.raises(GaugeError, match="the last run .0004_.* had --seed 6, now 7;"):
        resumable(tmp_path, MACHINE, OPTIONS | {"seed": 7})


@pytest.mark.parametrize("prepare", [lambda results: results.mkdir(), lambda results: None], ids=["empty", "absent"])
def test_without_a_run_there_is_nothing_to_resume(prepare: Callable[[Path], object], tmp_path: Path) -> None:
    results = tmp_path / "results"
    prepare(results)
    with pytest.raises(GaugeError) as caught:
        resumable(results, MACHINE, OPTIONS)
    assert str(caught.value) == f"nothing to resume: {results / 'm'} holds no run; run without --resume"


def test_a_broken_file_is_passed_over_and_told(tmp_path: Path) -> None:
    save(tmp_path, case("a"))
    (tmp_path / "m" / "0002_x_y.json").write_text("{")
    resumption = resumable(tmp_path, MACHINE, OPTIONS)
    assert resumption.run.name == "0001"
    (line,) = resumption.unreadable
    assert "0002_x_y.json is truncated" in line
    with pytest.raises(GaugeError, match="the last readable run .0001_.* had --seed 0, now 1"):
        resumable(tmp_path, MACHINE, OPTIONS | {"seed": 1})


def test_broken_files_alone_are_told(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "0002_x_y.json").write_text("{")
    with pytest.raises(GaugeError, match="nothing to resume: .*0002_x_y.json is truncated.*; run without --resume"):
        resumable(tmp_path, MACHINE, OPTIONS)


def test_a_plain_pytest_benchmark_file_is_not_gone_on_with(tmp_path: Path) -> None:
    run = {"machine_info": MACHINE, "benchmarks": [timed("a")], "datetime": NOW.isoformat()}
    write_run(tmp_path, "m", run, now=NOW)
    with pytest.raises(GaugeError, match=f"had .*no schema, now {schema.VERSION}|more differences"):
        resumable(tmp_path, MACHINE, OPTIONS)


def test_new_records_take_the_place_of_old_ones(tmp_path: Path) -> None:
    save(
        tmp_path,
        *(case("a"), case("b", "failed"), case("c"), case("d", "failed")),
        claims=(claim("x", "toy", "refuted"), claim("x", "big"), claim("y", "toy")),
        benchmarks=(timed("a"), timed("b"), timed("c"), timed("d")),
    )
    whole = merged(
        resumable(tmp_path, MACHINE, OPTIONS),
        [case("new"), case("d", "crashed"), case("b", seconds=2.0)],
        [claim("z", "toy"), claim("x", "toy")],
        [timed("new"), timed("b", 2.0)],
    )
    assert whole.cases == [case("a"), case("b", seconds=2.0), case("c"), case("d", "crashed"), case("new")]
    assert whole.claims == [claim("x", "toy"), claim("x", "big"), claim("y", "toy"), claim("z", "toy")]
    # d's old time is gone: it crashed this time.
    assert whole.benchmarks == [timed("a"), timed("b", 2.0), timed("c"), timed("new")]


def test_all_records_of_a_case_are_replaced_together(tmp_path: Path) -> None:
    save(tmp_path, case("a"), case("b"), case("a", "failed"))
    resumption = resumable(tmp_path, MACHINE, OPTIONS)
    assert merged(resumption, [], [], []).cases == [case("a"), case("b"), case("a", "failed")]
    again = [case("a", seconds=1.0), case("a", "crashed")]
    assert merged(resumption, again, [], []).cases == [*again, case("b")]


def test_a_resumed_run_can_be_saved_and_resumed(tmp_path: Path) -> None:
    save(tmp_path, case("a"), case("b", "interrupted"), benchmarks=(timed("a"),), interrupted=True)
    whole = merged(resumable(tmp_path, MACHINE, OPTIONS), [case("b")], [], [timed("b")])
    save(tmp_path, *whole.cases, claims=tuple(whole.claims), benchmarks=tuple(whole.benchmarks))
    resumption = resumable(tmp_path, MACHINE, OPTIONS)
    assert resumption.run.name == "0002"
    assert list(resumption.done) == ["b.py::a", "b.py::b"]
