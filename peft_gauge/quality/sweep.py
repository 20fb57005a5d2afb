"""Settings × seeds: each trained on the same batches at its own learning rate, resumable, with what is left told."""

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
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

from peft_gauge.errors import GaugeError
from peft_gauge.files import write_whole
from peft_gauge.quality.pareto import Knee, knee_over_seeds
from peft_gauge.quality.training import Curve, Divergence, RateSearch, Schedule, search_rate, train

if TYPE_CHECKING:
    from peft_gauge.training.methods import Method
    from peft_gauge.training.step import TrainingJob


TIMES_ALIKE = 1.5
"""Median step times within this factor are no cost to choose by: a shared host alone has moved them that far."""


class Prepared(Protocol):
    """A task whose model and data are built; ``notes`` say what had to be assumed."""

    @property
    def notes(self) -> tuple[str, ...]: ...

    def job(self, method: Method) -> TrainingJob:
        """A training job on a fresh copy of the base model."""

    def validation_loss(self, job: TrainingJob) -> float:
        """What learning rates are chosen by."""

    def scores(self, job: TrainingJob) -> dict[str, float]:
        """Held-out figures; ``quality`` is the one that settings are compared by, higher is better."""


class Task(Protocol):
    """A task under one seed, as data."""

    def identity(self) -> dict[str, Any]:
        """Everything that determines it, as JSON holds it."""

    def prepared(self) -> Prepared:
        """Build its model and data."""


@dataclass(frozen=True)
class Setting:
    """One candidate: a method, what it is called, and the learning rate that its search starts from."""

    label: str
    method: Method
    start_rate: float


@dataclass(frozen=True)
class Lengths:
    """Steps of a training, and of each run of a learning-rate search."""

    steps: int
    search_steps: int


@dataclass(frozen=True)
class Trained:
    """One setting under one seed. ``scores`` are empty where the training diverged; where every learning rate of the
    search did, ``curve`` is ``None`` and ``divergence`` that of the lowest. ``notes``: what the task had to assume."""

    label: str
    seed: int
    trainable_params: int
    search: RateSearch
    curve: Curve | None
    divergence: Divergence | None
    scores: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The record as JSON holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Trained:
        """The record that `as_json` gave."""
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
    """Every setting trained under every seed, seed by seed.

    The learning rate of a setting is searched under the first seed (under the next, where every rate diverged) and kept
    for the others. With ``cache``, what was
    trained before by the same task, setting, lengths and library versions is read from that folder, and all else is
    written there as soon as it is done. ``say`` hears one line a training, with the time left.
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
                prepared = prepared or task.prepared()  # not built at all where everything is in the cache
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

    def outcome(rate: float) -> float | None:
        trial = prepared.job(setting.method)
        curve = train(trial, Schedule(lengths.search_steps, rate))
        loss = math.nan if curve.divergence else prepared.validation_loss(trial)
        if math.isfinite(loss):
            return loss
        diverged[rate] = curve.divergence or Divergence(lengths.search_steps - 1, rate, None)
        return None

    search = search or search_rate(outcome, setting.start_rate)
    # Built after the search: a job seeds its dropout, whose masks are then the same whether there was a search or not.
    job = prepared.job(setting.method)
    trainable = sum(parameter.numel() for parameter in job.trainable)

    def ended(curve: Curve | None, divergence: Divergence | None, scores: Mapping[str, float]) -> Trained:
        return Trained(setting.label, seed, trainable, search, curve, divergence, scores, prepared.notes)

    if search.chosen is None:
        return ended(None, diverged[min(diverged)], {})
    curve = train(job, Schedule(lengths.steps, search.chosen))
    if curve.divergence is not None:
        return ended(curve, curve.divergence, {})
    scores = prepared.scores(job)
    if not all(math.isfinite(score) for score in scores.values()):  # the last update went wrong
        return ended(curve, Divergence(lengths.steps - 1, search.chosen, None), {})
    return ended(curve, None, scores)


# --- what a sweep says ----------------------------------------------------------------------------------------


def by_label(results: Iterable[Trained]) -> dict[str, list[Trained]]:
    """``results`` by setting, in the order of their seeds."""
    groups: dict[str, list[Trained]] = {}
    for result in results:
        groups.setdefault(result.label, []).append(result)
    return groups


def pareto_rows(results: Iterable[Trained], peak_bytes: Mapping[str, int]) -> list[dict[str, Any]]:
    """One row a setting with what it costs and what it reaches, for a report.

    What it reaches is told as `over_seeds` does; ``peak_bytes`` are planned.
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
    """The quality of one setting under each seed, as a row tells it; ``None`` where the training diverged.

    ``quality`` is the mean, ``quality_low`` and ``quality_high`` are the least and the most; a setting that diverged
    under some seed has none of them (``None``) and says how often in ``diverged``.
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

    Left out are settings that diverged, costs that are not known for all others, and step times that are alike.
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


def figures(results: Sequence[Trained], peak_bytes: Mapping[str, int]) -> dict[str, Any]:
    """What a benchmark records of a sweep: ``pareto`` rows, ``knees`` by cost, and every training, curve and all."""
    rows = pareto_rows(results, peak_bytes)
    found = {cost: knee.as_json() for cost, knee in knees(results, rows).items()}
    return {"pareto": rows, "knees": found, "trainings": [result.as_json() for result in results]}


# --- going on with an interrupted sweep -----------------------------------------------------------------------


def _file_name(task: Task, setting: Setting, seed: int, lengths: Lengths, searches: Mapping[str, RateSearch]) -> str:
    search = searches.get(setting.label)
    key = {
        "task": task.identity(),
        "method": asdict(setting.method),  # by whatever label: two sweeps that ask for the same train it once
        "start_rate": setting.start_rate,
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
    """The version of a library; of one that is installed from a folder also the state of its files, for there one
    version has many codes."""
    found = distribution(name)
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    if "dir_info" not in origin:
        return found.version + str(origin.get("vcs_info", {}).get("commit_id", ""))
    folder = Path(url2pathname(urlsplit(origin["url"]).path))
    files = [(str(file.relative_to(folder)), file.stat()) for file in sorted(folder.rglob("*.py"))]
    state = repr([(file, stat.st_size, stat.st_mtime_ns) for file, stat in files])
    return f"{found.version} {hashlib.sha256(state.encode()).hexdigest()[:16]}"


def _read(file: Path | None) -> Trained | None:
    """The training saved in ``file``; ``None`` where there is none, or none that can be read: then it is done again."""
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
            f"cannot save a training under {file.parent}: {error.strerror or error}; PEFT_GAUGE_CACHE moves it"
        ) from error


class _Progress:
    """One line a training: which, what came of it, and how long the rest will take at the pace so far.

    The pace is that of steps: a training that has to search for its rate takes about twice as many.
    """

    def __init__(self, labels: Sequence[str], lengths: Lengths, say: Callable[[str], None] | None) -> None:
        self.left, self.total, self.lengths, self.say = list(labels), len(labels), lengths, say
        self.to_search = set(labels)
        self.tried: list[int] = []  # rates, by each search that was seen
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
