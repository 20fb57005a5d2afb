"""`benchmarks/first_light.sh`: its dry run on a CPU, and what it says of bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.facts import lacking
from tests.support.paths import ROOT

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


@pytest.fixture(scope="module")
def lit(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A dry run over one method, with more time than it takes on a busy machine."""
    out = tmp_path_factory.mktemp("light") / "out"
    arguments = ["--device", "cpu", "--model", "toy-llama", "--seconds", "2400", "--out", str(out)]
    return light(*arguments, PYTEST_ADDOPTS="--method=ia3 --rounds=2"), out


def parts(out: Path) -> dict[str, str]:
    return dict(line.split(None, 1) for line in (out / "summary.txt").read_text().splitlines())


def test_every_part_has_its_line(lit: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, out = lit
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


def test_the_suite_keeps_to_its_budget_and_is_saved(lit: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    _, out = lit
    (told,) = out.glob("*_suite.txt")
    text = told.read_text()
    assert "peft-gauge: a budget of 1080 s" in text
    (saved,) = out.glob("results/*/0001_*.json")
    cases = json.loads(saved.read_text())["peft_gauge"]["cases"]
    passed = {case["id"].rpartition("::")[2] for case in cases if case["outcome"] == "passed"}
    assert {"test_peak[ia3-toy-llama-cpu]", "test_step[ia3-toy-llama-cpu]"} <= passed
    assert all("toy-llama-cpu" in case["id"] for case in cases)
    assert "## " in next(out.glob("*_answers.txt")).read_text()


def test_one_rank_of_eight_is_next_to_its_plan(lit: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    _, out = lit
    (text,) = (file.read_text() for file in out.glob("*_rank.txt"))
    assert "one of 8 ranks (fsdp2) without the others" in text
    (saved,) = out.glob("results/*/0002_*.json")
    metrics = {
        case["metrics"]["method"]: case["metrics"]
        for case in json.loads(saved.read_text())["peft_gauge"]["cases"]
        if case["outcome"] == "passed"
    }
    found = metrics["lora"]
    assert found["lone_ranks"] == found["plan"]["settings"]["sharding"]["gpus"] == 8
    assert 0.9 < found["lone_peak_bytes"] / found["planned_lone_peak_bytes"] < 1.1  # a CPU's kernels, and CUDA's


def test_what_it_brings_home_is_small(lit: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    _, out = lit
    files = [file for file in out.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 20e6


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
