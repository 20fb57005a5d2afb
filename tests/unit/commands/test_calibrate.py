"""`peft-gauge calibrate`: what it tells and keeps, and that plans then use it; the GPU's own part is in test_gpu."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_gauge import isolation, machine, paths
from peft_gauge.errors import GaugeError
from peft_gauge.isolation import ProcessOutcome
from peft_gauge.measure.calibration import assumptions
from peft_gauge.memory import allocator, gpus
from peft_gauge.memory.overheads import (
    CONTEXT_HOPPER_BYTES,
    default_overheads,
    overheads_for,
    read_calibration,
    write_calibration,
)
from peft_gauge.plan.planner import plan
from peft_gauge.plan.record import PlanRequest
from peft_gauge.training import methods, models
from peft_gauge.training.settings import StepSettings
from tests.support.facts import lacking

Run = Callable[..., tuple[int, str, str]]

SIZES = {
    "MIN_BLOCK_BYTES": 512,
    "SMALL_REQUEST_BYTES": 1 << 20,
    "SMALL_SEGMENT_BYTES": 2 << 20,
    "LARGE_SEGMENT_BYTES": 20 << 20,
    "MIN_OWN_SEGMENT_BYTES": 10 << 20,
    "ROUND_LARGE_BYTES": 2 << 20,
    "compute_capability": [9, 0],
}


def found(**changes: Any) -> dict[str, Any]:
    """What `peft_gauge.measure.calibration.calibrate` returns for an H100 that is as plans assume."""
    default = default_overheads((9, 0))
    return {
        "gpu_name": "NVIDIA H100 80GB HBM3",
        "torch_version": "2.11.0+cu130",
        "measured_on": "2026-11-27",
        "context_bytes": default.context_bytes,
        "cublas_workspace_bytes": default.cublas_workspace_bytes,
        "cublaslt_workspace_bytes": default.cublaslt_workspace_bytes,
        "usable_bytes": gpus.lookup("H100").usable_bytes,
        "workspaces": {"forward_workspace_bytes": 1, "further_stream_bytes": 1},
        "allocator": SIZES,
        "nvml": {"shows_this_process": True},
        "speed": {"dtype": "bfloat16", "product_flops_per_second": 6.5e14, "copy_bytes_per_second": 2.9e12},
        **changes,
    }


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "calibrations"
    monkeypatch.setenv("PEFT_GAUGE_CALIBRATIONS", str(folder))
    return folder


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, outcome: ProcessOutcome) -> None:
    """A machine whose GPU's process ends in ``outcome``."""
    monkeypatch.setattr(machine, "why_no_cuda", lambda: None)
    monkeypatch.setattr(isolation, "run", lambda function, **options: outcome)


def done(value: dict[str, Any]) -> ProcessOutcome:
    return ProcessOutcome("done", value, None, {}, 1.0, 1.0)


def test_a_gpu_that_is_as_plans_assume(run_command: Run, monkeypatch: pytest.MonkeyPatch, own_folder: Path) -> None:
    on_a_gpu(monkeypatch, done(found()))
    code, out, _ = run_command("calibrate")
    assert code == 0
    assert out.count(" same ") == 10
    assert "plans assume" not in out.replace("overhead assumed by plans", "")
    assert "bfloat16 matrix product: 650.0 TFLOP/s; copy: 2,900 GB/s read and written" in out
    assert f"saved {own_folder / 'h100-80gb.json'}; plans for this GPU use it from now on" in out
    assert max(map(len, out.splitlines()[:14])) <= 80


def test_what_differs_is_told_with_both_figures(run_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {**SIZES, "LARGE_SEGMENT_BYTES": 32 << 20}
    on_a_gpu(monkeypatch, done(found(context_bytes=500_000_000, cublaslt_workspace_bytes=0, allocator=sizes)))
    code, out, _ = run_command("calibrate", "--no-keep")
    assert code == 0
    words = " ".join(out.split())
    context = words.partition("CUDA context: ")[2].partition("cuBLASLt workspace: ")[0]
    assert lacking(context, f"plans assume {CONTEXT_HOPPER_BYTES:,} bytes", "this GPU uses 500,000,000") == []
    assert "cuBLASLt workspace: plans assume 1,048,576 bytes" in words
    assert "allocator: large segment: plans assume 20,971,520 bytes" in words
    assert out.count("differs") == 3
    assert "saved" not in out


def test_a_context_may_be_a_few_percent_off(monkeypatch: pytest.MonkeyPatch) -> None:
    default = default_overheads((9, 0))
    near, far = (found(context_bytes=round(default.context_bytes * factor)) for factor in (1.04, 1.06))
    by_name = [{row.name: row.holds for row in assumptions(each, default, None)} for each in (near, far)]
    assert [each["CUDA context"] for each in by_name] == [True, False]
    assert "usable memory" not in by_name[0], "the GPU is not in the table"


def test_every_assumption_of_the_allocator_is_compared() -> None:
    rows = {row.name: row for row in assumptions(found(), default_overheads((9, 0)), None)}
    constants = [name for name in vars(allocator) if name.endswith("_BYTES") and name.isupper()]
    assert len([name for name in rows if name.startswith("allocator")]) == len(constants)


def test_plans_for_the_card_use_it_by_themselves(own_folder: Path) -> None:
    request = PlanRequest(
        models.resolve("toy-llama"), methods.get("ia3"), StepSettings(1, 8), dtype="bfloat16", gpus=("H100",)
    )
    before = plan(request)
    record = found(context_bytes=600_000_000, usable_bytes=80_000_000_000, cublas_workspace_bytes=0)
    write_calibration(own_folder, record.pop("gpu_name"), **record)
    after = plan(request)
    assert after.device.context_bytes == 600_000_000
    assert after.gpus[0].usable_bytes == 80_000_000_000
    assert after.gpus[0].device_bytes == after.device_bytes_estimate
    assert before.reserved_bytes_estimate - after.reserved_bytes_estimate == before.device.cublas_workspace_bytes
    assert after.device.origins["context_bytes"] == "measured on 2026-11-27 with torch 2.11.0+cu130 (h100-80gb.json)"
    (note,) = [each for each in after.warnings if "calibrat" in each]
    assert lacking(note, "H100 80GB", "calibrated on 2026-11-27", "torch 2.11.0+cu130", "h100-80gb.json") == []
    assert not [each for each in before.warnings if "calibrat" in each]


def test_a_card_outside_the_table_is_known_once_it_is_calibrated(own_folder: Path) -> None:
    with pytest.raises(GaugeError, match="unknown GPU"):
        gpus.lookup("Graphics 9000")
    record = found(gpu_name="NVIDIA Graphics 9000", usable_bytes=12_000_000_000)
    write_calibration(own_folder, record.pop("gpu_name"), **record)
    (own_folder / "broken.json").write_text("{")
    card = gpus.lookup("graphics-9000")
    assert (card.name, card.usable_bytes, card.compute_capability) == ("NVIDIA Graphics 9000", 12_000_000_000, (9, 0))
    assert overheads_for("Graphics 9000").usable_bytes == 12_000_000_000


def test_what_was_measured_is_kept_whole(own_folder: Path) -> None:
    record = found()
    write_calibration(own_folder, record.pop("gpu_name"), **record)
    kept = read_calibration(own_folder, "h100")
    assert kept is not None
    assert kept["speed"]["product_flops_per_second"] == 6.5e14
    assert kept["workspaces"] == {"forward_workspace_bytes": 1, "further_stream_bytes": 1}
    assert read_calibration(own_folder, "A100 80GB") is None


def test_json_is_what_is_kept(run_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, done(found(cublaslt_workspace_bytes=7)))
    code, out, _ = run_command("calibrate", "--json", "--no-keep")
    assert code == 0
    printed = json.loads(out)
    assert printed["gpu"] == "NVIDIA H100 80GB HBM3"
    assert printed["differences"] == ["cuBLASLt workspace"]


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (
            ProcessOutcome("out-of-memory", None, "OutOfMemoryError: CUDA out of memory", {}, 1.0, 1.0),
            "not enough free GPU memory to calibrate (OutOfMemoryError: CUDA out of memory)",
        ),
        (
            ProcessOutcome("refused", None, "the CUDA context cannot be measured: no NVML", {}, 1.0, 1.0),
            "the CUDA context cannot be measured: no NVML",
        ),
        (
            ProcessOutcome("timed-out", None, "did not end within 180 s", {}, 180.0, None),
            "did not end within 180 s",
        ),
    ],
)
def test_a_gpu_that_cannot_be_measured_is_one_line(
    outcome: ProcessOutcome, words: str, run_command: Run, monkeypatch: pytest.MonkeyPatch, own_folder: Path
) -> None:
    on_a_gpu(monkeypatch, outcome)
    code, out, err = run_command("calibrate")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert lacking(err, "peft-gauge: ", words) == []
    assert not own_folder.exists()


def test_without_a_gpu_it_says_why(run_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "why_no_cuda", lambda: "no CUDA device")
    assert run_command("calibrate") == (2, "", "peft-gauge: there is no GPU to calibrate: no CUDA device\n")


def test_a_folder_that_cannot_be_written_keeps_the_older_file(
    run_command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_a_gpu(monkeypatch, done(found()))
    (tmp_path / "file").write_text("x")
    code, _, err = run_command("calibrate", "--folder", str(tmp_path / "file"))
    assert code == 2
    assert err.startswith(f"peft-gauge: cannot write the calibration {tmp_path / 'file'}/h100-80gb.json: ")
    assert err.strip().endswith("name another folder with --folder")
    assert (tmp_path / "file").read_text() == "x"


def test_the_users_folder_is_where_the_variable_says(own_folder: Path) -> None:
    assert paths.calibrations() == own_folder
