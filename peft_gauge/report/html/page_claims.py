"""The claims of the literature: each statement once, with its verdict for every model and machine below it."""

from __future__ import annotations

import html
from collections import Counter
from typing import TYPE_CHECKING

from peft_gauge.claims import NOT_MEASURED
from peft_gauge.report.html.page_cells import SIGNS, details, table, text, verdict

if TYPE_CHECKING:
    from peft_gauge.history.ledger import Source, Standing
    from peft_gauge.report.html.page_cells import Line
    from peft_gauge.report.html.page_data import Report

Standings = list[tuple[str, "Standing"]]
GROUPS = {
    "refuted": "Refuted for at least one model",
    "holds": "Hold wherever they were decided",
    "inconclusive": "Not decided",
}
ORDER = ("holds", "refuted", "inconclusive", NOT_MEASURED)


def claims(report: Report) -> str:
    """A sentence and a bar of all verdicts; the claims in three groups that open on demand."""
    found = by_claim(report)
    if not found:
        return "<p>No run decided a claim.</p>"
    counts = Counter(claim.verdict for standings in found.values() for _, claim in standings)
    grouped: dict[str, list[str]] = {name: [] for name in GROUPS}
    for place, (id_, standings) in enumerate(found.items()):
        grouped[overall(standings)].append(_claim(place, id_, standings))
    told = ", ".join(
        f'{verdict(word)} <data value="{counts[word]}" data-verdict="{word.replace(" ", "-")}">{counts[word]:,}</data>'
        for word in ORDER
        if counts[word]
    )
    groups = "".join(
        details("".join(parts), f"{SIGNS[name]} {GROUPS[name]}: {len(parts)}")
        for name, parts in grouped.items()
        if parts
    )
    return (
        f"<p>{len(found):,} claims, each for one or several models; the newest verdict of each machine counts. "
        f"Verdicts: {told}.</p>{_bar(counts)}"
        f'<div id="t-claims">{groups}</div><p id="no-claim" hidden>No claim passes the filters.</p>'
    )


def by_claim(report: Report) -> dict[str, Standings]:
    """The verdicts of each claim, with their machines."""
    found: dict[str, Standings] = {}
    for name, machine in report.machines.items():
        for claim in machine.claims:
            found.setdefault(claim.id, []).append((name, claim))
    return found


def overall(standings: Standings) -> str:
    """The group of a claim: refuted if it is for any model, else holds if it does for any, else not decided."""
    verdicts = {claim.verdict for _, claim in standings}
    return next((name for name in ("refuted", "holds") if name in verdicts), "inconclusive")


def _claim(place: int, id_: str, standings: Standings) -> str:
    statement = next((claim.statement for _, claim in standings if claim.statement), None) or id_
    counts = Counter(claim.verdict for _, claim in standings)
    told = ", ".join(f"{SIGNS.get(word, '·')} {counts[word]} {word}" for word in ORDER if counts[word])
    lines: list[Line] = [
        (
            {"model": None if claim.model == "any" else claim.model, "machine": machine},
            [
                text(claim.model),
                verdict(claim.verdict),
                *map(text, (claim.metric, claim.conditions, _decided(claim.source), machine)),
            ],
        )
        for machine, claim in standings
    ]
    headings = ("model", "verdict", "measured", "conditions", "decided (UTC)", "machine")
    return (
        f'<details class="claim" data-claim="{html.escape(id_)}"><summary>{text(statement)} '
        f"<small>{text(told)}</small></summary>{table(f't-claim-{place}', f'Claim {id_}', headings, lines)}</details>"
    )


def _decided(source: Source | None) -> str | None:
    return f"{source.ended:%Y-%m-%d}, run {source.run}" if source is not None else None


def _bar(counts: Counter[str]) -> str:
    """The shares of the verdicts; the sentence above holds the numbers."""
    whole = sum(counts.values())
    parts = "".join(
        f'<span class="share {name}" data-share="{name}" style="width:{100 * counts[word] / whole:.2f}%"></span>'
        for word in ORDER
        if counts[word]
        for name in [word.replace(" ", "-")]
    )
    return f'<div class="shares" aria-hidden="true">{parts}</div>'
