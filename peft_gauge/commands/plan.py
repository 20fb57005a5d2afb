"""``peft-gauge plan``: predict the memory of a training step for any model and method, without a GPU."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_gauge._internals.deepspeed import has_deepspeed
from peft_gauge.commands.defaults import is_from_file
from peft_gauge.commands.plan_output import show
from peft_gauge.commands.plan_step import (
    OF_BASE,
    OF_LORA,
    adjusted,
    base_of,
    decided,
    described_step,
    in_stored_dtype,
    lora_settings,
    with_lora_settings,
    within_positions,
)
from peft_gauge.commands.tables import AsCsv, AsJson, AsMarkdown, form_of
from peft_gauge.commas import listed, listed_paths
from peft_gauge.errors import GaugeError, unknown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft_gauge.plan.record import PlanFailure, PlanOutcome, PlanRequest
    from peft_gauge.training.methods import Method
    from peft_gauge.training.sharding import Sharding

FINDABLE = ("batch", "seq", "rank", "gpus")


def plan(
    context: typer.Context,
    base: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Name of a model record, folder or file with a config, or Hub id (default: the recipe's).",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The same as MODEL.")] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Config file of TRL, axolotl, LLaMA-Factory or TrainingArguments, or folder of a saved adapter: plan "
            "the step that it describes."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Methods, comma-separated or repeated (default: all seven; peft-gauge methods lists them)."),
    ] = None,
    adapter: Annotated[
        list[Path] | None, typer.Option(help="PEFT adapter_config.json or its folder; comma-separated or repeated.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA's rank, in place of the method's.")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA's α, in place of the method's.")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="LoRA's target modules, comma-separated, or all-linear.")
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="LoRA's dropout, in place of the method's.")] = None,
    quantize: Annotated[str | None, typer.Option(help="Quantize the base model to nf4, fp4 or int8.")] = None,
    double_quant: Annotated[
        bool | None, typer.Option(help="Quantize the quantization constants of a 4-bit base too.")
    ] = None,
    loop: Annotated[
        str | None,
        typer.Option(
            help="plain (this suite's step), trainer (transformers.Trainer) or sft (trl.SFTTrainer), with that "
            "trainer's defaults (default: plain)."
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An argument of TrainingArguments or SFTConfig, or a key of --recipe; repeatable.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16: of base weights and compute (default: bfloat16; sft: float32)."
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Micro-batch size (default: 4).")] = None,
    seq: Annotated[
        int | None, typer.Option(help="Sequence length in tokens (default: 768, or the model's limit).")
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="adamw, adamw-fused, adamw-foreach-off, adamw8bit, paged-adamw8bit, sgd, or a name of "
            "TrainingArguments.optim (default: adamw, or the trainer's)."
        ),
    ] = None,
    grad_checkpointing: Annotated[
        bool | None, typer.Option(help="Recompute activations in backward (default: no, or the trainer's).")
    ] = None,
    checkpoint_reentrant: Annotated[
        bool | None, typer.Option(help="Use reentrant gradient checkpointing (default: no, or the trainer's).")
    ] = None,
    grad_accumulation: Annotated[
        int | None, typer.Option(help="Micro-batches per optimizer step (default: 1).")
    ] = None,
    clip_grad_norm: Annotated[
        float | None, typer.Option(help="Maximum gradient norm, 0 for none (default: none, or the trainer's).")
    ] = None,
    mixed_precision: Annotated[
        str | None,
        typer.Option(
            help="no, bf16 or fp16: run forward under autocast, with loss scaling for fp16 (default: no, or the "
            "trainer's)."
        ),
    ] = None,
    float32_outputs: Annotated[
        bool, typer.Option(help="Copy 16-bit outputs to float32, as accelerate and Trainer do.")
    ] = False,
    autocast_adapter_dtype: Annotated[bool | None, typer.Option(help="Keep 16-bit adapters in float32.")] = None,
    prepare_kbit: Annotated[
        bool | None, typer.Option(help="Cast unquantized parameters to float32, as prepare_model_for_kbit_training.")
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(help="full, chunked along the sequence, or cce: Cut Cross-Entropy (default: full)."),
    ] = None,
    loss_chunk: Annotated[
        int | None, typer.Option(help="Tokens in a chunk of --loss chunked (default: 8 chunks along the sequence).")
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(help="sdpa, eager or flash_attention_2 (default: sdpa if the model supports it, else eager)."),
    ] = None,
    padded: Annotated[bool, typer.Option("--padded/--unpadded", help="Pass an attention mask with the batch.")] = False,
    use_cache: Annotated[bool, typer.Option(help="Let the model return its key-value cache.")] = False,
    hold_outputs: Annotated[bool, typer.Option(help="Keep the model outputs alive until the step ends.")] = False,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            help="GPU names or memory sizes, comma-separated or repeated. 24GB is a GPU sold with 24 GB "
            "(25.25·10⁹ bytes usable); 24GiB, 25300MB and plain bytes are exact."
        ),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", help="GPUs (on each node) that share the step; --batch is that of each.")
    ] = None,
    nodes: Annotated[
        int, typer.Option(help="Nodes with --gpus each; all ranks are one group, unless --replicate.")
    ] = 1,
    replicate: Annotated[
        int, typer.Option(help="FSDP2: groups of GPUs that each hold all shards (HSDP), usually one per node.")
    ] = 1,
    strategy: Annotated[
        str | None, typer.Option(help="fsdp2, ddp, zero1, zero2 or zero3: how --gpus share the step (default: fsdp2).")
    ] = None,
    offload: Annotated[
        str | None,
        typer.Option(
            help="Keep in host memory: params (FSDP2: shards, gradients and the optimizer's state; ZeRO-3: shards of "
            "weights), optimizer (ZeRO: its state, float32 weights and gradients), or both (ZeRO-3): params,optimizer."
        ),
    ] = None,
    reshard_after_forward: Annotated[
        bool, typer.Option(help="FSDP2: release a block's gathered weights after its forward.")
    ] = True,
    find: Annotated[
        str | None,
        typer.Option(help="Find the largest batch, seq or rank that fits --gpu, or the fewest gpus for the step."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Folder of calibrations (default: the user's, see peft-gauge calibrate).")
    ] = None,
    advise: Annotated[
        bool,
        typer.Option(
            "--advise", help="Plan changes that need less memory, cheapest first, and mark the first that fits."
        ),
    ] = False,
    timeline: Annotated[
        bool, typer.Option("--timeline", help="Draw memory over the step by category, and name the peak's modules.")
    ] = False,
    timeline_file: Annotated[
        Path | None, typer.Option(help="Save that drawing as .svg or .png, and its data next to it as .csv.")
    ] = None,
    wide: Annotated[
        bool, typer.Option("--wide", help="Show all columns, also where the terminal is too narrow for them.")
    ] = False,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Predict the memory of a training step: peak, resident and device bytes by category.

    Exit code 1: a step does not fit a --gpu; 2: a case cannot be planned.
    """
    if (strategy or "").startswith("zero") and has_deepspeed():
        # transformers imports DeepSpeed, which would look for a GPU and remark on it; a plan needs none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from peft_gauge.commands.progress import bar, plan_with_bar
    from peft_gauge.commands.timelines import timelines
    from peft_gauge.plan.recipes import read
    from peft_gauge.plan.record import PlanRequest
    from peft_gauge.training import methods, models
    from peft_gauge.training.loops import key_values

    form = form_of(as_json, as_csv, as_markdown)
    if form in ("csv", "markdown") and (advise or timeline):
        raise GaugeError(f"--{form} prints one table, without {'--advise' if advise else '--timeline'}; use --json")
    quiet = form is not None
    from_file = partial(is_from_file, context)
    if base is not None and from_file("model"):
        model = None
    if base is not None and model is not None:
        raise GaugeError(f"the model is given twice: {base} and --model {model}; give it once")
    model = model or base
    method, adapter = listed(method), listed_paths(adapter)
    cards = _checked_gpus(listed(gpu), find)
    sharding = _sharding(gpus, nodes, strategy, reshard_after_forward, offload, replicate, find)
    if find is not None and (advise or timeline or timeline_file is not None):
        other = "--advise" if advise else "--timeline"
        raise GaugeError(f"{other} and --find exclude each other; drop one of them")
    if timeline_file is not None:
        from peft_gauge.report.charts.memory_picture import check_destination

        check_destination(timeline_file)
    if seq is not None:
        _checked_seq(seq)
    if attention is not None and attention not in models.ATTENTIONS:
        raise unknown("attention", attention, models.ATTENTIONS)
    options = {
        "loop": loop,
        "batch": batch,
        "seq": seq,
        "optimizer": optimizer,
        "grad_checkpointing": grad_checkpointing,
        "checkpoint_reentrant": checkpoint_reentrant,
        "grad_accumulation": grad_accumulation,
        "clip_grad_norm": _checked_norm(clip_grad_norm),
        "mixed_precision": mixed_precision,
        "float32_outputs": float32_outputs or None,
        "dtype": dtype,
        "attention": attention,
        "loss": loss,
        "method": method or None,
        "adapter": adapter or None,
        "rank": rank,
        "alpha": alpha,
        "target_modules": target_modules,
        "dropout": dropout,
        "quantize": quantize,
        "double_quant": double_quant,
        "autocast_adapter_dtype": autocast_adapter_dtype,
        "prepare_kbit": prepare_kbit,
    }
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    found = None if recipe is None else read(recipe, key_values(changes or []))
    if found is not None:  # the recipe takes precedence over the file's defaults
        given = {name: value for name, value in given.items() if name not in decided(found) or not from_file(name)}
    lora = lora_settings(*map(given.get, OF_LORA))
    step = described_step(given, found, {} if recipe is not None else key_values(changes or []))
    record = models.resolve(base_of(model, found))
    step = in_stored_dtype(step, record)
    default_seq = step["settings"].seq
    if "seq" not in given and (found is None or "seq" not in found.fields):
        step = within_positions(step, record)

    def request(each: Method) -> PlanRequest:
        return PlanRequest(
            model=record,
            method=adjusted(each, *map(given.get, OF_BASE)),
            loss_chunk=loss_chunk,
            padded=padded,
            use_cache=use_cache,
            hold_outputs=hold_outputs,
            sharding=sharding,
            gpus=cards,
            calibration_folder=None if calibration is None else str(calibration),
            **step,
        )

    adapters, unusable = _adapters(given.get("adapter", []), record.name)
    chosen: Sequence[Method] = [*map(methods.get, given.get("method", [])), *adapters]
    if found is not None and found.method is not None:
        chosen = [found.method]
    chosen = with_lora_settings(chosen or ([] if unusable else methods.DEFAULT_METHODS), lora, bool(chosen))
    requests = [request(each) for each in chosen]
    if timeline_file is not None and len(requests) != 1:
        raise GaugeError("--timeline-file draws one step; choose it with --method or --adapter")
    if find is not None:
        for each in requests:
            each.with_value(find, 2)  # refused now, not after minutes of planning
    if step["settings"].seq != default_seq and find != "seq":
        print(f"peft-gauge: planned at {record.max_positions} tokens, the limit of {record.name}", file=sys.stderr)
    text = "planning" if find is None else f"searching {'the fewest' if find == 'gpus' else 'the largest'} {find}"
    outcomes = plan_with_bar(requests, text, find=find, quiet=quiet)
    advice = _advice(requests, outcomes, quiet=quiet) if advise else {}
    drawn = {}
    if timeline or timeline_file is not None:
        with bar(len(requests), "tracing the timeline", quiet=quiet) as display:
            drawn = timelines(requests, outcomes, timeline_file, display.advance)
    show([*outcomes, *unusable], form, found, advice, drawn if timeline else {}, wide)


def _advice(
    requests: Sequence[PlanRequest], outcomes: Sequence[PlanOutcome], *, quiet: bool
) -> dict[int, list[dict[str, Any]]]:
    """The advice for each planned step, by its place."""
    from peft_gauge.commands.progress import plan_with_bar
    from peft_gauge.plan import advice
    from peft_gauge.plan.record import Plan

    plan_all = partial(plan_with_bar, text="planning changes", quiet=quiet)
    return {
        place: [each.as_json() for each in advice.advise(request, outcome, plan_all)]
        for place, (request, outcome) in enumerate(zip(requests, outcomes, strict=True))
        if isinstance(outcome, Plan)
    }


def _adapters(paths: Sequence[Path], model: str) -> tuple[list[Method], list[PlanFailure]]:
    """The methods of the adapter configs at ``paths``, and a failure for each invalid one; the others are planned."""
    from peft_gauge.plan.record import PlanFailure
    from peft_gauge.training import methods

    found: list[Method] = []
    failures: list[PlanFailure] = []
    for path in paths:
        try:
            found.append(methods.from_adapter_config(path))
        except GaugeError as error:
            failures.append(PlanFailure(model, methods.adapter_name(path), str(error)))
    return found, failures


def _checked_gpus(names: Sequence[str], find: str | None) -> tuple[str, ...]:
    from peft_gauge.memory import gpus

    if find is not None and find not in FINDABLE:
        raise unknown("quantity to find", find, FINDABLE)
    if find is not None and not names:
        raise GaugeError(f"--find {find} requires --gpu with a name or a size")
    for name in names:
        gpus.lookup(name)
    return tuple(names)


def _sharding(
    gpus: int | None,
    nodes: int,
    strategy: str | None,
    reshard_after_forward: bool,
    offload: str | None,
    replicate: int,
    find: str | None,
) -> Sharding | None:
    """The GPUs that share the step; ``None`` for one."""
    from peft_gauge.training.sharding import Sharding

    kinds = _offloaded(offload)
    if find == "gpus":
        if gpus is not None:
            raise GaugeError("--find gpus searches their number; drop --gpus")
        if replicate != 1:
            raise GaugeError("--find gpus searches groups of one replica; drop --replicate")
        return Sharding(2, strategy or "fsdp2", nodes, reshard_after_forward, kinds)  # type: ignore[arg-type]
    if gpus is None:
        given = {"--nodes": nodes != 1, "--strategy": strategy is not None}
        given["--no-reshard-after-forward"] = not reshard_after_forward
        given["--offload"] = offload is not None
        given["--replicate"] = replicate != 1
        for option, is_given in given.items():
            if is_given:
                raise GaugeError(f"{option} needs --gpus: how many GPUs share the step")
        return None
    found = Sharding(
        gpus,
        strategy or "fsdp2",  # type: ignore[arg-type]
        nodes,
        reshard_after_forward,
        kinds,
        replicate,
    )
    return found if found.ranks > 1 else None


def _offloaded(given: str | None) -> tuple[str, ...]:
    from peft_gauge.training.sharding import OPTIMIZER, PARAMS

    found = {part.strip() for part in (given or "").split(",") if part.strip()}
    wrong = sorted(found - {PARAMS, OPTIMIZER})
    if wrong or (given is not None and not found):
        raise GaugeError(f"--offload must be params, optimizer or both, not {given!r}")
    return tuple(each for each in (PARAMS, OPTIMIZER) if each in found)


def _checked_seq(seq: int) -> int:
    if seq < 2:
        raise GaugeError(f"--seq must be at least 2 to have a next token to predict, got {seq}")
    return seq


def _checked_norm(norm: float | None) -> float | None:
    if norm is not None and not norm >= 0:
        raise GaugeError(f"--clip-grad-norm must be positive, or 0 for no clipping, got {norm}")
    return norm
