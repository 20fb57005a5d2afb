"""Sweeps in words: the question that each answers, its task, its quality, and the costs by which its points differ.

A saved sweep is known by the id of its test. Readers see a question instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_gauge.history.metrics import is_number
from peft_gauge.report.terminal.sweep_table import ABOUT_QUALITY

if TYPE_CHECKING:
    from peft_gauge.history.schema import CaseRecord

QUESTIONS = {
    "test_ranks": "Which rank stores the facts?",
    "test_rates": "Which rank, each at its own learning rate?",
    "test_targets": "Which modules, at equal parameters?",
    "test_all_linear_layers": "All linear layers, or attention only?",
    "test_qlora": "Does QLoRA keep LoRA’s quality?",
    "test_forgetting": "Does full fine-tuning or LoRA learn more?",
    "test_rule": "Which method learns a rule?",
    "test_variants[dora]": "Is DoRA better than LoRA?",
    "test_variants[lora-plus]": "Is LoRA+ better than LoRA?",
    "test_variants[pissa]": "Is PiSSA better than LoRA?",
    "test_variants[rslora-r64]": "Is rsLoRA better at rank 64?",
    "test_planted_rank": "Is a planted rank found?",
    "test_rank_on_text": "Which rank?",
    "test_two_ranks_on_text": "Rank 2 or rank 16, after a few steps?",
    "test_planted_targets": "Are planted modules found?",
    "test_planted_elsewhere": "Can other modules replace the planted ones?",
    "test_targets_on_text": "Which modules?",
    "test_two_target_sets_on_text": "Attention or queries and values, after a few steps?",
    "test_methods_on_text": "Which method?",
    "test_two_methods_on_text": "LoRA or IA³, after a few steps?",
    "test_qlora_on_text": "Does QLoRA keep LoRA’s quality?",
    "test_planted_in_reach_of_a_method": "Which method can learn a planted update?",
    "test_update_on_text": "Which rank has the update of full fine-tuning?",
    "test_ways_to_serve": "How to serve many adapters?",
}
"""The question of a sweep, by its test's name, with the parameters where one test has several questions."""

COSTS = {
    "peak_bytes": "peak memory",
    "trainable_params": "trainable parameters",
    "held_bytes": "memory held",
    "update_params": "parameters of the update",
    "step_seconds": "step time",
}
"""Costs in words, the most meaningful first; a cost that is not here has its name without underscores."""
ALIKE = 1.5
"""Step times whose largest is less than this multiple of the smallest do not separate points: sweeps time their steps
while they train, without the control and the repetitions of a benchmark."""


def question(record: CaseRecord) -> str:
    """The question that the sweep of ``record`` answers, with its model and its task."""
    name = record.id.rpartition("::")[2]
    test, _, parameters = name.partition("[")
    asked = QUESTIONS.get(name) or QUESTIONS.get(test) or _in_words(test)
    metrics = record.metrics
    about = [
        str(value)
        for key in ("model", "architecture", "task", "trained_by")
        if (value := metrics.get(key)) is not None and not isinstance(value, Mapping)
    ]
    if isinstance(metrics.get("adapters"), int):
        about.append(f"{metrics['adapters']} adapter{'' if metrics['adapters'] == 1 else 's'}")
    extra = _extra(parameters.rstrip("]"), " ".join(about)) if name not in QUESTIONS else ""
    return " · ".join([asked, ", ".join([*about, *([extra] if extra else [])])]).rstrip(" ·")


def _in_words(test: str) -> str:
    return test.removeprefix("test_").replace("_", " ").capitalize() + "?"


def _extra(parameters: str, told: str) -> str:
    """Those of a test's ``parameters`` that are not yet ``told``: parts of a model's name often are."""
    known = set(re.split(r"[^a-z0-9]+", told.lower()))
    parts = [part for part in parameters.split("-") if part and part.lower() not in known]
    return " ".join(part for part in parts if part not in ("cpu", "cuda"))


def cost_words(cost: str) -> str:
    """``cost`` in words, without its unit."""
    return COSTS.get(cost) or cost.removesuffix("_seconds").removesuffix("_bytes").replace("_", " ")


def unit(metric: str) -> str:
    """The unit of a saved metric by its name: "B", "s" or none."""
    if metric == "seconds" or metric.endswith("_seconds"):
        return "s"
    return "B" if "bytes" in metric else ""


def costs(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """The costs by which the points of a sweep differ, the one to show first in front.

    A cost that is equal for all points shows nothing, and step times that are alike show noise. If nothing is left,
    the most meaningful one stays, so that the qualities can be seen.
    """
    names = {name for point in points for name, value in point.items() if is_number(value)} - ABOUT_QUALITY
    order = [*(name for name in COSTS if name in names), *sorted(names - COSTS.keys())]
    telling = [name for name in order if _tells_apart(name, [point.get(name) for point in points])]
    return telling or order[:1]


def _tells_apart(cost: str, values: Sequence[Any]) -> bool:
    known = [value for value in values if is_number(value)]
    if len(known) < 2 or len(set(known)) < 2 or min(known) <= 0:
        return False
    return unit(cost) != "s" or max(known) / min(known) >= ALIKE
