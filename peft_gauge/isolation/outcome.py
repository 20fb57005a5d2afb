"""The outcome of a function that ran in its own process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Ended = Literal["done", "refused", "out-of-memory", "crashed", "timed-out", "interrupted"]


@dataclass(frozen=True)
class ProcessOutcome:
    """The outcome of a function that ran in its own process.

    Attributes:
        ended: ``done``; ``refused`` (a `GaugeError`, an unknown function); ``out-of-memory``; ``crashed`` (any other
            exception, a signal, an end without a result); ``timed-out``; ``interrupted`` (Ctrl-C).
        value: the function's return value after conversion to JSON (tuples are lists); ``None`` unless done.
        reason: what happened, in one line; ``None`` if done.
        last: the last value of each metric reported by `note` and `watch`; for watched names that end in
            ``_peak_bytes``, the greatest.
        seconds: wall time from the child's start to its end, without the imports of a fork server.
        work_seconds: the part within the function; ``None`` if it neither returned nor raised.
        process: whether the child was forked or spawned.
        why_spawned: why it was spawned although a fork was requested; otherwise ``None``.
    """

    ended: Ended
    value: Any
    reason: str | None
    last: Mapping[str, Any]
    seconds: float
    work_seconds: float | None
    process: Literal["spawned", "forked"] = "spawned"
    why_spawned: str | None = None

    @property
    def origin(self) -> dict[str, str]:
        """``process`` and, if set, ``why_spawned``, as metrics of a case."""
        return {"process": self.process, **({"why_spawned": self.why_spawned} if self.why_spawned else {})}

    @property
    def besides_seconds(self) -> float | None:
        """The time that the separate process added: interpreter, imports, exit."""
        return None if self.work_seconds is None else self.seconds - self.work_seconds


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while a child ran. ``outcome`` has the information up to then; the child has been killed."""

    def __init__(self, outcome: ProcessOutcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome
