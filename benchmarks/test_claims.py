"""Which claims of the teaching material hold, on which model, and by which metric?

Every claim of ``fixtures/claims.toml`` has a case for each of its models. Its verdict comes from a measurement taken
here; a claim without a measurement is skipped with a reason. The run fails where a verdict differs from the recorded
one: then the ledger is wrong, or a library has changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from fixtures.weights import base_of, samples_of
from peft_gauge import identity
from peft_gauge.claims import NOT_MEASURED, Claim, Finding, ledger
from peft_gauge.clock.rounds import StoppingRule, WarmUp
from peft_gauge.errors import GaugeError
from peft_gauge.memory import gpus
from peft_gauge.plan.record import PlanRequest
from peft_gauge.serving.observed import time_switches, visit
from peft_gauge.serving.server import Server, grow, token_ids
from peft_gauge.training import methods, models
from peft_gauge.training.cases import count_on_meta
from peft_gauge.training.quantization import formats, import_peft
from peft_gauge.training.quantization.comparison import FormatComparison, compare_nf4, nf4_against_int4
from peft_gauge.training.settings import StepSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from fixtures.plans import Plans
    from fixtures.verdicts import Decide
    from peft_gauge.plan.record import Plan
    from peft_gauge.pytest_plugin.workload import Workload

    Steps = Callable[[Claim, str], list[PlanRequest]]
    Decider = Callable[[Claim, str, list[Plan]], Finding]

DECIDERS: dict[str, Decider] = {}
STEPS: dict[str, Steps] = {}


def decides(*ids: str, steps: Steps | None = None) -> Callable[[Decider], Decider]:
    """Register a function as the decider of the claims with these ids.

    ``steps``: the training steps whose plans the decider receives, in order.
    """

    def register(decider: Decider) -> Decider:
        DECIDERS.update(dict.fromkeys(ids, decider))
        if steps is not None:
            STEPS.update(dict.fromkeys(ids, steps))
        return decider

    return register


def steps_of(claim: Claim, model: str) -> list[PlanRequest]:
    return STEPS[claim.id](claim, model) if claim.id in STEPS else []


AUTOCAST = "-bf16-autocast"
"""The end of a model's name: its step is planned under autocast, as trainers take it. Textbooks leave autocast out,
and then a QLoRA step is larger."""

# They would take a bare run half a minute more: 19 plans, and 65 adapters. Except for many-adapters, memory-order and
# method-comparison, a bare run decides these claims by another step.
SLOW = {
    ("many-adapters", "smollm2-135m"),
    *(("memory-order", f"{model}{loop}") for model in ("tinyllama", "llama-2-7b") for loop in ("", AUTOCAST)),
    *((claim, f"llama-2-{size}") for claim in ("full-memory", "full-impractical") for size in ("13b", "70b")),
    ("qlora-4gb", f"llama-2-7b{AUTOCAST}"),
    *(("method-comparison", model) for model in ("tinyllama", f"tinyllama{AUTOCAST}")),
}
TIMED = {"many-adapters"}


def marks_of(claim: str, model: str) -> list[pytest.MarkDecorator]:
    slow = [pytest.mark.slow] if (claim, model) in SLOW else []
    return slow if claim in TIMED else [*slow, pytest.mark.untimed]


QUESTIONS = [
    pytest.param(claim, model, id=f"{claim.id}-{model}", marks=marks_of(claim.id, model))
    for claim in ledger().values()
    for model in claim.models
]


@pytest.mark.plans(steps=steps_of)
@pytest.mark.parametrize(("claim", "model"), QUESTIONS)
def test_claim(
    claim: Claim,
    model: str,
    plans: Plans,
    record: Callable[..., None],
    decide: Decide,
    workload: Workload,
) -> None:
    if claim.id not in DECIDERS:
        if claim.id not in workload.claims:  # else another case of this session decides it
            entry = {"id": claim.id, "model": model, "statement": claim.statement}
            record(claim={**entry, "verdict": NOT_MEASURED, "metric": None, "conditions": None})
        pytest.skip(f"decided by pytest -m slow benchmarks/{claim.benchmark}: {claim.decided_by}")

    decide(claim.id, model, DECIDERS[claim.id](claim, model, plans(steps_of(claim, model))))


@decides("identity")
def identity_holds(claim: Claim, model: str, plans: list[Plan]) -> Finding:
    check = identity.textbook_case(seed=0)
    metric = f"largest error {check.max_error:.2e}, {check.share_of_bound:.2f} of the rounding-error bound"
    return Finding.of(check.holds, metric, "512×512, r=8, α=16, float32, A and B drawn at random")


@decides("decomposed-cheaper")
def decomposed_is_cheaper(claim: Claim, model: str, plans: list[Plan]) -> Finding:
    large, small = claim.bounds["large"], claim.bounds["small"]
    full, lora = square_layer(large["size"], large["rank"])
    fewer_percent = 100 * (1 - square_layer(small["size"], small["rank"])[1] / small["size"] ** 2)
    metric = f"{full:,} against {lora:,} parameters, {full / lora:g} times fewer; {fewer_percent:.3f} % fewer"
    holds = full / lora == large["factor"] and abs(fewer_percent - small["percent_fewer"]) < 0.05
    return Finding.of(holds, metric, "counted on one linear layer with PEFT's LoRA, on meta")


def square_layer(size: int, rank: int) -> tuple[int, int]:
    """Parameters of one size×size linear layer, and those of PEFT's LoRA of this rank on it."""
    import torch
    from torch import nn

    peft = import_peft()
    with torch.device("meta"):
        layer = nn.Sequential(nn.Linear(size, size, bias=False))
        adapted = peft.get_peft_model(layer, peft.LoraConfig(r=rank, target_modules=["0"]))
    return size * size, sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@decides("four-million")
def four_million_will_do(claim: Claim, model: str, plans: list[Plan]) -> Finding:
    lora = methods.get("lora-qv").variant("lora-qv-r8", "LoRA r=8 on q,v", peft_config={"r": 8, "lora_alpha": 16})
    trained = count_on_meta(models.resolve(model, weights="random"), lora).trainable_params
    holds = round(trained / 1e6) == claim.bounds["millions"]
    return Finding.of(holds, f"{trained:,} trainable parameters", "r=8 on q,v, counted on meta")


@decides("lora-ratio", "qlora-ratio", "adapter-ratio", "prefix-ratio", "prompt-ratio", "ia3-ratio")
def share_is_in_range(claim: Claim, model: str, plans: list[Plan]) -> Finding:
    record = models.resolve(model, weights="random")
    counted = count_on_meta(record, methods.get(claim.bounds["method"]))
    percent = counted.percent_of_base(models.logical_params(record))
    low, high = claim.bounds["low_percent"], claim.bounds["high_percent"]
    metric = f"{counted.trainable_params:,} trainable, {percent:.4f} % of the base"
    return Finding.of(low <= percent <= high, metric, f"{low}–{high} % claimed; counted on meta")


@decides("nf4-beats-int4")
def nf4_loses_less(claim: Claim, model: str, plans: list[Plan]) -> Finding:
    if model in formats.FOUR_BIT_FORMATS:
        comparisons = [nf4_against_int4("normal", rival=model, double_quant=double) for double in (False, True)]
        conditions = "normal weights, 8 seeds; NF4 without and with double quantization"
    else:
        comparisons, conditions = real_comparisons(claim, model)
    verdicts = {comparison.holds for comparison in comparisons}
    spans = [f"{min(c.ratios):.3f}–{max(c.ratios):.3f}" for c in comparisons]
    metric = f"NF4's error is {' and '.join(spans)} of the rival's"
    return Finding.of(verdicts.pop() if len(verdicts) == 1 else None, metric, conditions)


def real_comparisons(claim: Claim, model: str) -> tuple[list[FormatComparison], str]:
    """The same on the one large matrix of the real weights that the GGUF file stores in more than 4 bit."""
    rival, name = claim.bounds["real_rival"], claim.bounds["real_matrix"]
    try:
        samples = samples_of(model, name)
    except GaugeError as error:
        pytest.skip(str(error))
    found = [compare_nf4(samples, rival=rival, double_quant=double) for double in (False, True)]
    return found, f"against {rival} on {name}, {len(samples)} samples; NF4 without and with double quantization"


@decides("prefix-shape")
def prefix_has_the_width_of_the_model(claim: Claim, model: str, plans: list[Plan]) -> Finding:
    import torch

    record = models.resolve(model, weights="random")
    attached: Any = methods.attach(models.build(record, device="meta"), methods.PREFIX)
    with torch.device("meta"):
        prompt = attached.get_prompt(batch_size=1)
    tokens = claim.bounds["virtual_tokens"]
    layers = (
        [layer.keys.shape for layer in prompt.layers] if hasattr(prompt, "layers") else [kv[0].shape for kv in prompt]
    )
    width = record.config["hidden_size"]
    found = {(shape[-2], shape[-3] * shape[-1]) for shape in layers}
    every_layer = len(layers) == record.config["num_hidden_layers"]
    shapes = " and ".join(f"{length}×{key_width}" for length, key_width in sorted(found))
    metric = f"P_K is {shapes} in {len(layers)} layers; the model is {width} wide"
    return Finding.of(
        every_layer and found == {(tokens, width)}, metric, "key width is kv_heads × head_dim; built on meta"
    )


@decides("many-adapters")
def one_base_serves_many(claim: Claim, model: str, plans: list[Plan]) -> Finding:
    server = Server(models.build(models.resolve(model, weights="random")), methods.LORA)
    grow(server, claim.bounds["adapters"])
    ids = token_ids(server, rows=1, seq=8, seed=0)
    visits = visit(server, ids, server.names)
    rule, warm_up = StoppingRule(min_rounds=5, max_rounds=5), WarmUp(least=1, most=1, window=1)
    forwards = time_switches(server, ids, rule, warm_up).over_control or float("nan")
    adapter_bytes = server.adapters_bytes / len(server.names)
    percent = 100 * adapter_bytes / server.base_bytes
    returned = len(visits.returned) == len(visits.outputs)
    metric = (
        f"a further adapter takes {adapter_bytes / 1e6:.2f} MB, {percent:.2f} % of the base; a switch {forwards:.2f} "
        f"forwards; {len(visits.returned)} of {len(visits.outputs)} outputs came back to the last bit"
    )
    cheap = percent <= claim.bounds["most_percent_of_base"] and forwards <= claim.bounds["most_forwards"]
    conditions = f"LoRA r=16 on q,k,v,o, {len(server.names)} adapters and the base, 1×8 tokens, float32 on cpu"
    return Finding.of(cheap and returned and visits.least_difference > 0, metric, conditions)


@decides("prompt-shape")
def prompt_goes_before_the_input_only(claim: Claim, model: str, plans: list[Plan]) -> Finding:
    import torch

    attached: Any = methods.attach(base_of(model), methods.PROMPT)
    trained = [tuple(p.shape) for p in attached.parameters() if p.requires_grad]
    seen: list[int] = []
    for block in attached.get_base_model().model.layers:
        block.register_forward_pre_hook(lambda _, hidden_states: seen.append(hidden_states[0].shape[1]))
    length, tokens = 8, claim.bounds["virtual_tokens"]
    attached(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    holds = trained == [(tokens, attached.get_base_model().config.hidden_size)] and set(seen) == {tokens + length}
    metric = (
        f"one trained tensor of shape {trained}; {length} tokens become {sorted(set(seen))} in all {len(seen)} blocks"
    )
    return Finding.of(holds, metric, "20 virtual tokens, one forward on cpu")


@decides("ia3-scaling")
def ia3_scales_activations(claim: Claim, model: str, plans: list[Plan]) -> Finding:
    import torch

    ids = torch.arange(8).unsqueeze(0)
    base = base_of(model).eval()
    with torch.no_grad():
        before = base(input_ids=ids, use_cache=False).logits
        attached: Any = methods.attach(base, methods.IA3).eval()
        same_at_start = torch.equal(attached(input_ids=ids, use_cache=False).logits, before)
        vectors = [p for p in attached.parameters() if p.requires_grad]
        all_vectors = all(max(p.shape) == p.numel() for p in vectors)
        layer = attached.base_model.model.model.layers[0].self_attn.v_proj
        x = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0))
        once = layer(x)
        layer.ia3_l["default"].mul_(2)
        doubles = torch.equal(layer(x), 2 * once)
    metric = (
        f"{len(vectors)} vectors; start equals base: {same_at_start}; a doubled vector doubles the output: {doubles}"
    )
    return Finding.of(same_at_start and all_vectors and doubles, metric, "float32 on cpu, to the last bit")


def planned_step(model: str, method: methods.Method, seq: int = 512, **settings: Any) -> PlanRequest:
    if model.endswith(AUTOCAST):
        settings |= {"mixed_precision": "bf16", "float32_outputs": True}  # the latter as accelerate does
    record = models.resolve(model.removesuffix(AUTOCAST), weights="random")
    return PlanRequest(record, method, StepSettings(batch=1, seq=seq, **settings))


def conditions_of(model: str, step: str = "1×512 tokens, 16 bit (bfloat16), AdamW") -> str:
    return f"planned: {step}" + (", under bf16 autocast" if model.endswith(AUTOCAST) else "")


def within(found: float, stated: float, claim: Claim) -> bool:
    return abs(found / stated - 1) <= claim.bounds["tolerance"]


def full_step(claim: Claim, model: str) -> list[PlanRequest]:
    return [planned_step(model, methods.FULL)]


@decides("full-memory", steps=full_step)
def full_memory_is_as_stated(claim: Claim, model: str, plans: list[Plan]) -> Finding:
    (plan,) = plans
    stated, peak = claim.bounds["stated_gb"][model], plan.peak_bytes / 1e9
    metric = (
        f"{plan.resident_live_outputs_bytes / 1e9:.1f} GB of weights, gradients and moments, {stated} stated; "
        f"the peak is {peak:.1f} GB, with {plan.peak_by_category['optimizer_temporaries'] / 1e9:.1f} GB of temporaries"
    )
    return Finding.of(within(peak, stated, claim), metric, f"{conditions_of(model)}, moments in 16 bit too")


@decides("full-impractical", steps=full_step)
def full_does_not_fit(claim: Claim, model: str, plans: list[Plan]) -> Finding:
    (plan,) = plans
    card = gpus.lookup(claim.bounds["largest_gpu"])
    needed, usable = plan.device_bytes_estimate, card.usable_bytes
    metric = f"the step needs {needed / 1e9:.1f} GB; one {card.name} has {usable / 1e9:.1f}"
    # Two GPUs hold at least half of the step each; the overhead of sharding is not planned.
    holds = False if needed <= usable else True if needed / 2 > usable else None
    return Finding.of(holds, metric, f"{conditions_of(model)}; two GPUs: at least half of it each")


SMALL_LORA = {"r": 8, "lora_alpha": 16, "target_modules": methods.ATTENTION_QV}


def small_lora_step(claim: Claim, model: str) -> list[PlanRequest]:
    parent = methods.QLORA if claim.bounds["quantized"] else methods.LORA
    return [planned_step(model, parent.variant(f"{parent.name}-qv-r8", "r=8 on q,v", peft_config=SMALL_LORA))]


@decides("lora-memory", "qlora-memory", steps=small_lora_step)
def adapter_memory_is_as_stated(claim: Claim, model: str, plans: list[Plan]) -> Finding:
    (plan,) = plans
    stated, peak = claim.bounds["stated_gb"], plan.peak_bytes / 1e9
    metric = f"{plan.resident_bytes / 1e9:.2f} GB stay between steps, the peak is {peak:.2f} GB; {stated} stated"
    return Finding.of(within(peak, stated, claim), metric, f"{conditions_of(model)}, r=8 on q,v, adapters in float32")


def frugal_step(claim: Claim, model: str) -> list[PlanRequest]:
    method = methods.get("qlora-unprepared").variant("qlora-frugal", "the least", peft_config=SMALL_LORA)
    return [planned_step(model, method, 8, grad_checkpointing=True, optimizer="paged-adamw8bit")]


@decides("qlora-4gb", steps=frugal_step)
def seven_billion_on_four_gb(claim: Claim, model: str, plans: list[Plan]) -> Finding:
    (plan,) = plans
    limit = claim.bounds["limit_bytes"]
    metric = (
        f"peak {plan.peak_bytes / 1e9:.2f} GB, reserved {plan.reserved_bytes_estimate / 1e9:.2f} GB, "
        f"with the CUDA context about {plan.device_bytes_estimate / 1e9:.2f} GB"
    )
    step = "1×8 tokens, NF4 with double quantization, not prepared, checkpointing, paged 8-bit AdamW"
    conditions = conditions_of(model, step)
    # The context is an estimate: only reserved bytes can refute, and only the total can confirm.
    holds = True if plan.device_bytes_estimate <= limit else False if plan.reserved_bytes_estimate > limit else None
    return Finding.of(holds, metric, conditions)


def steps_by_length(claim: Claim, model: str) -> list[PlanRequest]:
    compared = (methods.FULL, methods.LORA, methods.QLORA)
    return [planned_step(model, method, seq) for seq in claim.bounds["lengths"] for method in compared]


@decides("memory-order", steps=steps_by_length)
def full_above_lora_above_qlora(claim: Claim, model: str, plans: list[Plan]) -> Finding:
    rows = {
        plans[first].settings["seq"]: [plan.peak_bytes for plan in plans[first : first + 3]]
        for first in range(0, len(plans), 3)
    }
    metric = "; ".join(f"{seq} tokens: " + " / ".join(f"{p / 1e9:.2f}" for p in peaks) for seq, peaks in rows.items())
    autocast = "bf16 autocast" if model.endswith(AUTOCAST) else "no autocast"
    conditions = (
        f"planned peak GB of full / LoRA / QLoRA, batch 1, bfloat16, {autocast}, QLoRA prepared for k-bit training"
    )
    return Finding.of(all(full > lora > qlora for full, lora, qlora in rows.values()), metric, conditions)


LOADED = ("base_weights", "adapter_weights", "quantization_constants", "buffers")


def compared_steps(claim: Claim, model: str) -> list[PlanRequest]:
    return [planned_step(model, method) for method in (methods.FULL, methods.LORA, methods.QLORA)]


@decides("method-comparison", steps=compared_steps)
def reading_after_loading_is_the_cost(claim: Claim, model: str, plans: list[Plan]) -> Finding:
    """The claim's memory column is read after loading; it holds if training stays within a tolerance above that."""
    loaded = [sum(plan.resident_by_category.get(name, 0) for name in LOADED) for plan in plans]
    shown = [
        f"{plan.method} {plan.trainable_params:,} trainable of {plan.total_params:,}, "
        f"{before / 1e9:.2f} GB after loading, {plan.peak_bytes / 1e9:.2f} GB in a step"
        for plan, before in zip(plans, loaded, strict=True)
    ]
    holds = all(within(plan.peak_bytes, before, claim) for plan, before in zip(plans, loaded, strict=True))
    return Finding.of(holds, "; ".join(shown), conditions_of(model))
