"""Functions in processes of their own that need no imports: they are forked from this process's one server."""

from __future__ import annotations

from typing import Any

from peft_gauge import isolation
from peft_gauge.measure import PRELOAD
from peft_gauge.pytest_plugin.workers import process_environment


def forked(function: str, *arguments: Any, limit_seconds: float = 300.0) -> isolation.ProcessOutcome:
    """How ``function`` (``"package.module:name"``) ended in a process that has imported all that cases need.

    A new interpreter takes 7 s of a core for the same imports.
    """
    return isolation.run(
        function, *arguments, limit_seconds=limit_seconds, environment=process_environment(), preload=PRELOAD
    )
