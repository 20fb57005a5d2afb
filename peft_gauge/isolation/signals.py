"""Killing a process group, and names of signals."""

from __future__ import annotations

import contextlib
import os
import signal


def kill_group(pid: int) -> None:
    """Kill the process group of ``pid``, including grandchildren that could still use the GPU.

    Call this before or right after waiting for the process ``pid``; later the number may belong to another process.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the group is empty; on macOS, only a zombie
        os.killpg(pid, signal.SIGKILL)


def signal_name(number: int) -> str:
    """The name of a signal: ``SIGKILL`` for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
