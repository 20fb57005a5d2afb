"""The progress line of a session: its estimate comes from finished parts only."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peft_gauge.pytest_plugin.digest import TYPED, Digest
from peft_gauge.pytest_plugin.progress import Estimate, ProgressLine, is_shown
from peft_gauge.pytest_plugin.workload import Job
from peft_gauge.training import methods, models
from peft_gauge.training.cases import Case
from peft_gauge.training.settings import StepSettings

TOY = models.resolve("toy-llama", weights="random")
LORA, IA3 = (Job(Case(TOY, method, StepSettings(1, 16), "cpu", "float32")) for method in (methods.LORA, methods.IA3))


def test_there_is_no_estimate_before_a_case_is_finished() -> None:
    estimate = Estimate([LORA, LORA, IA3, "a", "b"])
    assert estimate.left_seconds() is None
    estimate.took("a", 1.0)
    estimate.took(LORA, 10.0)
    assert estimate.left_seconds() is None
    estimate.took(LORA, 2.0)
    assert estimate.left_seconds() == 12.0 + 1.0
    estimate.took("b", 3.0)
    estimate.took(IA3, 4.0)
    assert estimate.left_seconds() == 0.0


class Terminal:
    """Keeps each line that is drawn."""

    isatty = True

    def __init__(self) -> None:
        self.drawn: list[str] = []
        self._tw = SimpleNamespace(fullwidth=80)

    def rewrite(self, line: str, erase: bool = False) -> None:
        self.drawn.append(line)

    def flush(self) -> None:
        pass


def test_the_time_of_plans_is_no_part_of_a_test() -> None:
    now = [0.0]
    options = {"--budget": None}
    line = ProgressLine(SimpleNamespace(getoption=options.__getitem__), clock=lambda: now[0])  # type: ignore[arg-type]
    terminal = line._terminal = Terminal()
    line._number, line._estimate = 2, Estimate(["first", "second"])
    item: Any = SimpleNamespace(nodeid="first", name="first", fixturenames=())
    running = line.pytest_runtest_protocol(item)
    next(running)
    line.planning(0, 4)
    now[0] = 30.0
    line.planning(1, 4)
    now[0] = 120.0
    line._stop_waiting()
    now[0] = 122.0
    with pytest.raises(StopIteration):
        running.send(None)
    assert line._estimate.left_seconds() == 2.0
    assert terminal.drawn == [
        "1 of 2 · running first",
        "planning steps: 0 of 4 done",
        "planning steps: 1 of 4 done · about 90 s left",
    ]


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({}, True),
        ({"verbose": 1}, False),
        ({"verbose": -1}, False),
        ({"capture": "no"}, False),
        ({"numprocesses": 2}, False),
    ],
)
def test_the_line_replaces_dots_only_on_a_terminal(changed: dict[str, Any], shown: bool) -> None:
    options = {"verbose": 0, "capture": "fd", "numprocesses": None, **changed}
    config: Any = SimpleNamespace(
        getoption=lambda name, *default: options[name], option=SimpleNamespace(collectonly=False)
    )
    assert is_shown(config, Terminal()) is shown
    assert not is_shown(config, SimpleNamespace(isatty=False))
    assert not is_shown(config, None)


@pytest.mark.parametrize(
    ("typed", "interrupted", "advice"),
    [
        (("pytest", "-k", "lora or ia3"), True, "interrupted; to continue: pytest -k 'lora or ia3' --resume"),
        (("pytest", "--resume"), True, "interrupted; to continue: pytest --resume"),
        (("pytest", "x" * 90), True, "interrupted; to continue, repeat the command with --resume"),
        (("pytest",), False, "next: peft-gauge report runs (a page of everything); --details shows all tables here"),
    ],
)
def test_a_session_ends_with_the_next_command(typed: tuple[str, ...], interrupted: bool, advice: str) -> None:
    given = SimpleNamespace(args=())
    config: Any = SimpleNamespace(
        stash={TYPED: typed}, getoption={"--results": "runs"}.__getitem__, invocation_params=given
    )
    recorder: Any = SimpleNamespace(saved=Path("runs/a.json"))
    assert Digest(config, recorder)._advice(interrupted=interrupted) == [advice]
    unsaved: Any = SimpleNamespace(saved=None)
    assert Digest(config, unsaved)._advice(interrupted=interrupted) == []
