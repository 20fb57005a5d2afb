"""How a function in a process of its own ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Ended = Literal["done", "refused", "out-of-memory", "crashed", "timed-out", "interrupted"]


@dataclass(frozen=True)
class ProcessOutcome:
    """How a function in a process of its own ended.

    Attributes:
        ended: ``done``; ``refused`` (a `GaugeError`, an unknown function); ``out-of-memory``; ``crashed`` (any other
            exception, a signal, an end without a result); ``timed-out``; ``interrupted`` (Ctrl-C).
        value: what the function returned, as JSON gives it back (tuples are lists); ``None`` unless done.
        reason: one line on what happened; ``None`` if done.
        last: the metrics last told by `note` and `watch`, later ones over earlier; of watched names that end in
            ``_peak_bytes`` the greatest.
        seconds: wall time from the child's start to its end; the imports of a fork server, once for all its children,
            are before that.
        work_seconds: the part within the function itself; ``None`` if it neither returned nor raised.
        process: how the child came to be.
        why_spawned: why it was not forked although it could have been asked to be; ``None`` if nobody asked.
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
        """``process`` and, where there is one, ``why_spawned``, as metrics of a case."""
        return {"process": self.process, **({"why_spawned": self.why_spawned} if self.why_spawned else {})}

    @property
    def besides_seconds(self) -> float | None:
        """What the process of its own cost: interpreter, imports, end."""
        return None if self.work_seconds is None else self.seconds - self.work_seconds


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while a child ran; ``outcome`` is what was known of it when it was killed."""

    def __init__(self, outcome: ProcessOutcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome
