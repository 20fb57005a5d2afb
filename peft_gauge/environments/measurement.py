"""Measure a case on two sides: deterministic metrics from each, and a verdict on the step time.

The memory layout of a process makes its steps faster or slower for its whole life: two processes with the same code
differed by up to 2.5 %, which pairs of steps within them cannot detect. Therefore several pairs of fresh processes are
measured, and the verdict is based on their ratios.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from peft_gauge.clock.steadiness import host_state, host_unsteady
from peft_gauge.environments.pairs import PROCESS_PAIRS, Paired, PairRule, a_leads, over_processes, step_in_pairs
from peft_gauge.environments.worker import CaseSpec, Worker, WorkerFailed
from peft_gauge.history.intervals import MOST_FURTHER, Judgement
from peft_gauge.history.schema import SAMPLES, CaseRecord

if TYPE_CHECKING:
    from peft_gauge.environments.build import Environment

QUESTION = "ab"
STEP = "step_seconds"

Say = Callable[[str], object]
Answer = TypeVar("Answer")
Keep = Callable[[str, Sequence["ProcessPair"]], object]


@dataclass(frozen=True)
class MethodResult:
    """The result of a case on both sides.

    ``records``: A's and B's, each for a saved run; ``machines``: the `machine_info` of either side's process;
    ``judged``: the verdict on B / A, with ``note`` on how it was reached; ``None`` if a side did not run.
    """

    records: tuple[CaseRecord, CaseRecord]
    machines: tuple[Mapping[str, Any], Mapping[str, Any]]
    judged: Judgement | None
    note: str | None


@dataclass(frozen=True)
class ProcessPair:
    """The result of a case in one pair of processes.

    ``records`` and ``machines``: as in `MethodResult`; ``log_ratio``: logarithm of B's step time over A's, ``None``
    if a side did not run; ``lead``: log factor by which the first step of a pair is slower; ``a_first``: whether A was
    started first; ``unsteady``: disturbances of the host meanwhile (`peft_gauge.clock.steadiness.host_unsteady`);
    ``note``: any further remark.
    """

    records: tuple[CaseRecord, CaseRecord]
    machines: tuple[Mapping[str, Any], Mapping[str, Any]]
    a_first: bool
    log_ratio: float | None = None
    lead: float = 0.0
    unsteady: tuple[str, ...] = ()
    note: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "machines": [dict(machine) for machine in self.machines]}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> ProcessPair:
        """The inverse of `as_json`. Raises `KeyError`, `TypeError` or `ValueError` for an invalid value."""
        old, new = (CaseRecord(**record) for record in value["records"])
        machine_a, machine_b = value["machines"]
        if not isinstance(value["log_ratio"], float | None):
            raise TypeError("the ratio is not a number")
        told = {**value, "records": (old, new), "machines": (machine_a, machine_b)}
        return ProcessPair(**{**told, "unsteady": tuple(value["unsteady"])})


@dataclass(frozen=True)
class Setting:
    """How both sides run: ``threads`` each, on ``cores`` that they share, in children that run ``program``."""

    threads: int = 1
    cores: frozenset[int] | None = None
    program: str = "peft_gauge.environments.worker"

    def worker(self, environment: Environment) -> Worker:
        return Worker(environment, threads=self.threads, cores=self.cores, program=self.program)


def compare_case(
    environments: tuple[Environment, Environment],
    case: CaseSpec,
    rule: PairRule,
    setting: Setting,
    say: Say = lambda text: None,
) -> MethodResult:
    """``case`` on both sides; see `compare_cases`."""
    (finding,) = compare_cases(environments, [case], rule, setting, say)
    return finding


def compare_cases(
    environments: tuple[Environment, Environment],
    cases: Sequence[CaseSpec],
    rule: PairRule,
    setting: Setting,
    say: Say = lambda text: None,
    *,
    known: Mapping[str, Sequence[ProcessPair]] | None = None,
    keep: Keep = lambda case_id, found: None,
) -> Iterator[MethodResult]:
    """Measure each of ``cases`` on both sides; yields each as soon as its verdict is clear or all pairs are used up.

    A pair of processes measures all undecided cases in turn, since starting it takes several times as long as the
    steps of a case. ``say`` receives progress messages; ``keep`` receives a case's pairs after each new one; ``known``
    are pairs kept before an interruption.

    Raises `NoEnvironment` if a side's process does not find the requested versions. A side that cannot build a case or
    fails in a step is an outcome.
    """

    def decided(found: Sequence[ProcessPair]) -> MethodResult | None:
        return _decided(found, rule)

    yield from _measured(environments, cases, rule, setting, say, decided, PROCESS_PAIRS[-1], known or {}, keep)


def measure_pairs(
    environments: tuple[Environment, Environment],
    cases: Sequence[CaseSpec],
    count: int,
    rule: PairRule,
    setting: Setting,
    say: Say = lambda text: None,
    *,
    known: Mapping[str, Sequence[ProcessPair]] | None = None,
    keep: Keep = lambda case_id, found: None,
) -> Iterator[tuple[ProcessPair, ...]]:
    """``count`` pairs of processes for each of ``cases``, measured as by `compare_cases` but without a verdict.

    If a case does not run, its pairs end with the failed pair.
    """

    def complete(found: Sequence[ProcessPair]) -> tuple[ProcessPair, ...] | None:
        over = len(found) >= count or (found and found[-1].log_ratio is None)
        return tuple(found) if over else None

    yield from _measured(environments, cases, rule, setting, say, complete, count, known or {}, keep)


def _measured(
    environments: tuple[Environment, Environment],
    cases: Sequence[CaseSpec],
    rule: PairRule,
    setting: Setting,
    say: Say,
    answer: Callable[[Sequence[ProcessPair]], Answer | None],
    most: int,
    known: Mapping[str, Sequence[ProcessPair]],
    keep: Keep,
) -> Iterator[Answer]:
    """Yield ``answer`` of each case's pairs of processes as soon as it is not ``None``; at most ``most`` pairs."""
    found = {case.id: list(known.get(case.id, ())) for case in cases}
    left = []
    for case in cases:
        answered = answer(found[case.id])
        if answered is None:
            left.append(case)
        else:
            yield answered
    while left:
        number = min(len(found[case.id]) for case in left)
        # After an interruption some cases can be one pair ahead; they wait, since the pair's number sets the order.
        turn = [case for case in left if len(found[case.id]) == number]
        told = _numbered(say, number + 1, most)
        for case, each in _by_new_processes(environments, turn, number, rule, setting, told):
            found[case.id].append(each)
            keep(case.id, found[case.id])
            answered = answer(found[case.id])
            if answered is not None:
                left.remove(case)
                yield answered


def _numbered(say: Say, number: int, most: int) -> Say:
    return lambda text: say(f"processes {number} of at most {most}: {text}")


def _decided(found: Sequence[ProcessPair], rule: PairRule) -> MethodResult | None:
    """The finding over all pairs of processes, or ``None`` if more are needed."""
    if not found:
        return None
    if found[-1].log_ratio is None:  # a case that fails once is not valid, even if it ran before
        return MethodResult(found[-1].records, found[-1].machines, None, None)
    if len(found) not in PROCESS_PAIRS:
        return None
    judged = over_processes([each.log_ratio for each in found if each.log_ratio is not None], rule)
    if judged.verdict == "inconclusive" and len(found) < PROCESS_PAIRS[-1]:
        return None
    return _together(found, judged)


def _by_new_processes(
    environments: tuple[Environment, Environment],
    cases: Sequence[CaseSpec],
    number: int,
    rule: PairRule,
    setting: Setting,
    say: Say,
) -> Iterator[tuple[CaseSpec, ProcessPair]]:
    """Measure each case in the ``number``-th pair of processes (from 0), or in a new one after a failed case; the first
    pair also measures the deterministic metrics."""
    differing = {name for each in environments for name in each.packages}
    a_first = a_leads(number)
    left = list(cases)
    while left:
        say("starting both sides")
        with ExitStack() as stack:
            in_order = environments if a_first else environments[::-1]
            started = [stack.enter_context(setting.worker(environment)) for environment in in_order]
            a, b = started if a_first else started[::-1]
            machines = _both(lambda worker: worker.start(differing), a, b, a_first)
            broken = False
            while left and not broken:
                case = left.pop(0)
                told = _of_case(say, case)
                each = _once((a, b), machines, case, number == 0, a_first, rule.within_processes, told)
                broken = each.log_ratio is None
                yield case, each


def _of_case(say: Say, case: CaseSpec) -> Say:
    return lambda text: say(f"{case.method}: {text}")


def _together(found: Sequence[ProcessPair], judged: Judgement) -> MethodResult:
    """One finding from all pairs of processes."""
    records = [
        replace(
            found[0].records[side],
            metrics=found[0].records[side].metrics
            | {SAMPLES: {STEP: [each.records[side].metrics[SAMPLES][STEP][0] for each in found]}},
        )
        for side in (0, 1)
    ]
    notes = [f"{len(found)} pairs of processes"]
    if judged.further is not None:
        more = f"more than {MOST_FURTHER}" if judged.further > MOST_FURTHER else f"about {judged.further}"
        notes.append(f"{more} more would decide it")
    notes += sorted({each.note for each in found if each.note})
    unsteady = why_unsteady(found)
    notes += [] if unsteady is None else [unsteady]
    return MethodResult((records[0], records[1]), found[0].machines, judged, "; ".join(notes))


def why_unsteady(found: Sequence[ProcessPair]) -> str | None:
    """The host's disturbances while pairs of processes were measured, with details of the last; ``None`` if none."""
    unsteady = [each.unsteady for each in found if each.unsteady]
    if not unsteady:
        return None
    return f"the host was unsteady in {len(unsteady)} of {len(found)}: {'; '.join(unsteady[-1])}"


def _once(
    sides: tuple[Worker, Worker],
    machines: tuple[Mapping[str, Any], Mapping[str, Any]],
    case: CaseSpec,
    described: bool,
    a_first: bool,
    rule: PairRule,
    say: Say,
) -> ProcessPair:
    """``case`` in one pair of processes, with its deterministic metrics if ``described``."""
    a, b = sides
    records = _both(lambda worker: _built(worker, case, described), a, b, a_first)
    if any(record.outcome != "passed" for record in records):
        return ProcessPair(records, machines, a_first)
    before = host_state()
    try:
        paired = step_in_pairs(
            _step(0, a), _step(1, b), rule, a_first=a_first, on_blocks=lambda paired: say(_progress(paired))
        )
    except _SideFailed as failure:
        broken = [
            replace(record, outcome=failure.outcome, reason=failure.reason) if number == failure.side else record
            for number, record in enumerate(records)
        ]
        return ProcessPair((broken[0], broken[1]), machines, a_first)
    unsteady = host_unsteady(before, host_state())
    for record, seconds in zip(records, (paired.seconds_a, paired.seconds_b), strict=True):
        record.metrics[SAMPLES] = {STEP: [list(seconds)]}
    return ProcessPair(records, machines, a_first, paired.log_ratio, paired.lead, unsteady, _note(paired))


def _both(ask: Callable[[Worker], Answer], a: Worker, b: Worker, a_first: bool = True) -> tuple[Answer, Answer]:
    """Call ``ask`` for A and B at the same time, in this order or the reverse; returns A's result first.

    An interruption does not wait for either.
    """
    first, second = (a, b) if a_first else (b, a)
    with ThreadPoolExecutor(1) as pool:
        of_first = pool.submit(ask, first)
        try:
            of_second = ask(second)
            answers = of_first.result(), of_second
        except BaseException:
            first.close()  # otherwise the pool would wait for its result
            raise
    return answers if a_first else answers[::-1]


def shape_of(environment: Environment, case: CaseSpec, setting: Setting) -> tuple[CaseRecord, Mapping[str, Any]]:
    """The deterministic metrics of ``case`` in ``environment``, and the machine; raises as `compare_case` does."""
    with setting.worker(environment) as worker:
        machine = worker.start()
        return _built(worker, case, described=True), machine


class _SideFailed(Exception):
    def __init__(self, side: int, failure: WorkerFailed) -> None:
        super().__init__(failure.reason)
        self.side, self.outcome, self.reason = side, failure.outcome, failure.reason


def _step(side: int, worker: Worker) -> Callable[[], float]:
    def step() -> float:
        try:
            return worker.step()
        except WorkerFailed as failure:
            raise _SideFailed(side, failure) from failure

    return step


def _built(worker: Worker, case: CaseSpec, described: bool) -> CaseRecord:
    """Build ``case``, ready to step in ``worker``; with its metrics if ``described``."""
    try:
        # A fingerprint takes steps and instruments the optimizer, so the timed job is built after it.
        metrics = worker.describe(case) if described else {}
        worker.build(case)
    except WorkerFailed as failure:
        named = {"method": case.method, "model": case.model, "device": case.device}
        return CaseRecord(case.id, QUESTION, failure.outcome, failure.reason, named)
    return CaseRecord(case.id, QUESTION, "passed", metrics=metrics)


def _progress(paired: Paired) -> str:
    low, ratio, high = (
        100 * math.expm1(max(min(paired.log_ratio + half, 1.0), -1.0))
        for half in (-paired.half_width, 0.0, paired.half_width)
    )
    return f"{paired.pairs} pairs, {ratio:+.1f} % [{low:+.1f}, {high:+.1f}]"


def _note(paired: Paired) -> str | None:
    return None if paired.warmed_up else "a side was still becoming faster when its pairs began"
