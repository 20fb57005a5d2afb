"""bitsandbytes, imported and checked."""

from __future__ import annotations

import logging
import re
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch

from peft_gauge._internals.bitsandbytes import NOTICES, native_library
from peft_gauge._internals.torch import compiled_when_called, unset_fake_temporarily
from peft_gauge.collector import no_collector
from peft_gauge.errors import GaugeError, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

MINIMUM_BITSANDBYTES = (0, 46, 1)  # the first that trains 4-bit layers on CPU


def load_bitsandbytes(device: str = "cpu") -> ModuleType:
    """Import bitsandbytes and return the module.

    Two of its messages are suppressed: the notice about an optional CPU kernel, and the traceback that it prints if its
    CUDA library is missing. PEFT imports bitsandbytes itself: import it by `import_peft`.

    Raises `GaugeError` if bitsandbytes is missing or older than 0.46.1, or, for a CUDA ``device``, if it has no kernels
    for torch's CUDA version.
    """
    try:
        installed = _installed()
        with _importing():
            import bitsandbytes
    except (ImportError, PackageNotFoundError) as error:
        raise GaugeError(f"bitsandbytes cannot be imported ({error}); run: pip install bitsandbytes") from error
    numbers = tuple(int(part) for part in installed.split(".")[:3] if part.isdigit())
    if numbers < MINIMUM_BITSANDBYTES:
        raise GaugeError(f"bitsandbytes {installed} is too old for 4 bit on CPU; install 0.46.1 or newer")
    if torch.device(device).type == "cuda":
        _check_cuda_kernels(installed)
    module: ModuleType = bitsandbytes
    return module


@cache  # reading it takes half a millisecond, and a model has hundreds of layers
def _installed() -> str:
    return version("bitsandbytes")


def import_peft() -> ModuleType:
    """Import PEFT and return the module: without bitsandbytes' messages, and without importing torch's compiler."""
    with _importing():
        import peft
    module: ModuleType = peft
    return module


@contextmanager
def _importing() -> Iterator[None]:
    """Around an import of bitsandbytes, by itself or by PEFT."""
    hide_notices()
    # bitsandbytes makes lookup tables on import; under a fake mode they would stay fake for the whole process.
    with no_collector(), unset_fake_temporarily(), compiled_when_called():
        yield


def hide_notices() -> None:
    """Suppress the messages of `NOTICES`: before an import that may import bitsandbytes."""
    for name in NOTICES:
        logging.getLogger(name).addFilter(_is_no_notice)


def _check_cuda_kernels(installed: str) -> None:
    """Raise `GaugeError` if the CUDA library is missing: bitsandbytes itself fails only at the first kernel."""
    lib = native_library()
    if lib.compiled_with_cuda:
        return
    # The stand-in for a library that failed to load returns a function for any unknown attribute; `vars` does not.
    facts = vars(lib)
    told = re.sub(r"\S*/", "", one_line(facts.get("error_msg", "it loaded its library for CPUs only"), 160))
    versions = ", ".join(facts.get("available_versions", ()))
    raise GaugeError(
        f"bitsandbytes {installed} has no kernels for this torch's CUDA {torch.version.cuda}: {told}"
        + (f"; it has kernels for CUDA {versions}" if versions else "")
        + "; install matching releases of bitsandbytes and torch (for details run: python -m bitsandbytes)"
    )


def _is_no_notice(message: logging.LogRecord) -> bool:
    return not str(message.msg).startswith(NOTICES[message.name])
