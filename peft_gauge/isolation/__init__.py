"""Running a function in its own process, where running out of memory, a crash or a hang is an outcome to report.

A measurement needs a new process, because the caching allocator and the libraries keep state from earlier work. A test
suite must also continue after a case that crashes. `run` starts a process that calls one function, and returns how it
ended. The function can report metrics with `note` and `watch`; these survive if it is killed.

The process is a new interpreter. If the caller names modules to preload, it is forked from a server that has imported
them (`peft_gauge.isolation.fork_server`).

The two sides (`parent`, `child`) share a private folder instead of pipes, since a grandchild that keeps a pipe open
would make the parent wait.
"""

from __future__ import annotations

from peft_gauge.isolation.child import note, watch
from peft_gauge.isolation.outcome import Interrupted, ProcessOutcome
from peft_gauge.isolation.parent import child_environment, run

__all__ = ["Interrupted", "ProcessOutcome", "child_environment", "note", "run", "watch"]
