"""A progress bar on a terminal's standard error, for work that takes longer than `AFTER_SECONDS`.

Elsewhere, as in a pipe or a CI's log, nothing is shown. The time left comes from the mean time of the finished parts;
before the first one is finished there is no estimate. A search knows only the most plans that it can take, and so the
longest time left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from peft_gauge.report.format import time_left

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.progress import Progress, Task

    from peft_gauge.plan.record import PlanOutcome, PlanRequest
    from peft_gauge.plan.search import Tried

AFTER_SECONDS = 2.0


class Display:
    """One bar. `say` sets its text, `advance` and `reached` count finished parts, `print` writes a line above it.

    ``clock``: in seconds; replaceable for tests.
    """

    def __init__(self, progress: Progress, text: str, parts: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._progress = progress
        self._clock = clock
        self._began = self._finished = clock()
        self._done, self._of = 0, parts
        self._most = ""
        self._task = progress.add_task(text, total=parts, left=self.left)
        self._lock = threading.Lock()
        self._ended = progress.disable
        self._timer = threading.Timer(AFTER_SECONDS, self._start)
        self._timer.daemon = True
        if not progress.disable:
            self._timer.start()

    def _start(self) -> None:
        with self._lock:
            if not self._ended:
                self._progress.start()

    def left(self) -> str:
        """The estimated time left in words; empty before a part is finished."""
        if not 0 < self._done < self._of:
            return ""
        expected = (self._finished - self._began) / self._done * (self._of - self._done)
        return self._most + time_left(max(0.0, expected - (self._clock() - self._finished)))

    def say(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def advance(self) -> None:
        self.reached(self._done + 1, self._of)

    def reached(self, done: int, of: int) -> None:
        """``done`` parts of ``of`` are finished; 0 if their number is not known."""
        if done != self._done:
            self._finished = self._clock()
        self._done, self._of = done, of
        self._progress.update(self._task, completed=done, total=of or done + 1)

    def searched(self, text: str, plans: int, at_most: int | None) -> None:
        """``plans`` of the one search under this bar are made, of ``at_most``; ``None`` if that is not known."""
        if plans == 0:
            self.begin()  # the worker has imported its libraries
        self._most = "at most "
        self.reached(plans, at_most or 0)
        self.say(f"{text}: {plan_of(plans, at_most)}")

    def begin(self) -> None:
        """Start the clock of the parts: the time so far was spent on preparations."""
        self._began = self._finished = self._clock()

    def print(self, text: str) -> None:
        """Print a result to standard output; the bar is removed and drawn again below it."""
        was_started = self._progress.live.is_started
        self._progress.stop()
        print(text, flush=True)
        if was_started:
            self._start()

    def end(self) -> None:
        with self._lock:
            self._ended = True
            self._timer.cancel()
            self._progress.stop()


@contextmanager
def bar(parts: int, text: str = "", *, quiet: bool = False, console: Console | None = None) -> Iterator[Display]:
    """A bar of ``parts``, with the time left if there are several; nothing if ``quiet``.

    ``console``: replaces standard error.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class TimeLeft(TextColumn):
        def __init__(self) -> None:
            super().__init__("")

        def render(self, task: Task) -> Text:
            return Text(task.fields["left"]())

    console = console or Console(stderr=True)
    counted = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TimeLeft())
    columns = counted if parts > 1 else (SpinnerColumn(), TimeElapsedColumn(), TimeLeft())
    progress = Progress(
        *columns,
        TextColumn("{task.description}", markup=False),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
    display = Display(progress, text, parts)
    try:
        yield display
    finally:
        display.end()


def plan_of(plans: int, at_most: int | None) -> str:
    """The plan that a search makes after ``plans`` others: ``plan 5 of at most 11``."""
    return f"plan {plans + 1}" + ("" if at_most is None else f" of at most {at_most}")


def plan_with_bar(
    requests: Sequence[PlanRequest], text: str = "planning", *, find: str | None = None, quiet: bool = False
) -> list[PlanOutcome]:
    """The outcomes of ``requests`` under a bar: planned on all cores or, with ``find``, one search after the other."""
    from peft_gauge.plan.worker import plan_all, plan_in_parallel

    if find is None:
        with bar(len(requests), text, quiet=quiet) as display:
            return plan_in_parallel(requests, waiting=display.reached)
    gpus = len(requests[0].gpus) if requests else 1
    searches = len(requests) * gpus
    with bar(searches, text, quiet=quiet) as display:

        def searching(done: int, tried: Tried) -> None:
            if searches == 1:
                display.searched(text, tried.plans, tried.at_most)
                return
            if (done, tried.gpu, tried.plans) == (0, 0, 0):
                display.begin()
            request = requests[done]
            display.reached(done * gpus + tried.gpu, searches)
            what = f"{request.method.name} on {request.gpus[tried.gpu]}"
            display.say(f"{text} of {what}: {plan_of(tried.plans, tried.at_most)}")

        return list(plan_all(requests, find=find, searching=searching))
