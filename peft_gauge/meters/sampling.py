"""What meters share: the phases that are open, and a thread that reads now and again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

Figures = Mapping[str, int | None]


class OpenPhases:
    """The open phases, innermost last, each with the greatest value of every figure noted since it was started.

    A sampling thread may note while another thread starts and ends phases.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[tuple[str, dict[str, int | None]]] = []

    def __len__(self) -> int:
        return len(self._open)

    def note(self, figures: Figures) -> None:
        """Count ``figures`` in every open phase; a figure that is ``None`` changes nothing."""
        with self._lock:
            self._note(figures)

    def start(self, name: str, figures: Figures) -> None:
        """Open phase ``name``; ``figures`` are how things stand at its start."""
        with self._lock:
            self._open.append((name, {}))
            self._note(figures)

    def end(self, name: str, figures: Figures) -> dict[str, int | None]:
        """Close the innermost phase and give its greatest figures, those of its last moment among them.

        Raises `ValueError` if it is not called ``name``; it stays open then.
        """
        with self._lock:
            innermost = self._open[-1][0] if self._open else None
            if innermost != name:
                raise ValueError(f"phase {name!r} is to end, but the innermost open one is {innermost!r}")
            self._note(figures)
            return self._open.pop()[1]

    def _note(self, figures: Figures) -> None:
        for _, greatest in self._open:
            for figure, value in figures.items():
                before = greatest.get(figure)
                greatest[figure] = value if before is None else before if value is None else max(before, value)


class SampledPhases:
    """Open phases whose figures are read at their starts and ends, and between these by a thread, period by period.

    The thread runs only while a phase is open.

    Args:
        read: gives the figures of this moment; called from the thread and from the caller's.
        period_seconds: the pause between two samples of the thread.
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
        """Close phase ``name``: its greatest figures, and those of its last moment.

        Raises what the thread met, if that stopped it: peaks may then have been missed.
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
            except BaseException as error:  # handed to whoever ends the phase
                self._error = error
                return
