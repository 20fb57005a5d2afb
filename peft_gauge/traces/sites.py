"""The line of Python that requested memory, in the same notation for recorded and running code.

A *frame* is written ``path:line:function``, as in ``torch/nn/functional.py:1443:dropout``; a *site* is the innermost
frame without its line, which differs between releases.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import PurePath
from types import FrameType

_PACKAGES = re.compile(r"^.*(?:site|dist)-packages/")
_OWN = re.compile(r"^.*?(?=peft_gauge/(?!.*peft_gauge/))")

# Code between an operator and its Python caller: dispatch, shape rules, and this project's planner.
_BETWEEN = re.compile(
    r"^(?:torch/(?:_ops|_subclasses/|_library/|_prims|_refs|_decomp|_meta_registrations|_compile|utils/_python_dispatch"
    r"|utils/_device|utils/_stats|_dynamo|_higher_order_ops)|peft_gauge/(?:plan|memory|_internals|fingerprint|traces)/)"
)
_ENGINE = "_engine_run_backward"


def frame_text(filename: str, line: int, function: str) -> str:
    """One frame in this project's notation; see `shortened` for the path."""
    return f"{shortened(filename)}:{line}:{function}"


@cache
def shortened(filename: str) -> str:
    """``filename`` from its package on, otherwise its last two parts: without home folder and Python version."""
    path = filename.replace("\\", "/")
    for pattern in (_PACKAGES, _OWN):
        found = pattern.match(path)
        if found:
            return path[found.end() :]
    return "/".join(PurePath(path).parts[-2:])


def site_of(stack: Sequence[str]) -> str:
    """The site of a recorded stack (innermost frame first); empty if it has no frames."""
    if not stack:
        return ""
    path, _, rest = stack[0].partition(":")
    return f"{path}:{rest.partition(':')[2]}"


def site_here(frame: FrameType | None) -> str:
    """The site of running code, from ``frame`` outwards; empty if autograd's engine called from C++.

    On CUDA the engine's thread has no Python frames, so that recorded stacks are empty too.
    """
    while frame is not None:
        code = frame.f_code
        if code.co_name == _ENGINE:
            return ""
        if not _is_between(code.co_filename):
            return f"{shortened(code.co_filename)}:{code.co_name}"
        frame = frame.f_back
    return ""


@cache
def _is_between(filename: str) -> bool:
    return _BETWEEN.match(shortened(filename)) is not None
