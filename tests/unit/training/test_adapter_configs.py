"""Adapter configs as people publish them, each against what PEFT itself makes of it, or refused with the reason.

`data/adapters/` holds configs from public reports, some shortened. PEFT's count is taken on ``meta``, without this
suite's code, on the model that the config is for.
"""

from __future__ import annotations

import json
from typing import Any

import peft
import pytest
from transformers import CONFIG_MAPPING

from peft_gauge.errors import GaugeError
from peft_gauge.plan.planner import plan
from peft_gauge.plan.record import PlanRequest
from peft_gauge.training import methods, models
from peft_gauge.training.cases import count_on_meta
from peft_gauge.training.settings import StepSettings
from tests.support.paths import DATA

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::UserWarning")]

FOLDER = DATA / "adapters"
TOY = models.resolve("toy-llama", weights="random")
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip


def cut(architecture: str, **sizes: Any) -> models.ModelRecord:
    config = {"model_type": architecture, **SIZES, **sizes}
    return models.ModelRecord(architecture, "folder", json.dumps(config), "random")


MIXTRAL = cut("mixtral", num_local_experts=4)
QWEN3_MOE = cut("qwen3_moe", head_dim=16, num_experts=4, moe_intermediate_size=32)
GEMMA4 = cut(
    "gemma4",
    text_config={**SIZES, "head_dim": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 72},
)

# The counts of toy-llama by hand: two layers, q 64×64, k and v 32×64, o 64×64, gate and up 128×64.
PLANNED = {
    ("bom", TOY): 2 * 8 * ((64 + 64) + (64 + 32)),
    ("lokr", TOY): 448,
    ("lokr_full", TOY): 448,  # of q 8×8 and 8×8, of v 4×8 and 8×8: r is above all of these
    ("oft_new", TOY): 2 * 2 * (64 // 32) * (32 * 31 // 2),
    ("oft_real_r0", TOY): 2 * (64 // 16) * (16 * 15 // 2),
    ("vera", TOY): 2 * 2 * (256 + 64),
    ("vera_default", TOY): 2 * 2 * (256 + 64),
    ("target_parameters", MIXTRAL): 2 * 8 * 4 * ((64 + 256) + (128 + 64)),
    ("target_parameters", QWEN3_MOE): 2 * 8 * 4 * ((64 + 64) + (32 + 64)),
    ("gemma4_regex", GEMMA4): None,  # what PEFT counts
}

REFUSED = {
    ("bert_seqcls_save_classifier", TOY): "is an adapter for the task SEQ_CLS; only causal language modeling",
    ("ptuning_old_saved", TOY): "is an adapter for the task SEQ_CLS; only causal language modeling",
    ("rank0_pattern", TOY): "rank 999 for q_proj is above the largest matrix rank in this model; use 64",
    ("gemma4_regex", TOY): "gemma4_regex does not fit llama: .*language_model.* not found in the base model",
    ("target_parameters", TOY): "target_parameters does not fit llama: .*no `target_parameters` found",
}


def ids(table: Any) -> list[str]:
    return [f"{name}-{model.name}" for name, model in table]


def counted_by_peft(name: str, model: models.ModelRecord) -> int:
    values = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8-sig"))
    config = peft.PeftConfig.from_peft_type(**{**values, "inference_mode": False})
    attached = peft.get_peft_model(models.build(model, device="meta", attn_implementation="eager"), config)
    return sum(p.numel() for p in attached.parameters() if p.requires_grad)


def skip_unless_known(model: models.ModelRecord, name: str) -> None:
    if model.config["model_type"] not in CONFIG_MAPPING:
        pytest.skip("this transformers has no such architecture")
    if name == "target_parameters" and not hasattr(peft.LoraConfig(), "target_parameters"):
        pytest.skip("this PEFT has no target_parameters")


def test_every_config_is_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == {name for name, _ in (*PLANNED, *REFUSED)} | {"prompt_text"}


@pytest.mark.parametrize(("name", "model"), PLANNED, ids=ids(PLANNED))
def test_a_config_is_planned_with_pefts_own_count(name: str, model: models.ModelRecord) -> None:
    skip_unless_known(model, name)
    method = methods.from_adapter_config(FOLDER / f"{name}.json")
    found = plan(PlanRequest(model, method, StepSettings(1, 8), attention="eager"))

    assert found.trainable_params == counted_by_peft(name, model)
    assert PLANNED[name, model] in (None, found.trainable_params)
    assert found.adapted_modules


@pytest.mark.parametrize(("name", "model"), REFUSED, ids=ids(REFUSED))
def test_a_config_that_cannot_be_planned_says_why(name: str, model: models.ModelRecord) -> None:
    with pytest.raises(GaugeError, match=REFUSED[name, model]) as caught:
        plan(PlanRequest(model, methods.from_adapter_config(FOLDER / f"{name}.json"), StepSettings(1, 8)))
    assert "\n" not in str(caught.value)


def test_a_text_initialisation_is_planned_without_a_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 tokens as wide as the model, not as the one that the config was saved from (1024)."""
    import transformers

    def no_tokenizer(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tokenizer was asked for")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", no_tokenizer)
    method = methods.from_adapter_config(FOLDER / "prompt_text.json")
    found = plan(PlanRequest(TOY, method, StepSettings(1, 8)))

    assert found.trainable_params == count_on_meta(TOY, method).trainable_params == 8 * 64
    assert "Virtual tokens are not initialised from TEXT: shapes only." in found.warnings


def test_with_weights_a_text_initialisation_looks_for_its_tokenizer_on_this_machine_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import transformers

    asked: dict[str, Any] = {}

    def lost(name: str, **options: Any) -> Any:
        asked.update(options, name=name)
        raise OSError("not here")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lost)
    with pytest.raises(GaugeError, match="prompt_text does not fit llama: not here"):
        methods.attach(models.build(TOY), methods.from_adapter_config(FOLDER / "prompt_text.json"))
    assert asked == {"name": "bigscience/bloomz-560m", "local_files_only": True}
