"""Weights that a CUDA device draws."""

from __future__ import annotations

import pytest
import torch

from peft_gauge.training import models


@pytest.mark.gpu
def test_a_gpu_draws_the_same_weights_again_and_keeps_no_memory() -> None:
    record = models.resolve("toy-llama", weights="random-gpu", seed=3)
    drawn = [models.build(record, dtype="bfloat16").state_dict() for _ in range(2)]
    assert all(torch.equal(value, drawn[1][name]) for name, value in drawn[0].items())
    assert {value.device.type for value in drawn[0].values()} == {"cpu"}
    assert torch.cuda.memory_reserved() == 0
