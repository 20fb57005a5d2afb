"""Sweeps over settings × seeds: equal batches, a learning rate per setting, resumable, with progress messages."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname

from peft_gauge.errors import GaugeError
from peft_gauge.files import write_whole
from peft_gauge.quality.pareto import Knee, knee_over_seeds
from peft_gauge.quality.training import Curve, Divergence, RateSearch, Schedule, search_rate, train

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from peft_gauge.training.methods import Method
    from peft_gauge.training.step import TrainingJob


TIMES_ALIKE = 1.5
"""Median step times within this factor are not a cost to choose by: a shared host varies that much."""


class Prepared(Protocol):
    """A task with model and data built; ``notes`` list its assumptions."""

    @property
    def notes(self) -> tuple[str, ...]: ...

    def job(self, method: Method) -> TrainingJob:
        """A training job on a fresh copy of the base model."""

    def validation_loss(self, job: TrainingJob) -> float:
        """The loss used to select learning rates."""

    def scores(self, job: TrainingJob) -> dict[str, float]:
        """Held-out metrics; settings are compared by ``quality``, higher is better."""


class Task(Protocol):
    """A task under one seed, as data."""

    def identity(self) -> dict[str, Any]:
        """Everything that determines the task, as JSON."""

    def prepared(self) -> Prepared:
        """Build its model and data."""


@dataclass(frozen=True)
class Setting:
    """One candidate: a label, a method, and the learning rate at which its search starts.

    ``loraplus_ratio``: LoRA's B learns at so many times the rate of A (LoRA+, Hayou et al. 2024), by PEFT's optimizer.
    """

    label: str
    method: Method
    start_rate: float
    loraplus_ratio: float | None = None

    def job(self, prepared: Prepared) -> TrainingJob:
        """A training job of this setting, before its first step."""
        job = prepared.job(self.method)
        if self.loraplus_ratio is not None:
            job.optimizer = _loraplus_optimizer(job, self.loraplus_ratio)
        return job


def _loraplus_optimizer(job: TrainingJob, ratio: float) -> torch.optim.Optimizer:
    """PEFT's AdamW of LoRA+; its groups have a ``rate_factor``, since a schedule sets their rates."""
    import torch
    from peft.optimizers import create_loraplus_optimizer

    model, adamw = cast("PeftModel", job.model), torch.optim.AdamW
    found = create_loraplus_optimizer(model, adamw, lr=1.0, loraplus_lr_ratio=ratio)
    for group in found.param_groups:
        group["rate_factor"] = group["lr"]
    return found


@dataclass(frozen=True)
class Lengths:
    """Steps of a training, and of each run of a learning-rate search.

    A search of the same length is fair to every rate, and its best run is the first seed's training itself. With
    ``finer`` it also tries the rates half a step to both sides of the best.
    """

    steps: int
    search_steps: int
    finer: bool = False


@dataclass(frozen=True)
class Trained:
    """One setting under one seed. ``scores`` are empty if the training diverged; if every learning rate of the search
    diverged, ``curve`` is ``None`` and ``divergence`` that of the lowest. ``notes``: the task's assumptions."""

    label: str
    seed: int
    trainable_params: int
    search: RateSearch
    curve: Curve | None
    divergence: Divergence | None
    scores: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The record as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Trained:
        """The inverse of `as_json`."""
        search = values["search"]
        tried = tuple((rate, loss) for rate, loss in search["tried"])
        divergence = Divergence(**values["divergence"]) if values["divergence"] else None
        curve = None
        if values["curve"]:
            losses = tuple((step, loss) for step, loss in values["curve"]["losses"])
            curve = Curve(
                losses, values["curve"]["step_seconds"], divergence if values["curve"]["divergence"] else None
            )
        found = RateSearch(tried, search["chosen"], search["at_edge"])
        rebuilt = {"search": found, "curve": curve, "divergence": divergence, "notes": tuple(values["notes"])}
        return cls(**{**values, **rebuilt})


def sweep(
    task_of: Callable[[int], Task],
    settings: Sequence[Setting],
    seeds: Sequence[int],
    lengths: Lengths,
    *,
    cache: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Trained]:
    """Train every setting under every seed, seed by seed.

    A setting's learning rate is searched under the first seed (under the next, if every rate diverged) and kept for the
    others. With ``cache``, finished trainings of the same task, setting, lengths and library versions are read from
    that folder, and new ones are saved there at once. ``say`` receives one line per training, with the time left.
    """
    if not settings or not seeds:
        raise GaugeError("a sweep needs at least one setting and one seed")
    if len({setting.label for setting in settings}) < len(settings):
        raise GaugeError("two settings of a sweep have the same label")
    done: list[Trained] = []
    searches: dict[str, RateSearch] = {}
    progress = _Progress([setting.label for setting in settings] * len(seeds), lengths, say)
    for seed in seeds:
        task = task_of(seed)
        prepared: Prepared | None = None
        for setting in settings:
            file = None if cache is None else cache / _file_name(task, setting, seed, lengths, searches)
            result = _read(file)
            read = result is not None
            if result is None:
                prepared = prepared or task.prepared()  # skipped if everything is in the cache
                result = train_setting(prepared, setting, seed, lengths, searches.get(setting.label))
                _write(file, result)
            result = replace(result, label=setting.label)
            if result.search.chosen is not None:
                searches.setdefault(setting.label, result.search)
            done.append(result)
            progress.tell(result, read)
    return done


def train_setting(
    prepared: Prepared, setting: Setting, seed: int, lengths: Lengths, search: RateSearch | None = None
) -> Trained:
    """Train one setting, after a search for its learning rate unless ``search`` is given."""
    diverged: dict[float, Divergence] = {}
    trained: dict[float, tuple[int, Curve, Mapping[str, float]]] = {}

    def outcome(rate: float) -> float | None:
        trial = setting.job(prepared)
        curve = train(trial, Schedule(lengths.search_steps, rate))
        loss = math.nan if curve.divergence else prepared.validation_loss(trial)
        if math.isfinite(loss):
            if lengths.search_steps == lengths.steps:  # then it is the training at this rate, to the last bit
                trained[rate] = _trainable(trial), curve, prepared.scores(trial)
            return loss
        diverged[rate] = curve.divergence or Divergence(lengths.search_steps - 1, rate, None)
        return None

    search = search or search_rate(outcome, setting.start_rate, finer=lengths.finer)

    def ended(params: int, curve: Curve | None, divergence: Divergence | None, scores: Mapping[str, float]) -> Trained:
        return Trained(setting.label, seed, params, search, curve, divergence, scores, prepared.notes)

    if search.chosen is None:
        return ended(_trainable(setting.job(prepared)), None, diverged[min(diverged)], {})
    if search.chosen in trained:
        params, curve, scores = trained[search.chosen]
    else:
        # Built after the search: a job seeds dropout, so its masks are the same with and without a search.
        job = setting.job(prepared)
        params, curve = _trainable(job), train(job, Schedule(lengths.steps, search.chosen))
        if curve.divergence is not None:
            return ended(params, curve, curve.divergence, {})
        scores = prepared.scores(job)
    if not all(math.isfinite(score) for score in scores.values()):  # diverged in the last update
        return ended(params, curve, Divergence(lengths.steps - 1, search.chosen, None), {})
    return ended(params, curve, None, scores)


def _trainable(job: TrainingJob) -> int:
    return sum(parameter.numel() for parameter in job.trainable)


# --- results of a sweep -------------------------------------------------------------------------------------------


def by_label(results: Iterable[Trained]) -> dict[str, list[Trained]]:
    """``results`` by setting, in the order of seeds."""
    groups: dict[str, list[Trained]] = {}
    for result in results:
        groups.setdefault(result.label, []).append(result)
    return groups


def pareto_rows(results: Iterable[Trained], peak_bytes: Mapping[str, int]) -> list[dict[str, Any]]:
    """One row per setting with its costs and its quality, for a report.

    Quality is in the form of `over_seeds`; ``peak_bytes`` are planned.
    """
    rows = []
    for label, group in by_label(results).items():
        seconds = [result.curve.step_seconds for result in group if result.curve is not None]
        rows.append(
            {
                "label": label,
                "trainable_params": group[0].trainable_params,
                "peak_bytes": peak_bytes.get(label),
                "step_seconds": statistics.median(seconds) if seconds else None,
                **over_seeds([None if each.divergence else each.scores["quality"] for each in group]),
            }
        )
    return rows


def over_seeds(qualities: Sequence[float | None]) -> dict[str, Any]:
    """The quality of one setting over all seeds, as entries of a row; ``None`` stands for a diverged training.

    ``quality`` is the mean, ``quality_low`` and ``quality_high`` the least and the greatest; a setting that diverged
    under some seed has ``None`` for all of them and the number of such seeds in ``diverged``.
    """
    reached = [quality for quality in qualities if quality is not None]
    told = reached if len(reached) == len(qualities) else []
    return {
        "quality": statistics.fmean(told) if told else None,
        "quality_low": min(told, default=None),
        "quality_high": max(told, default=None),
        "seeds": len(qualities),
        "diverged": len(qualities) - len(reached),
    }


def knees(results: Iterable[Trained], rows: Sequence[Mapping[str, Any]]) -> dict[str, Knee]:
    """The knee of quality against each cost of ``rows`` (`pareto_rows`).

    Left out: settings that diverged, costs that are unknown for any other, and step times that are alike.
    """
    groups = by_label(results)
    usable = [row for row in rows if row["quality"] is not None]
    qualities = {row["label"]: [result.scores["quality"] for result in groups[row["label"]]] for row in usable}
    return {
        cost: knee_over_seeds({row["label"]: float(row[cost]) for row in usable}, qualities)
        for cost in ("trainable_params", "peak_bytes", "step_seconds")
        if usable and all(row[cost] is not None for row in usable) and not _alike(cost, [row[cost] for row in usable])
    }


def _alike(cost: str, values: Sequence[float]) -> bool:
    return cost == "step_seconds" and max(values) < TIMES_ALIKE * min(values)


def metrics(results: Sequence[Trained], peak_bytes: Mapping[str, int]) -> dict[str, Any]:
    """A benchmark's record of a sweep: ``pareto`` rows, ``knees`` by cost, and every training with its curve."""
    rows = pareto_rows(results, peak_bytes)
    found = {cost: knee.as_json() for cost, knee in knees(results, rows).items()}
    return {"pareto": rows, "knees": found, "trainings": [result.as_json() for result in results]}


# --- resuming an interrupted sweep ----------------------------------------------------------------------------------


def _file_name(task: Task, setting: Setting, seed: int, lengths: Lengths, searches: Mapping[str, RateSearch]) -> str:
    search = searches.get(setting.label)
    key = {
        "task": task.identity(),
        # Neither label nor title: two sweeps share equal trainings.
        "method": {name: value for name, value in asdict(setting.method).items() if name != "title"},
        "start_rate": setting.start_rate,
        "loraplus_ratio": setting.loraplus_ratio,
        "lengths": asdict(lengths),
        "rate": search.chosen if search else None,
        "versions": _versions(),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=list).encode()).hexdigest()[:16]
    return f"{setting.method.name}-seed{seed}-{digest}.json"


@functools.cache
def _versions() -> dict[str, str]:
    return {name: _version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}


def _version(name: str) -> str:
    """The version of a library; if it is installed from a folder, also the state of its files, which can change under
    one version."""
    found = distribution(name)
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    if "dir_info" not in origin:
        return found.version + str(origin.get("vcs_info", {}).get("commit_id", ""))
    folder = Path(url2pathname(urlsplit(origin["url"]).path))
    files = [(str(file.relative_to(folder)), file.stat()) for file in sorted(folder.rglob("*.py"))]
    state = repr([(file, stat.st_size, stat.st_mtime_ns) for file, stat in files])
    return f"{found.version} {hashlib.sha256(state.encode()).hexdigest()[:16]}"


def _read(file: Path | None) -> Trained | None:
    """The training saved in ``file``; ``None`` if it is absent or unreadable."""
    if file is None or not file.is_file():
        return None
    try:
        return Trained.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError):
        return None


def _write(file: Path | None, result: Trained) -> None:
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(result.as_json(), allow_nan=False))
    except OSError as error:
        raise GaugeError(
            f"cannot save a training under {file.parent}: {error.strerror or error}; set PEFT_GAUGE_CACHE to move it"
        ) from error


class _Progress:
    """One line per training: its name, its result, and the time left at the pace so far.

    The pace is per step: a training with a search for its rate takes about twice as many.
    """

    def __init__(self, labels: Sequence[str], lengths: Lengths, say: Callable[[str], None] | None) -> None:
        self.left, self.total, self.lengths, self.say = list(labels), len(labels), lengths, say
        self.to_search = set(labels)
        self.tried: list[int] = []  # number of rates in each search so far
        self.steps = 0.0
        self.begun = time.monotonic()

    def tell(self, result: Trained, read: bool) -> None:
        self.left.remove(result.label)
        searched = result.label in self.to_search
        if searched:
            self.tried.append(len(result.search.tried))
        if result.search.chosen is not None:
            self.to_search.discard(result.label)
        if not read:
            self.steps += self._steps(len(result.search.tried) if searched else 0)
        if self.say is None:
            return
        quality = result.scores.get("quality")
        what = "diverged" if result.divergence else f"quality {quality:.4f}" if quality is not None else "done"
        rest = f", about {self._left_seconds() / 60:.0f} min left" if self.steps and self.left else ""
        how = " (saved before)" if read else ""
        place = self.total - len(self.left)
        self.say(f"[{place}/{self.total}] {result.label}, seed {result.seed}: {what}{how}{rest}")

    def _steps(self, rates: float) -> float:
        return self.lengths.steps + rates * self.lengths.search_steps

    def _left_seconds(self) -> float:
        to_search = len(self.to_search.intersection(self.left))
        rates = statistics.fmean(self.tried) if self.tried else 0
        steps = to_search * self._steps(rates) + (len(self.left) - to_search) * self._steps(0)
        return (time.monotonic() - self.begun) / self.steps * steps
