"""The comparable parts of a saved run: each case's metrics by flat names, its raw times, and its conditions.

Nested metrics get dotted names (``plan.peak_bytes``). Settings are conditions, not metrics: two cases with different
settings are not the same experiment.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from packaging.utils import canonicalize_name

from peft_gauge.history.schema import CONTROL_SAMPLES, SAMPLES

if TYPE_CHECKING:
    from peft_gauge.history.reader import Run

SETTINGS = "settings"
FINGERPRINT = "fingerprint"
IDENTITY = ("method", "model", "device")
"""The metrics that identify, with the settings, the subject of a case."""

_PLAIN = frozenset((str, int, float, bool))

ABSENT = "absent"
SHOWN_DISTRIBUTIONS = 5


@dataclass(frozen=True)
class Samples:
    """Raw times of one metric in seconds: one tuple of rounds per process, and the control's time for each round."""

    seconds: tuple[tuple[float, ...], ...]
    control_seconds: tuple[tuple[float, ...], ...] | None = None

    @property
    def rounds(self) -> int:
        """All rounds of all processes."""
        return sum(map(len, self.seconds))


@dataclass(frozen=True)
class RecordedCase:
    """One case of a run, ready to compare: ``metrics`` and ``settings`` have flat names, ``samples`` are by metric."""

    id: str
    benchmark: str
    outcome: str
    reason: str | None
    metrics: Mapping[str, Any]
    samples: Mapping[str, Samples]
    settings: Mapping[str, Any]
    fingerprint: Mapping[str, Any] | None

    @property
    def subject(self) -> str | None:
        """The same text for two cases about the same subject; ``None`` if the metrics do not identify it."""
        named = {name: self.metrics[name] for name in IDENTITY if name in self.metrics}
        return json.dumps([named, self.settings], sort_keys=True, default=str) if named and self.settings else None


def cases_of(run: Run) -> dict[str, RecordedCase]:
    """The cases of ``run`` by test id."""
    return {
        record.id: RecordedCase(
            id=record.id,
            benchmark=record.benchmark,
            outcome=record.outcome,
            reason=record.reason,
            metrics=_metrics(record.metrics),
            samples=_samples(record.metrics),
            settings=_settings(record.metrics),
            fingerprint=_mapping(record.metrics.get(FINGERPRINT)),
        )
        for record in run.cases
    }


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``values`` with dotted names, without ``None``. Lists stay whole, except lists of records."""
    found: dict[str, Any] = {}
    _flatten(values, prefix, found)
    return iter(found.items())


def _flatten(values: Mapping[str, Any], prefix: str, found: dict[str, Any]) -> None:
    """As `flat`, into ``found``: a generator in each level takes twice the time."""
    for name, value in values.items():
        kind = type(value)
        if kind in _PLAIN:  # most are, and for each of these a check for a mapping takes longer than all else
            found[prefix + name] = value
        elif kind is dict or (kind is not list and isinstance(value, Mapping)):
            _flatten(value, f"{prefix}{name}.", found)
        elif kind is list and value and all(isinstance(each, Mapping) for each in value):
            _flatten({str(place): each for place, each in enumerate(value)}, f"{prefix}{name}.", found)
        elif value is not None:
            found[prefix + name] = value


def _metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    apart = {SAMPLES, CONTROL_SAMPLES, SETTINGS, FINGERPRINT}
    found: dict[str, Any] = {}
    _flatten({name: value for name, value in metrics.items() if name not in apart}, "", found)
    part = f"{SETTINGS}."
    for name in [name for name in found if part in name and f".{part}" in f".{name}"]:
        del found[name]
    return found


def _settings(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The case's own settings, and those of a record in it, for example of a plan."""
    found: dict[str, Any] = {}
    _flatten(_mapping(metrics.get(SETTINGS)) or {}, "", found)
    for name, value in metrics.items():
        if type(value) not in _PLAIN and isinstance(value, Mapping) and name != SETTINGS:
            _flatten(_mapping(value.get(SETTINGS)) or {}, f"{name}.", found)
    return found


def _samples(metrics: Mapping[str, Any]) -> dict[str, Samples]:
    samples, controls = (_mapping(metrics.get(kind)) or {} for kind in (SAMPLES, CONTROL_SAMPLES))
    return {metric: _with_control(seconds, controls.get(metric)) for metric, seconds in samples.items()}


def _with_control(seconds: list[list[float]], control: list[list[float]] | None) -> Samples:
    """Samples with their control; without it if it has not one time per round, since it cannot be divided out then."""
    measured = _tuples(seconds)
    beside = None if control is None else _tuples(control)
    if beside is not None and [*map(len, beside)] != [*map(len, measured)]:
        beside = None
    return Samples(measured, beside)


def _tuples(processes: list[list[float]]) -> tuple[tuple[float, ...], ...]:
    """``processes`` without those that measured nothing."""
    return tuple(tuple(rounds) for rounds in processes if rounds)


def _mapping(value: object) -> Mapping[str, Any] | None:
    return value if isinstance(value, Mapping) else None


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The differences between two flat records, as ``name: before → after``."""
    names = [*old, *(name for name in new if name not in old)]
    return [
        f"{name}: {told(old.get(name))} → {told(new.get(name))}" for name in names if old.get(name) != new.get(name)
    ]


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether ``value`` is a number. In Python a bool is one; here it is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def told(value: object) -> str:
    """``value`` as a reader sees it in a sentence."""
    if value is None:
        return ABSENT
    return value if isinstance(value, str) else json.dumps(value, default=str)


def machine_changes(old: Run, new: Run) -> list[str]:
    """The differences that make times of two runs incomparable: machine, accelerator, threads, Python's minor version.

    Runs of plain pytest-benchmark name neither machine nor threads. A property that only one of the two records is
    ignored, except the accelerator: ``None`` means no accelerator.
    """
    if old.machine is new.machine:
        return []
    before, after = _hardware(old), _hardware(new)
    return changes(*({name: each[name] for name in before if name in after} for each in (before, after)))


def _hardware(run: Run) -> dict[str, Any]:
    machine = run.machine
    cpu = _mapping(machine.get("cpu")) or {}
    told_by_machine = {
        "machine": machine.get("name"),
        "processor": cpu.get("brand_raw"),
        "cores": cpu.get("count"),
        "threads": machine.get("threads"),
        "Python": _minor(machine.get("python_version")),
    }
    hardware = {name: value for name, value in told_by_machine.items() if value is not None}
    accelerator = _mapping(machine.get("accelerator"))
    if accelerator is not None:
        hardware["accelerator"] = accelerator.get("name")
        hardware["accelerator memory"] = accelerator.get("memory_bytes")
    return hardware


def _minor(version: object) -> str | None:
    return ".".join(version.split(".")[:2]) if isinstance(version, str) else None


def environment_changes(old: Run, new: Run) -> list[str]:
    """The differences other than the machine that may cause a change: libraries first, then the other installed
    distributions in one line, if both runs recorded them."""
    return [*changes(environment(old), environment(new)), *_other_distributions(old, new)]


def _other_distributions(old: Run, new: Run) -> list[str]:
    if not (old.distributions and new.distributions):
        return []
    named = {canonicalize_name(name) for name in (*old.libraries, *new.libraries)}
    before, after = (
        {name: version for name, version in sorted(run.distributions.items()) if name not in named}
        for run in (old, new)
    )
    found = changes(before, after)
    if not found:
        return []
    rest = f" and {len(found) - SHOWN_DISTRIBUTIONS} more" if len(found) > SHOWN_DISTRIBUTIONS else ""
    return [f"other distributions: {', '.join(found[:SHOWN_DISTRIBUTIONS])}{rest}"]


def environment(run: Run) -> dict[str, Any]:
    """The environment of ``run`` without the machine: libraries, CUDA, driver, Python and commit."""
    accelerator = _mapping(run.machine.get("accelerator")) or {}
    commit = run.commit.get("id")
    return {
        **run.libraries,
        "CUDA": accelerator.get("cuda"),
        "driver": accelerator.get("driver"),
        "Python": run.machine.get("python_version"),
        "commit": None if commit is None else str(commit)[:12] + ("-dirty" if run.commit.get("dirty") else ""),
    }
