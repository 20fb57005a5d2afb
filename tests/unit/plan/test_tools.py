"""Recipes against the tools themselves: `tests/tools/*.json` has what their own functions make of each recipe.

Every parameter and buffer must have the tool's data type and be trained as there, and the step the tool's settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from peft_gauge.commands.plan_step import described_step, in_stored_dtype
from peft_gauge.errors import GaugeError
from peft_gauge.plan import planner, trainer_step
from peft_gauge.plan.recipes import Recipe, read
from peft_gauge.plan.record import PlanRequest
from peft_gauge.training import models
from peft_gauge.training.trainers import OPTIM
from tests.support.paths import TESTS
from tests.tools.make_answers import CASES, compute_of, layers_of

if TYPE_CHECKING:
    from torch import nn

pytestmark = pytest.mark.integration

ANSWERS = {tool: json.loads((TESTS / "tools" / f"{tool}.json").read_text(encoding="utf-8")) for tool in CASES}
OF_FILE = {
    "axolotl": lambda model: {"base_model": model},
    "llama-factory": lambda model: {"model_name_or_path": model, "template": "default"},
    "trl": lambda model: {"model_name_or_path": model},
}
REFUSED = {
    "axolotl:full/bf16-full": "refuses bf16",
    "trl:qlora/auto-weights": "refuses dtype: auto",
}
"""Cases that end in the tool's own error, with words of ours."""


UNPLANNED = {
    # Their training ends in an error: gradients in float16 cannot be unscaled.
    "axolotl:full/fp16": "needs trainable weights in float32",
    "axolotl:full/fp16-alone": "needs trainable weights in float32",
    # PEFT's DoRA reads the shape of the packed weight, which is not modelled without data.
    "trl:qlora/dora": "does not fit llama",
}


class Prepared(BaseException):
    """Ends a plan before its step."""


def cases() -> Iterator[Any]:
    for tool, stored in ANSWERS.items():
        for name, answer in stored["cases"].items():
            yield pytest.param(tool, answer, id=f"{tool}:{name}")


def recipe_of(tool: str, answer: dict[str, Any], folder: Path) -> Recipe:
    (folder / "config.json").write_text(json.dumps(ANSWERS[tool]["models"][answer["model"]]))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**OF_FILE[tool](str(folder)), **answer["recipe"]}))
    found = read(folder / "recipe.yaml", {})
    assert not found.unknown
    return found


def request_of(tool: str, answer: dict[str, Any], folder: Path) -> PlanRequest:
    found = recipe_of(tool, answer, folder)
    record = models.resolve(str(folder))
    assert found.method is not None
    return PlanRequest(record, found.method, **in_stored_dtype(described_step({}, found, {}), record))


def prepared(request: PlanRequest, patch: pytest.MonkeyPatch) -> nn.Module:
    """The model of ``request`` once its trainer is built."""
    seen: list[nn.Module] = []

    def stop(tracker: Any, model: nn.Module, base: Any) -> None:
        seen.append(model)
        raise Prepared

    patch.setattr(trainer_step, "adopt_model", stop)
    with pytest.raises(Prepared):
        planner.plan(request)
    return seen[0]


def cases_of_weights() -> Iterator[Any]:
    """What has another case's weights, in another recipe, is slow: it runs every week."""
    seen = set()
    for case in cases():
        tool, answer = case.values
        weights = json.dumps([tool, *map(answer.get, ("weights", "compute", "error"))], sort_keys=True)
        yield pytest.param(tool, answer, id=case.id, marks=pytest.mark.slow if weights in seen else ())
        seen.add(weights)


@pytest.mark.parametrize(("tool", "answer"), list(cases_of_weights()))
def test_weights_are_those_of_the_tool(
    tool: str, answer: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if "error" in answer:
        with pytest.raises(GaugeError, match=REFUSED[request.node.callspec.id]):
            request_of(tool, answer, tmp_path)
        return
    asked = request_of(tool, answer, tmp_path)
    if request.node.callspec.id in UNPLANNED:
        with pytest.raises(GaugeError, match=UNPLANNED[request.node.callspec.id]):
            planner.plan(asked)
        return
    if not any(value.partition(" ×")[0].endswith("*") for value in answer["weights"].values()):
        with pytest.raises(GaugeError, match="leaves nothing to train"):
            planner.plan(asked)
        return
    model = prepared(asked, monkeypatch)
    # A chunked loss has the head in a module of its own.
    ours = {name.replace("lm_head.head.", "lm_head."): value for name, value in layers_of(model).items()}
    assert ours == answer["weights"]
    assert compute_of(model) == answer["compute"]


@pytest.mark.parametrize(("tool", "answer"), [each for each in cases() if "error" not in each.values[1]])
def test_settings_are_those_of_the_tool(tool: str, answer: dict[str, Any], tmp_path: Path) -> None:
    asked = request_of(tool, answer, tmp_path)
    settings, theirs = asked.settings, answer["settings"]
    assert settings.seq == answer["seq"]
    assert (settings.batch, settings.grad_accumulation) == (theirs["batch"], theirs["grad_accumulation"])
    assert OPTIM.get(settings.optimizer, settings.optimizer) == theirs["optim"]
    assert (settings.clip_grad_norm or 0) == theirs["max_grad_norm"]
    assert settings.mixed_precision == theirs["autocast"]
    assert settings.grad_checkpointing == answer["checkpointing"]["grad_checkpointing"]
    if tool != "trl":  # planned with TRL's own arguments
        assert asked.checkpoint_reentrant == answer["checkpointing"]["reentrant"]


@pytest.mark.parametrize("name", ["freeze/bf16", "freeze/modules", "oft/bf16"])
def test_the_step_of_a_part_of_the_base_is_planned(name: str, tmp_path: Path) -> None:
    """Blocks below the first that is trained save nothing for backward, checkpointed or not."""
    answer = ANSWERS["llama-factory"]["cases"][name]
    found = {}
    for checkpointed in (True, False):
        recipe = {**answer["recipe"], "cutoff_len": 64, "disable_gradient_checkpointing": not checkpointed}
        found[checkpointed] = planner.plan(request_of("llama-factory", {**answer, "recipe": recipe}, tmp_path))
    assert found[True].saved_activation_bytes_per_token < found[False].saved_activation_bytes_per_token
    assert found[True].peak_bytes < found[False].peak_bytes


@pytest.mark.parametrize(("tool", "answer"), [each for each in cases() if "kernels" in each.values[1]])
def test_kernels_that_are_on_are_named(tool: str, answer: dict[str, Any], tmp_path: Path) -> None:
    """axolotl turns its fused LoRA kernels on by itself."""
    named = {name for name in recipe_of(tool, answer, tmp_path).not_modelled if name.endswith("_kernel")}
    assert named == set(answer["kernels"])
