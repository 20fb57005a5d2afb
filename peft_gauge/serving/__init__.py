"""One base model that serves many adapters through PEFT's own interface: what one more costs, and what it changes.

`server` holds base and adapters, `observed` says whether outputs are what they should be, `ways` what each way of
serving many adapters holds and how fast it is, and `passes.measure` is what a process of its own is started for.
"""
