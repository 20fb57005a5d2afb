"""The Python interface: strings resolve as on the command line, and results are those of the commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import peft_gauge as pg
from peft_gauge.history.reader import read_run

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "results" / "amd-epyc-2c-cpu"
FIRST, LATER = RUNS / "0003_fbbb6b421590_20261124_234002.json", RUNS / "0010_b2013a5e0a16_20261125_135158.json"


@pytest.mark.integration
@pytest.mark.usefixtures("forked_plans")
def test_a_plan_is_that_of_the_command_line() -> None:
    from typer.testing import CliRunner

    from peft_gauge.cli import app

    found = pg.plan("toy-llama", "lora", batch=2, seq=16, gpu="24GB", peft_config={"r": 4})
    arguments = [
        "--model",
        "toy-llama",
        "--method",
        "lora-r4",
        "--batch",
        "2",
        "--seq",
        "16",
        "--gpu",
        "24GB",
        "--json",
    ]
    printed = json.loads(CliRunner().invoke(app, ["plan", *arguments]).stdout)[0]

    assert found.fits
    assert found.trainable_params == printed["trainable_params"]
    assert (found.peak_bytes, found.device_bytes_estimate) == (printed["peak_bytes"], printed["device_bytes_estimate"])


def test_a_plan_shows_itself_as_a_table() -> None:
    found = pg.plan("toy-llama", "full", batch=1, seq=8, gpu=["24GB", "4MB"])

    table = found._repr_html_()

    assert "<caption>full on toy-llama, 1×8 tokens, peak in" in table
    assert f"<td>peak</td><td style='text-align:right'>{found.peak_bytes / 1e9:,.3f} GB</td>" in table
    assert "✓" in table
    assert "✗" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "toy-lama"}, "toy-llama"),
        ({"model": "toy-llama", "method": "lora-x"}, "unknown method"),
        ({"model": "toy-llama", "gpu": "RTX 4O90"}, "RTX 4O90"),
        ({"model": "toy-llama", "method": "full", "peft_config": {"r": 4}}, "has no PEFT config"),
    ],
)
def test_bad_input_is_one_line(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(pg.GaugeError, match=message) as raised:
        pg.plan(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_a_run_is_a_frame_of_its_numbers() -> None:
    frame = pg.read_run(LATER)

    run = read_run(LATER)
    assert list(frame.columns) == ["case", "benchmark", "outcome", "metric", "value"]
    assert set(frame["case"]) == {case.id for case in run.cases}
    case = next(case for case in run.cases if "trainable_params" in case.metrics)
    of_case = frame[(frame["case"] == case.id) & (frame["metric"] == "trainable_params")]
    assert of_case["value"].tolist() == [case.metrics["trainable_params"]]
    assert frame.attrs["libraries"]["torch"].startswith("2.13")


def test_a_comparison_is_a_frame_the_worst_first() -> None:
    frame = pg.compare(FIRST, LATER)

    assert frame["verdict"].value_counts()["same"] > 1000
    assert set(frame["verdict"]) <= {"same", "better", "worse", "inconclusive"}
    assert frame["verdict"].tolist().index("same") > 0
    with pytest.raises(pg.GaugeError, match="cannot be compared"):
        pg.compare(FIRST, ROOT / "results/intel-xeon-16c-nvidia-h200/0001_e347d56d7a55-dirty_20261127_134301.json")


def test_importing_the_package_imports_no_library() -> None:
    code = "import sys, peft_gauge; print(sorted({'torch', 'pandas', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'plans'"):
        pg.plans  # noqa: B018
