"""Memory over a step, from a log whose every moment is known, and as it is drawn."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from peft_gauge.memory.categories import ACTIVATIONS, BACKWARD, BASE_WEIGHTS, FORWARD, GRADIENTS, OPTIMIZER
from peft_gauge.report.charts import timeline_plot
from peft_gauge.report.terminal.timeline_picture import HEIGHT, show_timeline, shown_module
from peft_gauge.traces.log import BEFORE, Allocation, Event, StepLog
from peft_gauge.traces.timeline import Holder, Moment, timeline

if TYPE_CHECKING:
    from tests.conftest import Run


def log() -> StepLog:
    """100 bytes of weights; forward adds 30 twice; backward frees one of them, adds 50, and frees the rest."""
    made = [
        Allocation(100, BEFORE, category=BASE_WEIGHTS),
        Allocation(30, 0, 5, FORWARD, operator="aten::mm", module="model.layers.0.mlp", category=ACTIVATIONS),
        Allocation(30, 1, 2, FORWARD, operator="aten::mm", module="model.layers.1.mlp", category=ACTIVATIONS),
        Allocation(50, 3, 6, BACKWARD, operator="aten::add", module="model.layers.1.mlp", category=GRADIENTS),
        Allocation(10, 4, 5, BACKWARD, operator="aten::mul", module="model.layers.1", category=ACTIVATIONS),
    ]
    order = [(1, 1), (1, 2), (-1, 2), (1, 3), (1, 4), (-1, 4), (-1, 1), (-1, 3)]
    phases = [FORWARD] * 2 + [BACKWARD] * 4 + [OPTIMIZER] * 2
    made[1].died, made[3].died = 6, 7
    return StepLog(made, [Event(sign, index, phase) for (sign, index), phase in zip(order, phases, strict=True)])


def test_each_event_has_its_column_where_there_is_room() -> None:
    found = timeline(log(), 100)
    assert [moment.nbytes for moment in found.moments] == [130, 160, 130, 180, 190, 180, 150, 100]
    assert [moment.phase for moment in found.moments] == [FORWARD] * 2 + [BACKWARD] * 4 + [OPTIMIZER] * 2
    by_category = {BASE_WEIGHTS: 100, GRADIENTS: 50, ACTIVATIONS: 40}
    assert found.peak == Moment(4, BACKWARD, by_category, "aten::mul", "model.layers.1")


def test_a_column_shows_its_highest_moment() -> None:
    found = timeline(log(), 3)
    assert [(moment.position, moment.nbytes) for moment in found.moments] == [(1, 160), (4, 190), (6, 150)]
    assert found.peak is found.moments[1]


def test_what_is_held_at_the_peak_was_made_in_the_step() -> None:
    assert timeline(log(), 100).held == (
        Holder(GRADIENTS, "model.layers.*.mlp", "aten::add", 1, 50),
        Holder(ACTIVATIONS, "model.layers.*.mlp", "aten::mm", 1, 30),
        Holder(ACTIVATIONS, "model.layers.*", "aten::mul", 1, 10),
    )


def test_a_step_that_only_frees_peaks_at_its_start() -> None:
    made = [Allocation(100, BEFORE, 0, category=BASE_WEIGHTS)]
    found = timeline(StepLog(made, [Event(-1, 0, FORWARD)]), 10)
    assert (found.peak.position, found.peak.nbytes, found.held) == (BEFORE, 100, ())


def test_the_picture_fits_80_columns_and_its_heights_are_the_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    show_timeline("a step", timeline(log(), 69).as_json(), width=80)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    rows = [line.partition("│")[2] for line in lines[2 : 2 + HEIGHT]]
    heights = [sum(row[column] != " " for row in rows) for column in range(8)]
    assert heights == [round(HEIGHT * nbytes / 190) for nbytes in (130, 160, 130, 180, 190, 180, 150, 100)]
    assert lines[1].index("▼") == lines[2].index("│") + 1 + 4
    assert "peak 190 B in backward, reached by aten::mul in layers.1" in lines


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("base_model.model.model.layers.3.mlp", "layers.3.mlp"),
        ("base_model.model.lm_head", "lm_head"),
        ("model.layers.*", "layers.*"),
        ("transformer.h.0", "transformer.h.0"),
        ("base_model.model", "the model"),
    ],
)
def test_wrappers_are_not_shown(path: str, shown: str) -> None:
    assert shown_module(path) == shown


def test_the_plots_data_is_the_timeline(tmp_path: Path) -> None:
    found = timeline(log(), 100)
    data = timeline_plot.save("a step", found.as_json(), tmp_path / "step.svg")
    rows = list(csv.DictReader(data.read_text().splitlines()))
    assert [int(row["live_bytes"]) for row in rows] == [moment.nbytes for moment in found.moments]
    assert [int(row[ACTIVATIONS]) for row in rows] == [30, 60, 30, 30, 40, 30, 0, 0]
    picture = (tmp_path / "step.svg").read_text()
    for words in ("a step", "reached by aten::mul in layers.1", "backward", "base weights", "live memory, GB"):
        assert words in picture


@pytest.mark.integration  # it starts processes
@pytest.mark.usefixtures("forked_plans")
def test_the_command_draws_what_it_plans(run_command: Run, tmp_path: Path) -> None:
    toy = ("plan", "--model", "toy-llama", "--seq", "32", "--timeline")
    code, out, _ = run_command(*toy, "--method", "lora", "--json")
    (plan,) = json.loads(out)
    assert code == 0
    assert sum(plan["timeline"]["peak"]["by_category"].values()) == plan["peak_bytes"]
    assert plan["timeline"]["peak"]["by_category"] == {k: v for k, v in plan["peak_by_category"].items() if v}
    code, out, err = run_command(*toy, "--method", "ia3", "--timeline-file", str(tmp_path / "step.png"))
    assert code == 0
    assert "memory over a step: ia3 on toy-llama" in out
    assert "wrote" in err
    assert (tmp_path / "step.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--timeline-file", "step.pdf"], "step.pdf is not a valid file name for a plot"),
        (["--timeline-file", "step.svg"], "--timeline-file draws one step"),
        (["--timeline", "--find", "batch", "--gpu", "24GB"], "--timeline and --find exclude each other"),
    ],
)
def test_bad_input_is_one_line(options: list[str], words: str, run_command: Run) -> None:
    code, out, err = run_command("plan", "--model", "toy-llama", *options)
    assert (code, out) == (2, "")
    assert err.startswith(f"peft-gauge: {words}")
    assert err.count("\n") == 1
