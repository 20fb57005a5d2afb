"""A kept brief is the brief of the file as it is now, and a long history is read once."""

from __future__ import annotations

import os
import sqlite3
import tracemalloc
from pathlib import Path

import pytest

from peft_gauge import paths
from peft_gauge.history import briefs as module
from peft_gauge.history.briefs import Brief, Timed, Unpacking, _brief_case, brief_of, briefs, packed, restored
from peft_gauge.history.intervals import estimate
from peft_gauge.history.metrics import RecordedCase, Samples, cases_of, is_number
from peft_gauge.history.reader import read_run, runs_in
from peft_gauge.history.rules import read_rules
from peft_gauge.report.html.page_data import gather
from tests.support.many_runs import write_machine, write_night
from tests.support.paths import RESULTS


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every history is long enough to be kept, in a folder of its own."""
    monkeypatch.setenv("PEFT_GAUGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "KEPT_FROM", 1)
    return tmp_path / "cache" / "histories" / "briefs.sqlite"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for machine in (0, 1):
        write_machine(tmp_path / "results", 4, machine, cases=12)
    return tmp_path / "results"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all files whose content is read from now on."""
    names: list[str] = []
    really = Path.read_bytes

    def noted(path: Path) -> bytes:
        if path.suffix == ".json":
            names.append(f"{path.parent.name}/{path.name[:4]}")
        return really(path)

    monkeypatch.setattr(Path, "read_bytes", noted)
    return names


def fresh(files: list[Path]) -> list[Brief]:
    return [brief_of(read_run(file)) for file in files]


def kept(results: Path) -> list[Brief]:
    left_out: list[str] = []
    found = list(briefs(runs_in(results), left_out))
    assert left_out == []
    return found


# The brief of a run


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*.json")), ids=lambda path: path.name[:4])
def test_a_brief_has_all_that_two_runs_are_compared_by(path: Path) -> None:
    run = read_run(path)
    brief, cases = brief_of(run), cases_of(run)
    assert list(brief.cases) == list(cases)
    for id_, case in cases.items():
        short = brief.cases[id_]
        assert (short.metrics, short.form.settings) == (case.metrics, case.settings)
        assert list(short.metrics) == list(case.metrics)
        assert [short.form.names[place] for place in short.form.numbers] == [
            name for name, value in case.metrics.items() if is_number(value)
        ]
        assert (short.form.id, short.form.outcome) == (id_, case.outcome)
        assert list(short.times) == list(case.samples)
    for one in cases.values():
        for other in cases.values():
            same = brief.cases[one.id].form.fingerprint == brief.cases[other.id].form.fingerprint
            assert same == (one.fingerprint == other.fingerprint)
    assert restored(brief.run) == run
    assert [list(case.metrics) for case in brief.run.cases] == [list(case.metrics) for case in run.cases]


def timed(*processes: tuple[float, ...], control: tuple[tuple[float, ...], ...] | None = None) -> Timed:
    case = RecordedCase("t", "b", "passed", None, {"s": 1.0}, {"s": Samples(processes, control)}, {}, None)
    return _brief_case(case).times["s"]


def test_times_of_one_process_are_its_centres_and_interval() -> None:
    rounds, slower = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), (2.0, 4.0, 6.0, 8.0, 10.0, 15.0)
    base, new = Samples((rounds,), (slower,)), Samples((slower,), (rounds,))
    spread = read_rules().host_spread
    short = timed(rounds, control=(slower,)), timed(slower, control=(rounds,))
    for over_control, name in ((False, "log_seconds"), (True, "log_over_control")):
        ratio = getattr(short[1], name) - getattr(short[0], name)
        assert ratio == pytest.approx(estimate(base, new, spread, over_control=over_control).log_ratio, rel=1e-12)
    assert short[0].interval == (1.0, 6.0)
    assert short[0].samples is None


def test_times_that_allow_no_estimate_have_no_centre() -> None:
    assert timed((0.0, 1.0, 1.0, 1.0, 1.0, 2.0))[:3] == (False, None, None)
    assert timed((1.0, 2.0, 3.0, 4.0, 5.0, 6.0)).log_over_control is None


def test_times_of_several_processes_are_kept() -> None:
    processes = ((1.0, 2.0, 3.0), (2.0, 3.0, 4.0))
    assert timed(*processes).samples == Samples(processes)


def test_equal_parts_of_one_brief_and_the_next_are_one_object(tmp_path: Path) -> None:
    one, other = (brief_of(read_run(path)) for path in write_machine(tmp_path, 2, 0))
    unpacked = Unpacking()
    first, second = (unpacked(packed(brief)) for brief in (one, other))
    assert (first, second) == (one, other)
    assert second.run.machine is first.run.machine
    for id_, case in second.cases.items():
        assert case.form is first.cases[id_].form
        assert (case.values is first.cases[id_].values) == (case.values == first.cases[id_].values)
    assert len({case.values is first.cases[id_].values for id_, case in second.cases.items()}) == 2


# Kept briefs are those of the files


def test_a_second_look_reads_no_file(results: Path, opened: list[str]) -> None:
    first = kept(results)
    assert first == fresh(runs_in(results))
    opened.clear()
    assert kept(results) == first
    assert opened == []


def test_a_file_that_is_added_is_read_and_no_other(results: Path, opened: list[str]) -> None:
    kept(results)
    write_night(results, 1, 4, cases=12)
    opened.clear()
    found = kept(results)
    assert opened == ["node-01/0005"]
    assert found == fresh(runs_in(results))


def test_a_file_that_is_replaced_is_read_again(results: Path, opened: list[str]) -> None:
    kept(results)
    changed, other = runs_in(results)[1], runs_in(results)[2]
    text = changed.read_text()
    changed.write_text(text.replace('"smollm2-135m"', '"smollm2-531m"'))  # as many bytes
    os.utime(changed, ns=(changed.stat().st_atime_ns, changed.stat().st_mtime_ns + 1))
    opened.clear()
    found = kept(results)
    assert opened == ["node-00/0002"]
    assert found == fresh(runs_in(results))
    other.write_bytes(changed.read_bytes() + b"\n")
    opened.clear()
    assert kept(results) == fresh(runs_in(results))
    assert opened[0] == "node-00/0003"


def test_a_file_that_is_removed_is_forgotten(results: Path, cache: Path) -> None:
    kept(results)
    gone = runs_in(results)[0]
    gone.unlink()
    assert kept(results) == fresh(runs_in(results))
    write_night(results, 1, 4, cases=12)
    kept(results)
    with sqlite3.connect(cache) as connection:
        known = {path for (path,) in connection.execute("SELECT path FROM brief")}
    assert known == {str(file.resolve()) for file in runs_in(results)}


def test_other_code_makes_other_briefs(results: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kept(results)
    opened.clear()
    monkeypatch.setattr(module, "present_code", lambda: "other")
    assert kept(results) == fresh(runs_in(results))
    assert len(opened) == 2 * 8  # these, and those of `fresh`


def test_a_file_that_cannot_be_read_is_named_each_time(results: Path) -> None:
    broken = runs_in(results)[1]
    broken.write_text("{")
    for _ in range(2):
        left_out: list[str] = []
        found = list(briefs(runs_in(results), left_out))
        assert [brief.run.path.name[:4] for brief in found[:3]] == ["0001", "0003", "0004"]
        assert len(left_out) == 1
        assert str(broken) in left_out[0]


def test_a_file_without_size_and_time_is_read_each_time(
    results: Path, cache: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    really = module.key_of
    monkeypatch.setattr(module, "key_of", lambda file: None if file.name.startswith("0002") else really(file))
    for _ in range(2):
        opened.clear()
        assert kept(results) == fresh(runs_in(results))
        assert opened.count("node-01/0002") == 2  # of these two, one is `fresh`
    with sqlite3.connect(cache) as connection:
        assert connection.execute("SELECT count(*) FROM brief").fetchone() == (6,)


def test_a_run_is_named_as_it_is_given(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(results)
    monkeypatch.chdir(results.parent)
    assert all(not brief.run.path.is_absolute() for brief in kept(Path("results")))


def test_several_processes_read_the_same(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARED_FROM", 1)
    monkeypatch.setattr(module, "BATCH", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert kept(results) == fresh(runs_in(results))


@pytest.mark.parametrize("damage", ["not a database", "cut off", "a folder"])
def test_a_cache_that_cannot_be_used_changes_nothing(damage: str, results: Path, cache: Path) -> None:
    kept(results)
    if damage == "a folder":
        cache.unlink()
        cache.mkdir()
    else:
        cache.write_bytes(b"x" * 4096 if damage == "not a database" else cache.read_bytes()[:6000])
    assert kept(results) == fresh(runs_in(results))
    assert kept(results) == fresh(runs_in(results))


def test_a_cache_that_another_process_holds_is_not_waited_for(
    results: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(results)
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.01)
    other = sqlite3.connect(cache)
    other.execute("BEGIN EXCLUSIVE")
    assert kept(results) == fresh(runs_in(results))
    other.close()


def test_a_short_history_is_not_kept(results: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_FROM", 9)
    assert kept(results) == fresh(runs_in(results))
    assert not cache.exists()
    assert paths.cache() in cache.parents


# What grows


@pytest.mark.slow
def test_the_memory_of_a_report_grows_by_little_with_each_run(tmp_path: Path) -> None:
    """A whole run takes 660 kB of memory; with the latest 21 of them in memory, as once, this is 390 kB per run."""
    peaks = {}
    for nights in (8, 32):
        write_machine(tmp_path, nights, 0, first=nights // 4 if nights > 8 else 0)
        tracemalloc.start()
        report = gather([tmp_path], read_rules())
        peaks[len(runs_in(tmp_path))] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        del report
    (few, small), (many, large) = sorted(peaks.items())
    assert (few, many) == (8, 32)
    assert (large - small) / (many - few) < 150_000


def test_the_latest_comparison_reads_two_files(tmp_path: Path, opened: list[str]) -> None:
    from peft_gauge.history.selection import newest_in_common

    write_machine(tmp_path, 12, 0, cases=12)
    opened.clear()
    chosen = newest_in_common(runs_in(tmp_path, "node-00"), 2)
    assert [run.name for run in chosen.runs] == ["0011", "0012"]
    assert set(opened) == {"node-00/0011", "node-00/0012"}
