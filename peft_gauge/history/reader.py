"""Read saved runs: peft-gauge's, of every schema so far, and those of plain pytest-benchmark.

A file is parsed once, and its parts are passed on without copies, since a history can have a thousand files. All that
is read is checked: code that compares runs may rely on the types in `Run`.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast, get_args

from peft_gauge.errors import GaugeError, one_line
from peft_gauge.history import store
from peft_gauge.history.schema import CONTROL_SAMPLES, KEY, SAMPLES, VERSION, CaseOutcome, CaseRecord, Selection, Shards
from peft_gauge.history.upgrade import upgraded

OUTCOMES = frozenset(get_args(CaseOutcome))

MOST_BYTES = 100_000_000
"""A larger file is rejected unread. A run of a thousand cases with all their rounds takes a few million bytes."""

_NAMES = {dict: "an object", list: "a list", str: "a string", int: "an integer", bool: "true or false"}


@dataclass(frozen=True)
class Run:
    """One saved run.

    ``machine`` and ``commit``: the file's ``machine_info`` and ``commit_info``; ``when``: its end, with its time zone;
    ``options``: the options that shape it; ``cases`` and ``claims``: its records; ``benchmarks``: pytest-benchmark's
    own entries; ``interrupted``: whether it ended before all its cases; ``selection``: the cases it was to run,
    ``None`` for a run that does not record them.

    ``schema`` is ``None`` for a file of plain pytest-benchmark. Each of its benchmarks is a passed case with the metric
    ``seconds``, the median, and its rounds as samples where they were saved; it has no options and no claims.
    """

    path: Path
    machine: Mapping[str, Any]
    commit: Mapping[str, Any]
    when: datetime
    options: Mapping[str, Any]
    cases: tuple[CaseRecord, ...]
    claims: tuple[Mapping[str, Any], ...]
    benchmarks: tuple[Mapping[str, Any], ...]
    schema: int | None
    interrupted: bool
    selection: Selection | None = None

    @property
    def libraries(self) -> Mapping[str, str | None]:
        """The versions of the libraries by name, ``None`` if one was not installed; empty if not recorded."""
        libraries = self.machine.get("libraries")
        return libraries if isinstance(libraries, Mapping) else {}

    @property
    def distributions(self) -> Mapping[str, str]:
        """The version of every installed distribution by normalised name; empty for a run saved before they were
        recorded."""
        distributions = self.machine.get("distributions")
        return distributions if isinstance(distributions, Mapping) else {}

    @property
    def shards(self) -> Shards | None:
        """The shards that the run consists of; ``None`` if it is whole."""
        return None if self.selection is None else self.selection.shards

    @property
    def name(self) -> str:
        """The run's number if its file has one, else the file's stem: short enough for a table."""
        return _number(self.path) or self.path.stem


class _Malformed(Exception):
    """The problem with a file, worded to follow its path."""


def read_run(path: Path) -> Run:
    """The run saved in ``path``.

    Rounds that schema 1 saved only under ``benchmarks`` are added to the metrics of their case, as one process's
    samples. Raises `GaugeError` for a file that cannot be read, does not hold a run, or has a newer schema.
    """
    store.fetch(path, MOST_BYTES)
    try:
        return _run(path, _parsed(_text(path)))
    except _Malformed as problem:
        raise GaugeError(f"{store.shown(path)} {problem}") from problem


def runs_in(folder: Path, machine: str | None = None) -> list[Path]:
    """The files of all runs under ``folder``, or of one ``machine``: machine by machine, the newest last.

    ``folder`` contains machine folders, or is one of these. Runs are ordered by number; a file without a number
    comes before them. Hidden files, such as temporary ones, are left out. The files are not opened. Raises
    `GaugeError` if there is no such folder, and for a ``machine`` that is a path out of it. A folder that stands for an
    address (`peft_gauge.history.store`) is listed there.
    """
    if machine is not None and not _is_name(machine):
        raise GaugeError(f"{machine!r} is not a valid name of a machine")
    if not store.is_folder(folder):
        raise GaugeError(f"{store.shown(folder)} is not a folder of saved runs; give the folder that holds them")
    try:
        if machine is not None:
            return _runs(store.entries(folder / machine)[1]) if store.is_folder(folder / machine) else []
        folders, files = store.entries(folder)
        machines = sorted(entry for entry in folders if not _hidden(entry))
        return _runs(files) + [path for each in machines for path in _runs(store.entries(each)[1])]
    except OSError as error:
        raise GaugeError(f"{folder} cannot be listed: {error.strerror or error}") from error


def _is_name(text: str) -> bool:
    """Whether ``text`` can name a folder of runs: it is neither hidden nor a path, on any system."""
    return bool(text) and not text.startswith(".") and not set(text) & set("/\\:\0")


def _runs(files: Iterable[Path]) -> list[Path]:
    found = (path for path in files if path.suffix == ".json" and not _hidden(path))
    return sorted(found, key=lambda path: (int(_number(path) or -1), path.name))


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _number(path: Path) -> str | None:
    match = re.match(r"[0-9]+(?=_)", path.name)
    return match[0] if match else None


def _text(path: Path) -> str:
    try:
        _check_kind_and_size(path.stat())
        return path.read_bytes().decode()
    except FileNotFoundError:
        raise _Malformed("does not exist") from None
    except IsADirectoryError:
        raise _Malformed("is a folder; name one of the runs in it") from None
    except OSError as error:
        raise _Malformed(f"cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise _Malformed("is not JSON: it is not valid UTF-8") from None


def _check_kind_and_size(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would block until another process writes
        raise _Malformed("is not a regular file")
    if status.st_size > MOST_BYTES:
        size, most = status.st_size / 1e6, MOST_BYTES / 1e6
        raise _Malformed(f"is too large for a run: {size:.0f} MB; the limit is {most:.0f} MB")


def _parsed(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text, parse_constant=_refused, parse_float=_finite)
    except json.JSONDecodeError as error:
        if not text.strip():
            raise _Malformed("is empty") from None
        if _is_cut_off(text.rstrip(), error):
            raise _Malformed(f"is truncated: it ends in line {error.lineno}, in the middle of a run") from None
        raise _Malformed(f"is not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; nesting too deep
        raise _Malformed(f"cannot be parsed as JSON: {one_line(error, 100)}") from error
    if not isinstance(document, dict) or not isinstance(document.get("benchmarks"), list):
        raise _Malformed("is JSON, but not a benchmark run: it has no list of benchmarks")
    return document


def _is_cut_off(text: str, error: json.JSONDecodeError) -> bool:
    """Whether ``text`` began as a JSON object and the parser stopped at its end."""
    if not text.lstrip().startswith("{") or error.msg == "Extra data":
        return False
    if text.endswith("}") and error.pos < len(text):
        return False
    # A string without an end is reported where it starts; half a number, constant or escape a few characters early.
    return error.msg.startswith("Unterminated string") or len(text) - error.pos < len("\\u1234")


def _refused(constant: str) -> float:
    raise _Malformed(f"holds {constant}, which is not valid JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _Malformed(f"holds {digits[:40]}, which is too large for a number")
    return value


def _run(path: Path, document: dict[str, Any]) -> Run:
    section = _field(document, KEY, dict) if KEY in document else None
    schema = None if section is None else _schema(section)
    section = None if section is None else upgraded(section)
    benchmarks = _benchmarks(document)
    if section is None:
        cases = [_plain_case(entry) for entry in benchmarks]
    else:
        rounds = {entry["fullname"]: entry["stats"]["data"] for entry in benchmarks if "data" in entry["stats"]}
        cases = [_case(entry, rounds) for entry in _objects(section, "cases", f"{KEY}.")]
    _check_ids(cases)
    machine = _field(document, "machine_info", dict)
    if section is not None:
        _check_machine(machine)
    return Run(
        path=path,
        machine=machine,
        commit=_field({"commit_info": {}} | document, "commit_info", dict),
        when=_when(_field(document, "datetime", str)),
        options={} if section is None else _field(section, "options", dict, f"{KEY}."),
        cases=tuple(cases),
        claims=() if section is None else _claims(section),
        benchmarks=tuple(benchmarks),
        schema=schema,
        # Schema 1 saved no run that had been interrupted.
        interrupted=_field({"interrupted": False} | (section or {}), "interrupted", bool, f"{KEY}."),
        selection=_selection((section or {}).get("selection")),
    )


def _selection(told: Any) -> Selection | None:
    """Runs before 27 November 2026 do not record a selection."""
    if told is None:
        return None
    where = f"{KEY}.selection"
    if type(told) is not dict:
        raise _Malformed(f"is malformed: {where} is {_shown(told)}, not an object")
    given = [name for name in ("args", "deselected") if name == "args" or told.get(name) is not None]
    lists: dict[str, list[str]] = {name: _field(told, name, list, f"{where}.") for name in given}
    for name, values in lists.items():
        if not all(type(value) is str for value in values):
            raise _Malformed(f"is malformed: {where}.{name} is not a list of strings")
    markers, keywords = (_field({name: ""} | told, name, str, f"{where}.") for name in ("markers", "keywords"))
    deselected = frozenset(lists["deselected"]) if "deselected" in lists else None
    return Selection(
        tuple(lists["args"]), markers, keywords, deselected, _shards(told.get("shards"), f"{where}.shards")
    )


def _shards(told: Any, where: str) -> Shards | None:
    if told is None:
        return None
    if type(told) is not dict:
        raise _Malformed(f"is malformed: {where} is {_shown(told)}, not an object")
    held, of = _field(told, "held", list, f"{where}."), _field(told, "of", int, f"{where}.")
    ascending = all(type(number) is int for number in held) and held == sorted(set(held))
    if not held or not ascending or not 1 <= held[0] <= held[-1] <= of:
        raise _Malformed(f"is malformed: {where}.held is {_shown(held)}, not ascending numbers from 1 to {of}")
    left_out = told.get("left_out")
    if left_out is not None and not all(type(id_) is str for id_ in _field(told, "left_out", list, f"{where}.")):
        raise _Malformed(f"is malformed: {where}.left_out is not a list of strings")
    return Shards(tuple(held), of, None if left_out is None else frozenset(left_out))


def _schema(section: dict[str, Any]) -> int:
    schema: int = _field(section, "schema", int, f"{KEY}.")
    if schema > VERSION:
        raise _Malformed(f"was written by a newer peft-gauge (schema {schema}, known up to {VERSION}); upgrade")
    if schema < 1:
        raise _Malformed(f"is malformed: {KEY}.schema is {schema}, but the first schema is 1")
    return schema


def _when(text: str) -> datetime:
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise _Malformed(f"is malformed: datetime is {text[:40]!r}, which is not a date") from None
    # pytest-benchmark 3 and 4 wrote UTC without marking it.
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _check_machine(machine: dict[str, Any]) -> None:
    """The parts of peft-gauge's ``machine_info`` that identify a machine; other tools' may hold anything."""
    name = _field(machine, "name", str, "machine_info.")
    if not _is_name(name):
        raise _Malformed(f"is malformed: machine_info.name is {_shown(name)}, which is not a valid name of a machine")
    _field({"accelerator": {}} | machine, "accelerator", dict, "machine_info.")
    libraries = _field({"libraries": {}} | machine, "libraries", dict, "machine_info.")
    for library, version in libraries.items():
        if version is not None:
            _field(libraries, library, str, "machine_info.libraries.")
    distributions = _field({"distributions": {}} | machine, "distributions", dict, "machine_info.")
    for name in distributions:
        _field(distributions, name, str, "machine_info.distributions.")


def _case(entry: dict[str, Any], rounds: Mapping[str, list[float]]) -> CaseRecord:
    id_ = _field(entry, "id", str, "a case's ")
    where = f"case {id_}: "
    outcome = _field(entry, "outcome", str, where)
    if outcome not in OUTCOMES:
        raise _Malformed(f"is malformed: {where}outcome is {outcome[:40]!r}, not one of {', '.join(sorted(OUTCOMES))}")
    reason = entry.get("reason")
    if reason is not None:
        _field(entry, "reason", str, where)
    metrics = _field(entry, "metrics", dict, where)
    for kind in (SAMPLES, CONTROL_SAMPLES):
        if kind in metrics:
            _check_samples(_field(metrics, kind, dict, where), f"{where}{kind}")
    if SAMPLES not in metrics and id_ in rounds:
        metrics |= _samples_of(metrics, rounds[id_])
    return CaseRecord(id_, _field(entry, "benchmark", str, where), cast("CaseOutcome", outcome), reason, metrics)


def _check_ids(cases: list[CaseRecord]) -> None:
    """A case has one record, and a second one only for a failed clean-up."""
    passed = Counter(case.id for case in cases if case.outcome == "passed")
    for id_, records in passed.items():
        if records > 1:
            raise _Malformed(f"is malformed: case {id_} has more than one record that passed")


def _check_samples(samples: dict[str, Any], where: str) -> None:
    for metric, processes in samples.items():
        if type(processes) is not list or not all(_are_seconds(process) for process in processes):
            raise _Malformed(f"is malformed: {where} of {metric} are not one list of seconds per process")


def _samples_of(metrics: dict[str, Any], rounds: list[float]) -> dict[str, Any]:
    """``rounds`` as samples of the one time that a case of schema 1 has; nothing if it has several."""
    times = {name for name, value in metrics.items() if name.endswith("_seconds") and _are_seconds([value])}
    measured = [*(times - {"control_seconds"})]
    return {SAMPLES: {measured[0]: [rounds]}} if len(measured) == 1 else {}


def _plain_case(entry: dict[str, Any]) -> CaseRecord:
    fullname, stats = entry["fullname"], entry["stats"]
    if not _are_seconds([stats.get("median")]):
        raise _Malformed(f"is malformed: benchmark {fullname}: stats.median is not a time in seconds")
    metrics = {"seconds": stats["median"]} | ({SAMPLES: {"seconds": [stats["data"]]}} if "data" in stats else {})
    return CaseRecord(fullname, Path(fullname.partition("::")[0]).stem, "passed", None, metrics)


def _benchmarks(document: dict[str, Any]) -> list[dict[str, Any]]:
    entries = _objects(document, "benchmarks")
    for entry in entries:
        fullname = _field(entry, "fullname", str, "a benchmark's ")
        stats = _field(entry, "stats", dict, f"benchmark {fullname}: ")
        if not _are_seconds(stats.get("data", [])):
            raise _Malformed(f"is malformed: benchmark {fullname}: stats.data is not a list of seconds")
    return entries


def _claims(section: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    claims = _objects(section, "claims", f"{KEY}.")
    for claim in claims:
        id_ = _field(claim, "id", str, "a claim's ")
        for name in ("model", "verdict"):
            _field(claim, name, str, f"claim {id_}: ")
    return tuple(claims)


def _objects(holder: dict[str, Any], name: str, where: str = "") -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = _field(holder, name, list, where)
    for place, entry in enumerate(entries):
        if type(entry) is not dict:
            raise _Malformed(f"is malformed: {where}{name}[{place}] is {_shown(entry)}, not an object")
    return entries


def _are_seconds(values: object) -> bool:
    """Whether ``values`` is a list of times, each small enough for a float."""
    return type(values) is list and all(
        type(value) in (float, int) and 0 <= value <= sys.float_info.max for value in values
    )


def _field(holder: Mapping[str, Any], name: str, kind: type, where: str = "") -> Any:
    """The value of ``name``, which must be of exactly this ``kind``: JSON's true is not an integer."""
    if name not in holder:
        raise _Malformed(f"is malformed: {where}{name} is missing")
    value = holder[name]
    if type(value) is not kind:
        raise _Malformed(f"is malformed: {where}{name} is {_shown(value)}, not {_NAMES[kind]}")
    return value


def _shown(value: object) -> str:
    return one_line(json.dumps(value), 40)
