"""The workload of a session: the steps to plan and the cases to measure, built once from the collected tests.

Tests declare their needs with markers, independent of the names of tests and files:

- ``measures(*passes, shapes=False)``: the passes that the process of a test's case runs. ``passes``: any of `PASSES`;
  none if the test only reads how the case was built. ``shapes``: measure the case's peak at further shapes too.
  Several markers, for example on a module and a function, add up. Every test that uses the fixture `measured` has one.
- ``plans(steps=function)``: the function returns the training steps (`PlanRequest`) whose plans the test will use. Its
  parameters are parameters of the test, by name, and ``config`` for pytest's own. These steps are planned together, on
  all cores, as the session begins; a step that no marker names is planned when the test needs it.
- ``claim(id)``: the claim that a test decides.
- ``untimed``: the test computes in pytest's own process, and no result of it depends on the machine's speed or memory.
  Such tests come first and use one thread, while the session's steps are planned on the other cores.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import get_args

import pytest

from peft_gauge import isolation, machine
from peft_gauge.clock.rounds import StoppingRule, WarmUp
from peft_gauge.errors import GaugeError
from peft_gauge.isolation import fork_server
from peft_gauge.measure import PRELOAD, Pass
from peft_gauge.memory import gpus
from peft_gauge.plan.record import PlanRequest
from peft_gauge.pytest_plugin.selection import case_of
from peft_gauge.pytest_plugin.workers import process_environment
from peft_gauge.training.cases import BATCHES, Case

MEASURES, PLANS, CLAIM, UNTIMED = "measures", "plans", "claim", "untimed"
"""The names of the markers."""

PASSES = frozenset(get_args(Pass))

# Rounds on a CPU take longer and stay noisy; a default run has to end in minutes.
RULES = {"cpu": StoppingRule(min_rounds=5, max_rounds=25, budget_seconds=3.0), "cuda": StoppingRule()}
WARM_UPS = {"cpu": WarmUp(window=1, most=8, tolerance=0.15, budget_seconds=2.0), "cuda": WarmUp()}


@dataclass(frozen=True)
class Job:
    """A process that measures a case. With ``shapes`` it measures only further shapes: in a run with a budget, these
    wait until every step was measured."""

    case: Case
    shapes: bool = False


@dataclass(frozen=True)
class Asked:
    """The measurements that the tests of a session need of a case, in one process: ``passes``, and peaks at further
    ``shapes``, each a (batch, sequence length)."""

    job: Job
    passes: tuple[Pass, ...]
    shapes: tuple[tuple[int, int], ...]

    @property
    def case(self) -> Case:
        return self.job.case

    @property
    def steps(self) -> list[PlanRequest]:
        """The steps to plan: the case's own, then one per further shape."""
        case = self.case
        settings = [case.settings, *(replace(case.settings, batch=batch, seq=seq) for batch, seq in self.shapes)]
        cards = machine.accelerators() if case.device == "cuda" else ()
        names = (gpu_name(cards[0]),) if cards else ()
        return [
            PlanRequest(
                case.model,
                case.method,
                each,
                dtype=case.dtype,
                attention=case.attention,
                gpus=names,
                loop=case.loop,
                trainer_arguments=case.trainer_arguments,
            )
            for each in settings
        ]

    @property
    def tokens(self) -> int:
        own = (self.case.settings.batch, self.case.settings.seq)
        return BATCHES * max(batch * seq for batch, seq in (own, *self.shapes))


def gpu_name(card: machine.Accelerator) -> str:
    """The name by which plans look up the GPU. If the memory differs from the known GPU of that name (a MIG slice), or
    the name is unknown, it is the memory and the compute capability, on which workspaces and context depend."""
    major, minor = card.compute_capability
    by_size = f"{card.memory_bytes} sm_{major}{minor}"
    try:
        known = gpus.lookup(card.name)
    except GaugeError:
        return by_size
    # Drivers differ by some hundred KiB.
    return card.name if known.usable_bytes <= 1.01 * card.memory_bytes else by_size


@dataclass(frozen=True)
class Workload:
    """The plans and measurements of a session.

    Fields:
        processes: the measurements of each process, by job, in the order of the tests. A job whose tests are all
            skipped has no process.
        tests: the tests that use each job, in their order, skipped ones included.
        others: the tests without such a process, in their order.
        claims: ids of the claims that a test of the session decides.
    """

    processes: Mapping[Job, Asked]
    tests: Mapping[Job, Sequence[pytest.Item]]
    others: Sequence[pytest.Item]
    claims: frozenset[str]
    _named: Sequence[Callable[[], Iterable[PlanRequest]]] = ()

    @classmethod
    def of(cls, items: Iterable[pytest.Item], *, split: bool = False) -> Workload:
        """The workload of ``items``, whose markers are valid (`check_markers`).

        ``split``: further shapes are measured in a process of their own (`is_split`).
        """
        tests: dict[Job, list[pytest.Item]] = {}
        others: list[pytest.Item] = []
        claims: set[str] = set()
        named: list[Callable[[], Iterable[PlanRequest]]] = []
        for item in items:
            job = job_of(item, split=split)
            (others if job is None else tests.setdefault(job, [])).append(item)
            claims |= {str(name) for marker in item.iter_markers(CLAIM) for name in marker.args}
            if not _is_skipped(item):
                named += [_with_parameters(marker.kwargs["steps"], item) for marker in item.iter_markers(PLANS)]
        needed = {job: [item for item in own if not _is_skipped(item)] for job, own in tests.items()}
        processes = {job: _asked(job, own) for job, own in needed.items() if own}
        return cls(processes, tests, others, frozenset(claims), named)

    @cached_property
    def steps(self) -> tuple[PlanRequest, ...]:
        """All steps to plan together with the first, each once: those that tests name, and those that processes
        measure. With a budget, the steps of further shapes wait, since many budgets end before them."""
        found: list[PlanRequest] = []
        for steps in self._named:
            with suppress(GaugeError):  # the test itself reports it
                found += steps()
        found += [step for asked in self.processes.values() if not asked.job.shapes for step in asked.steps]
        return tuple(dict.fromkeys(found))


WORKLOAD = pytest.StashKey[Workload]()
"""The session's workload, once its tests are collected; tests get it from the fixture `workload`."""

TIMEKEEPERS = pytest.StashKey[tuple[Callable[[Job, float], None], ...]]()
"""Callbacks that receive each job with the seconds that its process took."""


@pytest.fixture(scope="session")
def workload(request: pytest.FixtureRequest) -> Workload:
    """The plans and measurements of this session."""
    return request.config.stash[WORKLOAD]


def is_split(config: pytest.Config) -> bool:
    """Whether further shapes are measured in a process of their own."""
    return config.getoption("--budget") is not None


def start_imports_of_all(config: pytest.Config) -> None:
    """As `start_imports`, before tests are collected: a run of the folder of all benchmarks measures some case, unless
    it selects tests by their names."""
    is_whole = [Path(each).name for each in config.args] == ["benchmarks"] and not config.option.keyword
    is_here = not config.option.collectonly and not config.getoption("numprocesses", None)
    if is_whole and is_here:
        _start_imports(config)


def start_imports(config: pytest.Config, found: Workload) -> None:
    """If this session's cases will be forked, start importing their libraries while the first tests run."""
    if found.processes:
        _start_imports(config)


def _start_imports(config: pytest.Config) -> None:
    if config.getoption("--processes") == 1:  # several of a case are new interpreters
        fork_server.prepare(PRELOAD, isolation.child_environment(process_environment()))


# One test


def is_untimed(item: pytest.Item) -> bool:
    """Whether ``item`` may run while steps are planned on other cores."""
    return any(item.iter_markers(UNTIMED))


def rank_beside_plans(item: pytest.Item) -> int:
    """The place of ``item`` in a session: untimed tests first, those without plans before those that wait for one."""
    if not is_untimed(item):
        return 2
    return 1 if _needs_plans(item) else 0


def job_of(item: pytest.Item, *, split: bool) -> Job | None:
    """The process that ``item`` needs; ``None`` if it needs none, or has no case of the session, such as calibration
    tests."""
    case = case_of(item) if _uses_measured(item) else None
    return None if case is None else Job(case, split and _needs_shapes(item))


def passes_of(item: pytest.Item) -> set[Pass]:
    """The passes that the process of the item's case runs for it, from its markers."""
    return {name for marker in item.iter_markers(MEASURES) for name in marker.args}


def check_markers(item: pytest.Item) -> None:
    """Raise `pytest.UsageError` if the markers of ``item`` are invalid, or do not name the passes for
    `measured`."""
    markers = [*item.iter_markers(MEASURES)]
    for marker in markers:
        wrong = [*(each for each in marker.args if each not in PASSES), *(marker.kwargs.keys() - {"shapes"})]
        if wrong:
            known = f"{', '.join(sorted(PASSES))}, and shapes=True"
            raise pytest.UsageError(f"{item.nodeid}: the marker {MEASURES} knows {known}, not {wrong[0]!r}")
    if _uses_measured(item) and not markers:
        raise pytest.UsageError(
            f"{item.nodeid} uses measured without naming its passes: "
            f"mark it pytest.mark.{MEASURES}(…) with those it needs of {', '.join(sorted(PASSES))}"
        )
    if is_untimed(item) and _uses_measured(item):
        raise pytest.UsageError(f"{item.nodeid} measures a case: it cannot be marked {UNTIMED}")
    for marker in item.iter_markers(PLANS):
        if marker.args or marker.kwargs.keys() != {"steps"} or not callable(marker.kwargs["steps"]):
            raise pytest.UsageError(
                f"{item.nodeid}: the marker {PLANS} takes steps=FUNCTION, which returns plan requests"
            )
        unknown = inspect.signature(marker.kwargs["steps"]).parameters.keys() - _parameters(item).keys()
        if unknown:
            raise pytest.UsageError(
                f"{item.nodeid}: the function of its marker {PLANS} has a parameter {sorted(unknown)[0]!r}, which is "
                "neither a parameter of the test nor config"
            )


def _uses_measured(item: pytest.Item) -> bool:
    """Whether ``item`` uses the fixture `measured`, and not a parameter of its own with that name."""
    own = getattr(getattr(item, "callspec", None), "params", {})
    return "measured" in getattr(item, "fixturenames", ()) and "measured" not in own


def _needs_shapes(item: pytest.Item) -> bool:
    return any(marker.kwargs.get("shapes", False) for marker in item.iter_markers(MEASURES))


def _needs_plans(item: pytest.Item) -> bool:
    """Whether any of the item's markers names a step to plan."""
    for marker in item.iter_markers(PLANS):
        with suppress(GaugeError):  # the test itself reports it
            if [*_with_parameters(marker.kwargs["steps"], item)()]:
                return True
    return False


def _is_skipped(item: pytest.Item) -> bool:
    return item.get_closest_marker("skip") is not None


def _parameters(item: pytest.Item) -> dict[str, object]:
    return {**getattr(getattr(item, "callspec", None), "params", {}), "config": item.config}


def _with_parameters(
    steps: Callable[..., Iterable[PlanRequest]], item: pytest.Item
) -> Callable[[], Iterable[PlanRequest]]:
    given = _parameters(item)
    names = inspect.signature(steps).parameters
    return lambda: steps(**{name: given[name] for name in names})


def _asked(job: Job, items: Sequence[pytest.Item]) -> Asked:
    return Asked(
        job,
        tuple(sorted({name for item in items for name in passes_of(item)})),
        _other_shapes(job.case) if any(map(_needs_shapes, items)) else (),
    )


def _other_shapes(case: Case) -> tuple[tuple[int, int], ...]:
    """Three more corners of a rectangle: half the batch (twice, if it is 1), half the sequence, and both."""
    batch, seq = case.settings.batch, case.settings.seq
    other_batch = batch // 2 or 2
    other_seq = max(seq // 2, 2)
    return ((other_batch, seq), (batch, other_seq), (other_batch, other_seq))
