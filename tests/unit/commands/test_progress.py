"""The progress of commands: on a terminal only, after two seconds, with a time left from finished parts."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from peft_gauge.commands import progress
from peft_gauge.commands.progress import Display, bar
from peft_gauge.plan import worker
from peft_gauge.plan.search import Tried
from tests.support.facts import lacking


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "AFTER_SECONDS", 0.0)


def terminal(**options: Any) -> Console:
    return Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None, **options)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_time_left_comes_from_finished_parts() -> None:
    now = [100.0]
    display = Display(Progress(disable=True), "", 4, clock=lambda: now[0])
    now[0] = 140.0
    display.begin()  # 40 s of preparations
    assert display.left() == ""
    now[0] = 160.0
    display.advance()
    assert display.left() == "about 60 s left"
    now[0] = 190.0
    display.reached(1, 4)  # nothing new
    assert display.left() == "about 30 s left"
    now[0] = 220.0
    display.reached(2, 4)
    assert display.left() == "about 80 s left"
    display.reached(4, 4)
    assert display.left() == ""


def test_a_search_has_at_most_a_time_left_from_its_measured_plans() -> None:
    now = [100.0]
    with bar(1, console=terminal(), quiet=True) as display:
        display._clock = lambda: now[0]
        now[0] = 110.0  # 10 s of imports
        display.searched("searching", 0, None)
        assert display.left() == ""
        now[0] = 130.0
        display.searched("searching", 1, None)  # nothing bounds the plans yet
        assert display.left() == ""
        assert not display._progress.tasks[0].finished, "its elapsed time would stop"
        now[0] = 150.0
        display.searched("searching", 2, 6)
        assert display.left() == "at most about 80 s left"
        now[0] = 160.0
        assert display.left() == "at most about 70 s left"
        now[0] = 180.0  # 70 s for three plans
        display.searched("searching", 3, 5)
        assert display.left() == "at most about 45 s left"


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("searches", [1, 4])
def test_searches_show_their_plans(searches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal()
    monkeypatch.setattr(progress, "bar", partial(bar, console=console))
    begun: list[Display] = []
    monkeypatch.setattr(Display, "begin", lambda display: begun.append(display))
    number = {1: ("24GB",), 4: ("24GB", "H100 80GB")}[searches]
    requests: Any = [
        SimpleNamespace(method=SimpleNamespace(name=name), gpus=number) for name in ("lora", "ia3")[: len(number)]
    ]

    def plan_all(asked: Any, find: str, searching: Any) -> Iterator[Any]:
        for done, gpu, plans, at_most, shown in (
            (0, 0, 0, None, "the largest seq"),
            (0, 0, 1, None, "plan 2"),
            (0, 0, 2, 6, "plan 3 of at most 6"),
            *(((1, 1, 3, 7, "plan 4 of at most 7"),) if searches == 4 else ()),
        ):
            searching(done, Tried(gpu, plans, at_most))
            until(lambda shown=shown: shown in written(console))
        yield "found"

    monkeypatch.setattr(worker, "plan_all", plan_all)
    assert progress.plan_with_bar(requests, "searching the largest seq", find="seq") == ["found"]
    assert len(begun) == 1, "the clock of the parts starts once, with the first plan"
    facts = ("at most about 5 s left",) if searches == 1 else ("of ia3 on H100 80GB", "3/4")
    assert lacking(written(console), *facts) == []


@pytest.mark.usefixtures("at_once")
def test_a_terminal_shows_the_parts() -> None:
    console = terminal()
    with bar(3, "planning", console=console) as display:
        display.reached(1, 3)
        until(lambda: "planning" in written(console))
    assert lacking(written(console), "1/3", "s left", "planning") == []


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("console", "quiet"), [(Console(file=io.StringIO(), force_terminal=False), False), (terminal(), True)]
)
def test_a_pipe_and_json_show_nothing(console: Console, quiet: bool) -> None:
    with bar(3, "planning", quiet=quiet, console=console) as display:
        display.advance()
        time.sleep(0.05)
    assert written(console) == ""


def test_short_work_shows_nothing() -> None:
    console = terminal()
    with bar(3, "planning", console=console) as display:
        display.advance()
        time.sleep(0.05)
    assert written(console) == ""


@pytest.mark.usefixtures("at_once")
def test_a_result_is_printed_above_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    console = terminal()
    with bar(2, "bisecting", console=console) as display:
        until(lambda: "bisecting" in written(console))
        display.print("a result")
        assert display._progress.live.is_started
    assert not display._progress.live.is_started
    assert capsys.readouterr().out == "a result\n"


def until(happened: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
