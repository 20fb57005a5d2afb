"""The parent's side: start a process for one function, wait for its end, and return the outcome."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from peft_gauge.errors import GaugeError, one_line
from peft_gauge.isolation import fork_server
from peft_gauge.isolation.endings import without_result
from peft_gauge.isolation.folder import ARGUMENTS, OUTPUT, PROGRESS, RESULT, TASK
from peft_gauge.isolation.fork_server import CannotFork, Forked
from peft_gauge.isolation.outcome import Interrupted, ProcessOutcome
from peft_gauge.isolation.signals import kill_group

Child = subprocess.Popen[bytes] | Forked

PACKAGE_PARENT = Path(__file__).resolve().parents[2]

_TAIL_BYTES = 32_768  # of the output: enough for a crash report, which lists every extension module


def run(
    function: str,
    *arguments: Any,
    limit_seconds: float,
    environment: Mapping[str, str | None] | None = None,
    python: str = sys.executable,
    preload: Sequence[str] | None = None,
) -> ProcessOutcome:
    """Call ``function`` with ``arguments`` in a new process, wait for its end, and return the outcome.

    The child and its descendants are killed at the limit and at the end, except for a grandchild that starts its own
    session.

    Args:
        function: ``"package.module:name"``; its return value must be convertible to JSON.
        arguments: picklable, of classes that the child can import.
        limit_seconds: wall time until the child is killed, including its start.
        environment: variables to set in addition to those of this process; ``None`` unsets a variable.
        python: the interpreter, which may have other versions of the libraries.
        preload: names of modules that may be imported beforehand. The process is then forked from a server that has
            imported them, if that is safe (`fork_server`); otherwise it is spawned, with the reason in ``why_spawned``.
            ``None``: a new interpreter, with its own memory layout.

    Raises:
        GaugeError: the child cannot be started. A failure inside the child is an outcome instead.
        Interrupted: Ctrl-C; the child has been killed.
    """
    if not 0 < limit_seconds < threading.TIMEOUT_MAX:
        raise GaugeError(f"the time limit must be a positive, finite number of seconds, got {limit_seconds}")
    if not re.fullmatch(r"[\w.]+:\w+", function):
        raise GaugeError(f"{function!r} is not the name of a function; write it as 'package.module:name'")
    try:
        pickled = pickle.dumps(arguments)
    except Exception as error:  # __reduce__ can raise any error
        raise GaugeError(
            f"the arguments of {function} cannot be pickled for the child process: {one_line(error)}"
        ) from error
    # A killed grandchild may still write while the folder is removed; ignore the errors that this causes.
    with tempfile.TemporaryDirectory(prefix="peft-gauge-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / ARGUMENTS).write_bytes(pickled)
        (folder / TASK).write_text(json.dumps({"function": function, "limit_seconds": limit_seconds}))
        start = _starter(folder, limit_seconds, python, child_environment(environment), preload)
        return _attend(folder, limit_seconds, start)


def child_environment(given: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """The environment of a child: that of this process, updated with ``given``, with this package on the path.

    An installed package is not added: its folder has all other libraries too, which would come before those of another
    interpreter.
    """
    wanted = {**os.environ, **(given or {})}
    environment = {name: value for name, value in wanted.items() if value is not None}
    installed = PACKAGE_PARENT.name in ("site-packages", "dist-packages")
    path = [None if installed else str(PACKAGE_PARENT), environment.get("PYTHONPATH")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, path))}


@dataclass(frozen=True)
class _Started:
    """A running child, the time of its start, and why it was spawned although a fork was requested."""

    child: Child
    at: float
    why_spawned: str | None = None


def _attend(folder: Path, limit_seconds: float, start: Callable[[], _Started]) -> ProcessOutcome:
    try:
        started = start()
    except KeyboardInterrupt:  # during the imports of a fork server
        raise Interrupted(ProcessOutcome("interrupted", None, "interrupted before it began", {}, 0.0, None)) from None
    child = started.child
    # `wait` with a time-out polls, and would notice the end up to 50 ms late.
    timer = threading.Timer(limit_seconds, kill_group, [child.pid])
    timer.daemon = True
    interrupted = False
    with child:
        try:
            timer.start()
            child.wait()
        except KeyboardInterrupt:  # raised again below, with the outcome
            interrupted = True
        finally:
            seconds = time.perf_counter() - started.at
            timer.cancel()
            kill_group(child.pid)
            child.wait()
    if interrupted:
        reason = f"interrupted after {seconds:.1f} s"
        outcome = ProcessOutcome("interrupted", None, reason, _last_metrics(folder), seconds, None)
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
        raise CannotFork("the requested interpreter is not that of the fork server")
    with Path(os.devnull).open("rb") as nothing, (folder / OUTPUT).open("wb") as output:
        return fork_server.start(
            "peft_gauge.isolation.child:serve",
            str(folder),
            preload=preload,
            environment=environment,
            streams=(nothing.fileno(), output.fileno(), output.fileno()),
            limit_seconds=limit_seconds,
            folder=folder,
        )


def _spawn(folder: Path, python: str, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    # -P: do not import another checkout of this package from the working directory.
    # -u: keep the child's output even if it is killed.
    command = [python, "-P", "-u", "-m", "peft_gauge.isolation", str(folder)]
    try:
        with (folder / OUTPUT).open("wb") as output:
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


def _outcome(folder: Path, code: int | None, limit_seconds: float, seconds: float) -> ProcessOutcome:
    last = _last_metrics(folder)
    result = folder / RESULT
    if result.exists():  # valid even if the interpreter failed on exit
        return ProcessOutcome(last=last, seconds=seconds, **json.loads(result.read_text(encoding="utf-8")))
    if seconds >= limit_seconds:
        phase = f"; last seen in phase {last['phase']}" if "phase" in last else ""
        return ProcessOutcome("timed-out", None, f"did not end within {limit_seconds:g} s{phase}", last, seconds, None)
    ended, reason = without_result(code, _tail(folder / OUTPUT))
    return ProcessOutcome(ended, None, one_line(reason), last, seconds, None)


def _last_metrics(folder: Path) -> dict[str, Any]:
    """The reported metrics, merged. A watched ``None`` (unavailable reading) does not replace a known value."""
    last: dict[str, Any] = {}
    progress = folder / PROGRESS
    lines = progress.read_text(encoding="utf-8").splitlines() if progress.exists() else []
    for line in lines:
        try:
            kind, metrics = json.loads(line)
        except ValueError:  # truncated by a full disk
            continue
        for name, value in metrics.items():
            known = last.get(name)
            if kind == "watch" and known is not None:
                if value is None:
                    continue
                if name.endswith("_peak_bytes"):
                    value = max(known, value)
            last[name] = value
    return last


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace")
