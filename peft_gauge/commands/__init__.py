"""The verbs of the ``peft-gauge`` command that need more than a few lines: one a file."""
