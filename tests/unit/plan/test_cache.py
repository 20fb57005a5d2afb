"""Plans of earlier sessions: the same request by the same code, and nothing else."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from fixtures import plans
from peft_gauge.plan import cache
from peft_gauge.plan.cache import KEPT_VERSIONS, PlanCache, code_of
from peft_gauge.plan.record import PlanRequest
from peft_gauge.training import methods, models
from peft_gauge.training.settings import StepSettings
from tests.support.planted_cases import PlantedPlanning, plan_of

REQUEST = PlanRequest(models.resolve("toy-llama"), methods.LORA, StepSettings(1, 8))


def test_a_plan_comes_back_for_the_same_request_only(tmp_path: Path) -> None:
    kept = PlanCache(tmp_path, "a")
    assert kept.get(REQUEST) is None
    kept.put(REQUEST, plan_of(REQUEST))
    assert PlanCache(tmp_path, "a").get(REQUEST) == plan_of(REQUEST)
    for other in (
        replace(REQUEST, dtype="float32"),
        replace(REQUEST, loop="trainer"),
        replace(REQUEST, settings=StepSettings(1, 8, mixed_precision="bf16")),
        replace(REQUEST, method=methods.get("lora-r2")),
        replace(REQUEST, trainer_arguments=(("packing", True),)),
    ):
        assert kept.get(other) is None


def test_other_code_plans_anew(tmp_path: Path) -> None:
    PlanCache(tmp_path, "a").put(REQUEST, plan_of(REQUEST))
    assert PlanCache(tmp_path, "b").get(REQUEST) is None


def test_a_changed_file_is_other_code(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    file = tmp_path / "package" / "one.py"
    file.write_text("a = 1")
    before = code_of(tmp_path)
    assert code_of(tmp_path) == before
    file.write_text("a = 2")  # of the same size
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns + 1))
    assert code_of(tmp_path) != before
    (tmp_path / "two.py").touch()
    assert code_of(tmp_path) != before


def test_this_package_and_the_libraries_are_the_code() -> None:
    folders = {folder.name for folder in cache._folders()}
    assert {"peft_gauge", "torch", "transformers", "peft", "bitsandbytes", "accelerate"} <= folders


def test_a_new_calibration_plans_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrations = tmp_path / "calibrations"
    calibrations.mkdir()
    monkeypatch.setenv("PEFT_GAUGE_CALIBRATIONS", str(calibrations))
    asked = replace(REQUEST, gpus=("24GB",))
    kept = PlanCache(tmp_path / "plans", "a")
    kept.put(asked, plan_of(asked))
    kept.put(REQUEST, plan_of(REQUEST))
    (calibrations / "mine.json").write_text("{}")
    assert kept.get(asked) is None
    assert kept.get(REQUEST) is not None  # names no GPU


@pytest.mark.parametrize("content", [b"", b"no pickle", b"N."])
def test_a_damaged_file_is_planned_anew(tmp_path: Path, content: bytes) -> None:
    kept = PlanCache(tmp_path, "a")
    kept.put(REQUEST, plan_of(REQUEST))
    (file,) = tmp_path.rglob("*.pickle")
    file.write_bytes(content)
    assert kept.get(REQUEST) is None


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "plans").touch()
    kept = PlanCache(tmp_path / "plans", "a")
    kept.put(REQUEST, plan_of(REQUEST))
    assert kept.get(REQUEST) is None


def test_plans_of_old_code_are_removed(tmp_path: Path) -> None:
    for number in range(KEPT_VERSIONS + 3):
        PlanCache(tmp_path, f"code-{number}").put(REQUEST, plan_of(REQUEST))
        os.utime(tmp_path / f"code-{number}", (number, number))
    # The newest is made before the older ones are counted.
    assert len([*tmp_path.iterdir()]) == KEPT_VERSIONS
    assert PlanCache(tmp_path, f"code-{KEPT_VERSIONS + 2}").get(REQUEST) is not None


def test_a_session_plans_what_no_earlier_one_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def begun(requests: list[PlanRequest]) -> None:
        asked.extend(each.method.name for each in requests)

    monkeypatch.setattr(plans, "Planning", partial(PlantedPlanning, plan_of, begun=begun))
    qlora = replace(REQUEST, method=methods.QLORA)
    first = plans.Plans(kept=PlanCache(tmp_path, "a"))([REQUEST])
    second = plans.Plans(kept=PlanCache(tmp_path, "a"))([qlora, REQUEST])
    assert [each.method for each in second] == ["qlora", "lora"]
    assert second[1] == first[0]
    assert asked == ["lora", "qlora"]
