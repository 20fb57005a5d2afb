"""Which rank, which modules, which rate, which variant, and does QLoRA keep up? Decided by bits stored about facts.

A task decides such a question only if its seeds differ by less than its settings. With random facts they do: the loss
has nothing else in it, and the number of facts sets how much room they take (`peft_gauge.quality.facts`). Each question
is put to small decoders, one pretrained for each seed, and to the last layers of SmolLM2-135M's real weights. Every
setting has the learning rate that is best for it at the full length of the training, data and order are the same for
all, and seeds are added until the interval decides or there are eight.

Facts measure how much a method can store. Composed facts measure whether it learns a rule: they are scored on pairs of
tokens that were never trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fixtures.facts import CROWDED, DECODER, REAL, FactTask, swept
from peft_gauge.claims import Finding, ledger
from peft_gauge.quality import findings
from peft_gauge.quality.fact_bases import LAYERS, WIDTH
from peft_gauge.quality.sweep import Setting, by_label
from peft_gauge.training import methods

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fixtures.facts import FactSweep
    from fixtures.verdicts import Decide
    from peft_gauge.quality.sweep import Trained

pytestmark = pytest.mark.slow

ALPHA = 32
STEPS, REAL_STEPS = 600, 400
"""Each fact is trained on at least 75 times: a first try with 20 to 30 ended while bits left were still falling."""

TARGETS = {"q,v": methods.ATTENTION_QV, "q,k,v,o": methods.ATTENTION, "all-linear": methods.ALL_LINEAR}

FULL = Setting("full", methods.FULL, 3e-4)
FULL_OF_LAYERS = Setting(
    "full", methods.FULL.variant("full-layers", "full fine-tuning of the layers", trains=(r"\.layers\.",)), 3e-4
)
"""Embeddings and output layer of a real model stay frozen, as the layers before the last ones do."""


def full_of(task: FactTask) -> Setting:
    return FULL if task.base == DECODER else FULL_OF_LAYERS


def lora(
    rank: int,
    targets: str,
    *,
    label: str = "",
    rate: float | None = None,
    loraplus_ratio: float | None = None,
    quantized: bool = False,
    **config: object,
) -> Setting:
    """LoRA with a fixed α: then the best rate hardly depends on the rank."""
    settings = {"r": rank, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": TARGETS[targets], **config}
    label = label or f"r{rank}"
    base = methods.QLORA if quantized else methods.LORA
    # Named without the label: sweeps share equal trainings.
    method = base.variant(f"{base.name} {targets} r{rank}", f"{base.title} r={rank} on {targets}", peft_config=settings)
    return Setting(label, method, rate or (1e-2 if targets == "q,v" else 3e-3), loraplus_ratio)


# --- rank -------------------------------------------------------------------------------------------------------------

RANKED = {
    "fact-decoder-128": (FactTask(DECODER, 128, STEPS, finer=True), "q,v"),
    "fact-decoder-512": (FactTask(DECODER, 512, STEPS, finer=True), "q,v"),
    "fact-decoder-1024": (FactTask(DECODER, 1024, 2 * STEPS, finer=True), "q,v"),
    "smollm2-135m-qv": (FactTask(REAL, 256, REAL_STEPS), "q,v"),
    "smollm2-135m": (FactTask(REAL, 256, REAL_STEPS), "all-linear"),
}


def ranks_on(targets: str) -> list[Setting]:
    return [lora(rank, targets) for rank in methods.RANKS]


@pytest.mark.claim("rank-tradeoff")
@pytest.mark.parametrize("name", RANKED)
def test_ranks(name: str, fact_sweep: FactSweep, decide: Decide) -> None:
    task, targets = RANKED[name]
    margin = ledger()["rank-tradeoff"].bounds["margin_bits"]

    def decided(results: Sequence[Trained]) -> Finding:
        ranks = [result for result in results if result.label != FULL.label]
        return findings.best_rank(ranks, f"{task.conditions}, LoRA on {targets}", margin=margin)

    results = fact_sweep(task, [full_of(task), *ranks_on(targets)], decided)
    decide("rank-tradeoff", name, decided(results))


@pytest.mark.claim("rank-capacity")
def test_capacity(decide: Decide, record: Callable[..., None], say: Callable[[str], None]) -> None:
    """From the trainings of `test_ranks`, which run once for both."""
    full, ranks = {}, {}
    for number in (128, 512, 1024):
        task, targets = RANKED[f"fact-decoder-{number}"]
        results = by_label(swept(task, [full_of(task), *ranks_on(targets)], 3, say))
        full[number] = results.pop("full")
        ranks[number] = [result for group in results.values() for result in group]
    bounds = ledger()["rank-capacity"].bounds
    decide("rank-capacity", DECODER, findings.capacity_decides(full, ranks, **bounds))


# --- learning rates ---------------------------------------------------------------------------------------------------


RATED = {
    DECODER: FactTask(DECODER, 2048, STEPS // 5, finer=True),
    REAL: FactTask(REAL, 1024, REAL_STEPS // 8, finer=True),
}
"""So short that no setting stores everything: then its best rate is well determined."""


@pytest.mark.claim("lora-rate")
@pytest.mark.parametrize("name", RATED)
def test_rates(name: str, fact_sweep: FactSweep, decide: Decide) -> None:
    task = RATED[name]
    settings = [full_of(task), *ranks_on("all-linear")]
    results = by_label(fact_sweep(task, settings, seeds=1))
    full = results.pop("full")
    ranks = [result for group in results.values() for result in group]
    bounds = ledger()["lora-rate"].bounds
    finding = findings.ten_times_the_rate(full, ranks, f"{task.conditions}, LoRA on all-linear, seed 0", **bounds)
    decide("lora-rate", name, finding)


# --- target modules ---------------------------------------------------------------------------------------------------

PARAMS_PER_RANK = {
    # q_proj, k_proj, v_proj, o_proj of width × width; gate_proj and up_proj to 3 × width, down_proj back
    DECODER: {"q,v": 4 * WIDTH * LAYERS, "q,k,v,o": 8 * WIDTH * LAYERS, "all-linear": 20 * WIDTH * LAYERS},
    # the last two layers: q_proj and o_proj 576×576, k_proj and v_proj 576×192, the others 576×1536
    REAL: {"q,v": 3840, "q,k,v,o": 7680, "all-linear": 20352},
}
TARGET_TASKS = {
    DECODER: (FactTask(DECODER, 2048, 2 * STEPS, finer=True), 10),
    REAL: (FactTask(REAL, 256, REAL_STEPS), 4),
}
"""Tasks that leave bits to gain, and the rank on q,v whose parameters all sets have."""


def at_equal_parameters(name: str) -> list[Setting]:
    """Each set at the rank that comes nearest to the parameters of q,v."""
    budget = TARGET_TASKS[name][1] * PARAMS_PER_RANK[name]["q,v"]
    ranks = {targets: round(budget / per_rank) for targets, per_rank in PARAMS_PER_RANK[name].items()}
    return [lora(rank, targets, label=f"{targets} r{rank}") for targets, rank in ranks.items()]


@pytest.mark.claim("target-tradeoff")
@pytest.mark.parametrize("name", TARGET_TASKS)
def test_targets(name: str, fact_sweep: FactSweep, decide: Decide) -> None:
    task, settings = TARGET_TASKS[name][0], at_equal_parameters(name)
    margin = ledger()["target-tradeoff"].bounds["margin_log"]

    def decided(results: Sequence[Trained]) -> Finding:
        return findings.best_targets(results, task.conditions, margin=margin)

    decide("target-tradeoff", name, decided(fact_sweep(task, settings, decided)))


@pytest.mark.claim("all-linear")
@pytest.mark.parametrize("name", TARGET_TASKS)
def test_all_linear_layers(name: str, fact_sweep: FactSweep, decide: Decide) -> None:
    """Two of the sets of `test_targets`, whose trainings run once for both."""
    task = TARGET_TASKS[name][0]
    attention, all_linear = at_equal_parameters(name)[1:]
    margin = ledger()["all-linear"].bounds["margin_bits"]

    def decided(results: Sequence[Trained]) -> Finding:
        groups = by_label(results)
        return findings.learns_more(groups[attention.label], groups[all_linear.label], task.conditions, margin=margin)

    decide("all-linear", name, decided(fact_sweep(task, [attention, all_linear], decided)))


# --- QLoRA, forgetting, variants --------------------------------------------------------------------------------------

LEARNED = {DECODER: FactTask(DECODER, 512, STEPS, finer=True), REAL: FactTask(REAL, 256, REAL_STEPS)}


@pytest.mark.claim("qlora-quality")
@pytest.mark.parametrize("name", LEARNED)
def test_qlora(name: str, fact_sweep: FactSweep, decide: Decide) -> None:
    """The weights that ``peft-gauge fetch smollm2`` downloads were rounded to 4 bit before, to a grid other than NF4's:
    QLoRA rounds them a second time, LoRA does not."""
    task, plain = TARGET_TASKS[name][0], at_equal_parameters(name)[-1]
    rank = plain.method.peft_config["r"]
    quantized = lora(rank, "all-linear", label=f"QLoRA r{rank}", quantized=True)
    margin = ledger()["qlora-quality"].bounds["margin_bits"]

    def decided(results: Sequence[Trained]) -> Finding:
        groups = by_label(results)
        conditions = f"{task.conditions}, all-linear; NF4 with double quantization, computing in float32"
        return findings.keeps(groups[plain.label], groups[quantized.label], conditions, margin=margin)

    results = fact_sweep(task, [plain, quantized], decided)
    decide("qlora-quality", name, decided(results))
    first = [[each.curve.losses[0] for each in group if each.curve] for group in by_label(results).values()]
    assert first[0] != first[1], "QLoRA's base is LoRA's: nothing was rounded"


RECOVERED = {
    "crowded-fact-decoder-r2": (FactTask(CROWDED, 16_384, 2 * STEPS, old=True), 2),
    "crowded-fact-decoder-r16": (FactTask(CROWDED, 16_384, 2 * STEPS, old=True), 16),
    "smollm2-135m": (FactTask(REAL, 256, REAL_STEPS // 2, old=True), 16),
}


@pytest.mark.claim("lora-recovers-rounding")
@pytest.mark.parametrize("name", RECOVERED)
def test_recovery_from_rounding(name: str, fact_sweep: FactSweep, decide: Decide) -> None:
    """LoRA and QLoRA train on the facts that the base knows already: QLoRA's has lost bits of them to rounding."""
    task, rank = RECOVERED[name]
    plain = lora(rank, "all-linear", rate=1e-3)
    quantized = lora(rank, "all-linear", label=f"QLoRA r{rank}", rate=1e-3, quantized=True)
    bounds = ledger()["lora-recovers-rounding"].bounds

    def decided(results: Sequence[Trained]) -> Finding:
        groups = by_label(results)
        conditions = f"{task.conditions}, all-linear; NF4 with double quantization, computing in float32"
        return findings.recovers(groups[plain.label], groups[quantized.label], conditions, **bounds)

    decide("lora-recovers-rounding", name, decided(fact_sweep(task, [plain, quantized], decided)))


@pytest.mark.claim("forgets-less")
@pytest.mark.parametrize("name", LEARNED)
def test_forgetting(name: str, fact_sweep: FactSweep, decide: Decide) -> None:
    task = LEARNED[name]
    most_left = ledger()["forgets-less"].bounds["most_left_bits"]

    def decided(results: Sequence[Trained]) -> Finding:
        groups = by_label(results)
        conditions = f"{task.conditions}, r16 on all-linear; each learned nearly all"
        return findings.forgets_less(groups["full"], groups["r16"], conditions, most_left=most_left)

    decide("forgets-less", name, decided(fact_sweep(task, [full_of(task), lora(16, "all-linear")], decided)))


SHORT = FactTask(DECODER, 1024, STEPS // 5, finer=True)
VARIANTS = {
    # A high rank has room for all facts: what a scaling can improve is the way there.
    "rslora-r64": (SHORT, lora(64, "q,v"), lora(64, "q,v", label="rsLoRA r64", use_rslora=True)),
    "dora": (RANKED["fact-decoder-1024"][0], lora(4, "q,v"), lora(4, "q,v", label="DoRA r4", use_dora=True)),
    "pissa": (
        RANKED["fact-decoder-1024"][0],
        lora(4, "q,v"),
        lora(4, "q,v", label="PiSSA r4", init_lora_weights="pissa"),
    ),
    "lora-plus": (
        RANKED["fact-decoder-1024"][0],
        lora(4, "q,v"),
        lora(4, "q,v", label="LoRA+ r4", loraplus_ratio=16, rate=1e-3),
    ),
}


@pytest.mark.claim("lora-variants")
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, fact_sweep: FactSweep, decide: Decide) -> None:
    """At equal parameters (DoRA's magnitudes apart), where the rank leaves bits to gain."""
    task, plain, variant = VARIANTS[name]
    margin = ledger()["lora-variants"].bounds["margin_bits"]

    def decided(results: Sequence[Trained]) -> Finding:
        groups = by_label(results)
        base, new = groups[plain.label], groups[variant.label]
        return findings.learns_more(base, new, f"{task.conditions}, on q,v", margin=margin)

    decide("lora-variants", name, decided(fact_sweep(task, [plain, variant], decided)))


# --- a rule -----------------------------------------------------------------------------------------------------------


def test_rule(fact_sweep: FactSweep) -> None:
    """The seven methods, and LoRA on all linear layers, learn a rule, and are scored on pairs of tokens that were never
    trained."""
    task = FactTask(DECODER, 4096, STEPS // 2, held_out=1024)
    settings = [
        FULL,
        lora(16, "q,k,v,o", label="lora"),
        lora(16, "all-linear", label="lora all-linear"),
        lora(16, "q,k,v,o", label="qlora", quantized=True),
        Setting("bottleneck", methods.BOTTLENECK, 3e-3),
        Setting("prefix", methods.PREFIX, 3e-2),
        Setting("prompt", methods.PROMPT, 1e-1),
        Setting("ia3", methods.IA3, 3e-2),
    ]

    results = fact_sweep(task, settings)

    by_setting = by_label(results)
    assert min(result.scores["quality"] for result in by_setting["full"]) > 4, "the rule cannot be learned in this time"
