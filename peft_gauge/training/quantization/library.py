"""bitsandbytes, imported and checked."""

from __future__ import annotations

import logging
import re
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch

from peft_gauge._internals.bitsandbytes import NOTICES, native_library
from peft_gauge._internals.torch import unset_fake_temporarily
from peft_gauge.errors import GaugeError, one_line

if TYPE_CHECKING:
    from types import ModuleType

MINIMUM_BITSANDBYTES = (0, 46, 1)  # the first that trains 4-bit layers on CPU


def load_bitsandbytes(device: str = "cpu") -> ModuleType:
    """The bitsandbytes module, imported without its notice about an optional CPU kernel and without the traceback that
    it prints where its CUDA library is missing; its other messages pass.

    Call it before PEFT is imported, which imports bitsandbytes by itself. Raises `GaugeError` where bitsandbytes is
    missing or older than 0.46.1, and, with a CUDA ``device``, where it has no kernels for this torch's CUDA.
    """
    for name in NOTICES:
        logging.getLogger(name).addFilter(_is_no_notice)
    try:
        installed = version("bitsandbytes")
        # bitsandbytes makes lookup tables when imported; made under a fake mode they would stay fake for good.
        with unset_fake_temporarily():
            import bitsandbytes
    except (ImportError, PackageNotFoundError) as error:
        raise GaugeError(f"bitsandbytes cannot be imported ({error}); run: pip install bitsandbytes") from error
    numbers = tuple(int(part) for part in installed.split(".")[:3] if part.isdigit())
    if numbers < MINIMUM_BITSANDBYTES:
        raise GaugeError(f"bitsandbytes {installed} is too old for 4 bit on CPU; 0.46.1 or newer is needed")
    if torch.device(device).type == "cuda":
        _check_cuda_kernels(installed)
    module: ModuleType = bitsandbytes
    return module


def _check_cuda_kernels(installed: str) -> None:
    """bitsandbytes imports without its CUDA library too, and fails at the first kernel, with a page of advice."""
    lib = native_library()
    if lib.compiled_with_cuda:
        return
    # What stands in for a library that did not load gives a function for any name that it has not itself.
    facts = vars(lib)
    told = re.sub(r"\S*/", "", one_line(facts.get("error_msg", "it loaded its library for CPUs only"), 160))
    versions = ", ".join(facts.get("available_versions", ()))
    raise GaugeError(
        f"bitsandbytes {installed} has no kernels for this torch's CUDA {torch.version.cuda}: {told}"
        + (f"; it comes with CUDA {versions}" if versions else "")
        + "; install a release of bitsandbytes or of torch that fits the other (python -m bitsandbytes tells more)"
    )


def _is_no_notice(message: logging.LogRecord) -> bool:
    return not str(message.msg).startswith(NOTICES[message.name])
