"""Processes forked from a server that has imported their modules, so that the time of imports is spent only once.

`start` requests a child that calls one function. The first request for a list of modules starts their server, which
imports them and lives as long as this process. The server only imports: children inherit no tensor, CUDA context or
thread, and they draw random numbers like a new interpreter. Children of one server share their memory layout and the
seed of Python's hashes, so spawn processes that are to be compared with each other.

`start` raises `CannotFork`, with the reason, if a fork is not safe or would differ from a spawned process; the caller
then spawns. This is the case on systems other than Linux, if the imports left a thread or used the GPU, and if the
environment or the CPU cores have changed since the server started, because libraries read them on import.

`multiprocessing.forkserver` is not suitable. It forks without checking the state after its imports and ignores modules
that fail to import. It has one environment and one list of modules per process, which torch and datasets may use too.
Its children share its output and end without the interpreter's own exit.

The two sides exchange lines of JSON over socket pairs. Each request passes its own pair and the child's standard
streams. Over the pair the child reports its pid, and the server reports how the child ended. The requester's socket
controls the child: until it is closed, the pid is not reused. If it is closed before the child has ended, or if the
requester ends, the child and its group are killed.

This module is the requester's side; the server is the program `peft_gauge.isolation.forker`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft_gauge.errors import one_line
from peft_gauge.isolation.messages import Messages
from peft_gauge.isolation.signals import kill_group, signal_name

# No import reads them: pytest sets the first for every test, torch the last when it compiles.
_HARMLESS_VARIABLES = {"PYTEST_CURRENT_TEST", "PEFT_GAUGE_CALIBRATIONS", "TORCHINDUCTOR_CACHE_DIR"}

_ANSWER_SECONDS = 30.0  # time that a server has to fork, on a busy machine
_END_SECONDS = 5.0
_TAIL_BYTES = 4096


class CannotFork(Exception):
    """The reason, in one line, why a process cannot be forked; a spawned process does the same, but takes longer."""


class _ServerGone(Exception):
    """The server ended before it responded."""


class Forked:
    """A process forked by a server, with an interface like `subprocess.Popen`; as a context, it is closed at the end.

    Attributes:
        pid: the id of its process, its group and its session.
        started: `time.perf_counter` at the request.
        returncode: its exit code, or minus the signal that ended it; ``None`` while it runs. Stays ``None`` if the
            server ended first (`lost`).
    """

    def __init__(self, messages: Messages, pid: int, started: float) -> None:
        self._messages = messages
        self.pid = pid
        self.started = started
        self.returncode: int | None = None
        self.lost = False

    def wait(self) -> int | None:
        """Wait until it or its server ends, and return ``returncode``."""
        if self.returncode is None and not self.lost:
            told = self._messages.receive()
            self.lost = told is None
            self.returncode = None if told is None else told["code"]
        return self.returncode

    def kill(self) -> None:
        """Kill it and its group, if any of them still run."""
        kill_group(self.pid)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *ending: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, upon which the server kills any process that still runs."""
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
    """Start a process, in its own session, that calls ``target`` with ``arguments``.

    Args:
        target: ``"package.module:name"``.
        preload: names of the modules that are imported already; requests with the same names share a server.
        environment: all environment variables.
        streams: file descriptors of standard input, output and error.
        limit_seconds: how long to wait for the server's imports, once.
        folder: the folder to remove if this process ends before the child.

    Raises:
        CannotFork: with the reason.
    """
    for _ in range(2):
        server = _server(tuple(preload), environment)
        server.wait_for_imports(limit_seconds)
        try:
            return server.fork(target, arguments, environment, streams, folder)
        except _ServerGone:  # killed, perhaps by the kernel for its memory: try again with a new server
            server.close()
    raise CannotFork("the fork server was killed twice")


def prepare(preload: Sequence[str], environment: Mapping[str, str]) -> None:
    """Start the server of ``preload`` now, so that it begins its imports. `start` reports any failure."""
    with contextlib.suppress(CannotFork):
        _server(tuple(preload), environment)


def pid_of(preload: Sequence[str]) -> int | None:
    """The process id of the server of ``preload``, or ``None``."""
    server = _servers.get(tuple(preload))
    return None if server is None or not server.is_alive else server.pid


_servers: dict[tuple[str, ...], _Server] = {}
_owner = os.getpid()
_lock = threading.Lock()


def _server(preload: tuple[str, ...], environment: Mapping[str, str]) -> _Server:
    global _owner
    if not sys.platform.startswith("linux"):
        raise CannotFork(f"forking is supported on Linux only, not on {sys.platform}")
    with _lock:
        if _owner != os.getpid():  # this process was forked itself, so the servers belong to its parent
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
    """The requester's side of a server. A server that cannot fork is kept too, so that it is not tried again."""

    def __init__(self, preload: tuple[str, ...], environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._cores = _cores()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the server lives)
        self._lock = threading.Lock()
        self._has_imported = False
        self._why_not: str | None = None
        ours, theirs = socket.socketpair()
        self._control = Messages(ours)
        # -P: do not import another checkout of this package from the working directory.
        # -u: keep a child's output even if it is killed.
        command = [sys.executable, "-P", "-u", "-m", "peft_gauge.isolation.forker", str(theirs.fileno()), *preload]
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
        """Whether it could fork, but has ended since."""
        return self._has_imported and self._why_not is None and not self.is_alive

    def wait_for_imports(self, limit_seconds: float) -> None:
        """Wait for the imports. Raises `CannotFork` if the server cannot fork."""
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
        ended = f"was killed by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, self._output.tell() - _TAIL_BYTES))
        lines = self._output.read().decode(errors="replace").strip().splitlines()
        words = f"; last output: {one_line(lines[-1], 200)}" if lines else ""
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
            raise CannotFork("the CPU cores of this process have changed since the fork server started")
        ours, theirs = socket.socketpair()
        messages = Messages(ours)
        started = time.perf_counter()
        try:
            with theirs, self._lock:
                self._control.connection.settimeout(None)
                socket.send_fds(self._control.connection, [b"f"], [theirs.fileno(), *streams])
            messages.send(request)
            answer = messages.receive(_ANSWER_SECONDS)
        except TimeoutError as error:
            ours.close()
            self._why_not = f"the fork server did not respond within {_ANSWER_SECONDS:g} s"
            self.close()
            raise CannotFork(self._why_not) from error
        except OSError as error:
            ours.close()
            raise _ServerGone from error
        except BaseException:  # Ctrl-C: when this socket closes, the server kills a child that it has forked
            ours.close()
            raise
        if answer is None or "pid" not in answer:
            ours.close()
            if answer is None:
                raise _ServerGone
            raise CannotFork(answer.get("why_not") or f"the forked process ended at once with code {answer['code']}")
        return Forked(messages, answer["pid"], started)

    def _harmless_changes(self, environment: Mapping[str, str]) -> dict[str, str | None]:
        """The variables of ``environment`` that a child must set, or unset (``None``).

        Raises `CannotFork` if the imports could have read any of them.
        """
        changed = {
            name: environment.get(name)
            for name in sorted({*environment, *self._environment})
            if environment.get(name) != self._environment.get(name)
        }
        read = [name for name in changed if name not in _HARMLESS_VARIABLES]
        if read:
            raise CannotFork(f"environment variables differ from the fork server's: {', '.join(read)}")
        return changed

    def disown(self) -> None:
        """Release a server that belongs to the process from which this one was forked."""
        self._control.connection.close()
        self._output.close()
        self._process.returncode = 0  # not a child of this process, so there is nothing to wait for

    def close(self) -> None:
        """End the server and its children. During its imports it has no children and can be killed."""
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
        raise CannotFork(f"the working directory no longer exists: {error.strerror}") from error


def _cores() -> list[int]:
    """The CPU cores that this thread may run on; OpenMP counts them when it is loaded."""
    return sorted(os.sched_getaffinity(0))
