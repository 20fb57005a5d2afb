"""Signals: a process group's end, and a signal's name."""

from __future__ import annotations

import contextlib
import os
import signal


def kill_group(pid: int) -> None:
    """Kill what there still is of the process group that ``pid`` founded: a grandchild could hold the GPU.

    To be called before the founder is waited for, or at once after: later the number may be another process's.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody left; macOS: none but a zombie
        os.killpg(pid, signal.SIGKILL)


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
