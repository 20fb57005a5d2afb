"""The picture of saved plans: bars as long as the device memory that was planned, in parts that add up to it."""

from __future__ import annotations

import copy
import csv
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_gauge.errors import GaugeError
from peft_gauge.plan.planner import plan
from peft_gauge.plan.record import PlanRequest
from peft_gauge.report.charts import memory_bars
from peft_gauge.report.charts.memory_bars import SEGMENTS, label, segments
from peft_gauge.report.charts.memory_picture import Card
from peft_gauge.training import methods, models
from peft_gauge.training.settings import StepSettings
from peft_gauge.training.sharding import Sharding

Run = Callable[..., tuple[int, str, str]]
GB = 10**9


def made(method: str = "lora", gpus: int = 4, **sharding: Any) -> dict[str, Any]:
    """A plan of 41 GB at the peak, 43 reserved and 44 of the device."""
    shared = {"gpus": gpus, "strategy": "fsdp2", "nodes": 1, "reshard_after_forward": True, **sharding}
    step = {"batch": 1, "seq": 64, "dtype": "bfloat16", "optimizer": "adamw", "grad_checkpointing": False}
    return {
        "model": "toy",
        "method": method,
        "settings": {**step, "sharding": shared if gpus > 1 else None},
        "phase_of_peak": "backward",
        "peak_bytes": 41 * GB,
        "peak_by_category": {"base_weights": 30 * GB, "activations": 10 * GB, "something new": GB},
        "device": {"reserved_bytes": 43 * GB},
        "device_bytes_estimate": 44 * GB,
        "gpus": [{"gpu": "A GPU", "usable_bytes": 48 * GB}],
    }


def saved(folder: Path, *plans: dict[str, Any], name: str = "plans.json") -> Path:
    file = folder / name
    file.write_text(json.dumps(list(plans)), encoding="utf-8")
    return file


# --- the numbers


def test_the_segments_add_up_to_the_device() -> None:
    found = {name: nbytes for name, nbytes in segments(made()).items() if nbytes}
    assert found == {
        "base_weights": 30 * GB,
        "activations": 10 * GB,
        "other": GB,
        "kept_by_allocator": 2 * GB,
        "outside_allocator": GB,
    }


@pytest.mark.integration
def test_a_real_plan_of_ranks_adds_up_and_no_segment_is_negative() -> None:
    settings = StepSettings(1, 32)
    found = plan(PlanRequest(models.resolve("toy-llama"), methods.LORA, settings, sharding=Sharding(4))).as_json()
    each = segments(json.loads(json.dumps(found)))
    assert sum(each.values()) == found["device_bytes_estimate"]
    assert min(each.values()) >= 0


@pytest.mark.parametrize(
    ("sharding", "text"),
    [
        ({"gpus": 1}, "1 GPU"),
        ({"gpus": 8, "nodes": 2}, "16 GPUs, FSDP2"),
        ({"gpus": 8, "strategy": "zero3"}, "8 GPUs, ZeRO-3"),
        ({"gpus": 2, "offload": True}, "2 GPUs, FSDP2, offloaded"),
        ({"gpus": 8, "nodes": 2, "replicas": 2}, "16 GPUs, FSDP2, 2 replicas"),
        ({"gpus": 2, "reshard_after_forward": False}, "2 GPUs, FSDP2, kept"),
    ],
)
def test_labels_name_the_gpus_and_how_they_share(sharding: dict[str, Any], text: str) -> None:
    assert label(made(**sharding)) == text


def test_the_csv_has_each_bar_to_the_byte() -> None:
    rows = list(csv.DictReader(io.StringIO(memory_bars.as_csv([made(), made(gpus=8)]))))
    assert [row["gpus"] for row in rows] == ["4 GPUs, FSDP2", "8 GPUs, FSDP2"]
    for row in rows:
        assert sum(int(row.get(name, 0)) for name in SEGMENTS) == int(row["device_bytes_estimate"]) == 44 * GB
    assert "gradients" not in rows[0]


# --- the picture


@pytest.fixture
def altair() -> Any:
    pytest.importorskip("vl_convert", reason="pictures need the extra: pip install 'peft-gauge[report]'")
    return pytest.importorskip("altair", reason="pictures need the extra: pip install 'peft-gauge[report]'")


def drawn(panel: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [row for layer in panel["layer"] if layer["mark"]["type"] == kind for row in layer["data"]["values"]]


def test_bars_follow_each_other_and_end_at_the_device_memory(altair: Any) -> None:
    plans = [made(), made(gpus=8), made("full")]
    chart = memory_bars.draw(plans, {"lora": "LoRA"}, [Card("A GPU", 48 * GB)]).to_dict()
    assert [panel["title"]["text"] for panel in chart["vconcat"]] == ["LoRA", "full"]
    for panel, bars in zip(chart["vconcat"], (2, 1), strict=True):
        parts = [row for row in drawn(panel, "bar") if row["end"] > row["begin"]]
        assert len(parts) == 5 * bars
        for one, next_ in itertools.pairwise(parts):
            assert next_["begin"] == (one["end"] if one["bar"] == next_["bar"] else 0)
        assert {row["end"] for row in drawn(panel, "text") if row.get("text")} == {44.0}
        assert [row["gb"] for row in drawn(panel, "rule")] == [48.0]


def test_every_segment_has_a_letter_and_a_colour_of_its_own() -> None:
    letters, _, colours = zip(*SEGMENTS.values(), strict=True)
    assert len(set(letters)) == len(set(colours)) == len(SEGMENTS)


def test_two_plans_of_one_bar_are_refused(altair: Any) -> None:
    with pytest.raises(GaugeError, match="same method and GPUs"):
        memory_bars.draw([made(), made()], {}, [])


# --- the command


@pytest.mark.parametrize(("name", "start"), [("a.svg", b"<svg"), ("a.png", b"\x89PNG")])
def test_the_command_draws_saved_plans(altair: Any, run_command: Run, tmp_path: Path, name: str, start: bytes) -> None:
    files = [saved(tmp_path, made(), made("full"), name="a.json"), saved(tmp_path, made(gpus=8), name="b.json")]
    code, printed, errors = run_command("memory-bars", *map(str, files), "--out", str(tmp_path / name))
    assert (code, errors) == (0, "")
    assert str(tmp_path / name) in printed
    assert (tmp_path / name).read_bytes().startswith(start)
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["method"], row["gpus"]) for row in rows] == [
        ("lora", "4 GPUs, FSDP2"),
        ("full", "4 GPUs, FSDP2"),
        ("lora", "8 GPUs, FSDP2"),
    ]
    if name.endswith("svg"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert all(word in text for word in ("A GPU: 48.0 GB usable", "44.0 GB", "8 GPUs, FSDP2", "W base weights"))


def test_a_gpu_of_the_command_line_replaces_those_of_the_plans(altair: Any, run_command: Run, tmp_path: Path) -> None:
    out = tmp_path / "a.svg"
    options = ["--out", str(out), "--gpu", "RTX 4090"]
    assert run_command("memory-bars", str(saved(tmp_path, made())), *options)[0] == 0
    text = out.read_text(encoding="utf-8")
    assert "RTX 4090" in text
    assert "A GPU" not in text


def changed(**fields: Any) -> dict[str, Any]:
    return {**made(), **fields}


def other_step() -> dict[str, Any]:
    found = copy.deepcopy(made())
    found["settings"]["seq"] = 128
    return found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a list of plans"),
        ('{"model": "toy"}', "not a list of plans"),
        (json.dumps([{"model": "toy", "method": "lora", "error": "no memory"}]), "could not be planned: no memory"),
        (json.dumps([{"model": "toy"}]), "has no device in a plan"),
        (json.dumps([made(), changed(model="another")]), "one model is toy, another another"),
        (json.dumps([made(), other_step()]), "1×64 tokens, bfloat16, adamw, another 1×128"),
        (None, "cannot read"),
    ],
)
def test_bad_files_are_one_line_and_nothing_is_drawn(
    altair: Any, run_command: Run, tmp_path: Path, content: str | None, message: str
) -> None:
    file = tmp_path / "plans.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    code, printed, errors = run_command("memory-bars", str(file), "--out", str(tmp_path / "a.svg"))
    assert (code, printed) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "a.svg").exists()
