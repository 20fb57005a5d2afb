"""Private parts of accelerate. Nothing is imported before it is used."""

from __future__ import annotations

from typing import Any

# --- mixed precision ----------------------------------------------------------------------------------------


def scale_losses(accelerator: Any, scaler: Any) -> None:
    """Make ``accelerator`` use fp16 as on CUDA, with ``scaler``, before it prepares a model: on a CPU it silently
    leaves out autocast and the scaler. Guarded by a contract test."""
    accelerator.native_amp = True
    accelerator.scaler = scaler
