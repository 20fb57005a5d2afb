"""The subcommands of ``peft-gauge``, one per module."""
