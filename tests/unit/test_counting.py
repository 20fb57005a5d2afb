"""Counts against modules whose parameters and bytes are known by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_gauge.counting import count, trainable_dtypes
from peft_gauge.training import methods, models
from peft_gauge.training.cases import count_on_meta
from peft_gauge.training.quantization import quantize_


class Tied(nn.Module):
    """An embedding of 10×4 whose weight is also the head's, one frozen layer, one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.middle = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.zeros(3, dtype=torch.float64))


def test_tied_weights_count_once() -> None:
    counted = count(Tied())
    assert counted.trainable_params == 40
    assert counted.total_params == 40 + 16 + 4
    assert counted.trainable_bytes == 160
    assert counted.weight_bytes == 4 * 60
    assert counted.buffer_bytes == 24


def test_percentages_name_their_whole() -> None:
    counted = count(Tied())
    assert counted.percent_of_total == pytest.approx(100 * 40 / 60)
    assert counted.percent_of_base(50) == pytest.approx(80)


def test_packed_weights_count_with_the_shape_they_stand_for() -> None:
    model = nn.Sequential(nn.Linear(128, 64, bias=False))
    quantize_(model, quant_format="nf4", double_quant=False, compute_dtype=torch.float32, skip=())
    counted = count(model)
    assert sum(p.numel() for p in model.parameters()) == 4096  # what a count by numel() says
    assert counted.total_params == 8192
    packed, absmax, codebook = 8192 // 2, 4 * 8192 // 64, 16 * 4
    assert counted.weight_bytes == packed + absmax + codebook


def test_dtypes_of_what_trains() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1).to(torch.bfloat16), nn.Linear(5, 5).requires_grad_(False))
    assert trainable_dtypes(model) == {"bfloat16": 4, "float32": 9}


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_a_count_on_meta_is_the_count_of_the_built_model(name: str) -> None:
    """Also where the base is really quantized to 4 bit."""
    record, method = models.resolve("toy-llama"), methods.get(name)
    built = count(methods.attach(models.build(record), method))
    on_meta = count_on_meta(record, method)
    assert (built.trainable_params, built.total_params) == (on_meta.trainable_params, on_meta.total_params)
