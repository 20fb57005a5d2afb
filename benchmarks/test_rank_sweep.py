"""Which rank is the best trade of quality against trainable parameters, against memory and against time?

First on a task of known truth: an update of rank 4 is planted in q_proj and v_proj of every layer of a small decoder,
and students learn it back from its logits. Quality must rise until the rank is 4 and then stop, and the knee of the
sweep must be there, or no knee that this sweep finds elsewhere is to be believed. Then (``-m slow``) on a text task on
a real model, ranks 2 to 64 beside full fine-tuning; what is found there is recorded and not asserted.

And how many ranks has the update that full fine-tuning makes, against a random matrix of the same size?
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import pytest

from peft_gauge import methods
from peft_gauge.plan.planner import plan
from peft_gauge.plan.record import PlanRequest
from peft_gauge.quality import sweep
from peft_gauge.quality.planted import PLANTED_RANK, Planted, small_decoder
from peft_gauge.quality.sweep import Lengths, Setting
from peft_gauge.quality.tasks import CALENDAR
from peft_gauge.quality.training import Schedule, train
from peft_gauge.quality.updates import update_ranks

if TYPE_CHECKING:
    from collections.abc import Callable

    from fixtures.sweeps import TextSweep


pytestmark = pytest.mark.slow  # a bare run has its five minutes filled

SEEDS = (0, 1, 2)
PLANTED_LENGTHS = Lengths(steps=100, search_steps=25)
PLANTED_RANKS = (2, 3, 4, 8)

REACHED = 0.9
"""Share of the base's error that must be learned away at the planted rank, and cannot be below it
(`tests/test_quality_planted.py` has the figures)."""

TEXT_LENGTHS = Lengths(steps=100, search_steps=20)


def test_planted_rank(record: Callable[..., None]) -> None:
    settings = [planted_lora(rank) for rank in PLANTED_RANKS]
    # The planned step is the language model's own: the same shape, its loss against tokens and not against logits.
    steps = {s.label: PlanRequest(small_decoder(), s.method, Planted().settings, dtype="float32") for s in settings}
    peak_bytes = {label: plan(step).peak_bytes for label, step in steps.items()}

    results = sweep.sweep(lambda seed: Planted(seed, batches=PLANTED_LENGTHS.steps), settings, SEEDS, PLANTED_LENGTHS)

    figures = sweep.figures(results, peak_bytes)
    record(model="toy-llama-half", task="planted", planted_rank=PLANTED_RANK, **figures)
    by_label = {row["label"]: row for row in figures["pareto"]}
    for rank in PLANTED_RANKS:
        row = by_label[f"r{rank}"]
        if rank < PLANTED_RANK:
            assert row["quality_high"] < REACHED, f"rank {rank} cannot hold an update of rank {PLANTED_RANK}"
        else:
            assert row["quality_low"] > REACHED, f"rank {rank} can hold an update of rank {PLANTED_RANK}"
    knee = figures["knees"]["trainable_params"]
    assert (knee["knee"], knee["knee_share"]) == (f"r{PLANTED_RANK}", 1.0), "the sweep does not see what was planted"


def test_rank_of_a_full_update(record: Callable[..., None]) -> None:
    """The least rank that holds 90 % of an update's squared norm.

    Values enter the output linearly, so that full fine-tuning finds their planted update as it is; queries act through
    their products with keys, which move too. Where nothing was planted, what moves has nearly the rank of chance.
    """
    task = Planted(batches=100, batch=16, seq=32).prepared()
    job = task.job(methods.FULL)

    curve = train(job, Schedule(100, 0.01))

    ranks = update_ranks(task.base, job.model)
    shares = [found / of_random for found, of_random in ranks.values()]
    record(
        model="toy-llama-half",
        task="planted",
        curve=curve.as_json(),
        scores=task.scores(job),
        energy_ranks=ranks,
        median_share_of_random=statistics.median(shares),
    )
    assert curve.divergence is None
    assert {found for path, (found, _) in ranks.items() if path.endswith("v_proj")} == {PLANTED_RANK}


@pytest.mark.slow
def test_rank_on_text(text_sweep: TextSweep) -> None:
    """Half an hour a seed on two cores with SmolLM2; interrupted, it goes on where it stopped."""
    settings = [*(text_lora(rank) for rank in methods.RANKS), Setting("full", methods.FULL, 1e-4)]

    source, results = text_sweep(lambda model: settings, len(SEEDS), TEXT_LENGTHS)

    learned = [result.scores for result in results if result.scores]
    assert learned, "every training diverged"
    if source == CALENDAR:
        assert all(scores["base_exact_match"] == 0 for scores in learned), "the base knew the invented calendar"
        assert max(scores["quality"] for scores in learned) > 0.5, "nothing learned the calendar"


def planted_lora(rank: int) -> Setting:
    config = {
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "target_modules": methods.ATTENTION_QV,
    }
    # The searches of tests and of longer sweeps ended within one step of this rate.
    return Setting(f"r{rank}", methods.LORA.differs(f"lora-qv-r{rank}", f"LoRA r={rank}", peft_config=config), 0.03)


def text_lora(rank: int) -> Setting:
    method = methods.get("lora" if rank == methods.LORA.peft_config["r"] else f"lora-r{rank}")
    return Setting(f"r{rank}", method, 3e-3)
