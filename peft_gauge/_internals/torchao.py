"""Private parts of torchao's optimizers. Nothing is imported before it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

OPTIMIZERS = ("adamw_torch_4bit", "adamw_torch_8bit")
"""Names in ``TrainingArguments.optim`` of the optimizers that are torchao's."""

STATES = ("torchao.optim.subclass_4bit", "torchao.optim.subclass_8bit")
"""Modules of the quantized states, each with `get_qmap_signed` and `get_qmap_unsigned`: tables of values, kept once
made."""


def has_torchao() -> bool:
    """Whether torchao is installed."""
    return find_spec("torchao") is not None


@contextmanager
def optimizers_on_fakes() -> Iterator[None]:
    """While active, the optimizers step on fake tensors operator by operator instead of in a compiled function.

    Their tables of values are made before. Guarded by `has_torchao`; a table that is missing raises `AttributeError` or
    `ImportError`.
    """
    import torch

    from peft_gauge._internals.torch import is_fake, unset_fake_temporarily, without_modes

    with unset_fake_temporarily():
        for name in STATES:
            states = import_module(name)
            states.get_qmap_signed()
            states.get_qmap_unsigned()
    copy: Any = torch.Tensor.__deepcopy__

    def copied(tensor: torch.Tensor, memo: Any) -> Any:
        with nullcontext() if is_fake(tensor) else without_modes():
            return copy(tensor, memo)

    # The learning rate is a real tensor, which accelerate copies with the optimizer's groups.
    with torch.compiler.set_stance("force_eager"), patch.object(torch.Tensor, "__deepcopy__", copied):
        yield
