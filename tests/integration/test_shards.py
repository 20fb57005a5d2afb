"""``pytest --shard`` and ``peft-gauge merge``: a toy run in three shards, joined, is the whole run case by case."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from peft_gauge.history.comparison import compare
from peft_gauge.history.reader import Run, read_run
from peft_gauge.history.rules import read_rules
from tests.support.facts import lacking
from tests.support.suite import command, sessions

OF = 3
CASES = ["benchmarks/test_memory.py", "benchmarks/test_trainable_params.py", "benchmarks/test_fingerprint.py"]
OPTIONS = [*CASES, "-q", "-k=toy-llama", "--model=toy-llama", "--device=cpu", "--method=lora,ia3,full"]


class Runs:
    """The whole run, the runs of its shards by number, and what pytest printed for each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        requests = [[], *([f"--shard={number}/{OF}"] for number in range(1, OF + 1))]
        self.printed = [
            (done.returncode, done.stdout)
            for done in sessions(*([*OPTIONS, f"--results={folder}", *request] for request in requests))
        ]
        self.files = sorted(folder.glob("*/0*.json"))

    @property
    def whole(self) -> Run:
        return read_run(self.files[0])

    def merge(self, *arguments: str) -> Any:
        return command("merge", *arguments, f"--results={self.folder / 'merged'}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    found = Runs(tmp_path_factory.mktemp("shards"))
    assert [code for code, _ in found.printed] == [0] * (1 + OF), found.printed
    return found


def saved(done: Any) -> Run:
    assert done.returncode == 0, done.stdout + done.stderr
    match = re.search(r"saved (\S+\.json)", done.stdout)
    assert match is not None
    return read_run(Path(match[1]))


def timeless(run: Run) -> dict[str, tuple[str, dict[str, Any]]]:
    """Outcome and metrics of each case that do not depend on time, the host's memory or the process."""
    exact = ("trainable", "total", "fingerprint", "disk", "tensors", "planned", "settings", "adapted")
    return {
        case.id: (case.outcome, {name: value for name, value in case.metrics.items() if name.startswith(exact)})
        for case in run.cases
    }


def test_shards_are_disjoint_and_together_the_whole_run(runs: Runs) -> None:
    shards = [read_run(file) for file in runs.files[1:]]
    ids = [{case.id for case in shard.cases} for shard in shards]
    assert all(ids)
    assert sum(map(len, ids)) == len(set().union(*ids))
    assert set().union(*ids) == {case.id for case in runs.whole.cases}
    for number, shard in enumerate(shards, 1):
        assert shard.shards is not None
        assert (shard.shards.held, shard.shards.of) == ((number,), OF)
        assert shard.shards.left_out == set().union(*ids) - ids[number - 1]
        assert lacking(runs.printed[number][1], f"of other shards (this is {number}/{OF})") == []


def test_merged_shards_are_the_whole_run(runs: Runs) -> None:
    merged, whole = saved(runs.merge(*map(str, runs.files[:0:-1]))), runs.whole
    expected = timeless(whole)
    assert any(metrics for _, metrics in expected.values())
    assert timeless(merged) == expected
    assert sorted(entry["fullname"] for entry in merged.benchmarks) == sorted(
        entry["fullname"] for entry in whole.benchmarks
    )
    assert {claim["id"] for claim in merged.claims} == {claim["id"] for claim in whole.claims}
    assert merged.options == whole.options
    assert merged.selection == whole.selection
    section = json.loads(merged.path.read_text())["peft_gauge"]
    assert section["merged_from"] == [file.name for file in runs.files[1:]]
    rows = compare(whole, merged, read_rules()).rows
    assert {row.label for row in rows if row.verdict != "same" and "seconds" not in row.metric} == set()


def test_a_shard_is_compared_with_the_whole_run_without_missing_cases(runs: Runs) -> None:
    shard = read_run(runs.files[2])
    found = compare(runs.whole, shard, read_rules())
    absent = [row for row in found.rows if row.metric == "outcome" and row.verdict == "inconclusive"]
    assert {row.label for row in absent} == {"OTHER SHARD"}
    assert len(absent) == len(runs.whole.cases) - len(shard.cases)
    assert f"NEW is shard 2/{OF}" in found.notes
    assert found.exit_code() == 0 or any("seconds" in row.metric for row in found.rows if row.verdict == "worse")


def test_a_shard_is_resumed_as_itself(runs: Runs) -> None:
    arguments = [*OPTIONS, f"--results={runs.folder}", "--resume", "--no-save", "--collect-only"]
    own, other, whole = sessions([*arguments, f"--shard=2/{OF}"], [*arguments, f"--shard=2/{OF + 1}"], arguments)
    assert own.returncode == pytest.ExitCode.NO_TESTS_COLLECTED  # every case of the shard passed
    assert other.returncode == pytest.ExitCode.USAGE_ERROR
    assert lacking(other.stdout + other.stderr, "nothing to resume", "--shard", f"now 2/{OF + 1}") == []
    assert whole.returncode == pytest.ExitCode.NO_TESTS_COLLECTED  # the whole run, not the newest shard


def test_a_missing_shard_is_named_and_can_be_left_out(runs: Runs) -> None:
    two = [str(runs.files[1]), str(runs.files[3])]
    refused = runs.merge(*two)
    assert refused.returncode == 2
    assert lacking(refused.stderr, f"shard 2/{OF} is missing", "--partial") == []
    partial = saved(runs.merge(*two, "--partial"))
    assert partial.shards is not None
    assert (partial.shards.held, partial.shards.missing) == ((1, 3), (2,))
    assert partial.shards.left_out == {case.id for case in read_run(runs.files[2]).cases}
    found = compare(runs.whole, partial, read_rules())
    assert {row.label for row in found.rows if row.metric == "outcome" and row.verdict == "inconclusive"} == {
        "OTHER SHARD"
    }
    whole = saved(runs.merge(str(partial.path), str(runs.files[2])))
    assert timeless(whole) == timeless(runs.whole)
    assert whole.shards is None


def test_a_merged_run_is_read_as_any(runs: Runs) -> None:
    merged = saved(runs.merge(*map(str, runs.files[1:])))
    code = command("compare", str(runs.files[0]), str(merged.path), "--markdown").returncode
    assert code in (0, 1)  # times of a toy model are noisy
    assert command("report", "--markdown", str(merged.path)).returncode == 0
    resumed = [*OPTIONS, f"--results={merged.path.parents[1]}", "--resume", "--collect-only"]
    (done,) = sessions(resumed)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED


def test_bad_shards_are_one_line(tmp_path: Path) -> None:
    given = ("0/4", "5/4", "x")
    for each, done in zip(
        given, sessions(*([*OPTIONS, "--no-save", f"--shard={each}"] for each in given)), strict=True
    ):
        assert done.returncode == pytest.ExitCode.USAGE_ERROR
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        assert len(lines) == 1
        assert lacking(lines[0], "--shard", each) == []


def test_a_shard_without_a_test_is_named() -> None:
    (done,) = sessions([*OPTIONS, "--no-save", "--shard=500/500"])
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert lacking(done.stdout, "shard 500/500 has no test") == []
