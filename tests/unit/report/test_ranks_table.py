"""The table of shared steps: what is shown is what the ranks recorded, in 100 columns."""

from __future__ import annotations

from typing import Any

import pytest

from peft_gauge.history.schema import CaseRecord
from peft_gauge.measure.ranks import summary
from peft_gauge.report.terminal import ranks_table
from peft_gauge.training.methods import METHODS

RANKS: list[dict[str, Any]] = [
    {
        "peak_bytes": peak,
        "step_seconds": seconds,
        "communication": {
            "all_gather": {"calls": 3, "sent_bytes": sent},
            "all_reduce": {"calls": 1, "sent_bytes": 10**6},
        },
        "communication_seconds": waiting,
    }
    for peak, seconds, sent, waiting in (
        (3 * 10**9, [0.1, 0.5, 0.2], 10**9, 0.02),
        (10**9, [0.2, 0.4, 0.1], 2 * 10**9, 0.01),
    )
]


def shared(method: str = "lora", **changed: Any) -> CaseRecord:
    metrics = {
        "method": method,
        "model": "toy",
        "device": "cuda",
        "strategy": "fsdp2",
        "settings": {"batch": 4, "seq": 768, "dtype": "bfloat16", "grad_checkpointing": False},
        "weak_scaling": 0.9,
        "strong_scaling": 1.75,
        **summary(RANKS, 3072),
    }
    return CaseRecord("a", "test_multi_gpu", "passed", None, {**metrics, **changed})


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[:1] == "│"]


def test_each_cell_is_what_the_ranks_recorded() -> None:
    text = ranks_table.summary([shared()], 80)
    assert text.splitlines()[0].rstrip() == "toy on cuda, shared by 2 ranks (fsdp2), 4×768 tokens, bfloat16 each"
    largest, total, imbalance = "3.00 GB", "4.00 GB", "50.0 %"  # 3 over the mean of 3 and 1
    sent, waiting = "2.00 GB", "20.00 ms"  # 2.001 GB by the second rank, 0.02 s by the first
    speed = "30720"  # 2 × 3,072 tokens in 0.2 s: the median of 0.2, 0.5 and 0.2, of the slowest each
    assert cells(text) == [["lora", largest, total, imbalance, sent, waiting, speed, "0.90/1.75"]]


def test_strategies_and_numbers_of_ranks_have_tables_of_their_own() -> None:
    text = ranks_table.summary([shared(), shared(strategy="ddp"), shared(ranks=4), shared("full")], 80)
    assert [len(part) for part in map(cells, text.split("toy on cuda")[1:])] == [2, 1, 1]
    text = ranks_table.summary([shared(ranks=4), shared(ranks=4, replicas=2)], 80)
    assert [line.partition(", 4×")[0] for line in text.splitlines() if "shared by" in line] == [
        "toy on cuda, shared by 4 ranks (fsdp2)",
        "toy on cuda, shared by 4 ranks (fsdp2, 2 replicas)",
    ]


def test_missing_values_are_dashes_and_failed_cases_are_left_out() -> None:
    text = ranks_table.summary([shared(weak_scaling=None, rank_sent_bytes=None)], 80)
    assert cells(text)[0][4] == "–"
    assert cells(text)[0][-1] == "–/1.75"
    assert ranks_table.summary([CaseRecord("a", "m", "failed", "killed", {"method": "lora"})], 80) == ""


def test_a_rank_without_the_others_is_next_to_its_plan() -> None:
    metrics = {
        "method": "lora",
        "model": "toy",
        "device": "cuda",
        "settings": {"batch": 4, "seq": 768, "dtype": "bfloat16", "grad_checkpointing": False},
        "strategy": "fsdp2",
        "lone_ranks": 8,
        "lone_peak_bytes": 2 * 10**9,
        "planned_lone_peak_bytes": 10**9,
        "lone_allocated_peak_bytes": None,
        "planned_lone_allocated_bytes": 10**9,
        "lone_reserved_peak_bytes": 3 * 10**9,
        "planned_lone_reserved_bytes": 4 * 10**9,
    }
    text = ranks_table.summary([CaseRecord("a", "test_one_rank", "passed", None, metrics)], 80)
    assert cells(text) == [["lora", "2.00 GB", "200.0 %", "–", "–", "3.00 GB", "75.0 %"]]
    assert "one of 8 ranks" in text
    assert max(map(len, map(str.rstrip, text.splitlines()))) <= 100


@pytest.mark.parametrize("method", sorted(METHODS, key=len)[-3:])
def test_the_table_has_at_most_100_columns(method: str) -> None:
    settings = {"batch": 4, "seq": 768, "dtype": "bfloat16", "grad_checkpointing": True}
    sizes = dict.fromkeys(("rank_peak_bytes", "rank_peak_bytes_sum", "rank_sent_bytes"), 999_990_000)
    widest = {"rank_communication_seconds": 0.99999, "ranks_tokens_per_second": 99_999_999, "imbalance": 0.999}
    text = ranks_table.summary([shared(method, settings=settings, **sizes, **widest)], 200)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    assert "".join(cell[0] for cell in cells(text)).replace(" ", "") == f"{method},checkpointing"
