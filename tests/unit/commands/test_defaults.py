"""Lists by commas, and defaults that fit the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from peft_gauge.commas import listed, listed_paths
from peft_gauge.pytest_plugin.selection import selected_methods
from tests.support.facts import lacking
from tests.support.paths import DATA

if TYPE_CHECKING:
    from peft_gauge.plan.record import PlanRequest

Run = Callable[..., tuple[int, str, str]]
OFT = DATA / "adapters" / "oft_new.json"


def test_commas_and_repetition_mean_the_same(tmp_path: Path) -> None:
    assert listed(["lora, ia3", "full"]) == listed(["lora", "ia3", "full"]) == ["lora", "ia3", "full"]
    assert listed(None) == []
    whole = tmp_path / "a,b.json"
    whole.touch()
    assert listed_paths([whole, "c.json,d.json"]) == [whole, Path("c.json"), Path("d.json")]


def test_a_plan_takes_methods_and_gpus_by_commas(run_command: Run, asked: list[PlanRequest]) -> None:
    options = ("--seq", "16", "--gpu", "24GB,RTX 4090", "--gpu", "H100 80GB")
    code, _, err = run_command("plan", "toy-llama", "--method", "lora,ia3", "--method", "full", *options)
    assert (code, err) == (0, "")
    assert [request.method.name for request in asked] == ["lora", "ia3", "full"]
    assert asked[0].gpus == ("24GB", "RTX 4090", "H100 80GB")


def test_an_unknown_name_in_a_list_is_one_line(run_command: Run) -> None:
    code, out, err = run_command("plan", "toy-llama", "--method", "lora,lroa")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert lacking(err, "'lroa'", "lora") == []


def test_the_suite_takes_methods_and_adapters_by_commas() -> None:
    options = {"--method": ["lora,ia3"], "--adapter": [f"{OFT},{OFT}"]}
    config: Any = SimpleNamespace(getoption=options.get)
    names = [method.name for method in selected_methods(config)]
    assert (names[:2], len(names)) == (["lora", "ia3"], 4)


@pytest.mark.parametrize(
    ("arguments", "seq", "line"),
    [((), 128, True), (("--seq", "64"), 64, False), (("--loop", "trainer"), 128, True)],
)
def test_the_default_length_fits_the_model(
    arguments: tuple[str, ...], seq: int, line: bool, run_command: Run, asked: list[PlanRequest]
) -> None:
    code, _, err = run_command("plan", "toy-llama", "--method", "lora", *arguments)
    assert (code, asked[0].settings.seq) == (0, seq)
    assert err == ("peft-gauge: planned at 128 tokens, the limit of toy-llama\n" if line else "")


def test_a_larger_model_keeps_the_usual_default(run_command: Run, asked: list[PlanRequest]) -> None:
    code, _, err = run_command("plan", "tinyllama", "--method", "lora")
    assert (code, err, asked[0].settings.seq) == (0, "", 768)
