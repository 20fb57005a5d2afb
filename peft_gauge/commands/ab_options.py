"""What `peft-gauge ab` and `peft-gauge bisect` have in common: cases out of options, and how they end early."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peft_gauge import machine
from peft_gauge.environments.measurement import Setting
from peft_gauge.environments.worker import CaseSpec, quietest_cores
from peft_gauge.errors import GaugeError, unknown
from peft_gauge.training import methods, models

if TYPE_CHECKING:
    from peft_gauge.environments.state import Kept

# (batch, seq) of a step, as a bare run of the benchmarks takes it.
SHAPE = {"cpu": (1, 64), "cuda": (4, 768)}
INTERRUPTED = 130  # what shells make of Ctrl-C; 1 would say that something is worse


def cases_of(
    names: Sequence[str],
    model: str,
    batch: int | None,
    seq: int | None,
    device: str | None,
    dtype: str | None = None,
) -> list[CaseSpec]:
    """A case for each method of ``names``, which may hold several with commas; raises `GaugeError` for what is none.

    ``device`` and ``dtype`` of the base are those of a bare run of the benchmarks where they are ``None``.
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
            raise GaugeError(f"{option} must be at least {least}, not {value}")
    record.check_sequence(tokens)
    dtype = models.default_dtype(device) if dtype is None else dtype
    models.check_dtype(dtype)
    return [CaseSpec(model, name, rows, tokens, device, dtype) for name in chosen]


def _checked_device(device: str | None) -> str:
    if device is None:
        return "cuda" if machine.why_no_cuda() is None else "cpu"
    if device not in SHAPE:
        raise unknown("device", device, SHAPE)
    reason = machine.why_no_cuda() if device == "cuda" else None
    if reason is not None:
        raise GaugeError(f"--device cuda cannot be had: {reason}")
    return device


def setting_of(threads: int, device: str) -> Setting:
    """How both sides run; on the CPU they share cores, since only one of them steps at a time."""
    if threads < 1:
        raise GaugeError(f"--threads must be at least 1, not {threads}")
    return Setting(threads, quietest_cores(threads) if device == "cpu" else None)


def tell_interrupted(kept: Kept) -> None:
    """Say on standard error where the finished work is."""
    parts = f"{len(kept)} part{'s' * (len(kept) != 1)}"
    what = f"what was measured of {parts} is kept in {kept.path}, and" if len(kept) else "nothing was measured;"
    print(f"peft-gauge: interrupted; {what} the same command goes on from there", file=sys.stderr)
