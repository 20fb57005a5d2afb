"""Runs at an address of fsspec are as safe as in a local folder: whole, never overwritten, and never lost."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pytest

from peft_gauge.errors import GaugeError
from peft_gauge.history import store
from peft_gauge.history.reader import MOST_BYTES, read_run, runs_in
from peft_gauge.history.resumption import resumable
from peft_gauge.history.selection import newest_in_common
from peft_gauge.history.shards import joined
from peft_gauge.history.writer import write_run
from tests.support.facts import lacking
from tests.support.paths import ROOT
from tests.support.planted_stores import Counting, register
from tests.unit.history import test_shards
from tests.unit.history.test_resumption import MACHINE, OPTIONS, case, save

Command = Callable[..., tuple[int, str, str]]

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
RUN: dict[str, Any] = {"commit_info": {"id": "0123456789abcdef"}, "benchmarks": []}
WRITERS = 8


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache of this test, and the planted file systems."""
    register()
    monkeypatch.setenv("PEFT_GAUGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_ADDRESSES", {})
    monkeypatch.setattr(store, "_SIZES", {})
    return tmp_path / "cache"


def address(tmp_path: Path, protocol: str = "memory") -> str:
    return f"{protocol}://{tmp_path.name}/runs"


def stored(tmp_path: Path) -> list[str]:
    """Everything stored in memory by this test, hidden objects included."""
    found = fsspec.filesystem("memory").find(f"/{tmp_path.name}")
    return sorted(path.removeprefix(f"/{tmp_path.name}/") for path in found)


def unsent(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "unsent").rglob("*") if path.is_file())


def test_a_run_is_saved_and_read_at_an_address(tmp_path: Path, cache: Path) -> None:
    results = store.place(address(tmp_path))
    first, second = save(results, case("a")), save(results, case("b"))

    names = [f"runs/m/000{number}_0123456789ab_20260102_030405.json" for number in (1, 2)]
    assert stored(tmp_path) == names
    assert unsent(cache) == []
    assert store.shown(second) == f"memory://{tmp_path.name}/{names[1]}"
    assert runs_in(results) == runs_in(results, "m") == runs_in(results / "m") == [first, second]
    assert [record.id for record in read_run(second).cases] == ["b.py::b"]
    assert runs_in(results, "other") == []


def test_another_machine_reads_what_this_one_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store.place(address(tmp_path)), case("a"))
    monkeypatch.setenv("PEFT_GAUGE_CACHE", str(tmp_path / "elsewhere"))
    results = store.place(address(tmp_path) + "/")
    (path,) = runs_in(results)
    assert not path.exists()
    assert read_run(path).cases == (case("a"),)
    assert resumable(results, MACHINE, OPTIONS).done == {"b.py::a": case("a")}


def test_a_file_is_fetched_once_and_again_if_its_size_differs(tmp_path: Path) -> None:
    results = store.place(address(tmp_path, "counting"))
    paths = [save(results, case("a"), case(name)) for name in ("x", "y", "z")]
    for path in paths[:2]:
        path.unlink()
    Counting.read.clear()
    chosen = newest_in_common(runs_in(results), 2)
    assert [run.path for run in chosen.runs] == paths[1:]
    assert Counting.read == [paths[1].name]  # the newest was kept as it was saved, the oldest is not needed
    paths[1].write_text("{")
    assert read_run(paths[1]).cases[1].id == "b.py::y"
    assert Counting.read == [paths[1].name] * 2


def test_the_address_of_a_file_is_one_run(tmp_path: Path) -> None:
    saved = save(store.place(address(tmp_path)), case("a"))
    path = store.place(store.shown(saved))
    assert read_run(path).cases == (case("a"),)
    assert runs_in(path.parent) == [path]
    with pytest.raises(GaugeError, match=r"^memory://.*/0009_x.json does not exist$"):
        read_run(store.place(f"{address(tmp_path)}/m/0009_x.json"))


def test_a_file_too_large_for_a_run_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = store.place(address(tmp_path, "counting"))
    path = save(results, case("a"))
    path.unlink()
    monkeypatch.setitem(store._SIZES, path, MOST_BYTES + 1)
    Counting.read.clear()
    with pytest.raises(GaugeError, match="too large for a run"):
        read_run(path)
    assert Counting.read == []


def test_hidden_and_other_objects_are_not_runs(tmp_path: Path) -> None:
    results = store.place(address(tmp_path))
    path = save(results, case("a"))
    memory = fsspec.filesystem("memory")
    for name in (".0002.claim", ".0003_x.json", "notes.txt", "traces/0004_x.json"):
        memory.pipe_file(f"/{tmp_path.name}/runs/m/{name}", b"{}")
    assert runs_in(results) == [path]
    # A claim left behind by a writer that was killed costs its number only.
    assert save(results, case("b")).name.startswith("0003_")
    assert "runs/m/.0002.claim" in stored(tmp_path)


# Two writers


def written(results: str, number: int) -> str:
    return write_run(store.place(results), "m", RUN | {"number": number}, now=NOW).name


def numbers_of(names: list[str]) -> list[int]:
    return sorted(int(name.partition("_")[0]) for name in names)


@pytest.mark.parametrize("protocol", ["memory", "racing"])
def test_threads_get_different_numbers(protocol: str, tmp_path: Path) -> None:
    with ThreadPoolExecutor(WRITERS) as pool:
        names = list(pool.map(lambda number: written(address(tmp_path, protocol), number), range(WRITERS)))
    assert numbers_of(names) == list(range(1, WRITERS + 1))
    assert stored(tmp_path) == sorted(f"runs/m/{name}" for name in names)
    runs = [json.loads(path.read_bytes())["number"] for path in runs_in(store.place(address(tmp_path, protocol)))]
    assert sorted(runs) == list(range(WRITERS))


def test_a_number_saved_between_look_and_claim_is_not_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(address(tmp_path), 0)
    really, looks = store._numbers, iter([True])
    monkeypatch.setattr(store, "_numbers", lambda remote: [] if next(looks, False) else really(remote))
    assert written(address(tmp_path), 1).startswith("0002_")
    assert len(stored(tmp_path)) == 2


def test_processes_get_different_numbers_in_a_folder_given_as_an_address(tmp_path: Path) -> None:
    results = f"file://{tmp_path}/runs"
    context = multiprocessing.get_context("spawn")
    writers = WRITERS // 2  # a new interpreter each
    with ProcessPoolExecutor(writers, mp_context=context) as pool:
        names = list(pool.map(written, [results] * WRITERS, range(WRITERS)))
    assert numbers_of(names) == list(range(1, WRITERS + 1))
    files = list((tmp_path / "runs/m").iterdir())
    assert sorted(json.loads(file.read_text())["number"] for file in files) == list(range(WRITERS))
    assert store.place(results) == tmp_path / "runs"
    assert store.address_of(store.place(results)) is None


@pytest.mark.parametrize("protocol", ["plain", "ignoring"])
def test_without_exclusive_creation_names_cannot_collide(protocol: str, tmp_path: Path, cache: Path) -> None:
    """Each writer lists before any of them has saved: all take number 1, and none replaces another's run."""
    results = store.place(address(tmp_path, protocol))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_numbers", lambda remote: [])
        paths = [write_run(results, "m", RUN | {"number": number}, now=NOW) for number in range(WRITERS)]
    assert len(stored(tmp_path)) == WRITERS
    assert all(lacking(path.name, "0001_0123456789ab_20260102_030405_") == [] for path in paths)
    assert [json.loads(path.read_bytes())["number"] for path in paths] == list(range(WRITERS))
    assert write_run(results, "m", RUN, now=NOW).name.startswith("0002_")
    assert unsent(cache) == []


# Stores that refuse


@pytest.mark.parametrize(
    ("protocol", "facts"),
    [
        ("denying", ("Access Denied",)),
        ("unreachable", ("cannot be listed", "Could not connect")),
        ("tearing", ("is not what was sent",)),
    ],
)
def test_a_run_that_the_store_refuses_is_kept(
    protocol: str, facts: tuple[str, ...], tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(GaugeError) as refusal:
        save(store.place(address(tmp_path, protocol)), case("a"))
    (kept,) = unsent(cache)
    assert lacking(str(refusal.value), f"{protocol}://", *facts, f"the run is kept in {kept}") == []
    assert "\n" not in str(refusal.value)
    assert read_run(kept).cases == (case("a"),)


def test_a_missing_package_is_named_and_the_run_is_kept(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    results = store.place("s3://bucket/runs")
    with pytest.raises(GaugeError, match=r"s3fs.*peft-gauge\[remote\]"):
        store.check(results)
    with pytest.raises(GaugeError) as refusal:
        save(results, case("a"))
    (kept,) = unsent(cache)
    assert lacking(str(refusal.value), "s3://bucket/runs/m", "s3fs", "peft-gauge[remote]", str(kept)) == []


def test_an_unknown_protocol_is_named(cache: Path) -> None:
    with pytest.raises(GaugeError, match=r"^sss://bucket/runs cannot be opened: Protocol not known: sss$"):
        store.check(store.place("sss://bucket/runs"))


def test_without_a_cache_the_run_is_kept_in_results(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GaugeError, match=r"Access Denied; the run is kept in .*/results/m/0001_"):
        save(store.place(address(tmp_path, "denying")), case("a"))
    assert save(store.place(address(tmp_path)), case("a")).name.startswith("0001_")


def test_a_local_folder_needs_no_fsspec(tmp_path: Path) -> None:
    save(tmp_path / "runs", case("a"))
    program = (
        "import sys; from peft_gauge.history import reader, store; "
        f"(path,) = reader.runs_in(store.place({str(tmp_path / 'runs')!r})); reader.read_run(path); "
        "assert 'fsspec' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


# Commands


def test_commands_read_and_write_addresses(tmp_path: Path, run_command: Command) -> None:
    results = store.place(address(tmp_path))
    names = ("a", "b", "c")
    shards = [
        test_shards.shard(results, number, name, case=case(name, trainable_params=7))
        for number, name in enumerate(names, 1)
    ]
    code, out, err = run_command("merge", *map(store.shown, shards), "--results", address(tmp_path))
    assert (code, err) == (0, "")
    merged = f"{address(tmp_path)}/m/0004_0123456789ab_"
    assert out.startswith(f"saved {merged}")
    assert joined(shards).shards is None

    save(results, *(case(name, trainable_params=8) for name in names))
    code, out, _ = run_command("compare", "--last", "2", "--machine", "m", "--results", address(tmp_path))
    assert code == 1
    assert lacking(out, "trainable_params") == []
    code, out, err = run_command("compare", address(tmp_path))
    assert code == 1, err
    assert lacking(out, merged) == []
    code, out, err = run_command("report", "--markdown", address(tmp_path))
    assert code == 0, err
    assert run_command("claims", address(tmp_path))[0] == 0
    code, _, err = run_command("compare", f"memory://{tmp_path.name}/none")
    assert (code, err.count("\n")) == (2, 1)
    assert lacking(err, f"memory://{tmp_path.name}/none contains no saved runs") == []
