"""Python's garbage collector, which goes through all objects at moments of its own."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collector() -> Iterator[None]:
    """Turn off the collector in the block.

    Where storages are followed, its timing would make releases depend on earlier code. Where many files are parsed,
    which make no cycles of objects, it takes a third of their time, and a fifth of the time to import torch and PEFT.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def end_quickly() -> None:
    """Let this process end without a last search for garbage in all objects of torch and transformers, which takes 2 s.

    Call it in a program, not in a library: objects in cycles that live until the end are not finalized, so that an open
    file among them loses its unwritten data.
    """
    atexit.register(gc.freeze)
