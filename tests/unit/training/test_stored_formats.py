"""Bases that come quantized: planned as their config says they are stored, measured so too, or refused in one line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_gauge import counting
from peft_gauge.errors import GaugeError
from peft_gauge.memory.categories import (
    ACTIVATIONS,
    BACKWARD,
    DEQUANTIZED_TEMPORARIES,
    FORWARD,
    INPUTS,
    QUANTIZATION_CONSTANTS,
)
from peft_gauge.memory.tracker import StorageTracker
from peft_gauge.plan import fakes, planner
from peft_gauge.plan.record import Plan, PlanRequest
from peft_gauge.training import cases, methods, models, quantization, stored_layers
from peft_gauge.training.cases import Case
from peft_gauge.training.settings import StepSettings
from peft_gauge.training.stored_formats import stored_format
from tests.support import published_models as published
from tests.support.facts import lacking

if TYPE_CHECKING:
    from pathlib import Path


# Builds, plans or trains models: seconds, which are too long for the unit tests.
pytestmark = pytest.mark.integration
TOY = models.resolve("toy-llama", weights="random").config

BNB_4BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BNB_8BIT = {"quant_method": "bitsandbytes", "load_in_8bit": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 32], "activation_scheme": "dynamic"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
MXFP4 = {"quant_method": "mxfp4"}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}},
}


def toy(settings: dict[str, Any] | None, folder: Path, **changes: Any) -> models.ModelRecord:
    """The toy Llama with a config that says that its weights are stored so."""
    config = {**TOY, **changes, **({} if settings is None else {"quantization_config": settings})}
    (folder / "toy.json").write_text(json.dumps(config))
    return models.resolve(str(folder / "toy.json"))


def plan_of(record: models.ModelRecord, method: str = "lora", batch: int = 1, seq: int = 32, **how: Any) -> Plan:
    return planner.plan(PlanRequest(record, methods.get(method), StepSettings(batch, seq), **how))


def blocks(*sizes: int) -> int:
    """The bytes of tensors of ``sizes`` bytes in blocks of 512."""
    return sum(-(-size // 512) * 512 for size in sizes)


# The toy's linear layers as (out, in); embedding, head and norms stay.
LAYERS = 2 * [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
UNTOUCHED = [256 * 64, 256 * 64, *(5 * [64])]


def kept_bytes(dtype_bytes: int = 2) -> int:
    return blocks(*(size * dtype_bytes for size in UNTOUCHED))


def test_fp8_is_held_as_bytes_with_a_scale_a_block(tmp_path: Path) -> None:
    found = plan_of(toy(FP8, tmp_path))
    assert found.base == "FP8, from its config"
    assert found.resident_by_category["base_weights"] == kept_bytes() + blocks(*(o * i for o, i in LAYERS))
    scales = blocks(*(4 * (o // 16) * (i // 32) for o, i in LAYERS))
    assert found.resident_by_category["quantization_constants"] == scales
    assert found.total_params - found.trainable_params == 106_816


def test_fp8_of_a_whole_tensor_has_one_scale(tmp_path: Path) -> None:
    settings = {"quant_method": "fp8", "activation_scheme": "static"}
    found = plan_of(toy(settings, tmp_path))
    assert found.resident_by_category["quantization_constants"] == blocks(*(4 for _ in LAYERS for _ in ("w", "x")))


@pytest.mark.parametrize(("settings", "rows"), [(GPTQ, "in"), (AWQ, "out")])
def test_groups_are_held_packed_with_scales_and_zero_points(
    settings: dict[str, Any], rows: str, tmp_path: Path
) -> None:
    found = plan_of(toy(settings, tmp_path))
    title = "GPTQ 4 bit" if rows == "in" else "AWQ 4 bit"
    assert found.base == f"{title}, from its config"
    assert found.resident_by_category["base_weights"] == kept_bytes() + blocks(*(o * i // 2 for o, i in LAYERS))
    constants = [size for o, i in LAYERS for size in (i // 32 * o // 2, i // 32 * o * 2, *([4 * i] * (rows == "in")))]
    assert found.resident_by_category["quantization_constants"] == blocks(*constants)
    assert found.total_params - found.trainable_params == 106_816


@pytest.mark.parametrize(("settings", "layer"), [(FP8, "FP8Linear"), (AWQ, "AwqLinear")])
def test_what_the_config_leaves_out_stays_in_16_bit(settings: dict[str, Any], layer: str, tmp_path: Path) -> None:
    settings = {**settings, "modules_to_not_convert": ["lm_head", "model.layers.0.mlp", r"model\.layers\.1\.self_attn"]}
    model = models.build(toy(settings, tmp_path), device="meta", dtype="bfloat16")
    stored = {name for name, module in model.named_modules() if type(module).__name__ == layer}
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    assert stored == {
        *(f"model.layers.0.self_attn.{name}" for name in attention),
        *(f"model.layers.1.mlp.{name}" for name in mlp),
    }


def test_bitsandbytes_is_planned_as_quantizing_it_here_is(tmp_path: Path) -> None:
    settings = {**BNB_4BIT, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}
    stored = plan_of(toy(settings, tmp_path), "qlora")
    quantized = plan_of(toy(None, tmp_path), "qlora")
    assert (stored.base, quantized.base) == (
        "NF4, from its config",
        "NF4, quantized by the method, prepared for k-bit training",
    )
    assert stored.peak_by_category == quantized.peak_by_category
    assert stored.resident_by_category == quantized.resident_by_category
    assert stored.settings == quantized.settings


@pytest.mark.parametrize(
    ("settings", "title"), [(MXFP4, "MXFP4"), (COMPRESSED, "NVFP4 (compressed-tensors)")], ids=["mxfp4", "nvfp4"]
)
def test_what_is_16_bit_in_a_step_is_planned_so(settings: dict[str, Any], title: str, tmp_path: Path) -> None:
    stored, plain = (plan_of(toy(each, tmp_path), "full") for each in (settings, None))
    assert stored.base == f"{title}, from its config, 16 bit once loaded"
    assert stored.peak_by_category == plain.peak_by_category
    assert any("planned as 16 bit" in warning for warning in stored.warnings)


@pytest.mark.parametrize(
    ("settings", "method", "said"),
    [
        (
            BNB_4BIT,
            "full",
            "stores as NF4; use an adapter method",
        ),
        (FP8, "full", "which this checkpoint stores as FP8"),
        (GPTQ, "qlora", "this checkpoint is stored as GPTQ 4 bit already"),
        (MXFP4, "qlora", "this checkpoint is stored as MXFP4 already"),
        ({**BNB_4BIT, "bnb_4bit_quant_type": "fp4"}, "qlora", "this checkpoint is stored as FP4 already"),
        (GPTQ, "ia3", "PEFT has no IA3 layers for GPTQ 4 bit weights"),
    ],
)
def test_a_method_that_does_not_fit_is_one_line(
    settings: dict[str, Any], method: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(GaugeError, match=said) as caught:
        plan_of(toy(settings, tmp_path), method)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["prompt", "prefix", "bottleneck"])
def test_methods_without_layers_of_peft_fit_grouped_weights(method: str, tmp_path: Path) -> None:
    assert plan_of(toy(GPTQ, tmp_path), method).base == "GPTQ 4 bit, from its config"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "no loader .NVFP4 of NVIDIA's ModelOpt.; use a 16-bit"),
        ({"quant_method": "fbgemm_fp8"}, "'fbgemm_fp8', for which transformers has no backward pass"),
        ({"quant_method": "hqq"}, "'hqq', for which peft-gauge cannot plan a step"),
        ({"bits": 4}, "stored with 'an unnamed method'"),
        ("fp8", "quantization_config is not an object"),
        ({**BNB_4BIT, "bnb_4bit_quant_type": "nf3"}, "no 4-bit format 'nf3'"),
        ({**GPTQ, "bits": 5}, "GPTQ with 5 bits cannot be planned"),
        ({**GPTQ, "bits": "4"}, "bits = '4' in its quantization_config is not a whole number"),
        ({**GPTQ, "group_size": 0}, "group_size = 0"),
        ({**AWQ, "version": "gemv"}, "AWQ version 'gemv'"),
        ({**FP8, "weight_block_size": [128]}, "weight_block_size = .128. must be two positive whole numbers"),
    ],
)
def test_a_format_that_cannot_be_planned_is_one_line(settings: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(GaugeError, match=said) as caught:
        toy(settings, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_config_whose_layers_all_stay_is_no_stored_base(tmp_path: Path) -> None:
    record = toy({**GPTQ, "modules_in_block_to_quantize": [["c_attn"]]}, tmp_path)
    with pytest.raises(GaugeError, match="no layer of LlamaForCausalLM is stored as GPTQ 4 bit"):
        models.build(record, device="meta")


def test_formats_of_old_and_nested_configs_are_read() -> None:
    old = stored_format({"quantization_config": {"load_in_8bit": True}}, "old")
    nested = stored_format({"text_config": {"quantization_config": GPTQ}}, "nested")
    assert (old and old.title, nested and nested.title) == ("INT8 (bitsandbytes)", "GPTQ 4 bit")
    assert stored_format({"quantization_config": {"quant_method": "gguf"}}, "gguf") is None


def test_a_name_that_speaks_of_a_format_is_remarked_on() -> None:
    record = models.resolve(str(published.path("llama-3.1-70b-instruct-fp8")))
    (remark,) = models.remarks(record)
    assert lacking(remark, "llama-3.1-70b-instruct-fp8", "no quantization_config", "not quantized") == []


# ---- published checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weight_bytes"),
    [
        # 4.127 bits a weight, and embedding and head in 16 bit; the checkpoint's file has 5.70 GB
        ("llama-3-8b-bnb-4bit", (5.69e9, 5.71e9)),
        ("llama-2-7b-gptq", (3.89e9, 3.91e9)),  # the checkpoint's file has 3.90 GB
        ("qwen3-30b-a3b-fp8", (31.1e9, 31.3e9)),  # a byte a weight and 0.03 % of scales; embedding and head in 16 bit
    ],
)
def test_a_published_checkpoint_takes_what_its_files_do(name: str, weight_bytes: tuple[float, float]) -> None:
    quantization.load_bitsandbytes()
    counted = counting.count(models.build(models.resolve(str(published.path(name))), device="meta", dtype="bfloat16"))
    low, high = weight_bytes
    assert low < counted.weight_bytes < high


def test_experts_in_fp8_are_planned(tmp_path: Path) -> None:
    found = plan_of(models.resolve(str(published.cut_file("qwen3-30b-a3b-fp8", tmp_path))), seq=16)
    experts = 2 * 4 * 3 * 2048 * 768
    attention = 2 * (2 * 2048 * 4096 + 2 * 2048 * 512)
    embedding, gates = 2 * 512 * 2048, 2 * 4 * 2048
    assert experts + attention < found.resident_by_category["base_weights"]
    assert found.resident_by_category["base_weights"] < experts + attention + 2 * (embedding + gates) + 100_000
    assert found.phase_of_peak == "backward"
    assert found.peak_by_category["dequantized_temporaries"] > 0


# ---- what a step keeps and dequantizes -------------------------------------------------------------------------------

ROWS, WIDTH, OUT = 48, 64, 128
KEPT = (ACTIVATIONS, DEQUANTIZED_TEMPORARIES)


def follow(settings: dict[str, Any], tmp_path: Path, rows: int = ROWS) -> tuple[StorageTracker, int]:
    """Forward and backward of one stored layer over ``rows`` bfloat16 rows; the bytes of its dequantized weight."""
    record = toy(settings, tmp_path)
    layer: Any = models.build(record, device="meta", dtype="bfloat16").get_submodule("model.layers.0.mlp.up_proj")
    mode, tracker = (
        FakeTensorMode(allow_non_fake_inputs=True),
        StorageTracker(operator_categories={stored_layers.DEQUANTIZE: DEQUANTIZED_TEMPORARIES}),
    )
    fakes.to_fake(layer, mode)
    with mode, stored_layers.kernels():
        x = torch.zeros(rows, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        tracker.adopt([x, *layer.parameters(), *layer.buffers()], INPUTS)
        with tracker:
            with tracker.phase(FORWARD):
                out = layer(x)
            with tracker.phase(BACKWARD):
                out.backward(out.detach())
    assert tracker.flops == 2 * (2 * rows * WIDTH * OUT)
    return tracker, WIDTH * OUT * 2


def test_gptq_keeps_its_dequantized_weight_for_backward(tmp_path: Path) -> None:
    tracker, weight = follow(GPTQ, tmp_path)
    assert tracker.kept_bytes(FORWARD, (ACTIVATIONS,)) == ROWS * OUT * 2
    assert tracker.kept_bytes(FORWARD, (DEQUANTIZED_TEMPORARIES,)) == weight


def test_awq_dequantizes_in_backward_and_keeps_nothing(tmp_path: Path) -> None:
    tracker, weight = follow(AWQ, tmp_path)
    assert tracker.kept_bytes(FORWARD, KEPT) == ROWS * OUT * 2
    assert DEQUANTIZED_TEMPORARIES not in tracker.peak(FORWARD).by_category
    assert tracker.peak(BACKWARD).by_category[DEQUANTIZED_TEMPORARIES] >= weight
    many, _ = follow(AWQ, tmp_path, rows=1025)
    assert many.peak(FORWARD).by_category[DEQUANTIZED_TEMPORARIES] >= weight


def test_fp8_dequantizes_in_backward_and_quantizes_its_input(tmp_path: Path) -> None:
    tracker, weight = follow(FP8, tmp_path)
    assert tracker.kept_bytes(FORWARD, KEPT) == ROWS * OUT * 2
    assert {record.nbytes for record in tracker.records} >= {ROWS * WIDTH, ROWS * (WIDTH // 32) * 4}
    assert tracker.peak(BACKWARD).by_category[DEQUANTIZED_TEMPORARIES] == weight


def test_the_kernels_of_fp8_are_given_back() -> None:
    from transformers.integrations import finegrained_fp8 as fp8

    before = fp8.load_finegrained_fp8_kernel, fp8._dequantize_fp8_weight
    with stored_layers.kernels():
        assert fp8.load_finegrained_fp8_kernel is not before[0]
    assert (fp8.load_finegrained_fp8_kernel, fp8._dequantize_fp8_weight) == before


# ---- measured --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fp8_here(request: pytest.FixtureRequest) -> None:
    """Skips what plans FP8 where the installed transformers has no backward pass over it."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    asks = "fp8" in request.node.originalname or params.get("settings") is FP8 or "fp8" in str(params.get("name"))
    try:
        from transformers.integrations import finegrained_fp8 as fp8
    except ImportError:
        fp8 = None
    if asks and not hasattr(fp8, "FP8LinearFunction"):
        pytest.skip("this transformers has no backward pass for FP8")


@pytest.fixture(scope="module")
def four_bit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers saves a model that it loaded in 4 bit."""
    quantization.load_bitsandbytes()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("saved")
    models.build(models.resolve("toy-llama", weights="random")).save_pretrained(folder / "plain")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=settings, dtype=torch.float32
    ).save_pretrained(folder / "four-bit")
    return folder / "four-bit"


def four_bit_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]


def test_a_saved_4_bit_folder_is_planned_as_it_is_measured(four_bit_folder: Path) -> None:
    record = models.resolve(str(four_bit_folder))
    loaded = models.build(record)
    planned = models.build(record, device="meta")
    assert record.weights == "real"
    assert four_bit_layers(loaded) == four_bit_layers(planned) != []
    assert counting.count(loaded) == counting.count(planned)
    found = plan_of(record, dtype="float32")
    assert found.base == "NF4, from its config"
    job = cases.build_job(case(record, methods.LORA))
    job.step()
    counted = counting.count(job.model)
    assert (counted.total_params, counted.trainable_params) == (found.total_params, found.trainable_params)


def case(record: models.ModelRecord, method: methods.Method) -> Case:
    return Case(record, method, StepSettings(1, 32), "cpu", "float32")


def test_full_fine_tuning_is_the_same_line_measured_and_planned(four_bit_folder: Path) -> None:
    record = models.resolve(str(four_bit_folder))
    with pytest.raises(GaugeError, match="full trains the base weights") as measured:
        cases.build_job(case(record, methods.FULL))
    with pytest.raises(GaugeError) as planned:
        plan_of(record, "full", dtype="float32")
    assert str(measured.value) == str(planned.value)


def test_a_base_that_is_qloras_already_stays_as_it_is(four_bit_folder: Path) -> None:
    job = cases.build_job(case(models.resolve(str(four_bit_folder)), methods.QLORA))
    assert four_bit_layers(job.model)


def test_drawn_weights_are_stored_as_the_config_says(tmp_path: Path) -> None:
    record = toy({**BNB_4BIT, "bnb_4bit_use_double_quant": True}, tmp_path)
    drawn = models.build(record)
    assert models.stored(record, "float32", tmp_path / "copy") == record, "small, and drawn again"
    assert four_bit_layers(drawn) == four_bit_layers(models.build(record, device="meta")) != []


@pytest.mark.parametrize("settings", [FP8, GPTQ, AWQ, MXFP4, COMPRESSED], ids=lambda each: each["quant_method"])
def test_other_formats_are_not_measured_and_say_why(settings: dict[str, Any], tmp_path: Path) -> None:
    record = toy(settings, tmp_path)
    with pytest.raises(GaugeError, match=r"is stored as .*; such weights can be planned .* but not measured"):
        models.build(record)


def test_constants_are_no_parameters_and_no_buffers(tmp_path: Path) -> None:
    model = models.build(toy(GPTQ, tmp_path), device="meta", dtype="bfloat16")
    counted = counting.count(model)
    assert counted.total_params == 106_816
    rotary = sum(counting.nbytes(buffer) for name, buffer in model.named_buffers() if "inv_freq" in name)
    assert counted.buffer_bytes == rotary
    assert QUANTIZATION_CONSTANTS in plan_of(toy(GPTQ, tmp_path)).resident_by_category
