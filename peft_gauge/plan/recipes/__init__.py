"""Recipes of training tools: read a config file as that tool does, and plan the step that it takes.

Tools: TRL (``trl sft --config``), axolotl, LLaMA-Factory, files of ``TrainingArguments`` or ``SFTConfig``, and folders
with an ``adapter_config.json``. Defaults of missing keys are the tool's own.
"""

from __future__ import annotations

from peft_gauge.plan.recipes.reading import read
from peft_gauge.plan.recipes.recipe import STORED, Recipe

__all__ = ["STORED", "Recipe", "read"]
