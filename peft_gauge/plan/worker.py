"""Plan in separate processes: tracing a step on fake tensors can end in a native crash.

One worker plans case after case, so that the libraries are imported once. If it dies, its current case becomes
an error and a new worker takes the rest. Run as a program, this module is that worker: pickled requests on standard
input, pickled outcomes on standard output, each as soon as it is known.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from peft_gauge.collector import end_quickly, no_collector
from peft_gauge.errors import GaugeError
from peft_gauge.isolation import fork_server
from peft_gauge.isolation.fork_server import CannotFork, Forked
from peft_gauge.isolation.signals import signal_name
from peft_gauge.plan.record import PlanFailure
from peft_gauge.plan.search import Tried

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from peft_gauge.plan.record import PlanOutcome, PlanRequest

    Waiting = Callable[[int, int], object]
    """Receives the number of finished requests and of all."""
    Searching = Callable[[int, Tried], object]
    """Receives the number of finished requests, and how far the search of the next one is."""

PACKAGE_PARENT = Path(__file__).resolve().parents[2]
WORKER = (sys.executable, "-m", "peft_gauge.plan.worker")
IMPORT_SECONDS = 120.0  # from a cold disk
WAITING_SECONDS = 0.5


@dataclass(frozen=True)
class Preloaded:
    """A fork server for planning: the modules that it imports, and its environment."""

    modules: Sequence[str]
    environment: Mapping[str, str]


def plan_all(
    requests: Sequence[PlanRequest], *, find: str | None = None, searching: Searching | None = None
) -> Iterator[PlanOutcome]:
    """The outcomes of ``requests``, in their order; with ``find`` (batch, seq, rank) one `Found` per GPU of each.

    A case that cannot be planned, or that ends its worker, is a `PlanFailure`; the others continue. ``searching`` is
    called before each plan of a search.
    """
    return _plan_all(requests, find, None, _Crew(), searching)


def _plan_all(
    requests: Sequence[PlanRequest],
    find: str | None,
    preloaded: Preloaded | None,
    crew: _Crew,
    searching: Searching | None = None,
) -> Iterator[PlanOutcome]:
    done = 0
    while done < len(requests):
        worker = _start(requests[done:], find, preloaded)
        crew.add(worker)
        try:
            for received in _received(worker):
                if not isinstance(received, Tried):
                    done += 1
                    yield from received
                elif searching is not None:
                    searching(done, received)
        except BaseException:  # interrupted, or the caller stopped iterating
            worker.kill()
            raise
        finally:
            code = worker.wait()
            crew.remove(worker)
        if crew.dismissed:
            return
        if done < len(requests):
            request = requests[done]
            yield PlanFailure(request.model.name, request.method.name, f"planning {request.name} {_ended(code)}")
            done += 1


def plan_in_parallel(
    requests: Sequence[PlanRequest],
    *,
    workers: int | None = None,
    preloaded: Preloaded | None = None,
    waiting: Waiting | None = None,
) -> list[PlanOutcome]:
    """The outcomes of ``requests``, in their order, planned by several processes (`Planning`)."""
    planning = Planning(requests, workers=workers, preloaded=preloaded)
    try:
        return [planning.outcome(index, waiting) for index in range(len(requests))]
    finally:  # Ctrl-C reaches only this thread
        planning.end()


class Planning:
    """Requests that several processes (by default one per core) plan while the caller goes on.

    Tracing a step is Python on one core. Each worker imports the libraries once, unless it can be forked from
    ``preloaded``. `end` must be called, or the processes outlive their use.
    """

    def __init__(
        self, requests: Sequence[PlanRequest], *, workers: int | None = None, preloaded: Preloaded | None = None
    ) -> None:
        self._outcomes: list[Future[PlanOutcome]] = [Future() for _ in requests]
        self._crew = _Crew()
        number = max(1, min(workers or os.cpu_count() or 1, len(requests)))
        self._threads = [
            threading.Thread(
                target=self._plan, args=(requests[start::number], self._outcomes[start::number], preloaded)
            )
            for start in range(number if requests else 0)
        ]
        for thread in self._threads:
            thread.start()

    def _plan(
        self, requests: Sequence[PlanRequest], outcomes: Sequence[Future[PlanOutcome]], preloaded: Preloaded | None
    ) -> None:
        try:
            # Not strict: a dismissed crew leaves the rest out.
            for outcome, future in zip(_plan_all(requests, None, preloaded, self._crew), outcomes, strict=False):
                future.set_result(outcome)
        except BaseException as error:
            for future in outcomes:
                if not future.done():
                    future.set_exception(error)
        for future in outcomes:
            future.cancel()  # without effect on those that are done

    def outcome(self, index: int, waiting: Waiting | None = None) -> PlanOutcome:
        """Wait for the outcome of the request with this index; meanwhile, ``waiting`` is called with the number of
        requests that are done, and of all, every `WAITING_SECONDS`."""
        future = self._outcomes[index]
        while waiting is not None and not wait([future], WAITING_SECONDS).done:
            waiting(sum(each.done() for each in self._outcomes), len(self._outcomes))
        return future.result()

    def end(self) -> None:
        """Kill the processes that still plan, and wait for them."""
        self._crew.dismiss()
        for thread in self._threads:
            thread.join()


class _Worker:
    """A planning process, and its standard input and output."""

    def __init__(self, process: subprocess.Popen[bytes] | Forked, stdin: BinaryIO, stdout: BinaryIO) -> None:
        self._process = process
        self.stdin = stdin
        self.stdout = stdout

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int | None:
        """Its exit code, or minus the signal that ended it; ``None`` if its fork server ended first."""
        code = self._process.wait()
        if isinstance(self._process, Forked):
            self._process.close()
        return code


class _Crew:
    """Workers that another thread can end; they are not replaced then."""

    def __init__(self) -> None:
        self._workers: set[_Worker] = set()
        self._lock = threading.Lock()
        self.dismissed = False

    def add(self, worker: _Worker) -> None:
        with self._lock:
            self._workers.add(worker)
            if self.dismissed:
                worker.kill()

    def remove(self, worker: _Worker) -> None:
        with self._lock:
            self._workers.discard(worker)

    def dismiss(self) -> None:
        with self._lock:
            self.dismissed = True
            for worker in self._workers:
                worker.kill()


def _start(requests: Sequence[PlanRequest], find: str | None, preloaded: Preloaded | None) -> _Worker:
    try:
        worker = _spawn() if preloaded is None else _fork(preloaded)
    except CannotFork:
        worker = _spawn()
    with contextlib.suppress(BrokenPipeError), worker.stdin:  # it died at once; its exit code, read later, shows why
        pickle.dump((tuple(requests), find), worker.stdin)
    return worker


def _spawn() -> _Worker:
    path = os.pathsep.join(filter(None, (str(PACKAGE_PARENT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        WORKER,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # transformers sets its logger's level from this variable when it is imported.
        env={"TRANSFORMERS_VERBOSITY": "error", **os.environ, "PYTHONPATH": path},
    )
    return _Worker(process, cast("BinaryIO", process.stdin), cast("BinaryIO", process.stdout))


def _fork(preloaded: Preloaded) -> _Worker:
    its_input, ours = os.pipe()
    output, its_output = os.pipe()
    try:
        process = fork_server.start(
            f"{__name__}:main",
            preload=preloaded.modules,
            environment=preloaded.environment,
            streams=(its_input, its_output, 2),
            limit_seconds=IMPORT_SECONDS,
        )
    except BaseException:
        os.close(ours)
        os.close(output)
        raise
    finally:
        os.close(its_input)
        os.close(its_output)
    return _Worker(process, os.fdopen(ours, "wb"), os.fdopen(output, "rb"))


def _received(worker: _Worker) -> Iterator[list[PlanOutcome] | Tried]:
    """The outcomes of one request after the other, and how far a search is."""
    try:
        while True:
            try:
                yield pickle.load(worker.stdout)
            except (EOFError, pickle.UnpicklingError):  # it ended, perhaps in the middle of an outcome
                return
    finally:
        worker.stdout.close()


def _ended(code: int | None) -> str:
    if code is None:
        return "ended because the fork server of its process was killed"
    if code < 0:
        return f"ended the planning process by {signal_name(-code)}"
    return f"ended the planning process with exit code {code}; its last output is above"


def _outcome(
    request: PlanRequest, find: str | None, tell: Callable[[Tried], object] = lambda tried: None
) -> list[PlanOutcome]:
    from peft_gauge.plan.planner import plan
    from peft_gauge.plan.search import find_each

    try:
        return [plan(request)] if find is None else [*find_each(request, find, plan, tell)]
    except GaugeError as error:
        return [PlanFailure(request.model.name, request.method.name, str(error))]


def serve(requests: Sequence[PlanRequest], find: str | None, out: BinaryIO) -> None:
    """Plan each request and write its outcomes to ``out``; before each plan of a search, how far that is."""

    def write(value: list[PlanOutcome] | Tried) -> None:
        pickle.dump(value, out)
        out.flush()

    for request in requests:
        write(_outcome(request, find, write))


def main() -> None:
    """Run the worker. All library output goes to standard error: standard output carries the outcomes."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    end_quickly()
    with no_collector():
        requests, find = pickle.load(sys.stdin.buffer)
        quiet()
    gc.freeze()  # imported objects are not garbage; exclude them from collection
    serve(requests, find, out)


def quiet() -> None:
    """Silence bitsandbytes' and transformers' advice on training, which a plan does not need."""
    import logging

    for name in ("bitsandbytes", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
