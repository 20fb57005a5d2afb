"""Options of long commands in groups, for ``--help``; plain text, so that no name is cut off at 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from typer.core import TyperCommand

OUTPUT = "Output"

GROUPS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "plan": {
        "Model and method": (
            *("model", "recipe", "method", "adapter", "rank", "alpha", "target_modules", "dropout"),
            *("quantize", "double_quant", "autocast_adapter_dtype", "prepare_kbit"),
        ),
        "Training step": (
            *("loop", "changes", "dtype", "batch", "seq", "optimizer", "grad_checkpointing", "checkpoint_reentrant"),
            *("grad_accumulation", "clip_grad_norm", "mixed_precision", "float32_outputs", "loss", "loss_chunk"),
            *("attention", "padded", "use_cache", "hold_outputs"),
        ),
        "GPUs": (
            *("gpu", "find", "calibration", "gpus", "nodes", "replicate", "strategy", "offload"),
            "reshard_after_forward",
        ),
        OUTPUT: ("advise", "timeline", "timeline_file", "wide", "as_json", "as_csv", "as_markdown"),
    },
    "ab": {
        "Training step": (
            *("model", "method", "batch", "seq", "device", "dtype", "mixed_precision", "loop", "changes", "threads"),
        ),
        "Decision": ("budget", "minimum_effect", "rules", "self_check", "pairs"),
        OUTPUT: ("results", "everything", "as_json", "as_csv", "as_markdown"),
    },
    "bisect": {
        "Releases and metric": ("metric", "beside", "budget", "minimum_effect"),
        "Training step": ("model", "batch", "seq", "device", "dtype", "mixed_precision", "loop", "changes", "threads"),
        OUTPUT: ("as_json", "as_csv", "as_markdown"),
    },
    "compare": {
        "Runs": ("last", "results", "machine", "across_machines"),
        "Decision": ("rules", "strict"),
        OUTPUT: ("everything", "markdown", "as_csv", "json_file"),
    },
    "trace": {
        "Trace": ("device", "step"),
        "Model and method": (
            *("model", "method", "adapter", "quantize", "double_quant", "autocast_adapter_dtype", "prepare_kbit"),
        ),
        "Training step": (
            *("dtype", "batch", "seq", "optimizer", "grad_checkpointing", "checkpoint_reentrant", "grad_accumulation"),
            *("clip_grad_norm", "attention", "padded", "hold_outputs"),
        ),
        OUTPUT: ("top", "as_json", "as_csv", "as_markdown"),
    },
    "bundle": {
        "Node": ("python", "have", "platform"),
        "Bundle": ("out", "most_megabytes", "checkout"),
        "Package index": ("index_url", "find_links"),
        OUTPUT: ("as_json", "as_csv", "as_markdown"),
    },
}
"""By command: the heading of each group, and the names of its parameters; others are under "Options"."""


def _with_plain_types(names: str) -> str:
    """``names`` of an option as users know its type: a list is given by commas."""
    return names.replace("<list[str]>", "NAME,...").replace("<list[Path]>", "FILE,...")


def by_heading(command: str, parameters: Iterable[Any]) -> dict[str, list[Any]]:
    """``parameters`` of ``command`` by the heading that ``--help`` and the reference show them under, in that order."""
    known = GROUPS.get(command, {})
    group_of = {name: heading for heading, names in known.items() for name in names}
    found: dict[str, list[Any]] = {"Arguments": [], **{heading: [] for heading in known}, "Options": []}
    for parameter in parameters:
        is_argument = parameter.param_type_name == "argument"
        found["Arguments" if is_argument else group_of.get(str(parameter.name), "Options")].append(parameter)
    return {heading: each for heading, each in found.items() if each}


class GroupedCommand(TyperCommand):
    """A command whose ``--help`` has a heading for each of its `GROUPS`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        for heading, parameters in by_heading(self.name or "", self.get_params(ctx)).items():
            records = [record for each in parameters if (record := each.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(heading):
                    formatter.write_dl([(_with_plain_types(names), text) for names, text in records])
