"""The step that the command line's options describe, and how a table's title describes it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from peft_gauge.errors import GaugeError
from peft_gauge.pytest_plugin.selection import CASES, check_runs_on, selected_cases, selected_variations
from peft_gauge.report.format import step_conditions
from tests.support.facts import lacking

if TYPE_CHECKING:
    from peft_gauge.training.cases import Case

DEFAULTS = {
    "--model": "toy-llama",
    "--weights": "random",
    "--method": ["ia3"],
    "--adapter": None,
    "--loop": "plain",
    "--strategy": "fsdp2",
    "--replicate": 1,
    "--seed": 0,
    "--time-limit": 900.0,
    "--markexpr": "",
}


def config(**given: Any) -> Any:
    """pytest's config with these options; an option without a default is not given."""
    options = {**DEFAULTS, **{f"--{name}": value for name, value in given.items()}}

    def getoption(name: str) -> Any:
        return options.get(f"--{name.removeprefix('--')}")

    return SimpleNamespace(getoption=getoption, stash={})


def cases(**given: Any) -> list[Case]:
    return selected_cases(config(**given))


def test_a_plain_step_is_this_suites_own() -> None:
    on_cpu, on_cuda = cases(mixed_precision="bf16", float32_outputs=True)
    assert (on_cpu.loop, on_cpu.trainer_arguments) == ("plain", ())
    assert (on_cpu.settings.batch, on_cpu.settings.seq, on_cpu.dtype) == (1, 64, "float32")
    assert (on_cuda.settings.batch, on_cuda.settings.seq, on_cuda.dtype) == (4, 128, "bfloat16")
    assert (on_cpu.settings.mixed_precision, on_cpu.settings.float32_outputs) == ("bf16", True)
    assert (on_cpu.settings.optimizer, on_cpu.settings.clip_grad_norm) == ("adamw", None)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"replicate": 2}, ("--gpus",)),
        ({"gpus": 4, "replicate": 3}, ("4 GPUs", "--replicate 3")),
        ({"gpus": 4, "replicate": 2, "strategy": "ddp"}, ("--replicate", "not for ddp")),
    ],
)
def test_replicas_need_gpus_that_they_divide_and_fsdp(given: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(GaugeError) as raised:
        cases(**given)
    assert lacking(str(raised.value), *words) == []
    assert cases(gpus=4, replicate=2)


def test_a_trainers_step_has_its_own_defaults_and_the_arguments_that_are_set() -> None:
    trainer, _ = cases(
        loop="trainer", changes=["max_grad_norm=0.5", "gradient_checkpointing_kwargs={use_reentrant: true}"]
    )
    assert (trainer.settings.optimizer, trainer.settings.clip_grad_norm) == ("adamw-fused", 0.5)
    assert dict(trainer.trainer_arguments) == {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    assert {trainer: "a case is a key"}[trainer]
    sft, on_cuda = cases(loop="sft")
    assert (sft.settings.mixed_precision, sft.settings.grad_checkpointing) == ("bf16", True)
    assert on_cuda.dtype == "float32", "as TRL loads a model"


def test_variations_with_checkpointing_are_left_out_where_it_is_the_default() -> None:
    plain = [case.id for case in selected_variations(config())]
    sft = [case.id for case in selected_variations(config(loop="sft"))]
    assert len(plain) == 10
    assert len(sft) == 4
    assert len(set(sft)) == 4


@pytest.mark.parametrize("given", [{"mixed_precision": "fp16"}, {"changes": ["fp16=true"]}])
def test_fp16_by_a_trainer_is_refused_on_a_cpu_only(given: dict[str, Any]) -> None:
    asked = config(loop="trainer", **given)
    asked.stash[CASES] = selected_cases(asked)
    check_runs_on(asked, "cuda")
    with pytest.raises(GaugeError, match="leaves fp16 out on a CPU"):
        check_runs_on(asked, "cpu")


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"batch": 4, "seq": 768, "dtype": "bfloat16"}, "4×768 tokens, bfloat16"),
        (
            {"batch": 4, "seq": 768, "dtype": "bfloat16", "mixed_precision": "bf16", "loop": "sft"},
            "by trl.SFTTrainer, 4×768 tokens, bfloat16 with bf16 autocast",
        ),
    ],
)
def test_a_title_names_loop_and_autocast(settings: dict[str, Any], shown: str) -> None:
    assert step_conditions(settings) == shown
