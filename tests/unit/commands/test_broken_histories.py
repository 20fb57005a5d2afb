"""Whatever lies where a run should: `peft-gauge compare` says what is wrong in one line, and leaves with code 2."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from peft_gauge.errors import GaugeError
from peft_gauge.history import reader
from peft_gauge.history.reader import read_run, runs_in
from peft_gauge.history.schema import KEY, SAMPLES, VERSION

if TYPE_CHECKING:
    from tests.conftest import Run as Command

STEP = "benchmarks/test_speed.py::test_step[lora-toy-cpu]"
Document = dict[str, Any]


def case(metrics: Document | None = None, id_: str = STEP) -> Document:
    metrics = {"settings": {"batch": 1}, "peak_bytes": 1_000_000} if metrics is None else metrics
    return {"id": id_, "benchmark": "test_speed", "outcome": "passed", "reason": None, "metrics": metrics}


def timed(metric: str, *processes: list[float]) -> Document:
    return {"settings": {"batch": 1}, SAMPLES: {metric: list(processes)}}


def document(*cases: Document, machine: str = "m", **section: Any) -> Document:
    return {
        "machine_info": {"name": machine},
        "commit_info": {},
        "benchmarks": [],
        "datetime": "2026-01-02T03:04:05+00:00",
        KEY: {"schema": VERSION, "options": {}, "interrupted": False, "cases": list(cases or [case()]), "claims": []}
        | section,
    }


def whole() -> str:
    return json.dumps(document())


Saved = Callable[..., Path]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    def save(text: str | bytes | Document, name: str = "0002_x_y.json") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(text) if isinstance(text, dict) else text
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return save


def with_nan() -> str:
    return json.dumps(document(case({"peak_bytes": math.nan})))


BROKEN: dict[str, tuple[str | bytes, str]] = {
    "truncated": (whole()[: len(whole()) // 2], "is truncated"),
    "empty": ("", "is empty"),
    "blank": ("\n \n", "is empty"),
    "binary": (bytes(range(256)) * 40, "not valid UTF-8"),
    "zeros": (b"\0" * 4096, "is not JSON"),
    "no object": ("[]", "not a benchmark run"),
    "other JSON": ('{"name": "x"}', "not a benchmark run"),
    "deep": ("[" * 100_000, "parsed as JSON"),
    "NaN": (with_nan(), "holds NaN"),
    "infinite": (whole().replace("1000000", "1e999"), "too large for a number"),
    "negative time": (json.dumps(document(case(timed("step_seconds", [1.0, -0.1])))), "not one list of seconds"),
    "time as text": (json.dumps(document(case(timed("step_seconds", ["1"])))), "not one list of seconds"),  # type: ignore[list-item]
    "newer": (json.dumps(document(schema=VERSION + 1)), "upgrade"),
    "schema 0": (json.dumps(document(schema=0)), "the first schema is 1"),
    "schema as text": (json.dumps(document(schema="2")), "not an integer"),
    "cases as object": (json.dumps(document(cases={})), "not a list"),
    "case without id": (json.dumps(document(cases=[{}])), "id is missing"),
    "case twice": (json.dumps(document(case(), case({"peak_bytes": 2}))), "more than one record"),
    "name leads out": (json.dumps(document(machine="../../etc")), "not a valid name of a machine"),
}


@pytest.mark.parametrize(("text", "says"), BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("order", ["BASE", "NEW"])
def test_a_broken_file_is_one_line(
    text: str | bytes, says: str, order: str, saved: Saved, run_command: Command
) -> None:
    good, bad = saved(document(), "0001_x_y.json"), saved(text)
    paths = [bad, good] if order == "BASE" else [good, bad]

    code, out, err = run_command("compare", *map(str, paths))

    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert str(bad) in err
    assert says in err


def test_a_whole_file_is_none_of_these(saved: Saved, run_command: Command) -> None:
    assert run_command("compare", str(saved(whole(), "0001_x_y.json")), str(saved(whole())))[0] == 0


def test_a_case_that_failed_in_its_clean_up_has_two_records(saved: Saved) -> None:
    """That is no case twice."""
    failed = case() | {"outcome": "failed", "reason": "the clean-up broke"}
    assert [record.outcome for record in read_run(saved(document(case(), failed))).cases] == ["passed", "failed"]


def test_a_file_too_large_is_refused_before_it_is_read(
    saved: Saved, run_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, large = saved(document(), "0001_x_y.json"), saved("{")
    os.truncate(large, 500_000_000)  # sparse: it takes no room
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read") if path == large else b"")

    code, out, err = run_command("compare", str(large), str(good))

    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "500 MB" in err
    assert f"{reader.MOST_BYTES // 1_000_000} MB" in err


def test_a_file_just_not_too_large_is_read(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(whole())
    monkeypatch.setattr(reader, "MOST_BYTES", path.stat().st_size)
    assert read_run(path).cases[0].id == STEP
    monkeypatch.setattr(reader, "MOST_BYTES", path.stat().st_size - 1)
    with pytest.raises(GaugeError, match="is too large"):
        read_run(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, saved: Saved, run_command: Command) -> None:
    pipe = tmp_path / "0003_x_y.json"
    os.mkfifo(pipe)

    code, out, err = run_command("compare", str(saved(document())), str(pipe))

    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "is not a regular file" in err
    assert pipe not in runs_in(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="whoever is root may read everything")
def test_an_unreadable_file_is_one_line(saved: Saved, run_command: Command) -> None:
    good, secret = saved(document(), "0001_x_y.json"), saved(document())
    secret.chmod(0)

    code, _, err = run_command("compare", str(good), str(secret))

    assert (code, err.count("\n")) == (2, 1)
    assert "cannot be read: Permission denied" in err


def test_a_folder_named_like_a_run(tmp_path: Path, saved: Saved, run_command: Command) -> None:
    good = saved(document(), "m/0001_x_y.json")
    folder = tmp_path / "m" / "0002_x_y.json"
    folder.mkdir()

    code, _, err = run_command("compare", str(good), str(folder))
    assert (code, err.count("\n")) == (2, 1)
    assert "contains no saved runs" in err
    assert runs_in(tmp_path, "m") == [good]  # and it is not taken for the newest


# Files that can be read, and yet do not go together


def test_another_unit_is_another_figure(saved: Saved, run_command: Command) -> None:
    """1.0 s is not compared with 1000 ms, nor with anything."""
    old = saved(document(case(timed("step_seconds", [1.0] * 5))), "0001_x_y.json")
    new = saved(document(case({"settings": {"batch": 1}, "step_ms": 1000.0})))
    table = old.parent / "comparison.json"

    code, _, _ = run_command("compare", str(old), str(new), "--json", str(table))

    (comparison,) = json.loads(table.read_text())["comparisons"]
    labels = {row["metric"]: row["label"] for row in comparison["rows"] if row["label"]}
    assert labels == {"step_seconds": "MISSING"}
    assert any("step_ms" in note for note in comparison["notes"])  # no rule knows such a metric
    assert code == 0
    assert run_command("compare", str(old), str(new), "--strict")[0] == 1


def test_another_unit_of_a_known_figure_is_new(saved: Saved, run_command: Command) -> None:
    old = saved(document(case({"settings": {"batch": 1}, "peak_bytes": 5_000_000})), "0001_x_y.json")
    new = saved(document(case({"settings": {"batch": 1}, "peak_kib_bytes": 4883})))
    table = old.parent / "comparison.json"

    run_command("compare", str(old), str(new), "--json", str(table))

    (comparison,) = json.loads(table.read_text())["comparisons"]
    assert {row["metric"]: row["label"] for row in comparison["rows"] if row["label"]} == {
        "peak_bytes": "MISSING",
        "peak_kib_bytes": "NEW",
    }


def test_runs_of_two_machines_in_one_folder_are_not_compared(saved: Saved, run_command: Command) -> None:
    """Somebody copied a run into another machine's folder."""
    saved(document(machine="m"), "m/0001_x_y.json")
    stranger = saved(document(machine="other"), "m/0002_x_y.json")

    code, _, err = run_command("compare", "--last", "2", "--results", str(stranger.parents[1]), "--machine", "m")

    assert (code, err.count("\n")) == (2, 1)
    assert "machine: m → other" in err


def test_a_folder_of_two_machines_asks_which(saved: Saved, run_command: Command) -> None:
    first, second = saved(document(), "m/0001_x_y.json"), saved(document(machine="n"), "n/0001_x_y.json")

    code, out, err = run_command("compare", str(first), str(second.parents[1]))

    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "several machines" in err


def test_broken_files_do_not_hide_the_others(saved: Saved) -> None:
    good = [saved(document(), f"m/{number:04d}_x_y.json") for number in (1, 4)]
    saved(whole()[:50], "m/0002_x_y.json")
    saved(b"\xff\xfe", "m/0003_x_y.json")
    read, passed_over = [], []

    for path in runs_in(good[0].parents[1]):
        try:
            read.append(read_run(path).path)
        except GaugeError as error:
            passed_over.append(str(error))

    assert read == good
    assert len(passed_over) == 2


# Names in a file are names, and no paths


@pytest.mark.parametrize("name", ["../outside", "..", ".", "", "/etc", "a/b", "a\\b", "x\0y", ".hidden"])
def test_a_machine_s_name_never_leads_out_of_the_results(name: str, tmp_path: Path, saved: Saved) -> None:
    saved(document(), "outside/0001_x_y.json")
    results = tmp_path / "results"
    results.mkdir()
    with pytest.raises(GaugeError, match="not a valid name of a machine"):
        runs_in(results, name)
    with pytest.raises(GaugeError, match="not a valid name of a machine"):
        read_run(saved(document(machine=name)))


def test_a_case_s_id_is_no_path(tmp_path: Path, saved: Saved, run_command: Command) -> None:
    ids = [f"../../outside/{name}.py::test[/etc/passwd]" for name in "ab"]
    old = saved(document(case(id_=ids[0])), "0001_x_y.json")
    new = saved(document(case(id_=ids[0]), case(id_=ids[1])))
    before = {path: path.read_bytes() for path in (old, new)}
    table = tmp_path / "out" / "comparison.json"
    table.parent.mkdir()

    code, _, _ = run_command("compare", str(old), str(new), "--json", str(table))

    assert code == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path != table} == before
    assert {row["test"] for row in json.loads(table.read_text())["comparisons"][0]["rows"]} == set(ids)
