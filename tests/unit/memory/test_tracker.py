"""The storage tracker against peaks worked out by hand and against the CPU allocator; fakes against real."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peft_gauge.memory.categories import (
    ACTIVATIONS,
    ADAPTER_WEIGHTS,
    BACKWARD,
    BASE_WEIGHTS,
    BUFFERS,
    FORWARD,
    GRADIENTS,
    HOST,
    INPUTS,
    LOGITS_AND_LOSS,
    OPTIMIZER,
    OPTIMIZER_STATE,
    OPTIMIZER_TEMPORARIES,
    OTHER,
)
from peft_gauge.memory.ledger import rounded
from peft_gauge.memory.tracker import StorageTracker
from peft_gauge.plan import fakes, kernels

# peft asks transformers 5 for a property that it has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

VOCABULARY = 250


@pytest.fixture(params=["real", "fake"])
def tensors(request: Any) -> Any:
    """The scope in which tensors are made: nothing, or a fake mode."""
    return contextlib.nullcontext() if request.param == "real" else fakes.fake_mode()


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def two_layers() -> Any:
    """Linear(10, 20), ReLU, Linear(20, 5): weights of 800, 80, 400 and 20 bytes in FP32."""
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))


def train_once(
    model: Any, inputs: Any, optimizer: Any = None, tracker: Any = None, loss: Any = lambda out: out.sum()
) -> Any:
    """One tracked step; the loss lives until the end of it."""
    tracker = tracker or StorageTracker()
    tracker.adopt(model.parameters(), BASE_WEIGHTS)
    tracker.adopt(inputs, INPUTS)
    if optimizer is not None:
        tracker.follow(optimizer)
    with tracker:
        with tracker.phase(FORWARD):
            result = loss(model(inputs))
        with tracker.phase(BACKWARD):
            result.backward()
        if optimizer is not None:
            with tracker.phase(OPTIMIZER):
                optimizer.step()
    return tracker


def test_forward_and_backward_by_hand(tensors: Any) -> None:
    with tensors:
        tracker = train_once(two_layers(), torch.randn(8, 10))

    assert [(e.sign * e.nbytes, e.category) for e in tracker.events if e.phase == FORWARD] == [
        (640, ACTIVATIONS),  # first layer, 8 x 20
        (640, ACTIVATIONS),  # ReLU, kept for its own backward and the second layer's
        (-640, ACTIVATIONS),  # which makes the first layer's output superfluous
        (160, ACTIVATIONS),  # second layer, 8 x 5
        (4, ACTIVATIONS),  # the sum
        (-160, ACTIVATIONS),
    ]
    assert [(e.sign * e.nbytes, e.category) for e in tracker.events if e.phase == BACKWARD] == [
        (4, ACTIVATIONS),  # gradient of the sum; its expansion to 8 x 5 is a view
        (640, ACTIVATIONS),  # with respect to the ReLU's output
        (400, GRADIENTS),
        (20, GRADIENTS),
        (640, ACTIVATIONS),  # with respect to the first layer's output
        (-640, ACTIVATIONS),
        (-640, ACTIVATIONS),  # the ReLU's output has served both
        (800, GRADIENTS),
        (80, GRADIENTS),
        (-640, ACTIVATIONS),
        (-4, ACTIVATIONS),
    ]


def test_peaks_by_hand(tensors: Any) -> None:
    with tensors:
        model = two_layers()
        tracker = train_once(model, torch.randn(8, 10), torch.optim.AdamW(model.parameters(), foreach=True))

    weights, inputs, loss = 1300, 320, 4
    assert tracker.peak(FORWARD).bytes == weights + inputs + 2 * 640
    assert tracker.peak(BACKWARD).bytes == weights + inputs + loss + 4 + 3 * 640 + 400 + 20
    steps = 4 * 4
    assert tracker.peak().by_category == {
        BASE_WEIGHTS: weights,
        INPUTS: inputs,
        ACTIVATIONS: loss,
        GRADIENTS: weights,
        OPTIMIZER_STATE: 2 * weights + steps,
        OPTIMIZER_TEMPORARIES: weights,  # foreach takes the square roots of all second moments at once
    }
    assert tracker.peak().phase == OPTIMIZER
    assert tracker.live().bytes == sum(tracker.live().by_category.values()) == 4 * weights + steps


def test_fused_optimizer_has_no_temporaries(tensors: Any) -> None:
    with tensors:
        model = two_layers()
        tracker = train_once(model, torch.randn(8, 10), torch.optim.AdamW(model.parameters(), fused=True))

    assert OPTIMIZER_TEMPORARIES not in tracker.peak(OPTIMIZER).by_category


def test_peak_in_blocks_counts_whole_blocks(tensors: Any) -> None:
    with tensors:
        tracker = train_once(two_layers(), torch.randn(8, 10))

    assert rounded(1) == rounded(512) == 512
    assert rounded(513) == 1024
    assert rounded(0) == 0
    assert tracker.peak(FORWARD, blocks=True).bytes == (1024 + 512 + 512 + 512) + 512 + 2 * 1024
    assert tracker.peak(FORWARD).bytes == 2900


def test_ties_and_views_count_once(tensors: Any) -> None:
    with tensors:
        weight = nn.Parameter(torch.randn(16, 8))
        tracker = StorageTracker()
        tracker.adopt([weight, weight, weight.detach(), weight[:4]], BASE_WEIGHTS)
        with tracker:
            views = [weight.t(), weight.view(-1), weight[2:], weight.expand(3, 16, 8), weight.detach()]

    assert len(views) == 5
    assert tracker.live().by_category == {BASE_WEIGHTS: 512}
    assert len(tracker.events) == 1


def test_in_place_operators_make_no_storage(tensors: Any) -> None:
    with tensors:
        x = torch.zeros(10)
        tracker = StorageTracker()
        tracker.adopt(x, INPUTS)
        with tracker:
            x.add_(1).mul_(x).relu_()

    assert len(tracker.events) == 1


def test_resize_takes_the_new_block_before_it_gives_the_old_one_back() -> None:
    x = torch.zeros(10)
    tracker = StorageTracker()
    tracker.adopt(x, INPUTS)
    with tracker:
        x.resize_(100)

    assert [e.sign * e.nbytes for e in tracker.events] == [40, 400, -40]
    del x
    assert tracker.live().bytes == 0


@pytest.mark.usefixtures("no_collector")
def test_storages_end_with_their_last_view_without_the_collector(tensors: Any) -> None:
    with tensors, StorageTracker() as tracker:
        x = torch.zeros(100)
        view = x[10:]
        del x
        assert tracker.live().bytes == 400
        del view
        assert tracker.live().bytes == 0


def test_storages_from_outside_are_met_as_operands(tensors: Any) -> None:
    with tensors:
        x = torch.zeros(100)
        with StorageTracker() as tracker:
            y = torch.cat([x, x])

    assert tracker.live().by_category == {OTHER: 400 + 800}
    assert y.numel() == 200


def test_host_storages_are_not_counted(tensors: Any) -> None:
    with tensors:
        model = two_layers()
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        tracker = train_once(model, torch.randn(8, 10), optimizer)
        tracker.label([state["step"] for state in optimizer.state.values()], HOST)

    assert tracker.live().by_category[OPTIMIZER_STATE] == 2 * 1300
    assert tracker.peak().by_category[OPTIMIZER_STATE] == 2 * 1300
    assert all(e.category != HOST for e in tracker.events)


def test_a_new_log_starts_from_what_is_alive(tensors: Any) -> None:
    with tensors:
        x = torch.zeros(100)
        with StorageTracker() as tracker:
            y = x + 1
            z = y + 1
            del y
            tracker.start_over()
            del x
            w = z + 1

    assert [e.sign * e.nbytes for e in tracker.events] == [400, 400, -400, 400]
    assert tracker.live().bytes == tracker.peak().bytes == 800
    assert w.numel() == 100


def test_a_phase_that_did_not_occur_has_no_peak() -> None:
    with pytest.raises(ValueError, match="optimizer"):
        StorageTracker().peak(OPTIMIZER)


@pytest.mark.parametrize(("trainable", "kept"), [(True, 8 * 10 * 4), (False, 0)])
def test_a_linear_layer_saves_its_input_only_for_its_own_weight(tensors: Any, trainable: Any, kept: Any) -> None:
    with tensors:
        layer = nn.Linear(10, 20, bias=False).requires_grad_(trainable)
        x = torch.randn(8, 10, requires_grad=True)
        tracker = StorageTracker()
        tracker.adopt([*layer.parameters(), x], OTHER)
        with tracker, tracker.phase(FORWARD):
            out = layer(x * 2)
            tracker.label(out, LOGITS_AND_LOSS)

    assert tracker.kept_bytes() == kept


def test_logits_are_known_by_their_width(tensors: Any) -> None:
    with tensors:
        model = nn.Linear(10, VOCABULARY)
        labels = torch.zeros(8, dtype=torch.long)
        tracker = StorageTracker(vocabulary=VOCABULARY)
        train_once(model, torch.randn(8, 10), tracker=tracker, loss=lambda out: F.cross_entropy(out, labels))

    logits = 8 * VOCABULARY * 4
    assert tracker.peak(FORWARD).by_category[LOGITS_AND_LOSS] == 2 * logits  # and their log-softmax
    # The gradients of both, beside the log-softmax: `cross_entropy` let the logits themselves go.
    assert tracker.peak(BACKWARD).by_category[LOGITS_AND_LOSS] == 3 * logits


def test_scratch_memory_is_held_for_one_operator(tensors: Any) -> None:
    with tensors:
        x = torch.zeros(10, 10)
        tracker = StorageTracker(workspaces={"aten::mm": lambda args, out: [1000, out.nbytes]})
        tracker.adopt(x, INPUTS)
        with tracker:
            y = x @ x

    assert y.shape == (10, 10)
    assert tracker.live().bytes == 800
    assert tracker.peak().bytes == 800 + 1000 + 400


def test_flops_of_a_step(tensors: Any) -> None:
    with tensors:
        tracker = train_once(two_layers(), torch.randn(8, 10))

    forward = 2 * 8 * 10 * 20 + 2 * 8 * 20 * 5
    # The input needs no gradient: the first layer has one product in backward, the second two.
    assert dict(tracker.flops_by_phase) == {
        FORWARD: forward,
        BACKWARD: 2 * 8 * 10 * 20 + 2 * (2 * 8 * 20 * 5),
    }
    assert tracker.flops == sum(tracker.flops_by_phase.values())
    assert not tracker.operators_without_flops


class Forks(nn.Module):
    """Each block's input feeds three layers, so that gradients are summed where they meet again."""

    def __init__(self, width: Any = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(6))

    def forward(self, x: Any) -> Any:
        for a, b, c in (self.layers[:3], self.layers[3:]):
            x = x + a(x) + b(x) * torch.sigmoid(c(x)) + x[:, :1] * x
        return x


def allocator_peak(action: Any) -> Any:
    """Peak of what torch's CPU allocator handed out during `action`, by the profiler's account."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    # Without `acc_events` torch 2.11 warns that the events of earlier cycles go.
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        action()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def phase_peak(tracker: Any, phase: Any) -> Any:
    """Peak of a phase above what was there when it began."""
    before = sum(e.sign * e.nbytes for e in tracker.events if e.phase != phase)
    return tracker.peak(phase).bytes - before


@pytest.mark.usefixtures("no_collector")
def test_gradients_are_summed_in_place_as_without_a_tracker() -> None:
    """Five users of one tensor: untracked, the engine holds two gradients at a time, not three."""
    weight = torch.randn(1000, requires_grad=True)
    sums = [weight * float(i) for i in range(5)]
    total = torch.stack([s.sum() for s in sums]).sum()
    untracked = allocator_peak(lambda: total.backward(retain_graph=True))
    expected, weight.grad = weight.grad, None
    assert expected is not None

    tracker = StorageTracker()
    tracker.adopt([weight, *sums], OTHER)
    with tracker, tracker.phase(BACKWARD):
        total.backward()

    assert phase_peak(tracker, BACKWARD) - untracked in range(-64, 65)  # the scalars around
    assert weight.grad is not None
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("seed", range(5))
def test_a_gradient_held_elsewhere_is_not_summed_in_place(seed: Any) -> Any:
    """Random graphs in which one gradient tensor waits in several buffers: the values must not change."""
    generator = torch.Generator().manual_seed(seed)

    def gradients(mode: Any) -> Any:
        leaves = [torch.full((4,), float(i + 1), requires_grad=True) for i in range(4)]
        generator.manual_seed(seed)
        values = list(leaves)
        for _ in range(30):
            i, j = torch.randint(len(values), (2,), generator=generator).tolist()
            values.append(values[i] + values[j] if i % 2 else values[i] * 0.5 + values[j])
        with mode:
            torch.stack(values).sum(0).backward(torch.ones(4))
        return [leaf.grad for leaf in leaves]

    plain = gradients(contextlib.nullcontext())
    tracked = gradients(StorageTracker())
    assert all(torch.equal(a, b) for a, b in zip(plain, tracked, strict=True))


def test_gradients_of_every_accumulation_are_gradients(tensors: Any) -> None:
    with tensors:
        layer = nn.Linear(10, 20, bias=False)
        first = train_once(layer, torch.randn(8, 10))
        second = train_once(layer, torch.randn(8, 10))

    assert first.live().by_category[GRADIENTS] == 800
    # Until it is added to the first, the second batch's gradient stands beside it.
    assert second.peak(BACKWARD).by_category[GRADIENTS] == 2 * 800


@pytest.mark.usefixtures("no_collector")
def test_peak_equals_the_allocators() -> None:
    """Forward and backward of forked blocks on real CPU tensors, to the byte."""
    model, x = Forks(), torch.randn(64, 32)

    def step() -> None:
        model(x).sum().backward()

    step()
    model.zero_grad()
    expected = allocator_peak(step)
    model.zero_grad()

    tracker = train_once(model, x)
    assert tracker.peak().bytes - _resident(model, x) == expected


def _resident(model: Any, x: Any) -> Any:
    return sum(p.nbytes for p in model.parameters()) + x.nbytes


# A small Llama, full and with LoRA


def llama(method: Any, dtype: Any = torch.float32) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    if method == "lora":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    return model.train()


def track_llama(model: Any, ids: Any) -> Any:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, foreach=True)
    tracker = StorageTracker(vocabulary=VOCABULARY)
    tracker.adopt(model.parameters(), BASE_WEIGHTS)
    tracker.adopt(trainable, ADAPTER_WEIGHTS)
    tracker.adopt(model.buffers(), BUFFERS)
    tracker.adopt(ids, INPUTS)
    tracker.follow(optimizer)
    with tracker:
        with tracker.phase(FORWARD):
            out = model(input_ids=ids, labels=ids)
            tracker.label(out.loss, LOGITS_AND_LOSS)
        with tracker.phase(BACKWARD):
            out.loss.backward()
        with tracker.phase(OPTIMIZER):
            optimizer.step()
    return tracker, trainable


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fakes_take_the_same_bytes_as_real_tensors(method: Any, dtype: Any) -> None:
    real_model = llama(method, dtype)
    real, _ = track_llama(real_model, torch.zeros(2, 16, dtype=torch.long))

    mode, model = fakes.fake_mode(), llama(method, dtype)
    fakes.to_fake(model, mode)
    with mode, kernels.unpacked_sequences():
        fake, _ = track_llama(model, torch.zeros(2, 16, dtype=torch.long))

    for phase in (FORWARD, BACKWARD, OPTIMIZER):
        assert fake.peak(phase).bytes == real.peak(phase).bytes
        assert fake.peak(phase).by_category == real.peak(phase).by_category
    assert fake.live().by_category == real.live().by_category
    assert real.live().by_category[BASE_WEIGHTS if method == "lora" else ADAPTER_WEIGHTS] == sum(
        p.nbytes for p in real_model.parameters() if p.requires_grad == (method == "full")
    )
    assert fake.kept_bytes() == real.kept_bytes() > 0
    assert fake.flops == real.flops > 0


@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradients_and_states_of_a_llama_are_exact(method: Any) -> None:
    tracker, trainable = track_llama(llama(method), torch.zeros(2, 16, dtype=torch.long))

    numbers = sum(p.numel() for p in trainable)
    live = tracker.live().by_category
    assert live[ADAPTER_WEIGHTS] == 4 * numbers
    assert live[GRADIENTS] == 4 * numbers
    assert live[OPTIMIZER_STATE] == 8 * numbers + 4 * len(trainable)
    assert tracker.peak(OPTIMIZER).by_category[OPTIMIZER_TEMPORARIES] == 4 * numbers
