"""What saved runs answer together: of each case the newest run that ran it, and nothing that is gone from the suite."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_gauge.history.answers import NewestAnswers
from peft_gauge.history.reader import read_run
from peft_gauge.history.rules import read_rules
from peft_gauge.history.schema import CaseOutcome, CaseRecord, Selection
from peft_gauge.report.html.page_data import gather
from tests.support.report_runs import SETTINGS, claim, memory_case, save, step_case, subject

Command = Callable[..., tuple[int, str, str]]

RULES = read_rules()


def case(id_: str, outcome: CaseOutcome = "passed", **metrics: Any) -> CaseRecord:
    return CaseRecord(f"benchmarks/{id_}", id_.partition(".py")[0], outcome, None, metrics)


def saved(
    folder: Path,
    number: int,
    cases: list[CaseRecord],
    *,
    asked: Selection | None = None,
    interrupted: bool = False,
    options: dict[str, Any] | None = None,
) -> Path:
    path = save(folder, number, cases)
    document = json.loads(path.read_text())
    document["peft_gauge"] |= {"interrupted": interrupted, "options": options or {}}
    document["peft_gauge"]["selection"] = None if asked is None else asked.as_json()
    path.write_text(json.dumps(document))
    return path


def answers(*paths: Path) -> dict[str, list[str]]:
    """The names of cases by the run that answers them, the newest first."""
    found = NewestAnswers()
    for path in paths:
        found.add(read_run(path))
    return {run.name: [each.id.removeprefix("benchmarks/") for each in run.cases] for run in found.by_run()}


BARE = Selection(("benchmarks",), deselected=frozenset())


def test_every_case_counts_from_the_newest_run_that_ran_it(tmp_path: Path) -> None:
    a, b, c = (case(f"test_{name}.py::test") for name in "abc")
    runs = [saved(tmp_path, 1, [a, b]), saved(tmp_path, 2, [c]), saved(tmp_path, 3, [b])]
    assert answers(*runs) == {
        "0003": ["test_b.py::test"],
        "0002": ["test_c.py::test"],
        "0001": ["test_a.py::test"],
    }
    assert answers(runs[0]) == {"0001": ["test_a.py::test", "test_b.py::test"]}


@pytest.mark.parametrize(
    ("outcome", "newest"),
    [("skipped", "0001"), ("interrupted", "0001"), ("failed", "0002"), ("out-of-memory", "0002")],
)
def test_what_did_not_run_takes_no_answer_away(outcome: CaseOutcome, newest: str, tmp_path: Path) -> None:
    runs = [saved(tmp_path, 1, [case("test_a.py::x")]), saved(tmp_path, 2, [case("test_a.py::x", outcome)])]
    found = answers(*runs)
    assert found[newest] == ["test_a.py::x"]
    assert next(iter(found)) == "0002"  # the newest is told of, whatever it answers


@pytest.mark.parametrize(
    ("second", "kept"),
    [
        ({"asked": BARE}, False),
        ({"asked": Selection(("benchmarks",), "", "x", frozenset({"benchmarks/test_a.py::gone"}))}, True),
        ({"asked": Selection(("benchmarks/test_a.py::x",), deselected=frozenset())}, True),
        ({"asked": Selection(("benchmarks/test_b.py",), deselected=frozenset())}, True),
        ({"asked": BARE, "interrupted": True}, True),
        ({"asked": BARE, "options": {"method": ["lora"]}}, True),
        ({}, True),  # it may have asked a part of the benchmark again
    ],
)
def test_a_case_that_is_gone_from_the_suite_is_gone_from_the_answers(
    second: dict[str, Any], kept: bool, tmp_path: Path
) -> None:
    gone = case("test_a.py::gone", method="full")
    runs = [saved(tmp_path, 1, [case("test_a.py::x"), gone]), saved(tmp_path, 2, [case("test_a.py::x")], **second)]
    assert ("0001" in answers(*runs)) == kept


def test_of_older_runs_a_benchmark_that_changed_loses_its_old_cases(tmp_path: Path) -> None:
    """A run that does not say what it left out: other cases beside the same ones mean that the benchmark changed."""
    old = saved(tmp_path, 1, [case("test_a.py::x"), case("test_a.py::old"), case("test_b.py::slow")])
    new = saved(tmp_path, 2, [case("test_a.py::x"), case("test_a.py::new"), case("test_b.py::quick")])
    assert answers(old, new) == {
        "0002": ["test_a.py::x", "test_a.py::new", "test_b.py::quick"],
        "0001": ["test_b.py::slow"],
    }


def test_a_renamed_benchmark_leaves_nothing_behind(tmp_path: Path) -> None:
    runs = [saved(tmp_path, 1, [case("test_a.py::x")]), saved(tmp_path, 2, [case("test_other.py::x")], asked=BARE)]
    assert answers(*runs) == {"0002": ["test_other.py::x"]}


# As they are shown


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A run of memory and speed; one of LoRA's speed alone; one of counts; and one of another benchmark."""
    counted = CaseRecord(
        "benchmarks/test_trainable_params.py::test_params[lora-toy-cpu]",
        "test_trainable_params",
        "passed",
        metrics={**subject("lora", "toy"), "trainable_params": 1234},
    )
    both = [*(memory_case(name, "toy") for name in ("lora", "full")), step_case("full", "toy", ratio=9.0)]
    save(tmp_path / "results", 1, [*both, step_case("lora", "toy")], [claim("holds")], torch="2.12.0")
    save(tmp_path / "results", 2, [counted])
    save(tmp_path / "results", 3, [step_case("lora", "toy", ratio=1.5)])
    save(tmp_path / "results", 4, [case("test_verdicts.py::test_real")])
    return tmp_path / "results"


def test_the_report_is_made_of_all_answers(results: Path) -> None:
    report = gather([results], RULES)
    machine = report.machines["cpu-box"]
    assert [each.run.name for each in machine.answering] == ["0004", "0003", "0002", "0001"]
    assert {(row["run"], row["method"]) for row in report.rows("memory")} == {("0001", "lora"), ("0001", "full")}
    assert {(row["run"], row["method"], row["seconds"]) for row in report.rows("times")} == {
        ("0003", "lora", 1.5),
        ("0001", "full", 9.0),
    }


def test_each_run_is_compared_with_the_newest_before_it_that_asked_the_same(results: Path) -> None:
    newest, speed, counts, first = gather([results], RULES).machines["cpu-box"].answering
    assert (newest.base, counts.base, first.base) == (None, None, None)
    assert speed.base is not None
    assert speed.comparison is not None
    assert speed.base.name == "0001"
    # LoRA's step is twice as fast; full's, which run 0001 answers still, is neither missing nor anything else.
    assert [(row.says, row.metric) for row in speed.comparison.rows if row.says != "same"] == [
        ("better", "step_seconds")
    ]
    assert {row.test for row in speed.comparison.rows} == {"benchmarks/test_speed.py::test_step[lora-toy-cpu]"}


def test_markdown_tells_all_answers_and_whose_they_are(results: Path, run_command: Command) -> None:
    code, printed, complaint = run_command("report", "--markdown", str(results / "cpu-box"))
    assert (code, complaint) == (0, "")
    assert printed.startswith("## cpu-box, runs 0004, 0003, 0002 and 0001\n\n- ended 2026-02-04 12:00 UTC\n")
    assert "- cases: 6 passed\n- claims: 1 holds\n- run 0004: test\\_verdicts (1); ended 2026-02-04 12:00 UTC\n" in (
        printed
    )
    assert (
        "- run 0001: test\\_memory (2), test\\_speed (1); ended 2026-02-01 12:00 UTC; since then torch: 2.12" in printed
    )
    tables = re.findall(r"^\| (lora|full)[ ,].* \| ([\d, ]+) \|$", printed, flags=re.MULTILINE)
    assert tables == [("full", "0001"), ("lora", "0003, 0002"), ("lora", "0001"), ("full", "0001")]
    (lora,) = (line for line in printed.splitlines() if line.endswith("| 0003, 0002 |"))
    assert "| 1,234 |" in lora
    assert "| 1.50 s |" in lora


def test_markdown_of_one_run_is_that_run_s(results: Path, run_command: Command) -> None:
    path = sorted((results / "cpu-box").iterdir())[2]
    printed = run_command("report", "--markdown", str(path))[1]
    assert printed.startswith("## cpu-box, run 0003\n\n")
    assert "- cases: 1 passed\n- claims: none\n" in printed
    assert "| run |" not in printed


def test_methods_under_other_settings_are_not_merged(tmp_path: Path, run_command: Command) -> None:
    longer = step_case("lora", "toy", ratio=7.0)
    longer.metrics["settings"] = SETTINGS | {"seq": 128}
    other = CaseRecord(longer.id + "-long", "test_speed", "passed", metrics=longer.metrics)
    save(tmp_path, 1, [step_case("lora", "toy")])
    save(tmp_path, 2, [other])
    printed = run_command("report", "--markdown", str(tmp_path))[1]
    rows = [line for line in printed.splitlines() if line.startswith("| lora | toy on cpu |")]
    assert [(line.split(" | ")[2], line.split(" | ")[-1]) for line in rows] == [
        ("1×64 tokens, float32", "0001 |"),
        ("1×128 tokens, float32", "0002 |"),
    ]
