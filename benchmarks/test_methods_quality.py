"""What quality does each of the seven methods reach on the same task, for how many parameters, bytes and seconds?

Each method trains on the same batches at its own learning rate and is scored on held-out examples. And does QLoRA keep
the quality of LoRA? The same adapter over the base's weights and over their 4-bit rounding is compared per seed:
quality is kept if the loss is below a margin with the certainty of a 95 % interval. Both comparisons first have to give
the right result on a synthetic task with a known answer: an update of rank 4 planted in q_proj and v_proj. With
``--dataset``, they compare on texts of your own. The claim about QLoRA is decided in `benchmarks.test_facts`.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import pytest

from fixtures.sweeps import FULL, LORA_RATE, MARGIN_BITS, MOST_WRONG, OWN_LENGTHS, REPETITIONS, SEEDS, new_seeds
from peft_gauge.quality import findings, non_inferiority, sweep
from peft_gauge.quality.repetition import error_rate
from peft_gauge.quality.sweep import Lengths, Setting
from peft_gauge.quality.synthetic import PLANTED_RANK, Synthetic, small_decoder
from peft_gauge.quality.training import Schedule, train
from peft_gauge.training import methods

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fixtures.sweeps import TextSweep
    from peft_gauge.quality.sweep import Trained
    from peft_gauge.quality.synthetic import PreparedSynthetic
    from peft_gauge.training.methods import Method
    from peft_gauge.training.models import ModelRecord

PLANTED_LENGTHS = Lengths(steps=100, search_steps=15)
VERDICT_SEEDS, VERDICT_STEPS = (0, 1, 2, 3), 100

PLANTED_LORA = methods.LORA.variant(
    "lora-qv",
    f"LoRA r={PLANTED_RANK} on q,v",
    peft_config={
        "r": PLANTED_RANK,
        "lora_alpha": 2 * PLANTED_RANK,
        "lora_dropout": 0.0,
        "target_modules": methods.ATTENTION_QV,
    },
)
PLANTED_RATE = 0.03

ENOUGH = (Setting("full", methods.FULL, 0.003), Setting("lora", PLANTED_LORA, PLANTED_RATE))
NOT_ENOUGH = (Setting("ia3", methods.IA3, 0.03), Setting("prefix", methods.PREFIX, 0.1))
"""IA³ scales the elements of keys, of values and within the MLP, and prefixes add keys and values: neither can
represent an update that mixes elements, however long it is trained."""

HALF = 0.5
"""Share of the base's error: over three seeds, methods that can represent the planted update removed 0.83 or more of it
(full fine-tuning least, with few tokens for many parameters), and the others at most 0.13."""

PAIRED_SEEDS = 8
"""For QLoRA against LoRA."""

PLANTED_MARGIN = 0.02
"""Share of the base's error: LoRA with newly drawn weights differed from itself by 0.005 (standard deviation), which
gives an interval of ±0.013 over three seeds, while rounding the base of that small model to 4 bit costs 0.35."""

TEXT_SETTINGS = (
    Setting("qlora", methods.QLORA, LORA_RATE),
    Setting("bottleneck", methods.BOTTLENECK, 1e-3),
    Setting("prefix", methods.PREFIX, 3e-2),
    Setting("prompt", methods.PROMPT, 1e-1),
    Setting("ia3", methods.IA3, 1e-1),
    Setting("lora", methods.LORA, LORA_RATE),
    FULL,
)


@pytest.mark.slow
def test_planted_in_reach_of_a_method(record: Callable[..., None]) -> None:
    """Full fine-tuning and LoRA of its rank can represent the planted update, IA³ and prefixes cannot."""
    settings = (*ENOUGH, *NOT_ENOUGH)

    results = sweep.sweep(lambda seed: Synthetic(seed, batches=PLANTED_LENGTHS.steps), settings, SEEDS, PLANTED_LENGTHS)

    metrics = sweep.metrics(results, {})
    record(model=small_decoder().name, task="planted", synthetic_rank=PLANTED_RANK, **metrics)
    by_label = {row["label"]: row for row in metrics["pareto"]}
    for setting in ENOUGH:
        assert by_label[setting.label]["quality_low"] > HALF, f"{setting.label} can hold the planted update"
    for setting in NOT_ENOUGH:
        assert by_label[setting.label]["quality_high"] < HALF, f"{setting.label} cannot hold the planted update"


class WiderSynthetic(Synthetic):
    """Planted in a decoder of twice the width, since bitsandbytes has no 4-bit layers narrower than 64."""

    @property
    def record(self) -> ModelRecord:
        narrow = super().record
        width = 2 * narrow.config["hidden_size"]
        wider = {"hidden_size": width, "intermediate_size": 2 * width, "initializer_range": 1 / math.sqrt(width)}
        return replace(narrow, name="toy-llama-uniform", config_json=json.dumps({**narrow.config, **wider}))


@pytest.mark.slow
def test_planted_drop_in_quality(record: Callable[..., None]) -> None:
    """Test the paired verdict where it is known: LoRA keeps its quality with newly drawn weights, QLoRA does not.

    LoRA on queries and values cannot undo the rounding of all other layers, and such a small model has no capacity to
    spare.
    """
    base, redrawn, rounded = paired_qualities(VERDICT_SEEDS)

    of_redrawn, of_rounded = paired_verdicts(base, redrawn, rounded)
    record(
        model=WiderSynthetic().record.name,
        task="planted",
        redrawn=of_redrawn.as_json(),
        qlora=of_rounded.as_json(),
    )
    assert base != redrawn, "the same draw twice shows nothing"
    assert of_redrawn.holds, of_redrawn.metric
    assert of_rounded.holds is False, of_rounded.metric


@pytest.mark.slow
def test_planted_drop_error_rate(record: Callable[..., None], say: Callable[[str], None]) -> None:
    """How often is the paired verdict over four seeds wrong: a loss where there is none, or none where there is one?"""
    kept: list[bool | None] = []
    lost: list[bool | None] = []
    for repetition in range(REPETITIONS):
        of_redrawn, of_rounded = paired_verdicts(*paired_qualities(new_seeds(repetition, len(VERDICT_SEEDS))))
        kept.append(of_redrawn.holds)
        lost.append(None if of_rounded.holds is None else not of_rounded.holds)
        say(f"[{repetition + 1}/{REPETITIONS}] {of_redrawn.metric}; {of_rounded.metric}")

    without_loss, with_loss = error_rate(kept), error_rate(lost)
    rates = {"without_loss": without_loss.as_json(), "with_loss": with_loss.as_json()}
    record(model=WiderSynthetic().record.name, task="planted", error_rate=rates)
    assert without_loss.wrong_at_most <= MOST_WRONG
    assert with_loss.wrong_at_most <= MOST_WRONG


Qualities = dict[int, float | None]


def paired_qualities(seeds: Sequence[int]) -> tuple[Qualities, Qualities, Qualities]:
    """By seed: LoRA, LoRA with newly drawn weights on the same data, and QLoRA."""
    base: Qualities = {}
    redrawn: Qualities = {}
    rounded: Qualities = {}
    synthetic_qlora = methods.QLORA.variant("qlora-qv", "QLoRA on q,v", peft_config=PLANTED_LORA.peft_config)
    for seed in seeds:
        task = WiderSynthetic(seed, batches=VERDICT_STEPS).prepared()
        anew = replace(task, task=replace(task.task, seed=1000 + seed))  # the same data, the adapter of another seed
        base[seed] = synthetic_quality(task, PLANTED_LORA)
        redrawn[seed] = synthetic_quality(anew, PLANTED_LORA)
        rounded[seed] = synthetic_quality(task, synthetic_qlora)
    return base, redrawn, rounded


def paired_verdicts(
    base: Qualities, redrawn: Qualities, rounded: Qualities
) -> tuple[non_inferiority.NonInferiority, non_inferiority.NonInferiority]:
    """The verdicts on LoRA drawn anew and on QLoRA, each against LoRA."""
    margin = PLANTED_MARGIN
    return (
        non_inferiority.compare(base, redrawn, margin=margin, names=("LoRA", "LoRA drawn anew")),
        non_inferiority.compare(base, rounded, margin=margin, names=("LoRA", "QLoRA")),
    )


def synthetic_quality(task: PreparedSynthetic, method: Method) -> float | None:
    job = task.job(method)
    curve = train(job, Schedule(VERDICT_STEPS, PLANTED_RATE))
    return None if curve.divergence else task.scores(job)["quality"]


@pytest.mark.slow
def test_methods_on_text(text_sweep: TextSweep) -> None:
    """Needs ``--dataset``; resumes after an interruption."""
    swept = text_sweep(lambda model: TEXT_SETTINGS, len(SEEDS), OWN_LENGTHS)

    assert any(result.scores for result in swept.results), "every training diverged"


@pytest.mark.slow
def test_qlora_on_text(text_sweep: TextSweep, record: Callable[..., None]) -> None:
    """The trainings of the first seeds are those of `test_methods_on_text`, and run once for both. Needs ``--dataset``.

    The weights that ``peft-gauge fetch smollm2`` downloads were rounded to 4 bit before, to a grid other than NF4's:
    QLoRA rounds them a second time, LoRA does not.
    """
    pair = [setting for setting in TEXT_SETTINGS if setting.label in {"lora", "qlora"}]
    swept = text_sweep(lambda model: pair, PAIRED_SEEDS, OWN_LENGTHS)

    by_label = sweep.by_label(swept.results)
    lora, qlora = by_label["lora"], by_label["qlora"]
    finding = findings.keeps(
        lora, qlora, swept.conditions, margin=MARGIN_BITS, least=0, quality="bits learned per token"
    )
    record(finding=asdict(finding))
    if all(each.scores for each in (*lora, *qlora)):
        assert first_losses(lora) != first_losses(qlora), "QLoRA's base is LoRA's: nothing was rounded"


def first_losses(results: Sequence[Trained]) -> list[float]:
    """The loss before the first update under each seed, if it was finite."""
    return [result.curve.losses[0][1] for result in results if result.curve is not None and result.curve.losses]
