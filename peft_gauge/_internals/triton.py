"""Private parts of Triton. Nothing is imported before it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from unittest.mock import patch

LAUNCHERS = (
    ("triton.runtime.jit", "JITFunction"),
    ("triton.runtime.autotuner", "Autotuner"),
    ("triton.runtime.autotuner", "Heuristics"),
)
"""Modules and classes of Triton whose method ``run`` launches a kernel. A kernel allocates nothing."""


def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


@contextmanager
def without_kernels() -> Iterator[None]:
    """While active, Triton launches no kernel. Guarded by `has_triton`; a launcher that is missing raises `ImportError`
    or `AttributeError`."""
    with ExitStack() as stack:
        for module, name in LAUNCHERS:
            launcher = getattr(import_module(module), name)
            stack.enter_context(patch.object(launcher, "run", lambda *args, **kwargs: None))
        yield
