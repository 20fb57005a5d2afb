"""Fake models against the real ones they stand for; the CUDA routes against what CUDA's operators keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F

from peft_gauge.counting import quantization_constants
from peft_gauge.memory.categories import (
    ACTIVATIONS,
    BACKWARD,
    BASE_WEIGHTS,
    DEQUANTIZED_TEMPORARIES,
    FORWARD,
    INPUTS,
    QUANTIZATION_CONSTANTS,
)
from peft_gauge.memory.tracker import StorageTracker
from peft_gauge.plan import fakes, kernels

BATCH, HEADS, ROWS, WIDTH = 2, 4, 48, 16


def operators(tracker: Any) -> Any:
    return {record.operator for record in tracker.records}


def test_ties_views_and_attributes_survive() -> None:
    model: Any = nn.ModuleDict({"embed": nn.Embedding(50, 8), "head": nn.Linear(8, 50, bias=False)})
    model["head"].weight = model["embed"].weight
    model.register_buffer("table", torch.zeros(10, 4))
    model.register_buffer("part", model.table[2:, :].t())
    model["embed"].weight.note = "kept"
    fakes.to_fake(model, fakes.fake_mode())

    assert model["head"].weight is model["embed"].weight
    assert model["head"].weight.note == "kept"
    assert isinstance(model["head"].weight, nn.Parameter)
    assert model.part.shape == (4, 8)
    assert model.part.stride() == (1, 4)
    assert model.part.storage_offset() == 8
    tracker = StorageTracker()
    tracker.adopt([*model.parameters(), *model.buffers()], BASE_WEIGHTS)
    assert [event.nbytes for event in tracker.events] == [50 * 8 * 4, 10 * 4 * 4]


def test_a_meta_model_becomes_a_fake_on_cpu() -> None:
    with torch.device("meta"):
        model = nn.Linear(8, 50, dtype=torch.bfloat16)
    fakes.to_fake(model, fakes.fake_mode())

    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model.weight.dtype == torch.bfloat16


@pytest.fixture
def quantized() -> Any:
    """A function that builds a 4-bit layer; on `meta` it is not packed yet."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def build(double_quant: Any, device: Any, shape: Any = (200, 320)) -> Any:
        layer = bitsandbytes.nn.Linear4bit(
            shape[1],
            shape[0],
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=double_quant,
            quant_type="nf4",
            device="meta" if device == "meta" else None,
        )
        return layer if device == "meta" else layer.to(device)

    return build


def quantized_bytes(layer: Any) -> Any:
    return layer.weight.nbytes, sorted(t.nbytes for t in quantization_constants(layer.weight))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("source", ["meta", "cpu"])
def test_four_bit_weights_take_the_bytes_of_the_real_ones(quantized: Any, double_quant: Any, source: Any) -> None:
    real = quantized(double_quant, "cpu")
    model = nn.Sequential(quantized(double_quant, source))
    fakes.to_fake(model, fakes.fake_mode())

    assert quantized_bytes(model[0]) == quantized_bytes(real)
    blocks = 200 * 320 // 64
    expected = [64, 1024, 4, -(-blocks // 256) * 4, blocks] if double_quant else [64, 4 * blocks]
    assert quantized_bytes(real) == (200 * 320 // 2, sorted(expected))


def test_packing_leaves_no_fake_in_the_librarys_cache(quantized: Any) -> None:
    from bitsandbytes import functional

    functional.name2qmap.clear()
    fakes.to_fake(nn.Sequential(quantized(True, "meta")), fakes.fake_mode())
    assert not any(isinstance(code, FakeTensor) for code in functional.name2qmap.values())


def test_a_four_bit_product_holds_a_dequantized_copy_in_both_directions(quantized: Any) -> None:
    model, mode = nn.Sequential(quantized(True, "meta")), fakes.fake_mode()
    fakes.to_fake(model, mode)
    tracker = StorageTracker()
    tracker.adopt(model.parameters(), BASE_WEIGHTS)
    tracker.adopt(quantization_constants(next(model.parameters())), QUANTIZATION_CONSTANTS)
    with mode, kernels.cuda_kernels():
        x = torch.zeros(64, 320, dtype=torch.bfloat16, requires_grad=True)
        tracker.adopt(x, INPUTS)
        with tracker:
            with tracker.phase(FORWARD):
                out = model(x)
            with tracker.phase(BACKWARD):
                out.backward(out.detach())

    weight, absmax = 200 * 320 * 2, 200 * 320 // 64 * 4
    assert tracker.kept_bytes(categories=[DEQUANTIZED_TEMPORARIES]) == 0
    assert tracker.peak(FORWARD).by_category[DEQUANTIZED_TEMPORARIES] == weight + absmax
    # Backward dequantizes to the dtype the weight had before it was packed (here FP32), and casts that.
    assert tracker.peak(BACKWARD).by_category[DEQUANTIZED_TEMPORARIES] == 2 * weight + weight
    assert set(tracker.operators_without_flops) <= {
        "bitsandbytes::dequantize_4bit",
        "bitsandbytes::dequantize_blockwise",
    }
    assert tracker.flops == 2 * (2 * 64 * 200 * 320)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_one_byte_an_element(dtype: Any) -> None:
    tracker = StorageTracker()
    with fakes.fake_mode(), kernels.cuda_kernels():
        x = torch.zeros(10, 10, dtype=dtype, requires_grad=True)
        tracker.adopt(x, INPUTS)
        with tracker, tracker.phase(FORWARD):
            out = F.dropout(x, 0.1)

    assert tracker.kept_bytes() == out.nbytes + out.numel()


def test_real_tensors_take_the_cpus_way_and_routes_end_with_their_block() -> None:
    x = torch.ones(10, requires_grad=True)
    before = type(F.dropout(x, 0.5).grad_fn)
    with kernels.cuda_kernels():
        assert type(F.dropout(x, 0.5).grad_fn) is before
    with fakes.fake_mode():
        x = torch.ones(10, requires_grad=True)
        assert type(F.dropout(x, 0.5).grad_fn) is before


def attend(
    dtype: Any = torch.bfloat16, mask_dtype: Any = None, kv_heads: Any = HEADS, width: Any = WIDTH, dropout: Any = 0.0
) -> Any:
    """Forward and backward of one attention on fakes; the tracker, and the bytes of q, k, v."""
    tracker = StorageTracker()
    with fakes.fake_mode(), kernels.cuda_kernels():
        query = torch.zeros(BATCH, HEADS, ROWS, width, dtype=dtype, requires_grad=True)
        key, value = (torch.zeros(BATCH, kv_heads, ROWS, width, dtype=dtype, requires_grad=True) for _ in "kv")
        mask = None if mask_dtype is None else torch.zeros(BATCH, 1, ROWS, ROWS, dtype=mask_dtype)
        tracker.adopt([query, key, value, *([] if mask is None else [mask])], INPUTS)
        with tracker:
            with tracker.phase(FORWARD):
                out = F.scaled_dot_product_attention(
                    query, key, value, mask, dropout, is_causal=mask is None, enable_gqa=kv_heads != HEADS
                )
            with tracker.phase(BACKWARD):
                out.backward(out.detach())
    return tracker


OUTPUT = BATCH * HEADS * ROWS * WIDTH
LOG_SUMS = BATCH * HEADS * ROWS * 4


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_flash_keeps_output_and_row_sums(kv_heads: Any, dropout: Any) -> None:
    tracker = attend(kv_heads=kv_heads, dropout=dropout)
    state = 16 + 8  # the random generator's seed and offset, and an unused scalar

    assert 2 * OUTPUT + LOG_SUMS <= tracker.kept_bytes() <= 2 * OUTPUT + LOG_SUMS + state
    assert "aten::_scaled_dot_product_flash_attention_backward" in operators(tracker)


@pytest.mark.parametrize(("mask_dtype", "mask_bytes"), [(torch.bool, 2), (torch.bfloat16, 0)])
def test_a_mask_takes_efficient_attention(mask_dtype: Any, mask_bytes: Any) -> None:
    tracker = attend(mask_dtype=mask_dtype)
    log_sums = BATCH * HEADS * 64 * 4  # rows padded to a multiple of 32
    kept = 2 * OUTPUT + log_sums + BATCH * ROWS * ROWS * mask_bytes

    assert kept <= tracker.kept_bytes() <= kept + 16
    assert "aten::_scaled_dot_product_efficient_attention_backward" in operators(tracker)


def test_single_precision_takes_efficient_attention() -> None:
    assert "aten::_scaled_dot_product_efficient_attention" in operators(attend(dtype=torch.float32))


def test_shared_heads_in_single_precision_take_the_math_path() -> None:
    """No CUDA kernel fits, so CUDA keeps the quadratic weights, and so does the plan."""
    tracker = attend(dtype=torch.float32, kv_heads=2)
    assert tracker.kept_bytes() >= BATCH * HEADS * ROWS * ROWS * 4


def attention_of(
    query: Any = (HEADS, ROWS, WIDTH), key: Any = None, value: Any = None, dtype: Any = torch.bfloat16, **how: Any
) -> Any:
    """The kernel that one attention over tensors of these shapes takes."""
    tracker = StorageTracker()
    with fakes.fake_mode(), kernels.cuda_kernels():
        shapes = [query, key or query, value or key or query]
        tensors: Any = [torch.zeros(BATCH, *shape, dtype=dtype, requires_grad=True) for shape in shapes]
        if how.pop("strided", False):
            tensors[1] = tensors[1].transpose(-1, -2).contiguous().transpose(-1, -2)
        with tracker, tracker.phase(FORWARD):
            F.scaled_dot_product_attention(tensors[0], tensors[1], tensors[2], **how)
    names = {name.removeprefix("aten::_scaled_dot_product_") for name in operators(tracker)}
    fused = names & {"flash_attention", "efficient_attention"}
    return fused.pop().removesuffix("_attention") if fused else "math"


ONE_HEAD = (1, ROWS, WIDTH)


@pytest.mark.parametrize(
    ("kernel", "how"),
    [
        ("flash", {}),
        ("flash", {"key": ONE_HEAD, "enable_gqa": True}),  # Gemma-2B, as transformers calls it
        ("math", {"key": ONE_HEAD}),  # Falcon-7B: one key head, to be broadcast
        ("math", {"key": ONE_HEAD, "enable_gqa": True, "dtype": torch.float32}),
        ("efficient", {"key": (HEADS, 2 * ROWS, WIDTH), "is_causal": True}),
        ("flash", {"key": (HEADS, 2 * ROWS, WIDTH)}),
        ("efficient", {"query": (HEADS, ROWS, 264)}),
        ("efficient", {"value": (HEADS, ROWS, 2 * WIDTH)}),  # latent attention: values of another width
        ("math", {"query": (HEADS, ROWS, WIDTH + 1), "dtype": torch.float32}),
        ("math", {"strided": True}),
    ],
)
def test_each_attention_takes_the_kernel_that_cuda_takes(
    kernel: str, how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "flash_broadcasts_one_head", lambda: False)  # as up to torch 2.13
    assert attention_of(**how) == kernel


def test_a_torch_whose_flash_broadcasts_one_head_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "flash_broadcasts_one_head", lambda: True)
    assert attention_of(key=ONE_HEAD) == "flash"


def test_a_head_dimension_off_flashs_grid_is_padded() -> None:
    tracker = attend(width=20)
    assert any(record.nbytes == BATCH * HEADS * ROWS * 24 * 2 for record in tracker.records)


def test_a_primed_optimizer_makes_no_state_in_its_next_step() -> None:
    with fakes.fake_mode():
        model = nn.Linear(8, 8)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        fakes.prime(optimizer)
        assert all(p.grad is None for p in model.parameters())
        states = [t for state in optimizer.state.values() for t in state.values()]
        model(torch.zeros(2, 8)).sum().backward()
        optimizer.step()

    assert len(states) == 6
    assert all(a is b for a, b in zip(states, (t for s in optimizer.state.values() for t in s.values()), strict=True))


@pytest.mark.parametrize(("padded", "kernel"), [(False, "flash"), (True, "efficient")])
def test_a_llamas_batch_takes_the_kernel_of_a_real_one(padded: Any, kernel: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        use_cache=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    mode, tracker = fakes.fake_mode(), StorageTracker()
    fakes.to_fake(model, mode)
    with mode, kernels.cuda_kernels(), kernels.unpacked_sequences():
        ids = torch.zeros(2, 16, dtype=torch.long)
        mask = torch.ones_like(ids) if padded else None
        with tracker, tracker.phase(FORWARD):
            model(input_ids=ids, attention_mask=mask)

    attention = {name for name in operators(tracker) if "attention" in name}
    assert attention == {f"aten::_scaled_dot_product_{kernel}_attention"}
    assert tracker.kept_bytes(categories=[ACTIVATIONS]) == 0
