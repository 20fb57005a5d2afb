"""Runs of the real suite in a process of their own, in which measured cases end in planted ways."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT
from tests.support.planted_cases import PLANS, PLANTED, STARTED


@dataclass
class Suite:
    """Runs of the suite with planted cases, all saved in one folder."""

    folder: Path

    def options(self, *options: str) -> list[str]:
        results = f"--results={self.folder / 'results'}"
        # A plan that an earlier session kept would stand for a planted one.
        return ["--model=toy-llama", "--device=cpu", "--no-plan-cache", "-q", results, *options]

    def command(self, *options: str) -> list[str]:
        return [sys.executable, "-m", "pytest", *self.options(*options)]

    def environment(self, planted: dict[str, str], *, plans: dict[str, int] | None = None) -> dict[str, str]:
        started = self.folder / "started"
        started.mkdir(exist_ok=True)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
            "PYTEST_PLUGINS": "tests.support.planted_cases",
            "PYTHONPATH": str(ROOT),
            PLANTED: json.dumps(planted),
            STARTED: str(started),
        }
        return environment if plans is None else {**environment, PLANS: json.dumps(plans)}

    def run(
        self, *options: str, planted: dict[str, str], plans: dict[str, int] | None = None
    ) -> subprocess.CompletedProcess[str]:
        environment = self.environment(planted, plans=plans)
        return subprocess.run(
            self.command(*options), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )

    def saved(self, number: int = 1) -> dict[str, Any]:
        (file,) = (self.folder / "results").glob(f"*/{number:04}_*.json")
        run: dict[str, Any] = json.loads(file.read_text())
        return run

    def started(self) -> Counter[str]:
        """How many processes were started for each method's case."""
        return Counter(file.name.partition(".")[0] for file in (self.folder / "started").iterdir() if "." in file.name)


def by_benchmark(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The case records by function and method, as in ``"test_peak lora"``; none may be there twice."""
    cases = {}
    for case in run["peft_gauge"]["cases"]:
        function, _, parameters = case["id"].rpartition("::")[2].partition("[")
        name = f"{function} {parameters.partition('-toy-llama')[0]}"
        assert name not in cases
        cases[name] = case
    return cases


def outcomes(run: dict[str, Any]) -> dict[str, str]:
    return {name: case["outcome"] for name, case in by_benchmark(run).items()}


SESSIONS = """
import contextlib, io, json, sys
import pytest

found = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = pytest.main(arguments)
    found.append([int(code), out.getvalue(), err.getvalue()])
sys.__stdout__.write("\\n" + json.dumps(found))
"""


def sessions(
    requests: Sequence[Sequence[str]], environment: Mapping[str, str] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """What ``pytest …`` says to each of ``requests``, one after the other in one process.

    To start Python with torch and this suite takes seconds; where what is asked is the answer to some options, once is
    enough. What a session leaves behind in its process is for those tests that have a process for each.
    """
    command = [sys.executable, "-c", SESSIONS, json.dumps([[*each] for each in requests])]
    asked = None if environment is None else {**environment}
    done = subprocess.run(command, cwd=ROOT, env=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    return [subprocess.CompletedProcess([*request], *answer) for request, answer in zip(requests, answers, strict=True)]
