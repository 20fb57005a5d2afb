"""torchao's quantized states of AdamW: the formula of their bytes, and the same step on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_gauge._internals import torchao
from peft_gauge._internals.torch import parts_of
from peft_gauge.errors import GaugeError
from peft_gauge.memory.categories import OPTIMIZER_STATE
from peft_gauge.memory.ledger import rounded
from peft_gauge.plan.planner import UNCOMPILED, plan
from peft_gauge.plan.record import PlanRequest
from peft_gauge.training import methods, models
from peft_gauge.training.loops import step_settings
from peft_gauge.training.settings import StepSettings
from peft_gauge.training.step import TrainingJob

needs_package = pytest.mark.skipif(not torchao.has_torchao(), reason="run: nox -s torchao")

TOY = models.resolve("toy-llama", weights="random")
BITS = {"adamw_torch_8bit": 8, "adamw_torch_4bit": 4}
BLOCK = 256  # by which transformers calls both; torchao's own default in 4 bit is 128


def state_bytes(parameter: torch.Tensor, bits: int) -> int:
    """One of the two states: codes, a scale per block, and the values of codes; of the parameter's type if it is small
    or does not divide into blocks. In blocks of 512 bytes."""
    numel = parameter.numel()
    if numel < 4096 or numel % BLOCK:
        return rounded(parameter.nbytes)
    return rounded(numel * bits // 8) + rounded(numel // BLOCK * 4) + rounded(2**bits * 4)


def request(optimizer: str, loop: str) -> PlanRequest:
    settings, _ = step_settings(loop, {"batch": 2, "seq": 64, "optimizer": optimizer}, {})
    return PlanRequest(TOY, methods.get("full"), settings, loop=loop)  # type: ignore[arg-type]


@needs_package
@pytest.mark.parametrize("loop", ["plain", "trainer"])
@pytest.mark.parametrize("optimizer", BITS)
def test_the_states_bytes_are_those_of_the_formula(optimizer: str, loop: str) -> None:
    found = plan(request(optimizer, loop))
    parameters = list(models.build(TOY, dtype="bfloat16").parameters())
    expected = sum(2 * state_bytes(each, BITS[optimizer]) for each in parameters)
    assert any(each.numel() < 4096 for each in parameters)
    assert any(each.numel() >= 4096 for each in parameters)
    assert found.resident_by_category[OPTIMIZER_STATE] == expected
    assert found.warnings == (UNCOMPILED,)


@needs_package
@pytest.mark.parametrize("optimizer", BITS)
def test_a_real_step_has_the_planned_state(optimizer: str) -> None:
    model = models.build(TOY, dtype="bfloat16")
    tokens = torch.zeros(2, 64, dtype=torch.long)
    with torch.compiler.set_stance("force_eager"):
        job = TrainingJob(model, [{"input_ids": tokens, "labels": tokens}], StepSettings(2, 64, optimizer=optimizer))
        job.step()
    states = [value for state in job.optimizer.state.values() for name, value in state.items() if name != "step"]
    real = sum(rounded(part.nbytes) for value in states for part in parts_of(value))
    assert real == plan(request(optimizer, "plain")).resident_by_category[OPTIMIZER_STATE]


@needs_package
def test_the_update_is_at_most_sixty_bytes_an_element() -> None:
    """So that the note on the bound is true: of a large parameter, on fakes."""
    from torchao.optim import AdamW4bit, AdamW8bit

    from peft_gauge.memory.tracker import StorageTracker
    from peft_gauge.plan import fakes

    for kind in (AdamW8bit, AdamW4bit):
        tracker = StorageTracker()
        with fakes.fake_mode(), torchao.optimizers_on_fakes():
            weight = nn.Parameter(torch.empty(1024, 1024, dtype=torch.bfloat16))
            optimizer = kind([weight])
            fakes.prime(optimizer)
            weight.grad = torch.empty_like(weight)
            held = [weight, weight.grad, *(v for v in optimizer.state[weight].values())]
            tracker.adopt(held, OPTIMIZER_STATE)
            before = tracker.live().bytes
            with tracker:
                optimizer.step()
            used = tracker.peak().bytes - before
            assert tracker.live().bytes - before < 1024, "the update keeps nothing"
        assert 40 * 1024**2 < used <= 60 * 1024**2


@pytest.mark.skipif(torchao.has_torchao(), reason="torchao is installed")
@pytest.mark.parametrize("loop", ["plain", "trainer"])
def test_without_torchao_one_line_names_it(loop: str) -> None:
    with pytest.raises(GaugeError, match="torchao") as refusal:
        plan(request("adamw_torch_8bit", loop))
    assert "\n" not in str(refusal.value)
