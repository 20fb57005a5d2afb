"""``--budget``: which cases come first, which are begun, and what is left for the next time.

The clock of the unit tests is theirs; the runs at the end are the suite's own, with planted cases.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peft_gauge.errors import GaugeError
from peft_gauge.pytest_plugin import budget
from peft_gauge.pytest_plugin.budget import GROWTH, REST, STEP, VARIATION, Budget, Past, process_seconds
from peft_gauge.pytest_plugin.workload import Asked, Job, Workload
from peft_gauge.training import methods, models
from peft_gauge.training.cases import Case
from peft_gauge.training.step import StepSettings
from tests.test_measured_cases import Suite, by_question

TOY = models.resolve("toy-llama", weights="random")


def case(method: str, **settings: Any) -> Case:
    return Case(TOY, methods.get(method), StepSettings(1, 16, **settings), "cpu", "float32")


def item(test: str, about: Case | None, *passes: str, shapes: bool = False, skip: bool = False) -> Any:
    """What a budget looks at of a test."""
    markers = [SimpleNamespace(args=passes, kwargs={"shapes": shapes})]

    def closest(name: str) -> object:
        return object() if name == "skip" and skip else None

    return SimpleNamespace(
        nodeid=f"benchmarks/test_x.py::{test}[{about.id if about else ''}]",
        fixturenames=("measured",) if about else (),
        callspec=SimpleNamespace(params={"case": about} if about else {}),
        iter_markers=lambda name: markers if about and name == "measures" else [],
        get_closest_marker=closest,
    )


def suite_of(*names: str) -> list[Any]:
    """The tests of some methods as files order them: by question, not by method."""
    cases = [case(name) for name in names]
    return [
        item("test_params", None),
        *(item("test_growth", each, "memory", shapes=True) for each in cases),
        *(item("test_variation", replace_checkpointing(each), "memory") for each in cases),
        *(item("test_peak", each, "memory") for each in cases),
        *(item("test_step", each, "speed") for each in cases),
    ]


def workload_of(items: list[Any]) -> Workload:
    return Workload.of(items, split=True)


def replace_checkpointing(about: Case) -> Case:
    return replace(about, settings=replace(about.settings, grad_checkpointing=True))


class Clock:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ten_seconds_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process takes ten seconds, nothing is to be drawn or planned, and no margin is added."""
    monkeypatch.setattr(budget, "process_seconds", lambda asked: 10.0)
    monkeypatch.setattr(budget, "SAFETY", 1.0)
    monkeypatch.setattr(budget, "PLAN_SECONDS", 0.0)
    monkeypatch.setattr(budget, "DRAWN_A_SECOND", float("inf"))


def test_steps_come_first_method_by_method_then_variations_growth_and_the_rest(clock: Clock) -> None:
    asked = Budget(1000, clock(), clock)
    order = [each.nodeid.rpartition("::")[2] for each in asked.order(workload_of(suite_of("lora", "ia3")), {})]
    lora, ia3 = "lora-toy-llama-cpu", "ia3-toy-llama-cpu"
    assert order == [
        *(f"test_peak[{lora}]", f"test_step[{lora}]", f"test_peak[{ia3}]", f"test_step[{ia3}]"),
        *("test_variation[lora-checkpointing-toy-llama-cpu]", "test_variation[ia3-checkpointing-toy-llama-cpu]"),
        *(f"test_growth[{lora}]", f"test_growth[{ia3}]"),
        "test_params[]",
    ]
    assert [entry.worth for entry in asked.entries] == [STEP, STEP, VARIATION, VARIATION, GROWTH, GROWTH, REST]
    first = asked.entries[0]
    assert first.what == "memory, speed"
    assert asked.entries[4].asked is not None
    assert (asked.entries[4].what, len(asked.entries[4].asked.shapes)) == ("growth", 3)
    assert first.asked is not None
    assert first.asked.shapes == (), "further shapes wait for their turn"


@pytest.mark.usefixtures("ten_seconds_each")
def test_nothing_is_begun_that_would_not_end_in_time(clock: Clock) -> None:
    asked = Budget(25, clock(), clock)
    items = asked.order(workload_of([item("test_peak", case(name), "memory") for name in ("lora", "ia3", "full")]), {})
    begun = []
    for each in items:
        if asked.why_not(each) is None:
            begun.append(each)
            clock.now += 10.0
    assert begun == items[:2]
    reason = asked.why_not(items[2])
    assert reason == "not begun: estimated at 10 s, 5 s of --budget=25 left; --resume goes on with it"
    assert asked.ending() == (
        "budget: 20 of 25 s used, 2 of 3 begun; not begun: full-toy-llama-cpu; the same command with --resume goes on"
    )


@pytest.mark.usefixtures("ten_seconds_each")
def test_a_second_question_to_a_case_that_was_begun_is_asked_when_the_time_is_up(clock: Clock) -> None:
    asked = Budget(10, clock(), clock)
    about = case("lora")
    peak, step = asked.order(workload_of([item("test_peak", about, "memory"), item("test_step", about, "speed")]), {})
    assert asked.why_not(peak) is None
    clock.now += 500
    assert asked.why_not(step) is None, "its case is measured: to answer costs nothing"


@pytest.mark.usefixtures("ten_seconds_each")
def test_a_shorter_one_is_begun_where_a_longer_one_is_not(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"full": 30.0, "lora": 5.0}
    monkeypatch.setattr(budget, "process_seconds", lambda asked: seconds[asked.case.method.name])
    asked = Budget(20, clock(), clock)
    items = asked.order(workload_of([item("test_peak", case(name), "memory") for name in seconds]), {})
    assert [asked.why_not(each) is None for each in items] == [False, True]


@pytest.mark.usefixtures("ten_seconds_each")
def test_what_a_case_took_corrects_what_is_estimated_of_the_others(clock: Clock) -> None:
    asked = Budget(100, clock(), clock)
    first, second = asked.order(workload_of([item("test_peak", case(name), "memory") for name in ("lora", "ia3")]), {})
    assert asked.why_not(first) is None
    asked.took(Job(case("lora")), 40.0)
    assert asked.estimate(asked.entries[1]) == 40.0
    clock.now += 61.0
    assert asked.why_not(second) == "not begun: estimated at 40 s, 39 s of --budget=100 left; --resume goes on with it"


@pytest.mark.usefixtures("ten_seconds_each")
def test_an_earlier_run_of_the_same_settings_is_the_estimate(clock: Clock) -> None:
    about, other = case("lora"), case("ia3")
    items = [item("test_peak", about, "memory"), item("test_step", about, "speed"), item("test_peak", other, "memory")]
    same = {"batch": 1, "seq": 16, "dtype": "float32"}
    earlier = {items[0].nodeid: Past(33.0, same), items[1].nodeid: Past(33.0, same)}
    longer = {**earlier, items[2].nodeid: Past(99.0, {**same, "seq": 512})}
    asked = Budget(1000, clock(), clock)
    asked.order(workload_of(items), longer)
    assert [entry.earlier_seconds for entry in asked.entries] == [33.0, None]
    # A question that the earlier run did not ask may have made its process longer.
    partly = Budget(1000, clock(), clock)
    partly.order(workload_of(items), {items[0].nodeid: Past(33.0, same)})
    assert partly.entries[0].earlier_seconds is None


@pytest.mark.usefixtures("ten_seconds_each")
def test_a_budget_smaller_than_one_case_is_refused(clock: Clock) -> None:
    began = clock()
    clock.now += 3.0
    asked = Budget(12, began, clock)
    with pytest.raises(GaugeError) as refused:
        asked.order(workload_of([item("test_peak", case("lora"), "memory")]), {})
    assert str(refused.value) == (
        "--budget=12 is too small: 3 s went into starting, and the shortest case (lora-toy-llama-cpu) is estimated at "
        "10 s; give at least 18, or a smaller --model"
    )
    enough = Budget(18, began, clock)
    enough.order(workload_of([item("test_peak", case("lora"), "memory")]), {})
    # What would be skipped anyway needs no time.
    Budget(12, began, clock).order(workload_of([item("test_peak", case("lora"), "memory", skip=True)]), {})


@pytest.mark.usefixtures("ten_seconds_each")
def test_the_schedule_shows_order_estimates_and_where_it_ends(clock: Clock) -> None:
    asked = Budget(25, clock(), clock)
    items = [item("test_peak", case(name), "memory") for name in ("lora", "ia3", "full")]
    asked.order(workload_of([*items, item("test_params", None)]), {})
    head, _, *lines = asked.schedule()
    assert head.startswith("peft-gauge: a budget of 25 s")
    assert [line.split()[:2] for line in lines[:3]] == [
        ["1", "lora-toy-llama-cpu"],
        ["2", "ia3-toy-llama-cpu"],
        ["3", "full-toy-llama-cpu"],
    ]
    assert [line.endswith("10 s") for line in lines[:3]] == [True, True, False]
    assert lines[2].endswith("10 s  -"), "its end is beyond the budget"
    assert lines[3] == "  and 1 tests that measure no case, 1 s"
    assert max(map(len, (head, *lines))) <= 100


def test_cases_that_are_skipped_anyway_have_no_line(clock: Clock) -> None:
    """As all of a GPU are where there is none."""
    asked = Budget(100, clock(), clock)
    asked.order(workload_of([item("test_peak", case("lora"), "memory", skip=True)]), {})
    assert len(asked.schedule()) == 2


def test_a_first_estimate_grows_with_what_is_asked() -> None:
    def asked(*passes: Any, shapes: int = 0, **settings: Any) -> float:
        about = case("lora", **settings)
        return process_seconds(Asked(Job(about), passes, ((1, 8),) * shapes))

    assert asked() < asked("memory") < asked("memory", "speed") < asked("fingerprint", "memory", "speed")
    assert asked("memory") < asked("memory", shapes=3)
    assert asked("memory") <= asked("memory", grad_checkpointing=True)


# The suite itself -----------------------------------------------------------------------------------------------------

MEMORY = "benchmarks/test_memory.py"


def test_a_run_with_a_budget_is_saved_and_gone_on_with(tmp_path: Path) -> None:
    """Three methods whose processes are known to take no time; an earlier run says that full fine-tuning takes long."""
    suite = Suite(tmp_path)
    names = {"lora": "give", "full": "give", "ia3": "give"}
    arguments = (MEMORY, "-k=peak", "--method=full,lora,ia3")
    first = suite.run(*arguments, planted=names, plans={})
    assert first.returncode == 0, first.stdout
    file = next((tmp_path / "results").glob("*/0001_*.json"))
    run = json.loads(file.read_text())
    for record in run["peft_gauge"]["cases"]:
        record["figures"]["process_seconds"] = 5000.0 if "[full-" in record["id"] else 1.0
    file.write_text(json.dumps(run))
    before = suite.started()

    second = suite.run(*arguments, "--budget=300", planted=names, plans={})
    assert second.returncode == 0, second.stdout
    assert suite.started() - before == {"lora": 1, "ia3": 1}
    cases = by_question(suite.saved(2))
    assert {name: record["outcome"] for name, record in cases.items()} == {
        "test_peak full": "skipped",
        "test_peak lora": "passed",
        "test_peak ia3": "passed",
    }
    assert cases["test_peak full"]["reason"].startswith("not begun: estimated at ")
    assert "budget: " in second.stdout
    assert "not begun: full-toy-llama-cpu; the same command with --resume goes on" in second.stdout

    for record in run["peft_gauge"]["cases"]:
        record["figures"]["process_seconds"] = 1.0
    file.write_text(json.dumps(run))
    third = suite.run(*arguments, "--budget=300", "--resume", planted=names, plans={})
    assert third.returncode == 0, third.stdout
    assert suite.started() - before == {"lora": 1, "ia3": 1, "full": 1}
    assert {record["outcome"] for record in by_question(suite.saved(3)).values()} == {"passed"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget=0"], "--budget must be a positive number of seconds, not 0"),
        (["--budget=inf"], "--budget must be a positive number of seconds, not inf"),
        (["--budget=1"], "--budget=1 is too small: "),
        (["--budget=100", "--processes=2"], "--budget measures each case once; run without --processes"),
        (["--budget=100", "-n1"], "--budget puts the cases of one process in order; run without -n"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_one_line(options: list[str], words: str, tmp_path: Path) -> None:
    suite = Suite(tmp_path)
    done = suite.run(MEMORY, "--method=lora", *options, planted={"lora": "give"}, plans={})
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    line = next(line for line in (done.stdout + done.stderr).splitlines() if line.startswith("ERROR: "))
    assert line.removeprefix("ERROR: ").startswith(words)
    assert suite.started() == {}
