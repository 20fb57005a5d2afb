"""The child's side: do the task in the folder, and tell the parent what is known on the way.

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
_PARENT_GRACE_SECONDS = 2.0  # so long the parent may be late in killing a child that has reached its limit
_END_SECONDS = 3.0  # so long the interpreter may take to end once the result is written

_progress: FileIO | None = None


def note(**metrics: Any) -> None:
    """Keep ``metrics`` as the last known ones; ``phase`` says in a time-out's reason where it was.

    One write of the operating system a call, so nothing is lost with the process. Outside a child it does nothing.
    Raises `ValueError` for what JSON cannot hold.
    """
    _tell("note", metrics)


@contextlib.contextmanager
def watch(read: Callable[[], Mapping[str, int | None]], period_seconds: float = 0.2) -> Iterator[None]:
    """Note what ``read`` gives at the start, at the end and, from a thread, every ``period_seconds`` in between.

    Raises what stopped the thread, if something did: peaks may have been missed then. After a broken CUDA device
    there is no last reading, for that would call into it.
    """
    _tell("watch", read())
    end = threading.Event()
    errors: list[BaseException] = []

    def sample() -> None:
        while not end.wait(period_seconds):
            try:
                _tell("watch", read())
            except BaseException as error:  # handed to whoever watches
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
            except Exception as second:  # what ended the work matters more
                error.add_note(f"the last reading failed too: {one_line(second)}")
        raise
    end.set()
    thread.join()
    _tell("watch", read())
    if errors:
        raise errors[0]


def _tell(kind: Literal["note", "watch"], metrics: Mapping[str, Any]) -> None:
    if _progress is not None:
        # Unbuffered and appending: one write, whole also beside those of other threads.
        _progress.write(_as_json([kind, metrics], "a note").encode() + b"\n")


def _as_json(value: Any, what: str) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} holds what JSON cannot: {one_line(error)}") from error


def serve(name: str) -> None:
    """Do the task in the folder ``name`` and write its result there."""
    global _progress
    folder = Path(name)
    task = json.loads((folder / TASK).read_text())
    faulthandler.enable()
    # Needs no interpreter lock: ends also a child that hangs in native code and whose parent is dead.
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
            # The traceback holds tensors, and freeing them would call into the broken device.
            os._exit(1)
    faulthandler.dump_traceback_later(_END_SECONDS, exit=True)
    _end()


def _end() -> NoReturn:
    """End as an interpreter does, but for taking apart all that was imported: of torch and its like, that takes longer
    than to fork and call the function, and the operating system gives everything back anyway."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a full disk; closed by the function
            stream.flush()
    os._exit(0)


def _end_with_parent(parent: int, folder: Path) -> NoReturn:
    """Once ``parent`` is gone, remove ``folder`` and kill this process with its group: a GPU must not stay held."""
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
        if f"{module_name}.".startswith(f"{error.name}."):  # not something that the module itself imports
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
        raise GaugeError(f"the arguments cannot be read in a process of their own: {one_line(error)}") from error


def _write_result(folder: Path, ended: Ended, value: Any, reason: str | None, work_seconds: float | None) -> None:
    result = {"ended": ended, "value": value, "reason": reason, "work_seconds": work_seconds}
    write_whole(folder / RESULT, _as_json(result, "the returned value"), durable=False)
