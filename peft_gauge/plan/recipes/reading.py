"""Read a recipe's file, and find out whose it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_gauge.errors import GaugeError, one_line
from peft_gauge.plan.recipes.axolotl import read_axolotl
from peft_gauge.plan.recipes.llama_factory import read_llama_factory
from peft_gauge.plan.recipes.recipe import Recipe
from peft_gauge.plan.recipes.trl import read_arguments, read_trl
from peft_gauge.training import trainers

LLAMA_FACTORY = frozenset(
    {"stage", "finetuning_type", "template", "cutoff_len", "lora_rank", "quantization_bit", "lora_target"}
)
"""Keys that no other tool has."""
OTHERS = {
    "unsloth": ("max_seq_length", "use_gradient_checkpointing"),
    "torchtune": ("tokenizer", "checkpointer"),
    "litgpt": ("checkpoint_dir", "lora_query"),
    "DeepSpeed": ("zero_optimization",),
    "accelerate": ("compute_environment",),
}
"""Tools whose files are not read, each with keys of its own."""


def read(path: Path, changes: Mapping[str, Any]) -> Recipe:
    """The recipe in ``path``, a YAML or JSON file or a folder with an ``adapter_config.json``, after ``changes`` of its
    keys.

    Raises `GaugeError` for a file that cannot be read, that is another tool's, or whose settings cannot be planned.
    """
    if path.is_dir() or path.name == "adapter_config.json":
        return _adapter(path, changes)
    values = {**_content(path), **changes}
    if "base_model" in values and "model_name_or_path" not in values:
        return read_axolotl(values)
    if values.keys() & LLAMA_FACTORY:
        return read_llama_factory(values)
    if "model_name_or_path" in values:
        return read_trl(values)
    for tool, told in OTHERS.items():
        if all(key in values for key in told):
            raise GaugeError(f"{path} is a file of {tool}, which is not read; TRL's, axolotl's and LLaMA-Factory's are")
    known = trainers.config_fields("trainer").keys()
    if not values.keys() & known:
        raise GaugeError(f"{path} is not a recipe: it has no key of TRL, axolotl, LLaMA-Factory or TrainingArguments")
    return read_arguments(values)


def _content(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise GaugeError(f"no recipe at {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise GaugeError(f"{path} is not readable YAML or JSON: {one_line(error, 160)}") from error
    if not isinstance(content, dict):
        raise GaugeError(f"{path} is not a recipe: it is not a mapping of keys to values")
    return {str(name): value for name, value in content.items()}


def _adapter(path: Path, changes: Mapping[str, Any]) -> Recipe:
    """A folder with a saved adapter: its base and its config, in this suite's own step."""
    from peft_gauge.training import methods

    if changes:
        raise GaugeError(f"--set changes a key of a recipe; {path} is an adapter: use the options of plan")
    method = methods.from_adapter_config(path)
    base = method.peft_config.get("base_model_name_or_path")
    return Recipe(
        tool="PEFT",
        model=None if not base else str(base),
        method=method,
        dtype=None,
        loop="plain",
        fields={},
        understood={name: method.peft_config[name] for name in ("peft_type", "r") if name in method.peft_config},
    )
