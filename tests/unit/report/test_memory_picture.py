"""The picture of memory against sequence length: what it shows is what was planned, and its names do not collide."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_gauge.commands.memory_curve import card, default_seqs, parse_seqs
from peft_gauge.errors import GaugeError
from peft_gauge.plan.planner import plan
from peft_gauge.plan.record import PlanRequest
from peft_gauge.report.charts import memory_picture
from peft_gauge.report.charts.memory_picture import HEIGHT, LABEL_DISTANCE, LOOKS, Card, Frame, Point, shown_gb
from peft_gauge.training import methods, models
from peft_gauge.training.settings import StepSettings
from tests.support.facts import lacking
from tests.support.planning import plan_here

GB = 10**9
POINT = Point("toy", "lora", "LoRA", "bfloat16", 1, 128, "backward", 15 * GB, 13 * GB, 16 * GB)
POINTS = [
    replace(POINT, method=method, title=title, seq=seq, peak_bytes=first + growth * seq)
    for method, title, first, growth in (("lora", "LoRA", 14 * GB, 7_000_000), ("full", "full fine-tuning", 67 * GB, 0))
    for seq in (128, 256, 512)
]
CARDS = [Card("A GPU", 25 * GB)]


# --- where names go

heights = st.lists(st.floats(0.01, 1000), min_size=1, max_size=len(LOOKS))


def frame(low: float = 0.001, high: float = 10_000) -> Frame:
    return Frame((128, 256), left=100, last=256, right=500, low=low, high=high)


def pixels(gb: float, of: Frame) -> float:
    return HEIGHT * math.log(gb / of.low) / math.log(of.high / of.low)


@given(heights)
def test_names_never_overlap_and_keep_the_order_of_their_lines(ends: list[float]) -> None:
    placed = [pixels(gb, frame()) for gb in frame().spread(ends)]
    order = sorted(range(len(ends)), key=lambda i: ends[i])
    for below, above in pairwise(order):
        assert placed[above] - placed[below] >= LABEL_DISTANCE * (1 - 1e-9)


@given(heights)
def test_names_that_have_room_stay_at_their_lines(ends: list[float]) -> None:
    at = sorted(pixels(gb, frame()) for gb in ends)
    if all(above - below > LABEL_DISTANCE for below, above in pairwise(at)):
        assert frame().spread(ends) == pytest.approx(ends)


def test_names_of_equal_lines_stand_evenly_about_them() -> None:
    placed = [pixels(gb, frame()) - pixels(20, frame()) for gb in frame().spread([20, 20, 20])]
    assert placed == pytest.approx([-LABEL_DISTANCE, 0, LABEL_DISTANCE])


def test_ticks_are_round_and_within() -> None:
    assert frame(4.9, 101).ticks() == [5, 10, 20, 50, 100]
    assert frame(0.015, 0.3).ticks() == [0.02, 0.05, 0.1, 0.2]


@pytest.mark.parametrize(("gb", "text"), [(0.01234, "0.0123 GB"), (23.02, "23.0 GB"), (419.7, "420 GB")])
def test_figures_in_names_have_three_digits(gb: float, text: str) -> None:
    assert shown_gb(gb) == text


# --- the metrics beside the picture


def test_the_csv_holds_every_point_to_the_byte() -> None:
    rows = list(csv.DictReader(io.StringIO(memory_picture.as_csv(POINTS))))
    assert [(row["method"], int(row["seq"]), int(row["peak_bytes"])) for row in rows] == [
        (point.method, point.seq, point.peak_bytes) for point in POINTS
    ]


# --- the picture


@pytest.fixture
def altair() -> Any:
    pytest.importorskip("vl_convert", reason="pictures need the extra: pip install 'peft-gauge[report]'")
    return pytest.importorskip("altair", reason="pictures need the extra: pip install 'peft-gauge[report]'")


def marks(chart: Any, kind: str) -> list[dict[str, Any]]:
    """The rows of data that the chart's layers of this mark draw."""
    layers = [layer for layer in chart.to_dict()["layer"] if layer["mark"]["type"] == kind]
    return [row for layer in layers for row in layer["data"]["values"]]


def test_every_point_is_drawn_where_it_is(altair: Any) -> None:
    drawn = {(row["method"], row["tokens"], row["gb"]) for row in marks(memory_picture.draw(POINTS, CARDS), "point")}
    assert drawn >= {(point.title, point.seq, point.peak_bytes / GB) for point in POINTS}


def test_each_line_is_named_with_its_last_figure_and_each_card_with_its_memory(altair: Any) -> None:
    names = [row["name"] for row in marks(memory_picture.draw(POINTS, CARDS), "text")]
    assert sorted(names) == ["A GPU: 25.0 GB usable", "LoRA, 17.6 GB", "full fine-tuning, 67.0 GB"]
    assert [row["gb"] for row in marks(memory_picture.draw(POINTS, CARDS), "rule")] == [25.0]


def test_colours_and_shapes_are_different_for_every_method(altair: Any) -> None:
    many = [replace(POINT, method=str(i), title=str(i), seq=seq) for i in range(len(LOOKS)) for seq in (128, 256)]
    layers = memory_picture.draw(many, []).to_dict()["layer"]
    encoding = next(layer["encoding"] for layer in layers if layer["mark"]["type"] == "point")
    for channel in ("color", "shape"):
        assert encoding[channel]["scale"]["domain"] == [str(i) for i in range(len(LOOKS))]
        assert len(set(encoding[channel]["scale"]["range"])) == len(LOOKS)
    with pytest.raises(GaugeError, match="cannot plot 8 methods: only 7 lines"):
        memory_picture.draw([*many, replace(POINT, title="one more")], [])


@pytest.mark.parametrize(("name", "start"), [("a.svg", b"<svg"), ("a.png", b"\x89PNG")])
def test_it_is_saved_and_the_same_figures_give_the_same_file(
    altair: Any, tmp_path: Path, name: str, start: bytes
) -> None:
    metrics = memory_picture.save(POINTS, CARDS, tmp_path / name)
    first = (tmp_path / name).read_bytes()
    assert first.startswith(start)
    assert metrics.read_text(encoding="utf-8") == memory_picture.as_csv(POINTS)
    memory_picture.save(POINTS, CARDS, tmp_path / name)
    assert (tmp_path / name).read_bytes() == first
    if name.endswith("svg"):
        text = first.decode()
        assert all(word in text for word in ("LoRA, 17.6 GB", "A GPU: 25.0 GB usable", "sequence length (tokens"))


@pytest.mark.parametrize("missing", ["altair", "vl_convert"])
def test_without_the_extra_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    for name in ("altair", "vl_convert"):
        if name != missing:
            monkeypatch.setitem(sys.modules, name, sys)  # any module will do
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(GaugeError, match=rf"needs {missing}; install it: .*peft-gauge\[report\]"):
        memory_picture.check_destination(tmp_path / "a.svg")


# --- the command

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, run_command: Run) -> Run:
    """``run(…)`` is ``peft-gauge memory-curve --model toy-llama …``, planning in this process: code, output, error."""

    plan_here(monkeypatch)

    def command(*arguments: str) -> tuple[int, str, str]:
        return run_command("memory-curve", "--model", "toy-llama", *arguments)

    return command


def test_the_command_draws_what_the_planner_says(altair: Any, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "toy.svg"
    few = ("--method", "prompt", "--method", "lora", "--seqs", "32,16", "--batch", "2", "--gpu", "24GB")
    code, printed, err = run("--out", str(out), *few)
    rows = list(csv.DictReader(io.StringIO(out.with_suffix(".csv").read_text(encoding="utf-8"))))

    assert (code, err) == (0, "")
    assert str(out) in printed
    assert str(out.with_suffix(".csv")) in printed
    assert [(row["method"], row["seq"]) for row in rows] == [
        (method, seq) for method in ("prompt", "lora") for seq in ("16", "32")
    ]
    record = models.resolve("toy-llama", weights="random")
    planned = plan(PlanRequest(record, methods.LORA, StepSettings(2, 32)))
    shown = next(row for row in rows if (row["method"], row["seq"]) == ("lora", "32"))
    assert int(shown["peak_bytes"]) == planned.peak_bytes
    assert int(shown["resident_bytes"]) == planned.resident_bytes
    assert int(shown["device_bytes_estimate"]) == planned.device_bytes_estimate


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "x.pdf"), "end it with .svg or .png"),
        (("--out", "nowhere/x.svg"), "no folder nowhere"),
        (("--out", "x.svg", "--seqs", "16,many"), "comma-separated whole numbers"),
        (("--out", "x.svg", "--seqs", "16"), "at least two lengths"),
        (("--out", "x.svg", "--seqs", "16,1"), "at least 2 tokens"),
        (("--out", "x.svg", "--seqs", "16,129"), "use --seqs 128 or less"),
        (("--out", "x.svg", "--gpu", "RTX 4091"), "nearest: "),
        (("--out", "x.svg", "--method", "loar"), "did you mean lora"),
        (("--out", "x.svg", "--dtype", "float8"), "unknown dtype"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_drawn(
    altair: Any,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("most", "seqs"),
    [
        (None, (128, 256, 512, 1024, 2048)),
        (131_072, (128, 256, 512, 1024, 2048)),
        (2048, (128, 256, 512, 1024, 2048)),
        (1000, (62, 125, 250, 500, 1000)),
        (128, (8, 16, 32, 64, 128)),
        (8, (2, 4, 8)),
    ],
)
def test_default_lengths_fit_the_model(most: int | None, seqs: tuple[int, ...]) -> None:
    assert default_seqs(most) == seqs


def test_a_small_model_is_drawn_without_naming_lengths(altair: Any, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "toy.svg"
    code, _, err = run("--out", str(out), "--method", "prompt", "--gpu", "24GB")
    rows = list(csv.DictReader(io.StringIO(out.with_suffix(".csv").read_text(encoding="utf-8"))))
    assert (code, [row["seq"] for row in rows]) == (0, ["8", "16", "32", "64", "128"])
    assert (err.count("\n"), lacking(err, "128 tokens", "toy-llama")) == (1, [])


def test_lengths_are_sorted_and_counted_once() -> None:
    assert parse_seqs("512, 128,512") == (128, 512)


def test_a_card_is_named_with_the_memory_on_its_box_once() -> None:
    assert card("RTX 4090").name == "GeForce RTX 4090 24GB"
    assert card("H100 80GB").name == "H100 80GB"
    assert card("24e9") == Card("24e9", 24 * GB)
    assert card("24GB").name == "24GB"
