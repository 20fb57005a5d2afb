"""The ledger of claims: measurable statements from teaching material.

``fixtures/claims.toml`` lists each claim with its models, how it is decided, and the recorded verdict.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

from peft_gauge import paths
from peft_gauge.errors import GaugeError, unknown

Verdict = Literal["holds", "refuted", "inconclusive"]
VERDICTS = get_args(Verdict)

# The recorded verdict of a claim that no case has decided yet.
NOT_MEASURED = "not measured yet"


@dataclass(frozen=True)
class Finding:
    """A measurement's result for a claim: the verdict, the metric behind it, and the conditions."""

    verdict: Verdict
    metric: str
    conditions: str

    @classmethod
    def of(cls, holds: bool | None, metric: str, conditions: str) -> Finding:
        """The finding with verdict ``holds``: True, False, or ``None`` for "inconclusive"."""
        verdicts: dict[bool | None, Verdict] = {True: "holds", False: "refuted", None: "inconclusive"}
        return cls(verdicts[holds], metric, conditions)


@dataclass(frozen=True)
class Claim:
    """One claim of the ledger.

    ``models`` are record names, or ``("any",)`` for a claim independent of the model; ``bounds`` are the numbers in the
    statement, as its decider needs them; ``recorded`` is the verdict for each model, or "not measured yet";
    ``benchmark`` is the module of ``benchmarks/`` that decides it.
    """

    id: str
    statement: str
    decided_by: str
    models: tuple[str, ...]
    recorded: dict[str, str]
    bounds: dict[str, Any] = field(default_factory=dict)
    benchmark: str = "test_claims.py"


@cache
def ledger(path: Path | None = None) -> dict[str, Claim]:
    """All claims by id, in the order of the file; raises `GaugeError` for an incomplete entry."""
    source = path or paths.fixture("claims.toml")
    try:
        entries = tomllib.loads(source.read_text(encoding="utf-8"))["claim"]
    except (OSError, tomllib.TOMLDecodeError, KeyError) as error:
        raise GaugeError(f"{source} is not a valid ledger of claims: {error}") from error
    claims: dict[str, Claim] = {}
    for entry in entries:
        claim = _claim(entry, source)
        if claim.id in claims:
            raise GaugeError(f"{source}: the claim {claim.id} is listed twice; remove one")
        claims[claim.id] = claim
    return claims


def _claim(entry: dict[str, Any], source: Path) -> Claim:
    missing = {"id", "statement", "decided_by", "models", "recorded"} - entry.keys()
    if missing:
        raise GaugeError(f"{source}: the claim {entry.get('id', '?')} lacks {', '.join(sorted(missing))}")
    models = tuple(entry["models"])
    recorded = {model: entry["recorded"].get(model, NOT_MEASURED) for model in models}
    for model in entry["recorded"].keys() - set(models):
        raise unknown(f"model in the verdicts of {entry['id']}", model, models)
    for verdict in recorded.values():
        if verdict not in (*VERDICTS, NOT_MEASURED):
            raise unknown(f"verdict of {entry['id']}", cast("str", verdict), (*VERDICTS, NOT_MEASURED))
    named = {name: entry[name] for name in ("bounds", "benchmark") if name in entry}
    return Claim(entry["id"], entry["statement"], entry["decided_by"], models, recorded, **named)
