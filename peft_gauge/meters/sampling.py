"""Parts shared by meters: the stack of open phases, and a sampling thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

Figures = Mapping[str, int | None]


class OpenPhases:
    """The open phases, innermost last, each with the greatest value of every metric noted since its start.

    A sampling thread may note while another thread starts and ends phases.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[tuple[str, dict[str, int | None]]] = []

    def __len__(self) -> int:
        return len(self._open)

    def note(self, figures: Figures) -> None:
        """Count ``figures`` in every open phase; ``None`` values are ignored."""
        with self._lock:
            self._note(figures)

    def start(self, name: str, figures: Figures) -> None:
        """Open phase ``name``; ``figures`` are the readings at its start."""
        with self._lock:
            self._open.append((name, {}))
            self._note(figures)

    def end(self, name: str, figures: Figures) -> dict[str, int | None]:
        """Close the innermost phase, count its last ``figures``, and return its greatest values.

        Raises `ValueError` if it is not called ``name``; it then stays open.
        """
        with self._lock:
            innermost = self._open[-1][0] if self._open else None
            if innermost != name:
                raise ValueError(f"cannot end phase {name!r}: the innermost open phase is {innermost!r}")
            self._note(figures)
            return self._open.pop()[1]

    def _note(self, figures: Figures) -> None:
        for _, greatest in self._open:
            for figure, value in figures.items():
                before = greatest.get(figure)
                greatest[figure] = value if before is None else before if value is None else max(before, value)


class SampledPhases:
    """Open phases that are read at their start and end, and periodically by a thread in between.

    The thread runs only while a phase is open.

    Args:
        read: returns the present values; called from the thread and from the caller's.
        period_seconds: time between two samples of the thread.
    """

    def __init__(self, read: Callable[[], Figures], period_seconds: float) -> None:
        self._read = read
        self._period_seconds = period_seconds
        self._phases = OpenPhases()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, name: str) -> None:
        """Open phase ``name``."""
        self._phases.start(name, self._read())
        if self._thread is None:
            self._end.clear()
            self._thread = threading.Thread(target=self._sample, name="peft-gauge-sampler", daemon=True)
            self._thread.start()

    def end(self, name: str) -> tuple[Figures, Figures]:
        """Close phase ``name``; returns its greatest values and its last ones.

        Re-raises an exception that stopped the thread: peaks may have been missed.
        """
        last = self._read()
        greatest = self._phases.end(name, last)
        if not self._phases and self._thread is not None:
            self._end.set()
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return greatest, last

    def _sample(self) -> None:
        while not self._end.wait(self._period_seconds):
            try:
                self._phases.note(self._read())
            except BaseException as error:  # re-raised at the end of the phase
                self._error = error
                return
