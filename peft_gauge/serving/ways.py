"""Ways of serving many adapters from one base: the memory each needs, and how many rows it serves.

No two successive rows use the same adapter. This is the worst case for ways that switch, and makes no difference to
full copies of the model, each with an adapter merged in: their time per row is that of the base, whose forward is timed
next to each round as the control.

Shapes: token ids (rows, seq).
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_gauge.clock import median_ratio
from peft_gauge.clock.rounds import StoppingRule, Stopwatch, WarmUp
from peft_gauge.clock.rounds import measure as measure_rounds
from peft_gauge.errors import GaugeError
from peft_gauge.serving.server import FIRST

if TYPE_CHECKING:
    from torch import Tensor

    from peft_gauge.serving.server import Server

VISITOR = "visitor"
"""Name of the adapter that is loaded from disk for one row."""


@dataclass(frozen=True)
class Way:
    """Timings of one way.

    ``held_bytes``: the most bytes in tensors of base and adapters; ``rows``: served per round; ``seconds``: of each
    round; ``control_seconds``: of one row through the base alone, before each round.
    """

    name: str
    held_bytes: int
    rows: int
    seconds: tuple[float, ...]
    control_seconds: tuple[float, ...]

    @property
    def rows_per_forward(self) -> float:
        """Rows served in the time of one row through the base: the median over rounds."""
        return self.rows / median_ratio(self.seconds, self.control_seconds)

    def as_json(self) -> dict[str, Any]:
        """The record as JSON."""
        return {
            "way": self.name,
            "held_bytes": self.held_bytes,
            "rows": self.rows,
            "rows_per_forward": self.rows_per_forward,
            "seconds": list(self.seconds),
            "control_seconds": list(self.control_seconds),
        }


def beside(server: Server, ids: Tensor, rule: StoppingRule, warm_up: WarmUp) -> list[Way]:
    """The ways with all adapters in memory: switching to each, a batch of one row for each, and (unless that would
    quantize the base again) merging and unmerging each. ``ids`` has one row per adapter.
    """
    turn, row = itertools.cycle(server.names), ids[:1]

    def switch() -> None:
        server.switch(next(turn))
        server.logits(row)

    def merge() -> None:
        server.switch(next(turn))
        server.merge()
        server.logits(row)
        server.unmerge()

    works: dict[str, tuple[Callable[[], object], int]] = {
        "switching": (switch, 1),
        "mixed batch": (lambda: server.mixed_logits(ids, server.names), len(ids)),
    }
    if server.method.quantization is None:
        works["merging"] = (merge, 1)
    held_bytes = server.base_bytes + server.adapters_bytes
    return [
        Way(name, held_bytes, rows, *_timed(server, work, row, rule, warm_up)) for name, (work, rows) in works.items()
    ]


def reloading(server: Server, ids: Tensor, rule: StoppingRule, warm_up: WarmUp) -> Way:
    """The way that reads each row's adapter from disk (cached by the operating system) and deletes it afterwards.

    ``server`` must have its first adapter only, which stays, since PEFT keeps no model without one. Raises `GaugeError`
    for more.
    """
    if server.names != [FIRST]:
        raise GaugeError(f"reloading is timed with {FIRST!r} as the only adapter, got {len(server.names)} adapters")
    row = ids[:1]
    with tempfile.TemporaryDirectory(prefix="peft-gauge-") as place:
        folder = server.save(FIRST, Path(place))

        def come() -> None:
            server.load(folder, VISITOR)
            server.switch(VISITOR)
            server.logits(row)

        def go() -> None:
            server.switch(FIRST)
            server.delete(VISITOR)

        come()
        held_bytes = server.base_bytes + server.adapters_bytes
        go()

        def visit() -> None:
            come()
            go()

        return Way("reloading", held_bytes, 1, *_timed(server, visit, row, rule, warm_up))


def _timed(
    server: Server, work: Callable[[], object], row: Tensor, rule: StoppingRule, warm_up: WarmUp
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds of each round of ``work``, and of ``row`` through the base alone before it.

    Between rounds the adapters are off; switching them is in neither time: it is a separate lap, and preparation.
    """
    server.turn_off()
    try:
        found = measure_rounds(
            [work, server.turn_off],
            server.turn_on,
            Stopwatch(server.device),
            rule,
            control=lambda: server.logits(row),
            warm_up=warm_up,
        )
    finally:
        server.turn_on()
    return tuple(each.laps[0].seconds for each in found.rounds), found.control_seconds
