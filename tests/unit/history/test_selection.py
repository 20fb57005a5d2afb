"""Which runs are compared: the newest that have cases in common, and what was passed over is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_gauge.errors import GaugeError
from peft_gauge.history import reader, selection
from peft_gauge.history.reader import Run, runs_in
from peft_gauge.history.schema import CaseOutcome, CaseRecord
from peft_gauge.history.selection import Chosen, newest_base, newest_in_common, of_each
from tests.support.report_runs import save

SPEED = "benchmarks/test_speed.py::test_step[{}]"
VERDICTS = "benchmarks/test_verdicts.py::test_{}"


def case(id_: str, outcome: CaseOutcome = "passed") -> CaseRecord:
    return CaseRecord(id_, Path(id_.partition("::")[0]).stem, outcome)


def history(folder: Path, *asked: list[CaseRecord]) -> list[Path]:
    for number, cases in enumerate(asked):
        save(folder, number, cases)
    return runs_in(folder)


def names(chosen: Chosen) -> list[str]:
    return [run.name for run in chosen.runs]


@pytest.fixture
def mixed(tmp_path: Path) -> list[Path]:
    """Bare runs, one in which all speeds were skipped, and two of another benchmark; the newest is one of those."""
    bare = [case(SPEED.format("lora")), case(VERDICTS.format("simulated"))]
    return history(
        tmp_path,
        bare,  # 0001
        [case(SPEED.format("lora"))],
        [case("benchmarks/test_sweep.py::test_ranks")],
        [case(SPEED.format("lora"), "skipped"), case(SPEED.format("ia3"))],
        bare,  # 0005
        [case(VERDICTS.format("real"))],
    )


@pytest.mark.parametrize(
    ("number", "runs", "passed_over"),
    [(2, ["0002", "0005"], "0006, 0004, 0003"), (3, ["0001", "0002", "0005"], "0006, 0004, 0003")],
)
def test_the_newest_runs_with_cases_in_common(
    number: int, runs: list[str], passed_over: str, mixed: list[Path]
) -> None:
    chosen = newest_in_common(mixed, number)
    assert names(chosen) == runs
    assert chosen.passed_over == (f"passed over, without cases in common: {passed_over}",)


def test_each_new_run_has_cases_in_common_with_the_base(tmp_path: Path) -> None:
    """0002 shares with the newest, and nothing with the only base that three runs have."""
    a, b = case(SPEED.format("a")), case(SPEED.format("b"))
    files = history(tmp_path, [a], [b], [a], [a, b])
    assert names(newest_in_common(files, 3)) == ["0001", "0003", "0004"]
    assert names(newest_in_common(files, 2)) == ["0003", "0004"]


def test_where_there_are_not_so_many_it_says_how_many_there_are(mixed: list[Path], tmp_path: Path) -> None:
    with pytest.raises(GaugeError, match=r"no 5 of the 6 runs in .*cpu-box have cases in common; --last 3 finds some"):
        newest_in_common(mixed, 5)
    disjoint = history(tmp_path / "other", [case("a::b")], [case("c::d")])
    with pytest.raises(GaugeError, match=r"no 2 of the 2 runs in .*cpu-box have cases in common$"):
        newest_in_common(disjoint, 2)


def test_a_file_that_cannot_be_read_is_passed_over_unless_it_is_the_newest(mixed: list[Path]) -> None:
    mixed[2].write_text("{")
    chosen = newest_in_common(mixed, 2)
    assert names(chosen) == ["0002", "0005"]
    assert len(chosen.passed_over) == 2
    assert f"passed over: {mixed[2]} is truncated" in chosen.passed_over[1]
    mixed[-1].write_text("{")
    with pytest.raises(GaugeError, match="is truncated"):
        newest_in_common(mixed, 2)


def test_a_renamed_file_has_its_cases_in_common(tmp_path: Path) -> None:
    old = case(SPEED.format("lora"))
    files = history(tmp_path, [old], [case(old.id.replace("test_speed", "test_pace"))])
    assert names(newest_in_common(files, 2)) == ["0001", "0002"]


def test_the_base_of_one_run(mixed: list[Path]) -> None:
    assert names(newest_base(mixed[:-1], [case(SPEED.format("ia3"))])) == ["0004"]
    chosen = newest_base(mixed[:-1], [case(VERDICTS.format("simulated"))])
    assert (names(chosen), chosen.passed_over) == (["0005"], ())
    nothing = newest_base(mixed[:-1], [case(VERDICTS.format("real"))])
    assert names(nothing) == []
    assert newest_base([], [case(SPEED.format("ia3"))]).runs == ()


def test_candidates_are_taken_by_what_they_have_in_common(mixed: list[Path]) -> None:
    assert names(of_each([[mixed[0]], mixed])) == ["0001", "0005"]
    assert names(of_each([mixed, [mixed[4]]])) == ["0002", "0005"]
    assert names(of_each([mixed, mixed])) == ["0002", "0005"]
    assert names(of_each([[mixed[0]], [mixed[5]], mixed])) == ["0001", "0006", "0005"]
    assert of_each([mixed, mixed]).passed_over == ("passed over, without cases in common: 0006, 0004, 0003",)
    assert names(of_each([[mixed[0]], [mixed[5]]])) == ["0001", "0006"]  # as named, whatever they hold


def test_a_long_history_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = history(tmp_path, *([case(f"benchmarks/test_x.py::test_{number}")] for number in range(30)))
    read: list[Path] = []
    really = reader.read_run

    def noted(path: Path) -> Run:
        read.append(path)
        return really(path)

    monkeypatch.setattr(selection, "read_run", noted)
    with pytest.raises(GaugeError):
        newest_in_common(files, 2)
    assert len(read) <= len(files) + 1
