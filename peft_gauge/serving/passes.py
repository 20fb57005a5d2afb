"""Measure one base with many adapters, in the process that calls this."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from peft_gauge import isolation
from peft_gauge.serving import ways
from peft_gauge.serving.observed import merge_cycles, mix, spread, time_switches, turn_over, visit
from peft_gauge.serving.server import BASE, Server, grow, token_ids
from peft_gauge.training import models

if TYPE_CHECKING:
    from torch import Tensor

    from peft_gauge.clock.rounds import StoppingRule, WarmUp
    from peft_gauge.training.cases import Case


@dataclass(frozen=True)
class ServingSetup:
    """The work of one process.

    Fields:
        case: model, method, device, dtype and seed; of its settings, the sequence length.
        counts: numbers of adapters, ascending.
        rule, warm_up: for the timing of switches.
        cycles: number of merges and unmerges of the last adapter.
    """

    case: Case
    counts: tuple[int, ...]
    rule: StoppingRule
    warm_up: WarmUp
    cycles: int = 10


def measure(setup: ServingSetup) -> dict[str, Any]:
    """Metrics of ``setup``, as JSON: ``reloading``, with one adapter; ``served``, a record for each count; and, with
    the most adapters, ``turnover`` and ``merging``."""
    case = setup.case
    isolation.note(phase="load")
    base = models.build(case.model, dtype=case.dtype, attn_implementation=case.attention)
    server = Server(base, case.method, seed=case.seed, device=case.device)
    isolation.note(phase="reloading")
    ids = token_ids(server, 1, case.settings.seq, case.seed)
    reloading = ways.reloading(server, ids, setup.rule, setup.warm_up).as_json()
    served = []
    for number in setup.counts:
        isolation.note(phase=f"{number} adapters")
        grow(server, number, case.seed)
        served.append({"adapters": number, **metrics(server, setup)})
    isolation.note(phase="merging")
    turnover = turn_over(server, ids, server.names[-1])
    merging = merging_metrics(server, ids, setup.cycles)
    return {"reloading": reloading, "served": served, "turnover": asdict(turnover), "merging": merging}


def metrics(server: Server, setup: ServingSetup) -> dict[str, Any]:
    """Metrics of ``server`` with its present adapters, as a flat record."""
    looked_at = spread(server.names, 2)
    names = [*looked_at, BASE, looked_at[0]]  # the rows of an adapter need not be adjacent
    ids = token_ids(server, len(names), setup.case.settings.seq, setup.case.seed)
    visits = visit(server, ids, looked_at)
    mixing = mix(server, ids, names, visits)
    rounds = time_switches(server, ids[:1], setup.rule, setup.warm_up)
    number = len(server.names)
    one_each = token_ids(server, number, setup.case.settings.seq, setup.case.seed)
    return {
        "adapter_bytes": server.adapters_bytes / number,
        "full_copy_bytes": server.base_bytes,
        "served_bytes": server.base_bytes + server.adapters_bytes,
        "full_copies_bytes": number * server.base_bytes,
        "visited": len(visits.outputs),
        "returned": len(visits.returned),
        "least_difference": visits.least_difference,
        "mixed_max_error": mixing.max_error,
        "rounding_error": mixing.rounding_error,
        "mixed_holds": mixing.holds,
        "switch_over_forward": rounds.over_control,
        "switch_seconds": list(rounds.seconds),
        "control_seconds": list(rounds.control_seconds),
        "ways": [way.as_json() for way in ways.beside(server, one_each, setup.rule, setup.warm_up)],
    }


def merging_metrics(server: Server, ids: Tensor, cycles: int) -> dict[str, Any]:
    """Metrics of merging and unmerging the active adapter, as a flat record."""
    found = merge_cycles(server, ids, cycles)
    record: dict[str, Any] = {
        "merged_max_error": found.max_error,
        "drift_after_one_cycle": found.drifts[0],
        "drift_after_all_cycles": found.drifts[-1],
        "cycles": cycles,
        "largest_weight": found.weight_size,
    }
    if found.outputs:
        record["merged_share_of_bound"] = max(each.share_of_bound for each in found.outputs)
        record["restored_share_of_bound"] = max(each.share_of_bound for each in found.restored)
    return record
