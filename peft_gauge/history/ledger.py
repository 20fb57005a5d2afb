"""The newest verdict on every claim, over many saved runs.

A default run decides some claims and a slow run others, so no single run decides all. For each claim and model, the
newest run that decided it counts. "Not measured yet" decides nothing and replaces no earlier verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from peft_gauge.claims import NOT_MEASURED, VERDICTS

if TYPE_CHECKING:
    from peft_gauge.claims import Claim
    from peft_gauge.history.reader import Run


@dataclass(frozen=True)
class Source:
    """The run that a verdict is from.

    ``ended``: its end, in UTC; ``commit``: the first digits, marked if there were uncommitted changes, or ``None`` if
    the run names no commit; ``libraries``: the versions by name, ``None`` for a library that was not installed.
    """

    machine: str
    run: str
    ended: datetime
    commit: str | None
    libraries: Mapping[str, str | None] = field(hash=False)

    @classmethod
    def of(cls, run: Run) -> Source:
        """``run`` as a source; it must be saved by peft-gauge, since those of other tools name no machine."""
        commit = run.commit.get("id")
        changed = "-dirty" if run.commit.get("dirty") else ""
        return cls(
            machine=run.machine["name"],
            run=run.name,
            ended=run.when.astimezone(UTC),
            commit=f"{str(commit)[:12]}{changed}" if commit else None,
            libraries=dict(run.libraries),
        )


@dataclass(frozen=True)
class Standing:
    """The state of a claim for one model.

    If no run has decided it, ``verdict`` is "not measured yet", and ``metric``, ``conditions`` and ``source`` are
    ``None``. ``statement`` is the sentence as in that run. ``recorded``: the verdict in the ledger, for a claim of the
    ledger.
    """

    id: str
    model: str
    statement: str | None = None
    verdict: str = NOT_MEASURED
    metric: str | None = None
    conditions: str | None = None
    source: Source | None = None
    recorded: str | None = None
    reworded: bool = False
    """Whether the ledger's sentence differs from the decided one."""

    @property
    def differs(self) -> bool:
        """Whether the claim was decided, and differently from the ledger's recorded verdict."""
        return self.source is not None and self.recorded is not None and self.verdict != self.recorded


class NewestVerdicts:
    """The newest verdict on each claim and model over all runs so far; the runs may come in any order (`add`)."""

    def __init__(self) -> None:
        # By claim and model: the first record of the claim, and the newest that decides it with its source.
        self._first: dict[tuple[str, str], Mapping[str, Any]] = {}
        self._decided: dict[tuple[str, str], tuple[Mapping[str, Any], Source]] = {}

    def add(self, run: Run) -> None:
        """Add the claims of ``run``; of two runs that ended at the same moment, the one added last counts."""
        source: Source | None = None
        for claim in run.claims:
            key = claim["id"], claim["model"]
            self._first.setdefault(key, claim)
            if claim["verdict"] not in VERDICTS:
                continue
            source = source or Source.of(run)
            known = self._decided.get(key)
            if known is None or known[1].ended <= source.ended:
                self._decided[key] = claim, source

    def standings(self) -> list[Standing]:
        """All claims that any run evaluates, in the order in which they first occurred."""
        return list(map(self._standing, self._first))

    def _standing(self, key: tuple[str, str]) -> Standing:
        if key not in self._decided:
            return Standing(*key, _text(self._first.get(key, {}), "statement"))
        claim, source = self._decided[key]
        statement, metric, conditions = (_text(claim, name) for name in ("statement", "metric", "conditions"))
        return Standing(*key, statement, claim["verdict"], metric, conditions, source)

    def of_ledger(self, claims: Mapping[str, Claim]) -> list[Standing]:
        """Every claim of the ledger for each of its models, in the ledger's order and words."""
        return [self._of_claim(claim, model) for claim in claims.values() for model in claim.models]

    def _of_claim(self, claim: Claim, model: str) -> Standing:
        found = self._standing((claim.id, model))
        decided = found.source is not None
        return replace(
            found,
            statement=claim.statement,
            recorded=claim.recorded[model],
            reworded=decided and found.statement is not None and found.statement != claim.statement,
        )


def _text(claim: Mapping[str, Any], name: str) -> str | None:
    value = claim.get(name)
    return None if value is None else str(value)
