"""The methods of one step (model, device, shape, machine), with the costs and the quality of each.

A step was measured, or only planned. Memory, time and quality of a method can be from different runs; each method names
its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from peft_gauge.history.metrics import is_number
from peft_gauge.memory import gpus
from peft_gauge.report.html import page_rows, tasks
from peft_gauge.report.rows import label
from peft_gauge.report.terminal.sweep_table import swept

if TYPE_CHECKING:
    from datetime import datetime

    from peft_gauge.history.reader import Run
    from peft_gauge.report.html.page_data import Report

GPU_SIZES = ("8GB", "16GB", "24GB", "48GB", "80GB")
"""Advertised sizes of GPUs for which the page shows whether a method fits."""


@dataclass(frozen=True)
class Quality:
    """The mean quality of a method over its seeds on ``task``, and its range; higher is better."""

    task: str
    mean: float
    low: float
    high: float
    seeds: int
    diverged: int
    run: str
    quality_is: str = "quality"

    @property
    def sure(self) -> bool:
        """Whether several seeds trained, and all of them."""
        return self.seeds > 1 and not self.diverged


@dataclass(frozen=True)
class Ratio:
    """A step's time over that of the bare base's forward, with a 95 % interval if there are enough rounds."""

    value: float
    low: float | None
    high: float | None

    def apart_from(self, other: Ratio) -> bool | None:
        """Whether the two intervals do not overlap; ``None`` if one is missing."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return None
        return self.high < other.low or other.high < self.low


@dataclass(frozen=True)
class MethodResult:
    """One method of a setup; bytes, seconds and counts are unrounded, and ``None`` where nothing was recorded.

    ``peak_bytes``: by the allocator on CUDA, by tensors on a CPU, else planned. ``needs_bytes``: of a GPU, with the
    CUDA context; measured on one, else planned. ``runs``: the names of all its runs.
    """

    name: str
    method: str
    trainable_params: int | None = None
    percent_of_base: float | None = None
    disk_bytes: int | None = None
    peak_bytes: int | None = None
    needs_bytes: int | None = None
    step_seconds: float | None = None
    ratio: Ratio | None = None
    unsteady: tuple[str, ...] = ()
    quality: Quality | None = None
    runs: str = ""

    def fits(self, size: str) -> bool | None:
        """Whether it fits on a GPU of the advertised ``size``, by its own memory as a driver reports it."""
        return None if self.needs_bytes is None else self.needs_bytes <= gpus.lookup(size).usable_bytes


@dataclass
class Setup:
    """The methods of one step. ``where``: the step in words; ``source``: "measured" or "planned"."""

    where: str
    machine: str
    model: str
    source: str
    ended: datetime
    methods: list[MethodResult] = field(default_factory=list)


def setups_of(report: Report) -> list[Setup]:
    """All setups, those with the most about their methods first."""
    found = []
    for name, machine in report.machines.items():
        runs = [each.run for each in machine.answering]
        own = {**_planned(name, runs), **_measured(name, runs)}
        found += [_with_quality(setup, runs) for setup in own.values()]
    return sorted(found, key=lambda setup: (-_told(setup), -setup.ended.timestamp(), setup.where))


def _told(setup: Setup) -> int:
    """How many numbers are known about the methods of ``setup``."""
    return sum(
        value is not None
        for each in setup.methods
        for value in (each.peak_bytes, each.ratio, each.quality, each.step_seconds)
    )


def _measured(machine: str, runs: Sequence[Run]) -> dict[str, Setup]:
    found: dict[str, Setup] = {}
    newest = runs[0]
    ended = {run.name: run.when for run in runs}
    for row in page_rows.methods_told(runs, memory=True):
        where = page_rows.step_of(newest, row)
        when = max(ended[name] for name in row["run"].split(", "))
        setup = found.setdefault(where, Setup(where, machine, row["model"], "measured", when))
        setup.ended = max(setup.ended, when)
        setup.methods.append(_result(row))
    return found


def _result(row: Mapping[str, Any]) -> MethodResult:
    cuda = row.get("device") == "cuda"
    ratio = row.get("step_over_control")
    low, high = page_rows.over_control_interval(row, "step_seconds") or (None, None)
    return MethodResult(
        name=label(row),
        method=str(row["method"]),
        trainable_params=row.get("trainable_params"),
        percent_of_base=row.get("percent_of_base"),
        disk_bytes=row.get("adapter_disk_bytes"),
        peak_bytes=row.get("allocated_peak_bytes") if cuda else row.get("tensor_peak_bytes"),
        needs_bytes=(row.get("own_device_peak_bytes") if cuda else None) or row.get("planned_device_bytes"),
        step_seconds=row.get("step_seconds"),
        ratio=Ratio(ratio, low, high) if is_number(ratio) else None,
        unsteady=tuple(map(str, row.get("unsteady") or ())),
        runs=row["run"],
    )


def _planned(machine: str, runs: Sequence[Run]) -> dict[str, Setup]:
    """Planned steps of the newest run that planned each."""
    found: dict[str, Setup] = {}
    for run in runs:
        for plan in page_rows.plans_of(run):
            where = page_rows.step_of(run, plan)
            setup = found.setdefault(where, Setup(where, machine, plan["model"], "planned", run.when))
            name = page_rows.planned_label(plan)
            if name in {each.name for each in setup.methods}:
                continue
            setup.methods.append(
                MethodResult(
                    name=name,
                    method=plan["method"],
                    trainable_params=plan.get("trainable_params"),
                    peak_bytes=plan["peak_bytes"],
                    needs_bytes=plan.get("device_bytes_estimate"),
                    runs=run.name,
                )
            )
    return found


def _with_quality(setup: Setup, runs: Sequence[Run]) -> Setup:
    """``setup`` with the qualities of the sweep over methods on its model that has the most of its methods.

    Of equal ones, the newest run's.
    """
    if setup.source == "planned":
        return setup
    names = {each.name for each in setup.methods}
    best: dict[str, Quality] = {}
    for qualities in _qualities(runs, setup.model):
        own = {name: quality for name, quality in qualities.items() if name in names}
        if len(own) > len(best):
            best = own
    if len(best) < 2:
        return setup
    return replace(setup, methods=[replace(each, quality=best.get(each.name)) for each in setup.methods])


def _qualities(runs: Iterable[Run], model: str) -> Iterator[dict[str, Quality]]:
    """The qualities of every sweep on ``model`` by label, for those points that have one."""
    for run in runs:
        for record in swept(run.cases):
            if record.metrics.get("model") != model:
                continue
            yield {
                str(point["label"]): Quality(
                    str(record.metrics.get("task") or tasks.question(record)),
                    point["quality"],
                    _end(point, "quality_low"),
                    _end(point, "quality_high"),
                    point.get("seeds") or 1,
                    point.get("diverged") or 0,
                    run.name,
                    str(record.metrics.get("quality_is") or "quality"),
                )
                for point in record.metrics["pareto"]
                if is_number(point.get("quality"))
            }


def _end(point: Mapping[str, Any], name: str) -> float:
    value = point.get(name)
    return float(value if is_number(value) else point["quality"])
