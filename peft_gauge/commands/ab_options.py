"""Options that `peft-gauge ab` and `peft-gauge bisect` share, and their behaviour on Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from peft_gauge import machine
from peft_gauge.environments.measurement import Setting
from peft_gauge.environments.worker import CaseSpec, quietest_cores
from peft_gauge.errors import GaugeError, unknown
from peft_gauge.training import methods, models
from peft_gauge.training.loops import check_loop, key_values
from peft_gauge.training.precision import check_mixed_precision

if TYPE_CHECKING:
    from peft_gauge.environments.state import Kept
    from peft_gauge.training.loops import Loop
    from peft_gauge.training.precision import MixedPrecision

# (batch, seq) of a step; the benchmarks use the same defaults.
SHAPE = {"cpu": (1, 64), "cuda": (4, 768)}
INTERRUPTED = 130  # the shell's exit code for Ctrl-C; 1 would mean a regression


def cases_of(
    names: Sequence[str],
    model: str,
    batch: int | None,
    seq: int | None,
    device: str | None,
    dtype: str | None = None,
    mixed_precision: str | None = None,
    loop: str = "plain",
    changes: Sequence[str] = (),
) -> list[CaseSpec]:
    """One case per method in ``names`` (each entry may list several, comma-separated).

    ``None`` for ``device`` or ``dtype`` means the default of the benchmarks. Raises `GaugeError` for an invalid option.
    """
    chosen = [methods.get(name.strip()).name for entry in names for name in entry.split(",")]
    twice = sorted({name for name in chosen if chosen.count(name) > 1})
    if twice:
        raise GaugeError(f"--method {twice[0]} is given twice")
    device = _checked_device(device)
    record = models.resolve(model)
    rows, tokens = SHAPE[device]
    rows = rows if batch is None else batch
    tokens = min(tokens, record.max_positions or tokens) if seq is None else seq
    for option, value, least in (("--batch", rows, 1), ("--seq", tokens, 2)):
        if value < least:
            raise GaugeError(f"{option} must be at least {least}, got {value}")
    record.check_sequence(tokens)
    if dtype is None:
        dtype = "float32" if loop == "sft" else models.default_dtype(device)
    dtype = models.dtype_named(dtype)
    check_loop(loop)
    arguments = key_values(changes)
    if arguments and loop == "plain":
        raise GaugeError(f"--set {changes[0]} is an argument of a trainer: add --loop trainer or --loop sft")
    if mixed_precision is None and loop == "plain":
        mixed_precision = "no"
    if mixed_precision is not None:
        check_mixed_precision(mixed_precision)
    spec = CaseSpec(
        model,
        chosen[0],
        rows,
        tokens,
        device,
        dtype,
        mixed_precision=cast("MixedPrecision | None", mixed_precision),
        loop=cast("Loop", loop),
        trainer_arguments=arguments,
    )
    return [replace(spec, method=name) for name in chosen]


def _checked_device(device: str | None) -> str:
    if device is None:
        return "cuda" if machine.why_no_cuda() is None else "cpu"
    if device not in SHAPE:
        raise unknown("device", device, SHAPE)
    reason = machine.why_no_cuda() if device == "cuda" else None
    if reason is not None:
        raise GaugeError(f"--device cuda is unavailable: {reason}")
    return device


def setting_of(threads: int, device: str) -> Setting:
    """Threads and cores for both sides; on the CPU they share cores, since only one of them steps at a time."""
    if threads < 1:
        raise GaugeError(f"--threads must be at least 1, got {threads}")
    return Setting(threads, quietest_cores(threads) if device == "cpu" else None)


def tell_interrupted(kept: Kept) -> None:
    """Print on standard error which work was saved."""
    parts = f"{len(kept)} part{'s' * (len(kept) != 1)}"
    saved = f"{parts} saved in {kept.path}" if len(kept) else "nothing was measured"
    print(f"peft-gauge: interrupted; {saved}; run the same command again to continue", file=sys.stderr)
