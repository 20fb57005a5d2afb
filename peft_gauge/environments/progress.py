"""A progress bar on a terminal's standard error; elsewhere nothing is shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Display:
    """One bar: `say` sets its text, `advance` counts finished parts, `print` writes a line above the bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def say(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def advance(self, parts: int = 1) -> None:
        self._progress.advance(self._task, parts)

    def print(self, text: str) -> None:
        """Print a result to standard output; the bar is removed and drawn again below it."""
        self._progress.stop()
        print(text, flush=True)
        self._progress.start()


@contextmanager
def bar(parts: int) -> Iterator[Display]:
    """A bar of ``parts``, with the estimated time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Display(progress, progress.add_task("", total=parts))
