"""The error rate of a procedure whose right verdict is known, from repetitions with new seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peft_gauge.errors import GaugeError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class ErrorRate:
    """Of ``repetitions``, how many verdicts were ``right``, ``wrong`` and ``inconclusive``.

    ``wrong_at_most``: upper bound of the probability of a wrong verdict, one-sided with a confidence of 95 %, exact
    for binomial counts (Clopper and Pearson 1934): with no error in n repetitions, 1 - 0.05^(1/n).
    """

    repetitions: int
    right: int
    wrong: int
    inconclusive: int
    wrong_at_most: float

    def as_json(self) -> dict[str, Any]:
        """The record as JSON."""
        return asdict(self)


def error_rate(verdicts: Sequence[bool | None]) -> ErrorRate:
    """The error rate of ``verdicts``, each ``True`` if it was right, ``False`` if wrong, ``None`` if inconclusive."""
    if not verdicts:
        raise GaugeError("an error rate needs at least 1 repetition")
    from scipy.stats import binomtest

    wrong = sum(verdict is False for verdict in verdicts)
    bound = binomtest(wrong, len(verdicts), alternative="less").proportion_ci(CONFIDENCE).high
    inconclusive = sum(verdict is None for verdict in verdicts)
    return ErrorRate(len(verdicts), len(verdicts) - wrong - inconclusive, wrong, inconclusive, float(bound))
