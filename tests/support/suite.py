"""Sessions of pytest beside the one that runs the tests, among them runs in which cases end in planted ways."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_gauge.isolation import child_environment, fork_server
from peft_gauge.measure import PRELOAD
from peft_gauge.pytest_plugin.workers import process_environment
from tests.support.paths import ROOT

IMPORT_SECONDS = 120.0


class SessionProcess:
    """A process of `tests.support.sessions`: one for all tests of this one, as long as it lives.

    It is forked from the server that this process forks measured cases from, which spares its imports.
    """

    def __init__(self) -> None:
        self._process: fork_server.Forked | None = None
        self._errors = Path(os.devnull)

    def run(self, program: str, arguments: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
        if self._process is None:
            self._start()
        self._requests.write(json.dumps([str(folder), program, [*arguments]]) + "\n")
        self._requests.flush()
        answer = self._answers.readline()
        if not answer:
            told = self._errors.read_text(errors="replace")[-4000:]
            self.close()
            raise RuntimeError(f"a command ended its process: {program} {' '.join(arguments)}\n{told}")
        return subprocess.CompletedProcess([program, *arguments], *json.loads(answer))

    def _start(self) -> None:
        its_input, requests = os.pipe()
        answers, its_output = os.pipe()
        errors, name = tempfile.mkstemp(prefix="sessions-")
        self._process = fork_server.start(
            "tests.support.sessions:main",
            preload=PRELOAD,
            environment=child_environment(process_environment()),
            streams=(its_input, its_output, errors),
            limit_seconds=IMPORT_SECONDS,
        )
        for descriptor in (its_input, its_output, errors):
            os.close(descriptor)
        self._requests, self._answers, self._errors = os.fdopen(requests, "w"), os.fdopen(answers), Path(name)

    def close(self) -> None:
        """Let it end, which it does with its input."""
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError):
                self._requests.close()
            self._process.wait()
            self._process.close()
            self._process = None
            self._answers.close()
            self._errors.unlink()


SESSIONS = SessionProcess()


def sessions(*requests: Sequence[str], folder: Path = ROOT) -> list[subprocess.CompletedProcess[str]]:
    """What ``pytest …`` in ``folder`` says to each of ``requests``, one after the other in the process of sessions."""
    return [SESSIONS.run("pytest", request, folder) for request in requests]


def command(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What ``peft-gauge …`` in ``folder`` says, in the process of sessions."""
    return SESSIONS.run("peft-gauge", arguments, folder)


def environment() -> dict[str, str]:
    """That of this process without pytest's own variables, as a user's shell has it, and with this checkout."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {**inherited, "PYTHONPATH": str(ROOT)}


@dataclass
class Suite:
    """Runs of the suite with planted cases, all saved in one folder."""

    folder: Path

    def options(self, *options: str, planted: dict[str, str], plans: dict[str, int] | None = None) -> list[str]:
        started = self.folder / "started"
        started.mkdir(exist_ok=True)
        settings = json.dumps({"planted": planted, "plans": plans, "started": str(started)})
        plugin = ["-p", "tests.support.planted_cases", f"--planted={settings}"]
        results = f"--results={self.folder / 'results'}"
        # A plan that an earlier session kept would stand for a planted one.
        return [*plugin, "--model=toy-llama", "--device=cpu", "--no-plan-cache", "-q", results, *options]

    def command(self, *options: str, planted: dict[str, str], plans: dict[str, int] | None = None) -> list[str]:
        return [sys.executable, "-m", "pytest", *self.options(*options, planted=planted, plans=plans)]

    def run(
        self, *options: str, planted: dict[str, str], plans: dict[str, int] | None = None
    ) -> subprocess.CompletedProcess[str]:
        (done,) = sessions(self.options(*options, planted=planted, plans=plans))
        return done

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
