"""Private parts of Liger Kernel. Nothing is imported before it is used."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

from peft_gauge._internals.triton import has_triton, without_kernels


def has_liger() -> bool:
    """Whether Liger Kernel and Triton, which it needs, are installed."""
    return find_spec("liger_kernel") is not None and has_triton()


@contextmanager
def liger_on_fakes() -> Iterator[None]:
    """While active, Liger's operators run without their kernels, and afterwards its replacements in transformers are
    undone. Guarded by `has_liger`."""
    with ExitStack() as stack:
        stack.enter_context(without_kernels())
        stack.enter_context(_restored())
        stack.enter_context(_without_warnings())
        yield


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Its warnings on backends of other GPUs hold an error, and with it the frames of the step and their tensors."""
    logger = logging.getLogger("liger_kernel")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _restored() -> Iterator[None]:
    """Restore the functions and classes of transformers and of `torch.nn.functional`: Liger replaces some for the whole
    process, others in a model."""
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.") or name == "torch.nn.functional"
    ]
    before = [(module, dict(vars(module))) for module in modules]
    classes = {value for _, names in before for value in names.values() if isinstance(value, type)}
    forwards = [(each, vars(each)["forward"]) for each in classes if "forward" in vars(each)]
    try:
        yield
    finally:
        for module, names in before:
            _restore(module, names)
        for each, forward in forwards:
            each.forward = forward  # type: ignore[attr-defined]


def _restore(module: Any, names: dict[str, Any]) -> None:
    for name, value in names.items():
        if vars(module).get(name) is not value:
            setattr(module, name, value)
