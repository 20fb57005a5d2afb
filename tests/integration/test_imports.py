"""Which way imports run: the contracts of pyproject.toml hold, and see what breaks them; listing stays light."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "datasets"}

PLANTED = {
    "clock/rounds.py": "from peft_gauge.training.methods import get",
    "meters/host.py": "def late() -> None:\n    import peft_gauge.plan.planner",
    "history/rules.py": "def late() -> None:\n    import torch",
    "files.py": "def late() -> None:\n    import pytest",
}
"""A line for the end of each file that breaks a contract."""


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter in a process of its own: it configures logging and disables the loggers that exist."""
    pytest.importorskip("importlinter", reason="import-linter comes with the extra dev")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    return subprocess.run([*command, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False)


def test_the_import_contracts_hold() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def report_on_planted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What import-linter says of a copy of the package with wrong imports and a room that stands on no floor."""
    copy = tmp_path_factory.mktemp("planted")
    shutil.copytree(ROOT / "peft_gauge", copy / "peft_gauge", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    for name, line in PLANTED.items():
        with (copy / "peft_gauge" / name).open("a", encoding="utf-8") as file:
            file.write(f"\n\n{line}\n")
    (copy / "peft_gauge" / "new_room.py").touch()
    done = lint_imports(copy)
    assert done.returncode == 1, done.stderr
    return done.stdout


def test_a_planted_import_breaks_each_contract(report_on_planted: str) -> None:
    assert "Contracts: 0 kept, 4 broken." in report_on_planted


@pytest.mark.parametrize(
    "line",
    [
        "peft_gauge.clock.rounds -> peft_gauge.training.methods",  # upwards
        "peft_gauge.meters.host -> peft_gauge.plan.planner",  # within a function; a circle of rooms
        "peft_gauge.history.rules -> torch",
        "peft_gauge.files -> pytest",
        "peft_gauge.new_room",  # on no floor
    ],
)
def test_a_planted_import_is_named(line: str, report_on_planted: str) -> None:
    assert line in report_on_planted


LIGHT = [
    "peft_gauge.commands.plan",
    "peft_gauge.plan.recipes",
    "peft_gauge.cli",
    "peft_gauge.training.methods",
    "peft_gauge.training.models",
    "peft_gauge.history.writer",
    "peft_gauge.report.terminal.summary",
    "peft_gauge.claims",
    "peft_gauge.isolation",
    "peft_gauge.history.reader",
    "peft_gauge.history.fingerprints",
    "peft_gauge.history.resumption",
    "peft_gauge.bundle.collection",
]


def test_listing_needs_no_heavy_library() -> None:
    """Cases are listed and histories compared without the seconds that importing torch and transformers takes."""
    code = f"""
import importlib, sys
import conftest  # pytest reads the options of a run by it, and by its plugins
plugins = [name for name in conftest.pytest_plugins if "." in name]
for name in ["conftest", *plugins, *{LIGHT}]:
    importlib.import_module(name)
    print(name, sorted({HEAVY} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    lines = done.stdout.splitlines()
    assert lines == [f"{line.split()[0]} []" for line in lines]
    names = [line.split()[0] for line in lines]
    assert names[-len(LIGHT) :] == LIGHT
    assert {"conftest", "peft_gauge.pytest_plugin.hooks", "fixtures.measured"} <= {*names}
