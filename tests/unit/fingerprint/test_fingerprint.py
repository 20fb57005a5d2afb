"""Fingerprints against steps that can be worked out by hand, planted changes, and themselves in another process."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from peft_gauge.errors import GaugeError
from peft_gauge.fingerprint import PHASES, fingerprint, record_step
from peft_gauge.fingerprint.module_attribution import ROOT, UNKNOWN, folded
from peft_gauge.fingerprint.operators import _PRODUCT, Operator
from peft_gauge.history.fingerprints import differences, digest
from peft_gauge.training import methods, models
from peft_gauge.training.cases import Case, build_job
from peft_gauge.training.quantization import load_bitsandbytes
from peft_gauge.training.settings import StepSettings

if TYPE_CHECKING:
    from peft_gauge.training.step import TrainingJob

# peft asks transformers 5 for a property that it has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

aten = torch.ops.aten

ROWS, WIDTH, LAYERS = 4, 8, 2
PRODUCT = 2 * ROWS * WIDTH * WIDTH  # FLOPs of one layer's product, forward or backward


# ---- small jobs ----------------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """A square layer without bias, and what a test plants in it."""

    def __init__(self, planted: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__(WIDTH, WIDTH, bias=False)
        self.planted = planted

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.planted is None else self.planted(y)


class Block(nn.Module):
    def __init__(self, planted: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.proj = Linear(planted)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Tower(nn.Module):
    """`LAYERS` square layers one after the other; ``planted`` is done to the output of the second one's ``proj``."""

    def __init__(self, *, planted: Callable[[Tensor], Tensor] | None = None, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block(planted)])
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


class PlainJob:
    """The least that can be fingerprinted: the sum of a model's outputs, and gradient descent."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        self.model = model.to(dtype)
        self.x = torch.randn(ROWS, WIDTH).to(dtype)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        self.loss: Tensor | None = None

    def forward(self) -> Tensor:
        self.loss = self.model(self.x).sum()
        return self.loss

    def backward(self) -> None:
        assert self.loss is not None
        self.loss.backward()
        self.loss = self.loss.detach()

    def optimizer_step(self) -> None:
        self.optimizer.step()

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = None


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return fingerprint(PlainJob(Tower()))


def lines(old: Any, new: Any, *what: str) -> list[str]:
    return [found.text for found in differences(old, new) if not what or found.what in what]


# ---- operators and FLOPs by hand -----------------------------------------------------------------------------------


def test_products_by_hand(plain: dict[str, Any]) -> None:
    # Forward one product a layer. Backward one for each weight and one for the second layer's input; the first one's
    # is data.
    assert plain["operators"]["forward"]["aten.mm.default"] == {"layers.*.proj": LAYERS}
    assert plain["operators"]["backward"]["aten.mm.default"] == {"layers.*.proj": 2 * LAYERS - 1}
    assert plain["flops"] == {
        "forward": {"aten.mm.default": LAYERS * PRODUCT},
        "backward": {"aten.mm.default": (2 * LAYERS - 1) * PRODUCT},
        "optimizer": {},
    }
    assert plain["product_flops"]["backward"] == {"float32": (2 * LAYERS - 1) * PRODUCT}
    assert plain["flops_complete"] is True
    assert plain["flops_unknown"] == {}


def test_what_runs_outside_modules_has_no_place(plain: dict[str, Any]) -> None:
    assert plain["operators"]["forward"]["aten.sum.default"] == {UNKNOWN: 1}
    assert plain["operators"]["backward"]["aten.expand.default"] == {UNKNOWN: 1}
    assert plain["operators"]["optimizer"] == {"aten.add_.Tensor": {UNKNOWN: LAYERS}}


def test_a_gradient_reaches_its_parameter_in_the_parameters_module(plain: dict[str, Any]) -> None:
    # The leaf's own node takes the gradient over: `detach` makes it the parameter's. torch 2.6 detaches it twice more.
    detached = plain["operators"]["backward"]["aten.detach.default"]["layers.*.proj"]
    assert detached in (LAYERS, 3 * LAYERS)


def test_a_planted_multiplication_is_located(plain: dict[str, Any]) -> None:
    planted = fingerprint(PlainJob(Tower(planted=lambda y: y * 1.5)))
    assert lines(plain, planted, "operators", "modules", "flops", "product_flops", "flops_unknown") == [
        "forward: +1 aten.mul.Tensor in layers.*.proj (0 → 1)",
        "backward: +1 aten.mul.Tensor in layers.*.proj (0 → 1)",
    ]
    assert digest(plain) != digest(planted)


def test_a_second_forward_pass_counts_in_the_backward_and_in_its_module() -> None:
    once, twice = (
        fingerprint(PlainJob(Tower(planted=lambda y: y * y, checkpointed=checkpointed)))
        for checkpointed in (False, True)
    )
    # The square needs the second layer's product again. The first layer's is needed by nothing, and recomputing stops
    # (with an exception, from within its modules) before it.
    assert [text for text in lines(once, twice, "operators", "modules") if "aten.mm" in text] == [
        "backward: +1 aten.mm.default in layers.*.proj (3 → 4)"
    ]
    assert twice["saved_activation_bytes"] < once["saved_activation_bytes"]
    # What runs after it is still located: nothing is left open.
    assert twice["operators"]["optimizer"] == {"aten.add_.Tensor": {UNKNOWN: LAYERS}}


def test_gradients_are_summed_in_place_as_without_a_recorder() -> None:
    """A dispatch mode alone makes the autograd engine add out of place (see the tracker)."""
    backward = fingerprint(PlainJob(Tower(planted=lambda y: y * 2 + y * 3)))["operators"]["backward"]
    assert backward["aten.add_.Tensor"] == {"layers.*.proj": 1}
    assert "aten.add.Tensor" not in backward


def test_micro_batches_before_one_update(plain: dict[str, Any]) -> None:
    three = fingerprint(PlainJob(Tower()), micro_batches=3)
    assert three["flops"]["backward"]["aten.mm.default"] == 3 * plain["flops"]["backward"]["aten.mm.default"]
    assert three["operators"]["optimizer"] == plain["operators"]["optimizer"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_shows_in_the_products(plain: dict[str, Any], dtype: torch.dtype) -> None:
    other = fingerprint(PlainJob(Tower(), dtype))
    name = str(dtype).removeprefix("torch.")
    total = LAYERS * PRODUCT
    assert sorted(lines(plain, other, "product_flops"))[2:] == sorted(
        [
            f"forward: FLOPs of products in {name}: 0 → {total:,}",
            f"forward: FLOPs of products in float32: {total:,} → 0",
        ]
    )
    assert lines(plain, other, "flops") == []


def test_one_layer_in_another_dtype_is_a_part_of_the_products() -> None:
    def narrow(y: Tensor) -> Tensor:
        return (y.to(torch.bfloat16) @ torch.ones(WIDTH, 1, dtype=torch.bfloat16)).to(torch.float32)

    mixed = fingerprint(PlainJob(Tower(planted=narrow)))
    assert mixed["product_flops"]["forward"] == {"bfloat16": 2 * ROWS * WIDTH, "float32": LAYERS * PRODUCT}


def test_paths_fold_indices_only() -> None:
    assert folded("model.layers.11.mlp.w2") == "model.layers.*.mlp.w2"
    assert folded("3.0") == "*.*"
    assert folded("") == ROOT


# ---- products without a formula ------------------------------------------------------------------------------------


@torch.library.custom_op("gauge_test::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    return x * 0.5


halved.register_autograd(lambda ctx, grad: grad * 0.5)


def test_a_custom_operator_makes_flops_a_lower_bound(plain: dict[str, Any]) -> None:
    custom = fingerprint(PlainJob(Tower(planted=halved)))
    assert custom["flops_complete"] is False
    assert custom["flops_unknown"] == {"gauge_test.halved.default": 1}
    assert lines(plain, custom, "flops_unknown") == [
        "flops: unknown operator gauge_test.halved.default, 0 → 1 calls: FLOPs with it are lower bounds"
    ]


def test_fewer_flops_are_no_improvement_where_some_are_unknown(plain: dict[str, Any]) -> None:
    custom = fingerprint(PlainJob(Tower(planted=halved)))
    custom["flops"]["forward"]["aten.mm.default"] -= PRODUCT
    (found,) = (found for found in differences(plain, custom) if found.what == "flops")
    assert (found.before, found.after) == (LAYERS * PRODUCT, None)
    assert found.text == f"forward: FLOPs of aten.mm.default: {LAYERS * PRODUCT:,} → at least {PRODUCT:,}"


@pytest.mark.parametrize(
    "func",
    [aten._linalg_solve_ex.default, aten._cdist_forward.default, aten.addbmm.default, aten._fft_r2c.default],
    ids=str,
)
def test_products_of_torch_without_a_formula_are_unknown(func: Any) -> None:
    assert Operator(func).unknown_flops


@pytest.mark.parametrize(
    "func",
    [
        aten.rsqrt.default,
        aten.igamma.default,
        aten.upsample_linear1d.default,
        aten.linalg_vector_norm.default,
        aten.silu_backward.default,
        aten.embedding.default,
        aten._log_softmax.default,
    ],
    ids=str,
)
def test_elementwise_operators_of_torch_need_none(func: Any) -> None:
    assert not Operator(func).unknown_flops
    assert not Operator(func).has_flops


def test_every_product_that_torch_has_a_formula_for_would_be_missed_without_it() -> None:
    """Another torch may have fewer formulas: then such a product must be unknown, not elementwise."""
    known = [packet.__name__ for packet in flop_registry if str(packet).startswith("aten.")]
    assert len(known) > 10
    assert [name for name in known if not _PRODUCT.search(name)] == []


def test_an_in_place_product_has_the_flops_of_its_twin() -> None:
    x, y = torch.ones(ROWS, WIDTH), torch.ones(WIDTH, WIDTH)
    args = (torch.zeros(ROWS, WIDTH), x, y)
    operator = Operator(aten.addmm_.default)
    assert operator.flops(args, {}, args[0]) == PRODUCT
    assert operator.product_type((args[0].double(), x.bfloat16(), y.bfloat16())) == "bfloat16"


@pytest.mark.parametrize(
    ("func", "args", "flops"),
    [
        (aten.mv.default, (torch.ones(3, 5), torch.ones(5)), 2 * 3 * 5),
        (aten.addmv.default, (torch.ones(3), torch.ones(3, 5), torch.ones(5)), 2 * 3 * 5),
        (aten.dot.default, (torch.ones(7), torch.ones(7)), 2 * 7),
        (aten._int_mm.default, (torch.ones(32, 16, dtype=torch.int8), torch.ones(16, 8, dtype=torch.int8)), 8192),
    ],
    ids=["mv", "addmv", "dot", "int_mm"],
)
def test_own_formulas_by_hand(func: Any, args: Any, flops: int) -> None:
    assert Operator(func).flops(args, {}, func(*args)) == flops


def test_a_librarys_products_are_known_by_formula_or_unknown() -> None:
    load_bitsandbytes()
    library = torch.ops.bitsandbytes
    tokens, weight = torch.ones(3, 16, dtype=torch.int8), torch.ones(5, 16, dtype=torch.int8)
    product = Operator(library.int8_linear_matmul.default)
    assert product.flops((tokens, weight), {}, None) == 2 * 3 * 16 * 5
    assert product.product_type((tokens, weight)) == "bitsandbytes.int8_linear_matmul"
    # How many columns this one multiplies in 16 bit depends on the values.
    assert Operator(library.int8_mixed_scaled_mm.default).unknown_flops
    for name in ("dequantize_4bit", "quantize_blockwise", "optimizer_update_32bit"):
        assert not Operator(getattr(library, name).default).unknown_flops


# ---- bytes by hand -------------------------------------------------------------------------------------------------

X = torch.ones(4, 8)  # 128 bytes
HALF = torch.ones(4, 8, dtype=torch.bfloat16)  # 64 bytes
INDEX = torch.tensor([0, 3])  # 16 bytes


@pytest.mark.parametrize(
    ("func", "args", "kwargs", "moved"),
    [
        (aten.t.default, (X,), {}, (0, 0)),
        (aten.view.default, (X, [8, 4]), {}, (0, 0)),
        (aten._unsafe_view.default, (X, [8, 4]), {}, (0, 0)),  # its schema does not say that it is a view
        (aten.detach.default, (X,), {}, (0, 0)),
        (aten.expand.default, (X, [5, 4, 8]), {}, (0, 0)),
        (aten.empty_like.default, (X,), {}, (0, 0)),
        (aten.zeros_like.default, (X,), {}, (0, 128)),
        (aten.new_zeros.default, (X, [2]), {}, (0, 8)),
        (aten.clone.default, (X,), {}, (128, 128)),
        (aten._to_copy.default, (X,), {"dtype": torch.bfloat16}, (128, 64)),
        (aten.add.Tensor, (X, X), {}, (256, 128)),
        (aten.add_.Tensor, (X.clone(), HALF), {}, (128 + 64, 128)),
        (aten.copy_.default, (X.clone(), HALF), {}, (64, 128)),
        (aten.zero_.default, (X.clone(),), {}, (0, 128)),
        (aten.add.out, (X, X), {"out": X.clone()}, (256, 128)),
        (aten.cat.default, ([X, X],), {}, (256, 256)),
        (aten._foreach_add_.Scalar, ([X.clone(), X.clone()], 1), {}, (256, 256)),
        (aten._foreach_copy_.default, ([X.clone()], [HALF]), {}, (64, 128)),
        (aten.addmm.default, (torch.ones(3), X, torch.ones(8, 3)), {}, (12 + 128 + 96, 48)),
        (aten.index.Tensor, (X, [None, INDEX]), {}, (128 + 16, 32)),
        (aten.max.dim, (X, 1), {}, (128, 16 + 32)),  # values and int64 indices
        (aten._local_scalar_dense.default, (torch.ones(()),), {}, (4, 0)),
    ],
    ids=lambda value: str(value) if hasattr(value, "_schema") else "",
)
def test_bytes_moved_by_one_operator(func: Any, args: Any, kwargs: Any, moved: tuple[int, int]) -> None:
    assert Operator(func).traffic(args, kwargs, func(*args, **kwargs)) == moved


def test_bytes_of_a_step_by_hand(plain: dict[str, Any]) -> None:
    weight, rows, number = 4 * WIDTH * WIDTH, 4 * ROWS * WIDTH, 4
    # Forward: two products, and the sum. Backward: a one (torch.ones_like), three products. The update: w += -rate g.
    assert plain["bytes"] == {
        "forward": {
            "read": 2 * (rows + weight) + rows,
            "written": 2 * rows + number,
            "allocated": 2 * rows + number,
        },
        "backward": {
            "read": 2 * 2 * rows + (rows + weight),
            "written": number + 2 * weight + rows,
            "allocated": number + 2 * weight + rows,
        },
        "optimizer": {"read": 2 * 2 * weight, "written": 2 * weight, "allocated": 0},
    }
    assert plain["resident_bytes"] == {"total": 2 * weight + rows, "adapter_weights": 2 * weight, "other": rows}
    assert plain["saved_activation_bytes"] == rows  # the second layer's input; the loss counts under its own name


def test_a_copy_is_seen_and_a_view_is_not(plain: dict[str, Any]) -> None:
    rows = 4 * ROWS * WIDTH
    viewed = fingerprint(PlainJob(Tower(planted=lambda y: y.view(-1).view(ROWS, WIDTH))))
    assert viewed["bytes"] == plain["bytes"]
    copied = fingerprint(PlainJob(Tower(planted=lambda y: y.clone())))
    assert lines(plain, copied, "bytes") == [
        f"forward: bytes {kind}: {number:,} → {number + rows:,}"
        for kind, number in sorted(plain["bytes"]["forward"].items())
    ]


# ---- two records compared ------------------------------------------------------------------------------------------


def test_equal_records_have_no_differences(plain: dict[str, Any]) -> None:
    again = fingerprint(PlainJob(Tower()))
    assert again == plain
    assert differences(plain, again) == []
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_exactly_the_planted_differences_are_found(plain: dict[str, Any]) -> None:
    new = copy.deepcopy(plain)
    new["operators"]["forward"]["aten.mul.Tensor"] = {"layers.*.proj": 32}
    del new["operators"]["backward"]["aten.mm.default"]
    new["operators"]["optimizer"]["aten.add_.Tensor"] = {UNKNOWN: 5}
    new["flops"]["forward"]["aten.mm.default"] = 7
    new["product_flops"]["forward"] = {"bfloat16": LAYERS * PRODUCT}
    new["bytes"]["backward"]["read"] += 1
    new["peak_bytes"]["gradients"] += 1
    new["resident_bytes"]["buffers"] = 6
    new["saved_activation_bytes"] = 0
    new["trainable"] = {"total": 100, "by_dtype": {"bfloat16": 100}}
    new["adapter_bytes"] = 12345
    read, gradients = plain["bytes"]["backward"]["read"], plain["peak_bytes"]["gradients"]
    assert lines(plain, new) == [
        "forward: +32 aten.mul.Tensor in layers.*.proj (0 → 32)",
        "backward: -3 aten.mm.default in layers.*.proj (3 → 0)",
        "optimizer: +3 aten.add_.Tensor (2 → 5)",
        "forward: FLOPs of aten.mm.default: 1,024 → 7",
        "forward: FLOPs of products in bfloat16: 0 → 1,024",
        "forward: FLOPs of products in float32: 1,024 → 0",
        f"backward: bytes read: {read:,} → {read + 1:,}",
        f"peak bytes, gradients: {gradients:,} → {gradients + 1:,}",
        "resident bytes, buffers: 0 → 6",
        "saved activations, bytes: 128 → 0",
        "trainable parameters, all: 128 → 100",
        "trainable parameters, bfloat16: 0 → 100",
        "trainable parameters, float32: 128 → 0",
        "saved adapter, bytes: unknown → 12,345",
    ]
    first = differences(plain, new)[0]
    assert (first.what, first.phase, first.name, first.module) == (
        "operators",
        "forward",
        "aten.mul.Tensor",
        "layers.*.proj",
    )
    assert (first.before, first.after) == (0, 32)


def test_every_exact_part_changes_the_digest(plain: dict[str, Any]) -> None:
    seen = {digest(plain)}
    for key in plain.keys() - {"losses"}:
        seen.add(digest({**plain, key: "another"}))
    assert len(seen) == len(plain)
    assert digest({**plain, "losses": [0.0]}) == digest(plain)
    assert digest(dict(reversed(plain.items()))) == digest(plain)


def test_a_renamed_module_is_one_line_an_operator(plain: dict[str, Any]) -> None:
    renamed = json.loads(json.dumps(plain).replace("layers.*.proj", "blocks.*.dense"))
    found = lines(plain, renamed)
    assert "forward: aten.mm.default, 2 calls as before, but from layers.*.proj to blocks.*.dense" in found
    assert len(found) == sum(
        "layers.*.proj" in modules for phase in PHASES for modules in plain["operators"][phase].values()
    )


def test_losses_are_compared_to_rounding(plain: dict[str, Any]) -> None:
    def shifted(record: dict[str, Any], by: float) -> dict[str, Any]:
        first, *rest = record["losses"]
        return {**record, "losses": [first * (1 + by), *rest]}

    assert differences(plain, shifted(plain, 1e-6)) == []
    (found,) = differences(plain, shifted(plain, 1e-4))
    assert (found.what, found.name) == ("losses", "step 1")
    assert differences(plain, shifted(plain, 1e-4), loss_tolerance=1e-3) == []
    assert len(differences(plain, shifted(plain, 1e-6), loss_tolerance=0.0)) == 1

    narrow = fingerprint(PlainJob(Tower(), torch.bfloat16))
    assert differences(narrow, shifted(narrow, 1e-4)) == []
    assert len(differences(narrow, shifted(narrow, 1e-2))) == 1
    # From float32 to bfloat16 the finer of the two counts, so that the change is not excused by itself.
    one_wide = {**narrow, "product_flops": plain["product_flops"]}
    assert [found.what for found in differences(one_wide, shifted(narrow, 1e-4))][-1] == "losses"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"version": 0}, "versions 0 and 1"),
        ({"operators": None}, "not a fingerprint of a step"),
        ({"losses": [1.0]}, "not a fingerprint of a step"),
        ({"trainable": {}}, "not a fingerprint of a step: KeyError 'by_dtype'"),
    ],
)
def test_what_does_not_compare_is_refused(plain: dict[str, Any], broken: dict[str, Any], message: str) -> None:
    with pytest.raises(GaugeError, match=message):
        differences({**plain, **broken}, plain)


# ---- jobs that have no fingerprint ---------------------------------------------------------------------------------


def test_a_job_that_has_taken_a_step_is_refused() -> None:
    job = PlainJob(Tower())
    job.optimizer = torch.optim.AdamW(job.model.parameters())
    fingerprint(job)
    with pytest.raises(GaugeError, match="initial weights"):
        fingerprint(job)


def test_a_record_of_another_step_than_the_third_is_refused() -> None:
    with pytest.raises(GaugeError, match="records step 3, but this job has taken 1"):
        record_step(PlainJob(Tower()), [0.5])


def test_a_loss_that_is_no_number_is_refused() -> None:
    with pytest.raises(GaugeError, match="the loss of step 1 is nan"):
        fingerprint(PlainJob(Tower(planted=lambda y: y * math.nan)))


# ---- the methods ---------------------------------------------------------------------------------------------------


def build(method: methods.Method, *, attention: str = "sdpa", batch: int = 1, seq: int = 16) -> TrainingJob:
    record = models.resolve("toy-llama", weights="random")
    base = models.build(record, attn_implementation=attention)
    return build_job(Case(record, method, StepSettings(batch, seq), "cpu", "float32"), base=base)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def lora() -> dict[str, Any]:
    return fingerprint(build(methods.LORA))


def test_trainable_parameters_of_lora(lora: dict[str, Any]) -> None:
    config = models.resolve("toy-llama").config
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    narrow = hidden // heads * config["num_key_value_heads"]
    widths = [hidden + hidden, hidden + narrow, hidden + narrow, hidden + hidden]  # q, k, v, o
    expected = methods.LORA.peft_config["r"] * sum(widths) * config["num_hidden_layers"]
    assert lora["trainable"] == {"total": expected, "by_dtype": {"float32": expected}}


def test_losses_are_those_of_the_unrecorded_job(lora: dict[str, Any]) -> None:
    job = build(methods.LORA)
    job.warm_up(3)
    assert lora["losses"] == job.losses


def test_one_adapter_in_16_bit_shows(lora: dict[str, Any]) -> None:
    job = build(methods.LORA)
    for name, parameter in job.model.named_parameters():
        if "layers.1.self_attn.q_proj.lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    lowered = fingerprint(job)
    rounded = sum(p.numel() for p in job.trainable if p.dtype == torch.bfloat16)
    total = lora["trainable"]["total"]
    assert lines(lora, lowered, "trainable") == [
        f"trainable parameters, bfloat16: 0 → {rounded:,}",
        f"trainable parameters, float32: {total:,} → {total - rounded:,}",
    ]
    casts = [found for found in differences(lora, lowered) if found.name == "aten._to_copy.default"]
    assert {found.module for found in casts if found.phase == "forward"} == {
        "base_model.model.model.layers.*.self_attn.q_proj"
    }


def test_flops_agree_with_torchs_counter_and_attention_with_its_products() -> None:
    eager = fingerprint(build(methods.LORA, attention="eager"))
    job = build(methods.LORA, attention="eager")
    with FlopCounterMode(display=False) as counter:
        job.step()
    assert sum(sum(by_name.values()) for by_name in eager["flops"].values()) == counter.get_total_flops()

    fused = fingerprint(build(methods.LORA, attention="sdpa"))
    assert sum(fused["flops"]["forward"].values()) == sum(eager["flops"]["forward"].values())
    # Backward, fused attention computes QKᵀ a second time: five products where there were four.
    products = {name: number for name, number in eager["flops"]["backward"].items() if "bmm" in name}
    attention = [number for name, number in fused["flops"]["backward"].items() if "attention" in name]
    if (
        not attention
    ):  # torch 2.6 has no fused kernel on the CPU for shared key-value heads, and multiplies as eager does
        assert not any("attention" in name for name in fused["operators"]["forward"])
        attention = [sum(number for name, number in fused["flops"]["backward"].items() if "bmm" in name) * 5 // 4]
    assert [attention[0] * 4] == [sum(products.values()) * 5]


def test_quantized_products_have_a_name_of_their_own_and_the_same_flops(lora: dict[str, Any]) -> None:
    quantized = fingerprint(build(methods.QLORA))
    assert sum(quantized["flops"]["forward"].values()) == sum(lora["flops"]["forward"].values())
    packed = {name for name in quantized["product_flops"]["forward"] if name.startswith("bitsandbytes.")}
    dequantized = "bitsandbytes.dequantize_4bit.default" in quantized["operators"]["forward"]
    assert packed or dequantized, "a packed weight is multiplied as it is, or unpacked first"
    assert quantized["peak_bytes"]["quantization_constants"] > 0


def test_the_number_of_threads_changes_nothing_exact(threads: Callable[[int], None]) -> None:
    found = []
    for number in (1, 2):
        threads(number)
        found.append(fingerprint(build(methods.LORA, batch=2, seq=32)))
    assert digest(found[0]) == digest(found[1])
    assert differences(*found) == []
