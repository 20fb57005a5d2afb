"""How the work ended, with a reason in one line, from an exception or from an exit without a result."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from peft_gauge.errors import GaugeError, one_line
from peft_gauge.isolation.signals import signal_name

if TYPE_CHECKING:
    from peft_gauge.isolation.outcome import Ended

_OUT_OF_MEMORY_TYPES = {"OutOfMemoryError", "MemoryError"}  # torch.OutOfMemoryError, also under its older names
_OUT_OF_MEMORY_TEXT = re.compile(
    r"(CUDA|CUDA error:|MPS backend) out of memory"
    r"|CU(BLAS|DNN)_STATUS_ALLOC_FAILED"
    r"|DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|Cannot allocate memory"  # strerror(ENOMEM): an mmap of weights, a fork
    r"|Error out of memory at line"  # bitsandbytes' kernels print it before they end the process
    r"|std::bad_alloc"
)
_LIKELY_CAUSES = {
    "SIGKILL": "not by its parent; usually the kernel's out-of-memory killer: host memory ran out",
    "SIGSEGV": "native code accessed invalid memory",
    "SIGBUS": "mapped memory has no storage, as with a truncated file or a full /dev/shm",
    "SIGABRT": "native code aborted",
    "SIGILL": "native code was built for another processor",
}


def without_result(code: int | None, output: str) -> tuple[Ended, str]:
    """How a child that wrote no result ended, and the reason, from its exit status ``code`` and its ``output``."""
    if code is None:
        reason = "killed, because its fork server was killed"
    elif code < 0:
        name = signal_name(-code)
        cause = _LIKELY_CAUSES.get(name)
        reason = f"killed by {name}" + (f" ({cause})" if cause else "")
    else:
        reason = f"ended without a result, with exit code {code}"
    words = _last_words(output)
    crash_site = re.search(r'^Current thread .*\n\s+File "(.+)", line (\d+) in (.+)$', output, re.MULTILINE)
    if crash_site:
        file, line, function = crash_site.groups()
        reason += f" in {function} at {Path(file).name}:{line}"
    if words:
        reason += f"; last output: {_without_folders(words)}"
    return ("out-of-memory" if words and _OUT_OF_MEMORY_TEXT.search(words) else "crashed"), reason


def _last_words(output: str) -> str | None:
    """The message of an uncaught C++ exception, otherwise the last line before Python's crash report."""
    spoken, *_ = output.partition("Fatal Python error:")
    what = re.findall(r"^\s*what\(\):\s*(.+)$", spoken, re.MULTILINE)
    lines = [line.strip() for line in spoken.splitlines() if line.strip()]
    said = what or lines
    return one_line(said[-1], 200) if said else None


def _without_folders(text: str) -> str:
    """``text`` with absolute paths cut to the file's name, since results are shared but local paths are private."""
    return re.sub(r"(?<![\w:/.~-])/(?:[^\s/'\",:;()]+/)+", "", text)


def ending(error: BaseException) -> tuple[Ended, None, str]:
    """The outcome of a task that raised ``error``: how it ended, no value, and the reason."""
    for link in _chain(error):
        if _is_out_of_memory(link):
            return "out-of-memory", None, _told(link)
    if isinstance(error, GaugeError):
        return "refused", None, str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", None, _told(error)
    return "crashed", None, _told(next((link for link in _chain(error) if _is_broken_device(link)), error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """``error`` with all its causes and contexts, nearest first."""
    links: list[BaseException] = [error]
    for link in links:  # the list grows during the loop
        yield link
        origins = (link.__cause__, link.__context__)
        links += [origin for origin in origins if origin is not None and all(origin is not known for known in links)]


def _is_out_of_memory(error: BaseException) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & _OUT_OF_MEMORY_TYPES) or (
        isinstance(error, (RuntimeError, OSError)) and _OUT_OF_MEMORY_TEXT.search(str(error)) is not None
    )


def _is_broken_device(error: BaseException) -> bool:
    """Whether all further CUDA calls of the process fail after ``error``."""
    named = "AcceleratorError" in {cls.__name__ for cls in type(error).__mro__}
    told = isinstance(error, RuntimeError) and "CUDA error:" in str(error)
    return (named or told) and not _is_out_of_memory(error)


def broke_the_device(error: BaseException) -> bool:
    return any(_is_broken_device(link) for link in _chain(error))


def _told(error: BaseException) -> str:
    """``TypeError: message at file:line``, with the message's first line and the place where it was raised."""
    message = next(iter(str(error).splitlines()), "")
    told = ": ".join(filter(None, (type(error).__name__, one_line(_without_folders(message), 300))))
    traceback = error.__traceback__
    if traceback is None:
        return told
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return f"{told} at {Path(traceback.tb_frame.f_code.co_filename).name}:{traceback.tb_lineno}"
