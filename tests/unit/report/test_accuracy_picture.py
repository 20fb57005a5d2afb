"""The picture of planned against measured memory: its points are those of the run, and its text is their difference."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from peft_gauge.cli import app
from peft_gauge.errors import GaugeError
from peft_gauge.report.charts import accuracy_picture
from peft_gauge.report.charts.accuracy_picture import Step, steps_of

ROOT = Path(__file__).parents[3]
RUN = ROOT / "results" / "amd-epyc-2c-cpu" / "0012_603ff5ec8c7b_20261127_153500.json"


def run(**cases: dict[str, Any]) -> Any:
    named = [SimpleNamespace(id=f"benchmarks/x.py::test[{name}]", metrics=metrics) for name, metrics in cases.items()]
    return SimpleNamespace(name="0001", cases=named)


def test_steps_are_those_with_both_peaks() -> None:
    found = steps_of(
        run(
            **{
                "lora-16bit-tiny-4x768": {"unit": "GB", "published": 2.0, "planned": 2.5},
                "lora-tiny": {"unit": "", "published": 7.0, "planned": 7.0},
                "oft-tiny": {"unit": "GB", "published": 2.0, "planned": 2.5},
            }
        ),
        ["lora-16bit", "lora"],
    )

    assert found == [Step("lora-16bit-tiny-4x768", "lora-16bit", 2_000_000_000, 2_500_000_000)]
    assert found[0].difference_percent == pytest.approx(25)


def test_a_run_without_such_steps_is_one_line() -> None:
    with pytest.raises(GaugeError, match="0001 has no step with a planned and a measured peak"):
        steps_of(run(), ["lora"])


def test_the_text_has_the_greatest_and_the_median_difference() -> None:
    steps = [Step(str(percent), "lora", 10**9, round(1e9 * (1 + percent / 100))) for percent in (-3.0, 0.5, 1.0)]

    chart = accuracy_picture.draw(steps, {"lora": "LoRA"}, "a GPU").to_dict()

    said = " ".join(chart["title"]["subtitle"])
    assert said.startswith("3 steps on a GPU")
    assert "at most 3 %, half of them by less than 1 %" in said
    points = chart["layer"][1]["data"]["values"]
    assert [point["planned"] for point in points] == pytest.approx([0.97, 1.005, 1.01])


def test_the_saved_run_is_drawn_with_its_data(tmp_path: Path) -> None:
    out = tmp_path / "accuracy.svg"

    done = CliRunner().invoke(app, ["accuracy", str(RUN), "--out", str(out)])

    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(io.StringIO(out.with_suffix(".csv").read_text())))
    assert len(rows) == 36
    assert {row["method"] for row in rows} >= {"full", "lora", "qlora", "bottleneck", "prefix", "prompt", "ia3"}
    assert (rows[0]["measured_bytes"], rows[0]["planned_bytes"]) == ("13722206832", "13722231296")
    assert "bottleneck adapters" in out.read_text()
