"""A case measured: its memory and its times, by the instruments, in the process that runs this.

Where the measured side (`peft_gauge.cases`, `peft_gauge.step`) and the measuring side (`peft_gauge.meters`,
`peft_gauge.clock`) meet. `passes.measure` is what a process of its own is started for (`peft_gauge.isolation`).
"""

PRELOAD = ("peft_gauge.measure.preloaded",)
"""What a process that measures a case may have imported before it is forked (`peft_gauge.isolation.run`)."""
