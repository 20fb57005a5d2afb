"""Values as readers see them: the one place for units and digits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ABSENT = "–"
"""Shown for an unavailable metric; never 0."""


def shown(value: float | None, form: str) -> str:
    """``value`` in ``form``, or a dash for ``None``."""
    return ABSENT if value is None else form.format(value)


def shown_bytes(value: float | None) -> str:
    """Bytes as kB, MB or GB (powers of ten), to at least three digits."""
    if value is None:
        return ABSENT
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} B"


def shown_seconds(value: float | None) -> str:
    """Seconds as s, ms or µs, to at least three digits."""
    if value is None:
        return ABSENT
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value / 1e-6:.2f} µs"


def time_left(seconds: float) -> str:
    """An estimate of the remaining time, in steps that it is worth: ``about 40 s left``."""
    if seconds < 100:
        return f"about {max(5, 5 * round(seconds / 5))} s left"
    return f"about {round(seconds / 60)} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"


LOOP_TITLES = {"trainer": "transformers.Trainer", "sft": "trl.SFTTrainer"}
"""Training loops of other libraries, by the names that plans give them."""


def step_parts(settings: Mapping[str, Any], *, tokens: bool = True) -> list[str]:
    """A planned step's settings for a title, with or without its shape in ``tokens``."""
    loop, mixed = settings.get("loop", "plain"), settings.get("mixed_precision", "no")
    parts = {
        f"by {LOOP_TITLES.get(loop)}": loop != "plain",
        f"{settings['batch']}×{settings['seq']} tokens": tokens,
        settings["dtype"]: True,
        settings["optimizer"]: True,
        "gradient checkpointing": settings["grad_checkpointing"],
        f"{mixed} autocast": mixed != "no",
        sharded(settings): bool(settings.get("sharding")),
    }
    return [part for part, shown in parts.items() if shown]


def sharded(settings: Mapping[str, Any]) -> str:
    """The GPUs that share a planned step, and how; empty for one."""
    found = settings.get("sharding")
    if not found:
        return ""
    nodes = f" on {found['nodes']} nodes" if found["nodes"] > 1 else ""
    kept = "" if found["reshard_after_forward"] else " without resharding after forward"
    replicas = f", {found['replicas']} replicas" if found.get("replicas", 1) > 1 else ""
    offloaded = ", offloaded to host memory" if found.get("offload") else ""
    return f"{found['gpus'] * found['nodes']} GPUs{nodes} by {found['strategy'].upper()}{replicas}{kept}{offloaded}"


def step_conditions(settings: Mapping[str, Any]) -> str:
    """A measured or planned step's loop, shape, data type and autocast."""
    loop, mixed = LOOP_TITLES.get(settings.get("loop", "plain")), settings.get("mixed_precision", "no")
    by, autocast = f"by {loop}, " if loop else "", f" with {mixed} autocast" if mixed != "no" else ""
    return f"{by}{settings.get('batch')}×{settings.get('seq')} tokens, {settings.get('dtype')}{autocast}"
