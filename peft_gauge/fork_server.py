"""Processes forked from one that has imported what they need: the seconds of imports are paid once, not by each.

`start` asks a server for a child that calls one function. The server is started with the first request for its modules,
imports them, and lives as long as this process. It does nothing but import: no tensor, no CUDA context and no thread is
there to inherit, and a child draws random numbers as a fresh interpreter does. What children of one server share is how
their memory is laid out and the seed of Python's hashes: where processes are held against each other, spawn them.

Where a fork is not safe, or would give another process than a spawned one, `start` raises `CannotFork` with the reason;
the caller spawns. That is so on other systems than Linux, where the imports left a thread or looked at the card, and
where environment or cores are not those that the server was started with, for libraries read them when imported.

Not `multiprocessing.forkserver`: it forks whatever its imports have made of it, passes over a module that fails, has
one environment and one list of modules for all of a process (which torch and datasets may use too), and its children
share its output and end without the interpreter's own end.

The sides talk over socket pairs, in lines of JSON. Each request brings a pair of its own and the child's standard
streams. Over it the child tells its pid, and the server how the child ended; the requester's end is its hold on the
child: the pid stays the child's until it is closed, and where it is closed first, or its process is gone, the child is
killed with its group. Run as a program, this module is the server.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import json
import mmap
import os
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_gauge.errors import one_line

# Which test runs is told by pytest to whom it may concern; no library asks.
_HARMLESS_VARIABLES = {"PYTEST_CURRENT_TEST"}

_ANSWER_SECONDS = 30.0  # so long a server may take to fork, on a busy machine
_REQUEST_SECONDS = 10.0  # so long a requester may take to send what it has begun to send
_PARENT_CHECK_SECONDS = 1.0
_END_SECONDS = 5.0
_TAIL_BYTES = 4096
_THREADS = Path("/proc/self/task")
_MAPS = Path("/proc/self/maps")
_PAGEMAP = Path("/proc/self/pagemap")
_FILE_PAGE_PRESENT = 1 << 63 | 1 << 61  # two bits of a page map's entry: in memory; of a file
_POPULATE_READ = 22


class CannotFork(Exception):
    """Why a process cannot be forked here, in one line; a spawned one does the same, later."""


class _ServerGone(Exception):
    """The server ended before it answered."""


class _Messages:
    """JSON values over ``connection``, one a line."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._received = b""

    def send(self, message: Any) -> None:
        self.connection.settimeout(None)
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, limit_seconds: float | None = None) -> Any:
        """The next message; ``None`` if the other side has closed. Raises `TimeoutError` after ``limit_seconds``."""
        end = None if limit_seconds is None else time.monotonic() + limit_seconds
        while b"\n" not in self._received:
            self.connection.settimeout(None if end is None else max(end - time.monotonic(), 0.001))
            try:
                part = self.connection.recv(65_536)
            except ConnectionResetError:  # it closed and had not read all that was sent
                part = b""
            if not part:
                return None
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)


# The requester's side ------------------------------------------------------------------------------------------------


class Forked:
    """A process that a server forked, as `subprocess.Popen` shows one; a context, at whose end the hold on it ends.

    Attributes:
        pid: its process id and that of its group and session.
        started: `time.perf_counter` when it was asked for.
        returncode: its exit code, or minus the signal that ended it; ``None`` while it runs, and for good where the
            server ended first (`lost`).
    """

    def __init__(self, messages: _Messages, pid: int, started: float) -> None:
        self._messages = messages
        self.pid = pid
        self.started = started
        self.returncode: int | None = None
        self.lost = False

    def wait(self) -> int | None:
        """Wait for its end, or for the server's, and return ``returncode``."""
        if self.returncode is None and not self.lost:
            told = self._messages.receive()
            self.lost = told is None
            self.returncode = None if told is None else told["code"]
        return self.returncode

    def kill(self) -> None:
        """Kill it and its group, if there still is something of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *ending: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it: the server kills what there still is of it."""
        self._messages.connection.close()


def start(
    target: str,
    *arguments: str,
    preload: Sequence[str],
    environment: Mapping[str, str],
    streams: tuple[int, int, int],
    limit_seconds: float,
    folder: Path | None = None,
) -> Forked:
    """A process of its own, in a session of its own, that calls ``target`` with ``arguments``.

    Args:
        target: ``"package.module:name"``.
        preload: names of the modules that it has imported; requests with the same names share a server.
        environment: all of its variables.
        streams: file descriptors of its standard input, output and error.
        limit_seconds: how long to wait for the server's imports, once.
        folder: what is removed if this process is gone before its child has ended.

    Raises:
        CannotFork: with the reason.
    """
    for _ in range(2):
        server = _server(tuple(preload), environment)
        server.wait_for_imports(limit_seconds)
        try:
            return server.fork(target, arguments, environment, streams, folder)
        except _ServerGone:  # killed by somebody, or by the kernel for its memory: once more with a new one
            server.close()
    raise CannotFork("the fork server was killed, and the next one too")


def prepare(preload: Sequence[str], environment: Mapping[str, str]) -> None:
    """Let the server of ``preload`` begin its imports now; where none can be had, `start` will say why."""
    with contextlib.suppress(CannotFork):
        _server(tuple(preload), environment)


def pid_of(preload: Sequence[str]) -> int | None:
    """The process id of the server of ``preload``, if there is one."""
    server = _servers.get(tuple(preload))
    return None if server is None or not server.is_alive else server.pid


_servers: dict[tuple[str, ...], _Server] = {}
_owner = os.getpid()
_lock = threading.Lock()


def _server(preload: tuple[str, ...], environment: Mapping[str, str]) -> _Server:
    global _owner
    if not sys.platform.startswith("linux"):
        raise CannotFork(f"processes are forked on Linux only, not on {sys.platform}")
    with _lock:
        if _owner != os.getpid():  # this process was forked itself: the servers are its parent's
            for server in _servers.values():
                server.disown()
            _servers.clear()
            _owner = os.getpid()
        known = _servers.get(preload)
        if known is not None and known.is_gone:
            known.close()
            known = None
        if known is None:
            known = _servers[preload] = _Server(preload, environment)
        return known


@atexit.register
def _end_servers() -> None:
    if _owner == os.getpid():
        for server in _servers.values():
            server.close()


class _Server:
    """The requester's hold on a server. One that cannot fork stays, so that it is not tried again each time."""

    def __init__(self, preload: tuple[str, ...], environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._cores = _cores()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the server lives)
        self._lock = threading.Lock()
        self._has_imported = False
        self._why_not: str | None = None
        ours, theirs = socket.socketpair()
        self._control = _Messages(ours)
        # -P: another checkout of this package in the working directory must not come before this one.
        # -u: what a child printed is known even if it is killed.
        command = [sys.executable, "-P", "-u", "-m", "peft_gauge.fork_server", str(theirs.fileno()), *preload]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=self._output,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
        except OSError as error:
            ours.close()
            self._output.close()
            raise CannotFork(f"the fork server cannot be started: {error.strerror or error}") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def is_gone(self) -> bool:
        """Whether it was able to fork, and has ended since."""
        return self._has_imported and self._why_not is None and not self.is_alive

    def wait_for_imports(self, limit_seconds: float) -> None:
        """Raises `CannotFork` if it can never fork."""
        with self._lock:
            if not self._has_imported:
                self._why_not = self._outcome_of_imports(limit_seconds)
                self._has_imported = True
        if self._why_not is not None:
            self.close()
            raise CannotFork(self._why_not)

    def _outcome_of_imports(self, limit_seconds: float) -> str | None:
        try:
            told = self._control.receive(limit_seconds)
        except TimeoutError:
            return f"the fork server had not imported its modules after {limit_seconds:g} s"
        if told is not None:
            why_not: str | None = told["why_not"]
            return why_not
        code = self._process.wait()
        ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, self._output.tell() - _TAIL_BYTES))
        lines = self._output.read().decode(errors="replace").strip().splitlines()
        words = f"; last words: {one_line(lines[-1], 200)}" if lines else ""
        return f"the fork server {ended} while it imported its modules{words}"

    def fork(
        self,
        target: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        streams: tuple[int, int, int],
        folder: Path | None,
    ) -> Forked:
        request = {
            "target": target,
            "arguments": list(arguments),
            "variables": self._harmless_changes(environment),
            "working_directory": _working_directory(),
            "folder": None if folder is None else str(folder),
        }
        if _cores() != self._cores:
            raise CannotFork("this process may run on other cores than when the fork server was started")
        ours, theirs = socket.socketpair()
        messages = _Messages(ours)
        started = time.perf_counter()
        try:
            with theirs, self._lock:
                self._control.connection.settimeout(None)
                socket.send_fds(self._control.connection, [b"f"], [theirs.fileno(), *streams])
            messages.send(request)
            answer = messages.receive(_ANSWER_SECONDS)
        except TimeoutError as error:
            ours.close()
            self._why_not = f"the fork server did not answer within {_ANSWER_SECONDS:g} s"
            self.close()
            raise CannotFork(self._why_not) from error
        except OSError as error:
            ours.close()
            raise _ServerGone from error
        except BaseException:  # Ctrl-C: the server, whose hold ends here, kills what it may have forked
            ours.close()
            raise
        if answer is None or "pid" not in answer:
            ours.close()
            if answer is None:
                raise _ServerGone
            raise CannotFork(answer.get("why_not") or f"the forked process ended at once with code {answer['code']}")
        return Forked(messages, answer["pid"], started)

    def _harmless_changes(self, environment: Mapping[str, str]) -> dict[str, str | None]:
        """What of ``environment`` a child has to set, or (``None``) to unset. Raises `CannotFork` if any of it could
        have been read by the imports."""
        changed = {
            name: environment.get(name)
            for name in sorted({*environment, *self._environment})
            if environment.get(name) != self._environment.get(name)
        }
        read = [name for name in changed if name not in _HARMLESS_VARIABLES]
        if read:
            raise CannotFork(f"the environment is not the fork server's: {', '.join(read)}")
        return changed

    def disown(self) -> None:
        """Let go of a server of the process that this one was forked from."""
        self._control.connection.close()
        self._output.close()
        self._process.returncode = 0  # not this process's child: nothing to wait for

    def close(self) -> None:
        """End it, and with it its children. One that still imports has none, and need not come to an end of that."""
        self._control.connection.close()
        if not self._has_imported or self._why_not is not None:
            self._process.kill()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()


def _working_directory() -> str:
    try:
        return str(Path.cwd())
    except OSError as error:
        raise CannotFork(f"the working directory is gone: {error.strerror}") from error


def _cores() -> list[int]:
    """Those that this thread may run on: OpenMP counts them when it is loaded."""
    return sorted(os.sched_getaffinity(0))


# The server's side ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Import the modules named on the command line, then fork until the requester lets go.

    In a forked child this returns from the server's loop, calls the child's function, and ends as a program ends.
    """
    control = _Messages(socket.socket(fileno=int(sys.argv[1])))
    parent = os.getppid()
    why_not = _import(sys.argv[2:], control.connection) or _why_unsafe()
    try:
        control.send({"why_not": why_not})
    except OSError:  # nobody waits for it any more
        return
    if why_not is None:
        task = _Forker(control.connection, parent).serve()
        if task is not None:
            task()


def _import(names: Sequence[str], control: socket.socket) -> str | None:
    for name in names:
        if select.select([control], [], [], 0)[0]:  # nothing is sent before this has ended: it was closed
            sys.exit()
        try:
            importlib.import_module(name)
        except BaseException as error:  # whatever it is, a spawned process will meet it, and say so
            return f"{name} cannot be imported ahead: {type(error).__name__}: {one_line(error, 200)}"
    return None


def _why_unsafe() -> str | None:
    """Why this process cannot be forked with all that is imported; ``None`` if it can.

    A first child, which ends at once, sees whether CUDA still works in one. And OpenBLAS (numpy's, scipy's), which
    starts threads when it is loaded, ends them before a fork and starts them anew where they are needed: what is
    there after a fork is somebody else's.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        from peft_gauge._internals.torch import in_bad_fork
    else:

        def in_bad_fork() -> bool:
            return False

    pid = os.fork()
    if pid == 0:
        spoilt = True
        try:
            spoilt = in_bad_fork()
        finally:
            os._exit(spoilt)
    cuda_spoilt = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
    # A look at a card that is not there spoils nothing.
    if torch is not None and (torch.cuda.is_initialized() or (cuda_spoilt and torch.cuda.is_available())):
        return "CUDA was in use once the modules were imported, and would not work in a forked process"
    return _why_threads()


def _why_threads() -> str | None:
    try:
        number = len(list(_THREADS.iterdir()))
    except OSError as error:
        return f"threads cannot be counted: {error}"
    if number == 1:
        return None
    return f"{number} threads ran once the modules were imported, and only the one that forks would live on"


def _pages_of_files() -> list[tuple[int, int]]:
    """Address and length of what this process has in memory of mapped files, its libraries above all.

    A forked process has to fault them in anew, and would seem smaller than a new interpreter by all that its imports
    have read.
    """
    ranges: list[tuple[int, int]] = []
    try:
        with _MAPS.open() as lines, _PAGEMAP.open("rb", buffering=0) as pages:
            for line in lines:
                addresses, permissions, _, _, inode, *_ = line.split()
                if inode == "0" or not permissions.startswith("r"):
                    continue
                start, end = (int(address, 16) for address in addresses.split("-"))
                pages.seek(start // mmap.PAGESIZE * 8)
                entries = array("Q", pages.read((end - start) // mmap.PAGESIZE * 8))
                for number, entry in enumerate(entries):
                    if entry & _FILE_PAGE_PRESENT != _FILE_PAGE_PRESENT:
                        continue
                    address = start + number * mmap.PAGESIZE
                    if ranges and sum(ranges[-1]) == address:
                        ranges[-1] = (ranges[-1][0], ranges[-1][1] + mmap.PAGESIZE)
                    else:
                        ranges.append((address, mmap.PAGESIZE))
    except (OSError, ValueError):  # a sandbox without a page map: then a forked process does seem smaller
        return []
    return ranges


def _fault_in(ranges: Sequence[tuple[int, int]]) -> None:
    """Have the kernel map ``ranges`` (madvise's ``MADV_POPULATE_READ``, Linux 5.14; before, nothing comes of it)."""
    advise = ctypes.CDLL(None).madvise
    for address, length in ranges:
        advise(ctypes.c_void_p(address), ctypes.c_size_t(length), _POPULATE_READ)


@dataclass
class _Child:
    """A forked process, its requester's connection, and what to remove if that is gone first."""

    pid: int
    connection: socket.socket
    folder: str | None
    told: bool = False
    abandoned: bool = False


class _Forker:
    """Forks at request, tells how children ended, and kills those whose requester has let go."""

    def __init__(self, control: socket.socket, parent: int) -> None:
        self._control = control
        self._parent = parent
        self._children: list[_Child] = []
        self._pages = _pages_of_files()
        # Not epoll, whose list a child would share.
        self._selector = selectors.PollSelector()
        self._awake, self._waker = socket.socketpair()

    def serve(self) -> Callable[[], None] | None:
        """Until the requester lets go, or is gone; in a forked child what it is to do."""
        for end in (self._awake, self._waker):
            end.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._selector.register(self._control, selectors.EVENT_READ)
        self._selector.register(self._awake, selectors.EVENT_READ)
        while os.getppid() == self._parent:
            ready = {key.fileobj for key, _ in self._selector.select(_PARENT_CHECK_SECONDS)}
            if self._awake in ready:
                with contextlib.suppress(BlockingIOError):
                    self._awake.recv(4096)
                self._look_for_ends()
            for child in [child for child in self._children if child.connection in ready]:
                self._release(child)
            if self._control in ready:
                received = self._receive()
                if received is None:
                    break
                task = self._fork(*received)
                if task is not None:
                    return task
        self._end()
        return None

    def _receive(self) -> tuple[_Messages, list[int]] | None:
        """A request's connection and its standard streams; ``None`` at the end."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, 1, 4, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:  # it is gone, and had not read all that it was told
            return None
        if not data:
            return None
        connection, *streams = descriptors
        return _Messages(socket.socket(fileno=connection)), streams

    def _fork(self, messages: _Messages, streams: Sequence[int]) -> Callable[[], None] | None:
        """Do what is asked over ``messages``. In the child, what it is to do; in the server ``None``."""
        with _closing(streams):
            try:
                request = messages.receive(_REQUEST_SECONDS)
            except TimeoutError:
                request = None
            if request is None:  # it was interrupted meanwhile
                messages.connection.close()
                return None
            why_not = _why_threads()
            try:
                pid = os.fork() if why_not is None else None
            except OSError as error:
                pid, why_not = None, f"the fork server cannot fork: {error.strerror or error}"
            if pid == 0:
                return self._become(request, messages, streams)
        if pid is None:
            with contextlib.suppress(OSError):
                messages.send({"why_not": why_not})
            messages.connection.close()
            return None
        messages.connection.settimeout(None)
        self._children.append(_Child(pid, messages.connection, request["folder"]))
        self._selector.register(messages.connection, selectors.EVENT_READ)
        return None

    def _become(self, request: Mapping[str, Any], messages: _Messages, streams: Sequence[int]) -> Callable[[], None]:
        """Make this fork of the server the process that is asked for."""
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for end in (self._control, self._awake, self._waker, *(child.connection for child in self._children)):
            end.close()
        for number, descriptor in enumerate(streams):
            os.dup2(descriptor, number)
        os.chdir(request["working_directory"])
        for name, value in request["variables"].items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        sys.argv[1:] = request["arguments"]
        _fault_in(self._pages)
        # As in a new process, from the system's entropy. Python seeds its own generator anew after every fork, and
        # those of CUDA devices do not exist yet.
        if "numpy.random" in sys.modules:
            sys.modules["numpy.random"].seed()
        if "torch" in sys.modules:
            sys.modules["torch"].default_generator.seed()
        messages.send({"pid": os.getpid()})
        messages.connection.close()
        module, _, name = request["target"].partition(":")
        arguments = request["arguments"]
        return lambda: getattr(importlib.import_module(module), name)(*arguments)

    def _look_for_ends(self) -> None:
        """Tell who waits how a child ended. It is not collected before they let go: until then its pid is its own."""
        for child in list(self._children):
            ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                continue
            if child.abandoned:
                self._collect(child)
            elif not child.told:
                child.told = True
                code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
                with contextlib.suppress(OSError):
                    _Messages(child.connection).send({"code": code})

    def _release(self, child: _Child) -> None:
        """The requester of ``child`` has let go of it, or is gone."""
        self._selector.unregister(child.connection)
        child.connection.close()
        if child.told:
            child.folder = None  # it is the requester's, who knows of the end
            self._collect(child)
        else:
            child.abandoned = True
            _kill(child.pid)
            self._look_for_ends()  # it may have ended by itself a moment before

    def _collect(self, child: _Child) -> None:
        _kill(child.pid)  # what it left behind: a grandchild could hold the GPU
        os.waitpid(child.pid, 0)
        if child.folder is not None:
            shutil.rmtree(child.folder, ignore_errors=True)
        self._children.remove(child)

    def _end(self) -> None:
        for child in list(self._children):
            if child.told:
                child.folder = None
            self._collect(child)


def _kill(pid: int) -> None:
    """Kill a child that is not collected yet, and its group, which it may not have founded yet."""
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


@contextlib.contextmanager
def _closing(descriptors: Sequence[int]) -> Iterator[None]:
    try:
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


if __name__ == "__main__":
    # Here this file is the module `__main__`; whoever imports it by its name gets that one.
    from peft_gauge import fork_server

    fork_server.main()
