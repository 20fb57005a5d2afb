"""Runs command lines one after the other in one process, which `tests.support.suite` starts.

Each line of its standard input is a request in JSON, ``[folder, program, arguments]`` with ``pytest`` or
``peft-gauge`` as the program; each line of its standard output is the answer, ``[exit code, standard output, standard
error]``. It ends with its input.

A process of its own for each session spends 3 s of a core on imports, and 9 s more on those of a fork server where
something is measured. Here both are forked from a process that has imported them. A session finds what earlier ones
have left in the process: those tests that are about a process as a user starts it start one (`suite.Suite.command`).
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from peft_gauge import cli
from peft_gauge.clock.peak_throughput import measure_peak_throughput
from peft_gauge.isolation import child_environment, fork_server, forker
from peft_gauge.isolation.messages import Messages
from peft_gauge.measure import PRELOAD
from peft_gauge.pytest_plugin import workers
from peft_gauge.pytest_plugin.workers import process_environment


def command(arguments: Sequence[str]) -> int:
    """The exit code of ``peft-gauge …``."""
    sys.argv = ["peft-gauge", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


class _Fork:
    """A fork of this process, with the part of `subprocess.Popen` that a fork server's requester uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


def serve_forks() -> bool:
    """Let a fork of this process, which has imported all that cases need, be its fork server.

    False in processes that this server has forked, after they have done their task, and in the server at its end.
    """
    ours, theirs = socket.socketpair()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        ours.close()
        task = forker._Forker(theirs, parent).serve()
        if task is not None:
            task()
        return False
    theirs.close()
    server: Any = object.__new__(fork_server._Server)
    server._environment = child_environment(process_environment())
    server._cores = fork_server._cores()
    server._output = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the server lives
    server._lock = threading.Lock()
    server._has_imported, server._why_not = True, None
    server._control, server._process = Messages(ours), _Fork(pid)
    fork_server._servers[tuple(PRELOAD)], fork_server._owner = server, os.getpid()
    return True


def main() -> None:
    workers._AT_START = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    os.environ.clear()
    os.environ.update({**workers._AT_START, "PYTEST_VERSION": pytest.__version__})  # as in each session
    defaults = measure_peak_throughput.__kwdefaults__
    assert defaults is not None
    assert "seconds" in defaults
    defaults["seconds"] = 0.01  # each session divides by it; 1.4 s otherwise
    if serve_forks():
        run_sessions()


def run_sessions() -> None:
    requests = os.fdopen(os.dup(0))
    answers = os.fdopen(os.dup(1), "w")
    with contextlib.suppress(OSError):  # what is written past Python's streams is nobody's answer
        os.dup2(2, 1)
    for request in requests:
        folder, program, arguments = json.loads(request)
        os.chdir(folder)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = pytest.main(arguments) if program == "pytest" else command(arguments)
        answers.write(json.dumps([int(code), out.getvalue(), err.getvalue()]) + "\n")
        answers.flush()
        # What was imported stays, and the collector need not go through it again: pytest calls it several times at the
        # end of a session, which was half of a short one's time.
        gc.collect()
        gc.freeze()
