"""One case on two sides: its figures without noise from each, and the verdict on its step's time.

How a process lies in memory makes its steps faster or slower for as long as it lives: two processes that ran the same
code were seen up to 2.5 % apart, beyond what pairs of steps within them could tell. So several pairs of fresh processes
are measured, and it is their ratios that are judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from peft_gauge.environments.pairs import PROCESS_PAIRS, Paired, PairRule, over_processes, step_in_pairs
from peft_gauge.environments.worker import CaseSpec, Worker, WorkerFailed
from peft_gauge.history.intervals import MOST_FURTHER, Judgement
from peft_gauge.history.schema import SAMPLES, CaseRecord

if TYPE_CHECKING:
    from peft_gauge.environments.build import Environment

QUESTION = "ab"
STEP = "step_seconds"

Say = Callable[[str], object]
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Finding:
    """What a case showed on both sides.

    ``records``: A's and B's, for a saved run each; ``machines``: what either side's process said of itself;
    ``judged``: the verdict on B / A, with ``note`` on how it came about; ``None`` where a side did not run.
    """

    records: tuple[CaseRecord, CaseRecord]
    machines: tuple[Mapping[str, Any], Mapping[str, Any]]
    judged: Judgement | None
    note: str | None

    def as_json(self) -> dict[str, Any]:
        return {
            "records": [asdict(record) for record in self.records],
            "machines": [dict(machine) for machine in self.machines],
            "judged": None if self.judged is None else asdict(self.judged),
            "note": self.note,
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Finding:
        old, new = (CaseRecord(**record) for record in value["records"])
        machine_a, machine_b = value["machines"]
        judged = None if value["judged"] is None else Judgement(**value["judged"])
        return Finding((old, new), (machine_a, machine_b), judged, value["note"])


@dataclass(frozen=True)
class Setting:
    """How both sides run: ``threads`` each, on ``cores`` that they share, in children that are ``program``."""

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
) -> Finding:
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
    known: Mapping[str, Sequence[Finding]] | None = None,
    keep: Callable[[str, Sequence[Finding]], object] = lambda case_id, found: None,
) -> Iterator[Finding]:
    """Each of ``cases`` on both sides, as soon as its verdict is clear or its pairs of processes are used up.

    A pair of processes measures all cases that are still undecided, one after the other: to start one takes several
    times as long as the steps of a case. ``say`` is told how far it is; what each pair of processes showed of a case
    is given to ``keep``, and what was kept before an interruption is ``known``.

    Raises `NoEnvironment` where a side's process does not find the versions asked for. A side that cannot build a
    case, or breaks in a step, is an outcome.
    """
    found = {case.id: list((known or {}).get(case.id, ())) for case in cases}
    undecided = []
    for case in cases:
        finding = _decided(found[case.id], rule)
        if finding is None:
            undecided.append(case)
        else:
            yield finding
    while undecided:
        fresh = {case.id for case in undecided if not found[case.id]}
        number = 1 + min(len(found[case.id]) for case in undecided)
        for case, each in _by_new_processes(environments, undecided, fresh, rule, setting, _numbered(say, number)):
            found[case.id].append(each)
            keep(case.id, found[case.id])
            finding = _decided(found[case.id], rule)
            if finding is not None:
                undecided = [other for other in undecided if other != case]
                yield finding


def _numbered(say: Say, number: int) -> Say:
    return lambda text: say(f"processes {number} of at most {PROCESS_PAIRS[-1]}: {text}")


def _decided(found: Sequence[Finding], rule: PairRule) -> Finding | None:
    """What pairs of processes showed of a case together, or ``None`` where more are to be asked."""
    if not found:
        return None
    if found[-1].judged is None:  # what does not run, or ran once and not again, is no sound case
        return found[-1]
    if len(found) not in PROCESS_PAIRS:
        return None
    judged = over_processes([math.log(each.judged.ratio) for each in found if each.judged], rule)
    if judged.verdict == "cannot tell" and len(found) < PROCESS_PAIRS[-1]:
        return None
    return _together(found, judged)


def _by_new_processes(
    environments: tuple[Environment, Environment],
    cases: Sequence[CaseSpec],
    fresh: Collection[str],
    rule: PairRule,
    setting: Setting,
    say: Say,
) -> Iterator[tuple[CaseSpec, Finding]]:
    """Each case by one new pair of processes, or by yet another one behind a case that broke; of the ``fresh`` ones
    also the figures without noise."""
    differing = {name for each in environments for name in each.packages}
    left = list(cases)
    while left:
        say("starting both sides")
        with setting.worker(environments[0]) as a, setting.worker(environments[1]) as b:
            machines = _both(lambda worker: worker.start(differing), a, b)
            broken = False
            while left and not broken:
                case = left.pop(0)
                each = _once((a, b), machines, case, case.id in fresh, rule.within_processes, _of_case(say, case))
                broken = each.judged is None
                yield case, each


def _of_case(say: Say, case: CaseSpec) -> Say:
    return lambda text: say(f"{case.method}: {text}")


def _together(found: Sequence[Finding], judged: Judgement) -> Finding:
    """One finding out of those of all pairs of processes."""
    records = [
        replace(
            found[0].records[side],
            figures=found[0].records[side].figures
            | {SAMPLES: {STEP: [each.records[side].figures[SAMPLES][STEP][0] for each in found]}},
        )
        for side in (0, 1)
    ]
    notes = [f"{len(found)} pairs of processes"]
    if judged.further is not None:
        more = f"more than {MOST_FURTHER}" if judged.further > MOST_FURTHER else f"about {judged.further}"
        notes.append(f"{more} more would decide it")
    notes += sorted({each.note for each in found if each.note})
    return Finding((records[0], records[1]), found[0].machines, judged, "; ".join(notes))


def _once(
    sides: tuple[Worker, Worker],
    machines: tuple[Mapping[str, Any], Mapping[str, Any]],
    case: CaseSpec,
    described: bool,
    rule: PairRule,
    say: Say,
) -> Finding:
    """``case`` by one pair of processes, with its figures without noise where it is to be ``described``."""
    a, b = sides
    records = _both(lambda worker: _built(worker, case, described), a, b)
    if any(record.outcome != "passed" for record in records):
        return Finding(records, machines, None, None)
    try:
        paired = step_in_pairs(_step(0, a), _step(1, b), rule, on_look=lambda *seen: say(_progress(*seen)))
    except _SideFailed as failure:
        broken = [
            replace(record, outcome=failure.outcome, reason=failure.reason) if number == failure.side else record
            for number, record in enumerate(records)
        ]
        return Finding((broken[0], broken[1]), machines, None, None)
    for record, seconds in zip(records, (paired.seconds_a, paired.seconds_b), strict=True):
        record.figures[SAMPLES] = {STEP: [list(seconds)]}
    return Finding(records, machines, paired.judged, _note(paired))


def _both(ask: Callable[[Worker], Answer], a: Worker, b: Worker) -> tuple[Answer, Answer]:
    """What both sides answer; they work on it at the same time. An interruption does not wait for either."""
    with ThreadPoolExecutor(1) as pool:
        of_b = pool.submit(ask, b)
        try:
            return ask(a), of_b.result()
        except BaseException:
            b.close()  # or the pool would wait for its answer
            raise


def shape_of(environment: Environment, case: CaseSpec, setting: Setting) -> tuple[CaseRecord, Mapping[str, Any]]:
    """The figures without noise of ``case`` in ``environment``, and the machine; raises as `compare_case` does."""
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
    """``case``, ready to step in ``worker``; its figures where it is ``described``."""
    try:
        # A fingerprint leaves its job some steps old and its optimizer watched, so what is timed is built after it.
        figures = worker.describe(case) if described else {}
        worker.build(case)
    except WorkerFailed as failure:
        named = {"method": case.method, "model": case.model, "device": case.device}
        return CaseRecord(case.id, QUESTION, failure.outcome, failure.reason, named)
    return CaseRecord(case.id, QUESTION, "passed", figures=figures)


def _progress(pairs: int, judged: Judgement) -> str:
    percent = [f"{100 * (ratio - 1):+.1f}" for ratio in (judged.ratio, judged.low, judged.high)]
    return f"{pairs} pairs, {percent[0]} % [{percent[1]}, {percent[2]}]: {judged.verdict}"


def _note(paired: Paired) -> str | None:
    return None if paired.warmed_up else "a side was still becoming faster when its pairs began"
