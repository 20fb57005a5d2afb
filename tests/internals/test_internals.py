"""Is every private piece of a library that the project leans on still there, and does it do what is relied on?

A test a piece, named after the library and the piece; all of them take seconds. What fails after an upgrade was moved
by that release: mend its entry in `peft_gauge/_internals`, and nothing else.
"""

from __future__ import annotations

import inspect
import json
import os
import pickle
import re
import sys
from contextlib import nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from peft_gauge import _internals
from peft_gauge._internals import accelerate as from_accelerate
from peft_gauge._internals import bitsandbytes as from_bitsandbytes
from peft_gauge._internals import cut_cross_entropy as from_cut_cross_entropy
from peft_gauge._internals import distributed as from_distributed
from peft_gauge._internals import peft as from_peft
from peft_gauge._internals import pip as from_pip
from peft_gauge._internals import pytest as from_pytest
from peft_gauge._internals import torch as from_torch
from peft_gauge._internals import torch_fakes
from peft_gauge._internals import torchao as from_torchao
from peft_gauge._internals import transformers as from_transformers
from peft_gauge._internals import triton as from_triton
from peft_gauge._internals import trl as from_trl
from peft_gauge._internals.torch_fakes import QuickFakeTensorMode
from peft_gauge.bundle.target import Target
from peft_gauge.memory.tracker import StorageTracker
from peft_gauge.plan import fakes, flash_attention, policies
from peft_gauge.training import methods, models
from peft_gauge.training.quantization import load_bitsandbytes, quantize_
from tests.support.paths import ROOT
from tests.support.stepping_child import make_wheel

TOY = models.resolve("toy-llama")
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "pytest", "pip")


@pytest.fixture(autouse=True)
def named(request: pytest.FixtureRequest) -> Any:
    """A failure's first line: which release of which library lacks the piece."""
    library, _, piece = request.node.originalname.removeprefix("test_").partition("_")
    if library in LIBRARIES:
        with suppress(PackageNotFoundError):  # trl is optional
            request.node.add_report_section(
                "call",
                "piece",
                f"{library} {version(library)}: {piece.replace('_', ' ')} (peft_gauge/_internals/{library}.py)",
            )


# --- torch --------------------------------------------------------------------------------------------------


def test_torch_compile_can_be_put_off_to_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def compile(function: Any, **options: Any) -> Any:
        compiled.append((function, options))
        return function

    monkeypatch.setattr(torch, "compile", compile)
    layer = nn.Linear(1, 1)
    with from_torch.compiled_when_called():

        @torch.compile
        def plain(value: int) -> int:
            return value + 1

        @torch.compile(dynamic=False)
        def with_options(value: int) -> int:
            return value + 2

        assert compiled == []
        assert torch.compile(layer) is layer
    assert torch.compile is compile
    assert [each for each, _ in compiled] == [layer]
    assert [plain(1), plain(2), with_options(1)] == [2, 3, 3]
    assert [options for _, options in compiled[1:]] == [{}, {"dynamic": False}]
    assert plain.__name__ == "plain"


def test_what_torch_compiles_runs_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(function: Any, **options: Any) -> Any:
        return lambda value: -function(value)

    monkeypatch.setattr(torch, "compile", compile)
    with from_torch.compiled_when_called():

        @torch.compile
        def plus_one(value: int) -> int:
            return value + 1

    assert plus_one(1) == -2
    with from_torch.uncompiled():
        with from_torch.uncompiled():
            assert plus_one(1) == 2
        assert plus_one(1) == 2
    assert plus_one(1) == -2


def test_what_torch_compiled_at_once_runs_as_it_is_written() -> None:
    traced: list[Any] = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        traced.append(graph)
        return graph.forward

    doubled = torch.compile(lambda tensor: tensor * 2, backend=backend)
    with from_torch.uncompiled():
        assert doubled(torch.ones(2)).tolist() == [2, 2]
    assert traced == []
    assert doubled(torch.ones(2)).tolist() == [2, 2]
    assert len(traced) == 1


def test_torch_draws_no_values_for_new_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(*_: Any, **__: Any) -> Any:
        raise AssertionError

    before = dict(vars(nn.init))
    with monkeypatch.context() as patch:
        for name in ("uniform_", "normal_", "zero_"):
            patch.setattr(torch.Tensor, name, draw)
        with from_torch.no_initial_values():
            layers = [nn.Linear(2, 3), nn.Embedding(4, 5), nn.LayerNorm(6)]
        with pytest.raises(AssertionError):
            nn.Linear(2, 3)
    shapes = [tuple(parameter.shape) for layer in layers for parameter in layer.parameters()]
    assert shapes == [(3, 2), (3,), (4, 5), (6,), (6,)]
    assert dict(vars(nn.init)) == before


def test_torch_fake_tensors_have_shapes_and_no_data() -> None:
    mode = from_torch.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        made = torch.empty(2**20, 2**20) @ torch.empty(2**20, 3)
        with from_torch.unset_fake_temporarily():
            real = torch.ones(2)
    assert isinstance(made, from_torch.FakeTensor)
    assert from_torch.is_fake(made)
    assert not from_torch.is_fake(real)
    assert made.shape == (2**20, 3)
    assert made.requires_grad is False
    with mode, pytest.raises(from_torch.NEEDS_VALUES):
        made.nonzero()


def test_torch_fakes_of_repeated_operators_are_those_of_the_first_time() -> None:
    """By torch's own check, which computes anew each output that a cache gives, and raises where they differ."""
    QuickFakeTensorMode.cache_clear()
    with torch._dynamo.config.patch(fake_tensor_cache_crosscheck_enabled=True):
        mode = QuickFakeTensorMode()
    with mode:
        alike = {
            "plain": torch.empty(6, 4),
            "narrower": torch.empty(6, 4, dtype=torch.bfloat16),
            "as narrow": torch.empty(6, 4, dtype=torch.float16),
            "whole numbers": torch.empty(6, 4, dtype=torch.int32),
            "rows of more": torch.empty(9, 4)[:6],
            "fewer rows of more": torch.empty(9, 4)[:5],
            "later rows of more": torch.empty(9, 4)[1:7],
            "by columns": torch.empty(4, 6).t(),
            "every other row": torch.empty(12, 4)[::2],
            "trained": torch.empty(6, 4, requires_grad=True),
            "negative": torch._neg_view(torch.empty(6, 4)),
        }
        for _ in range(4):  # torch's cache answers the second time, a recipe the third
            for tensor in alike.values():
                for number in (2, 2.0, True):
                    tensor * number
                torch.add(tensor, tensor, alpha=2)
                torch.cat([tensor, tensor])
                torch.empty_like(tensor)
                tensor[1:].clone()
                tensor.sum(dim=0, keepdim=True, dtype=torch.float32)
                tensor.std(dim=0)
    found = from_torch.FakeTensorMode.cache_info()
    assert found.hits > 8 * len(alike)
    assert found.misses > 5 * len(alike)
    assert len(QuickFakeTensorMode._recipes) > 6 * len(alike)


def test_torch_fakes_of_repeated_operators_share_storages_as_they_should() -> None:
    QuickFakeTensorMode.cache_clear()
    counts = []
    for _ in range(4):
        with QuickFakeTensorMode() as mode:
            tensor, targets = torch.empty(8, 4), torch.empty(8, dtype=torch.long)
            views = [tensor.view(4, 8), tensor[2:].t(), torch.ops.aten._unsafe_view(tensor, [32]), tensor.detach()]
            first, later = torch.empty(9, 4)[:6], torch.empty(9, 4)[1:7]
            assert [first[1:].storage_offset(), later[1:].storage_offset()] == [4, 8]
            in_place = tensor.mul_(2)
            torch._foreach_add_([tensor, targets], 1)
            fresh = [tensor * 2, tensor.clone(), targets.to(torch.float32), *torch._foreach_mul([tensor, tensor], 2)]
            fresh += torch.ops.aten.nll_loss_forward(tensor, targets, None, 1, -100)
        key = from_torch.storage_key
        assert in_place is tensor
        assert all(key(view.untyped_storage()) == key(tensor.untyped_storage()) for view in views)
        assert [view.storage_offset() for view in views] == [0, 8, 0, 0]
        assert [each.untyped_storage().nbytes() for each in fresh] == [128, 128, 32, 128, 128, 4, 4]
        assert len({key(each.untyped_storage()) for each in [*fresh, tensor]}) == 8
        assert all(each.fake_mode is mode and each.device.type == "cpu" for each in [*fresh, *views])
        counts.append(len(QuickFakeTensorMode._recipes))
    assert counts[0] < counts[2] == counts[3]


def test_torch_fakes_of_an_operator_are_not_known_because_its_parts_are() -> None:
    """The loss's decomposition calls operators on scalars, which are the same for any number of rows and are repeated;
    its total weight is no view of them."""
    QuickFakeTensorMode.cache_clear()
    with QuickFakeTensorMode():
        for rows in range(8, 12):
            logits, targets = torch.empty(rows, 4), torch.empty(rows, dtype=torch.long)
            loss, weight = torch.ops.aten.nll_loss_forward(logits, targets, None, 1, -100)
            assert loss.untyped_storage().nbytes() == weight.untyped_storage().nbytes() == 4


def test_torch_fakes_without_the_private_names_of_recipes_are_made_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_WARNS", "_THROWS"):
        monkeypatch.setattr(torch_fakes, name, None)
    QuickFakeTensorMode.cache_clear()
    with QuickFakeTensorMode():
        assert [tuple((torch.empty(2, 3) * 2).t().shape) for _ in range(3)] == [(3, 2)] * 3
    assert not QuickFakeTensorMode._recipes


def test_torch_shape_rules_can_be_lent_and_taken_back() -> None:
    table, operator = from_torch.shape_rules(), torch.ops.aten.nonzero.default
    with fakes.fake_mode(), patch.dict(table, {operator: lambda mode, func, tensor: torch.empty(7, 1)}):
        assert torch.empty(3).nonzero().shape == (7, 1)


def test_torch_dispatch_modes_see_operators_and_can_be_left() -> None:
    seen: list[str] = []

    class Mode(from_torch.DispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(from_torch.schema(func).name)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2)
    with Mode():
        x.mul(x)
        with from_torch.without_modes():
            x.add(x)
    assert seen == ["aten::mul"]


def test_torch_operators_have_a_name_arguments_and_a_packet() -> None:
    schema = from_torch.schema(torch.ops.aten.add_.Tensor)
    written = [(each.name, each.alias_info is not None and each.alias_info.is_write) for each in schema.arguments]
    assert schema.name == "aten::add_"
    assert written[:2] == [("self", True), ("other", False)]
    assert from_torch.packet(torch.ops.aten.mm.default) is torch.ops.aten.mm


def test_torch_routes_can_be_laid_over_an_operator_and_taken_back() -> None:
    dropout, x = torch.ops.aten.dropout.default, torch.ones(3)
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("dropout", lambda input, p, train: input + 1, "AutogradCPU")
        assert dropout(x, 0.5, False).tolist() == [2, 2, 2]
        assert from_torch.composite(dropout, x, 0.5, False).tolist() == [1, 1, 1]
    finally:
        from_torch.end_library(library)
    assert dropout(x, 0.5, False).tolist() == [1, 1, 1]


def test_torch_operators_can_be_called_past_autograd() -> None:
    x = torch.ones(2, requires_grad=True)
    with from_torch.below_autograd():
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad


def test_torch_has_shape_rules_of_cudas_attention() -> None:
    with fakes.fake_mode():
        heads = torch.empty(2, 4, 32, 16, dtype=torch.bfloat16, requires_grad=True)
        flash = from_torch.flash_attention(heads, heads, heads, 0.0, True, scale=0.25)[0]
        efficient = from_torch.efficient_attention(heads, heads, heads, None, True, 0.0, True, scale=0.25)[0]
        assert flash.shape == efficient.shape == from_torch.safe_softmax(heads, -1).shape == heads.shape


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch 2.11 says so also where they are turned off
def test_torch_sparse_tensors_have_parts_coalesced_or_not() -> None:
    positions, values = torch.tensor([[0, 0]]), torch.ones(2)
    made = from_torch.sparse_coo(
        1, 0, (3,), positions, values, dtype=values.dtype, layout=torch.sparse_coo, device="cpu", is_coalesced=True
    )
    assert made.is_coalesced()
    for each in (made, torch.sparse_coo_tensor(positions, values, (3,), check_invariants=False)):
        assert [part.shape for part in from_torch.sparse_parts(each)] == [(1, 2), (2,)]


class _Nodes(from_torch.DispatchMode):
    """The names of the autograd nodes that operators run in."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        node = from_torch.current_node()
        if node is not None:
            self.names.append(node.name())
        return func(*args, **(kwargs or {}))


class _Sums(from_torch.DispatchMode):
    """Whether the engine asked for an addition, for each."""

    def __init__(self) -> None:
        super().__init__()
        self.by_engine: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor:
            self.by_engine.append(from_torch.called_by_engine(sys._getframe()))
        return func(*args, **(kwargs or {}))


def _graph() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.zeros(2, requires_grad=True)
    y = x * 1.0
    return x, y * 2.0 + y * 3.0


def test_torch_current_node_is_told_in_backward_alone() -> None:
    assert from_torch.current_node() is None
    _, total = _graph()
    with _Nodes() as seen:
        total.backward(torch.ones(2))
    assert {from_torch.ACCUMULATE_GRAD, "MulBackward0"} <= set(seen.names)


def test_torch_called_by_engine_where_the_dispatch_is_a_threads_first_frame() -> None:
    """On CUDA backward runs in a thread of the device's without Python frames: the dispatch has no caller."""
    dispatch = SimpleNamespace(f_back=None)
    assert from_torch.called_by_engine(dispatch)
    in_python = SimpleNamespace(f_back=None, f_code=SimpleNamespace(co_filename="model.py", co_name="forward"))
    assert not from_torch.called_by_engine(SimpleNamespace(f_back=in_python))


def test_torch_holders_of_a_tensor_are_counted() -> None:
    held = torch.zeros(2)
    tensors, storages = from_torch.holders(held)
    view = held.view(2)
    now_tensors, now_storages = from_torch.holders(held)
    assert now_tensors > tensors  # a view holds the tensor that it is of
    assert now_storages > storages
    assert view.shape == held.shape


def test_torch_engines_own_sums_are_known_by_who_calls() -> None:
    class InPython(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0] + grads[0]

    x, total = _graph()
    with _Sums() as sums:
        total.backward(torch.ones(2))
    assert sums.by_engine == [True]
    with _Sums() as sums:
        InPython.apply(x.detach().requires_grad_()).backward(torch.ones(2))
    assert sums.by_engine == [False]


def test_torch_keeps_flop_formulas_by_operator() -> None:
    formula = from_torch.flop_formulas()[torch.ops.aten.mm]
    assert formula(torch.empty(3, 5), torch.empty(5, 7), out_val=torch.empty(3, 7)) == 2 * 3 * 5 * 7


def test_torch_says_in_its_header_whether_flash_broadcasts_one_head() -> None:
    header = Path(torch.__file__).parent / "include/ATen/native/transformers/sdp_utils_cpp.h"
    assert "enable_gqa" in header.read_text(encoding="utf-8", errors="replace"), "the filters stand elsewhere now"
    assert not from_torch.flash_broadcasts_one_head() or _internals.released("torch", "2.13.1")


def test_torch_sequence_numbers_order_nodes_as_forward_made_them() -> None:
    before = from_torch.next_sequence_number()
    first = torch.ones(2, requires_grad=True) * 2
    between = from_torch.next_sequence_number()
    second = first * 2
    assert before <= from_torch.sequence_number(first.grad_fn) < between <= from_torch.sequence_number(second.grad_fn)


def test_torch_storage_keys_are_one_for_all_views_of_a_fake() -> None:
    with fakes.fake_mode():
        one, other = torch.empty(4), torch.empty(4)
        keys = {from_torch.storage_key(each.untyped_storage()) for each in (one, one[:2], one.detach())}
        assert len(keys) == 1
        assert from_torch.storage_key(other.untyped_storage()) not in keys


def test_torch_hooks_of_a_tensor_can_be_read() -> None:
    x = torch.ones(2, requires_grad=True)
    assert from_torch.hooks_of(x) == ([], [])
    x.register_hook(print)
    x.register_post_accumulate_grad_hook(repr)
    assert from_torch.hooks_of(x) == ([print], [repr])


def test_torch_memory_history_takes_what_it_is_given_and_ends_at_none() -> None:
    record = inspect.signature(torch.cuda.memory._record_memory_history)
    asked: list[inspect.BoundArguments] = []
    with patch.object(torch.cuda.memory, "_record_memory_history", lambda *a, **k: asked.append(record.bind(*a, **k))):
        from_torch.memory_history(True, 1000)
        from_torch.memory_history(False, 0)
    on, off = asked
    assert on.arguments == {"enabled": "all", "context": "alloc", "stacks": "python", "max_entries": 1000}
    assert off.arguments == {"enabled": None}


def test_torch_memory_snapshot_is_asked_without_arguments_and_dumped_as_it_is(tmp_path: Path) -> None:
    inspect.signature(torch.cuda.memory._snapshot).bind()
    planted: dict[str, Any] = {"segments": [], "device_traces": [[]]}
    with patch.object(torch.cuda.memory, "_snapshot", lambda *a, **k: planted):
        assert from_torch.memory_snapshot() == planted
        torch.cuda.memory._dump_snapshot(str(tmp_path / "dump.pickle"))
    assert pickle.loads((tmp_path / "dump.pickle").read_bytes()) == planted


def test_torch_modules_read_what_is_put_into_their_registries() -> None:
    module, weight = nn.BatchNorm1d(2), nn.Parameter(torch.ones(2))
    from_torch.parameters_of(module)["weight"] = weight
    from_torch.buffers_of(module)["running_mean"] = weight.data
    holder = nn.Sequential(nn.Linear(2, 2))
    from_torch.modules_of(holder)["0"] = module
    assert module.weight is weight
    assert module.running_mean is weight.data or torch.equal(module.running_mean, weight.data)  # type: ignore[arg-type]
    assert holder[0] is module


def test_torch_in_bad_fork_tells_what_a_look_at_the_card_has_spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    assert from_torch.in_bad_fork() is False
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    assert from_torch.in_bad_fork() is True
    monkeypatch.delattr(torch.cuda, "_is_in_bad_fork")
    assert from_torch.in_bad_fork() is True


# --- transformers -------------------------------------------------------------------------------------------


def test_torch_autocast_operators_are_registered_for_cuda_in_any_build() -> None:
    cuda, cpu = from_torch.autocast_operators("CUDA"), from_torch.autocast_operators("CPU")
    assert {"aten::linear", "aten::softmax.int", "aten::layer_norm"} <= cuda
    assert "aten::linear" in cpu
    assert "aten::layer_norm" not in cpu
    assert len(cuda) > 100


def test_torch_autocast_policies_stand_in_its_header() -> None:
    found = from_torch.autocast_policies()
    assert {*found.values()} == {"lower_precision_fp", "fp32", "fp32_set_opt_dtype", "fp32_append_dtype", "promote"}
    assert found["aten::norm.ScalarOpt_dim"] == "fp32_append_dtype"
    assert found["aten::index_put"] == "promote"
    assert found.keys() <= from_torch.autocast_operators("CUDA")
    assert str(from_torch.operator_named("aten::softmax.int")) == "aten.softmax.int"
    assert str(from_torch.operator_named("aten::linear")) == "aten.linear.default"


def test_torch_autocast_kernels_can_be_replaced_and_passed_by() -> None:
    library = torch.library.Library("aten", "IMPL")
    tensor = torch.eye(2)

    def cubed(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        with from_torch.without_cpu_autocast():
            return tensor @ other @ other

    try:
        from_torch.override(library, "mm", cubed, "AutocastCPU")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.mm(2 * tensor, 2 * tensor).tolist() == [[8, 0], [0, 8]]
    finally:
        from_torch.end_library(library)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.mm(2 * tensor, 2 * tensor).tolist() == [[4, 0], [0, 4]]


def test_torch_scalers_keep_two_tensors_and_step_without_a_look_at_values() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    assert from_torch.scaler_tensors(scaler) == []
    scaler.scale(weight.sum()).backward()
    assert [tensor.numel() for tensor in from_torch.scaler_tensors(scaler)] == [1, 1]
    assert weight.grad is not None
    weight.grad[0] = float("inf")  # a scaler would leave out this step
    from_torch.without_overflow(scaler)
    scaler.step(optimizer)
    assert weight.tolist() == [float("-inf"), 0.0]


def test_torch_modules_move_fakes_by_their_data() -> None:
    with from_torch.FakeTensorMode(), from_torch.moves_fakes():
        layer = nn.Linear(2, 3)
        weight = layer.weight
        assert layer.to(torch.bfloat16).weight is weight
    assert weight.dtype is torch.bfloat16


def test_torch_optimizers_take_lists_of_fakes_as_on_cuda() -> None:
    with from_torch.FakeTensorMode():
        parameter = nn.Parameter(torch.empty(3))
        for foreach in (False, True):
            with from_torch.foreach_on_fakes() if foreach else nullcontext():
                parameter.grad = torch.empty(3)
                with patch.object(torch, "_foreach_lerp_", side_effect=torch._foreach_lerp_) as by_lists:
                    torch.optim.AdamW([parameter]).step()
                assert by_lists.called == foreach


@pytest.mark.parametrize("reentrant", [True, False])
def test_transformers_checkpointing_of_trained_blocks(reentrant: bool) -> None:
    """Only the trained block runs twice, and its gradients are those without checkpointing."""
    gradients = []
    for checkpointed in (False, True):
        model = models.build(TOY)
        model.requires_grad_(False)
        block = model.model.layers[-1].requires_grad_(True)
        runs: list[nn.Module] = []
        for each in model.model.layers:
            each.mlp.register_forward_pre_hook(lambda module, *_, runs=runs: runs.append(module))
        if checkpointed:
            from_transformers.checkpoint_trained_blocks(model)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        ids = torch.arange(8)[None]
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(block.mlp.down_proj.weight.grad)
        frozen, trained = (sum(each is layer.mlp for each in runs) for layer in model.model.layers)
        assert (frozen, trained) == (1, 2 if checkpointed else 1)
    assert torch.equal(*gradients)


def test_transformers_masks_of_ones_are_dropped_where_it_is_replaced() -> None:
    from transformers import masking_utils

    assert from_transformers.has_mask_skipped()
    mask = torch.zeros(1, 8, dtype=torch.bool)  # nothing but padding
    for inside in (False, True):
        with from_transformers.without_padding() if inside else nullcontext():
            assert masking_utils._ignore_causal_mask_sdpa(mask, 8, 8, 0, 0) == inside


def test_transformers_models_can_be_marked_as_loaded_in_4_bit() -> None:
    model = SimpleNamespace()
    from_transformers.mark_loaded(model, "nf4", double_quant=True)
    assert model.is_loaded_in_4bit
    assert model.hf_quantizer.is_trainable


def test_accelerate_collects_no_garbage_where_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    collected: list[Any] = []
    monkeypatch.setattr("gc.collect", lambda *_: collected.append("all"))
    accelerator = SimpleNamespace(_schedulers=[], _optimizers=[], _models=[], _dataloaders=[])
    with from_accelerate.without_collection():
        Accelerator.free_memory(accelerator)
    assert collected == []
    Accelerator.free_memory(accelerator)
    assert collected == ["all"]


def test_accelerate_scales_losses_on_a_cpu_if_told_to() -> None:
    from peft_gauge.training.trainers import alone

    with alone():
        from accelerate import Accelerator

        accelerator = Accelerator(mixed_precision="fp16", cpu=True)
        assert not accelerator.native_amp
        from_accelerate.scale_losses(accelerator, torch.amp.GradScaler("cpu"))
        weight = nn.Parameter(torch.ones(2))
        optimizer = accelerator.prepare_optimizer(torch.optim.SGD([weight], lr=1.0))
        with accelerator.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float16
        accelerator.backward(weight.sum())
        assert weight.grad is not None
        assert weight.grad[0] == 2.0**16
        optimizer.step()
        assert weight[0] == 0  # scaled back


# --- torch.distributed ----------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """A model as accelerate shards it: it names the class of its blocks."""

    _no_split_modules = ("Linear",)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layers(hidden)
        return found


def test_torch_distributed_has_a_group_of_one_process_whose_collectives_return() -> None:
    with from_distributed.group_of_one_rank(4) as mesh:
        group = mesh.get_group()
        assert (torch.distributed.get_rank(), torch.distributed.get_world_size(group)) == (0, 4)
        whole = torch.zeros(8)
        torch.distributed.all_gather_into_tensor(whole, torch.ones(2), group=group)
    assert not torch.distributed.is_initialized()


def test_torch_distributed_shards_as_accelerate_does_it() -> None:
    """By rank, one part of four; gathered weights are buffers that are resized to nothing in between."""
    with from_distributed.group_of_one_rank(4) as mesh:
        model = from_accelerate.prepare_fsdp2(
            Blocks(), mesh, mixed_precision="no", packed=False, reshard_after_forward=True
        )
        assert [from_distributed.is_distributed(type(each)) for each in model.parameters()] == [True] * 3
        assert [tuple(from_distributed.local_of(each).shape) for each in model.parameters()] == [(16, 64)] * 3
        resized: list[int] = []
        with from_distributed.resizes_seen(lambda storage: resized.append(storage.nbytes())):
            model(torch.ones(2, 64)).sum().backward()
        whole = 64 * 64 * 4
        assert resized.count(whole) == 3, "gathered again for backward; forward's buffers were new"
        assert resized.count(0) == 6
        buffers = [*from_distributed.gathered(model)]
        assert [(each.numel(), each.untyped_storage().nbytes()) for each in buffers] == [(64 * 64, 0)] * 3


@pytest.mark.parametrize("packed", [False, True])
def test_accelerate_keeps_trained_weights_in_float32_unless_packed(packed: bool) -> None:
    with from_distributed.group_of_one_rank(2) as mesh:
        model = from_accelerate.prepare_fsdp2(
            Blocks().bfloat16(), mesh, mixed_precision="bf16", packed=packed, reshard_after_forward=True
        )
        assert {each.dtype for each in model.parameters()} == {torch.bfloat16 if packed else torch.float32}


def test_torch_distributed_reduces_fakes_in_the_buckets_of_a_second_step() -> None:
    """The first bucket has 1 MiB or more, the others 25, in the order of gradients."""
    reduced: list[int] = []
    with (
        from_distributed.group_of_one_rank(2),
        from_distributed.ddp_on_fakes(lambda bucket: reduced.append(bucket.nbytes)),
        from_torch.FakeTensorMode(),
    ):
        layers = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(5)))  # 16 MiB each
        model = nn.parallel.DistributedDataParallel(layers)
        for _ in range(2):
            model(torch.empty(2, 2048)).sum().backward()
    mebibytes = 2**20
    assert [nbytes // mebibytes for nbytes in reduced] == [16, 32, 32] * 2


def test_trl_fused_head_has_the_names_that_are_replaced() -> None:
    pytest.importorskip("trl", reason="trl comes with the extra trl")
    assert from_trl.has_fused_head()
    from trl.kernels import chunked_logprob

    head = chunked_logprob.ChunkedLogProbFunction
    for dtype in (torch.float32, torch.bfloat16):
        with from_torch.FakeTensorMode(), from_trl.fused_head_on_fakes():
            hidden = torch.empty(6, 4, dtype=dtype, requires_grad=True)
            weight = torch.empty(32, 4, dtype=dtype, requires_grad=True)
            found = head.apply(hidden, weight, None, torch.zeros(6, dtype=torch.long), 1.0, 16)[0]
            found.sum().backward()
            assert (hidden.grad.shape, weight.grad.shape) == (hidden.shape, weight.shape)  # type: ignore[union-attr]


def test_cut_cross_entropy_runs_on_fakes_without_its_kernels() -> None:
    pytest.importorskip("cut_cross_entropy", reason="run: nox -s cce")
    assert from_cut_cross_entropy.has_cut_cross_entropy()
    from cut_cross_entropy import utils

    assert hasattr(utils, "_build_flat_valids"), "the reader of labels by which trainer_step knows it"
    with from_torch.FakeTensorMode(), policies.stepping(nn.Identity()):
        hidden = torch.empty(2, 6, 64, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(32, 64, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.zeros(2, 6, dtype=torch.long)
        with from_cut_cross_entropy.cut_cross_entropy_on_fakes():
            loss = from_cut_cross_entropy.linear_cross_entropy(hidden, weight, labels, softcap=30.0)
            loss.backward()
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert (hidden.grad.shape, weight.grad.shape) == (hidden.shape, weight.shape)  # type: ignore[union-attr]


def test_triton_has_the_launchers_that_are_replaced() -> None:
    pytest.importorskip("triton", reason="Triton comes with the extras liger and cce")
    from triton.runtime import jit

    before = jit.JITFunction.run
    with from_triton.without_kernels():
        assert jit.JITFunction.run is not before
    assert jit.JITFunction.run is before


def test_torchao_quantizes_states_of_tensors_that_a_tracker_sees() -> None:
    pytest.importorskip("torchao", reason="run: nox -s torchao")
    from torchao.optim import AdamW8bit

    with from_torch.FakeTensorMode(allow_non_fake_inputs=True), from_torchao.optimizers_on_fakes():
        weight = nn.Parameter(torch.empty(64, 64))
        weight.grad = torch.empty_like(weight)
        optimizer = AdamW8bit([weight])
        tracker = StorageTracker()
        with tracker:
            optimizer.step()
        state = optimizer.state[weight]["exp_avg"]
        assert from_torch.wraps_tensors(type(state))
        assert [(part.dtype, part.numel()) for part in from_torch.parts_of(state)] == [
            (torch.uint8, 4096),  # codes
            (torch.float32, 16),  # scales
            (torch.float32, 256),  # the values of codes
        ]
        assert len(tracker.storages([state])) == 3, "operators on a quantized state reach those on its parts"
    assert from_torch.parts_of(weight) == [weight]


def test_trl_offloads_fakes_to_the_host_and_fetches_them() -> None:
    pytest.importorskip("trl", reason="trl comes with the extra trl")
    assert from_trl.has_offloading()
    from trl.models import activation_offloading

    tracker = StorageTracker()
    with from_torch.FakeTensorMode(), from_trl.offloading_on_fakes(lambda storage: storage._cdata) as offloaded:
        layers = torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=False) for _ in range(12)))
        context = activation_offloading.get_act_offloading_ctx_manager(layers, warn_if_no_head=False)
        hidden = torch.empty(1024, 512)
        with tracker, context:
            for layer in layers:
                hidden = layer(hidden).sin()
            loss = hidden.sum()
            kept = tracker.live().bytes
            loss.backward()
    each = 1024 * 512 * 4
    # The input of every layer and of every sine. A tensor that two operators save stays on the GPU.
    assert offloaded.peak_bytes == 24 * each
    assert offloaded.nbytes == 0, "all were fetched"
    weights = 12 * 512 * 512 * 4
    assert weights < kept <= weights + 7 * each, "the last few are still on their way"
    assert layers[0].weight.grad is not None


def test_transformers_asks_whether_sequences_are_packed_where_it_is_replaced() -> None:
    from transformers import masking_utils

    assert from_transformers.has_packing()
    packed = torch.tensor([[0, 1, 0, 1]])
    assert getattr(masking_utils, from_transformers.PACKING)(packed) is not None
    with from_transformers.without_packing():
        assert getattr(masking_utils, from_transformers.PACKING)(packed) is None
    # Its own code looks it up by that name, in that module.
    assert Path(masking_utils.__file__).read_text(encoding="utf-8").count(from_transformers.PACKING) > 1


def test_transformers_flash_attention_can_be_given_functions_for_fakes() -> None:
    from transformers import modeling_flash_attention_utils as utils

    before = utils._upad_input
    with flash_attention.package():
        assert utils._upad_input is not before
        assert not utils._is_packed_sequence(torch.tensor([[0, 1, 0, 1]]), 1)
    assert utils._upad_input is before


def test_transformers_model_classes_tell_their_attentions() -> None:
    from transformers import LlamaForCausalLM

    assert from_transformers.has_sdpa(LlamaForCausalLM)
    assert "flash_attention_2" in from_transformers.flash_attentions(LlamaForCausalLM, "flash_attention_2")
    model = models.build(TOY, device="meta", attn_implementation="eager")
    assert from_transformers.attention_of(model.config) == "eager"


def test_transformers_configs_can_be_marked_and_made_nameless() -> None:
    """Flash attention reads the dtype of a quantized model off one of these names, saving an adapter the other."""
    from transformers import LlamaConfig
    from transformers import modeling_flash_attention_utils as utils
    from transformers.integrations import flash_attention as caller

    config = LlamaConfig(name_or_path="somewhere")
    assert config._name_or_path == "somewhere"
    from_transformers.forget_origin(config)
    assert config._name_or_path == ""
    from_transformers.mark_quantized(config, torch.bfloat16)
    sources = [Path(module.__file__ or "").read_text(encoding="utf-8") for module in (utils, caller)]
    assert any(re.search(r"_is_quantized|_pre_quantization_dtype", source) for source in sources)


def test_transformers_quantizers_replace_layers_before_weights_are_loaded() -> None:
    """`test_stored_formats.py` holds what comes of it; here that every quantizer has the method."""
    from transformers.quantizers.base import HfQuantizer

    with patch.object(HfQuantizer, "_process_model_before_weight_loading") as called:
        from_transformers.replace_layers(object.__new__(_concrete(HfQuantizer)), "model")
    called.assert_called_once_with("model")


def _concrete(kind: Any) -> Any:
    return type("Quantizer", (kind,), dict.fromkeys(kind.__abstractmethods__))


# --- PEFT ---------------------------------------------------------------------------------------------------


def test_peft_tuners_fill_in_targets_and_tell_what_is_one() -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(models.build(TOY, device="meta"), LoraConfig(task_type="CAUSAL_LM"))
    settings = from_peft.settings_of(model.base_model, LoraConfig(target_modules="all-linear"))
    assert from_peft.is_target(model.base_model, settings, "model.layers.0.mlp.down_proj")
    assert not from_peft.is_target(model.base_model, settings, "model.norm")


def _method(**settings: Any) -> methods.Method:
    return methods.Method("case", "case", "peft", peft_config={"task_type": "CAUSAL_LM", **settings})


CASES: dict[str, dict[str, Any]] = {
    **{name: {"peft_type": "LORA", "init_lora_weights": name} for name in ("pissa", "olora", "mica", "loftq")},
    "monteclora": {"peft_type": "LORA", "monteclora_config": {}},
    "shira": {"peft_type": "SHIRA"},
    "adamss": {"peft_type": "ADAMSS"},
    "frod": {"peft_type": "FROD"},
    "xlora": {"peft_type": "XLORA"},
}
"""Configs that ask for every piece that a policy replaces; `test_plan_policies.py` holds what comes of them."""


@pytest.mark.parametrize("name", CASES)
def test_peft_has_every_piece_that_a_plan_replaces(name: str) -> None:
    """Only the patches are laid here: no model is adapted."""
    with policies.attaching(_method(**CASES[name])) as said:
        pass
    with policies.stepping(_with_configs(CASES[name])) as stepping:
        pass
    assert [sentence for sentence in (*said, *stepping) if "has no" in sentence] == []


def _with_configs(config: dict[str, Any]) -> nn.Module:
    """A module that says it was adapted so."""
    model = nn.Linear(2, 2)
    kind = type("Config", (), {**config, "alora_invocation_tokens": [1] if config["peft_type"] == "LORA" else None})
    model.peft_config = {"default": kind()}  # type: ignore[assignment]
    return model


def test_peft_has_frods_helpers() -> None:
    pytest.importorskip("peft.tuners.frod")
    assert from_peft.buffer_dict()({"a": torch.ones(1)}, persistent=True)["a"].shape == (1,)
    assert from_peft.frod_category()("model.layers.0.self_attn.q_proj")


def test_peft_has_monteclora_and_kasa_as_their_policies_find_them() -> None:
    lora = pytest.importorskip("peft.tuners.lora.variants")
    if _internals.released("peft", "0.20.0"):
        assert callable(lora.MontecloraLinearVariant._create_sampler)
    if _internals.released("peft", "0.21.0"):
        assert "_lora_kasa_truncation_deferred" in Path(lora.__file__).read_text(encoding="utf-8")


# --- bitsandbytes -------------------------------------------------------------------------------------------


def test_bitsandbytes_prints_the_notices_that_are_left_out() -> None:
    load_bitsandbytes()
    for module, words in from_bitsandbytes.NOTICES.items():
        if _internals.released("bitsandbytes", "0.50.0"):
            assert words in Path(str(sys.modules[module].__file__)).read_text(encoding="utf-8")


def test_bitsandbytes_names_what_its_library_was_built_for() -> None:
    load_bitsandbytes()
    assert from_bitsandbytes.native_library().compiled_with_cuda in (True, False)


def test_bitsandbytes_restores_the_state_of_a_weight_by_the_function_that_is_replaced() -> None:
    load_bitsandbytes()
    layer = nn.Linear(64, 64)
    quantize_(holder := nn.Sequential(layer))
    held: Any = holder[0]
    state, held.weight = held.weight.quant_state, nn.Parameter(held.weight.data, requires_grad=False)
    with from_bitsandbytes.quant_states_of_modules():
        held(torch.ones(1, 64))
    assert held.weight.quant_state is state
    assert type(held.weight) is nn.Parameter


def test_bitsandbytes_keeps_code_books_by_name() -> None:
    functional = load_bitsandbytes().functional
    books, before = from_bitsandbytes.code_books(), dict(from_bitsandbytes.code_books())
    try:
        books["dynamic"] = functional.create_dynamic_map() * 2
        _, state = functional.quantize_blockwise(torch.tensor([0.5, 1.0]), blocksize=64)
        assert torch.equal(state.code, books["dynamic"])  # the library asks there first
    finally:
        books.clear()
        books.update(before)


def test_bitsandbytes_multiplies_4_bit_by_the_operator_that_a_plan_routes() -> None:
    load_bitsandbytes()
    wanted = _internals.released("bitsandbytes", from_bitsandbytes.PRODUCT_4BIT_SINCE)
    assert from_bitsandbytes.has_product_4bit() == wanted
    layer = nn.Sequential(nn.Linear(64, 64, bias=False))
    quantize_(layer, skip=[])
    assert _operators(layer, requires_grad=True) & {"bitsandbytes::gemm_4bit", "bitsandbytes::dequantize_4bit"}


def test_bitsandbytes_multiplies_8_bit_by_the_function_that_a_plan_calls() -> None:
    bitsandbytes = load_bitsandbytes()
    layer = nn.Sequential(nn.Linear(64, 64, bias=False))
    quantize_(layer, quant_format="int8")
    with patch.object(bitsandbytes, "matmul", return_value=torch.ones(2, 64)) as called:
        layer(torch.ones(2, 64))
    assert called.called
    state = called.call_args.kwargs["state"]
    out = from_bitsandbytes.product_int8(torch.ones(2, 64).half(), layer[0].weight, None, None, state)
    assert out.shape == (2, 64)


def _operators(layer: nn.Module, *, requires_grad: bool) -> set[str]:
    seen: set[str] = set()

    class Mode(from_torch.DispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(from_torch.schema(func).name)
            return func(*args, **(kwargs or {}))

    with Mode():
        layer(torch.ones(8, 64, requires_grad=requires_grad))
    return seen


# --- pytest -------------------------------------------------------------------------------------------------


def test_pytest_compiles_expressions_and_asks_by_name() -> None:
    asked: list[str] = []

    def answer(name: str, /, **_: object) -> bool:
        asked.append(name)
        return True

    assert from_pytest.Expression.compile("slow and not gpu").evaluate(answer) is False
    assert asked == ["slow", "gpu"]


def test_pytest_terminals_have_a_width(pytestconfig: pytest.Config) -> None:
    reporter = pytestconfig.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        pytest.skip("a worker of pytest-xdist has no terminal")
    assert from_pytest.width_of(reporter) > 0


# --- pip ----------------------------------------------------------------------------------------------------


def test_pip_evaluates_markers_for_another_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    environment = Target((3, 99, None)).markers()
    report, target = tmp_path / "report.json", tmp_path / "target"
    arguments = ["--dry-run", "--no-index", "--target", str(target), "--report", str(report)]
    done = from_pip.run_for(environment, "install", *arguments, "nothing; python_version < '3.99'")
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert found["install"] == []
    assert from_pip.was_for(environment, found)
    assert not from_pip.was_for(Target((3, 98, None)).markers(), found)


def test_pip_tells_its_errors_in_these_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(from_pip, "RETRIES", "1")
    environment = Target((3, 12, None)).markers()
    dry = ["install", "--dry-run", "--ignore-installed", "--target", str(tmp_path / "target")]
    absent = from_pip.run_for(environment, *dry, "--no-index", "nosuchlibrary")
    assert from_pip.last_error(absent.stderr) == "No matching distribution found for nosuchlibrary"
    assert not from_pip.no_answer(absent.stderr)
    unreachable = from_pip.run_for(environment, *dry, "--index-url", "http://127.0.0.1:9/simple", "nosuchlibrary")
    assert from_pip.no_answer(unreachable.stderr)
    make_wheel(tmp_path, "1.0", name="gaugehelper")
    make_wheel(tmp_path, "1.0", requires="gaugehelper>=2")
    links = ["--no-index", "--find-links", str(tmp_path)]
    contradiction = from_pip.run_for(environment, *dry, *links, "gaugehelper<2", "gaugeprobe")
    assert from_pip.causes(contradiction.stdout) == [
        "The user requested gaugehelper<2",
        "gaugeprobe 1.0 depends on gaugehelper>=2",
    ]
    assert from_pip.causes(absent.stdout) == []


# --- where they stand ---------------------------------------------------------------------------------------


PRIVATE_IMPORT = re.compile(
    r"^\s*(?:from|import) +(?:_pytest|(?:torch|transformers|peft|bitsandbytes|pytest|pip)(?:\.\w+)*\._)\w*"
    r"|^\s*from +(?:torch|transformers|peft|bitsandbytes|pytest)(?:\.\w+)* import .*\b_[a-z]"
    r"|\btorch\._C\b|\._cdata\b|\._schema\b|\bops\.aten\._",
    re.MULTILINE,
)
SOURCES = [*(ROOT / "peft_gauge").rglob("*.py"), *(ROOT / "fixtures").glob("*.py"), ROOT / "conftest.py"]


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if path.parent.name != "_internals"],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_nothing_else_reaches_into_a_library(path: Path) -> None:
    assert PRIVATE_IMPORT.findall(path.read_text(encoding="utf-8")) == []


# --- a piece that is gone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [True, False])
def test_a_replaced_piece_that_is_gone_is_said_by_the_plan_that_needs_it(
    monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    from peft.tuners.lora.layer import LoraLayer

    monkeypatch.delattr(LoraLayer, "pissa_init")
    with policies.attaching(_method(peft_type="LORA", init_lora_weights="pissa" if asked else True)) as said:
        pass
    found = [sentence for sentence in said if "has no peft.tuners.lora.layer.LoraLayer.pissa_init" in sentence]
    assert len(found) == asked
    assert all(sentence.startswith(f"peft {version('peft')} has no ") for sentence in found)


def test_a_piece_that_came_later_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora.layer import LoraLayer

    if hasattr(LoraLayer, "mica_init"):
        monkeypatch.delattr(LoraLayer, "mica_init")
    monkeypatch.setattr(_internals, "version", lambda library: "0.19.1")
    with policies.attaching(_method(peft_type="LORA", init_lora_weights="mica")) as said:
        pass
    assert said == []


def _quantized_plan_warnings() -> list[str]:
    from peft_gauge.plan.planner import plan
    from peft_gauge.plan.record import PlanRequest
    from peft_gauge.training.settings import StepSettings

    found = plan(PlanRequest(TOY, methods.QLORA, StepSettings(batch=1, seq=16), dtype="bfloat16"))
    return [warning for warning in found.warnings if "has no" in warning]


@pytest.mark.parametrize(("release", "told"), [("0.50.0", True), ("0.49.2", False)])
def test_a_plan_without_its_4_bit_route_says_so(monkeypatch: pytest.MonkeyPatch, release: str, told: bool) -> None:
    real = version
    monkeypatch.setattr(from_bitsandbytes, "has_product_4bit", lambda: False)
    monkeypatch.setattr(_internals, "version", lambda name: release if name == "bitsandbytes" else real(name))
    found = _quantized_plan_warnings()
    assert len(found) == told
    assert all(f"bitsandbytes {release} has no operator gemm_4bit" in warning for warning in found)


def test_a_plan_says_that_packing_could_not_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _quantized_plan_warnings() == []
    monkeypatch.setattr(from_transformers, "PACKING", "no_such_name")
    [found] = _quantized_plan_warnings()
    assert found.startswith(f"transformers {version('transformers')} has no masking_utils.")
