"""Every method trains exactly what it should, starts where it should, and comes back from disk as it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from peft_gauge.errors import GaugeError
from peft_gauge.training import methods, models
from peft_gauge.training.cases import Case, build_job
from peft_gauge.training.settings import StepSettings
from tests.support import published_models as published

if TYPE_CHECKING:
    from peft_gauge.training.methods import Method
    from peft_gauge.training.step import TrainingJob


# Builds, plans or trains models: seconds, which are too long for the unit tests.
pytestmark = pytest.mark.integration
EVERY = [*methods.METHODS.values()]

TOY = models.resolve("toy-llama", weights="random")
LARGER = published.first_layers("smollm2-135m", 4, vocab_size=2048)
RECORDS = {record.name: record for record in (TOY, LARGER)}

Base = Callable[[str], Any]
IDS = torch.arange(1, 9).unsqueeze(0)


@pytest.fixture(scope="module")
def base() -> Base:
    """A fresh base model with seeded random weights; each is built once and copied."""
    built: dict[str, Any] = {}

    def fresh(name: str) -> Any:
        if name not in built:
            built[name] = models.build(RECORDS[name])
        return copy.deepcopy(built[name])

    return fresh


def logits(model: nn.Module) -> Tensor:
    """What ``model`` makes of `IDS`; a prompt's virtual tokens come first and are cut off.

    Only dropout is switched off. In evaluation mode bitsandbytes repacks 4-bit weights on CPUs with native
    bfloat16, and the repacked layer cannot be trained further.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    model.train()
    return found[:, -IDS.shape[1] :]


def job_for(method: Method, model: str, base: Any) -> TrainingJob:
    settings = StepSettings(batch=1, seq=8, learning_rate=1e-2)
    return build_job(Case(RECORDS[model], method, settings, "cpu", "float32"), base=base)


@dataclass
class Life:
    """A method attached to a model, trained for two steps, with what it was before."""

    method: Method
    model: str
    job: TrainingJob
    start_logits: Tensor
    before: dict[str, Tensor]
    trained_logits: Tensor


# The variants differ from their parents in numbers; the seven are enough on the larger model.
PAIRS = [(method, "toy-llama") for method in EVERY] + [(method, LARGER.name) for method in methods.DEFAULT_METHODS]


@pytest.fixture(scope="module", params=PAIRS, ids=[f"{method.name}-{model}" for method, model in PAIRS])
def life(request: pytest.FixtureRequest, base: Base) -> Life:
    method, model = request.param
    job = job_for(method, model, base(model))
    start = logits(job.model)
    before = {name: p.detach().clone() for name, p in job.model.named_parameters()}
    job.step()
    job.step()
    return Life(method, model, job, start, before, logits(job.model))


def test_exactly_the_intended_parameters_train(life: Life) -> None:
    parameters = dict(life.job.model.named_parameters())
    moved = {name for name, p in parameters.items() if not torch.equal(p.detach(), life.before[name])}
    intended = {name for name, p in parameters.items() if p.requires_grad}
    assert moved == intended
    assert all(p.grad is not None and p.grad.isfinite().all() for p in life.job.trainable)
    if life.method.kind != "full":
        marks = ("lora_", "prompt_encoder", "ia3_", "adapter")
        assert all(any(mark in name for mark in marks) for name in intended)


def test_the_output_at_the_start(life: Life, base: Base) -> None:
    reference = logits(methods.prepare_base(base(life.model), life.method))
    if life.method.starts_as_base:
        torch.testing.assert_close(life.start_logits, reference, rtol=0, atol=0)
    else:
        assert not torch.allclose(life.start_logits, reference), f"{life.method.name} starts as the base after all"


def test_save_and_load(life: Life, base: Base, tmp_path: Path) -> None:
    assert not torch.equal(life.trained_logits, life.start_logits)  # else an adapter that is lost goes unnoticed

    written = methods.save(life.job.model, life.method, tmp_path)

    assert written == sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors")) > 0
    loaded = methods.load(base(life.model), life.method, tmp_path)
    torch.testing.assert_close(logits(loaded), life.trained_logits, rtol=0, atol=0)


@pytest.mark.parametrize("method", [m for m in EVERY if m.merges and m.quantization is None], ids=lambda m: m.name)
def test_merging_keeps_the_output(method: Method, base: Base) -> None:
    job = job_for(method, "toy-llama", base("toy-llama"))
    job.step()
    job.step()
    before = logits(job.model)
    model: Any = job.model
    merged = logits(model.merge_and_unload())
    # Rounding only: two sums of at most 128 terms a layer in float32.
    torch.testing.assert_close(merged, before, rtol=1e-4, atol=1e-5)


def test_ranks_and_targets_of_the_variants() -> None:
    assert methods.get("lora-r8").peft_config["r"] == 8
    assert methods.get("lora-r8").peft_config["lora_alpha"] == 16
    assert methods.get("lora-r8").peft_config["target_modules"] == methods.ATTENTION
    assert methods.get("lora-qv").peft_config["target_modules"] == methods.ATTENTION_QV
    assert {f"lora-r{r}" for r in (2, 4, 8, 32, 64)} <= set(methods.METHODS)


def test_effective_settings_are_read_back(base: Base) -> None:
    attached = methods.attach(base("toy-llama"), methods.LORA)
    found = methods.effective_settings(attached, methods.LORA)
    assert found["r"] == 16
    assert found["lora_alpha"] == 32
    assert found["lora_dropout"] == 0.05
    assert found["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_16_bit_adapters_stay_16_bit_only_where_asked() -> None:
    record = models.resolve("toy-llama")
    kept = methods.attach(models.build(record, dtype="bfloat16"), methods.get("lora-16bit"))
    cast = methods.attach(models.build(record, dtype="bfloat16"), methods.get("lora"))
    assert {p.dtype for p in kept.parameters() if p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in cast.parameters() if p.requires_grad} == {torch.float32}


def test_a_prepared_base_is_cast_and_an_unprepared_one_is_not() -> None:
    record = models.resolve("toy-llama")
    prepared = methods.attach(models.build(record, dtype="bfloat16"), methods.get("qlora"))
    unprepared = methods.attach(models.build(record, dtype="bfloat16"), methods.get("qlora-unprepared"))
    assert _embedding(prepared).dtype == torch.float32
    assert _embedding(unprepared).dtype == torch.bfloat16


def _embedding(model: Any) -> Tensor:
    weight: Tensor = model.get_input_embeddings().weight
    return weight


def test_checkpointing_is_off_unless_asked_for_and_still_trains() -> None:
    record = models.resolve("toy-llama")
    for wanted in (False, True):
        case = Case(record, methods.QLORA, StepSettings(1, 16, grad_checkpointing=wanted), "cpu", "float32")
        job = build_job(case)
        assert bool(job.model.is_gradient_checkpointing) is wanted
        job.warm_up()
        assert job.learned()


def test_the_same_seed_draws_the_same_adapter(base: Base) -> None:
    def drawn(seed: int) -> list[Tensor]:
        attached = methods.attach(base("toy-llama"), methods.LORA, seed=seed)
        return [p.detach() for p in attached.parameters() if p.requires_grad]

    assert all(torch.equal(a, b) for a, b in zip(drawn(3), drawn(3), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(drawn(3), drawn(4), strict=True))


# ---- adapter configs from files ------------------------------------------------------------------------------------


def config_file(folder: Path, **values: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    "values",
    [
        {"peft_type": "LOHA", "r": 4, "target_modules": ["q_proj", "v_proj"]},
        {"peft_type": "VERA", "r": 8, "target_modules": ["q_proj"], "projection_prng_key": 1},
        {"peft_type": "LORA", "r": 4, "use_dora": True, "target_modules": "all-linear"},
        {"peft_type": "P_TUNING", "num_virtual_tokens": 4, "encoder_hidden_size": 16},
    ],
    ids=lambda values: values["peft_type"],
)
def test_an_adapter_config_of_any_type_is_a_method(values: dict[str, Any], tmp_path: Path, base: Base) -> None:
    method = methods.from_adapter_config(config_file(tmp_path, **values))
    job = job_for(method, "toy-llama", base("toy-llama"))
    job.warm_up()
    assert job.learned()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"r": 4}, "has no peft_type"),
        ({"peft_type": "LORAX"}, "unknown PEFT type 'LORAX'; did you mean LORA"),
        ({"peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM"}, "is an adapter for the task SEQ_2_SEQ_LM; only causal"),
        ({"peft_type": "LORA", "r": 4, "target_modules": ["nowhere"]}, "nowhere"),
        ({"peft_type": "LORA", "r": 0, "target_modules": ["q_proj"]}, "rank 0 is not a whole number of at least 1"),
        (
            {"peft_type": "LORA", "r": 10**9, "target_modules": ["q_proj"]},
            "above the largest matrix rank in this model; use 64",
        ),
        ({"peft_type": "LORA", "r": "many", "target_modules": ["q_proj"]}, "rank 'many' is not a whole number"),
        ({"peft_type": "LORA", "r": True, "target_modules": ["q_proj"]}, "rank True is not a whole number"),
        ({"peft_type": "VERA", "r": 0, "target_modules": ["q_proj"]}, "rank 0 is not a whole number"),
        ({"peft_type": "OFT", "r": -1, "target_modules": ["q_proj"]}, "rank -1 is not a whole number"),
        ({"peft_type": "ADALORA", "init_r": 99, "total_step": 9}, "rank 99 is above the largest matrix rank"),
        (
            {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 65}},
            "rank 65 for q_proj is above the largest matrix rank in this model; use 64",
        ),
        (
            {"peft_type": "LOKR", "r": 4, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 0}},
            "rank 0 for q_proj is not a whole number of at least 1",
        ),
        (
            {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "rank_pattern": [8]},
            r"rank_pattern must map module names to numbers, got \[8\]",
        ),
        (
            {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "alpha_pattern": {"q_proj": "high"}},
            "alpha 'high' for q_proj is not a finite number",
        ),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": None, "alpha": float("nan")}, "alpha nan for alpha"),
    ],
)
def test_an_unusable_adapter_config_is_one_line(values: dict[str, Any], said: str, tmp_path: Path, base: Base) -> None:
    with pytest.raises(GaugeError, match=said) as caught:
        methods.attach(base("toy-llama"), methods.from_adapter_config(config_file(tmp_path, **values)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"peft_type": "LORA", "r": 64, "rank_pattern": {"q_proj": 64}, "alpha_pattern": {"q_proj": 0.5}},
        {"peft_type": "LOKR", "r": 100_000, "rank_pattern": {"q_proj": 7}},  # a full matrix in place of the product
        {"peft_type": "VERA", "r": 256},  # the width of projections that are shared and frozen
        {"peft_type": "PVERA", "r": 256},
        {"peft_type": "RANDLORA", "r": 256},
        {"peft_type": "OFT", "r": 0, "oft_block_size": 16},
        {"peft_type": "OFT", "r": 8, "oft_block_size": 0},
        {"peft_type": "HRA", "r": 100},  # reflections, of a vector as long as the input
        {"peft_type": "SUPERTUNING", "r": None},
        {"peft_type": "DEFT", "r": 100},
    ],
    ids=lambda values: f"{values['peft_type']}-{values['r']}",
)
def test_r_means_what_it_means_to_its_type(values: dict[str, Any], tmp_path: Path, base: Base) -> None:
    import peft

    if values["peft_type"] not in list(peft.PeftType):
        pytest.skip(f"this PEFT has no {values['peft_type']}")
    values = {**values, "target_modules": ["q_proj", "v_proj"]}
    expected = peft.get_peft_model(base("toy-llama"), peft.PeftConfig.from_peft_type(task_type="CAUSAL_LM", **values))
    found = methods.attach(base("toy-llama"), methods.from_adapter_config(config_file(tmp_path, **values)))
    shapes = [(name, p.shape) for name, p in found.named_parameters() if p.requires_grad]
    assert shapes == [(name, p.shape) for name, p in expected.named_parameters() if p.requires_grad]


def test_a_saved_rank_pattern_of_adalora_is_no_pattern_of_ranks(base: Base) -> None:
    settings = {"peft_type": "ADALORA", "rank_pattern": {"q_proj.lora_E": [True, False]}}
    methods.check_ranks(settings, 64, "mine")


def test_sizes_of_virtual_tokens_are_those_of_the_model(tmp_path: Path, base: Base) -> None:
    """A saved config holds those of the model that it was trained on."""
    saved = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, "token_dim": 999, "num_layers": 7,
             "num_attention_heads": 3, "num_transformer_submodules": 2}  # fmt: skip
    attached = methods.attach(base("toy-llama"), methods.from_adapter_config(config_file(tmp_path, **saved)))
    assert sum(p.numel() for p in attached.parameters() if p.requires_grad) == 4 * 2 * 2 * 32  # keys, values; 2 layers


def test_a_folder_with_an_adapter_config_is_one_and_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    path = config_file(folder, peft_type="LORA", r=4)
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert methods.from_adapter_config(folder) == methods.from_adapter_config(path)
    assert methods.from_adapter_config(folder).name == "mine"
    with pytest.raises(GaugeError, match=f"no adapter_config.json in {tmp_path}"):
        methods.from_adapter_config(tmp_path)

    bottleneck = {"adapter_type": "bottleneck", "style": "pfeiffer", "reduction_factor": 8, "nonlinearity": "relu"}
    path.write_text(json.dumps(bottleneck), encoding="utf-8-sig")
    assert methods.from_adapter_config(folder).kind == "bottleneck"


def test_a_type_that_was_renamed_is_named_as_it_is_called_now(tmp_path: Path) -> None:
    import peft

    if "BONE" in list(peft.PeftType):
        pytest.skip("this PEFT still has BONE")
    with pytest.raises(GaugeError, match="unknown PEFT type 'BONE': it is now called MISS"):
        methods.from_adapter_config(config_file(tmp_path, peft_type="BONE", r=4))


def test_a_bottleneck_config_is_a_method_too(tmp_path: Path, base: Base) -> None:
    values = {"adapter_type": "bottleneck", "style": "pfeiffer", "reduction_factor": 8, "nonlinearity": "relu"}
    method = methods.from_adapter_config(config_file(tmp_path, **values))
    job = job_for(method, "toy-llama", base("toy-llama"))
    m, d, blocks = 64 // 8, 64, 2
    assert sum(p.numel() for p in job.trainable) == blocks * (2 * m * d + d + m)


def test_broken_and_missing_adapter_configs(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(GaugeError, match="not readable JSON"):
        methods.from_adapter_config(broken)
    with pytest.raises(GaugeError, match="no adapter config at"):
        methods.from_adapter_config(tmp_path / "missing.json")


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(GaugeError, match="did you mean qlora or lora"):
        methods.get("qlorra")


@pytest.fixture(autouse=True)
def same_draws() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
