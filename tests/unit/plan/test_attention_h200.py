"""Attention on fake tensors against what the same calls took on a GPU (tests/data/h200_attention.json)."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from peft_gauge.memory.categories import BACKWARD, FORWARD, INPUTS
from peft_gauge.memory.tracker import StorageTracker
from peft_gauge.plan import fakes, kernels
from tests.support.paths import DATA

MEASURED = json.loads((DATA / "h200_attention.json").read_text(encoding="utf-8"))["rows"]
UNSPLIT_BYTES = 1 << 20
"""What the allocator may hand out beyond a request: the metrics are those of memory_allocated."""


# In single precision the GPU took the kernel that is planned, in 16 bit cuDNN's in place of flash or efficient.
SINGLE = [row for row in MEASURED if row["dtype"] == "float32"]
MASKED = [row for row in MEASURED if row["dtype"] != "float32" and row["kind"] in ("bool", "float")]
HALF = [row for row in MEASURED if row["dtype"] != "float32" and row not in MASKED]


def ids(row: dict[str, Any]) -> str:
    return f"{row['dtype']}-{'x'.join(map(str, row['shape']))}-{row['kind']}"


def planned(row: dict[str, Any]) -> tuple[set[str], int, int, int]:
    """Operators, and the bytes of `row` as the plan has them: saved, peak of forward, peak of backward."""
    batch, heads, kv_heads, tokens, width = row["shape"]
    dtype, kind = getattr(torch, row["dtype"]), row["kind"]
    tracker = StorageTracker(workspaces=kernels.CUDA_WORKSPACES)
    with fakes.fake_mode(), kernels.cuda_kernels():
        query, key, value = (
            torch.empty(batch, tokens, number, width, dtype=dtype).transpose(1, 2)
            for number in (heads, kv_heads, kv_heads)
        )
        if kind == "expanded_kv":
            key, value = (each.repeat_interleave(heads // kv_heads, 1) for each in (key, value))
        operands = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_())
        mask = {
            "bool": lambda: torch.ones(batch, 1, tokens, tokens, dtype=torch.bool).tril(),
            "float": lambda: torch.zeros(batch, 1, tokens, tokens, dtype=dtype),
        }.get(kind, lambda: None)()
        gradient = torch.empty(batch, heads, tokens, width, dtype=dtype)
        tracker.adopt([*operands, gradient, *([] if mask is None else [mask])], INPUTS)
        tracker.start_over()
        before = tracker.live(blocks=True).bytes
        with tracker:
            with tracker.phase(FORWARD):
                out = F.scaled_dot_product_attention(
                    query,
                    key,
                    value,
                    attn_mask=mask,
                    is_causal=kind in ("causal", "causal_dropout", "expanded_kv"),
                    enable_gqa=heads != key.shape[1],
                    dropout_p=0.1 if kind == "causal_dropout" else 0.0,
                )
            saved = tracker.live(blocks=True).bytes
            with tracker.phase(BACKWARD):
                gradients = torch.autograd.grad(out, operands, gradient)
        del gradients
    peaks = (tracker.peak(phase, blocks=True).bytes for phase in (FORWARD, BACKWARD))
    forward_peak, backward_peak = peaks
    return {each.operator for each in tracker.records}, saved - before, forward_peak - before, backward_peak - saved


@pytest.mark.parametrize("row", SINGLE, ids=ids)
def test_single_precision_takes_what_the_gpu_took(row: dict[str, Any]) -> None:
    operators, saved, forward_peak, backward_peak = planned(row)
    is_math = row["kernel"] == "aten::_scaled_dot_product_attention_math"
    assert ("aten::_safe_softmax" in operators) == is_math
    assert is_math or row["kernel"] in operators
    assert saved == pytest.approx(row["saved_bytes"], abs=UNSPLIT_BYTES + 1024)
    assert forward_peak == pytest.approx(row["forward_peak_bytes"], abs=UNSPLIT_BYTES)
    assert backward_peak == pytest.approx(row["backward_peak_bytes"], abs=UNSPLIT_BYTES)


@pytest.mark.parametrize("row", HALF, ids=ids)
def test_half_precision_is_not_planned_too_small(row: dict[str, Any]) -> None:
    """cuDNN's attention needs what flash needs, and less for odd widths and few tokens."""
    operators, saved, forward_peak, backward_peak = planned(row)
    assert "aten::_scaled_dot_product_flash_attention" in operators
    assert saved == pytest.approx(row["saved_bytes"], abs=1024)
    assert forward_peak == pytest.approx(row["forward_peak_bytes"], abs=1024)
    assert backward_peak >= row["backward_peak_bytes"] - 1024


@pytest.mark.parametrize("row", MASKED, ids=ids)
def test_a_mask_is_not_planned_to_keep_less(row: dict[str, Any]) -> None:
    """With shared heads the plan is of the math path, which a GPU without cuDNN's attention takes."""
    operators, saved, forward_peak, _ = planned(row)
    shared = row["shape"][1] != row["shape"][2]
    assert ("aten::_safe_softmax" if shared else "aten::_scaled_dot_product_efficient_attention") in operators
    assert saved >= row["saved_bytes"] - 1024
    assert forward_peak >= row["forward_peak_bytes"] - 1024
