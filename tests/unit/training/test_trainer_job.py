"""A trainer's job against the plain one, whose steps it takes where both have the same settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from peft_gauge.errors import GaugeError
from peft_gauge.measure.passes import CaseSetup, measure
from peft_gauge.training import cases, methods, models
from peft_gauge.training.batches import cut, token_stream
from peft_gauge.training.cases import Case
from peft_gauge.training.loops import step_settings

if TYPE_CHECKING:
    from peft_gauge.training.step import TrainingJob

pytestmark = pytest.mark.integration

TOY = models.resolve("toy-llama", weights="random")
BATCH, SEQ = 2, 16
STREAM = token_stream(None, vocab_size=TOY.vocab_size, tokens=cases.BATCHES * BATCH * 2 * SEQ, seed=0)
# A step of Trainer with these is a plain one.
AS_PLAIN = {
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-3,
    "optim": "adamw_torch",
    "max_grad_norm": 0.0,
    "gradient_checkpointing": False,
    "bf16": False,
}


def case_of(loop: str, method: str = "ia3", arguments: dict[str, Any] | None = None, **fields: Any) -> Case:
    settings, further = step_settings(loop, {"batch": BATCH, "seq": SEQ, **fields}, arguments or {})
    return Case(TOY, methods.get(method), settings, "cpu", "float32", loop=loop, trainer_arguments=further)  # type: ignore[arg-type]


@pytest.fixture
def begun() -> Iterator[Callable[[Case], TrainingJob]]:
    """Builds jobs, which end with the test: accelerate's state is global."""
    jobs: list[TrainingJob] = []

    def begin(case: Case) -> TrainingJob:
        jobs.append(cases.build_job(case, stream=STREAM))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.close()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("loop", ["trainer", "sft"])
def test_its_losses_are_those_of_the_plain_loop(
    loop: str, accumulation: int, begun: Callable[[Case], TrainingJob]
) -> None:
    given: dict[str, Any] = {"grad_accumulation": accumulation, "learning_rate": 1e-3}
    plain = cases.build_job(case_of("plain", **given), stream=STREAM)
    plain.warm_up(4)
    job = begun(case_of(loop, arguments=AS_PLAIN, grad_accumulation=accumulation))
    job.warm_up(4)
    # A trainer divides the loss of a micro-batch by their number before it returns it; TRL computes it in tiles.
    losses = [loss * accumulation for loss in job.losses]
    assert losses == pytest.approx(plain.losses, rel=1e-5)
    assert losses[3] != pytest.approx(losses[0], rel=1e-3)
    assert job.learned()


def test_its_phases_are_where_they_say(begun: Callable[[Case], TrainingJob]) -> None:
    job = begun(case_of("trainer", arguments={"gradient_accumulation_steps": 2}))
    weight = job.trainable[0]
    before = weight.detach().clone()
    assert job.forward().requires_grad
    assert weight.grad is None
    job.backward()
    assert weight.grad is not None
    first = weight.grad.clone()
    job.forward()
    job.backward()
    assert not torch.equal(weight.grad, first), "the second micro-batch adds to the first"
    assert torch.equal(weight, before)
    job.optimizer_step()
    assert not torch.equal(weight, before)
    assert weight.grad is not None, "gradients live until the step ends"
    job.clear()
    assert weight.grad is None
    assert job.loss is None


def test_another_shape_is_the_next_forwards(begun: Callable[[Case], TrainingJob]) -> None:
    for loop in ("trainer", "sft"):
        job = begun(case_of(loop, arguments={"gradient_checkpointing": False}))
        seen: list[tuple[int, ...]] = []
        job.model.get_input_embeddings().register_forward_hook(lambda *args, seen=seen: seen.append(args[2].shape))  # type: ignore[operator]
        job.step()
        job.train_on(cut(STREAM, batch=1, seq=2 * SEQ, device="cpu"), replace(job.settings, batch=1, seq=2 * SEQ))
        seen.clear()
        job.step()
        assert [shape[0] * shape[1] for shape in seen] == [2 * SEQ]
        job.close()


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "qlora", "prompt"])
def test_it_is_measured_like_the_plain_one(method: str) -> None:
    """All passes, and then a second job for the fingerprint."""
    setup = CaseSetup(case_of("trainer", method, AS_PLAIN), TOY, STREAM, ("memory", "fingerprint"), ((1, 2 * SEQ),))
    found = measure(setup)
    plain = measure(replace(setup, case=case_of("plain", method, learning_rate=1e-3)))
    assert found["learned"]
    assert found["gradients"] == {"missing": [], "not_finite": []}
    settings = found["described"]["settings"]
    assert (settings["loop"], settings["trainer_arguments"]["lr_scheduler_type"]) == ("trainer", "constant")
    assert "loop" not in plain["described"]["settings"], "older runs do not name it either"
    # A trainer holds the micro-batch that it has fetched ahead, and a mask of ones for QLoRA's prepared base.
    ahead = 8 * BATCH * 2 * SEQ
    for there, here in zip(found["memory"]["shapes"], plain["memory"]["shapes"], strict=True):
        assert 0 <= there["tensor_peak_bytes"] - here["tensor_peak_bytes"] <= 4 * ahead
    assert found["fingerprint"]["flops"] == plain["fingerprint"]["flops"]


def test_fp16_is_refused_on_a_cpu_where_a_trainer_leaves_it_out() -> None:
    with pytest.raises(GaugeError, match="leaves fp16 out on a CPU"):
        cases.build_job(case_of("trainer", mixed_precision="fp16"), stream=STREAM)


def test_packed_rows_are_trained_on_at_their_own_length(begun: Callable[[Case], TrainingJob]) -> None:
    job = begun(case_of("sft", arguments={**AS_PLAIN, "packing": True}))
    job.warm_up(2)
    assert job.learned()


def test_an_error_within_the_trainer_reaches_the_caller(begun: Callable[[Case], TrainingJob]) -> None:
    job = begun(case_of("trainer"))

    def refuse(*args: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    job.model.get_input_embeddings().register_forward_hook(refuse)  # type: ignore[operator]
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        job.step()
