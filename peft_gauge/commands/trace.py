"""``peft-gauge trace``: compare a recorded step with its plan: where, and by how much, the plan is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_gauge.commands.plan_step import STEP_OPTIONS, adjusted
from peft_gauge.commands.tables import AsCsv, AsJson, AsMarkdown, form_of, print_csv, print_json, print_markdown
from peft_gauge.errors import GaugeError, unknown
from peft_gauge.report.format import ABSENT

if TYPE_CHECKING:
    from peft_gauge.plan.record import PlanRequest

REQUIRED = ("model", "method", "batch", "seq")

# A setting's name in a trace's own header -> the option's name.
OTHER_NAMES = {
    "ckpt": "grad_checkpointing",
    "accum": "grad_accumulation",
    "clip": "clip_grad_norm",
    "mixed": "mixed_precision",
    "convert": "float32_outputs",
}

TRAINER_ARGUMENTS = ("packing",)
"""Settings in a header that are arguments of a trainer."""


def trace(
    file: Annotated[
        Path,
        typer.Argument(help="Snapshot of torch.cuda.memory._dump_snapshot, or trace recorded by the suite."),
    ],
    model: Annotated[str | None, typer.Option(help="Model, as for plan (default: from the trace).")] = None,
    method: Annotated[str | None, typer.Option(help="Method (default: from the trace).")] = None,
    adapter: Annotated[Path | None, typer.Option(help="adapter_config.json to use in place of --method.")] = None,
    quantize: Annotated[str | None, typer.Option(help="Format of the quantized base: nf4, fp4 or int8.")] = None,
    double_quant: Annotated[
        bool | None, typer.Option(help="The quantization constants of the 4-bit base are quantized too.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16: of base weights and compute (default: bfloat16).")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Micro-batch size.")] = None,
    seq: Annotated[int | None, typer.Option(help="Sequence length in tokens.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="As for plan (default: adamw).")] = None,
    grad_checkpointing: Annotated[bool | None, typer.Option(help="Activations are recomputed in backward.")] = None,
    checkpoint_reentrant: Annotated[bool | None, typer.Option(help="Reentrant checkpointing.")] = None,
    grad_accumulation: Annotated[int | None, typer.Option(help="Micro-batches per update.")] = None,
    clip_grad_norm: Annotated[float | None, typer.Option(help="Gradient norm to clip to.")] = None,
    autocast_adapter_dtype: Annotated[
        bool | None, typer.Option(help="Adapters of a 16-bit base are kept in float32.")
    ] = None,
    prepare_kbit: Annotated[bool | None, typer.Option(help="Unquantized parameters are cast to float32.")] = None,
    attention: Annotated[str | None, typer.Option(help="sdpa, eager or flash_attention_2.")] = None,
    padded: Annotated[bool | None, typer.Option("--padded/--unpadded", help="The batch has an attention mask.")] = None,
    hold_outputs: Annotated[bool | None, typer.Option(help="The loop keeps the model's outputs.")] = None,
    device: Annotated[int | None, typer.Option(help="CUDA device index (default: the only one recorded).")] = None,
    step: Annotated[int | None, typer.Option(help="Step of the trace, from 1 (default: the last).")] = None,
    top: Annotated[int, typer.Option(help="Number of differences to show in each table.")] = 10,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Compare a recorded step's allocations with the planned ones.

    Allocations are paired in order, phase by phase. The output names the first difference and breaks down the
    difference between the two peaks by category, operator and module; the rows add up to it, to the byte.

    The suite records a trace for each case on CUDA (pytest -m gpu). To record your own step, call
    torch.cuda.memory._record_memory_history() before it and torch.cuda.memory._dump_snapshot(FILE) after it.
    """
    from peft_gauge.traces import reader

    form = form_of(as_json, as_csv, as_markdown)
    if top < 1:
        raise GaugeError(f"--top must be at least 1, got {top}")
    recording = reader.read(file, device)
    given = {
        "model": model,
        "method": method,
        "dtype": dtype,
        "batch": batch,
        "seq": seq,
        "optimizer": optimizer,
        "grad_checkpointing": grad_checkpointing,
        "checkpoint_reentrant": checkpoint_reentrant,
        "grad_accumulation": grad_accumulation,
        "clip_grad_norm": clip_grad_norm,
        "prepare_kbit": prepare_kbit,
        "double_quant": double_quant,
        "quantize": quantize,
        "autocast_adapter_dtype": autocast_adapter_dtype,
        "attention": attention,
        "padded": padded,
        "hold_outputs": hold_outputs,
    }
    settings = _settings(file, recording.settings, given, adapter)
    _check_recorded(file, settings, given, adapter)
    request = request_of(settings, adapter)
    measured = reader.step_log(recording, step)
    steps = len(recording.steps())

    from peft_gauge.commands.progress import bar
    from peft_gauge.plan.planner import step_log
    from peft_gauge.plan.worker import quiet
    from peft_gauge.traces.comparison import compare

    quiet()
    with bar(1, f"planning {request.name}", quiet=form is not None):
        planned, notes = step_log(request)
    found = compare(planned, measured)
    record = {
        "file": str(file),
        "title": _title(request),
        "settings": settings,
        "about": dict(recording.about),
        "step": step or steps,
        "of_steps": steps,
        **found.as_json(),
    }
    record["notes"] = [
        *found.notes,
        *_shown_peak(recording.about, found.measured.peak_bytes),
        *notes,
    ]
    if form == "json":
        print_json(record)
    elif form == "csv":
        print_csv(record["rows"], BREAKDOWN)
    elif form == "markdown":
        print_markdown(BREAKDOWN, [[_cell(row[name]) for name in BREAKDOWN] for row in record["rows"]])
    else:
        from peft_gauge.report.terminal.trace_table import show

        show(record, top)


BREAKDOWN = ("kind", "category", "operator", "module", "count", "bytes")
"""Columns of the breakdown of the difference between the peaks, whose bytes add up to it."""


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value or ABSENT)


def _settings(file: Path, told: Mapping[str, Any], given: Mapping[str, Any], adapter: Path | None) -> dict[str, Any]:
    """The trace's own settings, overridden by the options; raises `GaugeError` for a missing one."""
    settings = renamed(told)
    settings |= {name: value for name, value in given.items() if value is not None}
    missing = [name for name in REQUIRED if settings.get(name) is None and not (name == "method" and adapter)]
    if missing:
        options = ", ".join(f"--{name}" for name in missing)
        raise GaugeError(
            f"{file} does not record its settings; add {options}, and any other option of peft-gauge plan that applies"
        )
    return settings


def _check_recorded(file: Path, settings: Mapping[str, Any], given: Mapping[str, Any], adapter: Path | None) -> None:
    """Raise `GaugeError` for a method or model that the trace names and that exists only as a file elsewhere."""
    from peft_gauge.training import methods, models

    if given["method"] is None and adapter is None and str(settings["method"]).lower() not in methods.METHODS:
        raise GaugeError(f"{file} was recorded with an adapter config, {settings['method']}; give it with --adapter")
    if given["model"] is None:
        try:
            models.resolve(str(settings["model"]), weights="random")
        except GaugeError as error:
            raise GaugeError(
                f"{file} was recorded with the model {settings['model']}, which is not found here; give it with --model"
            ) from error


def renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A trace's settings under the names of the options of ``peft-gauge plan``."""
    return {OTHER_NAMES.get(name, name): value for name, value in settings.items()}


def request_of(settings: Mapping[str, Any], adapter: Path | None = None) -> PlanRequest:
    """The plan request for ``settings``, named as the options of ``peft-gauge plan``; absent ones take their defaults.

    Raises `GaugeError` for invalid settings.
    """
    from peft_gauge.plan.record import PlanRequest
    from peft_gauge.training import methods, models
    from peft_gauge.training.loops import step_settings

    dtype = models.dtype_named(str(settings.get("dtype") or "bfloat16"))
    attention = settings.get("attention")
    if attention is not None and attention not in models.ATTENTIONS:
        raise unknown("attention", str(attention), models.ATTENTIONS)
    for name in ("batch", "seq"):
        if not isinstance(settings[name], int):
            raise GaugeError(f"{name} must be a whole number, got {settings[name]!r}")
    loop = str(settings.get("loop") or "plain")
    fields = {name: settings[name] for name in STEP_OPTIONS if settings.get(name) is not None}
    arguments = {name: settings[name] for name in TRAINER_ARGUMENTS if settings.get(name)}
    arguments |= settings.get("trainer_arguments") or {}
    try:
        step, further = step_settings(loop, fields, arguments)
    except TypeError as error:
        raise GaugeError(f"invalid settings in the trace: {error}") from error
    chosen = methods.from_adapter_config(adapter) if adapter is not None else methods.get(str(settings["method"]))
    return PlanRequest(
        models.resolve(str(settings["model"]), weights="random"),
        adjusted(
            chosen,
            settings.get("quantize"),
            settings.get("double_quant"),
            settings.get("autocast_adapter_dtype"),
            settings.get("prepare_kbit"),
        ),
        step,
        dtype=dtype,
        attention=attention,
        padded=bool(settings.get("padded")),
        hold_outputs=bool(settings.get("hold_outputs")),
        checkpoint_reentrant=settings.get("checkpoint_reentrant"),
        loop=loop,  # type: ignore[arg-type]
        trainer_arguments=further,
    )


def _shown_peak(about: Mapping[str, Any], peak_bytes: int) -> list[str]:
    """The peak of torch's own counter in the steps without a log, if the trace has it."""
    shown = about.get("allocated_peak_bytes")
    if not isinstance(shown, int):
        return []
    beyond = shown - peak_bytes
    return [
        f"max_memory_allocated showed {shown:,} B, {beyond:+,} B from this peak of requests: "
        "unsplit blocks are larger than the request"
    ]


def _title(request: PlanRequest) -> str:
    from peft_gauge.report.format import step_parts

    settings = {**asdict(request.settings), "dtype": request.dtype, "loop": request.loop}
    return f"{request.name}, {', '.join(step_parts(settings))}"
