"""``--attention``: what each kind keeps, which architectures have it, and that the libraries are left as they were."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest

from peft_gauge.errors import GaugeError
from peft_gauge.plan import flash_attention, planner
from peft_gauge.plan.record import Plan, PlanRequest
from peft_gauge.report.terminal import plan_table
from peft_gauge.training import methods, models
from peft_gauge.training.settings import StepSettings
from tests.support import published_models as published
from tests.support.facts import lacking

# Each trains or plans a real model in the process: seconds, not milliseconds.
pytestmark = pytest.mark.integration

if TYPE_CHECKING:
    from pathlib import Path

TOY = models.resolve("toy-llama", weights="random")  # four heads, two of keys
FLASH = "flash_attention_2"
BEFORE_5 = int(version("transformers").split(".")[0]) < 5


planned = cache(planner.plan)  # the tests compare the same steps


def plan_of(record: models.ModelRecord = TOY, method: str = "lora", **how: Any) -> Plan:
    return planned(PlanRequest(record, methods.get(method), StepSettings(2, 64), **how))


def test_flash_keeps_what_sdpas_flash_keeps() -> None:
    """Without a mask, in 16 bit, CUDA's sdpa is the same kernel."""
    flash, sdpa = plan_of(attention=FLASH), plan_of(attention="sdpa")
    assert (flash.settings["attention"], sdpa.settings["attention"]) == (FLASH, "sdpa")
    assert flash.peak_by_category == sdpa.peak_by_category
    assert flash.flops_per_step == sdpa.flops_per_step


def test_eager_keeps_a_matrix_of_weights() -> None:
    quadratic = 2 * 2 * 4 * 64 * 64 * 2  # layers, rows, heads, tokens × tokens, 16 bit
    eager, sdpa = plan_of(attention="eager"), plan_of(attention="sdpa")
    tokens = 2 * 64
    assert tokens * (eager.saved_activation_bytes_per_token - sdpa.saved_activation_bytes_per_token) > quadratic


def test_flash_casts_float32_activations_and_sdpa_does_not() -> None:
    """A base prepared for k-bit training has float32 norms: sdpa has no fused kernel for grouped heads in float32."""
    pytest.importorskip("bitsandbytes")
    flash, sdpa = plan_of(method="qlora", attention=FLASH), plan_of(method="qlora", attention="sdpa")
    assert flash.saved_activation_bytes_per_token < sdpa.saved_activation_bytes_per_token


@pytest.mark.slow
def test_the_option_reaches_the_plan_also_where_it_is_the_first_to_import_transformers(
    run_command: Callable[..., tuple[int, str, str]],
) -> None:
    """The command plans in a process of its own: what is imported while flash-attn stands in must stay imported."""
    pytest.importorskip("bitsandbytes")
    arguments = ("plan", "--model", "toy-llama", "--method", "qlora", "--batch", "2", "--seq", "64")
    code, out, err = run_command(*arguments, "--attention", FLASH, "--json")
    assert (code, err) == (0, "")
    (found,) = json.loads(out)
    assert found["settings"]["attention"] == FLASH
    assert "nf4" in found["base"].lower()
    assert found["peak_bytes"] == plan_of(method="qlora", attention=FLASH).peak_bytes


def test_flash_copies_the_rows_of_a_padded_batch() -> None:
    padded, unpadded = plan_of(attention=FLASH, padded=True), plan_of(attention=FLASH)
    assert padded.saved_activation_bytes_per_token > unpadded.saved_activation_bytes_per_token, "indices of rows"
    masked = plan_of(attention="sdpa", padded=True)
    assert padded.saved_activation_bytes_per_token < masked.saved_activation_bytes_per_token, "no matrix of a mask"


def test_none_is_sdpa_where_there_is_one() -> None:
    assert plan_of().settings["attention"] == "sdpa"
    assert plan_of().peak_by_category == plan_of(attention="sdpa").peak_by_category


@pytest.mark.parametrize("name", ["falcon-7b", "gemma-2-2b", "gpt-j-6b", "deepseek-v2-lite"])
def test_architectures_with_flash_are_planned(name: str, tmp_path: Path) -> None:
    """One with a class of its own for it, with softcapping, with heads of 256, and with values narrower than keys."""
    if name == "deepseek-v2-lite" and BEFORE_5:
        pytest.skip("transformers 4 cuts the output of its flash attention twice")
    record = models.resolve(str(published.cut_file(name, tmp_path)))
    assert plan_of(record, "bottleneck", attention=FLASH).settings["attention"] == FLASH


@pytest.mark.parametrize(
    ("name", "attention", "said"),
    [
        ("bloom-560m", "sdpa", "BloomForCausalLM has no sdpa attention in transformers .*; use eager"),
        ("bloom-560m", FLASH, "BloomForCausalLM has no flash_attention_2 in transformers .*; use sdpa or eager"),
        ("gpt-oss-20b", FLASH, "has no flash_attention_2 in .*; it supports .*, which cannot be planned; use sdpa"),
        ("gpt2", "flash", "unknown attention 'flash'"),
    ],
)
def test_attention_that_is_not_there_is_one_line(name: str, attention: str, said: str, tmp_path: Path) -> None:
    if name == "gpt-oss-20b" and BEFORE_5:
        pytest.skip("transformers 4 does not say which flash attention this architecture takes")
    record = models.resolve(str(published.cut_file(name, tmp_path)))
    with pytest.raises(GaugeError, match=said) as caught:
        plan_of(record, "full", attention=attention)
    assert "\n" not in str(caught.value)


def test_heads_too_wide_for_flash_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "wide.json").write_text(json.dumps({**TOY.config, "head_dim": 264}))
    with pytest.raises(GaugeError, match="no kernel for head dimension 264 .*; use --attention sdpa"):
        plan_of(models.resolve(str(tmp_path / "wide.json")), attention=FLASH)


def test_flash_in_single_precision_is_one_line() -> None:
    with pytest.raises(GaugeError, match="flash attention needs 16-bit tensors; use --dtype bfloat16"):
        plan_of(attention=FLASH, dtype="float32")


def test_the_libraries_are_left_as_they_were() -> None:
    from transformers import masking_utils, modeling_utils
    from transformers import modeling_flash_attention_utils as utils

    def state() -> list[object]:
        patched = utils.is_flash_attn_2_available, utils._upad_input, utils._is_packed_sequence
        own = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[FLASH], vars(modeling_utils.PreTrainedModel)
        return [*patched, own[0], dict(own[1]), sys.modules.get("flash_attn")]

    before = state()
    with flash_attention.package():
        assert state() != before
    assert state() == before


def test_an_unknown_kind_of_attention_is_bad_input(run_command: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = run_command("plan", "--model", "toy-llama", "--attention", "flash")
    assert code == 2
    assert lacking(err, "'flash'", "eager, flash_attention_2, sdpa") == []


def test_the_title_names_attention_and_a_stored_base(tmp_path: Path) -> None:
    plain = plan_of().as_json()
    assert plan_table.title([plain]) == "toy-llama planned, 2×64 tokens, bfloat16, adamw, sdpa attention"
    config = {**TOY.config, "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    (tmp_path / "toy.json").write_text(json.dumps(config))
    stored = plan_of(models.resolve(str(tmp_path / "toy.json"))).as_json()
    assert plan_table.title([stored]).endswith("sdpa attention\nbase: GPTQ 4 bit, from its config")
