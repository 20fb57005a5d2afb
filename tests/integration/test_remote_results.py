"""``pytest --results=ADDRESS``: saved there, resumed and compared from there, and kept here if it is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from peft_gauge.history.reader import read_run, runs_in
from tests.support.facts import lacking
from tests.support.suite import sessions

BENCHMARK = ["benchmarks/test_trainable_params.py", "-q", "-k=toy-llama"]
OPTIONS = [*BENCHMARK, "--model=toy-llama", "--device=cpu", "--method=lora,ia3"]
PLUGIN = ["-p", "tests.support.planted_stores"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path) -> str:
    return f"--gauge-cache={tmp_path / 'cache'}"


def test_an_address_is_saved_to_compared_with_and_resumed(tmp_path: Path, cache: str) -> None:
    """All in one process, since its memory is the store."""
    address = f"--results=counting://{tmp_path.name}/runs"
    first, second, resumed = sessions(
        [*PLUGIN, cache, *OPTIONS, address],
        [*PLUGIN, cache, *OPTIONS, address, "--compare"],
        [*PLUGIN, cache, *OPTIONS, address, "--resume", "--collect-only"],
    )
    assert first.returncode == 0, first.stdout
    assert re.search(rf"saved counting://{tmp_path.name}/runs/[^/]+/0001_\S+\.json", first.stdout)
    assert second.returncode == 0, second.stdout
    assert lacking(second.stdout, "0002_", "0001_") == []
    assert resumed.returncode == pytest.ExitCode.NO_TESTS_COLLECTED


def test_a_refused_run_is_kept_and_the_session_fails(tmp_path: Path, cache: str) -> None:
    (done,) = sessions([*PLUGIN, cache, *OPTIONS, "--results=denying://bucket/runs"])
    assert done.returncode != 0
    line = " ".join(done.stdout.partition("NOT SAVED")[2].split())  # the digest's lines end at 80 columns
    assert lacking(line, "denying://bucket/runs", "Access Denied") == []
    match = re.search(r"the run is kept in (\S+\.json)", line)
    assert match is not None
    assert {record.outcome for record in read_run(Path(match[1])).cases} == {"passed"}


def test_a_missing_package_is_named_before_anything_is_measured(tmp_path: Path, cache: str) -> None:
    arguments = ["benchmarks/test_memory.py", "-q", "--model=toy-llama", "--device=cpu", "--method=lora"]
    (done,) = sessions([*PLUGIN, cache, *arguments, "--results=missing://bucket/runs"])
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    line = next(line for line in (done.stdout + done.stderr).splitlines() if line.startswith("ERROR: "))
    assert lacking(line, "runs cannot be saved in missing://bucket/runs", "peft-gauge[remote]") == []


@pytest.mark.slow
def test_a_folder_can_be_given_as_an_address(tmp_path: Path, cache: str) -> None:
    (done,) = sessions([*PLUGIN, cache, *OPTIONS, f"--results=file://{tmp_path}/runs"])
    assert done.returncode == 0, done.stdout
    (path,) = runs_in(tmp_path / "runs")
    assert json.loads(path.read_text())["peft_gauge"]["cases"]
