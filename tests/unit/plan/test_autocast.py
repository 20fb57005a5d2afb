"""Autocast on the CPU with CUDA's lists: what torch's documentation says of CUDA, and plans against real tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peft_gauge._internals.torch import autocast_operators, autocast_policies
from peft_gauge.errors import GaugeError
from peft_gauge.plan.autocast import as_on_cuda
from peft_gauge.plan.planner import plan
from peft_gauge.plan.record import PlanRequest
from peft_gauge.training import methods, models
from peft_gauge.training.settings import StepSettings
from peft_gauge.training.step import TrainingJob
from tests.unit.plan.test_planner import TOY, hold_against_a_real_step

# Builds, plans or trains models: seconds, which are too long for the unit tests.
pytestmark = pytest.mark.integration

BF16, F32 = torch.bfloat16, torch.float32

# The operator, the dtypes of its inputs, and the dtype of its output by "CUDA Ops that can autocast to …" in torch's
# documentation of torch.amp; below, what is in neither list and keeps or widens by itself.
DOCUMENTED: dict[str, tuple[Callable[..., Tensor], list[torch.dtype], torch.dtype]] = {
    "matmul": (torch.matmul, [F32, F32], BF16),
    "linear": (F.linear, [F32, F32], BF16),
    "einsum": (lambda a, b: torch.einsum("ij,jk->ik", a, b), [F32, F32], BF16),
    "softmax": (lambda a: torch.softmax(a, -1), [BF16], F32),
    "log_softmax": (lambda a: torch.log_softmax(a, -1), [BF16], F32),
    "layer_norm": (lambda a: F.layer_norm(a, (8,)), [BF16], F32),
    "exp": (torch.exp, [BF16], F32),
    "pow": (lambda a: a.pow(2), [BF16], F32),
    "rsqrt": (lambda a: a.abs().rsqrt(), [BF16], F32),
    "sum": (torch.sum, [BF16], F32),
    "sum over a dimension": (lambda a: a.sum(-1), [BF16], F32),
    "cumsum": (lambda a: a.cumsum(0), [BF16], F32),
    "norm": (torch.norm, [BF16], F32),
    "cross_entropy": (lambda a: F.cross_entropy(a, torch.arange(8)), [BF16], F32),
    "mse_loss": (F.mse_loss, [BF16, BF16], F32),
    "addcmul of two dtypes": (torch.addcmul, [F32, BF16, BF16], F32),
    "dot of two dtypes": (lambda a, b: torch.dot(a[0], b[0]), [F32, BF16], F32),
    "mean": (torch.mean, [BF16], BF16),
    "mul": (torch.mul, [BF16, BF16], BF16),
    "cat": (lambda a, b: torch.cat([a, b]), [BF16, BF16], BF16),
    "silu": (F.silu, [BF16], BF16),
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_an_operator_casts_as_documented(name: str) -> None:
    operator, inputs, output = DOCUMENTED[name]
    tensors = [torch.eye(8, dtype=dtype) for dtype in inputs]
    with as_on_cuda() as warnings, torch.autocast("cpu", dtype=BF16):
        assert operator(*tensors).dtype is output
    assert warnings == ()


def test_the_cpus_lists_come_back() -> None:
    eight = torch.eye(8, dtype=BF16)
    with as_on_cuda(), torch.autocast("cpu", dtype=BF16):
        assert torch.is_autocast_enabled()  # about CUDA, as PEFT asks it
        assert torch.get_autocast_dtype("cuda") is BF16
        assert torch.softmax(eight, -1).dtype is F32
    assert not torch.is_autocast_enabled()
    with torch.autocast("cpu", dtype=BF16):
        assert not torch.is_autocast_enabled()
        assert torch.softmax(eight, -1).dtype is BF16  # the CPU leaves it


def test_a_given_dtype_is_respected() -> None:
    with as_on_cuda(), torch.autocast("cpu", dtype=BF16):
        assert torch.eye(8, dtype=BF16).sum(dtype=BF16).dtype is BF16
        assert torch.softmax(torch.eye(8, dtype=torch.float64), -1).dtype is torch.float64  # double is not eligible


def test_a_weight_is_cast_once() -> None:
    weight = torch.nn.Parameter(torch.eye(8))
    with as_on_cuda(), torch.autocast("cpu", dtype=BF16):
        first, second = (F.linear(torch.eye(8), weight) for _ in range(2))
    copies = {node for output in (first, second) for node in graph(output.grad_fn) if "ToCopy" in node.name()}
    assert len(copies) == 1


def graph(node: Any) -> Iterator[Any]:
    """The autograd nodes from ``node`` on."""
    if node is not None:
        yield node
        for further, _ in node.next_functions:
            yield from graph(further)


def test_the_header_states_a_policy_for_each_operator_of_a_causal_lm() -> None:
    policies = autocast_policies()
    assert {"aten::linear": "lower_precision_fp", "aten::softmax.int": "fp32_set_opt_dtype"}.items() <= policies.items()
    unknown = autocast_operators("CUDA") - policies.keys()
    assert all("cudnn" in name or "binary_cross_entropy" in name for name in unknown), unknown


@pytest.mark.integration
@pytest.mark.parametrize(
    ("method", "dtype", "mixed"),
    [
        pytest.param(method, *types, id="-".join([method.name, *types]), marks=pytest.mark.slow if (i + k) % 3 else ())
        for i, method in enumerate(methods.DEFAULT_METHODS)
        for k, types in enumerate([("float32", "bf16"), ("bfloat16", "bf16"), ("float32", "fp16")])
    ],
)
def test_a_planned_step_under_autocast_is_a_real_one_without_its_numbers(
    method: methods.Method, dtype: str, mixed: str
) -> None:
    with as_on_cuda():
        hold_against_a_real_step(method, TOY, dtype, mixed_precision=mixed, float32_outputs=True)


def test_a_step_under_autocast_learns() -> None:
    """The real step, by the CPU's own lists."""
    model = methods.attach(models.build(TOY), methods.LORA)
    tokens = torch.randint(0, TOY.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    settings = StepSettings(2, 16, learning_rate=1e-2, mixed_precision="bf16", float32_outputs=True)
    job = TrainingJob(model, [{"input_ids": tokens, "labels": tokens}], settings)
    job.warm_up(8)
    assert job.learned()
    assert job.losses[-1] < job.losses[0]


def test_fp16_scales_the_loss_and_the_gradients_back() -> None:
    """With the same weights and tokens, the update is that of float32 but for rounding to half precision."""
    found = []
    for mixed in ("no", "fp16"):
        torch.manual_seed(0)  # of the adapters
        model = methods.attach(models.build(TOY), methods.LORA)
        tokens = torch.randint(0, TOY.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
        settings = StepSettings(2, 16, optimizer="sgd", clip_grad_norm=1e9, mixed_precision=mixed)
        job = TrainingJob(model, [{"input_ids": tokens, "labels": tokens}], settings)
        job.forward()
        job.backward()
        job.optimizer_step()  # clipping unscales
        found.append(torch.cat([each.grad.flatten() for each in job.trainable if each.grad is not None]))
    plain, scaled = found
    assert torch.linalg.vector_norm(scaled - plain) < 0.02 * torch.linalg.vector_norm(plain)


def test_fp16_needs_trainable_weights_in_float32() -> None:
    with pytest.raises(GaugeError, match="needs trainable weights in float32"):
        plan(PlanRequest(TOY, methods.FULL, StepSettings(1, 8, mixed_precision="fp16"), dtype="float16"))


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(GaugeError, match="unknown mixed precision 'bf61'"):
        StepSettings(1, 8, mixed_precision="bf61")  # type: ignore[arg-type]
