"""Private parts of Cut Cross-Entropy: Apple's, Unsloth's and axolotl's packages. Nothing is imported before it is used.

All of them are imported as ``cut_cross_entropy``; PyPI has Unsloth's, and axolotl installs its own. They differ in
their arguments (a bias) and in their checks of the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from peft_gauge._internals.triton import has_triton, without_kernels

if TYPE_CHECKING:
    import torch

PACKAGE = "cut-cross-entropy"


def has_cut_cross_entropy() -> bool:
    """Whether Cut Cross-Entropy and Triton, which it needs, are installed."""
    return find_spec("cut_cross_entropy") is not None and has_triton()


def release() -> str:
    """The package's name and version."""
    try:
        return f"{PACKAGE} {version(PACKAGE)}"
    except PackageNotFoundError:  # a copy that was never installed
        return PACKAGE


def takes_bias() -> bool:
    """Whether the output projection may have a bias; PyPI's 25.1.1 has no argument for it."""
    from cut_cross_entropy import linear_cross_entropy

    return "bias" in inspect.signature(linear_cross_entropy).parameters


@contextmanager
def cut_cross_entropy_on_fakes() -> Iterator[None]:
    """While active, the loss runs on fake tensors on the CPU as on a GPU: without its kernels, and without the compiler
    for its argsort, which allocates the same. Guarded by `has_cut_cross_entropy`."""
    import torch

    with ExitStack() as stack:
        stack.enter_context(without_kernels())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """The library's loss of ``hidden`` (…, tokens, width) against the next of ``labels`` (…, tokens), with its filter
    of small gradients and its defaults else, as its own patches of transformers call it.

    Inside `cut_cross_entropy_on_fakes` if the tensors are fake. Raises what the library raises.
    """
    import torch
    from cut_cross_entropy import linear_cross_entropy as apply

    from peft_gauge._internals.torch import is_fake

    of_device = torch.is_autocast_enabled
    given: dict[str, Any] = {} if bias is None else {"bias": bias}
    with ExitStack() as stack:
        if is_fake(hidden):
            enter = stack.enter_context
            # Some of these packages check the device, CUDA's autocast, and the alignment of an address.
            enter(patch.object(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True))
            enter(patch.object(torch, "is_autocast_enabled", lambda device="cpu": of_device("cpu")))
            enter(patch.object(torch, "get_autocast_gpu_dtype", lambda: torch.get_autocast_dtype("cpu")))
            enter(patch.object(torch.Tensor, "data_ptr", lambda tensor: 0))
        loss: torch.Tensor = apply(
            hidden,
            weight,
            labels,
            softcap=softcap,
            reduction=reduction,
            shift=True,
            filter_eps="auto",
            impl="cce",
            **given,
        )
    return loss
