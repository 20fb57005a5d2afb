"""Simulated times of a shared host: to measure how often a verdict is wrong, the truth must be known.

A time is its true seconds times random factors. Some last for a whole run, some for the minutes in which one case is
measured, some for one process, some for a moment; most of them, but not all, also affect the control timed next to each
round. `SHARED_HOST` has the sizes found in saved runs, and `seen` derives them from such runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_gauge.history.schema import CONTROL_SAMPLES, SAMPLES, VERSION, CaseRecord

if TYPE_CHECKING:
    import numpy as np

    from peft_gauge.history.reader import Run

PHASE_SECONDS = {"forward": 0.25, "backward": 0.25, "optimizer": 0.05}
CONTROL_SECONDS = 0.2
"""About the step times of SmolLM2-135M on two cores. They only matter relative to the duration of a slow state."""

CASES = 7
"""Each with the times forward, backward, optimizer and step: the 28 times of a bare run."""


@dataclass(frozen=True)
class Noise:
    """The noise of a host. Values are standard deviations of the logarithm of a factor, unless noted otherwise.

    Noise of the machine, which affects a time and its control alike: ``run``, constant during a run; ``minutes``,
    constant for all processes of one case, which are measured one after the other; ``process``, of one process. Noise
    that affects the control less or not at all: ``own_minutes`` and ``own_process``. ``moment``: of every single time.

    The machine has two states: for a share ``slow_share`` of its time it is slower by ``slow`` (the logarithm), and its
    state is forgotten after ``slow_seconds``. A share ``outlier_share`` of all times is longer by a factor whose
    logarithm is exponential with mean ``outlier``.
    """

    run: float
    minutes: float
    process: float
    own_minutes: float
    own_process: float
    moment: float
    slow: float
    slow_share: float
    slow_seconds: float
    outlier: float
    outlier_share: float


# From three runs of 24 November 2026 on a 2-core host shared with others (SmolLM2-135M, 21 times each, 5 rounds per
# time; two of them are the first in results/amd-epyc-2c-cpu, the third is in its history): see `Seen`, `SEEN`.
SHARED_HOST = Noise(
    run=0.045,
    minutes=0.06,
    process=0.06,
    own_minutes=0.03,
    own_process=0.05,
    moment=0.04,
    slow=0.27,
    slow_share=0.22,
    slow_seconds=0.5,
    outlier=0.4,
    outlier_share=0.02,
)


def moments(generator: np.random.Generator, noise: Noise, apart_seconds: Sequence[float], shape: Any) -> np.ndarray:
    """Logarithms of the momentary factors for successive times: ``(*shape, len(apart_seconds))``.

    ``apart_seconds``: delay of each time after the previous one.
    """
    import numpy as np

    slow = generator.random(shape) < noise.slow_share
    states = np.empty((*shape, len(apart_seconds)))
    for place, apart in enumerate(apart_seconds):
        forgotten = generator.random(shape) > math.exp(-apart / noise.slow_seconds)
        slow = np.where(forgotten, generator.random(shape) < noise.slow_share, slow)
        states[..., place] = slow
    outliers = generator.exponential(noise.outlier, states.shape) * (
        generator.random(states.shape) < noise.outlier_share
    )
    return noise.slow * states + outliers + generator.normal(0, noise.moment, states.shape)


class Times(NamedTuple):
    """Seconds of one run's cases: each metric's times, ``(cases, processes, rounds)``, and the control's."""

    seconds: dict[str, np.ndarray]
    control_seconds: np.ndarray


def suite(
    generator: np.random.Generator,
    noise: Noise,
    *,
    processes: int,
    rounds: int,
    cases: int = CASES,
    slower: Sequence[float] | None = None,
) -> Times:
    """One run of the whole suite. A round is the control, then the phases of a step; the step is their sum.

    ``slower``: the true factor of each case's times, which does not apply to its control; by default 1.
    """
    import numpy as np

    true = np.ones(cases) if slower is None else np.asarray(slower, dtype=float)
    order = {"control": CONTROL_SECONDS, **PHASE_SECONDS}
    before = [list(order.values())[place - 1] for place in range(len(order))] * rounds
    fleeting = moments(generator, noise, before, (cases, processes)).reshape(cases, processes, rounds, len(order))

    def lasting(minutes: float, process: float) -> np.ndarray:
        shared = generator.normal(0, minutes, (cases, 1)) + generator.normal(0, process, (cases, processes))
        return shared[..., np.newaxis]

    machine = generator.normal(0, noise.run) + lasting(noise.minutes, noise.process)
    seconds = {}
    for place, (name, usual) in enumerate(order.items()):
        # The memory layout of a process affects forward and backward differently.
        own = 0.0 if name == "control" else lasting(noise.own_minutes, noise.own_process)
        seconds[name] = usual * np.exp(machine + own + fleeting[..., place])
    control = seconds.pop("control")
    times = {f"{name}_seconds": true[:, np.newaxis, np.newaxis] * each for name, each in seconds.items()}
    return Times({**times, "step_seconds": sum(times.values())}, control)


def as_run(times: Times, name: str, *, with_control: bool = True) -> Run:
    """``times`` as a saved run, as if read from a file called ``name``."""
    from peft_gauge.history.reader import Run

    control = times.control_seconds.tolist()
    records = []
    for metric, of_cases in times.seconds.items():
        for number, processes in enumerate(of_cases.tolist()):
            metrics = {"settings": {"seed": 0}, SAMPLES: {metric: processes}}
            if with_control:
                metrics[CONTROL_SAMPLES] = {metric: control[number]}
            test = f"benchmarks/test_speed.py::test_{metric.removesuffix('_seconds')}[case{number}]"
            records.append(CaseRecord(test, "test_speed", "passed", metrics=metrics))
    return Run(
        path=Path(name),
        machine={"name": "simulated"},
        commit={},
        when=datetime(2026, 1, 1, tzinfo=UTC),
        options={},
        cases=tuple(records),
        claims=(),
        benchmarks=(),
        schema=VERSION,
        interrupted=False,
    )


# The same host for steps in turn. The lasting difference between two processes with the same code comes from 31 pairs
# of new processes (24 November 2026, a 2-core host under load, 11 ms steps of a small network, 80 to 400 pairs of steps
# each): by the agreement of the two halves of their pairs, log B/A has a standard deviation of 0.023.
TAKING_TURNS = replace(SHARED_HOST, own_process=0.017, moment=0.06)
FIRST_OF_PAIR = 0.02
"""Logarithm of the factor by which the first step of a pair is slower; measured: 0.016 to 0.036 where the order changed
from pair to pair, and 0.004 where it changed from block to block, next to two busy processes."""
FIRST_STARTED = 0.005
"""The same for all steps of the process that was started first; measured: 0.002 to 0.004."""


class Pairs(NamedTuple):
    """Seconds of A's and of B's steps, and whether A ``led`` the pair, ``(comparisons, pairs)`` each."""

    seconds_a: np.ndarray
    seconds_b: np.ndarray
    led: np.ndarray


def taking_turns(
    generator: np.random.Generator,
    noise: Noise,
    a_first: Sequence[bool],
    pairs: int,
    *,
    slower: float = 1.0,
    step_seconds: float = 0.04,
    block: int = 1,
) -> Pairs:
    """Pairs of steps of A and of B, whose true time is ``slower`` times as long.

    Each comparison has its own two processes; ``a_first`` gives for each whether A's is started first and leads the
    first block of pairs; the lead changes after each ``block`` of them.
    """
    import numpy as np

    first = np.asarray(a_first, dtype=bool)[:, np.newaxis]
    led = first ^ (np.arange(pairs) // block % 2 == 1)
    shape = (len(first), pairs, 2)
    fleeting = moments(generator, noise, [step_seconds] * (2 * pairs), (len(first),)).reshape(shape)
    fleeting[..., 0] += FIRST_OF_PAIR
    fleeting = np.where(led[..., np.newaxis], fleeting, fleeting[..., ::-1])  # from the order in time to A and B
    own = generator.normal(0, noise.own_process, (2, len(first), 1))
    own[0] += FIRST_STARTED * first
    own[1] += FIRST_STARTED * ~first
    return Pairs(
        step_seconds * np.exp(own[0] + fleeting[..., 0]),
        step_seconds * slower * np.exp(own[1] + fleeting[..., 1]),
        led,
    )


@dataclass(frozen=True)
class Seen:
    """Statistics of a host's noise, from several runs of the same code.

    ``low`` and ``high``: the 5 % and 95 % quantiles of the logarithm of a round over the median of its process;
    ``middle``: half the distance between their quartiles; ``between``: distance of the medians of two runs' processes
    (root mean square of the logarithm of their ratio), and ``between_over_control`` the same for times divided by their
    control, round by round; ``together``: distance of all of two runs' times (of the median ratio).
    """

    low: float
    high: float
    middle: float
    between: float
    between_over_control: float
    together: float


SEEN = Seen(low=-0.144, high=0.236, middle=0.029, between=0.203, between_over_control=0.099, together=0.090)
"""Of the three runs behind `SHARED_HOST`."""


class Block(NamedTuple):
    """One time of one process: its rounds in seconds, and the median of them over the control's."""

    seconds: Sequence[float]
    over_control: float


def seen(runs: Sequence[dict[str, Block]]) -> Seen:
    """Statistics of ``runs`` of the same code, each with one process per time; only times in all runs are used."""
    import numpy as np

    names = [name for name in runs[0] if all(name in run for run in runs)]
    rounds = np.concatenate([np.log(np.divide(b.seconds, np.median(b.seconds))) for run in runs for b in run.values()])
    low, quarter, three_quarters, high = np.quantile(rounds, [0.05, 0.25, 0.75, 0.95])
    medians = np.log([[np.median(run[name].seconds) for name in names] for run in runs])
    controlled = np.log([[run[name].over_control for name in names] for run in runs])
    first, second = np.triu_indices(len(runs), 1)

    def root_mean_square(values: np.ndarray) -> float:
        return float(np.sqrt(np.mean(np.square(values))))

    apart = medians[second] - medians[first]
    return Seen(
        low=float(low),
        high=float(high),
        middle=float(three_quarters - quarter) / 2,
        between=root_mean_square(apart),
        between_over_control=root_mean_square(controlled[second] - controlled[first]),
        together=root_mean_square(np.median(apart, axis=1)),
    )


def blocks_of_run(run: Run) -> dict[str, Block]:
    """The first process of each timed case of ``run``, without cases that lack a time over the control."""
    found = {}
    for case in run.cases:
        for metric, processes in case.metrics.get(SAMPLES, {}).items():
            over_control = case.metrics.get(metric.replace("_seconds", "_over_control"))
            if processes and isinstance(over_control, float):
                found[f"{case.id} {metric}"] = Block(processes[0], over_control)
    return found


def blocks_of_times(times: Times) -> dict[str, Block]:
    """The same for a simulated run."""
    import numpy as np

    return {
        f"{metric} {number}": Block(seconds.tolist(), float(np.median(seconds / times.control_seconds[number, 0])))
        for metric, of_cases in times.seconds.items()
        for number, seconds in enumerate(of_cases[:, 0])
    }
