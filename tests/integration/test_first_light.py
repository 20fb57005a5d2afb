"""`benchmarks/first_light.sh`: the commands of its parts, one after the other, and what it says of bad input.

A whole dry run is slow, and runs every week. Here the script notes its commands, which then run in the process of
sessions with fewer cases.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.facts import lacking
from tests.support.paths import ROOT
from tests.support.suite import command, sessions

SCRIPT = ROOT / "benchmarks" / "first_light.sh"


def light(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PEFT_GAUGE_"))}
    return subprocess.run(
        [str(SCRIPT), *arguments],
        env={**kept, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def parts(out: Path) -> dict[str, str]:
    return dict(line.split(None, 1) for line in (out / "summary.txt").read_text().splitlines())


def check_every_part_has_its_line(done: subprocess.CompletedProcess[str], out: Path) -> None:
    assert [*parts(out)] == [
        "doctor",
        "calibrate",
        "tests",
        "suite",
        "large",
        "rank",
        "traces",
        "compare",
        "answers",
        "report",
    ]
    assert parts(out)["calibrate"].startswith("skipped: a CPU has no CUDA context")
    assert parts(out)["large"].startswith("skipped: ")
    assert done.returncode == 0, done.stdout
    for name in ("doctor", "tests", "suite", "rank", "answers"):
        assert parts(out)[name].endswith("  done"), (out / "summary.txt").read_text() + done.stdout


def check_the_suite(told: str, results: Path) -> None:
    """That it keeps to its budget and is saved."""
    assert "peft-gauge: a budget of 1080 s" in told
    (saved,) = results.glob("*/0001_*.json")
    cases = json.loads(saved.read_text())["peft_gauge"]["cases"]
    passed = {case["id"].rpartition("::")[2] for case in cases if case["outcome"] == "passed"}
    assert {"test_peak[ia3-toy-llama-cpu]", "test_step[ia3-toy-llama-cpu]"} <= passed
    assert all("toy-llama-cpu" in case["id"] for case in cases)


def check_one_rank(told: str, results: Path) -> None:
    """That one rank of eight is next to its plan."""
    assert "one of 8 ranks (fsdp2) without the others" in told
    (saved,) = results.glob("*/0002_*.json")
    metrics = {
        case["metrics"]["method"]: case["metrics"]
        for case in json.loads(saved.read_text())["peft_gauge"]["cases"]
        if case["outcome"] == "passed"
    }
    found = metrics["lora"]
    assert found["lone_ranks"] == found["plan"]["settings"]["sharding"]["gpus"] == 8
    assert 0.9 < found["lone_peak_bytes"] / found["planned_lone_peak_bytes"] < 1.1  # a CPU's kernels, and CUDA's


# The commands of its parts -------------------------------------------------------------------------------------------

DRY = ["--device", "cpu", "--model", "toy-llama", "--seconds", "2400"]
NOTING = """#!{python} -S
import json, sys
with open({file!r}, "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
if sys.argv[1] == "-c" and "machine_info" in sys.argv[2]:
    print("a-machine")
"""
Commands = dict[str, list[str]]


@pytest.fixture(scope="module")
def noted(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path, Commands]:
    """A dry run under an interpreter that does nothing but note its arguments: by part, those of its command."""
    folder = tmp_path_factory.mktemp("noted")
    python, file, out = folder / "python", folder / "commands", folder / "out"
    python.write_text(NOTING.format(python=sys.executable, file=str(file)))
    python.chmod(0o755)
    done = light(*DRY, "--out", str(out), PYTHON=str(python))
    ran = [each for each in map(json.loads, file.read_text().splitlines()) if each[0] == "-m"]
    names = [name for name, line in parts(out).items() if line.endswith("  done")]
    return done, out, dict(zip(names, ran, strict=True))


@pytest.fixture(scope="module")
def run_part(noted: tuple[Any, Path, Commands]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_part(name, …)``: the command of the part, with more options."""

    def run(name: str, *further: str) -> subprocess.CompletedProcess[str]:
        (_, module), arguments = noted[2][name][:2], [*noted[2][name][2:], *further]
        if module == "peft_gauge.cli":
            return command(*arguments)
        assert module == "pytest"
        (done,) = sessions(arguments)
        return done

    return run


def test_every_part_has_its_line(noted: tuple[subprocess.CompletedProcess[str], Path, Commands]) -> None:
    check_every_part_has_its_line(*noted[:2])
    assert [*noted[2]] == ["doctor", "tests", "suite", "rank", "answers", "report"]


@pytest.mark.slow
def test_the_commands_of_the_parts_run_one_after_the_other(
    noted: tuple[Any, Path, Commands], run_part: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Of the suite two benchmarks of one method; of the instruments' tests what a machine without a GPU has."""
    results = noted[1] / "results"
    told = {}
    for name, further in {
        "doctor": [],
        "tests": ["--collect-only"],
        "suite": ["--method=ia3", "--rounds=2", "-k", "(test_peak or test_step) and ia3-toy-llama-cpu"],
        "rank": [],
        "answers": [],
        "report": [],
    }.items():
        done = run_part(name, *further)
        assert done.returncode == 0, f"{name}: {done.stdout[-4000:]}{done.stderr}"
        told[name] = done.stdout
    check_the_suite(told["suite"], results)
    check_one_rank(told["rank"], results)
    assert "## " in told["answers"]
    assert (noted[1] / "report.html").stat().st_size < 20e6


def test_the_suite_and_its_benchmarks_are_those_of_the_model(
    noted: tuple[Any, Path, Commands], run_part: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """What is left out above is collected, too: all that is measured of a case."""
    collected = run_part("suite", "--collect-only", "-q", "--method=ia3").stdout
    ids = [line for line in collected.splitlines() if "::" in line]
    assert all("toy-llama-cpu" in each for each in ids)
    assert {"test_memory.py::test_peak", "test_speed.py::test_step", "test_fingerprint.py::test_fingerprint"} <= {
        each.rpartition("/")[2].partition("[")[0] for each in ids
    }


# A whole dry run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lit(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Over one method, with more time than it takes on a busy machine."""
    out = tmp_path_factory.mktemp("light") / "out"
    return light(*DRY, "--out", str(out), PYTEST_ADDOPTS="--method=ia3 --rounds=2"), out


@pytest.mark.slow
def test_a_whole_run_is_what_its_commands_are(lit: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, out = lit
    check_every_part_has_its_line(done, out)
    (told,) = out.glob("*_suite.txt")
    check_the_suite(told.read_text(), out / "results")
    (told,) = out.glob("*_rank.txt")
    check_one_rank(told.read_text(), out / "results")
    assert "## " in next(out.glob("*_answers.txt")).read_text()


@pytest.mark.slow
def test_what_it_brings_home_is_small(lit: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    _, out = lit
    files = [file for file in out.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 20e6


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--seconds", "soon"], ["--seconds", "60", "not soon"]),
        (["--seconds", "59"], ["--seconds", "60", "not 59"]),
        (["--seconds"], ["--seconds needs a value"]),
        (["--device", "tpu"], ["--device", "cuda or cpu", "not tpu"]),
        (["--fast"], ["--fast", "--help"]),
        (["--out", "/proc/nowhere"], ["/proc/nowhere", "--out"]),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], facts: list[str]) -> None:
    done = light(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert lacking(done.stderr, "first_light: ", *facts) == []


def test_an_interpreter_without_the_project_is_told(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = light("--out", str(tmp_path / "out"), PYTHON=str(python))
    assert done.returncode == 2
    assert lacking(done.stderr, f"{python} cannot import peft_gauge", "PYTHON") == []


def test_a_part_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    """Every command of this interpreter fails, but for the benchmark whether the project is there."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\necho it cannot >&2\nexit 3\n')
    python.chmod(0o755)
    out = tmp_path / "out"
    done = light("--device", "cpu", "--out", str(out), PYTHON=str(python))
    assert done.returncode == 1
    failed = [name for name, line in parts(out).items() if line.endswith("exit code 3: it cannot")]
    assert failed == ["doctor", "tests", "suite", "rank", "answers", "report"]


def test_help_is_what_stands_at_the_head_of_the_script() -> None:
    done = light("--help")
    assert done.returncode == 0
    assert lacking(done.stdout, "--seconds", "--out", "--model", "--large", "--weights", "--device") == []
    assert "set -u" not in done.stdout
