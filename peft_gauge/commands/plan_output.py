"""The output of ``peft-gauge plan``: tables for the terminal, JSON, comma-separated values, Markdown; its exit code."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer

from peft_gauge.commands.tables import print_csv, print_json, print_markdown
from peft_gauge.memory.categories import CATEGORIES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from peft_gauge.commands.tables import Form
    from peft_gauge.plan.recipes import Recipe
    from peft_gauge.plan.record import PlanOutcome

SETTINGS = ("loop", "dtype", "batch", "seq", "optimizer", "grad_checkpointing", "grad_accumulation", "mixed_precision")
SIZES = (
    "trainable_params",
    "total_params",
    "peak_bytes",
    "resident_bytes",
    "saved_activation_bytes_per_token",
    "allocated_bytes_estimate",
    "reserved_bytes_estimate",
    "device_bytes_estimate",
)
FIT = {
    "gpu": "gpu",
    "usable_bytes": "usable_bytes",
    "device_bytes": "gpu_device_bytes",
    "headroom_bytes": "headroom_bytes",
    "fits": "fits",
    "retries": "retries",
}
"""A key of a plan's fit -> its column in comma-separated values."""
SEARCH = ("quantity", "value", "at_limit")


def show(
    outcomes: Sequence[PlanOutcome],
    form: Form | None,
    recipe: Recipe | None,
    advice: Mapping[int, list[dict[str, Any]]],
    drawn: Mapping[int, tuple[str, Mapping[str, Any]]],
    wide: bool,
) -> None:
    """Print ``outcomes`` in ``form``, and errors on standard error.

    Raises `typer.Exit`: 1 if a step does not fit, 2 if a case could not be planned or a recipe's key is unknown.
    """
    from peft_gauge.plan.record import PlanFailure

    failures = [outcome for outcome in outcomes if isinstance(outcome, PlanFailure)]
    objects = [outcome.as_json() for outcome in outcomes]
    for place, found in advice.items():
        objects[place]["advice"] = found
    if form == "json":
        for place, (_, timeline) in drawn.items():
            objects[place]["timeline"] = timeline
    if recipe is not None:
        objects = [{**each, "recipe": recipe.as_json()} for each in objects]
    planned = [each for each in objects if "error" not in each]
    if form == "json":
        print_json(objects)
    elif form == "csv":
        rows = [row for each in planned for row in csv_rows(each)]
        print_csv(rows, list(dict.fromkeys(name for row in rows for name in row)))
    elif form == "markdown":
        _print_markdown(planned)
    else:
        _print_tables(planned, drawn, recipe, wide)
    unread = [] if recipe is None else [f"unknown key {each} in the {recipe.tool} recipe" for each in recipe.unknown]
    for sentence in unread:
        print(f"peft-gauge: {sentence}; planned without it", file=sys.stderr)
    for failure in failures:
        print(f"peft-gauge: {failure.error}", file=sys.stderr)
    if failures or unread:
        raise typer.Exit(2)
    if not all(all(each["fits"].values()) for each in objects):
        raise typer.Exit(1)


def csv_rows(plan: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One row per GPU of ``plan``, or one without a GPU."""
    row = {"model": plan["model"], "method": plan["method"]}
    row |= {name: plan["settings"].get(name) for name in SETTINGS} | {"phase_of_peak": plan["phase_of_peak"]}
    row |= {name: plan[name] for name in SIZES}
    row |= {f"peak_{name}_bytes": plan["peak_by_category"].get(name, 0) for name in CATEGORIES}
    if "find" in plan:
        row |= {f"find_{name}": plan["find"][name] for name in SEARCH}
    for fit in plan["gpus"] or [{}]:
        yield row | ({column: fit[name] for name, column in FIT.items()} if fit else {})


def _print_markdown(planned: Sequence[Mapping[str, Any]]) -> None:
    from peft_gauge.report.comparison import in_markdown
    from peft_gauge.report.terminal.plan_table import columns, title

    if planned:
        print(f"{in_markdown(title(planned)).replace(chr(10), ', ')}\n")
        print_markdown(*columns(planned))


def _print_tables(
    planned: Sequence[Mapping[str, Any]],
    drawn: Mapping[int, tuple[str, Mapping[str, Any]]],
    recipe: Recipe | None,
    wide: bool,
) -> None:
    from peft_gauge.report.terminal.advice_table import show_advice
    from peft_gauge.report.terminal.plan_table import show as show_plans
    from peft_gauge.report.terminal.plan_table import show_recipe
    from peft_gauge.report.terminal.timeline_picture import show_timeline

    show_plans(planned, wide=wide)
    for each in planned:
        if "advice" in each:
            show_advice(each)
    for title, timeline in drawn.values():
        show_timeline(title, timeline)
    if recipe is not None:
        show_recipe(recipe.as_json())
