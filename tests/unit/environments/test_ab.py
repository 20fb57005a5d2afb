"""A against B: pairs of steps with a planted ratio, two processes a side that must agree, and the command."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from peft_gauge.clock.rounds import WarmUp
from peft_gauge.clock.steadiness import HostState
from peft_gauge.commands import ab_options
from peft_gauge.environments import measurement, worker
from peft_gauge.environments.build import Environment
from peft_gauge.environments.measurement import (
    MethodResult,
    ProcessPair,
    Setting,
    compare_case,
    compare_cases,
    measure_pairs,
)
from peft_gauge.environments.pairs import (
    BLOCK_PAIRS,
    ERROR_SHARES,
    PRECISION,
    PROCESS_PAIRS,
    Paired,
    PairedRatios,
    PairRule,
    a_leads,
    over_processes,
    step_in_pairs,
)
from peft_gauge.environments.requirements import Side, parse_side
from peft_gauge.environments.self_check import resolution
from peft_gauge.environments.state import Kept
from peft_gauge.environments.worker import CaseSpec, WorkerFailed
from peft_gauge.errors import GaugeError
from peft_gauge.history.reader import read_run, runs_in
from peft_gauge.history.schema import SAMPLES
from peft_gauge.training.settings import StepSettings
from tests.support.facts import lacking
from tests.support.stepping_child import MACHINE, metrics

Command = Callable[..., tuple[int, str, str]]
CASE = CaseSpec("toy-llama", "lora", 1, 8, "cpu", "float32")
SHORT = WarmUp(least=1, most=2, window=1)


@dataclass
class Machine:
    """Two sides on a clock of its own: B takes ``factor`` times as long, both ``drift``, each with noise of its own.

    ``first_of_pair``: the factor on a step that does not follow one of the other side at once, as the first of a pair.
    """

    factor: float = 1.0
    noise: float = 0.1
    seed: int = 0
    drift: Callable[[float], float] = lambda now: 1.0
    first_of_pair: float = 1.0
    now: float = 0.0
    order: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def clock(self) -> float:
        return self.now

    def step(self, side: str) -> float:
        seconds = 0.01 * (self.factor if side == "B" else 1.0) * self.drift(self.now)
        seconds *= self.random.lognormvariate(0, self.noise) * (1.0 if len(self.order) % 2 else self.first_of_pair)
        self.order.append(side)
        self.now += seconds
        return seconds

    def run(self, rule: PairRule, warm_up: WarmUp = SHORT, **asked: Any) -> Paired:
        return step_in_pairs(
            lambda: self.step("A"), lambda: self.step("B"), rule, clock=self.clock, warm_up=warm_up, **asked
        )


# Pairs


@pytest.mark.parametrize("factor", [1.05, 1.0, 1 / 1.05, 1.01, 1.5])
def test_a_planted_ratio_is_found(factor: float) -> None:
    inside = 0
    for seed in range(20):
        found = Machine(factor, noise=0.05, seed=seed).run(PairRule(budget_seconds=100))
        assert found.log_ratio == pytest.approx(math.log(factor), abs=0.02)
        inside += abs(found.log_ratio - math.log(factor)) <= found.half_width
    assert inside >= 17


def test_drift_of_both_sides_cancels() -> None:
    """The machine halves its speed in the middle, and swings by a tenth all the time."""
    for factor in (1.05, 1.0):
        machine = Machine(factor, 0.03, drift=lambda now: (1 + 0.1 * math.sin(now * 7)) * (2 if now > 0.3 else 1))
        found = machine.run(PairRule(budget_seconds=100, minimum_effect=0.01))
        assert max(found.seconds_a) > 1.8 * min(found.seconds_a)
        assert found.log_ratio == pytest.approx(math.log(factor), abs=0.015)


def test_a_few_wild_steps_change_nothing() -> None:
    machine = Machine(1.0, 0.03)
    machine.drift = lambda now: 50.0 if machine.random.random() < 0.05 else 1.0
    assert machine.run(PairRule(budget_seconds=1000)).log_ratio == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("a_first", [True, False])
def test_the_lead_changes_from_block_to_block(a_first: bool) -> None:
    machine = Machine(noise=0.3)
    found = machine.run(PairRule(budget_seconds=2.0, minimum_effect=0.001), a_first=a_first)
    leading, other = "AB" if a_first else "BA"
    block = BLOCK_PAIRS * [leading, other]
    assert machine.order[: -2 * found.pairs] == [leading, other] * 2, "the warm-up"
    steps = machine.order[-2 * found.pairs :]
    assert steps == (block + block[::-1]) * (found.pairs // (2 * BLOCK_PAIRS))
    assert list(found.a_led) == [first == "A" for first in steps[::2]]
    assert len(found.seconds_a) == len(found.seconds_b) == found.pairs


@pytest.mark.parametrize("a_first", [True, False])
def test_what_the_first_step_of_a_pair_costs_is_no_difference(a_first: bool) -> None:
    """Were one side first in all pairs, it would be 20 % slower."""
    rule = PairRule(budget_seconds=5.0, minimum_effect=0.001)
    found = Machine(1.0, 0.03, first_of_pair=1.2).run(rule, a_first=a_first)
    assert found.log_ratio == pytest.approx(0, abs=0.01)
    assert found.lead == pytest.approx(math.log(1.2), abs=0.01)
    assert found.half_width < 0.01, "two heaps, each around a median of its own"
    one_lead = replace(found, a_led=(True,) * found.pairs)
    assert one_lead.half_width > 0.1
    assert one_lead.lead == 0.0


def test_long_steps_make_short_blocks() -> None:
    """Each side leads, however few pairs there is time for."""
    machine = Machine(noise=0.01, first_of_pair=1.5)
    found = machine.run(PairRule(budget_seconds=0.01, minimum_effect=0.001))
    assert (found.pairs, found.a_led) == (2, (True, False))
    assert found.log_ratio == pytest.approx(0, abs=0.05)
    assert found.half_width > 100, "so few say nothing about how far it is known"
    found = Machine(noise=0.01).run(PairRule(budget_seconds=0.2, minimum_effect=0.001))
    assert found.a_led[:3] == (True, False, True)
    assert found.pairs % 2 == 0


def test_it_ends_when_the_ratio_is_known_whatever_it_is() -> None:
    """It analyses behind two blocks each, at how far the ratio is known, and not at what it is."""
    pairs = {}
    rule = PairRule(budget_seconds=100)
    enough = PRECISION * math.log1p(rule.minimum_effect)
    for factor in (1.0, 1.03, 1.5):
        analyses: list[Paired] = []
        pairs[factor] = Machine(factor, noise=0.04, seed=3).run(rule, on_blocks=analyses.append).pairs
        half_widths = [each.half_width for each in analyses]
        assert [each.pairs for each in analyses] == [2 * BLOCK_PAIRS * number for number in range(1, len(analyses) + 1)]
        assert half_widths[-1] <= enough < min(half_widths[:-1])
    assert len(set(pairs.values())) == 1
    over = Machine(noise=0.5).run(PairRule(budget_seconds=2.0))
    assert over.half_width > enough
    assert 2.0 <= sum(over.seconds_a) + sum(over.seconds_b) < 3.0


def test_pairs_begin_when_both_sides_are_warm() -> None:
    slowing = iter([*(1 / n for n in range(1, 12)), *[1 / 12] * 1000])
    warm = WarmUp(least=3, most=30, window=3)
    found = step_in_pairs(lambda: 0.1, lambda: next(slowing), PairRule(minimum_effect=0.01), warm_up=warm)
    assert found.warmed_up
    assert found.seconds_b[0] <= 1 / 11
    never = (0.9**n for n in itertools.count())
    assert not step_in_pairs(lambda: 1.0, lambda: next(never), PairRule(1e-9), warm_up=warm).warmed_up


def test_a_clock_that_stands_still_is_refused() -> None:
    with pytest.raises(GaugeError, match="0 seconds"):
        step_in_pairs(lambda: 0.0, lambda: 1.0, PairRule(), warm_up=SHORT)


@pytest.mark.parametrize("budget", [0.0, -1.0, math.inf, math.nan])
def test_a_budget_is_a_positive_number(budget: float) -> None:
    with pytest.raises(GaugeError, match="--budget must be positive"):
        PairRule(budget)


@pytest.mark.parametrize("effect", [0.0, 1.0, -0.1, math.nan])
def test_a_minimum_effect_is_a_share(effect: float) -> None:
    with pytest.raises(GaugeError, match="--minimum-effect"):
        PairRule(minimum_effect=effect)


def test_the_interval_is_that_of_the_sign_test() -> None:
    """An end of the interval is just not rejected at its error, and what lies outside is."""
    ratios = PairedRatios(list(range(-20, 21)))
    low, high = ratios.interval(0.05)
    assert ratios.p_value(low + 1e-9) > 0.05 >= ratios.p_value(low - 1e-9)
    assert ratios.p_value(high - 1e-9) > 0.05 >= ratios.p_value(high + 1e-9)
    assert ratios.p_value(ratios.log_ratio) > 0.7


# A case on both sides


class Sides(Setting):
    """Workers that are none: the n-th pair of them has B slower by the n-th factor, and ``first`` is the factor on the
    steps of the process that is started first."""

    def __init__(
        self, *factors: float, a: dict[str, Any] | None = None, b: dict[str, Any] | None = None, first: float = 1.0
    ) -> None:
        super().__init__()
        object.__setattr__(self, "factors", list(factors))
        object.__setattr__(self, "told", (a or {}, b or {}))
        object.__setattr__(self, "first", first)
        object.__setattr__(self, "started", [])

    def worker(self, environment: Environment) -> Any:
        started: list[FakeWorker] = self.started  # type: ignore[attr-defined]
        number, place = divmod(len(started), 2)
        side = int(environment.side == parse_side("gaugeprobe==2"))
        factor = self.factors[min(number, len(self.factors) - 1)] if side else 1.0  # type: ignore[attr-defined]
        factor *= 1.0 if place else self.first  # type: ignore[attr-defined]
        started.append(FakeWorker(factor, self.told[side], len(started), side))  # type: ignore[attr-defined]
        return started[-1]


class FakeWorker:
    def __init__(self, factor: float, told: dict[str, Any], number: int, side: int) -> None:
        self.factor, self.told, self.alive, self.side = factor, told, True, side
        self.random = random.Random(number)
        self.described, self.built = 0, list[str]()
        self.of_ia3, self.breaks_at = factor, ""

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *ending: object) -> None:
        self.alive = False

    def start(self, also: Iterable[str]) -> dict[str, Any]:
        return {**MACHINE, "libraries": {name: f"{name} here" for name in sorted(also)}}

    def close(self) -> None:
        self.alive = False

    def describe(self, case: CaseSpec) -> dict[str, Any]:
        self.described += 1
        if "build" in self.told:
            raise WorkerFailed("failed", self.told["build"])
        return metrics(method=case.method, **self.told.get("metrics", {}))

    def build(self, case: CaseSpec) -> None:
        self.built.append(case.method)

    def step(self) -> float:
        if "step" in self.told or self.built[-1] == self.breaks_at:
            raise WorkerFailed("crashed", self.told.get("step", "gone"))
        factor = self.of_ia3 if self.built[-1] == "ia3" else self.factor
        return 0.01 * factor * self.random.lognormvariate(0, 0.01)


ENVIRONMENTS = (Environment(Side(()), None, {}), Environment(parse_side("gaugeprobe==2"), None, {}))


def found_by(setting: Sides, budget: float = 5.0) -> MethodResult:
    finding = compare_case(ENVIRONMENTS, CASE, PairRule(budget), setting)
    assert not any(worker.alive for worker in setting.started)  # type: ignore[attr-defined]
    return finding


def processes(finding: MethodResult) -> list[int]:
    return [len(record.metrics[SAMPLES]["step_seconds"]) for record in finding.records]


@pytest.mark.parametrize(("factor", "verdict"), [(1.1, "worse"), (0.9, "better"), (1.0, "same")])
def test_several_pairs_of_processes_decide(factor: float, verdict: str) -> None:
    """They agree, so the first look, at four pairs, is enough."""
    finding = found_by(Sides(factor))
    assert finding.judged is not None
    assert finding.judged.verdict == verdict
    assert finding.judged.ratio == pytest.approx(factor, rel=0.01)
    assert finding.note == "4 pairs of processes"
    assert processes(finding) == [4, 4]


@pytest.mark.parametrize("first", [1.02, 0.98])
def test_to_be_started_first_is_no_difference(first: float) -> None:
    """Each side is first in two of every four pairs of processes; were A first in all, it would be 2 % off."""
    setting = Sides(1.0, first=first)
    (pairs,) = measure_pairs(ENVIRONMENTS, [CASE], 16, PairRule(2.0), setting)
    started = [worker.side for worker in setting.started[::2]]  # type: ignore[attr-defined]
    assert started == [0, 1, 1, 0] * 4
    assert [each.a_first for each in pairs] == [side == 0 for side in started]
    ratios = [each.log_ratio for each in pairs if each.log_ratio is not None]
    assert statistics.fmean(ratios) == pytest.approx(0, abs=0.003)
    found = resolution(ratios, [each.a_first for each in pairs], PairRule())
    assert (found.bias, found.first) == pytest.approx((0, math.log(first)), abs=0.003)
    assert not found.is_biased
    assert found.spread < 0.01 < statistics.stdev(ratios)


@pytest.mark.parametrize("factor", [1.029, 0.971])
def test_nothing_below_the_minimum_effect_is_worse_or_better(factor: float) -> None:
    """However surely it is there: sixteen pairs of processes agree to a thousandth."""
    for count in PROCESS_PAIRS:
        ratios = [math.log(factor) + (-1) ** number * 1e-4 for number in range(count)]
        assert over_processes(ratios, PairRule()).verdict == "same"
        beyond = [ratio + math.copysign(0.003, ratio) for ratio in ratios]
        assert over_processes(beyond, PairRule()).verdict == ("worse" if factor > 1 else "better")


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_surely_there_but_perhaps_below_the_minimum_effect_cannot_be_told(sign: int) -> None:
    """An estimate of 2.5 % that lies between 1.6 and 3.4 %; a third of the minimum effect once was enough for it."""
    judged = over_processes([sign * (0.025 + 0.01 * (-1) ** number) for number in range(16)], PairRule())
    assert judged.verdict == "inconclusive"
    assert min(abs(math.log(judged.low)), abs(math.log(judged.high))) > 0.016


def test_a_pair_of_processes_survives_being_kept() -> None:
    (pairs,) = measure_pairs(ENVIRONMENTS, [CASE], 4, PairRule(2.0), Sides(1.1))
    (broken,) = measure_pairs(ENVIRONMENTS, [CASE], 4, PairRule(2.0), Sides(1.1, b={"step": "no such method"}))
    assert len(broken) == 1
    for each in (*pairs, *broken):
        assert ProcessPair.from_json(json.loads(json.dumps(each.as_json()))) == each


def test_an_unsteady_host_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not decide: what it does to the ratios is in their interval."""
    states = itertools.cycle(
        HostState(
            wall_seconds=10.0 * number, cores=2, busy_seconds=15.0 * number, process_seconds=0.0, stolen_seconds=0
        )
        for number in range(2)
    )
    monkeypatch.setattr(measurement, "host_state", lambda: next(states))
    finding = found_by(Sides(1.1))
    assert finding.judged is not None
    assert finding.judged.verdict == "worse"
    assert lacking(str(finding.note), "4 pairs", "unsteady in 4 of 4", "75.0 % of 2 cores") == []


def test_processes_that_do_not_agree_decide_nothing() -> None:
    """Each pair of steps within a pair of processes says +10 % or −10 %, and all of it is how these processes lie."""
    finding = found_by(Sides(*[1.1, 0.9] * 8), budget=2.0)
    assert finding.judged is not None
    assert finding.judged.verdict == "inconclusive"
    assert finding.note is not None
    assert finding.note.startswith("16 pairs of processes; ")
    assert "more would decide it" in finding.note
    assert processes(finding) == [16, 16]


def test_the_looks_share_the_error() -> None:
    assert sum(ERROR_SHARES.values()) == pytest.approx(1)
    assert tuple(ERROR_SHARES) == PROCESS_PAIRS
    assert over_processes([0.04, 0.016] * 8, PairRule(error=0.02)).error == pytest.approx(0.02 * 2 / 3)
    assert over_processes([0.03, 0.02] * 2, PairRule(error=0.02)).error == pytest.approx(0.02 / 6)


def test_each_side_is_first_in_half_of_the_pairs_at_each_look() -> None:
    """And late as often as early, so that a drift over the pairs favours neither."""
    for count in PROCESS_PAIRS:
        order = [a_leads(number) for number in range(count)]
        assert sum(order) == count // 2
        assert sum(number for number, first in enumerate(order) if first) == sum(range(count)) / 2


@pytest.mark.parametrize(
    ("a", "b", "outcomes"),
    [
        ({}, {"build": "no such method"}, ("passed", "failed")),
        ({"build": "no such method"}, {}, ("failed", "passed")),
        ({}, {"step": "no such method"}, ("passed", "crashed")),
        ({"step": "no such method"}, {}, ("crashed", "passed")),
    ],
)
def test_a_side_that_breaks_is_an_outcome(a: dict[str, Any], b: dict[str, Any], outcomes: tuple[str, str]) -> None:
    finding = found_by(Sides(1.0, a=a, b=b))
    assert tuple(record.outcome for record in finding.records) == outcomes
    assert finding.judged is None
    assert [record.reason for record in finding.records if record.outcome != "passed"] == ["no such method"]


def test_a_pair_of_processes_measures_all_cases_that_are_undecided() -> None:
    """Both are the same on average; of lora the processes agree, so that it is out after four of them."""
    cases = [CASE, replace(CASE, method="ia3")]

    class Apart(Sides):
        def worker(self, environment: Environment) -> Any:
            worker = super().worker(environment)
            number = len(self.started)  # type: ignore[attr-defined]
            worker.of_ia3 = 1.0 if worker.side == 0 else 1.1 if (number - 1) // 2 % 2 else 0.9
            return worker

    setting = Apart(1.0)
    lora, ia3 = compare_cases(ENVIRONMENTS, cases, PairRule(2.0), setting)
    assert [each.records[0].id for each in (lora, ia3)] == [each.id for each in cases]
    assert [each.judged and each.judged.verdict for each in (lora, ia3)] == ["same", "inconclusive"]
    assert (processes(lora), processes(ia3)) == ([4, 4], [16, 16])
    started = setting.started  # type: ignore[attr-defined]
    assert [worker.built for worker in started] == [["lora", "ia3"]] * 8 + [["ia3"]] * 24
    assert [worker.described for worker in started] == [2, 2] + [0] * 30, "what has no noise is asked once"
    assert not any(worker.alive for worker in started)


def test_behind_a_case_that_broke_there_are_new_processes() -> None:
    """The one that broke may be dead, and the next case needs a live one."""
    cases = [CASE, replace(CASE, method="ia3")]

    class Breaking(Sides):
        def worker(self, environment: Environment) -> Any:
            worker = super().worker(environment)
            worker.breaks_at = "lora"
            return worker

    setting = Breaking(1.0)
    lora, ia3 = compare_cases(ENVIRONMENTS, cases, PairRule(2.0), setting)
    assert [record.outcome for record in lora.records] == ["crashed", "passed"]
    assert ia3.judged is not None
    assert ia3.judged.verdict == "same"
    assert [worker.built for worker in setting.started[:4]] == [["lora"]] * 2 + [["ia3"]] * 2  # type: ignore[attr-defined]


def test_interrupted_sides_are_dead() -> None:
    setting = Sides(1.0)

    def interrupt(text: str) -> None:
        if "pairs" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_case(ENVIRONMENTS, CASE, PairRule(), setting, interrupt)
    assert [worker.alive for worker in setting.started] == [False, False]  # type: ignore[attr-defined]


# The command


@pytest.fixture
def ab(run_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``ab(sides, *arguments)`` runs the command with environments that need no pip."""
    monkeypatch.setenv("PEFT_GAUGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "peft_gauge.environments.build.prepare", lambda side, say: Environment(side, None, {"gaugeprobe": side.name})
    )

    def run(setting: Sides, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(ab_options, "setting_of", lambda threads, device: setting)
        given = arguments or ("gaugeprobe==1", "gaugeprobe==2")
        return run_command("ab", *given, "--device", "cpu", "--results", str(tmp_path / "r"), "--budget", "3")

    return run


@pytest.mark.parametrize(
    ("factors", "code", "verdict"),
    [((1.2, 1.2), 1, "worse"), ((0.8, 0.8), 0, "better"), ((1.0,), 0, "same"), ((1.2, 0.8) * 8, 0, "inconclusive")],
)
def test_the_command_tells_the_verdict(
    factors: tuple[float, ...], code: int, verdict: str, ab: Callable[..., Any]
) -> None:
    found, printed, complaint = ab(Sides(*factors))
    assert (found, complaint) == (code, "")
    lines = printed.splitlines()
    of_time = [below for line, below in pairwise(lines) if line.startswith(f"{verdict} ") and "step_seconds" in below]
    (row,) = of_time
    assert "ms" in row
    assert f"1 {verdict}" in printed or verdict == "same"
    assert ("no operator changed: machine or kernel" in " ".join(printed.split())) == (verdict != "same")


def test_operators_are_listed_whatever_the_time_says(ab: Callable[..., Any]) -> None:
    more = {"metrics": {key: value for key, value in metrics(3).items() if key in ("fingerprint", "flops_per_step")}}
    code, printed, _ = ab(Sides(1.2, 1.0, b=more))
    assert code == 1, "more FLOPs are worse, whatever time says"
    assert "CHANGED" in printed
    assert "  forward: +1 aten.mm.default in layer (2 → 3)" in printed.splitlines()
    same_flops = {"metrics": {"fingerprint": metrics(3)["fingerprint"]}}
    code, printed, _ = ab(Sides(1.0, b=same_flops))
    assert code == 0, "another shape alone is news, not a verdict"
    assert "  forward: +1 aten.mm.default in layer (2 → 3)" in printed.splitlines()


def test_settings_that_a_release_changed_do_not_forbid_the_comparison(ab: Callable[..., Any]) -> None:
    code, printed, _ = ab(Sides(1.2, 1.2, b={"metrics": {"settings": {"batch": 1, "r": 8}}}))
    assert code == 1
    (note,) = (line for line in printed.splitlines() if line.startswith("note: lora-toy-llama-cpu"))
    assert "r: absent → 8" in note


def test_both_sides_are_saved_as_runs(ab: Callable[..., Any], tmp_path: Path) -> None:
    ab(Sides(1.2, 1.2))
    a, b = map(read_run, runs_in(tmp_path / "r"))
    assert a.options["ab"] == {"side": "A", "requirements": "gaugeprobe==1", "of": ["gaugeprobe==1", "gaugeprobe==2"]}
    assert b.options["ab"]["side"] == "B"
    assert a.libraries == b.libraries == {"gaugeprobe": "gaugeprobe here"}
    seconds = [[len(process) for process in run.cases[0].metrics[SAMPLES]["step_seconds"]] for run in (a, b)]
    assert seconds[0] == seconds[1]
    assert len(seconds[0]) == 4


def test_several_methods_share_the_error(ab: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[float] = []
    real = compare_cases

    def spy(environments: Any, cases: Any, rule: PairRule, *rest: Any, **kept: Any) -> Iterator[MethodResult]:
        errors.append(rule.error)
        return real(environments, cases, rule, *rest, **kept)

    monkeypatch.setattr(measurement, "compare_cases", spy)
    arguments = (".", "gaugeprobe==2", "--method", "lora,ia3", "--method", "qlora")
    code, printed, _ = ab(Sides(1.0), *arguments)
    assert code == 0
    assert errors == [PairRule.error / 3]
    assert [f"{name}-toy-llama-cpu" in printed for name in ("lora", "ia3", "qlora")] == [True] * 3


def test_a_side_that_breaks_is_worse_or_impossible(ab: Callable[..., Any]) -> None:
    code, printed, _ = ab(Sides(1.0, b={"build": "bitsandbytes is too old"}))
    assert code == 1
    assert "bitsandbytes is too old" in " ".join(printed.split())
    code, _, complaint = ab(Sides(1.0, a={"build": "bitsandbytes is too old"}))
    assert code == 2
    assert lacking(complaint, "A (gaugeprobe==1)", "bitsandbytes is too old") == []


def test_interrupted_work_goes_on(ab: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two pairs of processes of lora and one of ia3 are measured before it, and none of them again."""
    real = Kept.put

    def interrupt(self: Kept, name: str, value: Any) -> None:
        real(self, name, value)
        if len(value) == 2:
            raise KeyboardInterrupt

    arguments = (".", "gaugeprobe==2", "--method", "lora,ia3")
    monkeypatch.setattr(Kept, "put", interrupt)
    code, _, complaint = ab(Sides(1.0), *arguments)
    (state,) = (tmp_path / "cache" / "ab").iterdir()
    assert code == 130
    assert lacking(complaint, "interrupted", f"2 parts saved in {state}", "same command") == []
    monkeypatch.setattr(Kept, "put", real)
    setting = Sides(1.0)
    code, printed, _ = ab(setting, *arguments)
    assert code == 0
    built = [worker.built for worker in setting.started[::2]]  # type: ignore[attr-defined]
    # Lora waits until ia3 has as many pairs of processes: who comes first goes by their number.
    assert built == [["ia3"], ["lora", "ia3"], ["lora", "ia3"]]
    assert [worker.side for worker in setting.started[::2]] == [1, 1, 0]  # type: ignore[attr-defined]
    assert not any(worker.described for worker in setting.started)  # type: ignore[attr-defined]
    assert "lora-toy-llama-cpu" in printed
    assert not state.exists()


@pytest.mark.parametrize("change", ["first form", "no pairs", "no list", "a field more", "no ratio"])
def test_what_another_version_kept_is_told_in_one_line(
    change: str, ab: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = Kept.put

    def interrupt(self: Kept, name: str, value: Any) -> None:
        real(self, name, value)
        raise KeyboardInterrupt

    monkeypatch.setattr(Kept, "put", interrupt)
    assert ab(Sides(1.0))[0] == 130
    monkeypatch.setattr(Kept, "put", real)
    (state,) = (tmp_path / "cache" / "ab").iterdir()
    content = json.loads(state.read_text())
    (name,) = content["parts"]
    if change == "first form":  # with a name of its own: the question belongs to it
        state.with_name("0123456789abcdef.json").write_text(json.dumps({name: [{"judged": None}]}))
        code, printed, complaint = ab(Sides(1.0))
        other = state.with_name("0123456789abcdef.json")
        assert code == 0
        assert lacking(complaint, f"peft-gauge: {other}", "another version", "remove it") == []
        assert "lora-toy-llama-cpu" in printed
        assert other.exists()
        return
    content["parts"][name] = {
        "no pairs": {"judged": None},
        "no list": 7,
        "a field more": [{**content["parts"][name][0], "judged": None}],
        "no ratio": [{**content["parts"][name][0], "log_ratio": "0.1"}],
    }[change]
    state.write_text(json.dumps(content))
    code, _, complaint = ab(Sides(1.0))
    assert code == 2
    assert lacking(complaint, f"peft-gauge: {state} contains no finished work", "remove it") == []


def test_a_file_of_this_question_in_another_form_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_GAUGE_CACHE", str(tmp_path))
    kept = Kept("ab", {"question": 1})
    assert kept.unused() is None
    kept.path.parent.mkdir(parents=True)
    others: list[dict[str, Any]] = [{"lora": []}, {"format": 99, "parts": {"lora": []}}]
    for content in others:
        kept.path.write_text(json.dumps(content))
        kept = Kept("ab", {"question": 1})
        assert kept.get("lora") is None
        told = kept.unused()
        assert told is not None
        assert str(kept.path) in told
    kept.path.with_name("another.json").write_text("{}")
    assert lacking(str(kept.unused()), f"2 files in {tmp_path / 'ab'}", "another version", "remove them") == []
    kept.put("lora", [1])
    assert Kept("ab", {"question": 1}).get("lora") == [1]
    kept.path.write_text("[]")
    with pytest.raises(GaugeError, match="contains no finished work"):
        Kept("ab", {"question": 1})


# The same code on both sides


def test_the_self_check_tells_what_the_host_can_resolve(ab: Callable[..., Any], tmp_path: Path) -> None:
    setting = Sides(1.0, first=1.01)
    code, printed, complaint = ab(setting, "--self-check", "--pairs", "8")
    lines = printed.splitlines()
    assert (code, complaint) == (0, "")
    assert len(setting.started) == 16  # type: ignore[attr-defined]
    assert lacking(lines[0], "lora-toy-llama-cpu: 8 pairs of processes", "same code") == []
    assert re.fullmatch(r"  B against A: [+-]0\.\d\d %, standard error 0\.\d\d %: .*", lines[1])
    assert re.fullmatch(r"  pairs of processes scatter by 0\.\d\d %", lines[2])
    costs = re.fullmatch(r"  cost of being started first (\S+) %, of stepping first (\S+) %; .*", lines[3])
    assert costs is not None
    assert [float(cost) for cost in costs.groups()] == pytest.approx([1.0, 0.0], abs=0.4)
    assert lines[4].startswith("  the host was ")
    assert [line.split(" pairs: interval")[0].strip() for line in lines if " pairs: interval" in line] == [
        "4",
        "8",
        "16",
    ]
    assert lines[-1] == "  verdict on these pairs: same"
    assert not (tmp_path / "r").exists(), "a self-check is no run"
    assert not list((tmp_path / "cache" / "ab").iterdir())


def test_a_self_check_that_calls_the_same_code_worse_says_so(ab: Callable[..., Any]) -> None:
    """Such as on a host that slows down whatever is B; here B is another code, which the command does not know."""

    class Wrong(Sides):
        def worker(self, environment: Environment) -> Any:
            worker = super().worker(environment)
            number, place = divmod(len(self.started) - 1, 2)  # type: ignore[attr-defined]
            worker.factor = 1.1 if (place == 1) is a_leads(number) else 1.0
            return worker

    code, printed, _ = ab(Wrong(1.0), ".", ".", "--self-check", "--pairs", "8")
    assert code == 1
    assert "%: a bias, more than 2 standard errors" in printed
    assert printed.splitlines()[-1] == "  verdict on these pairs: worse: WRONG, both sides are the same"


def test_an_interrupted_self_check_goes_on(ab: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = Kept.put

    def interrupt(self: Kept, name: str, value: Any) -> None:
        real(self, name, value)
        if len(value) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Kept, "put", interrupt)
    assert ab(Sides(1.0), "--self-check", "--pairs", "5")[0] == 130
    monkeypatch.setattr(Kept, "put", real)
    setting = Sides(1.0)
    assert ab(setting, "--self-check", "--pairs", "5")[0] == 0
    assert len(setting.started) == 4  # type: ignore[attr-defined]


def test_a_self_check_of_what_does_not_run_is_one_line(ab: Callable[..., Any]) -> None:
    code, _, complaint = ab(Sides(1.0, a={"build": "no such method"}), "--self-check")
    assert (code, complaint) == (2, "peft-gauge: lora-toy-llama-cpu failed: no such method\n")


def test_what_a_host_can_resolve_by_hand() -> None:
    """Half of the pairs 1 % up and half 1 % down by who is first, and 0.1 % either way beside it."""
    a_first = [a_leads(number) for number in range(8)]
    ratios = [(-0.01 if first else 0.01) + (0.001, -0.001)[number // 2 % 2] for number, first in enumerate(a_first)]
    found = resolution(ratios, a_first, PairRule(error=0.01))
    assert (found.bias, found.first) == pytest.approx((0.0, 0.01))
    assert found.spread == pytest.approx(math.sqrt(8 * 0.001**2 / 6))
    assert found.standard_error == pytest.approx(found.spread / math.sqrt(8))
    eight = found.analyses[1]
    deviation = math.hypot(found.spread, 0.01)
    assert eight.half_width == pytest.approx(4.944470 * deviation / math.sqrt(8))  # t, 7 degrees, 1 - 0.01/12
    assert eight.smallest == pytest.approx(math.expm1(math.log(1.03) + 0.896030 * deviation / math.sqrt(8)))
    assert found.analyses[2].half_width < eight.half_width < found.analyses[0].half_width
    with pytest.raises(GaugeError, match="needs at least 4 pairs"):
        resolution(ratios[:3], a_first[:3], PairRule())


def test_the_smallest_difference_is_found_as_often_as_is_said() -> None:
    generator = random.Random(1)

    def drawn(slower: float) -> list[float]:
        return [generator.gauss(math.log1p(slower), 0.02) for _ in range(16)]

    analyses = [resolution(drawn(0.0), [a_leads(n) for n in range(16)], PairRule()).analyses[2] for _ in range(200)]
    smallest = statistics.median(each.smallest for each in analyses)
    found = sum(over_processes(drawn(smallest), PairRule()).verdict == "worse" for _ in range(400))
    assert 0.72 < found / 400 < 0.88


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give both sides, such as"),
        ((".",), "give both sides, such as"),
        ((".", "peft==0.20.0", "--self-check"), "--self-check runs the same packages on both sides"),
        (("--self-check", "--pairs", "3"), "--pairs must be at least 4, got 3"),
        (("peft=0.2", "."), "'peft=0.2' is not a valid requirement"),
        ((".", "torch==1.0"), "torch==1.0 differs from the installed torch"),
        ((".", ".", "--method", "loar"), "unknown method 'loar'; did you mean lora"),
        ((".", ".", "--method", "lora,lora"), "--method lora is given twice"),
        ((".", ".", "--model", "toy-lama"), "unknown model 'toy-lama'; did you mean toy-llama"),
        ((".", ".", "--device", "gpu"), "unknown device 'gpu'"),
        ((".", ".", "--dtype", "bf17"), "unknown dtype 'bf17'"),
        ((".", ".", "--threads", "0"), "--threads must be at least 1, got 0"),
        ((".", ".", "--batch", "0"), "--batch must be at least 1, got 0"),
        ((".", ".", "--seq", "1"), "--seq must be at least 2, got 1"),
        ((".", ".", "--seq", "999999"), "999999 tokens exceeds the limit of toy-llama"),
        ((".", ".", "--budget", "0"), "--budget must be positive, got 0"),
        ((".", ".", "--minimum-effect", "3"), "--minimum-effect must be between 0 and 1"),
        ((".", ".", "--rules", "none.toml"), "none.toml"),
    ],
)
def test_what_cannot_be_asked_is_one_line(arguments: tuple[str, ...], said: str, run_command: Command) -> None:
    code, _, complaint = run_command("ab", *arguments)
    assert code == 2
    assert said in complaint
    assert len(complaint.strip().splitlines()) == 1


# The step


def test_both_sides_run_the_precision_that_is_asked_for() -> None:
    (spec,) = ab_options.cases_of(["lora"], "toy-llama", 1, 8, "cpu", mixed_precision="bf16")
    assert spec.mixed_precision == "bf16"
    assert worker._case(spec).settings == StepSettings(1, 8, mixed_precision="bf16")
    with pytest.raises(GaugeError, match="unknown mixed precision 'bf8'"):
        ab_options.cases_of(["lora"], "toy-llama", 1, 8, "cpu", mixed_precision="bf8")


def test_a_trainers_step_reaches_the_case_and_its_defaults_are_each_sides_own() -> None:
    changes = ["max_grad_norm=0.5", "lr_scheduler_type=constant"]
    (spec,) = ab_options.cases_of(["lora"], "toy-llama", 1, 8, "cpu", loop="trainer", changes=changes)
    assert spec.mixed_precision is None, "left to the trainer"
    assert CaseSpec(**json.loads(json.dumps(asdict(spec)))) == spec, "as it goes to a side"
    case = worker._case(spec)
    assert (case.loop, case.trainer_arguments) == ("trainer", (("lr_scheduler_type", "constant"),))
    assert (case.settings.clip_grad_norm, case.settings.optimizer) == (0.5, "adamw-fused")
    with pytest.raises(GaugeError, match="unknown loop 'trl'"):
        ab_options.cases_of(["lora"], "toy-llama", 1, 8, "cpu", loop="trl")
    with pytest.raises(GaugeError, match="is an argument of a trainer"):
        ab_options.cases_of(["lora"], "toy-llama", 1, 8, "cpu", changes=changes)
