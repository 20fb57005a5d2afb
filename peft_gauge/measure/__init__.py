"""Measure memory and times of a case, in the process that calls this.

Here the training code (`peft_gauge.training`) meets the instruments (`peft_gauge.meters`, `peft_gauge.clock`).
`passes.measure` runs in a separate process (`peft_gauge.isolation`).
"""

PRELOAD = ("peft_gauge.measure.preloaded",)
"""Modules that a process for a case may import before it is forked (`peft_gauge.isolation.run`)."""
