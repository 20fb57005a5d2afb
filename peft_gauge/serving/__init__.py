"""One base model that serves many adapters through PEFT's own interface: the cost and the effect of each adapter.

`server` holds base and adapters, `observed` checks outputs, `ways` measures memory and speed of each way to serve many
adapters, and `passes.measure` does all of it in a separate process.
"""
