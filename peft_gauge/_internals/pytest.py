"""Private parts of pytest, used by the suite's options (no module of the package itself imports pytest)."""

from __future__ import annotations

from typing import Any

from _pytest.mark.expression import Expression as Expression  # the compiler of -m and -k; pytest reports its errors


def width_of(terminal: Any) -> int:
    """Columns of the terminal that the summary is written for. Unguarded."""
    return int(terminal._tw.fullwidth)
