"""Parts shared by meters: the stack of open phases, and a sampling thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

Readings = Mapping[str, int | None]


class OpenPhases:
    """The open phases, innermost last, each with the greatest value of every metric noted since its start.

    A sampling thread may note while another thread starts and ends phases.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[tuple[str, dict[str, int | None]]] = []

    def __len__(self) -> int:
        return len(self._open)

    def note(self, metrics: Readings) -> None:
        """Count ``metrics`` in every open phase; ``None`` values are ignored."""
        with self._lock:
            self._note(metrics)

    def start(self, name: str, metrics: Readings) -> None:
        """Open phase ``name``; ``metrics`` are the readings at its start."""
        with self._lock:
            self._open.append((name, {}))
            self._note(metrics)

    def end(self, name: str, metrics: Readings) -> dict[str, int | None]:
        """Close the innermost phase, count its last ``metrics``, and return its greatest values.

        Raises `ValueError` if it is not called ``name``; it then stays open.
        """
        with self._lock:
            innermost = self._open[-1][0] if self._open else None
            if innermost != name:
                raise ValueError(f"cannot end phase {name!r}: the innermost open phase is {innermost!r}")
            self._note(metrics)
            return self._open.pop()[1]

    def _note(self, metrics: Readings) -> None:
        for _, greatest in self._open:
            for metric, value in metrics.items():
                before = greatest.get(metric)
                greatest[metric] = value if before is None else before if value is None else max(before, value)


class SampledPhases:
    """Open phases that are read at their start and end, and periodically by a thread in between.

    The thread runs only while a phase is open.

    Args:
        read: returns the present values; called from the thread and from the caller's.
        period_seconds: time between two samples of the thread.
    """

    def __init__(self, read: Callable[[], Readings], period_seconds: float) -> None:
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

    def end(self, name: str) -> tuple[Readings, Readings]:
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
