"""Plans against metrics worked out by hand, against real steps on the CPU, and against brute force."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from peft_gauge.counting import count, nbytes, quantization_constants
from peft_gauge.errors import GaugeError
from peft_gauge.memory.categories import (
    ACTIVATIONS,
    BACKWARD,
    BASE_WEIGHTS,
    FORWARD,
    LOGITS_AND_LOSS,
    OPTIMIZER,
    OPTIMIZER_STATE,
    OUTSIDE,
)
from peft_gauge.memory.ledger import Event as StorageEvent
from peft_gauge.memory.overheads import default_overheads
from peft_gauge.plan import adaptation, fakes, kernels, planner, search, traced_step
from peft_gauge.plan.call import ModelCall, chunk_loss
from peft_gauge.plan.planner import plan
from peft_gauge.plan.record import Plan, PlanRequest
from peft_gauge.plan.reserve import PASSES, Steps, device_estimate
from peft_gauge.plan.search import find, largest_that_fits
from peft_gauge.training import methods, models
from peft_gauge.training.methods import Quantization
from peft_gauge.training.settings import OPTIMIZERS, StepSettings
from peft_gauge.training.sharding import Sharding
from tests.support import published_models as published

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# Builds, plans or trains models: seconds, which are too long for the unit tests.
pytestmark = pytest.mark.integration
BATCH, SEQ = 2, 32
TOKENS = BATCH * SEQ
VOCABULARY = 256
SETTINGS = StepSettings(BATCH, SEQ)
TOY = models.resolve("toy-llama", weights="random")
BUFFERS_MADE_LATE = "buffers"
# input_ids and labels are one tensor of int64; both rotary buffers take one block each.
INPUTS, BUFFERS = TOKENS * 8, 2 * 512


def request(method: str = "full", *, settings: StepSettings = SETTINGS, **changes: Any) -> PlanRequest:
    return PlanRequest(TOY, methods.get(method), settings, **changes)


def blocks(nbytes: float) -> int:
    return math.ceil(nbytes / 512) * 512


def toy_shapes() -> list[torch.Size]:
    return [parameter.shape for parameter in models.build(TOY, device="meta").parameters()]


def held(bytes_per_element: int) -> int:
    """A copy of every parameter in an element of that size, in blocks."""
    return sum(blocks(shape.numel() * bytes_per_element) for shape in toy_shapes())


# --- by hand


@pytest.mark.parametrize(
    ("optimizer", "state"),
    [
        ("adamw", 2 * held(4)),
        ("adamw-foreach-off", 2 * held(4)),
        ("adamw-fused", 2 * held(4) + 512 * len(toy_shapes())),  # the fused kernel's step counters are on the device
        ("sgd", 0),
    ],
)
def test_full_fine_tuning_keeps_weights_and_moments(optimizer: Any, state: int) -> None:
    found = plan(request(dtype="float32", settings=replace(SETTINGS, optimizer=optimizer)))

    assert found.resident_bytes == held(4) + state + BUFFERS + INPUTS
    assert found.resident_by_category["base_weights"] == held(4)
    assert found.resident_by_category.get("optimizer_state", 0) == state
    # Right after the update the gradients, the logits and the loss are there too.
    logits = TOKENS * VOCABULARY * 4
    assert found.resident_live_outputs_bytes == found.resident_bytes + held(4) + logits + 512


@pytest.mark.parametrize(
    ("optimizer", "temporaries"),
    [("adamw", held(4)), ("adamw-foreach-off", 2 * VOCABULARY * 64 * 4), ("adamw-fused", 0)],
)
def test_an_update_holds_roots_of_all_moments_of_one_or_of_none(optimizer: Any, temporaries: int) -> None:
    """The root of the second moment: of all parameters at once, of the largest (and its quotient), or in registers."""
    few_tokens = StepSettings(1, 2, optimizer=optimizer)
    found = plan(request(dtype="float32", settings=few_tokens))

    assert found.phase_of_peak == "optimizer" or optimizer == "adamw-fused"
    assert found.peak_by_category["gradients"] == held(4)
    assert found.peak_by_category.get("optimizer_temporaries", 0) in range(temporaries, temporaries + 512 * 12 + 1, 512)


def test_clipping_gathers_a_norm_of_each_gradient() -> None:
    few_tokens = StepSettings(1, 2, optimizer="adamw-fused")
    plain = plan(request(dtype="float32", settings=few_tokens))
    clipped = plan(request(dtype="float32", settings=replace(few_tokens, clip_grad_norm=1.0)))

    assert clipped.peak_by_category["optimizer_temporaries"] >= 512 * len(toy_shapes())
    assert clipped.resident_bytes == plain.resident_bytes


def test_eight_bit_layers_multiply_as_on_cuda() -> None:
    found = plan(PlanRequest(TOY, replace(methods.QLORA, quantization=Quantization("int8")), SETTINGS))
    assert any("outlier columns" in warning for warning in found.warnings)
    assert not any("flops_per_step" in warning for warning in found.warnings)
    assert found.flops_per_step == pytest.approx(plan(request("lora")).flops_per_step, rel=0.02)


def test_eight_bit_moments_take_a_byte_and_a_scale_a_block() -> None:
    large = [shape.numel() for shape in toy_shapes() if shape.numel() >= 4096]
    small = [shape.numel() for shape in toy_shapes() if shape.numel() < 4096]  # bitsandbytes keeps these in FP32
    state = 2 * sum(blocks(n) + blocks(math.ceil(n / 256) * 4) for n in large) + 2 * sum(blocks(4 * n) for n in small)
    code_books = 2 * 256 * 4
    found = plan(request(settings=replace(SETTINGS, optimizer="adamw8bit")))

    assert found.resident_by_category["optimizer_state"] == state + code_books


def test_paged_moments_are_not_on_the_device_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy has no tensor that bitsandbytes would page, so the limit is lowered."""
    monkeypatch.setattr(traced_step, "PAGED_FROM_ELEMENTS", 16_000)
    paged_elements = sum(shape.numel() for shape in toy_shapes() if shape.numel() >= 16_000)
    unpaged = plan(request(settings=replace(SETTINGS, optimizer="adamw8bit")))
    paged = plan(request(settings=replace(SETTINGS, optimizer="paged-adamw8bit")))

    assert unpaged.resident_bytes - paged.resident_bytes == 2 * paged_elements > 0
    assert any(f"{2 * paged_elements} bytes of its state" in warning for warning in paged.warnings)
    assert not unpaged.warnings


def test_the_loss_keeps_a_log_softmax_and_two_gradients() -> None:
    dropped, kept = plan(request()), plan(request(hold_outputs=True))

    assert dropped.phase_of_peak == "backward"
    assert dropped.peak_by_category["logits_and_loss"] - TOKENS * VOCABULARY * 4 * 3 in (0, 512)  # and the loss
    assert kept.peak_bytes - dropped.peak_bytes == TOKENS * VOCABULARY * 2
    assert kept.resident_bytes == dropped.resident_bytes
    assert kept.resident_live_outputs_bytes == dropped.resident_live_outputs_bytes


def test_a_cache_lives_as_long_as_the_outputs() -> None:
    """2 layers of keys and values, 2 heads of width 16, 2 bytes each; the values are saved for backward anyway."""
    kept, cached = plan(request(hold_outputs=True)), plan(request(use_cache=True))
    cache = 2 * 2 * TOKENS * 2 * 16 * 2

    after = cached.resident_live_outputs_bytes - kept.resident_live_outputs_bytes
    assert after == cache


def test_accumulated_gradients_stay_through_the_next_backward() -> None:
    one, five = plan(request()), plan(request(settings=replace(SETTINGS, grad_accumulation=5)))

    assert five.flops_per_step == 5 * one.flops_per_step
    assert five.peak_by_category["gradients"] == held(2)
    assert five.peak_bytes == one.peak_bytes + held(2) - one.peak_by_category.get("gradients", 0)
    assert five.resident_bytes == one.resident_bytes


def test_a_matrix_costs_two_operations_an_element_three_times() -> None:
    """Without attention: forward, and the gradients of both factors; the embedding is a look-up."""
    found = plan(request())
    matrices = sum(shape.numel() for shape in toy_shapes() if len(shape) == 2) - VOCABULARY * 64
    attention = found.flops_per_step - 3 * 2 * TOKENS * matrices

    # Scores and their product with the values, 4 heads of width 16: twice forward, five times backward, 2 layers.
    angles = 2 * 8 * SEQ  # transformers 5.17 makes the 8 rotary angles of each position by a matrix product
    assert attention - 2 * (2 + 5) * 2 * BATCH * 4 * SEQ * SEQ * 16 in (0, angles)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_format", ["nf4", "fp4", "int8"])
def test_quantized_weights_take_the_bytes_of_real_ones(quant_format: Any, double_quant: bool) -> None:
    method = replace(methods.QLORA, quantization=Quantization(quant_format, double_quant))
    real = methods.prepare_base(models.build(TOY, dtype="bfloat16"), method)
    parameters = list(real.parameters())
    constants = [tensor for parameter in parameters for tensor in quantization_constants(parameter)]
    if quant_format == "int8":
        constants = [module.weight.SCB for module in real.modules() if hasattr(module, "state")]
    found = plan(PlanRequest(TOY, method, SETTINGS))

    assert found.resident_by_category["base_weights"] == sum(blocks(nbytes(p)) for p in parameters)
    assert found.resident_by_category["quantization_constants"] == sum(blocks(nbytes(t)) for t in constants)
    assert found.total_params == count(real).total_params + found.trainable_params


# --- directions


def test_what_needs_more_and_what_needs_less() -> None:
    plain = plan(request("lora"))
    checkpointed = replace(SETTINGS, grad_checkpointing=True)

    assert plan(request("lora", padded=True)).peak_bytes > plain.peak_bytes
    assert plan(request("lora", attention="eager")).peak_bytes > plain.peak_bytes
    assert plan(request("lora", loss="chunked")).peak_bytes < plain.peak_bytes
    for reentrant in (False, True):
        less = plan(request("lora", settings=checkpointed, checkpoint_reentrant=reentrant))
        assert less.saved_activation_bytes_per_token < plain.saved_activation_bytes_per_token / 5
        assert less.resident_bytes == plain.resident_bytes
        assert less.flops_per_step > plain.flops_per_step


@pytest.mark.parametrize("method", methods.DEFAULT_METHODS, ids=lambda method: method.name)
def test_every_method_is_planned_and_adds_up(method: methods.Method) -> None:
    found = plan(PlanRequest(TOY, method, SETTINGS, gpus=("24GB",)))
    device = found.device

    assert sum(found.peak_by_category.values()) == found.peak_bytes
    assert sum(found.resident_by_category.values()) == found.resident_bytes
    assert found.resident_bytes < found.resident_live_outputs_bytes <= found.peak_bytes < found.allocated_bytes_estimate
    assert found.allocated_bytes_estimate <= found.reserved_bytes_estimate
    assert [card.device_bytes for card in found.gpus] == [found.device_bytes_estimate]
    assert found.device_bytes_estimate == found.reserved_bytes_estimate + device.context_bytes
    assert not found.peak_by_category.get("other")
    counted = count(methods.attach(models.build(TOY), method))
    assert (found.trainable_params, found.total_params) == (counted.trainable_params, counted.total_params)


# --- against a real step


CUT = published.first_layers("smollm2-135m", 2)
STEPS = [
    *((method, TOY, dtype) for method in methods.DEFAULT_METHODS for dtype in ("float32", "bfloat16")),
    *((method, CUT, "float32") for method in methods.DEFAULT_METHODS),
]


def a_step(method: methods.Method, record: models.ModelRecord, dtype: str) -> Any:
    """A real model's layers are the toy's, in which every method is quick: of them LoRA's, the others every week."""
    marks = pytest.mark.slow if record is CUT and method.name != "lora" else ()
    name = "smollm2-135m-cut" if record is CUT else f"toy-llama-{dtype}"
    return pytest.param(method, record, dtype, id=f"{method.name}-{name}", marks=marks)


@pytest.mark.integration
@pytest.mark.parametrize(("method", "record", "dtype"), [a_step(*step) for step in STEPS])
def test_a_planned_step_is_a_real_step_without_its_numbers(
    method: methods.Method, record: models.ModelRecord, dtype: str
) -> None:
    """With the CPU's kernels in place of CUDA's, and the CPU's kind of optimizer, no byte differs."""
    hold_against_a_real_step(method, record, dtype)


def hold_against_a_real_step(method: methods.Method, record: models.ModelRecord, dtype: str, **settings: Any) -> None:
    step = StepSettings(BATCH, SEQ, optimizer="adamw-foreach-off", **settings)
    asked = PlanRequest(record, method, step, dtype=dtype)
    adapted = adaptation.adapt(asked, [])
    counted = count(adapted.model)
    mode = fakes.fake_mode()
    made = fakes.to_fake(adapted.model, mode)
    with mode, kernels.unpacked_sequences():
        base = [made[key] for key in adapted.base_parameters]
        planned = traced_step.follow(asked, adapted.model, base, counted, [])

    real = methods.prepare_base(models.build(record, dtype=dtype), method)
    own = list(real.parameters())
    model = methods.attach(real, replace(method, quantization=None, prepare_kbit=False))
    tracked = traced_step.follow(asked, model, own, count(model), [])

    for metric in ("counted", "live_outputs_bytes", "saved_activation_bytes", "flops"):
        assert getattr(planned, metric) == getattr(tracked, metric), metric
    for moment in ("peak", "resident"):
        ours, theirs = getattr(planned, moment), getattr(tracked, moment)
        assert (ours.bytes, ours.by_category, ours.phase) == (theirs.bytes, theirs.by_category, theirs.phase)


@pytest.mark.parametrize(
    ("peft_config", "warning"),
    [
        ({"peft_type": "LORA", "init_lora_weights": "pissa", "target_modules": ["q_proj"]}, "initialisation"),
        ({"peft_type": "FOURIERFT", "n_frequency": 8, "target_modules": ["q_proj"]}, "frequencies"),
        ({"peft_type": "ADALORA", "total_step": 100, "target_modules": ["q_proj"]}, "importance of each weight"),
        ({"peft_type": "POLY", "target_modules": ["q_proj"], "n_tasks": 2}, "assumed: "),
    ],
    ids=lambda value: value["peft_type"] if isinstance(value, dict) else "",
)
def test_what_needs_values_is_planned_and_said(
    peft_config: dict[str, Any], warning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these types reads weights or activations while it attaches or steps; a plan has none."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # as before torch compiles anything
    method = methods.Method("asked", "asked", "peft", peft_config={"task_type": "CAUSAL_LM", **peft_config})
    found = plan(PlanRequest(TOY, method, SETTINGS))
    assert found.trainable_params > 0
    assert any(warning in said for said in found.warnings), found.warnings


MIXTURE = {
    "model_type": "mixtral", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def test_a_plan_says_what_stays_out_of_4_bit_and_is_cast() -> None:
    """Experts are 4 × (2·128×64 + 64×128) weights a layer in 3-D parameters; embeddings and head 256×64 each."""
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("in transformers 4 each expert is a module with linear layers of its own")
    mixture = models.ModelRecord("mixture", "folder", json.dumps(MIXTURE), "random")
    prepared, unprepared, lora = (
        plan(PlanRequest(mixture, methods.get(name), SETTINGS, dtype="bfloat16"))
        for name in ("qlora", "qlora-unprepared", "lora")
    )
    [said] = [warning for warning in prepared.warnings if "not stored in nf4" in warning]

    gate_up, down, embedding = 2 * 4 * 256 * 64, 2 * 4 * 64 * 128, 256 * 64
    small = 2 * 4 * 64 + 5 * 64  # the routers, and the norms
    assert said.startswith(
        f"not stored in nf4: mlp.experts.gate_up_proj {2 * gate_up / 1e6:.2f} MB, mlp.experts.down_proj "
        f"{2 * down / 1e6:.2f} MB, model.embed_tokens {2 * embedding / 1e6:.2f} MB, lm_head "
    )
    assert "not the 3-D parameters that hold a layer's experts" in said
    total = gate_up + down + 2 * embedding + small
    assert f"k-bit preparation casts all of these to float32, {4 * total / 1e6:.2f} MB" in said
    assert prepared.resident_bytes > lora.resident_bytes > unprepared.resident_bytes
    told = [warning for warning in unprepared.warnings if "not stored in nf4" in warning]
    assert [("3-D" in warning, "casts" in warning) for warning in told] == [(True, False)]
    assert not any("not stored in" in warning for warning in lora.warnings)


def test_a_target_that_the_architecture_has_not_is_named() -> None:
    config = {"peft_type": "LORA", "target_modules": ["q_proj", "qkv_proj"], "rank_pattern": {"nowhere": 4}}
    method = methods.Method("asked", "asked", "peft", peft_config={"task_type": "CAUSAL_LM", **config})
    found = plan(PlanRequest(TOY, method, SETTINGS))
    assert "target_modules that do not exist in llama, ignored by PEFT: qkv_proj" in found.warnings
    if int(peft.__version__.split(".")[1]) >= 21:
        assert any("rank_pattern keys did not match any targeted module" in warning for warning in found.warnings)


def test_adaloras_importance_is_counted() -> None:
    """Sensitivity, its mean and its uncertainty, one element of each for every trained one (Zhang et al. 2023)."""
    config = {"peft_type": "ADALORA", "total_step": 100, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    found = plan(PlanRequest(TOY, methods.Method("asked", "asked", "peft", peft_config=config), SETTINGS))
    plain = plan(request("lora"))
    added = found.resident_by_category["buffers"] - plain.resident_by_category["buffers"]
    # 12 directions of 64 + 64 + 1 elements in each of two layers, in float32 blocks, three times.
    assert added == 2 * 3 * (2 * blocks(12 * 64 * 4) + blocks(12 * 4))


@pytest.mark.parametrize("chunk", [None, 1, 7, 1000])
def test_the_chunked_loss_is_the_loss(chunk: int | None) -> None:
    model = models.build(TOY)
    tokens = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    labels = tokens.masked_fill(tokens < 30, -100)

    def loss_and_gradients() -> tuple[torch.Tensor, list[torch.Tensor]]:
        loss = model(input_ids=tokens, labels=labels).loss
        return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))

    loss, gradients = loss_and_gradients()
    chunk_loss(model, chunk)
    chunked_loss, chunked_gradients = loss_and_gradients()

    torch.testing.assert_close(chunked_loss, loss)
    torch.testing.assert_close(chunked_gradients, gradients)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_bound_on_the_logits_is_the_chunked_losss_to_apply(softcap: float | None) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=softcap, attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(100)  # logits beyond the bound
        tokens = torch.randint(0, 64, (2, 20))
        expected = model(input_ids=tokens, labels=tokens).loss
        chunk_loss(model)
        torch.testing.assert_close(model(input_ids=tokens, labels=tokens).loss, expected)


def test_logits_exist_for_a_chunk_of_the_given_tokens() -> None:
    """The largest tensor of logits is a chunk's, in float32."""
    asked = request("full", settings=StepSettings(2, 512, optimizer="sgd"))
    for chunk in (16, 64, 256, 1024):
        log, _ = planner.step_log(replace(asked, loss="chunked", loss_chunk=chunk))
        largest = max(each.nbytes for each in log.allocations if each.category == LOGITS_AND_LOSS)
        assert largest == chunk * VOCABULARY * 4


# --- the allocator's share


def event(sign: int, storage: int, nbytes: int, category: str, phase: str) -> StorageEvent:
    return StorageEvent(sign, storage, nbytes, category, phase)


MIB = 1 << 20
NO_WORKSPACES = replace(default_overheads(None), cublas_workspace_bytes=0, cublaslt_workspace_bytes=0)


def test_state_is_allocated_where_a_run_allocates_it() -> None:
    """30 MiB of activations leave a cached block in which the optimizer's 30 MiB then find their place."""
    log = [
        event(1, 0, 30 * MIB, BASE_WEIGHTS, OUTSIDE),
        event(1, 1, 30 * MIB, OPTIMIZER_STATE, OUTSIDE),
        event(1, 2, 30 * MIB, ACTIVATIONS, FORWARD),
        event(-1, 2, 30 * MIB, ACTIVATIONS, BACKWARD),
        event(1, 3, 512, ACTIVATIONS, OPTIMIZER),
        event(-1, 3, 512, ACTIVATIONS, OPTIMIZER),
    ]
    order = [each[1] for each in Steps(log).allocations(NO_WORKSPACES) if each[0] == "alloc"]
    assert order[:7] == [0, "cublas", "cublaslt", (0, 2), "cublas of backward", 1, (0, 3)]
    # The second pass needs a new segment for its activations: weights, state, activations, and one small segment.
    result = Steps(log).replayed(NO_WORKSPACES)
    assert result.peak_reserved_bytes == 3 * 30 * MIB + 2 * MIB


@pytest.mark.parametrize("category", [OPTIMIZER_STATE, BUFFERS_MADE_LATE])
def test_lazily_made_state_is_in_the_replay_whatever_its_phase_does(category: str) -> None:
    """A fused or an 8-bit AdamW makes no storage in its phase: the next event after backward is a gradient's end."""
    log = [
        event(1, 0, 30 * MIB, BASE_WEIGHTS, OUTSIDE),
        event(1, 1, 60 * MIB, category, OUTSIDE),
        event(1, 2, 30 * MIB, ACTIVATIONS, FORWARD),
        event(1, 3, 30 * MIB, ACTIVATIONS, BACKWARD),
        event(-1, 2, 30 * MIB, ACTIVATIONS, BACKWARD),
        event(-1, 3, 30 * MIB, ACTIVATIONS, OUTSIDE),
    ]
    steps = Steps(log, frozenset({1} if category != OPTIMIZER_STATE else ()))
    order = [each[:2] for each in steps.allocations(NO_WORKSPACES)]
    assert order.index(("free", (0, 2))) < order.index(("alloc", 1)) < order.index(("free", (0, 3)))
    result = steps.replayed(NO_WORKSPACES)
    assert result.peak_allocated_bytes == 150 * MIB
    assert result.peak_reserved_bytes >= 150 * MIB


def each_method_and_optimizer() -> Iterator[Any]:
    """Of all pairs a third, which has each method and each optimizer; the others are slow."""
    for (i, method), (k, optimizer) in product(enumerate(methods.DEFAULT_METHODS), enumerate(OPTIMIZERS)):
        slow = pytest.mark.slow if (i + k) % 3 else ()
        yield pytest.param(method, optimizer, id=f"{method.name}-{optimizer}", marks=slow)


@pytest.mark.parametrize(("method", "optimizer"), list(each_method_and_optimizer()))
def test_a_device_is_never_planned_smaller_than_its_tensors(method: methods.Method, optimizer: Any) -> None:
    """Each optimizer and method, and over them each way of accumulating and checkpointing."""
    number = methods.DEFAULT_METHODS.index(method) + OPTIMIZERS.index(optimizer)
    settings = StepSettings(
        BATCH, SEQ, optimizer=optimizer, grad_accumulation=1 + number % 2, grad_checkpointing=number % 4 > 1
    )
    if method is methods.PREFIX and settings.grad_checkpointing:
        with pytest.raises(GaugeError, match="train it without checkpointing"):
            plan(PlanRequest(TOY, method, settings))
        return
    found = plan(PlanRequest(TOY, method, settings))
    live = found.peak_bytes + found.device.cublas_workspace_bytes + found.device.cublaslt_workspace_bytes
    assert live <= found.allocated_bytes_estimate <= found.reserved_bytes_estimate < found.device_bytes_estimate


def test_a_replay_that_loses_bytes_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Steps.allocations

    def losing(self: Steps, overheads: Any) -> Any:
        state = {each.storage for each in self._before if each.category == OPTIMIZER_STATE}
        return (each for each in kept(self, overheads) if each[1] not in state)

    monkeypatch.setattr(Steps, "allocations", losing)
    monkeypatch.setattr(planner, "device_estimate", lambda steps, *_, **__: device_estimate(steps, NO_WORKSPACES))
    with pytest.raises(GaugeError, match="a bug in peft-gauge: please report the command"):
        plan(request())


def test_what_a_step_replaces_does_not_pile_up() -> None:
    """A buffer that is assigned anew each step: two at once, never four."""
    log = [
        event(1, 0, 30 * MIB, BASE_WEIGHTS, OUTSIDE),
        event(1, 1, 30 * MIB, ACTIVATIONS, FORWARD),
        event(-1, 0, 30 * MIB, BASE_WEIGHTS, FORWARD),
    ]
    result = Steps(log).replayed(NO_WORKSPACES)
    assert PASSES >= 3
    assert result.peak_allocated_bytes == 2 * 30 * MIB
    assert result.allocated_bytes == 30 * MIB


def test_a_card_of_just_the_size_fits_and_a_smaller_one_does_not() -> None:
    free = plan(request())
    exact = plan(request(gpus=(str(free.device_bytes_estimate),)))
    short_bytes = free.device.context_bytes + free.peak_bytes - 1
    short = plan(request(gpus=(str(short_bytes), "24GB")))

    assert (exact.gpus[0].fits, exact.gpus[0].headroom_bytes) == (True, 0)
    assert exact.fits
    assert not short.fits
    assert (short.gpus[0].fits, short.gpus[0].headroom_bytes) == (False, short_bytes - free.device_bytes_estimate)
    assert short.gpus[1].fits
    assert all(card.usable_bytes == card.device_bytes + card.headroom_bytes for card in short.gpus)


# --- searching


@given(st.integers(1, 40), st.integers(0, 60))
def test_bisection_agrees_with_brute_force(limit: int, threshold: int) -> None:
    fitting = [value for value in range(1, limit + 1) if value <= threshold]
    expected = max(fitting, default=None)
    assert largest_that_fits(lambda value: value <= threshold, 1, limit) == (expected, expected == limit)


@given(
    threshold=st.integers(0, 5000),
    limit=st.integers(1, 6000),
    optimism=st.integers(0, 400),
    bend=st.floats(-0.5, 2.0),
    slope=st.floats(0, 1e9),
)
def test_a_guess_from_a_line_changes_the_number_of_plans_and_not_the_value(
    threshold: int, limit: int, optimism: int, bend: float, slope: float
) -> None:
    """Whatever the line: too optimistic, bent, flat, or rising."""

    def room(value: int) -> float:
        return slope * (threshold + optimism - value) * (1 + bend * value / 5000)

    plain = largest_that_fits(lambda value: value <= threshold, 1, limit)
    assert largest_that_fits(lambda value: value <= threshold, 1, limit, room) == plain


@pytest.mark.parametrize(
    ("threshold", "optimism", "most_plans"), [(12, 0, 4), (37, 1, 4), (100, 0, 4), (1000, 5, 8), (16_000, 100, 13)]
)
def test_a_search_along_a_line_takes_about_a_third_of_the_plans(threshold: int, optimism: int, most_plans: int) -> None:
    """Doubling and bisection take 8, 12, 14, 20 and 28."""
    tried: list[int] = []

    def fits(value: int) -> bool:
        tried.append(value)
        return value <= threshold

    assert largest_that_fits(fits, 1, 2**24, lambda value: threshold + optimism + 0.5 - value)[0] == threshold
    assert len(tried) == len(set(tried)) <= most_plans


@given(
    threshold=st.integers(0, 5000),
    limit=st.integers(1, 6000),
    slopes=st.lists(st.integers(0, 100), min_size=1, max_size=3),
    fixed=st.lists(st.integers(0, 9000), min_size=3, max_size=3),
)
def test_a_search_takes_at_most_the_plans_that_it_has_announced(
    threshold: int, limit: int, slopes: list[int], fixed: list[int]
) -> None:
    """A peak is the highest of some phases, whose memory is a line each."""
    tried: list[int] = []
    announced: list[int | None] = []

    def peak(value: int) -> int:
        return max(slope * value + base for slope, base in zip(slopes, fixed, strict=False))

    def fits(value: int) -> bool:
        tried.append(value)
        return peak(value) <= peak(threshold)

    def tell(plans: int, at_most: int | None) -> None:
        assert plans == len(announced), "once before each plan"
        announced.append(at_most)

    room = lambda value: peak(threshold) - peak(value)  # noqa: E731
    largest_that_fits(fits, 1, limit, room, search._counting(tried, tell))
    assert len(announced) == len(tried)
    known = [most for most in announced if most is not None]
    assert known == sorted(known, reverse=True)
    assert all(most >= len(tried) for most in known)


def test_a_usual_search_has_a_bound_from_its_third_plan_on() -> None:
    announced: list[int | None] = []
    tried: list[int] = []

    def fits(value: int) -> bool:
        tried.append(value)
        return value <= 18

    assert largest_that_fits(fits, 1, 2**24, lambda value: 18.5 - value, announced.append) == (18, False)
    assert tried == [1, 2, 18, 19]
    assert announced == [None, None, 14, 2]


@pytest.mark.parametrize(("good", "bad"), [(1, 40), (100, 1000), (8, 10), (1, 2), (500, 4000)])
def test_the_announced_plans_of_a_walk_are_reached(good: int, bad: int) -> None:
    """They are those of the worst value, so no smaller number would be true."""

    def plans(threshold: int) -> int:
        tried: list[int] = []

        def fits(value: int) -> bool:
            tried.append(value)
            return value <= threshold

        low, high = search._walked_down(fits, good, bad, lambda most: None)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return len(tried)

    assert search._most_on_a_walk(good, bad, max(1, bad // 128)) == max(map(plans, range(good, bad)))


@pytest.mark.parametrize("holds", [1, 2, 3, 5, 16, 700, 1024, 5000])
@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_a_search_for_gpus_takes_at_most_the_plans_that_it_has_announced(holds: int, strategy: Any) -> None:
    """GPUs with 6 bytes each; a step of 6 bytes per GPU that is needed, between steps."""
    tried: list[int] = []
    announced: list[int | None] = []

    def planner(asked: PlanRequest) -> Any:
        number = 1 if asked.sharding is None else asked.sharding.ranks
        tried.append(number)
        fit = SimpleNamespace(usable_bytes=6)
        return SimpleNamespace(fits=number >= holds, resident_bytes=min(holds, 12), gpus=[fit])

    def tell(plans: int, at_most: int | None) -> None:
        assert plans == len(tried)
        announced.append(at_most)

    asked = request("lora", gpus=("24GB",), sharding=Sharding(2, strategy))
    find(asked, "gpus", planner, tell)
    assert announced[0] is None
    known = [most for most in announced[1:] if most is not None]
    assert len(known) == len(tried) - 1
    assert known == sorted(known, reverse=True)
    assert all(most >= len(tried) for most in known)


@pytest.mark.slow
def test_the_found_batch_is_the_one_that_trying_all_gives() -> None:
    longer = request("lora", settings=replace(SETTINGS, seq=128))
    middle = plan(longer.with_value("batch", 5))
    asked = replace(longer, gpus=(str(middle.device_bytes_estimate),))
    found = find(asked, "batch", plan)
    fitting = [value for value in range(1, 9) if plan(asked.with_value("batch", value)).fits]

    assert 5 <= max(fitting) < 8
    assert found.value == max(fitting)
    assert found.plan.settings["batch"] == found.value
    assert found.plan.fits
    assert not found.at_limit


@pytest.mark.parametrize(("quantity", "limit"), [("seq", 128), ("rank", 64)])
def test_a_search_ends_where_the_model_does(quantity: str, limit: int) -> None:
    """128 positions; no matrix of the toy has a rank above 64."""
    asked = request("lora", gpus=("24GB",))
    roomy = plan(asked)
    found = find(asked, quantity, lambda _: roomy)
    assert (found.value, found.at_limit) == (limit, True)
    assert plan(asked.with_value(quantity, limit)).fits


def test_nothing_fits_a_card_that_is_too_small() -> None:
    found = find(request("lora", gpus=("500MB",)), "batch", plan)
    assert (found.value, found.at_limit, dict(found.tried)) == (None, False, {1: False})
    assert found.plan.settings["batch"] == 1


# --- what cannot be planned


def long_sequence() -> PlanRequest:
    return request(settings=StepSettings(1, 200))


def test_a_sequence_beyond_the_positions_is_a_warning() -> None:
    assert any("128 positions" in warning for warning in plan(long_sequence()).warnings)


def refused(name: str) -> Callable[[], Plan]:
    values = {
        "overflows": lambda: plan(request(settings=StepSettings(2**40, 2**40))),
        "no rank": lambda: find(request("prefix", gpus=("24GB",)), "rank", plan),
        "exactly one GPU": lambda: find(request("lora"), "batch", plan),
        "cannot be quantized": lambda: plan(
            PlanRequest(TOY, replace(methods.FULL, quantization=Quantization()), SETTINGS)
        ),
        "unknown loss": lambda: plan(request(loss="half")),
        "unknown GPU": lambda: plan(request(gpus=("RTX 9999",))),
        "does not fit": lambda: plan(
            PlanRequest(TOY, methods.LORA.variant("x", "x", peft_config={"target_modules": ["nothing"]}), SETTINGS)
        ),
    }
    return values[name]  # type: ignore[return-value]


@pytest.mark.parametrize(
    "message",
    [
        "overflows",
        "no rank",
        "exactly one GPU",
        "cannot be quantized",
        "unknown loss",
        "unknown GPU",
        "does not fit",
    ],
)
def test_bad_requests_are_refused_in_one_line(message: str) -> None:
    with pytest.raises(GaugeError, match=message) as caught:
        refused(message)()
    assert "\n" not in str(caught.value)


def test_an_operation_that_needs_values_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, use_cache: bool = False, **batch: torch.Tensor) -> Any:
        torch.repeat_interleave(batch["input_ids"][0])
        return self.model(**batch)

    monkeypatch.setattr(ModelCall, "forward", forward)
    with pytest.raises(GaugeError, match=r"lora on toy-llama cannot be planned: .*repeat_interleave"):
        plan(request("lora"))
