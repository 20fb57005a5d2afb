"""A long-lived process in an environment that takes training steps on request.

Requests and responses are lines of JSON on the child's standard input and its original standard output; library output
goes to a file, whose last line is part of the message if the child dies. The child has its own session: Ctrl-C reaches
only the parent, which kills the child's process group. If the parent dies, the child reads the end of its input and
ends. It is never forked from a preloaded process (`peft_gauge.isolation.fork_server`): its libraries differ, and
differences in memory layout between processes are part of the comparison.

Run as a program, this module is the child.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packaging.requirements import Requirement

from peft_gauge.collector import end_quickly
from peft_gauge.environments.build import Environment, NoEnvironment
from peft_gauge.errors import GaugeError, one_line
from peft_gauge.isolation.signals import kill_group, signal_name

if TYPE_CHECKING:
    from peft_gauge.training.loops import Loop
    from peft_gauge.training.precision import MixedPrecision
    from peft_gauge.training.step import TrainingJob

START_SECONDS = 120.0  # imports from a cold disk
BUILD_SECONDS = 600.0
STEP_SECONDS = 300.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
THREADS = Path("/proc/self/task")  # threads of this process; Linux only, as is affinity

Failure = Literal["failed", "crashed", "timed-out"]


@dataclass(frozen=True)
class CaseSpec:
    """A case by names, as each side builds it; see `peft_gauge.training.cases.Case` for the fields.

    What is not given here, each side's trainer decides: an upgrade can change a default, too.
    """

    model: str
    method: str
    batch: int
    seq: int
    device: str
    dtype: str
    seed: int = 0
    mixed_precision: MixedPrecision | None = None
    loop: Loop = "plain"
    trainer_arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def id(self) -> str:
        return f"{self.method}-{self.model.replace('/', '--')}-{self.device}"


class WorkerFailed(Exception):
    """A request failed: ``failed`` (refused, with a reason), ``crashed`` or ``timed-out``."""

    def __init__(self, outcome: Failure, reason: str) -> None:
        super().__init__(reason)
        self.outcome, self.reason = outcome, one_line(reason)


# The parent's side ---------------------------------------------------------------------------------------------------


class Worker:
    """A child in ``environment`` with ``threads`` threads; a context manager that kills the child at the end.

    ``cores``: cores it may run on, ``None`` for all; ``program``: the module that the child runs.
    """

    def __init__(
        self,
        environment: Environment,
        *,
        threads: int = 1,
        cores: Collection[int] | None = None,
        program: str = __name__,
    ) -> None:
        self.environment = environment
        self._cores = cores
        self._folder = tempfile.TemporaryDirectory(prefix="peft-gauge-", ignore_cleanup_errors=True)
        self._output = Path(self._folder.name) / "output.txt"
        variables = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
        try:
            with self._output.open("wb") as output:
                # -P: another checkout in the working directory must not come before this one.
                self._child = subprocess.Popen(
                    [sys.executable, "-P", "-u", "-m", program],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    env={**variables, "PYTHONPATH": environment.path()},
                    start_new_session=True,
                )
        except OSError as error:
            self._folder.cleanup()
            raise GaugeError(f"cannot start the interpreter {sys.executable}: {error.strerror or error}") from error

    @property
    def pid(self) -> int:
        return self._child.pid

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *ending: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the child and all processes it started."""
        self._kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._folder.cleanup()

    def start(self, also: Iterable[str] = ()) -> dict[str, Any]:
        """The child's `machine_info`; its libraries include the overlay's packages and ``also``.

        Raises `NoEnvironment` if the child does not find the versions that the side requires.
        """
        try:
            told: dict[str, Any] = self._ask(
                START_SECONDS,
                "start",
                requirements=self.environment.side.requirements,
                packages=dict(self.environment.packages),
                cores=None if self._cores is None else sorted(self._cores),
                also=sorted(also),
            )
        except WorkerFailed as failure:
            raise NoEnvironment(f"{self.environment.side.name}: {failure.reason}") from failure
        return told

    def describe(self, case: CaseSpec) -> dict[str, Any]:
        """The deterministic metrics of ``case``; see `_Child.describe`."""
        return dict(self._ask(BUILD_SECONDS, "describe", **asdict(case)))

    def build(self, case: CaseSpec) -> None:
        """Build ``case`` anew, ready to step, in place of the previous one."""
        self._ask(BUILD_SECONDS, "build", **asdict(case))

    def step(self) -> float:
        """Take one training step of the case built last; returns seconds, by the device's clock if it has one."""
        return float(self._ask(STEP_SECONDS, "step"))

    def _ask(self, limit_seconds: float, what: str, **arguments: Any) -> Any:
        """The child's response; raises `WorkerFailed` if there is none."""
        timer = threading.Timer(limit_seconds, self._kill)
        timer.daemon = True
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # a dead child is detected by the missing response
                self._child.stdin.write(json.dumps([what, arguments]).encode() + b"\n")
                self._child.stdin.flush()
            line = self._child.stdout.readline()
        finally:
            late = not timer.is_alive()
            timer.cancel()
        if not line.endswith(b"\n"):
            raise self._death(f"did not {what} within {limit_seconds:g} s" if late else None)
        answer = json.loads(line)
        if "failed" in answer:
            raise WorkerFailed(*answer["failed"])
        return answer["value"]

    def _kill(self) -> None:
        if self._child.returncode is None:  # else its number may be another process's by now
            kill_group(self._child.pid)

    def _death(self, late: str | None) -> WorkerFailed:
        self._kill()
        code = self._child.wait()
        if late is not None:
            return WorkerFailed("timed-out", late)
        ended = f"killed by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        lines = [line for line in self._output.read_text(errors="replace").splitlines() if line.strip()]
        return WorkerFailed("crashed", f"{ended}; last output: {one_line(lines[-1], 200)}" if lines else ended)


def quietest_cores(threads: int) -> frozenset[int] | None:
    """The ``threads`` least busy cores, for both sides to share; ``None`` where affinity is unavailable.

    With separate cores one side can have a busy neighbour and the other not: the interval of 200 pairs with the same
    code was then up to ±7 % wide, and never more than ±1.4 % on shared cores.
    """
    import psutil

    if not (hasattr(os, "sched_setaffinity") and THREADS.is_dir()):  # macOS
        return None
    allowed = os.sched_getaffinity(0)
    if threads >= len(allowed):
        return None
    busy = dict(enumerate(psutil.cpu_percent(interval=0.3, percpu=True)))
    return frozenset(sorted(allowed, key=lambda core: (busy.get(core, 0.0), core))[:threads])


# The child's side ----------------------------------------------------------------------------------------------------


class _Child:
    def __init__(self) -> None:
        self._packages: Mapping[str, str] = {}
        self._cores: Collection[int] | None = None
        self._take_step: Callable[[], float] | None = None
        self._job: TrainingJob | None = None

    def start(
        self,
        requirements: Iterable[str],
        packages: Mapping[str, str],
        cores: Collection[int] | None,
        also: Iterable[str],
    ) -> dict[str, Any]:
        self._packages, self._cores = packages, cores
        check_versions(requirements, packages)
        from peft_gauge.machine import machine_info

        info = machine_info()
        return {**info, "libraries": {**info["libraries"], **{name: _version(name) for name in (*packages, *also)}}}

    def describe(self, **names: Any) -> dict[str, Any]:
        """The case's description (`cases.described`), ``trainable_params``, ``fingerprint``, ``allocated_peak_bytes``
        and ``flops_per_step`` (absent unless all FLOPs are known)."""
        from peft_gauge.counting import count
        from peft_gauge.fingerprint import fingerprint
        from peft_gauge.training.cases import described

        case, job = self._built(names)
        record = fingerprint(job)
        metrics = {**described(case, job), "trainable_params": count(job.model).trainable_params}
        return {**metrics, **_with_direction(record), "fingerprint": record}

    def build(self, **names: Any) -> None:
        from peft_gauge.clock.rounds import Stopwatch

        case, job = self._built(names)
        self._take_step = _timed_step(job, Stopwatch(case.device))
        if self._cores is not None:
            keep_to(self._cores)

    def step(self) -> float:
        assert self._take_step is not None, "a case is built before it steps"
        return self._take_step()

    def _built(self, names: Mapping[str, Any]) -> tuple[Any, TrainingJob]:
        from peft_gauge.training.cases import build_job

        case = _case(CaseSpec(**names))
        if self._job is not None:
            self._job.close()
        self._take_step = self._job = None
        gc.collect()
        job = self._job = build_job(case)
        check_imports(self._packages)
        return case, job


def keep_to(cores: Collection[int]) -> None:
    """Pin every thread of this process, and the threads they start, to ``cores``.

    Done after the imports, which both sides do at the same time on any core.
    """
    for thread in THREADS.iterdir():
        with contextlib.suppress(ProcessLookupError):  # the thread has ended
            os.sched_setaffinity(int(thread.name), cores)


def _case(spec: CaseSpec) -> Any:
    from peft_gauge.training import methods, models
    from peft_gauge.training.cases import Case
    from peft_gauge.training.loops import step_settings

    record = models.resolve(spec.model, seed=spec.seed)
    precision = {"mixed_precision": spec.mixed_precision} if spec.mixed_precision else {}
    fields = {"batch": spec.batch, "seq": spec.seq, **precision}
    settings, further = step_settings(spec.loop, fields, spec.trainer_arguments)
    method = methods.get(spec.method)
    return Case(record, method, settings, spec.device, spec.dtype, spec.seed, loop=spec.loop, trainer_arguments=further)


def _timed_step(job: TrainingJob, stopwatch: Any) -> Callable[[], float]:
    def take() -> float:
        seconds: float = stopwatch.time(job.step).seconds
        job.clear()
        return seconds

    return take


def _with_direction(record: Mapping[str, Any]) -> dict[str, int]:
    """Totals of a fingerprint for which less is better."""
    flops = {"flops_per_step": sum(sum(each.values()) for each in record["flops"].values())}
    return {"allocated_peak_bytes": record["peak_bytes"]["total"], **(flops if record["flops_complete"] else {})}


def check_versions(requirements: Iterable[str], packages: Mapping[str, str]) -> None:
    """Raise `GaugeError` unless this process finds the overlay's ``packages`` and meets the ``requirements``."""
    for name, version in packages.items():
        found = _version(name)
        if found != version:
            raise GaugeError(f"installed {name} {version}, but {found or 'none'} comes first on the path")
    for requirement in map(Requirement, requirements):
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            raise GaugeError(f"{requirement} is required, but {requirement.name} {found or 'is missing'} is found")


def check_imports(packages: Mapping[str, str]) -> None:
    """Raise `GaugeError` if a module of ``packages`` was imported from outside its distribution's folder.

    Metadata and modules are found separately: an editable installation's hook could serve another version's module.
    """
    for name in packages:
        distribution = metadata.distribution(name)
        home = Path(str(distribution.locate_file(""))).resolve()
        for module in {file.parts[0] for file in distribution.files or () if len(file.parts) > 1}:
            origin = getattr(sys.modules.get(module), "__file__", None)
            if origin is not None and not Path(origin).resolve().is_relative_to(home):
                raise GaugeError(f"{name} was installed in {home}, but {module} was imported from {origin}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _answer(child: Any, line: str) -> str:
    what, arguments = json.loads(line)
    try:
        return json.dumps({"value": getattr(child, what)(**arguments)}, allow_nan=False)
    except GaugeError as error:
        failed = ["failed", str(error)]
    except Exception as error:  # reported to the parent as a failed case
        failed = ["crashed", f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"]
    return json.dumps({"failed": failed})


def serve(child: Any) -> None:
    """Respond on standard output until the input ends; library output goes to standard error instead."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        for line in sys.stdin:
            answers.write(_answer(child, line) + "\n")
            answers.flush()


if __name__ == "__main__":
    end_quickly()
    serve(_Child())
