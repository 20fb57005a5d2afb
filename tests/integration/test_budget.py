"""``--budget`` in runs of the suite, with planted cases: what is begun, saved and gone on with, and what is refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.facts import lacking
from tests.support.suite import Suite, by_benchmark

MEMORY = "benchmarks/test_memory.py"


def test_a_run_with_a_budget_is_saved_and_gone_on_with(tmp_path: Path) -> None:
    """Three methods whose processes are known to take no time; an earlier run says that full fine-tuning takes long."""
    suite = Suite(tmp_path)
    names = {"lora": "give", "full": "give", "ia3": "give"}
    arguments = (MEMORY, "-k=peak", "--method=full,lora,ia3")
    first = suite.run(*arguments, planted=names, plans={})
    assert first.returncode == 0, first.stdout
    file = next((tmp_path / "results").glob("*/0001_*.json"))
    run = json.loads(file.read_text())
    for record in run["peft_gauge"]["cases"]:
        record["metrics"]["process_seconds"] = 5000.0 if "[full-" in record["id"] else 1.0
    file.write_text(json.dumps(run))
    before = suite.started()

    second = suite.run(*arguments, "--budget=300", planted=names, plans={})
    assert second.returncode == 0, second.stdout
    assert suite.started() - before == {"lora": 1, "ia3": 1}
    cases = by_benchmark(suite.saved(2))
    assert {name: record["outcome"] for name, record in cases.items()} == {
        "test_peak full": "skipped",
        "test_peak lora": "passed",
        "test_peak ia3": "passed",
    }
    assert cases["test_peak full"]["reason"].startswith("not started: estimated at ")
    assert "budget: " in second.stdout
    assert lacking(second.stdout, "not started: full-toy-llama-cpu", "--resume") == []

    for record in run["peft_gauge"]["cases"]:
        record["metrics"]["process_seconds"] = 1.0
    file.write_text(json.dumps(run))
    third = suite.run(*arguments, "--budget=300", "--resume", planted=names, plans={})
    assert third.returncode == 0, third.stdout
    assert suite.started() - before == {"lora": 1, "ia3": 1, "full": 1}
    assert {record["outcome"] for record in by_benchmark(suite.saved(3)).values()} == {"passed"}


REFUSED: dict[tuple[str, ...], tuple[str, ...]] = {
    ("--budget=0",): ("--budget", "positive", "not 0"),
    ("--budget=inf",): ("--budget", "positive", "not inf"),
    ("--budget=1",): ("--budget=1 is too small",),
    ("--budget=100", "--processes=2"): ("--budget", "without --processes"),
    ("--budget=100", "-n1"): ("--budget", "without -n"),
}
Answers = tuple[dict[tuple[str, ...], subprocess.CompletedProcess[str]], Suite]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    suite = Suite(tmp_path_factory.mktemp("refused"))
    arguments = (MEMORY, "--method=lora")
    done = [suite.run(*arguments, *options, planted={"lora": "give"}, plans={}) for options in REFUSED]
    return dict(zip(REFUSED, done, strict=True)), suite


@pytest.mark.parametrize(("options", "facts"), REFUSED.items(), ids=[" ".join(options) for options in REFUSED])
def test_a_budget_that_cannot_be_kept_is_one_line(
    options: tuple[str, ...], facts: tuple[str, ...], answers: Answers
) -> None:
    found, suite = answers
    done = found[options]
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    line = next(line for line in (done.stdout + done.stderr).splitlines() if line.startswith("ERROR: "))
    assert lacking(line, *facts) == []
    assert suite.started() == {}
