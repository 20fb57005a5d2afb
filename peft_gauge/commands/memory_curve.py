"""``peft-gauge memory-curve``: plot planned memory against sequence length, method by method."""

from __future__ import annotations

import sys
from pathlib import Path  # typer reads the annotations at run time
from typing import TYPE_CHECKING, Annotated

import typer

from peft_gauge.commas import listed
from peft_gauge.errors import GaugeError

if TYPE_CHECKING:
    from peft_gauge.report.charts.memory_picture import Card, Point

CARDS = ("RTX 4090", "H100 80GB")
LONGEST = 2048
"""The longest of the default sequence lengths, in tokens."""


def memory_curve(
    model: Annotated[str, typer.Option(help="Name of a model record, folder or file with a config, or Hub id.")],
    out: Annotated[Path, typer.Option(help="Plot to write, .svg or .png; its data is written next to it as .csv.")],
    seqs: Annotated[
        str | None,
        typer.Option(
            help="Sequence lengths in tokens, comma-separated (default: 128,256,512,1024,2048, or five up to the "
            "model's limit)."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Micro-batch size.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16: of base weights and compute.")] = "bfloat16",
    method: Annotated[
        list[str] | None, typer.Option(help="Methods, comma-separated or repeated (default: all seven).")
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(help=f"GPUs to draw as lines, comma-separated or repeated (default: {', '.join(CARDS)})."),
    ] = None,
) -> None:
    """Plan each method at each sequence length and plot the peak memory of a training step."""
    from peft_gauge.report.charts import memory_picture

    memory_picture.check_destination(out)
    cards = [card(name) for name in listed(gpu) or CARDS]
    points = planned_points(model, None if seqs is None else parse_seqs(seqs), batch, dtype, listed(method))
    metrics = memory_picture.save(points, cards, out)
    print(f"wrote {out} and its data, {metrics}")


def parse_seqs(text: str) -> tuple[int, ...]:
    """``"128,256"`` as (128, 256), sorted; raises `GaugeError` unless there are at least two lengths, all ≥ 2."""
    try:
        seqs = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise GaugeError(f"--seqs must be comma-separated whole numbers, such as 128,256,512, got {text!r}") from error
    if len(seqs) < 2 or seqs[0] < 2:
        raise GaugeError(f"--seqs must list at least two lengths of at least 2 tokens, got {text}")
    return tuple(seqs)


def default_seqs(most: int | None) -> tuple[int, ...]:
    """Five lengths, each twice the one before, up to `LONGEST` or a model's limit ``most``; fewer below 32 tokens."""
    longest = LONGEST if most is None else min(LONGEST, most)
    return tuple(longest // 2**halvings for halvings in range(4, -1, -1) if longest // 2**halvings >= 2)


def card(name: str) -> Card:
    """The GPU called ``name``, or of this size, with its usable memory; raises `GaugeError` for an unknown one."""
    from peft_gauge.memory.gpus import lookup
    from peft_gauge.report.charts.memory_picture import Card

    gpu = lookup(name)
    # Readers know a GPU by its marketed memory; some names include it already.
    memory = gpu.marketing_memory
    if memory is None or memory.replace(" ", "") in gpu.name:
        return Card(gpu.name, gpu.usable_bytes)
    return Card(f"{gpu.name} {memory.replace(' ', '')}", gpu.usable_bytes)


def planned_points(
    model: str, seqs: tuple[int, ...] | None, batch: int, dtype: str, method_names: list[str]
) -> list[Point]:
    """The default methods, or those named, on ``model`` at each length, planned in a separate process.

    ``seqs``: sorted; by default those that fit the model (`default_seqs`).
    """
    from peft_gauge.commands.progress import bar
    from peft_gauge.plan.record import PlanRequest
    from peft_gauge.plan.sweep import sweep
    from peft_gauge.report.charts.memory_picture import Point
    from peft_gauge.training import methods, models
    from peft_gauge.training.settings import StepSettings

    dtype = models.dtype_named(dtype)
    chosen = [methods.get(name) for name in method_names] or methods.DEFAULT_METHODS
    record = models.resolve(model)
    if seqs is None:
        seqs = default_seqs(record.max_positions)
        if seqs[-1] < LONGEST:
            print(f"peft-gauge: planned at up to {seqs[-1]} tokens, the limit of {record.name}", file=sys.stderr)
    record.check_sequence(seqs[-1], "--seqs")
    requests = [PlanRequest(record, method, StepSettings(batch, seq), dtype=dtype) for method in chosen for seq in seqs]
    with bar(len(requests), "planning") as display:
        plans = sweep(requests, display.advance)
    return [
        Point(
            model=plan.model,
            method=plan.method,
            title=request.method.title,
            dtype=dtype,
            batch=batch,
            seq=request.settings.seq,
            phase_of_peak=plan.phase_of_peak,
            peak_bytes=plan.peak_bytes,
            resident_bytes=plan.resident_bytes,
            device_bytes_estimate=plan.device_bytes_estimate,
        )
        for request, plan in zip(requests, plans, strict=True)
    ]
