"""Measure memory and times of a case, in the process that calls this.

Here the training code (`peft_gauge.training`) meets the instruments (`peft_gauge.meters`, `peft_gauge.clock`).
`passes.measure` runs in a separate process (`peft_gauge.isolation`).
"""

from __future__ import annotations

from typing import Literal

Pass = Literal["memory", "speed", "fingerprint"]
"""A part of `passes.measure`, which a run needs or leaves out."""

IMPORTS = "imports"
"""The phase of a measured process that finds out whether this machine can use a library."""

PRELOAD = ("peft_gauge.measure.preloaded",)
"""Modules that a process for a case may import before it is forked (`peft_gauge.isolation.run`)."""
