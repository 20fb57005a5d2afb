"""Replace library attributes for the length of a block."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from peft_gauge._internals import moved, released

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import ExitStack


class Patches:
    """Replacements of library attributes that end with `stack`; the first use of each adds to `warnings`."""

    def __init__(self, stack: ExitStack, warnings: list[str]) -> None:
        self.stack = stack
        self.warnings = warnings

    def warn(self, sentence: str) -> None:
        if sentence not in self.warnings:
            self.warnings.append(sentence)

    def replace(
        self, owner: str, make: Callable[[Any], Any], *, since: str = "0.18.0", wanted: bool = True, warning: str = ""
    ) -> None:
        """`owner` is 'module:Class.attribute'; `make` receives the original and returns its replacement.

        If the library has no such attribute, nothing is replaced. Releases before ``since`` lack newer tuners and
        options; in later releases the attribute was moved, and a warning reports this if the plan reaches it
        (``wanted``).
        """
        module, _, path = owner.partition(":")
        *parents, name = path.split(".")
        try:
            target: Any = importlib.import_module(module)
        except ModuleNotFoundError:
            target = None
        for parent in parents:
            target = getattr(target, parent, None)
        original = vars(target).get(name) if target is not None else None
        if original is None:
            if wanted and released("peft", since):
                self.warn(moved("peft", owner.replace(":", ".")))
            return
        is_static = isinstance(original, staticmethod)
        stand_in = make(original.__func__ if is_static else original)

        def used(*args: Any, **kwargs: Any) -> Any:
            if warning:
                self.warn(warning)
            return stand_in(*args, **kwargs)

        setattr(target, name, staticmethod(used) if is_static else used)
        self.stack.callback(setattr, target, name, original)


def asks_for(config: Mapping[str, Any], variant: str) -> bool:
    """Whether an active setting of ``config`` names ``variant``, for example ``init_lora_weights="pissa"``."""
    return any(value and variant in f"{name}={value}".lower() for name, value in config.items())
