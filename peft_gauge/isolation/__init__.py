"""A function in a process of its own: out of memory, a crash and a hang are outcomes, never ends.

A measurement wants a fresh process (the caching allocator and the libraries remember what ran before), and a suite
wants to live on when a case does not. `run` starts a process that calls one function and says how that ended;
meanwhile the function can `note` and `watch` metrics, which are known even if it is killed. The process is a new
interpreter or, where the caller names modules to preload, one forked from a server that has imported them
(`peft_gauge.isolation.fork_server`).

The two sides (`parent`, `child`) share a private folder instead of pipes: a grandchild that keeps a pipe open would
make the parent wait.
"""

from __future__ import annotations

from peft_gauge.isolation.child import note, watch
from peft_gauge.isolation.outcome import Interrupted, ProcessOutcome
from peft_gauge.isolation.parent import child_environment, run

__all__ = ["Interrupted", "ProcessOutcome", "child_environment", "note", "run", "watch"]
