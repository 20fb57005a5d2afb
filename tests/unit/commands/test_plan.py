"""``peft-gauge plan``: its JSON, its exit codes and its table (its processes: `integration/test_plan_workers.py`)."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from rich.console import Console

from peft_gauge.commands.plan_step import adjusted
from peft_gauge.memory.categories import CATEGORIES
from peft_gauge.plan import planner
from peft_gauge.plan.record import Plan, PlanRequest
from peft_gauge.report.format import ABSENT
from peft_gauge.report.terminal import plan_table
from peft_gauge.training import methods, models
from peft_gauge.training.settings import StepSettings
from tests.support.paths import DATA
from tests.support.planning import plan_here

# Builds, plans or trains models: seconds, which are too long for the unit tests.
pytestmark = pytest.mark.integration

TOY = models.resolve("toy-llama", weights="random")
OFT = DATA / "adapters" / "oft_new.json"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[PlanRequest]:
    """Plans without a process of their own, which would import the libraries again; returns what was asked."""
    return plan_here(monkeypatch)


@pytest.fixture
def run(run_command: Run) -> Run:
    """``run("--json", …)`` is ``peft-gauge plan --model toy-llama …``: exit code, standard output, standard error."""

    def command(*arguments: str, model: str = "toy-llama") -> tuple[int, str, str]:
        return run_command("plan", "--model", model, "--seq", "32", *arguments)

    return command


def test_all_seven_are_the_default(run: Run, in_process: list[PlanRequest]) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    assert [request.method for request in in_process] == list(methods.DEFAULT_METHODS)
    assert all(method.name in out for method in methods.DEFAULT_METHODS)


def test_options_reach_the_request(run: Run, in_process: list[PlanRequest]) -> None:
    run(
        "--method", "lora", "--quantize", "fp4", "--no-double-quant", "--dtype", "float16", "--batch", "3",
        "--optimizer", "sgd", "--grad-checkpointing", "--checkpoint-reentrant", "--grad-accumulation", "2",
        "--clip-grad-norm", "1.5", "--no-autocast-adapter-dtype", "--no-prepare-kbit", "--loss", "chunked", "--padded",
        "--use-cache", "--json",
    )  # fmt: skip
    quantization = methods.Quantization("fp4", double_quant=False)
    changed = replace(methods.LORA, quantization=quantization, autocast_adapter_dtype=False, prepare_kbit=False)
    settings = StepSettings(3, 32, optimizer="sgd", grad_checkpointing=True, grad_accumulation=2, clip_grad_norm=1.5)
    expected = PlanRequest(
        TOY, changed, settings, dtype="float16", loss="chunked", padded=True, use_cache=True, checkpoint_reentrant=True
    )
    assert in_process == [expected]


def test_a_trainers_defaults_are_its_own_unless_given(run: Run, in_process: list[PlanRequest]) -> None:
    run(
        "--method",
        "lora",
        "--loop",
        "sft",
        "--batch",
        "2",
        "--set",
        "packing=true",
        "--set",
        "optim=sgd",
        "--set",
        "learning_rate=1e-4",
    )
    run("--method", "lora", "--loop", "trainer", "--no-grad-checkpointing", "--clip-grad-norm", "0")
    sft, trainer = in_process
    default = "adamw-fused" if Version(torch.__version__) >= Version("2.8") else "adamw"
    assert sft.settings == StepSettings(
        2, 32, learning_rate=1e-4, optimizer="sgd", grad_checkpointing=True, clip_grad_norm=1.0, mixed_precision="bf16"
    )
    assert (sft.dtype, sft.trainer_arguments, sft.packed) == ("float32", (("packing", True),), True)
    assert trainer.settings == StepSettings(4, 32, learning_rate=5e-5, optimizer=default, clip_grad_norm=None)
    assert (trainer.dtype, trainer.trainer_arguments, trainer.packed) == ("bfloat16", (), False)


def test_a_newly_quantized_base_is_prepared_unless_told_otherwise() -> None:
    assert adjusted(methods.LORA, "nf4", None, None, None).prepare_kbit
    assert not adjusted(methods.LORA, "nf4", None, None, False).prepare_kbit
    assert adjusted(methods.QLORA, None, False, None, None).quantization == methods.Quantization("nf4", False)
    assert adjusted(methods.LORA, None, False, None, None) == methods.LORA


def test_an_adapter_config_is_a_method(run: Run, in_process: list[PlanRequest], tmp_path: Path) -> None:
    path = tmp_path / "mine" / "adapter_config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}))
    code, out, _ = run("--adapter", str(path), "--json")
    assert code == 0
    assert [case["method"] for case in json.loads(out)] == ["mine"]
    assert json.loads(out)[0]["trainable_params"] == 2 * 4 * (64 + 64)


def test_the_exit_code_says_whether_it_fits(run: Run, in_process: list[PlanRequest]) -> None:
    assert run("--method", "lora", "--gpu", "24GB")[0] == 0
    code, out, _ = run("--method", "lora", "--gpu", "24GB", "--gpu", "500MB", "--json")
    assert code == 1
    assert json.loads(out)[0]["fits"] == {"24GB": True, "500MB": False}


def test_find_reports_the_plan_at_what_it_found(run: Run, in_process: list[PlanRequest]) -> None:
    code, out, _ = run("--method", "lora", "--gpu", "24GB", "--gpu", "500MB", "--find", "rank", "--json")
    large, small = json.loads(out)
    assert code == 1
    assert large["find"] == {"quantity": "rank", "gpu": "24GB", "value": 64, "at_limit": True}
    assert large["settings"]["rank"] == 64
    assert small["find"]["value"] is None
    text = shown([large, small])
    assert "rank 64 (the model's limit)" in text
    assert ABSENT in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "loar"), "did you mean lora"),
        (("--optimizer", "adam"), "unknown optimizer"),
        (("--gpu", "RTX 4091"), "nearest: "),
        (("--find", "batch"), "requires --gpu"),
        (("--find", "width", "--gpu", "24GB"), "unknown quantity"),
        (("--find", "rank", "--gpu", "24GB", "--method", "prompt"), "no rank"),
        (("--find", "rank", "--gpu", "24GB", "--adapter", str(OFT)), "no rank"),
        (("--quantize", "nf5"), "unknown quantized layer format"),
        (("--quantize", "nf4", "--method", "full"), "cannot be quantized"),
        (("--dtype", "float8"), "unknown dtype"),
        (("--loss", "none"), "unknown loss"),
        (("--batch", "0"), "batch must be at least 1"),
        (("--seq", "1"), "--seq must be at least 2"),
        (("--loss-chunk", "512", "--method", "lora"), "--loss-chunk needs --loss chunked"),
        (("--loss", "chunked", "--loss-chunk", "0", "--method", "lora"), "at least 1 token"),
        (("--advise", "--find", "seq", "--gpu", "24GB"), "--advise and --find exclude each other"),
        (("--loop", "trl"), "unknown loop"),
        (("--set", "packing=true"), "packing is an argument of a trainer"),
        (("--loop", "sft", "--set", "packing"), "is not KEY=VALUE"),
        (("--loop", "sft", "--set", "pocking=true"), "SFTConfig has no argument 'pocking'"),
        (("--loop", "trainer", "--set", "optim=adamx"), "adamx is not a valid OptimizerNames"),
        (("--loop", "trainer", "--optimizer", "adamx"), "unknown optimizer 'adamx'"),
        (("--loop", "trainer", "--mixed-precision", "fp8"), "unknown mixed precision"),
        (("--loop", "trainer", "--use-cache", "--method", "lora"), "--use-cache is for --loop plain"),
        (("--loop", "sft", "--loss", "chunked", "--method", "lora"), "--loss chunked is for --loop plain"),
        (("--loop", "trainer", "--optimizer", "lomo", "--method", "lora"), "lomo_optim"),
        (("--clip-grad-norm", "-1"), "--clip-grad-norm must be positive"),
        (("--adapter", "nowhere.json"), "no adapter config"),
        (("--batch", "99999999999", "--seq", "99999999999", "--method", "lora"), "overflows"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run: Run, in_process: list[PlanRequest], arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert message in err
    assert err.startswith("peft-gauge: ")
    assert err.count("\n") == 1
    assert not out.strip()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5"}, "is an encoder-decoder model"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "x.Y"}}, "custom code"),
    ],
)
def test_models_that_are_not_supported_are_refused(
    run: Run, in_process: list[PlanRequest], tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, _, err = run(model=str(tmp_path))
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_case_that_cannot_be_planned_does_not_stop_the_others(
    run: Run, in_process: list[PlanRequest], tmp_path: Path
) -> None:
    path = tmp_path / "lost.json"
    path.write_text(json.dumps({"peft_type": "LORA", "target_modules": ["nothing"]}))
    code, out, err = run("--adapter", str(path), "--method", "ia3", "--json")
    cases = {case["method"]: case for case in json.loads(out)}
    assert code == 2
    assert set(cases["lost"]) == {"model", "method", "error"}
    assert cases["lost"]["error"] in err
    assert cases["ia3"]["peak_bytes"] > 0


def test_adapters_that_cannot_be_used_cost_the_others_nothing(
    run: Run, in_process: list[PlanRequest], tmp_path: Path
) -> None:
    folder = tmp_path / "good"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}))
    (tmp_path / "bone.json").write_text(json.dumps({"peft_type": "BONE"}))
    names = ("missing.json", "good", "bone.json")
    code, out, err = run(*(part for name in names for part in ("--adapter", str(tmp_path / name))), "--json")

    assert code == 2
    assert [case["method"] for case in json.loads(out)] == ["good", "missing", "bone"]
    assert ["error" in case for case in json.loads(out)] == [False, True, True]
    assert [line.partition(": ")[0] for line in err.splitlines()] == ["peft-gauge", "peft-gauge"]
    assert "no adapter config at" in err
    assert "MISS" in err


def test_an_adapter_that_cannot_be_used_is_not_answered_with_the_seven(run: Run, in_process: list[PlanRequest]) -> None:
    code, out, _ = run("--adapter", "nowhere.json", "--json")
    assert code == 2
    assert [set(case) for case in json.loads(out)] == [{"model", "method", "error"}]


# --- the table


def shown(plans: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(*plan_table.render(plans), sep="\n")
    return out.getvalue()


@pytest.fixture(scope="module")
def plans() -> list[dict[str, Any]]:
    requests = (PlanRequest(TOY, methods.get(name), StepSettings(2, 32), gpus=("24GB",)) for name in ("full", "ia3"))
    found: list[Plan] = [planner.plan(request) for request in requests]
    return [json.loads(json.dumps(each.as_json())) for each in found]


def test_a_bar_is_as_long_as_its_bytes() -> None:
    parts = {"base_weights": 300, "activations": 100, "gradients": 1}
    assert plan_table.bar(parts, 401, 40).plain == "█" * 30 + "░" * 10
    assert plan_table.bar(parts, 802, 40).plain == "█" * 15 + "░" * 5
    assert len(plan_table.bar(dict.fromkeys(CATEGORIES, 1), len(CATEGORIES), 40)) == 40


def test_every_category_has_a_look() -> None:
    assert set(plan_table.LOOKS) == set(CATEGORIES)
    assert len({glyph for _, glyph, _ in plan_table.LOOKS.values()}) == len(CATEGORIES)


def test_the_table_shows_the_figures_and_each_warning_once(plans: list[dict[str, Any]]) -> None:
    for plan in plans:
        plan["warnings"] = ["something to know"]
    text = shown(plans)

    assert "106,816" in text
    assert f"{plans[0]['peak_bytes'] / 1e6:.2f} MB" in text
    assert text.count("something to know") == 1
    assert "note (full, ia3): " in text
    used_and_left = re.findall(r"(\d+\.\d\d) \+(\d+\.\d\d)", text)
    assert len(used_and_left) >= len(plans)
    (memory,) = set(re.findall(r"\((\d+\.\d\d) GB\)", text))
    assert {round(float(used) + float(left), 2) for used, left in used_and_left} == {float(memory)}, "a reader adds up"


def test_the_adapted_modules_stand_below_the_table(run: Run, in_process: list[PlanRequest]) -> None:
    _, out, _ = run("--method", "lora", "--method", "lora-r8", "--method", "ia3", "--method", "prompt")
    assert "adapted (lora, lora-r8): self_attn.(q_proj, k_proj, v_proj, o_proj) in 2 of 2 layers\n" in out
    assert "adapted (ia3): self_attn.(k_proj, v_proj), mlp.down_proj in 2 of 2 layers\n" in out
    assert "prompt)" not in out
    _, out, _ = run("--method", "lora-qv", "--json")
    assert json.loads(out)[0]["adapted_modules"] == [
        {"module": "self_attn.q_proj", "layers": 2, "of_layers": 2},
        {"module": "self_attn.v_proj", "layers": 2, "of_layers": 2},
    ]


def test_no_plans_are_no_table() -> None:
    assert plan_table.render([]) == []


def test_a_model_can_be_named_without_an_option(in_process: list[PlanRequest], run_command: Run) -> None:
    assert run_command("plan", "toy-llama", "--method", "lora", "--seq", "8", "--dtype", "bf16", "--json")[0] == 0
    assert (in_process[0].model.name, in_process[0].dtype) == ("toy-llama", "bfloat16")

    code, _, complaint = run_command("plan", "toy-llama", "--model", "toy-llama")
    assert code == 2
    assert "the model is given twice" in complaint


def test_loras_settings_are_options(in_process: list[PlanRequest], run: Run) -> None:
    given = ("--rank", "3", "--alpha", "6", "--target-modules", "q_proj, v_proj", "--dropout", "0")

    code, printed, _ = run("--method", "lora", *given, "--json")

    assert code == 0
    config = in_process[0].method.peft_config
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 6, 0)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert json.loads(printed)[0]["trainable_params"] == 2 * 3 * (64 + 64 + 64 + 32)  # v_proj is half as wide


def test_loras_settings_change_only_lora_among_the_default_methods(in_process: list[PlanRequest], run: Run) -> None:
    assert run("--rank", "2", "--json")[0] == 0
    ranks = {request.method.name: request.method.peft_config.get("r") for request in in_process}
    assert ranks == {name: 2 if name in ("lora", "qlora") else None for name in ranks}
    assert len(ranks) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "ia3", "--rank", "4"), "which ia3 is not"),
        (("--method", "lora", "--rank", "0"), "--rank must be at least 1"),
        (("--method", "lora", "--dropout", "1"), "--dropout must be at least 0 and below 1"),
        (("--method", "lora", "--target-modules", ","), "names no module"),
        (("--method", "lora", "--dtype", "bf17"), "unknown dtype"),
    ],
)
def test_impossible_settings_of_lora_are_one_line(arguments: tuple[str, ...], message: str, run: Run) -> None:
    code, _, complaint = run(*arguments)
    assert code == 2
    assert message in complaint
    assert complaint.count("\n") == 1


@pytest.fixture
def printed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """``printed_at(columns, …)`` is the plan of two methods as a terminal of this width shows it."""
    settings = StepSettings(batch=1, seq=8)
    requests = [PlanRequest(TOY, methods.get(name), settings, gpus=("24GB", "560MB")) for name in ("lora", "full")]
    plans = [plan.as_json() for plan in map(planner.plan, requests) if isinstance(plan, Plan)]

    def shown(columns: int, *, terminal: bool = True, wide: bool = False) -> str:
        out = io.StringIO()
        console = Console(file=out, width=columns, force_terminal=terminal, color_system=None, highlight=False)
        monkeypatch.setattr(plan_table, "Console", lambda **_: console)
        plan_table.show(plans, wide=wide)
        return out.getvalue()

    return shown


@pytest.mark.parametrize(
    ("columns", "left_out"), [(80, ["per token", "peak in"]), (100, ["per token", "peak in"]), (140, [])]
)
def test_a_narrow_terminal_leaves_out_the_columns_of_least_worth(
    columns: int, left_out: list[str], printed_at: Callable[..., str]
) -> None:
    printed = printed_at(columns)
    table = [line for line in printed.splitlines() if line.startswith(("┏", "┃", "│"))]

    assert max(map(len, table)) <= columns
    for heading in ("per token", "peak in"):
        assert (heading in "".join(table)) == (heading not in left_out)
    assert ("--wide" in printed) == bool(left_out)


def test_all_columns_are_shown_on_request_and_in_a_file(printed_at: Callable[..., str]) -> None:
    for printed in (printed_at(80, wide=True), printed_at(80, terminal=False)):
        assert all(heading in printed for heading in ("per token", "peak in", "resident", "trainable"))
        assert "--wide" not in printed


def test_a_mark_shows_whether_it_fits(printed_at: Callable[..., str]) -> None:
    lora, full = (
        next(line for line in printed_at(140).splitlines() if line.startswith(f"│ {name}")) for name in ("lora", "full")
    )
    assert re.search(r"✓ 0\.5\d \+24\.\d\d", lora)
    assert re.search(r"✓ 559\.\d\d \+0\.\d\d", lora)
    assert re.search(r"✗ 562\.\d\d −2\.\d\d", full)
