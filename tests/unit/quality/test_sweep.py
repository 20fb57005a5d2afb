"""Sweeps over settings and seeds: equal conditions, recorded searches, and going on after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from peft_gauge.errors import GaugeError
from peft_gauge.quality import sweep as sweeping
from peft_gauge.quality.sweep import Lengths, Setting, Trained, knees, metrics, over_seeds, pareto_rows, sweep
from peft_gauge.report.terminal import sweep_table
from peft_gauge.training import methods
from peft_gauge.training.settings import StepSettings
from peft_gauge.training.step import TrainingJob

if TYPE_CHECKING:
    from peft_gauge.training.methods import Method

LENGTHS = Lengths(steps=4, search_steps=2)


class Sum(nn.Module):
    """``rank`` weights, of which four can help: the loss is the squared distance of each of four numbers from 1."""

    def __init__(self, rank: int, broken: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rank))
        self.broken = broken

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool) -> SimpleNamespace:
        padded = nn.functional.pad(self.weight, (0, 4))[:4]
        loss = (padded - labels).square().sum()
        return SimpleNamespace(loss=loss * float("nan") if self.broken else loss)


@dataclass
class FourNumbers:
    """A task and its prepared form at once; ``built`` notes every job, and ``seed`` shifts nothing but the record."""

    seed: int
    built: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ("a note",)

    def identity(self) -> dict[str, Any]:
        return {"task": "four numbers", "seed": self.seed}

    def prepared(self) -> FourNumbers:
        return self

    def job(self, method: Method) -> TrainingJob:
        self.built.append(f"{method.name} {self.seed}")
        batch = {"input_ids": torch.ones(4), "labels": torch.ones(4)}
        rank, broken = int(method.peft_config["r"]), method.name == "broken"
        return TrainingJob(Sum(rank, broken), [batch], StepSettings(batch=1, seq=4, optimizer="sgd"))

    def validation_loss(self, job: TrainingJob) -> float:
        return float(job.forward().detach())

    def scores(self, job: TrainingJob) -> dict[str, float]:
        return {"quality": 1 - float(job.forward().detach()) / 4 + self.seed}


def setting(label: str, rank: int) -> Setting:
    return Setting(label, methods.LORA.variant(label, label, peft_config={"r": rank}), 0.3)


SETTINGS = [setting(f"r{rank}", rank) for rank in (1, 2, 4, 8)]


@pytest.fixture
def tasks() -> tuple[Callable[[int], FourNumbers], list[str]]:
    """A task for each seed, and the list of all jobs that they build."""
    built: list[str] = []
    return lambda seed: FourNumbers(seed, built), built


def test_the_rate_is_searched_under_the_first_seed_and_kept(tasks: Any) -> None:
    task_of, built = tasks

    results = sweep(task_of, SETTINGS[:1], (0, 1, 2), LENGTHS)

    first, *others = results
    assert built.count("r1 0") == 1 + len(first.search.tried)
    assert (built.count("r1 1"), built.count("r1 2")) == (1, 1)
    assert {other.search for other in others} == {first.search}
    assert [result.seed for result in results] == [0, 1, 2]


def test_figures_find_what_is_true_of_the_task(tasks: Any) -> None:
    results = sweep(tasks[0], SETTINGS, (0, 1), LENGTHS)

    found = metrics(results, {"r1": 10, "r2": 20, "r4": 40, "r8": 80})

    rows = {row["label"]: row for row in found["pareto"]}
    assert [row["trainable_params"] for row in rows.values()] == [1, 2, 4, 8]
    assert rows["r1"]["quality_high"] - rows["r1"]["quality_low"] == pytest.approx(1.0)  # as far as the seeds are apart
    assert rows["r1"]["quality"] == pytest.approx(0.75, abs=0.02)  # of 0.25 and 1.25, a quarter learned
    assert found["knees"]["trainable_params"]["knee"] == "r4"
    assert found["knees"]["peak_bytes"]["knee_share"] == 1.0
    assert found["trainings"][0]["notes"] == ("a note",)
    json.dumps(found, allow_nan=False)
    headings, lines = sweep_table.told(found)  # what a run shows of them
    assert [line[0] for line in lines] == ["r1", "r2", "r4", "r8"]
    shown = [dict(zip(headings, line, strict=True)) for line in lines]
    assert [line["trainable"] for line in shown] == ["1", "2", "4", "8"]
    assert [line["peak"] for line in shown] == ["10 B", "20 B", "40 B", "80 B"]


def test_a_setting_that_diverges_is_an_outcome_and_the_sweep_goes_on(tasks: Any) -> None:
    results = sweep(tasks[0], [setting("broken", 2), *SETTINGS], (0,), LENGTHS)

    assert [result.label for result in results] == ["broken", "r1", "r2", "r4", "r8"]
    broken = results[0]
    assert broken.divergence is not None
    assert broken.search.chosen is None
    assert broken.divergence.learning_rate == min(rate for rate, _ in broken.search.tried)
    row = pareto_rows(results, {})[0]
    assert (row["quality"], row["quality_low"], row["diverged"], row["peak_bytes"]) == (None, None, 1, None)
    assert "broken" not in knees(results, pareto_rows(results, {}))["trainable_params"].shares


def test_a_setting_that_diverged_under_one_seed_has_no_quality_of_the_others() -> None:
    none = {"quality": None, "quality_low": None, "quality_high": None}
    assert over_seeds([0.5, None, 0.75]) == {**none, "seeds": 3, "diverged": 1}
    assert over_seeds([None]) == {**none, "seeds": 1, "diverged": 1}
    whole = {"quality": 0.625, "quality_low": 0.5, "quality_high": 0.75, "seeds": 2, "diverged": 0}
    assert over_seeds([0.75, 0.5]) == whole


def test_a_rate_that_diverges_has_no_loss_in_the_search(tasks: Any) -> None:
    too_high = replace(SETTINGS[1], start_rate=3.0)  # of a warm-up step's whole length: the error grows fivefold

    (result,) = sweep(tasks[0], [too_high], (0,), LENGTHS)

    tried = dict(result.search.tried)
    assert tried[3.0] is None
    assert tried[9.5] is None
    assert result.search.chosen == 0.3


def test_a_setting_without_a_usable_rate_is_searched_again_under_the_next_seed(tasks: Any) -> None:
    task_of, built = tasks
    results = sweep(task_of, [setting("broken", 2)], (0, 1), LENGTHS)
    assert [result.divergence is not None for result in results] == [True, True]
    assert built.count("broken 0") == built.count("broken 1") > 2


def test_masks_of_dropout_do_not_depend_on_the_search(tasks: Any) -> None:
    """The job that is trained is the last that was built, so that what it seeds is what its steps draw."""
    prepared = tasks[0](0)
    order: list[str] = []
    build = prepared.job

    def noted_job(method: Method) -> TrainingJob:
        order.append("built")
        return build(method)

    def noted_loss(job: TrainingJob) -> float:
        order.append("validated")
        return 1.0

    prepared.job, prepared.validation_loss = noted_job, noted_loss

    sweeping.train_setting(prepared, SETTINGS[0], 0, LENGTHS)

    assert order[-1] == "built"
    assert order[:-1] == ["built", "validated"] * (len(order) // 2)


def test_a_score_that_is_no_number_is_a_divergence(tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FourNumbers, "scores", lambda self, job: {"quality": float("nan")})

    (result,) = sweep(tasks[0], SETTINGS[:1], (0,), LENGTHS)

    assert result.divergence is not None
    assert result.divergence.step == LENGTHS.steps - 1
    assert result.scores == {}


def test_step_times_that_are_alike_have_no_knee() -> None:
    def rows(*seconds: float) -> list[dict[str, Any]]:
        shared = {"peak_bytes": None, "quality": 0.5}
        return [
            {**shared, "label": label, "trainable_params": 2**k, "step_seconds": value}
            for k, (label, value) in enumerate(zip("abc", seconds, strict=True))
        ]

    results = [Trained(label, 0, 1, None, None, None, {"quality": 0.5}) for label in "abc"]  # type: ignore[arg-type]
    assert "step_seconds" not in knees(results, rows(1.0, 1.2, 1.4))
    assert "step_seconds" in knees(results, rows(1.0, 1.2, 1.6))
    assert "peak_bytes" not in knees(results, rows(1.0, 1.2, 1.4))


def test_an_interrupted_sweep_goes_on_where_it_stopped(tasks: Any, tmp_path: Path) -> None:
    task_of, built = tasks
    whole = sweep(task_of, SETTINGS, (0, 1), LENGTHS)
    built.clear()

    def interrupt(line: str) -> None:
        if line.startswith("[3/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(task_of, SETTINGS, (0, 1), LENGTHS, cache=tmp_path, say=interrupt)
    before = set(built)
    built.clear()
    resumed = sweep(task_of, SETTINGS, (0, 1), LENGTHS, cache=tmp_path)

    assert before == {"r1 0", "r2 0", "r4 0"}
    assert not before & set(built)
    assert [scored(result) for result in resumed] == [scored(result) for result in whole]


def scored(result: Trained) -> tuple[object, ...]:
    assert result.curve is not None
    return result.label, result.seed, result.search, result.curve.losses, result.scores


def test_what_is_saved_comes_back_as_it_was(tasks: Any, tmp_path: Path) -> None:
    settings = [setting("broken", 2), *SETTINGS]
    first = sweep(tasks[0], settings, (0,), LENGTHS, cache=tmp_path)
    assert sweep(tasks[0], settings, (0,), LENGTHS, cache=tmp_path) == first


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"label": "r1"}'])
def test_a_damaged_file_is_trained_again(damage: str, tasks: Any, tmp_path: Path) -> None:
    task_of, built = tasks
    sweep(task_of, SETTINGS[:2], (0,), LENGTHS, cache=tmp_path)
    (file,) = tmp_path.glob("r1-*")
    file.write_text(damage)
    built.clear()

    (first, _) = sweep(task_of, SETTINGS[:2], (0,), LENGTHS, cache=tmp_path)

    assert set(built) == {"r1 0"}
    assert first.scores


def test_nothing_else_is_taken_for_what_was_saved(tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task_of, built = tasks

    def trained_anew(settings: list[Setting] = SETTINGS[:1], seed: int = 0, lengths: Lengths = LENGTHS) -> bool:
        built.clear()
        sweep(task_of, settings, (seed,), lengths, cache=tmp_path)
        return bool(built)

    assert trained_anew()
    assert not trained_anew()
    assert trained_anew(lengths=Lengths(5, 2))
    assert trained_anew(seed=1)
    assert trained_anew(settings=[setting("r1", 2)])
    monkeypatch.setattr(sweeping, "_versions", lambda: {"torch": "another"})
    assert trained_anew()


def test_a_library_from_a_folder_is_known_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code.py").write_text("a = 1")
    texts: dict[str, str | None] = {"direct_url.json": None}
    dist = SimpleNamespace(version="0.21.3.dev0", read_text=texts.get)
    monkeypatch.setattr(sweeping, "distribution", lambda name: dist)
    released = sweeping._version("peft")
    texts["direct_url.json"] = json.dumps({"url": tmp_path.as_uri(), "dir_info": {"editable": True}})
    before, again = sweeping._version("peft"), sweeping._version("peft")
    (tmp_path / "code.py").write_text("a = 10")
    after = sweeping._version("peft")
    texts["direct_url.json"] = json.dumps({"url": "https://x/peft", "vcs_info": {"vcs": "git", "commit_id": "abc"}})

    assert released == "0.21.3.dev0"
    assert before == again
    assert len({released, before, after, sweeping._version("peft")}) == 4


def test_a_cache_that_cannot_be_written_is_one_line(tasks: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GaugeError, match="PEFT_GAUGE_CACHE"):
        sweep(tasks[0], SETTINGS[:1], (0,), LENGTHS, cache=tmp_path / "file")


def test_progress_tells_what_came_and_how_long_the_rest_takes(
    tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 120))
    monkeypatch.setattr("peft_gauge.quality.sweep.time.monotonic", lambda: next(clock))
    lines: list[str] = []
    settings = [SETTINGS[0], setting("broken", 2), SETTINGS[2]]

    sweep(tasks[0], settings, (0,), LENGTHS, cache=tmp_path, say=lines.append)
    sweep(tasks[0], settings[:1], (0,), LENGTHS, cache=tmp_path, say=lines.append)

    assert lines[0].startswith("[1/3] r1, seed 0: quality 0.2")
    assert lines[0].endswith(", about 4 min left")  # two minutes each
    assert lines[1] == "[2/3] broken, seed 0: diverged, about 2 min left"
    assert "left" not in lines[2]
    assert lines[3].endswith("(saved before)")


def test_later_seeds_are_known_to_take_no_search(tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 36_000.0, 36_000.0, 36_000.0])
    monkeypatch.setattr("peft_gauge.quality.sweep.time.monotonic", lambda: next(clock))
    lines: list[str] = []

    first, *_ = sweep(tasks[0], SETTINGS[:1], (0, 1, 2), LENGTHS, say=lines.append)

    searched = len(first.search.tried) * LENGTHS.search_steps
    left_minutes = 600 * 2 * LENGTHS.steps / (LENGTHS.steps + searched)
    assert lines[0].endswith(f", about {left_minutes:.0f} min left")


def test_settings_are_told_apart_by_their_labels(tasks: Any) -> None:
    with pytest.raises(GaugeError, match="same label"):
        sweep(tasks[0], [SETTINGS[0], SETTINGS[0]], (0,), LENGTHS)


def test_an_empty_sweep_is_refused(tasks: Any) -> None:
    for settings, seeds in (([], (0,)), (SETTINGS, ())):
        with pytest.raises(GaugeError, match="at least one"):
            sweep(tasks[0], settings, seeds, LENGTHS)
