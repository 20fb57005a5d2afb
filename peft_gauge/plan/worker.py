"""Plans run in a process of their own: tracing a step on fake tensors has ended in a native crash before.

One worker plans case after case, so that the libraries are imported once. Where it dies, the case it was at becomes
an error and a fresh worker takes the rest. Run as a program, this module is that worker: pickled requests on standard
input, pickled outcomes on standard output, each as soon as it is known.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from peft_gauge.errors import GaugeError
from peft_gauge.plan.record import PlanFailure

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from peft_gauge.plan.record import Outcome, PlanRequest

PACKAGE_PARENT = Path(__file__).resolve().parents[2]
WORKER = (sys.executable, "-m", "peft_gauge.plan.worker")


def plan_all(requests: Sequence[PlanRequest], *, find: str | None = None) -> Iterator[Outcome]:
    """The outcomes of ``requests``, in their order; with ``find`` (batch, seq, rank) one `Found` a GPU of each.

    A case that cannot be planned, or that ends its worker, is a `PlanFailure`; the others go on.
    """
    done = 0
    while done < len(requests):
        worker = _start(requests[done:], find)
        try:
            for outcomes in _outcomes(worker):
                done += 1
                yield from outcomes
        except BaseException:  # interrupted, or nobody asks for the rest
            worker.kill()
            raise
        finally:
            code = worker.wait()
        if done < len(requests):
            request = requests[done]
            yield PlanFailure(request.model.name, request.method.name, f"planning {request.name} {_ended(code)}")
            done += 1


def plan_in_parallel(requests: Sequence[PlanRequest], *, workers: int | None = None) -> list[Outcome]:
    """The outcomes of ``requests``, in their order, planned by several processes (by default one a core).

    Tracing a step is Python on one core, and each worker pays for its imports once.
    """
    if not requests:
        return []
    number = max(1, min(workers or os.cpu_count() or 1, len(requests)))
    with ThreadPoolExecutor(number) as pool:
        shares = list(pool.map(lambda start: list(plan_all(requests[start::number])), range(number)))
    return [shares[index % number][index // number] for index in range(len(requests))]


def _start(requests: Sequence[PlanRequest], find: str | None) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, (str(PACKAGE_PARENT), os.environ.get("PYTHONPATH"))))
    worker = subprocess.Popen(
        WORKER,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # transformers sets its logger's level anew when it is imported, from this variable.
        env={"TRANSFORMERS_VERBOSITY": "error", **os.environ, "PYTHONPATH": path},
    )
    assert worker.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once; its exit code, read later, says why
        pickle.dump((tuple(requests), find), worker.stdin)
        worker.stdin.close()
    return worker


def _outcomes(worker: subprocess.Popen[bytes]) -> Iterator[list[Outcome]]:
    assert worker.stdout is not None
    try:
        while True:
            try:
                yield pickle.load(worker.stdout)
            except (EOFError, pickle.UnpicklingError):  # its end, or its end in the middle of an outcome
                return
    finally:
        worker.stdout.close()


def _ended(code: int) -> str:
    if code < 0:
        return f"ended the planning process by signal {signal.Signals(-code).name}"
    return f"ended the planning process with exit code {code}; its last words are above"


def _outcome(request: PlanRequest, find: str | None) -> list[Outcome]:
    from peft_gauge.plan.planner import plan
    from peft_gauge.plan.search import find_each

    try:
        return [plan(request)] if find is None else [*find_each(request, find, plan)]
    except GaugeError as error:
        return [PlanFailure(request.model.name, request.method.name, str(error))]


def serve(requests: Sequence[PlanRequest], find: str | None, out: BinaryIO) -> None:
    """Plan each request and write its outcomes to ``out``."""
    for request in requests:
        pickle.dump(_outcome(request, find), out)
        out.flush()


def main() -> None:
    """The worker's side. Whatever a library prints goes to standard error: standard output carries the outcomes."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    requests, find = pickle.load(sys.stdin.buffer)
    _quiet()
    gc.freeze()  # what is imported by now is no garbage, and need not be looked through again
    serve(requests, find, out)


def _quiet() -> None:
    """bitsandbytes and transformers log advice on training that a plan does not need."""
    import logging

    for name in ("bitsandbytes", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
