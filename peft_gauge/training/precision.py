"""Names of mixed precisions; without torch, so that options are checked before it is imported."""

from __future__ import annotations

from typing import Literal

from peft_gauge.errors import unknown

MixedPrecision = Literal["no", "bf16", "fp16"]
MIXED_PRECISIONS: tuple[MixedPrecision, ...] = ("no", "bf16", "fp16")


def check_mixed_precision(name: str) -> None:
    """Raise `GaugeError` unless ``name`` is one of `MIXED_PRECISIONS`."""
    if name not in MIXED_PRECISIONS:
        raise unknown("mixed precision", name, MIXED_PRECISIONS)
