"""Cut Cross-Entropy's memory against its authors' own measurements, and the steps that are planned with it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from peft_gauge._internals import cut_cross_entropy
from peft_gauge.errors import GaugeError
from peft_gauge.memory.categories import LOGITS_AND_LOSS
from peft_gauge.memory.ledger import rounded
from peft_gauge.memory.tracker import StorageTracker
from peft_gauge.plan import fakes, kernels, policies
from peft_gauge.plan.adaptation import NO_CUT_LOSS
from peft_gauge.plan.planner import plan
from peft_gauge.plan.record import PlanRequest
from peft_gauge.training import methods, models
from peft_gauge.training.settings import StepSettings

INSTALLED = cut_cross_entropy.has_cut_cross_entropy()
needs_package = pytest.mark.skipif(not INSTALLED, reason="run: nox -s cce")

TOKENS, VOCABULARY, WIDTH, SOFTCAP = 8192, 256_000, 2304, 30.0
"""The output projection of Gemma 2 (2B)."""

PUBLISHED_MIB = {"cut": (1.1, 1163.0, 1164.0), "baseline": (24_000.0, 16_000.0, 28_000.0)}
"""Forward, backward, and both: the growth of the peak in ``torch.cuda.memory_stats``, in MiB to one decimal, on an
A100. Source: README of ml-cross-entropy, and Table 1 of arXiv 2411.09009."""


def published_baseline(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """``benchmark/__main__.py`` of ml-cross-entropy."""
    logits = hidden @ weight.T
    logits = torch.tanh(logits / SOFTCAP) * SOFTCAP
    return F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="mean")


def cut(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    found: torch.Tensor = linear_cross_entropy(hidden, weight, labels, softcap=SOFTCAP)
    return found


def measured(loss_of: Callable[..., torch.Tensor], *, on_gpu: bool, trained: bool = True) -> tuple[float, ...]:
    """As ``benchmark/memory.py`` of ml-cross-entropy, in MiB: forward, backward, and both."""
    tracker = StorageTracker()
    with ExitStack() as stack:
        stack.enter_context(fakes.fake_mode())
        stack.enter_context(kernels.cuda_kernels())
        stack.enter_context(policies.stepping(torch.nn.Identity()))
        if on_gpu:
            stack.enter_context(cut_cross_entropy.cut_cross_entropy_on_fakes())
        hidden = torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(VOCABULARY, WIDTH, dtype=torch.bfloat16, requires_grad=trained)
        labels = torch.empty(TOKENS, dtype=torch.long)
        tracker.adopt([hidden, weight, labels], "inputs")
        before = tracker.live(blocks=True).bytes
        with tracker:
            loss = loss_of(hidden, weight, labels)
            forward = tracker.peak(blocks=True).bytes - before
            kept = tracker.live(blocks=True).bytes
            with tracker.phase("backward"):
                loss.backward()
            backward = tracker.peak("backward", blocks=True).bytes - kept
            both = tracker.peak(blocks=True).bytes - before
    return tuple(each / 2**20 for each in (forward, backward, both))


@needs_package
def test_the_loss_takes_the_memory_that_its_authors_measured() -> None:
    assert measured(cut, on_gpu=True) == pytest.approx(PUBLISHED_MIB["cut"], abs=0.05)


@needs_package
def test_a_frozen_head_has_no_gradient() -> None:
    """Then backward has the hidden states' gradient, an order of the vocabulary, and locks by the source's formula."""
    gradient, order = TOKENS * WIDTH * 2, VOCABULARY * 4
    blocks = WIDTH // 64
    locks = [-(-rows // blocks) * blocks * 4 for rows in (TOKENS, VOCABULARY)]
    expected = sum(map(rounded, (gradient, order, *locks)))
    assert measured(cut, on_gpu=True, trained=False)[1] == pytest.approx(expected / 2**20, abs=512 / 2**20)


def test_the_plain_loss_takes_the_memory_that_they_measured() -> None:
    assert measured(published_baseline, on_gpu=False) == pytest.approx(PUBLISHED_MIB["baseline"], abs=0.5)


# --- steps

TOY = models.resolve("toy-llama", weights="random")
SETTINGS = StepSettings(8, 128)


def request(method: str, **changes: object) -> PlanRequest:
    return replace(PlanRequest(TOY, methods.get(method), SETTINGS), loss="cce", **changes)  # type: ignore[arg-type]


def test_without_the_package_it_is_planned_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("adaptation", "planner"):
        monkeypatch.setattr(f"peft_gauge.plan.{module}.has_cut_cross_entropy", lambda: False)
    found, chunked = plan(request("lora")), plan(replace(request("lora"), loss="chunked"))
    assert found.peak_bytes == chunked.peak_bytes
    assert found.warnings == (NO_CUT_LOSS, *chunked.warnings)


@needs_package
@pytest.mark.parametrize("loop", ["plain", "trainer"])
def test_a_step_has_no_logits(loop: str) -> None:
    found = plan(request("lora", loop=loop))
    full = plan(replace(request("lora", loop=loop), loss="full"))
    assert found.peak_by_category.get(LOGITS_AND_LOSS, 0) <= 512, "the loss itself"
    assert full.peak_by_category[LOGITS_AND_LOSS] >= 8 * 128 * TOY.vocab_size * 4
    assert found.peak_bytes < full.peak_bytes
    assert found.warnings == (f"{cut_cross_entropy.release()}: its kernels' operations are not in flops_per_step",)


@needs_package
def test_float32_is_refused_in_one_line() -> None:
    with pytest.raises(GaugeError, match=r"refuses this step .*fp16.*--dtype bfloat16") as refusal:
        plan(request("lora", dtype="float32"))
    assert "\n" not in str(refusal.value)
