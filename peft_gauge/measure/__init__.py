"""A case measured: its memory and its times, by the instruments, in the process that runs this.

Where what is trained (`peft_gauge.training`) meets the instruments (`peft_gauge.meters`, `peft_gauge.clock`).
`passes.measure` runs in a process of its own (`peft_gauge.isolation`).
"""

PRELOAD = ("peft_gauge.measure.preloaded",)
"""What a process that measures a case may have imported before it is forked (`peft_gauge.isolation.run`)."""
