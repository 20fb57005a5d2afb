"""Private parts of pip: its markers, and its error messages (its only public interface is the command line)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping

RETRIES = "2"  # pip's default of 5 makes a machine without a network wait for half a minute
_LAST_TRY = "Retry(total=0"

# pip selects wheels for --python-version and --platform, but evaluates environment markers for its own Python
# (https://github.com/pypa/pip/issues/11198). Its copy of `packaging` gets the environment from this one function;
# `was_for` checks in pip's own report that the replacement worked.
_FOR_ANOTHER_ENVIRONMENT = """
import json, runpy, sys
from pip._vendor.packaging import markers
environment = json.loads(sys.argv.pop(1))
markers.default_environment = lambda: dict(environment)
runpy.run_module("pip", run_name="__main__")
"""

# Settings for the user's own installations; each makes pip reject --target or another environment's wheels.
_UNFIT = ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_REQUIRE_VIRTUALENV", "PIP_NO_BINARY", "PIP_PYTHON")


def run_for(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pip with these arguments, with environment markers evaluated for ``environment`` (as in PEP 508)."""
    options = ["--no-input", "--disable-pip-version-check", "--retries", RETRIES]
    return subprocess.run(
        [sys.executable, "-P", "-c", _FOR_ANOTHER_ENVIRONMENT, json.dumps(environment), *arguments, *options],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env={name: value for name, value in os.environ.items() if name not in _UNFIT},
    )


def was_for(environment: Mapping[str, str], report: Mapping[str, object]) -> bool:
    """Whether pip's installation report confirms that markers were evaluated for ``environment``."""
    return report.get("environment") == environment


def is_missing(complaint: str) -> bool:
    """Whether this Python has no pip, by its output on standard error."""
    return "No module named pip" in complaint or "No module named 'pip'" in complaint


def no_answer(complaint: str) -> bool:
    """Whether a package index did not respond at the last try."""
    return _LAST_TRY in complaint


def last_error(complaint: str) -> str:
    """pip's last error that gives a reason, otherwise its last line."""
    errors = re.findall(r"^ERROR: (?!ResolutionImpossible|Could not find a version)(.+)$", complaint, re.MULTILINE)
    lines = [line for line in complaint.splitlines() if line.strip()]
    return str((errors or lines or ["pip gave no reason"])[-1])


def causes(printed: str) -> list[str]:
    """The conflicting requirements, one per line, from pip's report of a conflict; empty without one."""
    block = re.search(r"^The conflict is caused by:\n((?: +.+\n?)+)", printed, re.MULTILINE)
    return [] if block is None else [line.strip() for line in block[1].splitlines()]
