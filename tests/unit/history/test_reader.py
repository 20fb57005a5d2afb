"""What was written is read back, and what is no run is refused in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from peft_gauge.errors import GaugeError
from peft_gauge.history import reader, schema
from peft_gauge.history.reader import read_run, runs_in
from peft_gauge.history.schema import CONTROL_SAMPLES, KEY, SAMPLES, CaseRecord
from peft_gauge.history.writer import write_run
from tests.support.paths import ROOT

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
STEP = "benchmarks/test_speed.py::test_step[lora-toy-cpu]"
MACHINE = {"name": "m", "libraries": {"peft": "0.21.2", "bitsandbytes": None}, "accelerator": {"name": None}}
CLAIM = {"id": "identity", "model": "any", "verdict": "holds"}
MEASURED = CaseRecord(
    STEP,
    "test_speed",
    "passed",
    metrics={
        "step_seconds": 2.0,
        "control_seconds": 1.0,
        SAMPLES: {"step_seconds": [[1.0, 2.0], [3]]},
        CONTROL_SAMPLES: {"step_seconds": [[1.0, 1.0], [1.0]]},
    },
)
DIED = CaseRecord("benchmarks/test_x.py::test_y", "test_x", "out-of-memory", "9.1 GB asked for", {"peak_bytes": None})


def entry(fullname: str = STEP, **stats: Any) -> dict[str, Any]:
    return {"name": fullname.partition("::")[2], "fullname": fullname, "stats": {"median": 2.0, **stats}}


def plain(*entries: dict[str, Any]) -> dict[str, Any]:
    """A file of plain pytest-benchmark."""
    return {
        "machine_info": {"node": "host", "python_version": "3.11.7"},
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "benchmarks": list(entries),
        "datetime": NOW.isoformat(),
        "version": "5.3.1",
    }


def ours(*cases: CaseRecord, benchmarks: tuple[dict[str, Any], ...] = (), **changed: Any) -> dict[str, Any]:
    """A file of ours; ``changed`` replaces parts of its own section."""
    section = schema.as_json(list(cases or (MEASURED, DIED)), [CLAIM], {"seed": 0}) | changed
    return {**plain(*benchmarks), "machine_info": MACHINE, KEY: section}


def saved(folder: Path, run: dict[str, Any], machine: str = "m") -> Path:
    return write_run(folder, machine, run, now=NOW)


def broken(folder: Path, text: str | bytes) -> str:
    """What is said of a file with this ``text``, without its path."""
    path = folder / "0001_x_y.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(GaugeError) as caught:
        read_run(path)
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert "\n" not in message
    return message.removeprefix(f"{path} ")


def test_a_run_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = saved(tmp_path, ours(interrupted=True, benchmarks=(entry(data=[2.0]),)))
    run = read_run(path)
    assert run == reader.Run(
        path=path,
        machine=MACHINE,
        commit={"id": "0123456789abcdef", "dirty": True},
        when=NOW,
        options={"seed": 0},
        cases=(MEASURED, DIED),
        claims=(CLAIM,),
        benchmarks=(entry(data=[2.0]),),
        schema=schema.VERSION,
        interrupted=True,
    )
    assert run.libraries == {"peft": "0.21.2", "bitsandbytes": None}
    assert run.name == "0001"
    assert read_run(saved(tmp_path, ours())).interrupted is False


def test_rounds_of_schema_1_become_samples_of_one_process(tmp_path: Path) -> None:
    metrics = {"step_seconds": 2.0, "step_over_control": 2.0, "control_seconds": 1.0}
    speed = CaseRecord(STEP, "test_speed", "passed", metrics=dict(metrics))
    other = CaseRecord("b.py::test_count", "b", "passed", metrics={"trainable_params": 7})
    old = ours(speed, other, benchmarks=(entry(data=[1.0, 2.0, 3.0]),), schema=1)
    del old[KEY]["interrupted"], old[KEY]["resumed_from"]
    run = read_run(saved(tmp_path, old))
    assert run.cases[0].metrics == {**metrics, SAMPLES: {"step_seconds": [[1.0, 2.0, 3.0]]}}
    assert run.cases[1].metrics == {"trainable_params": 7}
    assert (run.schema, run.interrupted) == (1, False)


def test_samples_that_stand_with_the_case_are_not_replaced_by_rounds(tmp_path: Path) -> None:
    run = read_run(saved(tmp_path, ours(MEASURED, benchmarks=(entry(data=[9.0]),))))
    assert run.cases == (MEASURED,)


def test_rounds_go_to_no_metric_where_two_could_be_meant(tmp_path: Path) -> None:
    metrics = {"forward_seconds": 1.0, "backward_seconds": 2.0}
    both = CaseRecord(STEP, "test_speed", "passed", metrics=dict(metrics))
    run = read_run(saved(tmp_path, ours(both, benchmarks=(entry(data=[1.0]),), schema=1)))
    assert run.cases[0].metrics == metrics


def test_a_plain_file_has_a_passed_case_for_each_benchmark(tmp_path: Path) -> None:
    run = read_run(saved(tmp_path, plain(entry("t/test_a.py::test_b[1]", data=[1.0, 2.0, 4.0]), entry("test_c.py::d"))))
    assert run.cases == (
        CaseRecord(
            "t/test_a.py::test_b[1]",
            "test_a",
            "passed",
            metrics={"seconds": 2.0, SAMPLES: {"seconds": [[1.0, 2.0, 4.0]]}},
        ),
        CaseRecord("test_c.py::d", "test_c", "passed", metrics={"seconds": 2.0}),
    )
    assert (run.schema, run.options, run.claims, run.libraries, run.interrupted) == (None, {}, (), {}, False)


def test_pytest_benchmarks_own_output_is_read(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text("def test_sum(benchmark):\n    benchmark.pedantic(sum, ([1],), rounds=3)\n")
    path = tmp_path / "own.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
    subprocess.run([*command, f"--benchmark-json={path}", str(tmp_path)], check=True, capture_output=True, cwd=tmp_path)
    run = read_run(path)
    (case,) = run.cases
    rounds = json.loads(path.read_text())["benchmarks"][0]["stats"]["data"]
    assert (case.id, case.benchmark, run.name) == ("test_own.py::test_sum", "test_own", "own")
    assert case.metrics[SAMPLES] == {"seconds": [rounds]}
    assert case.metrics["seconds"] == sorted(rounds)[1]


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*/*.json")), ids=lambda path: path.name[:4])
def test_the_runs_of_this_repository_are_read(path: Path) -> None:
    run, document = read_run(path), json.loads(path.read_text())
    assert len(run.cases) == len(document[KEY]["cases"])
    assert run.machine["name"] == path.parent.name
    for timed in document["benchmarks"]:
        (case,) = [case for case in run.cases if case.id == timed["fullname"]]
        ((metric, (first, *further)),) = case.metrics[SAMPLES].items()
        assert metric.removesuffix("_seconds") in case.id
        if run.schema == 1:
            assert (first, further) == (timed["stats"]["data"], [])
            assert case.metrics[metric] == timed["stats"]["median"]


@pytest.mark.parametrize("text", ["2025-11-24T19:14:48.519716", "2025-11-24T19:14:48.519716Z"])
def test_a_time_without_a_zone_is_utc(text: str, tmp_path: Path) -> None:
    when = read_run(saved(tmp_path, plain() | {"datetime": text})).when
    assert when.utcoffset() == timedelta(0)
    assert when == datetime(2025, 11, 24, 19, 14, 48, 519716, tzinfo=UTC)


def test_what_cannot_be_opened_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GaugeError, match="nowhere.json does not exist"):
        read_run(tmp_path / "nowhere.json")
    with pytest.raises(GaugeError, match="is a folder; name one of the runs in it"):
        read_run(tmp_path)
    path = saved(tmp_path, ours())

    def denied(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(GaugeError, match="0001_.*json cannot be read: Permission denied"):
        read_run(path)


def test_a_file_cut_anywhere_is_truncated(tmp_path: Path) -> None:
    whole = json.dumps(ours() | {"x": [True, None, -1.5e-7, 'a\\"\u00e9']}, indent=1)
    for end in range(1, len(whole)):
        assert broken(tmp_path, f"\n {whole[:end]}").startswith("is truncated: it ends in line"), whole[:end][-30:]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("benchmark results", "is not JSON: Expecting value (line 1, column 1)"),
        ('{\n"a": oops}', "is not JSON: Expecting value (line 2, column 6)"),
        ('{"a": x}\n', "is not JSON: Expecting value (line 1, column 7)"),
        ('{"a": 1} x', "is not JSON: Extra data (line 1, column 10)"),
        ('{"a": 1} {"b": 2}', "is not JSON: Extra data (line 1, column 10)"),
        (b'{"a": "\xff"}', "is not JSON: it is not valid UTF-8"),
        ("[" * 200_000, "cannot be parsed as JSON: "),
        ('{"a": ' + "1" * 5000 + "}", "cannot be parsed as JSON: "),
        ("[1, 2]", "is JSON, but not a benchmark run"),
        ("{}", "is JSON, but not a benchmark run"),
        ('{"benchmarks": {}}', "is JSON, but not a benchmark run"),
        ('{"benchmarks": [NaN]}', "holds NaN, which is not valid JSON"),
        ('{"benchmarks": [-Infinity]}', "holds -Infinity, which is not valid JSON"),
        ('{"benchmarks": [1e999]}', "holds 1e999, which is too large for a number"),
    ],
    ids=lambda value: None if len(value) > 60 else str(value),
)
def test_what_is_no_run_is_refused(text: str | bytes, message: str, tmp_path: Path) -> None:
    assert broken(tmp_path, text).startswith(message)


def test_a_newer_schema_asks_for_an_upgrade(tmp_path: Path) -> None:
    message = broken(tmp_path, json.dumps(ours(schema=schema.VERSION + 1)))
    assert message.startswith("was written by a newer peft-gauge")
    assert message.endswith("upgrade")


CASE: dict[str, Any] = {"id": "b::c", "benchmark": "b", "outcome": "passed", "reason": None, "metrics": {}}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"schema": "2"}, 'peft_gauge.schema is "2", not an integer'),
        ({"schema": True}, "peft_gauge.schema is true, not an integer"),
        ({"schema": 0}, "peft_gauge.schema is 0, but the first schema is 1"),
        ({"options": None}, "peft_gauge.options is null, not an object"),
        ({"interrupted": 1}, "peft_gauge.interrupted is 1, not true or false"),
        ({"cases": {}}, "peft_gauge.cases is {}, not a list"),
        ({"cases": [CASE, 3]}, "peft_gauge.cases[1] is 3, not an object"),
        ({"cases": [{"benchmark": "b"}]}, "a case's id is missing"),
        ({"cases": [CASE | {"benchmark": 3}]}, "case b::c: benchmark is 3, not a string"),
        ({"cases": [CASE | {"reason": []}]}, "case b::c: reason is [], not a string"),
        ({"cases": [CASE | {"metrics": None}]}, "case b::c: metrics is null, not an object"),
        ({"cases": [CASE | {"outcome": "exploded"}]}, "case b::c: outcome is 'exploded', not one of crashed, failed"),
        ({"cases": [CASE | {"metrics": {SAMPLES: [1.0]}}]}, f"case b::c: {SAMPLES} is [1.0], not an object"),
        ({"claims": [{"id": "x", "model": "m"}]}, "claim x: verdict is missing"),
        ({"claims": [{"id": "x", "model": None}]}, "claim x: model is null, not a string"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_type_is_named_with_its_place(section: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert broken(tmp_path, json.dumps(ours(**section))).startswith(f"is malformed: {message}")


@pytest.mark.parametrize("processes", [1.0, [1.0], [[1.0], None], [["1"]], [[None]], [[-1.0]], [[True]], [[10**400]]])
@pytest.mark.parametrize("kind", [SAMPLES, CONTROL_SAMPLES])
def test_samples_are_seconds_of_each_process(kind: str, processes: Any, tmp_path: Path) -> None:
    run = ours(cases=[CASE | {"metrics": {kind: {"step_seconds": processes}}}])
    expected = f"is malformed: case b::c: {kind} of step_seconds are not one list of seconds per process"
    assert broken(tmp_path, json.dumps(run)) == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"datetime": "yesterday"}, "datetime is 'yesterday', which is not a date"),
        ({"datetime": 5}, "datetime is 5, not a string"),
        ({"machine_info": "m"}, 'machine_info is "m", not an object'),
        ({"machine_info": {}}, "machine_info.name is missing"),
        ({"machine_info": {"name": "m", "accelerator": "H100"}}, 'machine_info.accelerator is "H100", not an object'),
        (
            {"machine_info": {"name": "m", "libraries": {"peft": 0.2}}},
            "machine_info.libraries.peft is 0.2, not a string",
        ),
        ({"commit_info": []}, "commit_info is [], not an object"),
        ({"benchmarks": ["x"]}, 'benchmarks[0] is "x", not an object'),
        ({"benchmarks": [{}]}, "a benchmark's fullname is missing"),
        ({"benchmarks": [entry("a::b") | {"stats": None}]}, "benchmark a::b: stats is null, not an object"),
        ({"benchmarks": [entry("a::b", data=["1"])]}, "benchmark a::b: stats.data is not a list of seconds"),
        ({KEY: [1]}, "peft_gauge is [1], not an object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_part_of_the_file_is_named(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert broken(tmp_path, json.dumps(ours() | changed)) == f"is malformed: {message}"


def test_a_plain_benchmark_without_a_median_is_named(tmp_path: Path) -> None:
    message = broken(tmp_path, json.dumps(plain(entry("a::b", median="1"))))
    assert message == "is malformed: benchmark a::b: stats.median is not a time in seconds"


def test_a_file_without_a_commit_is_read(tmp_path: Path) -> None:
    run = {name: value for name, value in plain(entry()).items() if name != "commit_info"}
    assert read_run(saved(tmp_path, run)).commit == {}


def test_other_peoples_machine_info_may_hold_anything(tmp_path: Path) -> None:
    run = read_run(saved(tmp_path, plain() | {"machine_info": {"libraries": ["torch"], "accelerator": "H100"}}))
    assert run.libraries == {}


def test_runs_are_listed_by_machine_and_number(tmp_path: Path) -> None:
    names = ["b/10000_x.json", "b/9999_x.json", "b/baseline.json", "a/0002_x.json", "0007_x.json"]
    unwanted = ["b/.0001.claim", "b/.x.json", "b/.y.part", "b/notes.txt", ".hidden/0001_x.json", "b/deep/0001_x.json"]
    for name in (*names, *unwanted):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("not even JSON")
    (tmp_path / "b" / "0001_folder.json").mkdir()
    listed = [str(path.relative_to(tmp_path)) for path in runs_in(tmp_path)]
    assert listed == ["0007_x.json", "a/0002_x.json", "b/baseline.json", "b/9999_x.json", "b/10000_x.json"]
    assert runs_in(tmp_path, "a") == [tmp_path / "a/0002_x.json"] == runs_in(tmp_path / "a")
    assert runs_in(tmp_path, "c") == []


@pytest.mark.parametrize("name", ["nowhere", "file.json"])
def test_runs_are_in_a_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text("{}")
    with pytest.raises(GaugeError, match="is not a folder of saved runs"):
        runs_in(tmp_path / name)


def test_a_folder_that_cannot_be_listed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(_: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(GaugeError, match="cannot be listed: Permission denied"):
        runs_in(tmp_path)


@pytest.mark.parametrize(
    ("selection", "id_", "covered"),
    [
        (["benchmarks"], "benchmarks/test_a.py::test_b[c]", True),
        (["."], "benchmarks/test_a.py::test_b[c]", True),
        (["bench"], "benchmarks/test_a.py::test_b[c]", False),
        (["benchmarks/test_a.py"], "benchmarks/test_a.py::test_b[c]", True),
        (["benchmarks/test_a.py::test_b"], "benchmarks/test_a.py::test_b[c]", True),
        (["benchmarks/test_a.py::test_b"], "benchmarks/test_a.py::test_bc", False),
        (["benchmarks/test_a.py::test_b[c]"], "benchmarks/test_a.py::test_b[c]", True),
        (["benchmarks/test_a.py::test_b[c]"], "benchmarks/test_a.py::test_b[d]", False),
        (["benchmarks/test_c.py", "benchmarks/test_a.py"], "benchmarks/test_a.py::test_b[c]", True),
    ],
)
def test_what_a_run_was_asked_for(selection: list[str], id_: str, covered: bool) -> None:
    assert schema.Selection(tuple(selection)).covers(id_) == covered


def test_a_run_says_what_it_was_asked_for(tmp_path: Path) -> None:
    asked = schema.Selection(("benchmarks",), "not slow", "lora or 'x'", frozenset({"b", "a"}))
    document = ours()
    assert read_run(saved(tmp_path, document)).selection is None  # as runs were before
    document[KEY]["selection"] = asked.as_json()
    assert json.dumps(document[KEY]["selection"]["deselected"]) == '["a", "b"]'
    assert read_run(saved(tmp_path, document)).selection == asked
    assert asked.expressions == """-m 'not slow' -k 'lora or '"'"'x'"'"''"""


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        ([], "peft_gauge.selection is [], not an object"),
        ({}, "args is missing"),
        ({"args": "x"}, 'selection.args is "x", not a list'),
        ({"args": [1]}, "selection.args is not a list of strings"),
        ({"args": [], "markers": 1}, "selection.markers is 1, not a string"),
        ({"args": [], "deselected": [None]}, "selection.deselected is not a list of strings"),
    ],
)
def test_a_selection_that_is_none_is_malformed(selection: Any, said: str, tmp_path: Path) -> None:
    document = ours()
    document[KEY]["selection"] = selection
    with pytest.raises(GaugeError, match=re.escape(said)):
        read_run(saved(tmp_path, document))


def test_reading_needs_no_heavy_library() -> None:
    code = "import sys, peft_gauge.history.resumption; print({'torch', 'numpy', 'rich', 'pytest'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"
