"""How far are plans from the memory that GPUs used: published metrics, and steps measured on an H200?

Each metric of ``fixtures/published.toml`` is planned or counted with the settings that its source gives, and the
distance, planned over published less 1, is recorded and shown. A metric is asserted as far as its settings are known.

Results with torch 2.13, transformers 5.24 and PEFT 0.21:

- Parameter counts, torchtune's LoRALinear, the bits of quantization constants, and the memory that double quantization
  saves in litgpt's table agree to the last printed digit.
- The peaks of litgpt's 16-bit runs are planned 2.6 to 5.4 % too low. Weights agree: the published peaks of batches 1
  and 2 of Llama 2 7B, extrapolated to zero, give 13.53 GB, and weights and adapters are 13.49. The missing part grows
  with the tokens. Of the known differences, unsplit blocks of CUDA's allocator are 0.03 to 0.5 % (a plan's peak leaves
  them out, `max_memory_allocated` counts them) and cuBLAS workspaces less than 0.2 %. The model's code is not the
  reason: transformers keeps float32 copies in each RMSNorm and in the loss, litgpt its fused q, k and v and the LoRA
  update, and litgpt's own code, tracked in the same way, gave peaks 3.7 to 6.3 % low on Llama 2 and 5.5 % on phi-1.5.
  The rest is unexplained; tensors kept by torch 2.1 itself, and cuDNN's workspaces (litgpt computes the product with B
  as a convolution), are not visible to a trace.
- Its 4-bit runs are planned 20 to 22 % too low: bitsandbytes 0.41.1 kept the input of every 4-bit layer for backward,
  which today's release does not. For Llama 2 7B that is tokens × layers × (2·4096 + 11008) × 2 bytes = 1.60 GB of the
  2.95; the unknown part described above is 0.80. litgpt also quantizes the head, which stays in 16 bit here.
- 36 steps were measured on an H200 with this suite's own loop (`fixtures/h200_steps.json`). Planned peaks of the 33
  steps that are not of the toy model are within 0.03 % of the bytes requested from the allocator, and within 0.6 % of
  `max_memory_allocated` over the first steps; reserved bytes within 8 %, half of them within 0.07 %. For the toy model
  the rounding to blocks of 512, which a plan counts and a request does not, is up to 0.17 %.
- Nine further steps there are those of `transformers.Trainer` and of `trl.SFTTrainer`, which are planned by the
  installed trainer: within 0.013 %, reserved bytes within 3 %. Eleven more of `transformers.Trainer` were measured on
  an H100 (`fixtures/h100_steps.json`): all seven methods, DoRA, autocast in bf16 and fp16, Adafactor, 8-bit and paged
  AdamW; planned within 0.021 %, reserved bytes within 5 %.
- Seven steps that others measured with LLaMA-Factory, axolotl and torchtune are planned from their recipes
  (`fixtures/published_recipes.toml`): see each case's distance.
- Two metrics are context: torchao's NF4 layer has constants in its own layout (13,312 bytes in addition to packed
  weights and adapters, against 6,656 here), and the QLoRA paper does not break down its 5,048 MB of base weights.
"""

from __future__ import annotations

import json
import tempfile
import tomllib
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fixtures.measured_steps import read_steps
from peft_gauge import paths
from peft_gauge.commands.plan_step import base_of, described_step, in_stored_dtype
from peft_gauge.counting import logical_numel, nbytes, quantization_constants
from peft_gauge.memory.ledger import rounded
from peft_gauge.plan import recipes
from peft_gauge.plan.record import PlanRequest
from peft_gauge.training import methods, models
from peft_gauge.training.cases import count_on_meta
from peft_gauge.training.methods import Method, Quantization
from peft_gauge.training.quantization import import_peft, quantize_
from peft_gauge.training.settings import StepSettings
from peft_gauge.training.sharding import Sharding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

    from fixtures.measured_steps import MeasuredStep
    from fixtures.plans import Plans

PEFT_NAMES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
UNITS = {"": 1, "bytes": 1, "bits": 1, "million": 10**6, "MB": 10**6, "GB": 10**9, "GiB": 2**30}


@dataclass(frozen=True)
class PublishedValue:
    """One entry of ``fixtures/published.toml``: the metric as printed, and the settings that its source gives."""

    id: str
    quantity: str
    published: Decimal
    unit: str
    asserted: str
    stated: Mapping[str, Any]

    def quantization(self, kind: str | None = None) -> methods.Quantization | None:
        """How the base is stored; ``kind`` (nf4, nf4-dq) overrides the source's settings."""
        kind = kind or self.stated.get("quantized")
        return None if kind is None else methods.Quantization("nf4", double_quant=kind == "nf4-dq")

    def method(self, quantized: str | None = None) -> Method:
        """LoRA on q and v with the source's settings, its weights in the base's dtype, over a base in that format."""
        settings = {PEFT_NAMES[name]: value for name, value in self.stated.items() if name in PEFT_NAMES}
        return published_lora(self.quantization(quantized), target_modules=methods.ATTENTION_QV, **settings)

    def request(self, quantized: str | None = None) -> PlanRequest:
        """The step that the metric was measured on."""
        settings = StepSettings(self.stated["batch"], self.stated["seq"], optimizer=self.stated["optimizer"])
        return PlanRequest(self.model(), self.method(quantized), settings)

    def model(self) -> models.ModelRecord:
        """The architecture: one of the project's records, or the config stored with the metrics."""
        name = self.stated["model"]
        if name not in PUBLISHED["model"]:
            return models.resolve(name, weights="random")
        return models.ModelRecord(name, "folder", json.dumps(PUBLISHED["model"][name]["config"]), "random")


def published_lora(quantization: Quantization | None, **config: Any) -> Method:
    """LoRA with these settings of PEFT's, its weights in the base's dtype, over a base in that format."""
    return Method(
        name="lora-as-published",
        title="LoRA as published",
        kind="peft",
        peft_config={"peft_type": "LORA", "task_type": "CAUSAL_LM", **config},
        quantization=quantization,
        autocast_adapter_dtype=False,
    )


def read_values(published: dict[str, Any]) -> Iterator[PublishedValue]:
    for entry in published["metric"]:
        stated = {**published["source"][entry["source"]], **entry}
        yield PublishedValue(
            id=entry["id"],
            quantity=entry["quantity"],
            published=Decimal(entry["published"]),
            unit=entry.get("unit", ""),
            asserted=entry["asserted"],
            stated=stated,
        )


PUBLISHED = tomllib.loads(paths.fixture("published.toml").read_text(encoding="utf-8"))
METRICS = tuple(read_values(PUBLISHED))


RECIPES = tomllib.loads(paths.fixture("published_recipes.toml").read_text(encoding="utf-8"))
MEMORY = {"device": "device_bytes_estimate", "reserved": "reserved_bytes_estimate", "peak": "peak_bytes"}

# A step of 7B or 13B takes seconds to plan; metrics that are only counted are part of every run.
PLANNED = ("peak of a step", "saved by double quantization")
CASES = [
    pytest.param(metric, id=metric.id, marks=pytest.mark.slow if metric.quantity in PLANNED else ())
    for metric in METRICS
]


@pytest.mark.slow
@pytest.mark.plans(steps=lambda step: [step.request()])
@pytest.mark.parametrize("step", [*read_steps(), *read_steps("h100")], ids=lambda step: f"{step.gpu}-{step.id}")
def test_step_on_a_gpu(step: MeasuredStep, plans: Plans, record: Callable[..., None]) -> None:
    """The peak without library workspaces, and the allocated and reserved bytes for it."""
    (found,) = plans([step.request()])
    record(
        metric=f"{step.gpu.upper()}: {step.id}",
        published=step.peak_bytes / 1e9,
        planned=found.peak_bytes / 1e9,
        unit="GB",
        distance_percent=100 * (found.peak_bytes / step.peak_bytes - 1),
        asserted="within 0.1 % or 64 KiB",
        allocated_distance_percent=100 * (found.allocated_bytes_estimate / step.first_steps["allocated_peak"] - 1),
        reserved_distance_percent=100 * (found.reserved_bytes_estimate / step.first_steps["reserved_peak"] - 1),
    )
    assert found.trainable_params == step.trainable_params
    # A plan counts in blocks of 512, more than 0.1 % of a toy's step.
    assert found.peak_bytes == pytest.approx(step.peak_bytes, rel=0.001, abs=64 * 1024)


@pytest.mark.slow
@pytest.mark.plans(steps=lambda told: [recipe_step(told)])
@pytest.mark.parametrize("told", RECIPES["recipe"], ids=lambda told: told["id"])
def test_recipe(told: Mapping[str, Any], plans: Plans, record: Callable[..., None]) -> None:
    """The memory that others measured with the tools that people train with, planned from the recipe."""
    (found,) = plans([recipe_step(told)])
    planned = getattr(found, MEMORY[told["of"]])
    distance = 100 * (planned / (told["published"] * UNITS[told["unit"]]) - 1)
    record(
        metric=told["id"],
        quantity=f"{told['of']} memory of a step",
        published=told["published"],
        planned=planned / UNITS[told["unit"]],
        unit=told["unit"],
        distance_percent=distance,
        asserted=f"within {told['within_percent']} %",
        **{key: told[key] for key in ("source", "unstated") if key in told},
    )
    assert abs(distance) <= told["within_percent"]


def recipe_step(told: Mapping[str, Any]) -> PlanRequest:
    """The step of an entry of ``fixtures/published_recipes.toml``."""
    if "plain" in told:
        step = StepSettings(**told["plain"])
        return PlanRequest(recipe_model(told["model"]), methods.FULL, step, loss=told.get("loss", "full"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(told["content"])
        found = recipes.read(path, {})
    assert found.method is not None
    assert not found.unknown
    model = recipe_model(base_of(None, found))
    asked = in_stored_dtype(described_step({}, found, {}), model)
    return PlanRequest(model, found.method, **{**asked, "dtype": told.get("loaded_in", asked["dtype"])})


def recipe_model(name: str) -> models.ModelRecord:
    if name not in RECIPES["model"]:
        return models.resolve(name, weights="random")
    return models.ModelRecord(name, "folder", json.dumps(RECIPES["model"][name]["config"]), "random")


SHARDED = [{**PUBLISHED["source"][entry["source"]], **entry} for entry in PUBLISHED["sharded"]]
MEASURES = {
    "allocated": "allocated_bytes_estimate",
    "reserved": "reserved_bytes_estimate",
    "device": "device_bytes_estimate",
}


@pytest.mark.slow
@pytest.mark.plans(steps=lambda stated: [sharded_step(stated)])
@pytest.mark.parametrize("stated", SHARDED, ids=lambda stated: stated["id"])
def test_sharded_step(stated: Mapping[str, Any], plans: Plans, record: Callable[..., None]) -> None:
    """One GPU of several that share a step by FSDP."""
    (plan,) = plans([sharded_step(stated)])
    published = float(stated["published"])
    planned = getattr(plan, MEASURES[stated["measure"]]) / UNITS[stated["unit"]]
    distance = 100 * (planned / published - 1)

    record(
        metric=stated["id"],
        quantity=f"{stated['measure']} bytes of one of {stated['gpus']} GPUs",
        published=published,
        planned=planned,
        unit=stated["unit"],
        distance_percent=distance,
        asserted="within",
        url=stated["url"],
        plan=plan.as_json(),
    )
    assert abs(distance) <= stated["within_percent"]


def sharded_step(stated: Mapping[str, Any]) -> PlanRequest:
    """LoRA on all linear layers of the blocks, all in bfloat16 or over a base in 4 bit, by FSDP2 with checkpointing."""
    base = stated["base"]
    quantization = None if base == "bfloat16" else Quantization("nf4", double_quant=base == "nf4-dq")
    return PlanRequest(
        models.resolve(stated["model"], weights="random"),
        published_lora(quantization, target_modules="all-linear", r=stated["rank"]),
        StepSettings(stated["batch"], stated["seq"], grad_checkpointing=stated["checkpointing"]),
        sharding=Sharding(stated["gpus"]),
    )


@pytest.mark.untimed
@pytest.mark.parametrize("metric", CASES)
def test_published(metric: PublishedValue, peaks: Callable[[PlanRequest], int], record: Callable[..., None]) -> None:
    planned = Decimal(PROCEDURES[metric.quantity](metric, peaks)) / UNITS[metric.unit]
    distance = 100 * (planned / metric.published - 1)

    record(
        metric=metric.id,
        quantity=metric.quantity,
        published=float(metric.published),
        planned=float(planned),
        unit=metric.unit,
        distance_percent=float(distance),
        asserted=metric.asserted,
        **{key: metric.stated[key] for key in ("url", "why", "unstated") if key in metric.stated},
    )
    assert_agreement(metric, planned, distance)


def assert_agreement(metric: PublishedValue, planned: Decimal, distance: Decimal) -> None:
    """Compare ``planned`` with the published metric, as closely as its source's settings allow."""
    match metric.asserted:
        case "exact":
            assert abs(planned - metric.published) <= printed_to(metric) / 2
        case "within":
            assert abs(distance) <= metric.stated["within_percent"]
        case "below":
            assert metric.stated["why"]
            assert -metric.stated["within_percent"] <= distance < 0
        case "nothing":
            assert metric.stated["unstated"], "a metric whose settings are all stated is held to something"
        case other:
            pytest.fail(f"{metric.id}: asserted = {other!r} is unknown", pytrace=False)


def printed_to(metric: PublishedValue) -> Decimal:
    """The unit of the last printed digit; twice that for a difference of two printed metrics."""
    last = Decimal(1).scaleb(int(metric.published.as_tuple().exponent))
    return 2 * last if metric.quantity == "saved by double quantization" else last


# --- how each quantity is reproduced --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peaks(plans: Plans) -> Callable[[PlanRequest], int]:
    """``peaks(request)``: the planned peak in bytes. All steps of the file are planned at the first call."""

    def peak(request: PlanRequest) -> int:
        steps = [metric.request() for metric in METRICS if metric.quantity == "peak of a step"]
        found = dict(zip(steps, plans(steps), strict=True))
        return found[request].peak_bytes

    return peak


def peak_of_a_step(metric: PublishedValue, peaks: Callable[[PlanRequest], int]) -> int:
    return peaks(metric.request())


def saved_by_double_quantization(metric: PublishedValue, peaks: Callable[[PlanRequest], int]) -> int:
    return peaks(metric.request("nf4")) - peaks(metric.request("nf4-dq"))


def trainable_params(metric: PublishedValue, _: object) -> int:
    return count_on_meta(metric.model(), metric.method()).trainable_params


def all_params(metric: PublishedValue, _: object) -> int:
    return count_on_meta(metric.model(), metric.method()).total_params


def bytes_of_a_layer(metric: PublishedValue, _: object) -> int:
    """A linear layer with PEFT's LoRA in float32, each tensor rounded to CUDA's blocks of 512 bytes."""
    import torch
    from torch import nn

    peft = import_peft()
    size, quantization = metric.stated["size"], metric.quantization()
    with torch.device("meta"):
        layer = nn.Sequential(nn.Linear(size, size, bias=False))
    if quantization is not None:
        quantize_(layer, double_quant=quantization.double_quant)
    adapted = peft.get_peft_model(layer, peft.LoraConfig(r=metric.stated["rank"], target_modules=["0"]))
    return sum(rounded(nbytes(tensor)) for tensor in stored(adapted))


def bytes_of_the_base(metric: PublishedValue, _: object) -> int:
    """All weights with their constants: the linear layers except the head in 4 bit, the rest in bfloat16."""
    return sum(map(nbytes, stored(quantized_base(metric))))


def bits_of_constants(metric: PublishedValue, _: object) -> float:
    """Bits in addition to the 4 of each quantized weight, averaged over the model."""
    quantized = [parameter for parameter in quantized_base(metric).parameters() if hasattr(parameter, "quant_state")]
    constants = sum(nbytes(tensor) for parameter in quantized for tensor in quantization_constants(parameter))
    return 8 * constants / sum(map(logical_numel, quantized))


def quantized_base(metric: PublishedValue) -> nn.Module:
    model = models.build(metric.model(), device="meta", dtype="bfloat16")
    quantization = metric.quantization()
    assert quantization is not None, f"{metric.id} gives no format of the quantized base"
    quantize_(model, double_quant=quantization.double_quant, compute_dtype=model.dtype)
    return model


def stored(model: nn.Module) -> Iterator[Tensor]:
    for parameter in model.parameters():
        yield parameter
        yield from quantization_constants(parameter)


PROCEDURES: Mapping[str, Callable[[PublishedValue, Callable[[PlanRequest], int]], float]] = {
    "peak of a step": peak_of_a_step,
    "saved by double quantization": saved_by_double_quantization,
    "trainable parameters": trainable_params,
    "all parameters": all_params,
    "bytes of a layer": bytes_of_a_layer,
    "bytes of the base": bytes_of_the_base,
    "bits of constants a weight": bits_of_constants,
}
