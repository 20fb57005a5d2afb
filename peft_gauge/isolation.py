"""A function in a process of its own: out of memory, a crash and a hang are outcomes, never ends.

A measurement wants a fresh process (the caching allocator and the libraries remember what ran before), and a suite
wants to live on when a case does not. `run` starts a process that calls one function and says how that ended;
meanwhile the function can `note` and `watch` figures, which are known even if it is killed. The process is a new
interpreter or, where the caller names modules to preload, one forked from a server that has imported them
(`peft_gauge.fork_server`).

The two sides share a private folder instead of pipes: a grandchild that keeps a pipe open would make the parent wait.
Run as a program, this module is the child.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any, Literal, NoReturn

from peft_gauge import fork_server
from peft_gauge.errors import GaugeError, one_line, unknown
from peft_gauge.fork_server import CannotFork, Forked

Ended = Literal["done", "refused", "out-of-memory", "crashed", "timed-out", "interrupted"]
Child = subprocess.Popen[bytes] | Forked

PACKAGE_PARENT = Path(__file__).resolve().parents[1]

# What is in the folder.
_TASK = "task.json"  # function, limit_seconds
_ARGUMENTS = "arguments.pickle"
_PROGRESS = "progress.jsonl"  # a line a note: ["note" or "watch", figures]
_RESULT = "result.json"  # ended, value, reason, work_seconds; there whole or not at all
_OUTPUT = "output.txt"  # what the child wrote to standard output and standard error

_PARENT_CHECK_SECONDS = 0.5
_PARENT_GRACE_SECONDS = 2.0  # so long the parent may be late in killing a child that has reached its limit
_END_SECONDS = 3.0  # so long the interpreter may take to end once the result is written
_TAIL_BYTES = 32_768  # of the output; a crash report lists every extension module and must fit in

_OUT_OF_MEMORY_TYPES = {"OutOfMemoryError", "MemoryError"}  # torch.OutOfMemoryError, also under its older names
_OUT_OF_MEMORY_TEXT = re.compile(
    r"(CUDA|CUDA error:|MPS backend) out of memory"
    r"|CU(BLAS|DNN)_STATUS_ALLOC_FAILED"
    r"|DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|Cannot allocate memory"  # strerror(ENOMEM): an mmap of weights, a fork
    r"|Error out of memory at line"  # what bitsandbytes' kernels print before they end the process
    r"|std::bad_alloc"
)
_LIKELY_CAUSES = {
    "SIGKILL": "not by its parent; usually the kernel's out-of-memory killer: host memory ran out",
    "SIGSEGV": "native code touched memory that is not its own",
    "SIGBUS": "mapped memory had nothing behind it, as with a truncated file or a full /dev/shm",
    "SIGABRT": "native code gave up",
    "SIGILL": "native code was built for another processor",
}


@dataclass(frozen=True)
class Outcome:
    """How a function in a process of its own ended.

    Attributes:
        ended: ``done``; ``refused`` (a `GaugeError`, an unknown function); ``out-of-memory``; ``crashed`` (any other
            exception, a signal, an end without a result); ``timed-out``; ``interrupted`` (Ctrl-C).
        value: what the function returned, as JSON gives it back (tuples are lists); ``None`` unless done.
        reason: one line on what happened; ``None`` if done.
        last: the figures last told by `note` and `watch`, later ones over earlier; of watched names that end in
            ``_peak_bytes`` the greatest.
        seconds: wall time from the child's start to its end; the imports of a fork server, once for all its children,
            are before that.
        work_seconds: the part within the function itself; ``None`` if it neither returned nor raised.
        process: how the child came to be.
        why_spawned: why it was not forked although it could have been asked to be; ``None`` if nobody asked.
    """

    ended: Ended
    value: Any
    reason: str | None
    last: Mapping[str, Any]
    seconds: float
    work_seconds: float | None
    process: Literal["spawned", "forked"] = "spawned"
    why_spawned: str | None = None

    @property
    def origin(self) -> dict[str, str]:
        """``process`` and, where there is one, ``why_spawned``, as figures of a case."""
        return {"process": self.process, **({"why_spawned": self.why_spawned} if self.why_spawned else {})}

    @property
    def besides_seconds(self) -> float | None:
        """What the process of its own cost: interpreter, imports, end."""
        return None if self.work_seconds is None else self.seconds - self.work_seconds


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while a child ran; ``outcome`` is what was known of it when it was killed."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


# The parent's side ---------------------------------------------------------------------------------------------------


def run(
    function: str,
    *arguments: Any,
    limit_seconds: float,
    environment: Mapping[str, str | None] | None = None,
    python: str = sys.executable,
    preload: Sequence[str] | None = None,
) -> Outcome:
    """Call ``function`` with ``arguments`` in a fresh process and wait for the end of it, whatever that is.

    The child and whatever it started are killed at the limit and at the end; only a grandchild that opens a session
    of its own escapes.

    Args:
        function: ``"package.module:name"``; it returns what JSON can hold.
        arguments: picklable, of classes that the child can import.
        limit_seconds: wall time until the child is killed, its start included.
        environment: variables set over those of this process; ``None`` unsets one.
        python: the interpreter, which may have other versions of the libraries.
        preload: names of modules that the process may have imported already; it is then forked from a server that
            imported them once, if that is safe (`peft_gauge.fork_server`), and spawned otherwise, with the reason in
            ``why_spawned``. ``None``: a new interpreter, whose memory is laid out as no other's.

    Raises:
        GaugeError: the child cannot be started as asked; what goes wrong in it is an outcome instead.
        Interrupted: Ctrl-C; the child is dead by then.
    """
    if not 0 < limit_seconds < threading.TIMEOUT_MAX:
        raise GaugeError(f"a time limit of {limit_seconds} s is none; give a positive, finite number of seconds")
    if not re.fullmatch(r"[\w.]+:\w+", function):
        raise GaugeError(f"{function!r} names no function; write it as 'package.module:name'")
    try:
        pickled = pickle.dumps(arguments)
    except Exception as error:  # an object's own __reduce__ can raise anything
        raise GaugeError(
            f"the arguments of {function} cannot be sent to a process of their own: {one_line(error)}"
        ) from error
    # A killed grandchild may be writing still when the folder goes; what it leaves is no reason to fail.
    with tempfile.TemporaryDirectory(prefix="peft-gauge-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / _ARGUMENTS).write_bytes(pickled)
        (folder / _TASK).write_text(json.dumps({"function": function, "limit_seconds": limit_seconds}))
        start = _starter(folder, limit_seconds, python, child_environment(environment), preload)
        return _attend(folder, limit_seconds, start)


def child_environment(given: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """The environment of a child: this process's, ``given`` over it, and this package on the path.

    An installed package stays off: its folder holds all the other libraries too, and would put their versions before
    those of another interpreter.
    """
    wanted = {**os.environ, **(given or {})}
    environment = {name: value for name, value in wanted.items() if value is not None}
    installed = PACKAGE_PARENT.name in ("site-packages", "dist-packages")
    path = [None if installed else str(PACKAGE_PARENT), environment.get("PYTHONPATH")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, path))}


@dataclass(frozen=True)
class _Started:
    """A child that runs, the clock at its start, and why it was not forked if that was wanted."""

    child: Child
    at: float
    why_spawned: str | None = None


def _attend(folder: Path, limit_seconds: float, start: Callable[[], _Started]) -> Outcome:
    try:
        started = start()
    except KeyboardInterrupt:  # while a fork server imported
        raise Interrupted(Outcome("interrupted", None, "interrupted before it began", {}, 0.0, None)) from None
    child = started.child
    # `wait` with a time-out would poll, and find the end up to 50 ms late.
    timer = threading.Timer(limit_seconds, _kill_group, [child])
    timer.daemon = True
    interrupted = False
    with child:
        try:
            timer.start()
            child.wait()
        except KeyboardInterrupt:  # raised again below, with what is known by then
            interrupted = True
        finally:
            seconds = time.perf_counter() - started.at
            timer.cancel()
            _kill_group(child)
            child.wait()
    if interrupted:
        reason = f"interrupted after {seconds:.1f} s"
        outcome = Outcome("interrupted", None, reason, _last_figures(folder), seconds, None)
    else:
        outcome = _outcome(folder, child.returncode, limit_seconds, seconds)
    process: Literal["spawned", "forked"] = "forked" if isinstance(child, Forked) else "spawned"
    outcome = replace(outcome, process=process, why_spawned=started.why_spawned)
    if interrupted:
        raise Interrupted(outcome) from None
    return outcome


def _starter(
    folder: Path, limit_seconds: float, python: str, environment: Mapping[str, str], preload: Sequence[str] | None
) -> Callable[[], _Started]:
    def start() -> _Started:
        why_spawned = None
        if preload is not None:
            try:
                child = _fork(folder, limit_seconds, python, environment, preload)
                return _Started(child, child.started)
            except CannotFork as reason:
                why_spawned = str(reason)
        at = time.perf_counter()
        return _Started(_spawn(folder, python, environment), at, why_spawned)

    return start


def _fork(
    folder: Path, limit_seconds: float, python: str, environment: Mapping[str, str], preload: Sequence[str]
) -> Forked:
    if python != sys.executable:
        raise CannotFork("another interpreter is asked for than that of the fork server")
    with Path(os.devnull).open("rb") as nothing, (folder / _OUTPUT).open("wb") as output:
        return fork_server.start(
            f"{__name__}:serve",
            str(folder),
            preload=preload,
            environment=environment,
            streams=(nothing.fileno(), output.fileno(), output.fileno()),
            limit_seconds=limit_seconds,
            folder=folder,
        )


def _spawn(folder: Path, python: str, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    # -P: another checkout of this package in the working directory must not come before this one.
    # -u: what the child printed is known even if it is killed.
    command = [python, "-P", "-u", "-m", "peft_gauge.isolation", str(folder)]
    try:
        with (folder / _OUTPUT).open("wb") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
    except OSError as error:
        raise GaugeError(f"cannot start the interpreter {python}: {error.strerror or error}") from error


def _kill_group(child: Child) -> None:
    """Kill what there still is of the child's process group: a grandchild could hold the GPU."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody left; macOS: none but a zombie
        os.killpg(child.pid, signal.SIGKILL)


def _outcome(folder: Path, code: int | None, limit_seconds: float, seconds: float) -> Outcome:
    last = _last_figures(folder)
    result = folder / _RESULT
    if result.exists():  # it counts even if the interpreter's own end went wrong
        return Outcome(last=last, seconds=seconds, **json.loads(result.read_text(encoding="utf-8")))
    if seconds >= limit_seconds:
        phase = f"; last seen in phase {last['phase']}" if "phase" in last else ""
        return Outcome("timed-out", None, f"did not end within {limit_seconds:g} s{phase}", last, seconds, None)
    ended, reason = _without_result(code, _tail(folder / _OUTPUT))
    return Outcome(ended, None, one_line(reason), last, seconds, None)


def _last_figures(folder: Path) -> dict[str, Any]:
    """What was told, merged. A watched ``None`` (could not be read) takes the place of no known figure."""
    last: dict[str, Any] = {}
    progress = folder / _PROGRESS
    lines = progress.read_text(encoding="utf-8").splitlines() if progress.exists() else []
    for line in lines:
        try:
            kind, figures = json.loads(line)
        except ValueError:  # cut short by a full disk
            continue
        for name, value in figures.items():
            known = last.get(name)
            if kind == "watch" and known is not None:
                if value is None:
                    continue
                if name.endswith("_peak_bytes"):
                    value = max(known, value)
            last[name] = value
    return last


def _without_result(code: int | None, output: str) -> tuple[Ended, str]:
    """How a child with exit status ``code`` ended that wrote no result, and what its ``output`` has to say on it."""
    if code is None:
        reason = "killed, since the fork server that it came from was"
    elif code < 0:
        name = _signal_name(-code)
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
        reason += f"; last words: {_without_folders(words)}"
    return ("out-of-memory" if words and _OUT_OF_MEMORY_TEXT.search(words) else "crashed"), reason


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace")


def _last_words(output: str) -> str | None:
    """What C++ said of an exception nobody caught, else the last line before Python's crash report."""
    spoken, *_ = output.partition("Fatal Python error:")
    what = re.findall(r"^\s*what\(\):\s*(.+)$", spoken, re.MULTILINE)
    lines = [line.strip() for line in spoken.splitlines() if line.strip()]
    said = what or lines
    return one_line(said[-1], 200) if said else None


def _without_folders(text: str) -> str:
    """``text`` with absolute paths cut to the file's name: results are shared, and where a library lies is private."""
    return re.sub(r"(?<![\w:/.~-])/(?:[^\s/'\",:;()]+/)+", "", text)


# The child's side ----------------------------------------------------------------------------------------------------

_progress: FileIO | None = None


def note(**figures: Any) -> None:
    """Keep ``figures`` as the last known ones; ``phase`` says in a time-out's reason where it was.

    One write of the operating system a call, so nothing is lost with the process. Outside a child it does nothing.
    Raises `ValueError` for what JSON cannot hold.
    """
    _tell("note", figures)


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
        if not _broke_the_device(error):
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


def _tell(kind: Literal["note", "watch"], figures: Mapping[str, Any]) -> None:
    if _progress is not None:
        # Unbuffered and appending: one write, whole also beside those of other threads.
        _progress.write(_as_json([kind, figures], "a note").encode() + b"\n")


def _as_json(value: Any, what: str) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} holds what JSON cannot: {one_line(error)}") from error


def serve(name: str) -> None:
    """Do the task in the folder ``name`` and write its result there."""
    global _progress
    folder = Path(name)
    task = json.loads((folder / _TASK).read_text())
    faulthandler.enable()
    # Needs no interpreter lock: ends also a child that hangs in native code and whose parent is dead.
    faulthandler.dump_traceback_later(task["limit_seconds"] + _PARENT_GRACE_SECONDS, exit=True)
    threading.Thread(target=_end_with_parent, args=(os.getppid(), folder), daemon=True).start()
    _progress = FileIO(folder / _PROGRESS, "a")
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
        _write_result(folder, *_ending(error), work_seconds)
        if _broke_the_device(error):
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
    functions = {key: value for key, value in vars(module).items() if callable(value)}
    if name not in functions:
        raise unknown(f"function of {module_name}", name, functions)
    return functions[name]


def _arguments(folder: Path) -> tuple[Any, ...]:
    try:
        return pickle.loads((folder / _ARGUMENTS).read_bytes())
    except (AttributeError, ImportError, pickle.UnpicklingError) as error:
        raise GaugeError(f"the arguments cannot be read in a process of their own: {one_line(error)}") from error


def _write_result(folder: Path, ended: Ended, value: Any, reason: str | None, work_seconds: float | None) -> None:
    result = {"ended": ended, "value": value, "reason": reason, "work_seconds": work_seconds}
    part = folder / f"{_RESULT}.part"
    part.write_text(_as_json(result, "the returned value"), encoding="utf-8")
    part.replace(folder / _RESULT)


def _ending(error: BaseException) -> tuple[Ended, None, str]:
    """What ``error`` makes of the task: how it ended, no value, the reason."""
    for link in _chain(error):
        if _is_out_of_memory(link):
            return "out-of-memory", None, _told(link)
    if isinstance(error, GaugeError):
        return "refused", None, str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", None, _told(error)
    return "crashed", None, _told(next((link for link in _chain(error) if _is_broken_device(link)), error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """``error`` and all that it came from (``raise … from``, or while that was handled), nearest first."""
    links: list[BaseException] = [error]
    for link in links:  # grows on the way
        yield link
        origins = (link.__cause__, link.__context__)
        links += [origin for origin in origins if origin is not None and all(origin is not known for known in links)]


def _is_out_of_memory(error: BaseException) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & _OUT_OF_MEMORY_TYPES) or (
        isinstance(error, (RuntimeError, OSError)) and _OUT_OF_MEMORY_TEXT.search(str(error)) is not None
    )


def _is_broken_device(error: BaseException) -> bool:
    """Whether ``error`` is one of those after which every further CUDA call of the process fails."""
    named = "AcceleratorError" in {cls.__name__ for cls in type(error).__mro__}
    told = isinstance(error, RuntimeError) and "CUDA error:" in str(error)
    return (named or told) and not _is_out_of_memory(error)


def _broke_the_device(error: BaseException) -> bool:
    return any(_is_broken_device(link) for link in _chain(error))


def _told(error: BaseException) -> str:
    """``TypeError: message at file:line``: the message's first line, and where it was raised."""
    message = next(iter(str(error).splitlines()), "")
    told = ": ".join(filter(None, (type(error).__name__, one_line(_without_folders(message), 300))))
    traceback = error.__traceback__
    if traceback is None:
        return told
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return f"{told} at {Path(traceback.tb_frame.f_code.co_filename).name}:{traceback.tb_lineno}"


if __name__ == "__main__":
    # Here this file is the module `__main__`; a function that notes does so through the one that it imports.
    from peft_gauge import isolation

    isolation.serve(sys.argv[1])
