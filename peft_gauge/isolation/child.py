"""The child's side: run the task in the folder, and report metrics to the parent meanwhile.

Run as a program (``python -m peft_gauge.isolation FOLDER``), the package is the child.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib
import json
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from peft_gauge.errors import GaugeError, one_line, unknown
from peft_gauge.files import write_whole
from peft_gauge.isolation.endings import broke_the_device, ending
from peft_gauge.isolation.folder import ARGUMENTS, PROGRESS, RESULT, TASK

if TYPE_CHECKING:
    from peft_gauge.isolation.outcome import Ended

_PARENT_CHECK_SECONDS = 0.5
_PARENT_GRACE_SECONDS = 2.0  # time that the parent has to kill a child at its limit, before the child ends itself
_END_SECONDS = 3.0  # time that the interpreter has to exit after the result is written

_progress: FileIO | None = None


def note(**metrics: Any) -> None:
    """Report ``metrics`` to the parent, which keeps the last value of each. A time-out's reason shows ``phase``.

    Each call is one write of the operating system, so nothing is lost if the process is killed. Outside a child it does
    nothing. Raises `ValueError` for values that JSON cannot represent.
    """
    _tell("note", metrics)


@contextlib.contextmanager
def watch(read: Callable[[], Mapping[str, int | None]], period_seconds: float = 0.2) -> Iterator[None]:
    """Report the result of ``read`` at the start, at the end and, from a thread, every ``period_seconds`` in between.

    If an error stops the thread, it is raised at the end, since peaks may have been missed. After a CUDA error there is
    no last reading, because it would use the broken device.
    """
    _tell("watch", read())
    end = threading.Event()
    errors: list[BaseException] = []

    def sample() -> None:
        while not end.wait(period_seconds):
            try:
                _tell("watch", read())
            except BaseException as error:  # raised again in the caller's thread
                errors.append(error)
                return

    thread = threading.Thread(target=sample, name="peft-gauge-watch", daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        end.set()
        if not broke_the_device(error):
            thread.join()
            try:
                _tell("watch", read())
            except Exception as second:  # the error that ended the work is more important
                error.add_note(f"the last reading failed too: {one_line(second)}")
        raise
    end.set()
    thread.join()
    _tell("watch", read())
    if errors:
        raise errors[0]


def _tell(kind: Literal["note", "watch"], metrics: Mapping[str, Any]) -> None:
    if _progress is not None:
        # Unbuffered and appending: one write, which stays whole while other threads write.
        _progress.write(_as_json([kind, metrics], "a note").encode() + b"\n")


def _as_json(value: Any, what: str) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be converted to JSON: {one_line(error)}") from error


def serve(name: str) -> None:
    """Run the task in the folder ``name`` and write its result there."""
    global _progress
    folder = Path(name)
    task = json.loads((folder / TASK).read_text())
    faulthandler.enable()
    # This needs no interpreter lock, so it also ends a child that hangs in native code after its parent died.
    faulthandler.dump_traceback_later(task["limit_seconds"] + _PARENT_GRACE_SECONDS, exit=True)
    threading.Thread(target=_end_with_parent, args=(os.getppid(), folder), daemon=True).start()
    _progress = FileIO(folder / PROGRESS, "a")
    work_seconds = None
    try:
        work = _find(task["function"])
        arguments = _arguments(folder)
        start = time.perf_counter()
        try:
            value = work(*arguments)
        finally:
            work_seconds = time.perf_counter() - start
        _write_result(folder, "done", value, None, work_seconds)
    except BaseException as error:
        _write_result(folder, *ending(error), work_seconds)
        if broke_the_device(error):
            # The traceback holds tensors; freeing them would use the broken device.
            os._exit(1)
    faulthandler.dump_traceback_later(_END_SECONDS, exit=True)
    _end()


def _end() -> NoReturn:
    """Exit like an interpreter, but without unloading imported modules.

    Unloading torch and similar libraries takes longer than forking and calling the function, and the operating system
    frees their memory anyway.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are not daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a full disk; closed by the function
            stream.flush()
    os._exit(0)


def _end_with_parent(parent: int, folder: Path) -> NoReturn:
    """When ``parent`` has ended, remove ``folder`` and kill this process and its group, to free the GPU."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _find(function: str) -> Callable[..., Any]:
    module_name, _, name = function.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if f"{module_name}.".startswith(f"{error.name}."):  # and not a module that it imports
            raise GaugeError(f"unknown function {function}: there is no module {error.name}") from error
        raise
    functions: dict[str, Callable[..., Any]] = {key: value for key, value in vars(module).items() if callable(value)}
    if name not in functions:
        raise unknown(f"function of {module_name}", name, functions)
    return functions[name]


def _arguments(folder: Path) -> tuple[Any, ...]:
    try:
        return tuple(pickle.loads((folder / ARGUMENTS).read_bytes()))
    except (AttributeError, ImportError, pickle.UnpicklingError) as error:
        raise GaugeError(f"the arguments cannot be unpickled in the child process: {one_line(error)}") from error


def _write_result(folder: Path, ended: Ended, value: Any, reason: str | None, work_seconds: float | None) -> None:
    result = {"ended": ended, "value": value, "reason": reason, "work_seconds": work_seconds}
    write_whole(folder / RESULT, _as_json(result, "the returned value"), durable=False)
