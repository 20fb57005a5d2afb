"""One case on two sides: its figures without noise from each, and the verdict on its step's time.

How a process lies in memory makes its steps faster or slower for as long as it lives: two processes that ran the same
code were seen up to 2.5 % apart, beyond what pairs of steps within them could tell. So several pairs of fresh processes
are measured, and it is their ratios that are judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from peft_gauge.environments.pairs import PROCESS_PAIRS, Paired, PairRule, over_processes, step_in_pairs
from peft_gauge.environments.worker import CaseSpec, Worker, WorkerFailed
from peft_gauge.history.intervals import MOST_FURTHER, Judgement
from peft_gauge.history.schema import SAMPLES, CaseRecord

if TYPE_CHECKING:
    from peft_gauge.environments.build import Environment

QUESTION = "ab"
STEP = "step_seconds"

Say = Callable[[str], object]


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
    """``case`` on both sides; ``say`` is told how far it is.

    Raises `NoEnvironment` where a side's process does not find the versions asked for. A side that cannot build the
    case, or breaks in a step, is an outcome.
    """
    found: list[Finding] = []
    judged: Judgement | None = None
    for most in PROCESS_PAIRS:
        while len(found) < most:
            each = _once(environments, case, rule.within_processes, setting, _numbered(say, len(found) + 1))
            if each.judged is None:  # what does not run, or ran once and not again, is no sound case
                return each
            found.append(each)
        judged = over_processes([math.log(each.judged.ratio) for each in found if each.judged], rule)
        if judged.verdict != "cannot tell":
            break
    assert judged is not None
    return _together(found, judged)


def _numbered(say: Say, number: int) -> Say:
    return lambda text: say(f"processes {number} of at most {PROCESS_PAIRS[-1]}: {text}")


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
    environments: tuple[Environment, Environment], case: CaseSpec, rule: PairRule, setting: Setting, say: Say
) -> Finding:
    """From one pair of processes."""
    with setting.worker(environments[0]) as a, setting.worker(environments[1]) as b:
        say("starting both sides")
        differing = {name for each in environments for name in each.packages}
        machines = (a.start(differing), b.start(differing))
        records = (_built(a, case), _built(b, case))
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


def shape_of(environment: Environment, case: CaseSpec, setting: Setting) -> tuple[CaseRecord, Mapping[str, Any]]:
    """The figures without noise of ``case`` in ``environment``, and the machine; raises as `compare_case` does."""
    with setting.worker(environment) as worker:
        machine = worker.start()
        return _built(worker, case), machine


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


def _built(worker: Worker, case: CaseSpec) -> CaseRecord:
    try:
        return CaseRecord(case.id, QUESTION, "passed", figures=worker.build(case))
    except WorkerFailed as failure:
        named = {"method": case.method, "model": case.model, "device": case.device}
        return CaseRecord(case.id, QUESTION, failure.outcome, failure.reason, named)


def _progress(pairs: int, judged: Judgement) -> str:
    percent = [f"{100 * (ratio - 1):+.1f}" for ratio in (judged.ratio, judged.low, judged.high)]
    return f"{pairs} pairs, {percent[0]} % [{percent[1]}, {percent[2]}]: {judged.verdict}"


def _note(paired: Paired) -> str | None:
    return None if paired.warmed_up else "a side was still becoming faster when its pairs began"
