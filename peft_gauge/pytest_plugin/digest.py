"""The digest as the last lines of a session: after pytest's own counts, and after the lines on Ctrl-C."""

from __future__ import annotations

import shlex
from collections.abc import Generator
from typing import TYPE_CHECKING

import pytest

from peft_gauge._internals.pytest import width_of
from peft_gauge.history import store
from peft_gauge.pytest_plugin.budget import BUDGET, Budget
from peft_gauge.report.terminal.digest import WIDTH, Ending, digest

if TYPE_CHECKING:
    from peft_gauge.pytest_plugin.recorder import Recorder

TYPED = pytest.StashKey[tuple[str, ...]]()
"""The command line as the user typed it, unless it is pytest with the session's arguments."""


class Digest:
    """Prints the digest of the cases that ``recorder`` collected; other sessions end as pytest ends them."""

    def __init__(self, config: pytest.Config, recorder: Recorder) -> None:
        self.config = config
        self.recorder = recorder

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> Generator[None, object, object]:
        result = yield
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None and (self.recorder.cases or self.recorder.notes):
            self._print(terminal, interrupted=exitstatus == pytest.ExitCode.INTERRUPTED)
        return result

    def _print(self, terminal: pytest.TerminalReporter, *, interrupted: bool) -> None:
        recorder = self.recorder
        budget: Budget | None = self.config.stash.get(BUDGET, None)
        notes = [*([] if budget is None else [budget.ending()]), *recorder.notes]
        saved = None if recorder.saved is None else store.shown(recorder.saved)
        ending = Ending(notes, saved, self._advice(interrupted=interrupted))
        terminal.write_line("")
        for line in digest(recorder.cases, recorder.claims, ending, width_of(terminal)):
            terminal.write_line(line)

    def _advice(self, *, interrupted: bool) -> list[str]:
        """The next command: resume an interrupted run, else look at everything."""
        if self.recorder.saved is None:
            return []
        typed = self.config.stash.get(TYPED, ("pytest", *map(str, self.config.invocation_params.args)))
        if interrupted:
            again = shlex.join([*typed, *(["--resume"] if "--resume" not in typed else [])])
            line = f"interrupted; to continue: {again}"
            return [line if len(line) <= WIDTH else "interrupted; to continue, repeat the command with --resume"]
        folder = self.config.getoption("--results")
        report = shlex.join(["peft-gauge", "report", *([] if folder == "results" else [folder])])
        return [f"next: {report} (a page of everything); --details shows all tables here"]
