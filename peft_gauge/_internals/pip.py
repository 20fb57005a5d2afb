"""What is private in pip, and used: its markers, and the words of its errors (pip has no API but its command line)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping

RETRIES = "2"  # pip's default of 5 makes a machine without a network wait for half a minute
_LAST_TRY = "Retry(total=0"

# pip chooses wheels for --python-version and --platform, but evaluates environment markers for the Python that it runs
# in (https://github.com/pypa/pip/issues/11198). Its copy of `packaging` asks this one function about the environment.
# `was_for` checks by pip's own report that it was asked.
_FOR_ANOTHER_ENVIRONMENT = """
import json, runpy, sys
from pip._vendor.packaging import markers
environment = json.loads(sys.argv.pop(1))
markers.default_environment = lambda: dict(environment)
runpy.run_module("pip", run_name="__main__")
"""

# Settings of the user's own installations; each makes pip refuse --target, or another environment's wheels.
_UNFIT = ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_REQUIRE_VIRTUALENV", "PIP_NO_BINARY", "PIP_PYTHON")


def run_for(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pip with these arguments, environment markers evaluated for ``environment``, one that PEP 508 describes."""
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
    """Whether pip's installation report says that markers were evaluated for ``environment``."""
    return report.get("environment") == environment


def is_missing(complaint: str) -> bool:
    """Whether this Python has no pip, by what it wrote to standard error."""
    return "No module named pip" in complaint or "No module named 'pip'" in complaint


def no_answer(complaint: str) -> bool:
    """Whether a package index did not answer at the last try."""
    return _LAST_TRY in complaint


def last_error(complaint: str) -> str:
    """pip's last error with a reason in it, else its last line."""
    errors = re.findall(r"^ERROR: (?!ResolutionImpossible|Could not find a version)(.+)$", complaint, re.MULTILINE)
    lines = [line for line in complaint.splitlines() if line.strip()]
    return str((errors or lines or ["pip gave no reason"])[-1])


def causes(printed: str) -> list[str]:
    """The requirements that contradict each other, one a line, by what pip printed of a conflict; else none."""
    block = re.search(r"^The conflict is caused by:\n((?: +.+\n?)+)", printed, re.MULTILINE)
    return [] if block is None else [line.strip() for line in block[1].splitlines()]
