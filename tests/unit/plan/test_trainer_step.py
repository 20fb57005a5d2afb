"""Steps of `transformers.Trainer` and `trl.SFTTrainer`: planned on fakes, and tracked on real tensors of the CPU."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch

from peft_gauge._internals import trl as from_trl
from peft_gauge.counting import count
from peft_gauge.errors import GaugeError
from peft_gauge.memory.categories import LOGITS_AND_LOSS, OPTIMIZER_STATE
from peft_gauge.plan import adaptation, fakes, kernels
from peft_gauge.plan.autocast import as_on_cuda
from peft_gauge.plan.planner import plan
from peft_gauge.plan.policies import stepping
from peft_gauge.plan.record import Plan, PlanRequest
from peft_gauge.plan.trainer_step import follow_trainer
from peft_gauge.training import methods, models
from peft_gauge.training.loops import step_settings

if TYPE_CHECKING:
    from peft_gauge.plan.traced_step import Trace

pytestmark = pytest.mark.integration

TOY = models.resolve("toy-llama", weights="random")
BATCH, SEQ = 2, 32


def request(method: str, loop: str, *, dtype: str = "float32", gpus: tuple[str, ...] = (), **given: Any) -> PlanRequest:
    fields = {"batch": BATCH, "seq": SEQ, "optimizer": "adamw-fused", **given}
    settings, further = step_settings(loop, fields, {})
    return PlanRequest(TOY, methods.get(method), settings, dtype=dtype, loop=loop, trainer_arguments=further, gpus=gpus)  # type: ignore[arg-type]


def on_fakes(asked: PlanRequest) -> Trace:
    adapted = adaptation.adapt(asked, [])
    mode = fakes.fake_mode()
    made = fakes.to_fake(adapted.model, mode)
    base = [made[key] for key in adapted.base_parameters]
    with (
        mode,
        kernels.as_packed(asked.packed),
        kernels.unpadded_sequences(),
        as_on_cuda(),
        stepping(adapted.model),
    ):
        return follow_trainer(asked, adapted.model, base, count(adapted.model), [])


def on_real_tensors(asked: PlanRequest) -> Trace:
    torch.manual_seed(0)
    base = methods.prepare_base(models.build(TOY, dtype=asked.dtype), asked.method)
    own = list(base.parameters())
    model = methods.attach(base, replace(asked.method, quantization=None, prepare_kbit=False))
    with as_on_cuda():
        return follow_trainer(asked, model, own, count(model), [])


STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "trainer": ("trainer", {"mixed_precision": "bf16"}),
    "trainer-accumulation": ("trainer", {"mixed_precision": "bf16", "grad_accumulation": 2, "optimizer": "sgd"}),
    "sft": ("sft", {"grad_checkpointing": False}),
}


def a_step(step: str, method: methods.Method) -> Any:
    """Accumulation and TRL's loss are the loop's, whatever the method: of some here, of the others every week."""
    repeated = step != "trainer" and method.name not in ("full", "qlora", "prefix" if step == "sft" else "")
    return pytest.param(*STEPS[step], method, id=f"{step}-{method.name}", marks=pytest.mark.slow if repeated else ())


@pytest.mark.parametrize(
    ("loop", "given", "method"), [a_step(step, method) for step in STEPS for method in methods.DEFAULT_METHODS]
)
def test_a_planned_step_of_a_trainer_is_a_real_one_without_its_numbers(
    method: methods.Method, loop: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both take the path of a CPU through TRL's loss: its Triton kernels have nothing to compare with here.
    monkeypatch.setattr(from_trl, "has_fused_head", lambda: False)
    asked = request(method.name, loop, **given)
    planned, real = on_fakes(asked), on_real_tensors(asked)
    for metric in ("counted", "live_outputs_bytes", "saved_activation_bytes", "flops"):
        assert getattr(planned, metric) == getattr(real, metric), metric
    for moment in ("peak", "resident"):
        ours, theirs = getattr(planned, moment), getattr(real, moment)
        assert (ours.bytes, ours.by_category, ours.phase) == (theirs.bytes, theirs.by_category, theirs.phase)


def test_one_trainers_plan_leaves_the_next_as_it_was() -> None:
    """bitsandbytes' overrides, accelerate's state and transformers' masks are global."""
    alone = plan(request("full", "plain", optimizer="adamw8bit"))
    by_trainer = plan(request("full", "trainer", optimizer="adamw8bit"))
    after = plan(request("full", "plain", optimizer="adamw8bit"))
    assert after.peak_by_category == alone.peak_by_category
    # A trainer keeps the state of the embedding in 32 bit: 256 × 64 weights, two states.
    assert by_trainer.resident_by_category[OPTIMIZER_STATE] > alone.resident_by_category[OPTIMIZER_STATE]
    assert plan(request("full", "trainer", optimizer="adamw8bit")).peak_by_category == by_trainer.peak_by_category


def test_micro_batches_beyond_the_traced_ones_count_as_inputs() -> None:
    few, many = (plan(request("lora", "trainer", grad_accumulation=number)) for number in (3, 10))
    assert many.peak_by_category["inputs"] - few.peak_by_category["inputs"] == 7 * 2 * BATCH * SEQ * 8
    assert many.flops_per_step * 3 == few.flops_per_step * 10


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "lion_32bit", "rmsprop", "ademamix", "adagrad"])
def test_an_optimizer_of_transformers_is_the_same_under_either_loop(name: str) -> None:
    found = [plan(request("full", loop, optimizer=name)) for loop in ("plain", "trainer")]
    states = [each.resident_by_category.get(OPTIMIZER_STATE, 0) for each in found]
    assert states[0] == pytest.approx(states[1], abs=512)
    factor = {"adamw_torch": 8, "lion_32bit": 4, "rmsprop": 4, "ademamix": 12, "adagrad": 4}.get(name)
    if factor is not None:
        assert states[0] == pytest.approx(factor * found[0].trainable_params, rel=0.01, abs=40 * 512)


def test_fp16_scales_the_loss_under_a_trainer() -> None:
    plain = plan(request("lora", "plain", mixed_precision="fp16", float32_outputs=True, clip_grad_norm=1.0))
    trainer = plan(request("lora", "trainer", mixed_precision="fp16"))
    assert trainer.peak_bytes == pytest.approx(plain.peak_bytes, abs=32 * 512)


def test_a_full_batch_needs_no_mask_and_a_padded_one_does() -> None:
    asked = replace(request("lora", "sft", dtype="bfloat16"), padded=False)
    full, padded = plan(asked), plan(replace(asked, padded=True))
    assert padded.peak_bytes > full.peak_bytes


def test_a_trainer_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    with pytest.raises(GaugeError, match="--loop sft needs trl .*pip install"):
        request("lora", "sft")


# --- the losses of SFTTrainer

TILED, FULL_LOGITS, LEFT_OUT = "tiled", "full logits", "left out, with a note"
SFT_LOSSES: dict[str, tuple[dict[str, Any], str]] = {
    "default": ({}, TILED),
    "dft": ({"loss_type": "dft"}, TILED),
    "chunked_nll, an alias": ({"loss_type": "chunked_nll"}, TILED),
    "label smoothing": ({"label_smoothing_factor": 0.1}, FULL_LOGITS),
    "label smoothing of dft, without an effect": ({"label_smoothing_factor": 0.1, "loss_type": "dft"}, TILED),
    "completion only": ({"completion_only_loss": True}, LEFT_OUT),
    "assistant only": ({"assistant_only_loss": True}, LEFT_OUT),
    "kernels of the Hub": ({"model_init_kwargs": {"use_kernels": True}}, LEFT_OUT),
}


def with_arguments(arguments: dict[str, Any]) -> PlanRequest:
    settings, further = step_settings("sft", {"batch": BATCH, "seq": SEQ, "grad_checkpointing": False}, arguments)
    return PlanRequest(TOY, methods.get("lora"), settings, dtype="float32", loop="sft", trainer_arguments=further)


DAILY = ("default", "label smoothing", "completion only")  # one for each way


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DAILY else pytest.mark.slow) for name in SFT_LOSSES]
)
def test_each_loss_of_sft_is_planned_as_itself_or_named(name: str) -> None:
    pytest.importorskip("trl", reason="trl comes with the extra trl")
    arguments, expected = SFT_LOSSES[name]
    default, found = plan_of_defaults(), plan(with_arguments(arguments))
    logits = BATCH * SEQ * TOY.vocab_size * 2  # in bfloat16, under TRL's autocast
    traced = largest_logits(with_arguments(arguments))
    assert (traced >= logits) == (expected == FULL_LOGITS)
    if expected == FULL_LOGITS:
        assert found.peak_bytes > default.peak_bytes
    else:
        assert found.peak_bytes == default.peak_bytes
    named = [each for each in found.warnings if " is left out of this plan: " in each]
    assert [each.partition(" ")[0] for each in named] == (list(arguments) if expected == LEFT_OUT else [])
    assert len(found.warnings) == len(named)


@cache
def plan_of_defaults() -> Plan:
    return plan(with_arguments({}))


def largest_logits(asked: PlanRequest) -> int:
    """The largest tensor of logits in the planned step, in bytes."""
    records = on_fakes(asked).tracker.records
    return max((each.nbytes for each in records if each.category == LOGITS_AND_LOSS), default=0)


def test_trl_has_no_loss_beyond_these() -> None:
    """A release that adds one fails here: look at how it is planned."""
    trl = pytest.importorskip("trl", reason="trl comes with the extra trl")
    field = next(each for each in fields(trl.SFTConfig) if each.name == "loss_type")
    assert set(field.metadata["choices"]) == {"nll", "dft", "chunked_nll"}
