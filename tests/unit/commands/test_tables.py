"""Tables as JSON, comma-separated values and Markdown: raw numbers, and nothing that was unavailable becomes 0."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_gauge.cli import commands
from peft_gauge.commands import bisect, calibrate
from peft_gauge.commands.claims import COLUMNS
from peft_gauge.commands.plan_output import SIZES, csv_rows
from peft_gauge.commands.tables import print_csv, print_markdown
from peft_gauge.environments.bisection import BisectionResult, Probe
from peft_gauge.measure.calibration import Assumption
from peft_gauge.plan import worker
from tests.support.facts import lacking
from tests.support.paths import ROOT
from tests.support.planted_cases import plan_in_process

Run = Callable[..., tuple[int, str, str]]
RUNS = sorted((ROOT / "results" / "amd-epyc-2c-cpu").glob("*.json"))[:2]
WITH_TABLES = (
    "ab",
    "accuracy",
    "bisect",
    "bundle",
    "calibrate",
    "claims",
    "compare",
    "doctor",
    "gpus",
    "methods",
    "models",
    "plan",
    "runs",
    "trace",
)


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("name", WITH_TABLES)
def test_every_command_with_a_table_has_all_forms(name: str) -> None:
    options = {option for parameter in commands()[name].params for option in parameter.opts}
    assert {"--json", "--csv", "--markdown"} <= options


def test_csv_keeps_what_a_value_is(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"a": None, "b": 0, "c": True, "d": 1.5, "e": "x,y", "f": [1, 2]}]
    print_csv(rows, ("a", "b", "c", "d", "e", "f", "absent"))
    assert capsys.readouterr().out == 'a,b,c,d,e,f,absent\n,0,true,1.5,"x,y","[1, 2]",\n'


def test_markdown_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    print_markdown(["one\ntwo"], [["a|b"], ["<c>"]])
    assert capsys.readouterr().out == "| one two |\n| --- |\n| a\\|b |\n| &lt;c&gt; |\n"


@pytest.fixture
def planned(run_command: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setattr(worker, "plan_in_parallel", plan_in_process)
    options = ("plan", "toy-llama", "--method", "lora", "--seq", "32", "--gpu", "24GB", "--gpu", "3000000")
    return lambda *more: run_command(*options, *more)


def test_a_plan_in_every_form_has_the_same_bytes(planned: Callable[..., tuple[int, str, str]]) -> None:
    code, text, _ = planned("--json")
    assert code == 1  # it does not fit 3 MB
    (record,) = json.loads(text)
    code, text, _ = planned("--csv")
    assert code == 1
    large, small = read(text)
    for name in ("peak_bytes", "resident_bytes", "trainable_params", "device_bytes_estimate"):
        assert int(large[name]) == int(small[name]) == record[name]
    assert float(large["saved_activation_bytes_per_token"]) == record["saved_activation_bytes_per_token"]
    assert (large["gpu"], large["fits"], small["gpu"], small["fits"]) == ("24GB", "true", "3000000", "false")
    assert int(small["headroom_bytes"]) == record["headroom_bytes"]["3000000"] < 0
    categories = [value for name, value in large.items() if name.startswith("peak_") and name != "peak_bytes"]
    assert sum(map(int, categories)) == record["peak_bytes"]
    code, text, _ = planned("--markdown")
    (row,) = [line for line in text.splitlines() if line.startswith("| lora")]
    assert lacking(row, f"{record['trainable_params']:,}", f"{record['peak_bytes'] / 1e6:.2f} MB", "✓", "✗") == []


def test_a_plan_without_a_gpu_is_one_row() -> None:
    plan: dict[str, Any] = {"model": "m", "method": "lora", "settings": {}, "phase_of_peak": "forward", "gpus": []}
    sizes = dict.fromkeys(SIZES)
    (row,) = csv_rows({**plan, **sizes, "peak_by_category": {}})
    assert (row["peak_bytes"], row["batch"], "gpu" in row) == (None, None, False)


@pytest.mark.parametrize("form", ["--csv", "--markdown"])
def test_what_is_not_one_table_is_refused(form: str, planned: Callable[..., tuple[int, str, str]]) -> None:
    for other in ("--advise", "--timeline", "--json"):
        code, out, err = planned(form, other)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert lacking(err, form, other) == []


def test_a_comparison_has_every_metric_in_csv(run_command: Run, tmp_path: Path) -> None:
    runs = [str(path) for path in RUNS]
    file = tmp_path / "all.json"
    code, text, _ = run_command("compare", *runs, "--csv", "--json", str(file))
    ((comparison),) = json.loads(file.read_text())["comparisons"]
    rows = read(text)
    assert code == comparison["exit_code"]
    assert [(row["test"], row["metric"], row["verdict"]) for row in rows] == [
        (row["test"], row["metric"], row["verdict"]) for row in comparison["rows"]
    ]
    absent = [row for row, whole in zip(rows, comparison["rows"], strict=True) if whole["ratio"] is None]
    assert absent
    assert {row["ratio"] for row in absent} == {""}
    assert json.loads(run_command("compare", *runs, "--json", "-")[1]) == json.loads(file.read_text())
    code, out, err = run_command("compare", *runs, "--json", "-", "--csv")
    assert (code, out) == (2, "")
    assert lacking(err, "--json", "--csv") == []


def test_claims_in_json_and_csv_agree(run_command: Run) -> None:
    found = json.loads(run_command_ok(run_command, "claims", str(RUNS[0]), "--json"))
    rows = read(run_command_ok(run_command, "claims", str(RUNS[0]), "--csv"))
    assert [*rows[0]] == list(COLUMNS)
    assert rows == [{name: "" if value is None else value for name, value in each.items()} for each in found]
    open_claims = [each for each in found if each["verdict"] == "not measured yet"]
    assert open_claims
    assert {each["metric"] for each in open_claims} == {None}


def run_command_ok(run_command: Run, *arguments: str) -> str:
    code, out, err = run_command(*arguments)
    assert code == 0, err
    return out


def test_a_calibration_has_its_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Assumption("context", 536_870_912, 500_000_000, "an estimate")]
    calibrate._print("H100", {}, rows, "csv")
    (row,) = read(capsys.readouterr().out)
    assert row == {
        "gpu": "H100",
        "overhead": "context",
        "assumed_bytes": "536870912",
        "measured_bytes": "500000000",
        "holds": "false",
    }


@pytest.mark.parametrize("form", ["json", "csv", "markdown"])
def test_a_bisection_has_its_probes_in_their_order(form: Any, capsys: pytest.CaptureFixture[str]) -> None:
    probes = (Probe("1.0", "good", "reference"), Probe("1.2", "bad", "+9 %"))
    outcome = BisectionResult("1.0", probes[1], "1.0", (), probes[1], probes)
    bisect._print(outcome, "1.2 is the first", form)
    text = capsys.readouterr().out
    assert text.index("1.0") < text.index("+9 %")
    if form == "json":
        assert json.loads(text)["first_bad"] == "1.2"
    if form == "csv":
        assert [row["result"] for row in read(text)] == ["good", "bad"]


MEASURED = ROOT / "results" / "amd-epyc-2c-cpu" / "0012_603ff5ec8c7b_20261127_153500.json"


def test_planned_against_measured_has_the_same_digits_in_every_form(run_command: Run, tmp_path: Path) -> None:
    found = json.loads(run_command_ok(run_command, "accuracy", str(MEASURED), "--json"))
    rows = read(run_command_ok(run_command, "accuracy", str(MEASURED), "--csv"))
    assert len(found) == 36
    assert rows == [{name: str(value) for name, value in each.items()} for each in found]
    heading, _, *lines = (
        run_command_ok(run_command, "accuracy", str(MEASURED), "--markdown").replace("\\", "").splitlines()
    )
    assert heading == "| name | method | measured_bytes | planned_bytes | difference_percent |"
    assert [line.replace(",", "").strip("| ").split(" | ") for line in lines] == [list(row.values()) for row in rows]
    table = run_command_ok(run_command, "accuracy", str(MEASURED)).replace(",", "").splitlines()
    numbers = [words[-3:] for words in map(str.split, table) if len(words) == 5 and words[-1][-1].isdigit()]
    assert numbers == [list(row.values())[2:] for row in rows], "a line ends with the numbers of its step, in order"
    first = found[0]
    assert (first["measured_bytes"], first["planned_bytes"]) == (13_722_206_832, 13_722_231_296)
    assert first["difference_percent"] == round(100 * (13_722_231_296 / 13_722_206_832 - 1), 4) == 0.0002

    out = tmp_path / "plot.svg"
    code, text, err = run_command("accuracy", str(MEASURED), "--out", str(out), "--csv")
    assert (code, read(text)) == (0, rows)
    assert lacking(err, str(out)) == []
    names = ("name", "method", "measured_bytes", "planned_bytes")
    assert read(out.with_suffix(".csv").read_text()) == [{name: row[name] for name in names} for row in rows]
