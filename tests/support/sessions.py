"""A program that runs command lines one after the other in one process; `tests.support.suite` starts it.

Each line of its standard input is a request in JSON, ``[folder, program, arguments]`` with ``pytest`` or
``peft-gauge`` as the program; each line of its standard output is the answer, ``[exit code, standard output, standard
error]``. It ends with its input.

A process of its own for each session spends 3 s of a core on imports, and 9 s more on those of a fork server where
something is measured. Here they are imported once. A session finds what earlier ones have left in the process: those
tests that are about a process as a user starts it start one (`suite.Suite.command`).
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import sys
from collections.abc import Sequence

import pytest

from peft_gauge import cli


def command(arguments: Sequence[str]) -> int:
    """The exit code of ``peft-gauge …``."""
    sys.argv = ["peft-gauge", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def main() -> None:
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


if __name__ == "__main__":
    main()
