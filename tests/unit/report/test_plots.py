"""Sweeps in words, axes with readable ticks, colours that everybody can tell apart, labels that do not overlap."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest

from peft_gauge.history.schema import CaseRecord
from peft_gauge.report.charts import axes, looks, pictures, plots
from peft_gauge.report.html import tasks
from tests.support.colours import channels, contrast, linear_light

# Words for sweeps


def sweep(name: str, points: list[dict[str, Any]], **metrics: Any) -> CaseRecord:
    return CaseRecord(f"benchmarks/test_x.py::{name}", "x", "passed", metrics={"pareto": points, **metrics})


@pytest.mark.parametrize(
    ("name", "metrics", "words"),
    [
        ("test_ranks[fact-decoder-128]", {"model": "fact-decoder", "task": "128 facts"}, "fact-decoder, 128 facts"),
        ("test_ranks[smollm2-135m-qv]", {"model": "smollm2-135m", "task": "256 facts"}, "smollm2-135m, 256 facts, qv"),
        ("test_variants[dora]", {"model": "fact-decoder", "task": "1024 facts"}, "fact-decoder, 1024 facts"),
        (
            "test_ways_to_serve[lora-m-cpu-4]",
            {"architecture": "m", "trained_by": "lora", "adapters": 4},
            "m, lora, 4 adapters",
        ),
    ],
)
def test_a_sweep_is_known_by_its_question(name: str, metrics: dict[str, Any], words: str) -> None:
    question, about = tasks.question(sweep(name, [], **metrics)).split(" · ")
    assert question.endswith("?")
    assert "test" not in question
    assert about == words


def test_an_unknown_sweep_is_named_by_its_words() -> None:
    assert tasks.question(sweep("test_new_idea[a-b]", [])) == "New idea? · a b"
    assert tasks.question(sweep("test_new_idea", [])) == "New idea?"


def points(**costs: list[Any]) -> list[dict[str, Any]]:
    return [dict(zip(costs, values, strict=True)) | {"quality": 0.5} for values in zip(*costs.values(), strict=True)]


@pytest.mark.parametrize(
    ("costs", "shown"),
    [
        ({"step_seconds": [1.0, 1.2], "trainable_params": [10, 20]}, ["trainable_params"]),  # times alike
        ({"step_seconds": [1.0, 1.6], "trainable_params": [10, 20]}, ["trainable_params", "step_seconds"]),
        ({"step_seconds": [1.0, 1.2], "trainable_params": [10, 10], "peak_bytes": [5, 6]}, ["peak_bytes"]),
        ({"step_seconds": [1.0, 1.2], "trainable_params": [10, 10]}, ["trainable_params"]),  # nothing separates them
        ({"peak_bytes": [None, None], "trainable_params": [10, 20]}, ["trainable_params"]),
        ({"heat": [1, 2], "held_bytes": [1, 2]}, ["held_bytes", "heat"]),
    ],
)
def test_a_cost_is_shown_where_it_separates_the_points(costs: dict[str, list[Any]], shown: list[str]) -> None:
    assert tasks.costs(points(**costs)) == shown


# Axes


@pytest.mark.parametrize("seed", range(40))
def test_ticks_are_few_and_round_and_within_the_axis(seed: int) -> None:
    generator = random.Random(seed)
    low = 10 ** generator.uniform(-6, 9)
    values = [low, low * 10 ** generator.uniform(0.001, 6)]
    for axis in (axes.logarithmic("x", values), axes.linear("x", values), axes.linear("x", values, zero=True)):
        first, last = axis["domain"]
        assert first < last
        assert first <= min(values)
        assert max(values) <= last
        assert 2 <= len(axis["ticks"]) <= axes.MOST_TICKS
        assert axis["ticks"] == sorted(set(axis["ticks"]))
        assert all(first - 1e-9 * last <= tick <= last * (1 + 1e-9) for tick in axis["ticks"])
        assert all(len(f"{tick:.10g}".replace(".", "").strip("0").split("e")[0]) <= 4 for tick in axis["ticks"])


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0])
def test_one_value_has_an_axis(value: float) -> None:
    low, high = axes.linear("x", [value])["domain"]
    assert low < value < high


# Colours


# Machado, Oliveira and Fernandes (2009), at full severity
VISION = {
    "normal": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}


def oklab(colour: str, vision: str) -> tuple[float, float, float]:
    light = [*map(linear_light, channels(colour))]
    red, green, blue = (
        min(1.0, max(0.0, sum(a * b for a, b in zip(row, light, strict=True)))) for row in VISION[vision]
    )
    long = (0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue) ** (1 / 3)
    middle = (0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue) ** (1 / 3)
    short = (0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue) ** (1 / 3)
    return (
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    )


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("side", [0, 1], ids=["light", "dark"])
def test_every_two_methods_differ_for_every_eye(side: int, vision: str) -> None:
    colours = [pair[side] for pair in looks.COLOURS]
    nearest = min(math.dist(oklab(a, vision), oklab(b, vision)) for a, b in itertools.combinations(colours, 2))
    assert nearest > 0.1  # two neighbours of the scheme of Okabe and Ito are 0.03 apart for a protanope


@pytest.mark.parametrize(("side", "ground"), [(0, looks.LIGHT), (1, looks.DARK)], ids=["light", "dark"])
def test_marks_and_words_stand_out_from_the_ground(side: int, ground: str) -> None:
    assert min(contrast(pair[side], ground) for pair in looks.COLOURS) >= 3
    assert min(contrast(pair[side], ground) for pair in (looks.BLACK, looks.GREY)) >= 4.5
    assert min(contrast(pair[side], ground) for pair in (looks.WORSE, looks.BETTER)) >= 4.5


@pytest.mark.parametrize("dark", [False, True])
def test_the_letters_in_a_bar_can_be_read(dark: bool) -> None:
    for letter, light in plots.CATEGORIES.values():
        colour = looks.dark_colours().get(light, light) if dark else light
        ink = "#FFFFFE" if letter in plots.LIGHT_TEXT else "#000001"
        assert contrast(colour, ink) >= 4.5, letter


# Labels


@pytest.mark.parametrize("seed", range(20))
def test_labels_neither_overlap_nor_leave_the_frame(seed: int) -> None:
    generator = random.Random(seed)
    wide, high = pictures.WIDTH, pictures.HEIGHT
    marks = [
        (generator.uniform(0, wide), generator.uniform(0, high), "r" * generator.randint(2, 14)) for _ in range(25)
    ]
    bars = [(x - 1, y - 20, x + 1, y + 20) for x, y, _ in marks]
    placed = pictures.placed_labels(marks, bars)
    boxes = [(x, y - 7, x + pictures.CHARACTER * len(label), y + 7) for x, y, label in placed]
    assert len(placed) > 8
    assert all(left >= 0 and top >= 0 and right <= wide and bottom <= high for left, top, right, bottom in boxes)
    for box, other in itertools.combinations([*boxes, *bars], 2):
        if box in boxes or other in boxes:
            assert not pictures._overlap(box, other)


def test_a_panels_legend_has_only_what_occurs() -> None:
    spec = plots.spec("sequence", looks.looks_of(["lora", "full", "ia3"]))
    axis = axes.logarithmic("tokens", [64, 512]) | {"unit": ""}
    rows = [{"label": "lora", "source": "planned"}]
    fitted = plots.fitted(spec, {"x": axis}, rows)
    layer = fitted["layer"][0]["encoding"]
    assert layer["color"]["scale"]["domain"] == ["lora"]
    assert layer["color"]["scale"]["range"] == [looks.COLOURS[1][0]]
    assert layer["strokeDash"]["scale"]["domain"] == ["planned"]
    assert (layer["x"]["title"], layer["x"]["axis"]["values"]) == ("tokens", axis["ticks"])
    assert plots.spec("sequence", looks.looks_of(["lora", "full", "ia3"])) == spec  # which stays as it is
