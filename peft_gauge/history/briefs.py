"""The parts of saved runs that a history needs, read once and kept in the user's cache folder.

A run of sixty cases takes 0.4 MB, most of it operators by module and rounds in pytest-benchmark's own form. A `Brief`
has everything that two runs of a history are compared by, and takes a twentieth on disk. Briefs of long histories are
kept in one SQLite file, each under its run's path, size and time of change and under the code that made it, so that a
report reads only new and changed files. Anything else is read from the run's own file again (`restored`, `read_run`).
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import sqlite3
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self

from peft_gauge import paths
from peft_gauge.collector import no_collector
from peft_gauge.errors import GaugeError
from peft_gauge.history import intervals, store
from peft_gauge.history.metrics import RecordedCase, Samples, cases_of
from peft_gauge.history.reader import Run, read_run
from peft_gauge.history.schema import CaseRecord
from peft_gauge.medians import median_interval

KEPT_FROM = 200
"""The least number of runs whose briefs are kept; fewer are read within two seconds, and leave the cache alone."""
SHARED_FROM = 200
"""The least number of runs that several processes read; to start them takes half a second."""
MOST_PROCESSES, BATCH = 8, 16
"""The most processes, and the number of runs that each reads at a time."""
COMMITTED = 512
"""Briefs that are written to disk together."""
WAIT_SECONDS = 2.0
"""How long to wait for another process that writes; after that, briefs are read or not kept."""
MADE_BY = ("briefs.py", "intervals.py", "metrics.py", "reader.py", "schema.py", "upgrade.py", "../medians.py")
"""The modules whose code decides what is in a brief, relative to this one's folder."""

Key = tuple[str, int, int, str]


class Form(NamedTuple):
    """The parts of a case that rarely change from one run to the next.

    ``names``: its metrics, as from `cases_of`; ``numbers``: the places of those that are numbers; ``fingerprint``: a
    digest, equal if and only if the fingerprints are.
    """

    id: str
    outcome: str
    names: tuple[str, ...]
    numbers: tuple[int, ...]
    settings: Mapping[str, Any]
    fingerprint: str | None


class Timed(NamedTuple):
    """The raw times of one metric in short.

    ``usable``: whether they allow an estimate (`intervals.why_no_estimate`); ``log_seconds`` and ``log_over_control``:
    the logarithm of the centre as in `intervals.estimate`, where they do and, for the latter, have a control;
    ``interval``: `median_interval` of all rounds; ``samples``: the times themselves where several processes measured
    them.
    """

    usable: bool
    log_seconds: float | None
    log_over_control: float | None
    interval: tuple[float, float] | None
    samples: Samples | None


class BriefCase(NamedTuple):
    """A case in short: ``values`` are those of the form's ``names``, ``times`` are by metric."""

    form: Form
    values: tuple[Any, ...]
    times: Mapping[str, Timed]

    @property
    def metrics(self) -> dict[str, Any]:
        """The values by name."""
        return dict(zip(self.form.names, self.values, strict=True))


@dataclass(frozen=True)
class Brief:
    """A saved run in short.

    ``run``: without pytest-benchmark's entries; the ``metrics`` of its cases have their names only, each with the value
    ``None``. ``cases``: by id, as from `cases_of`.
    """

    run: Run
    cases: Mapping[str, BriefCase]


def brief_of(run: Run) -> Brief:
    """``run`` in short."""
    names = tuple(
        CaseRecord(case.id, case.benchmark, case.outcome, case.reason, dict.fromkeys(case.metrics))
        for case in run.cases
    )
    cases = {id_: _brief_case(case) for id_, case in cases_of(run).items()}
    return Brief(replace(run, benchmarks=(), cases=names), cases)


def _brief_case(case: RecordedCase) -> BriefCase:
    values = tuple(case.metrics.values())
    # As `metrics.is_number` of parsed JSON, in a tenth of its time.
    numbers = tuple([place for place, value in enumerate(values) if type(value) in (int, float)])
    fingerprint = None if case.fingerprint is None else _digest(pickle.dumps(case.fingerprint))
    names = tuple(map(sys.intern, case.metrics))  # equal names as one object are written once
    form = Form(case.id, case.outcome, names, numbers, case.settings, fingerprint)
    return BriefCase(form, values, {metric: _timed(samples) for metric, samples in case.samples.items()})


def _timed(samples: Samples) -> Timed:
    usable = intervals.why_no_estimate(samples) is None
    return Timed(
        usable,
        intervals.log_centre(samples, over_control=False) if usable else None,
        intervals.log_centre(samples, over_control=True) if usable and samples.control_seconds is not None else None,
        median_interval(list(chain.from_iterable(samples.seconds))),
        samples if len(samples.seconds) > 1 else None,
    )


@lru_cache(maxsize=512)
def _digest(packed_record: bytes) -> str:
    """The digest of a pickled fingerprint; to pickle it takes a tenth of the time, and most are as in other runs."""
    return hashlib.sha256(json.dumps(pickle.loads(packed_record), sort_keys=True).encode()).hexdigest()


# As bytes


def packed(brief: Brief) -> bytes:
    """``brief`` as it is kept.

    Parts that are often the same in the next run are pickled each by itself: equal ones are equal bytes, so that
    `Unpacking` makes one object of them.
    """
    run = brief.run
    forms = [case.form for case in brief.cases.values()]
    parts = [run.machine, run.options, run.cases, run.claims, run.selection, forms]
    own = run.path, run.commit, run.when, run.schema, run.interrupted
    of_cases = [(pickle.dumps(case.values), case.times) for case in brief.cases.values()]
    return zlib.compress(pickle.dumps((own, [*map(pickle.dumps, parts)], of_cases)), 1)


class Unpacking:
    """Makes briefs of bytes (`packed`). Parts that are equal to those of the brief before are the same objects."""

    def __init__(self) -> None:
        self._known: dict[bytes, Any] = {}
        self._before: dict[bytes, Any] = {}

    def __call__(self, content: bytes) -> Brief:
        self._before, self._known = self._known, {}
        (path, commit, when, schema, interrupted), parts, of_cases = pickle.loads(zlib.decompress(content))
        machine, options, records, claims, selection, forms = map(self._part, parts)
        cases = {
            form.id: BriefCase(form, self._part(values), times)
            for form, (values, times) in zip(forms, of_cases, strict=True)
        }
        run = Run(path, machine, commit, when, options, records, claims, (), schema, interrupted, selection)
        return Brief(run, cases)

    def _part(self, content: bytes) -> Any:
        found = self._before.get(content)
        if found is None:  # "selection" may be None: to make that again takes no time
            found = pickle.loads(content)
        self._known[content] = found
        return found


def restored(run: Run) -> Run:
    """The run of a brief with the contents of its cases, read from its file; only cases that ``run`` has."""
    whole = read_run(run.path)
    ids = dict.fromkeys(case.id for case in run.cases)
    records = {id_: [case for case in whole.cases if case.id == id_] for id_ in ids}
    return replace(whole, cases=tuple(record for id_ in ids for record in records[id_]))


def briefs(files: Sequence[Path], left_out: list[str]) -> Iterator[Brief]:
    """The brief of each of ``files``, in their order; unreadable files add a line to ``left_out`` instead."""
    made = _read(files) if len(files) < KEPT_FROM else _kept_or_read(files)
    for file, brief in zip(files, made, strict=True):
        if isinstance(brief, str):
            left_out.append(brief)
        else:
            yield replace(brief, run=replace(brief.run, path=file))


def _read(files: Iterable[Path]) -> Iterator[Brief | str]:
    for file in files:
        try:
            yield brief_of(read_run(file))
        except GaugeError as error:
            yield str(error)


def _kept_or_read(files: Sequence[Path]) -> Iterator[Brief | str]:
    unpacked = Unpacking()
    with KeptBriefs(paths.cache() / "histories" / "briefs.sqlite") as kept:
        keys = list(map(key_of, files))  # before anything is read: a file that is replaced meanwhile has another key
        known = [key is not None and kept.has(key) for key in keys]
        there = [file for file, key, is_known in zip(files, keys, known, strict=True) if key and not is_known]
        new = _made(there)
        for file, key, is_known in zip(files, keys, known, strict=True):
            found: bytes | str | None = None
            if key is not None:
                found = kept.get(key) if is_known else next(new)
            if found is None or key is None:  # another process removed it since, or the file has no size and time
                yield from _read([file])
                continue
            if not is_known and isinstance(found, bytes):
                kept.put(key, found)
            yield found if isinstance(found, str) else unpacked(found)


# Reading by several processes


def _made(files: Sequence[Path]) -> Iterator[bytes | str]:
    """The brief of each of ``files`` as it is kept, or why it cannot be read. Many are read by a process per core."""
    batches = [files[start : start + BATCH] for start in range(0, len(files), BATCH)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(cores, MOST_PROCESSES)
    if len(files) < SHARED_FROM or processes < 2:
        for batch in batches:
            yield from _pack(batch)
        return
    # Spawned, since this process may have threads, which a fork would lose with their locks held.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running: deque[Future[list[bytes | str]]] = deque()
        for batch in batches:
            running.append(pool.submit(_pack, batch))
            if len(running) > 4 * processes:  # no more briefs wait in memory than this
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()


@no_collector()
def _pack(files: Iterable[Path]) -> list[bytes | str]:
    return [each if isinstance(each, str) else packed(each) for each in _read(files)]


# Kept briefs


class KeptBriefs:
    """Briefs in the SQLite file ``file``, as bytes. An unusable file keeps nothing; a damaged one is removed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._connection: sqlite3.Connection | None = None
        self._put = 0

    def __enter__(self) -> Self:
        with suppress(OSError), self._damage_removed():
            self._file.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self._file, timeout=WAIT_SECONDS)
            # Content that a crash of the machine loses is read again.
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS brief"
                " (path TEXT PRIMARY KEY, size INTEGER, changed INTEGER, code TEXT, content BLOB)"
            )
            self._connection = connection
        return self

    def __exit__(self, *_: object) -> None:
        if self._connection is not None:
            with self._damage_removed():
                if self._put:
                    self._forget_lost()
                self._connection.commit()
            self._connection.close()

    def has(self, key: Key) -> bool:
        """Whether the brief with this key is kept."""
        return self._row("1", key) is not None

    def get(self, key: Key) -> bytes | None:
        """The brief with this key, if it is kept."""
        row = self._row("content", key)
        return None if row is None else row[0]

    def put(self, key: Key, content: bytes) -> None:
        """Keep ``content``; it replaces what was kept of the same file."""
        if self._connection is None:
            return
        with self._damage_removed():
            self._connection.execute("INSERT OR REPLACE INTO brief VALUES (?, ?, ?, ?, ?)", (*key, content))
            self._put += 1
            if self._put % COMMITTED == 0:  # so that another process waits for a moment only
                self._connection.commit()

    def _row(self, column: str, key: Key) -> tuple[Any, ...] | None:
        found: tuple[Any, ...] | None = None
        if self._connection is not None:
            with self._damage_removed():
                query = f"SELECT {column} FROM brief WHERE path = ? AND size = ? AND changed = ? AND code = ?"
                found = self._connection.execute(query, key).fetchone()
        return found

    def _forget_lost(self) -> None:
        """Remove briefs of files that are gone, and those made by other code."""
        assert self._connection is not None
        rows = self._connection.execute("SELECT path, code FROM brief").fetchall()
        lost = [(path,) for path, code in rows if code != present_code() or not Path(path).exists()]
        self._connection.executemany("DELETE FROM brief WHERE path = ?", lost)

    @contextmanager
    def _damage_removed(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError:  # locked by another process, read-only, or the disk is full
            pass
        except sqlite3.DatabaseError:
            self._connection = None
            with suppress(OSError):
                self._file.unlink()


def key_of(file: Path) -> Key | None:
    """The key of a run's brief: path, size, time of change, and the code that makes it; ``None`` for a missing file,
    and for one at an address, whose copy here may be older than the address."""
    if store.address_of(file) is not None:
        return None
    try:
        status = file.stat()
        return str(file.resolve()), status.st_size, status.st_mtime_ns, present_code()
    except OSError:
        return None


@cache
def present_code() -> str:
    """A digest of the code that makes briefs."""
    code = hashlib.sha256()
    for name in MADE_BY:
        code.update((Path(__file__).parent / name).read_bytes())
    return code.hexdigest()
