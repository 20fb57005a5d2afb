"""Processes forked from one that has imported what they need: the seconds of imports are paid once, not by each.

`start` asks a server for a child that calls one function. The server is started with the first request for its modules,
imports them, and lives as long as this process. It does nothing but import: no tensor, no CUDA context and no thread is
there to inherit, and a child draws random numbers as a fresh interpreter does. What children of one server share is how
their memory is laid out and the seed of Python's hashes: where processes are held against each other, spawn them.

Where a fork is not safe, or would give another process than a spawned one, `start` raises `CannotFork` with the reason;
the caller spawns. That is so on other systems than Linux, where the imports left a thread or looked at the GPU, and
where environment or cores are not those that the server was started with, for libraries read them when imported.

Not `multiprocessing.forkserver`: it forks whatever its imports have made of it, passes over a module that fails, has
one environment and one list of modules for all of a process (which torch and datasets may use too), and its children
share its output and end without the interpreter's own end.

The sides talk over socket pairs, in lines of JSON. Each request brings a pair of its own and the child's standard
streams. Over it the child tells its pid, and the server how the child ended; the requester's end is its hold on the
child: the pid stays the child's until it is closed, and where it is closed first, or its process is gone, the child is
killed with its group. This module is the requester's side; the server is the program `peft_gauge.isolation.forker`.
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

# Which test runs is told by pytest to whom it may concern; no library asks.
_HARMLESS_VARIABLES = {"PYTEST_CURRENT_TEST"}

_ANSWER_SECONDS = 30.0  # so long a server may take to fork, on a busy machine
_END_SECONDS = 5.0
_TAIL_BYTES = 4096


class CannotFork(Exception):
    """Why a process cannot be forked here, in one line; a spawned one does the same, later."""


class _ServerGone(Exception):
    """The server ended before it answered."""


class Forked:
    """A process that a server forked, as `subprocess.Popen` shows one; a context, at whose end the hold on it ends.

    Attributes:
        pid: its process id and that of its group and session.
        started: `time.perf_counter` when it was asked for.
        returncode: its exit code, or minus the signal that ended it; ``None`` while it runs, and for good where the
            server ended first (`lost`).
    """

    def __init__(self, messages: Messages, pid: int, started: float) -> None:
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
        kill_group(self.pid)

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
        self._control = Messages(ours)
        # -P: another checkout of this package in the working directory must not come before this one.
        # -u: what a child printed is known even if it is killed.
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
        ended = f"was killed by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
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
