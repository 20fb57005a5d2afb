"""The lists of names: complete, in every form, and accepted by the options that take them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peft_gauge.cli import app
from peft_gauge.errors import GaugeError
from peft_gauge.memory import gpus
from peft_gauge.training import methods, models

ROOT = Path(__file__).resolve().parents[3]
RUNS = ROOT / "results" / "amd-epyc-2c-cpu"


def printed(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    return done.stdout


def test_models_are_the_records_with_their_sizes() -> None:
    rows = json.loads(printed("models", "--json"))

    assert sorted(row["model"] for row in rows) == sorted(models.record_names())
    sizes = {row["model"]: row["parameters"] for row in rows}
    assert sizes["smollm2-135m"] == 134_515_008
    assert sizes["llama-2-7b"] == 6_738_415_616
    assert list(sizes.values()) == sorted(sizes.values())


def test_methods_are_all_and_the_default_ones_are_marked() -> None:
    rows = list(csv.DictReader(io.StringIO(printed("methods", "--csv"))))

    assert [row["method"] for row in rows] == list(methods.METHODS)
    assert [row["method"] for row in rows if row["default"]] == [each.name for each in methods.DEFAULT_METHODS]


def test_each_listed_gpu_can_be_named() -> None:
    rows = json.loads(printed("gpus", "--json"))

    assert len(rows) == len(gpus.table())
    for row in rows:
        assert gpus.lookup(row["gpu"]).usable_bytes == row["usable bytes"]


def test_runs_are_those_of_the_folder() -> None:
    table = printed("runs", str(RUNS), "--markdown").splitlines()

    assert table[0].startswith("| machine | run | when |")
    assert len(table) == 2 + len(list(RUNS.glob("*.json")))
    assert "0001" in table[2]


def test_a_table_fits_80_columns() -> None:
    for name in ("models", "methods", "gpus"):
        lines = CliRunner().invoke(app, [name], env={"COLUMNS": "80"}).stdout.splitlines()
        assert max(map(len, lines)) <= 80, name


def test_a_broken_run_is_named_and_the_others_are_listed(tmp_path: Path) -> None:
    folder = tmp_path / "machine"
    folder.mkdir()
    (folder / "0001_x.json").write_text("{")
    done = CliRunner().invoke(app, ["runs", str(tmp_path)])
    assert done.exit_code == 2
    assert "0001_x.json" in done.stderr


def test_two_forms_at_once_are_an_error() -> None:
    done = CliRunner().invoke(app, ["gpus", "--json", "--csv"])
    assert isinstance(done.exception, GaugeError)


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_has_a_short_form(option: str) -> None:
    assert "Usage:" in printed("plan", option)
