"""One line on a terminal in place of pytest's dots: what is planned or measured, n of m, and the time left.

The time left comes from the finished parts of this session: measured cases by the mean of the cases so far, other
tests likewise. Before a part of each remaining kind is finished there is no estimate. A file or a pipe, ``-v``, ``-q``,
``-s`` and ``-n`` keep pytest's own output.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import pytest

from peft_gauge._internals.pytest import width_of
from peft_gauge.errors import one_line
from peft_gauge.pytest_plugin.workload import Job, is_split, job_of
from peft_gauge.report.format import time_left

if TYPE_CHECKING:
    from collections.abc import Iterable

PLANNING = pytest.StashKey[Callable[[int, int], None]]()
"""Called again and again while a test waits for plans, with the number of finished ones and of all."""


class Estimate:
    """The seconds left, from those that finished parts took; a part is a case's process with its tests, or a test
    without one."""

    def __init__(self, parts: Iterable[Job | str]) -> None:
        self._tests: dict[Job | str, int] = {}
        for part in parts:
            self._tests[part] = self._tests.get(part, 0) + 1
        self._seconds: dict[Job | str, float] = {}

    def took(self, part: Job | str, seconds: float) -> None:
        """A test of ``part`` took this long."""
        self._seconds[part] = self._seconds.get(part, 0.0) + seconds
        self._tests[part] -= 1

    def left_seconds(self) -> float | None:
        """``None`` while no part of a remaining kind is finished."""
        total = 0.0
        for kind in (Job, str):
            open_parts = sum(number > 0 for part, number in self._tests.items() if isinstance(part, kind))
            done = [part for part, number in self._tests.items() if isinstance(part, kind) and number == 0]
            if open_parts and not done:
                return None
            if open_parts:
                total += open_parts * sum(self._seconds[part] for part in done) / len(done)
        return total


class ProgressLine:
    """Draws the line. ``clock``: replaceable for tests."""

    def __init__(self, config: pytest.Config, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._terminal: Any = None
        self._done = self._failed = self._number = 0
        self._estimate = Estimate(())
        self._began = self._waited = 0.0
        self._waiting_since: float | None = None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        terminal: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        if is_shown(self._config, terminal) and session.items:
            self._terminal = terminal
            terminal.showfspath = False
            self._number = len(session.items)
            self._estimate = Estimate(map(self._part, session.items))
            self._config.stash[PLANNING] = self.planning
            terminal.write_line("")
        try:
            return (yield)
        finally:
            if self._terminal is not None:
                self._draw("")
                terminal.rewrite("")
                self._terminal = None

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self) -> Generator[None, Any, Any]:
        status = yield
        return status if self._terminal is None else (status[0], "", "")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        if self._terminal is None:
            return (yield)
        part = self._part(item)
        self._began, self._waited = self._clock(), 0.0
        self._show(f"measuring {part.case.id}" if isinstance(part, Job) else f"running {item.name}")
        result = yield
        self._stop_waiting()
        self._done += 1
        self._estimate.took(part, max(0.0, self._clock() - self._began - self._waited))
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self._terminal is not None and report.failed:
            self._failed += 1

    def planning(self, done: int, of: int) -> None:
        """Show that ``done`` of the session's plans are made; a test's time excludes the time of plans."""
        now = self._clock()
        if self._waiting_since is None:
            self._waiting_since = now
        left = time_left((now - self._waiting_since) / done * (of - done)) if done and now > self._waiting_since else ""
        self._draw(" · ".join(filter(None, (f"planning steps: {done} of {of} done", left))))

    def _part(self, item: pytest.Item) -> Job | str:
        return job_of(item, split=is_split(self._config)) or item.nodeid

    def _stop_waiting(self) -> None:
        if self._waiting_since is not None:
            self._waited += self._clock() - self._waiting_since
            self._waiting_since = None

    def _show(self, what: str) -> None:
        left = self._estimate.left_seconds()
        failed = f"{self._failed} failed" if self._failed else ""
        numbers = f"{self._done + 1} of {self._number}"
        self._draw(" · ".join(filter(None, (numbers, failed, "" if left is None else time_left(left), what))))

    def _draw(self, line: str) -> None:
        self._terminal.rewrite(one_line(line, width_of(self._terminal) - 1), erase=True)
        self._terminal.flush()


def is_shown(config: pytest.Config, terminal: Any) -> bool:
    """Whether this session draws the line instead of pytest's dots."""
    option = config.getoption
    plain = option("verbose") == 0 and option("capture") != "no" and not option("numprocesses", None)
    return bool(terminal is not None and terminal.isatty and plain and not config.option.collectonly)
