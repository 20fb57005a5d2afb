"""The progress of commands: on a terminal only, after two seconds, with a time left from finished parts."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from peft_gauge.commands import progress
from peft_gauge.commands.progress import Display, bar
from tests.support.facts import lacking


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "AFTER_SECONDS", 0.0)


def terminal(**options: Any) -> Console:
    return Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None, **options)


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
