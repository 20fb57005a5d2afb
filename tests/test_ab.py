"""A against B: pairs of steps with a planted ratio, two processes a side that must agree, and the command."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from peft_gauge.clock.rounds import WarmUp, median_interval
from peft_gauge.environments import measuring, options
from peft_gauge.environments.build import Environment
from peft_gauge.environments.measuring import Finding, Setting, compare_case, compare_cases
from peft_gauge.environments.pairs import (
    ERROR_SHARES,
    PROCESS_PAIRS,
    Paired,
    PairedRatios,
    PairRule,
    judge_pairs,
    over_processes,
    step_in_pairs,
)
from peft_gauge.environments.requirements import Side, parse_side
from peft_gauge.environments.state import Kept
from peft_gauge.environments.worker import CaseSpec, WorkerFailed
from peft_gauge.errors import GaugeError
from peft_gauge.history.reading import read_run, runs_in
from peft_gauge.history.schema import SAMPLES
from tests.stepping_child import MACHINE, figures

if TYPE_CHECKING:
    from peft_gauge.history.intervals import Judgement

Command = Callable[..., tuple[int, str, str]]
CASE = CaseSpec("toy-llama", "lora", 1, 8, "cpu", "float32")
SHORT = WarmUp(least=1, most=2, window=1)


@dataclass
class Machine:
    """Two sides on a clock of its own: B takes ``factor`` times as long, both ``drift``, each with noise of its own."""

    factor: float = 1.0
    noise: float = 0.1
    seed: int = 0
    drift: Callable[[float], float] = lambda now: 1.0
    now: float = 0.0
    order: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def clock(self) -> float:
        return self.now

    def step(self, side: str) -> float:
        self.order.append(side)
        seconds = 0.01 * (self.factor if side == "B" else 1.0) * self.drift(self.now)
        seconds *= self.random.lognormvariate(0, self.noise)
        self.now += seconds
        return seconds

    def run(self, rule: PairRule, warm_up: WarmUp = SHORT) -> Paired:
        return step_in_pairs(lambda: self.step("A"), lambda: self.step("B"), rule, clock=self.clock, warm_up=warm_up)


# Pairs


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.05, "worse"), (1.0, "same"), (1 / 1.05, "better"), (1.01, "same"), (1.5, "worse")]
)
def test_a_planted_ratio_is_found(factor: float, verdict: str) -> None:
    for seed in range(5):
        found = Machine(factor, noise=0.05, seed=seed).run(PairRule(budget_seconds=100))
        assert found.judged.verdict == verdict
        assert found.judged.low <= found.judged.ratio <= found.judged.high
        assert found.judged.ratio == pytest.approx(factor, rel=0.03)
        assert found.judged.further is None


def test_drift_of_both_sides_cancels() -> None:
    """The machine halves its speed in the middle, and swings by a tenth all the time."""
    for factor, verdict in ((1.05, "worse"), (1.0, "same")):
        machine = Machine(factor, 0.03, drift=lambda now: (1 + 0.1 * math.sin(now * 7)) * (2 if now > 0.3 else 1))
        found = machine.run(PairRule(budget_seconds=100))
        assert max(found.seconds_a) > 1.8 * min(found.seconds_a)
        assert found.judged.verdict == verdict
        assert found.judged.ratio == pytest.approx(factor, rel=0.02)


def test_a_few_wild_steps_change_nothing() -> None:
    machine = Machine(1.0, 0.03)
    machine.drift = lambda now: 50.0 if machine.random.random() < 0.05 else 1.0
    assert machine.run(PairRule(budget_seconds=1000)).judged.verdict == "same"


def test_sides_take_turns_exactly() -> None:
    machine = Machine(noise=0.3)
    found = machine.run(PairRule(budget_seconds=2.0, minimum_effect=0.001))
    assert machine.order[::2] == ["A"] * (len(machine.order) // 2)
    assert machine.order[1::2] == ["B"] * (len(machine.order) // 2)
    assert len(found.seconds_a) == len(found.seconds_b) == found.pairs == len(machine.order) // 2 - 2


def test_the_verdict_is_looked_at_less_and_less_often() -> None:
    looks: list[int] = []
    machine = Machine(noise=0.5)
    step_in_pairs(
        lambda: machine.step("A"),
        lambda: machine.step("B"),
        PairRule(budget_seconds=20, minimum_effect=0.001),
        clock=machine.clock,
        warm_up=SHORT,
        on_look=lambda pairs, judged: looks.append(pairs),
    )
    assert looks[:4] == [24, 34, 47, 66]
    rule = PairRule()
    spent = [rule.error_at(look) for look in range(1, 10_000)]
    assert spent[0] == rule.error / 2
    assert rule.error * 0.99 < sum(spent) < rule.error


class Uncorrected(PairRule):
    def error_at(self, look: int) -> float:
        return self.error


def false_alarms(rule: PairRule, trials: int) -> float:
    """The share of comparisons of equal sides that end with worse or better; heavy-tailed noise, 12 looks."""

    def one(seed: int) -> bool:
        machine = Machine(noise=0.2, seed=seed)
        machine.drift = lambda now: 3.0 if machine.random.random() < 0.1 else 1.0
        return machine.run(rule).judged.verdict != "cannot tell"

    return sum(map(one, range(trials))) / trials


def test_looking_often_does_not_raise_the_error() -> None:
    """With a minimum effect of nothing, each verdict on equal sides is a false alarm."""
    trials = 400
    budget, nothing = 24.0, 1e-9
    corrected = false_alarms(PairRule(budget, nothing, error=0.1), trials)
    # One-sided 99.9 % bound of a binomial share of 0.1.
    assert corrected <= 0.1 + 3.1 * math.sqrt(0.1 * 0.9 / trials)
    assert false_alarms(Uncorrected(budget, nothing, error=0.1), 150) > 0.2, "the correction is not needed here"


def test_at_the_end_of_the_budget_it_says_how_many_pairs_would_decide() -> None:
    """And that many do, mostly: intervals shrink as 1/√n."""
    decided = 0
    for seed in range(20):
        rule = PairRule(budget_seconds=2.0)
        found = Machine(1.06, noise=0.4, seed=seed).run(rule)
        if found.judged.verdict != "cannot tell":
            continue
        assert found.judged.further is not None
        assert found.judged.further >= 1
        assert found.pair_seconds == pytest.approx(0.021, rel=0.3)
        if abs(math.log(found.judged.ratio / 1.06)) < 0.02:  # the estimate cannot be better than its median
            enough = found.pairs + 2 * found.judged.further
            again = Machine(1.06, noise=0.4, seed=seed + 100)
            a, b = ([again.step(side) for _ in range(enough)] for side in "AB")
            decided += judge_pairs(a, b, rule, found.looks).verdict == "worse"
    assert decided >= 3


def test_so_many_pairs_would_decide() -> None:
    """Of ratios that lie as a normal distribution does, exactly: fewer leave it open, and a few more decide it."""

    def judged(count: int) -> Judgement:
        quantiles = (statistics.NormalDist().inv_cdf((place + 0.5) / count) for place in range(count))
        return judge_pairs([1.0] * count, [1.06 * math.exp(0.5 * each) for each in quantiles], PairRule(), 1)

    further = judged(100).further
    assert further is not None
    assert judged(100 + round(0.8 * further)).verdict == "cannot tell"
    assert judged(100 + round(1.2 * further)).verdict == "worse"


def test_a_median_just_below_the_minimum_effect_needs_many_pairs_but_not_endless_ones() -> None:
    seconds_b = [1.0299 * (1 + place / 100) for place in range(-30, 31)]
    judged = judge_pairs([1.0] * 61, seconds_b, PairRule(), 1)
    assert judged.verdict == "cannot tell"
    assert judged.further is not None
    assert 1000 < judged.further <= 61 * 10**6


def test_a_budget_too_short_for_an_interval_cannot_tell() -> None:
    found = Machine(2.0).run(PairRule(budget_seconds=0.01))
    assert (found.pairs, found.judged.verdict) == (1, "cannot tell")
    assert found.judged.further is not None
    json.dumps(found.judged.high, allow_nan=False)


def test_pairs_begin_when_both_sides_are_warm() -> None:
    slowing = iter([*(1 / n for n in range(1, 12)), *[1 / 12] * 1000])
    warm = WarmUp(least=3, most=30, window=3)
    found = step_in_pairs(lambda: 0.1, lambda: next(slowing), PairRule(minimum_effect=0.01), warm_up=warm)
    assert found.warmed_up
    assert found.judged.verdict == "better"
    assert found.seconds_b[0] <= 1 / 11
    never = (0.9**n for n in range(1000))
    assert not step_in_pairs(lambda: 1.0, lambda: next(never), PairRule(), warm_up=warm).warmed_up


def test_a_clock_that_stands_still_is_refused() -> None:
    with pytest.raises(GaugeError, match="0 seconds"):
        step_in_pairs(lambda: 0.0, lambda: 1.0, PairRule(), warm_up=SHORT)


@pytest.mark.parametrize("budget", [0.0, -1.0, math.inf, math.nan])
def test_a_budget_is_a_positive_number(budget: float) -> None:
    with pytest.raises(GaugeError, match="a budget of"):
        PairRule(budget)


@pytest.mark.parametrize("effect", [0.0, 1.0, -0.1, math.nan])
def test_a_minimum_effect_is_a_share(effect: float) -> None:
    with pytest.raises(GaugeError, match="minimum effect"):
        PairRule(minimum_effect=effect)


@pytest.mark.parametrize("count", [1, 5, 6, 7, 24, 101, 600])
@pytest.mark.parametrize("error", [0.05, 0.0083, 1e-4])
def test_the_interval_is_that_of_order_statistics(count: int, error: float) -> None:
    values = [random.Random(count).gauss(0, 1) for _ in range(count)]
    exact = median_interval(values, 1 - error)
    assert PairedRatios(values).interval(error) == (exact or (-700, 700))


def test_the_interval_is_that_of_the_sign_test() -> None:
    """An end of the interval is just not rejected at its error, and what lies outside is."""
    ratios = PairedRatios(list(range(-20, 21)))
    low, high = ratios.interval(0.05)
    assert ratios.p_value(low + 1e-9) > 0.05 >= ratios.p_value(low - 1e-9)
    assert ratios.p_value(high - 1e-9) > 0.05 >= ratios.p_value(high + 1e-9)
    assert ratios.p_value(ratios.log_ratio) > 0.7


# A case on both sides


class Sides(Setting):
    """Workers that are none: the n-th pair of them has B slower by the n-th factor."""

    def __init__(self, *factors: float, a: dict[str, Any] | None = None, b: dict[str, Any] | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "factors", list(factors))
        object.__setattr__(self, "told", (a or {}, b or {}))
        object.__setattr__(self, "started", [])

    def worker(self, environment: Environment) -> Any:
        started: list[FakeWorker] = self.started  # type: ignore[attr-defined]
        side = len(started) % 2
        factor = self.factors[min(len(started) // 2, len(self.factors) - 1)] if side else 1.0  # type: ignore[attr-defined]
        started.append(FakeWorker(factor, self.told[side], len(started)))  # type: ignore[attr-defined]
        return started[-1]


class FakeWorker:
    def __init__(self, factor: float, told: dict[str, Any], number: int) -> None:
        self.factor, self.told, self.alive = factor, told, True
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
        return figures(method=case.method, **self.told.get("figures", {}))

    def build(self, case: CaseSpec) -> None:
        self.built.append(case.method)

    def step(self) -> float:
        if "step" in self.told or self.built[-1] == self.breaks_at:
            raise WorkerFailed("crashed", self.told.get("step", "gone"))
        factor = self.of_ia3 if self.built[-1] == "ia3" else self.factor
        return 0.01 * factor * self.random.lognormvariate(0, 0.02)


ENVIRONMENTS = (Environment(Side(()), None, {}), Environment(parse_side("gaugeprobe==2.0"), None, {}))


def found_by(setting: Sides, budget: float = 5.0) -> Finding:
    finding = compare_case(ENVIRONMENTS, CASE, PairRule(budget), setting)
    assert not any(worker.alive for worker in setting.started)  # type: ignore[attr-defined]
    assert Finding.from_json(json.loads(json.dumps(finding.as_json()))) == finding
    return finding


def processes(finding: Finding) -> list[int]:
    return [len(record.figures[SAMPLES]["step_seconds"]) for record in finding.records]


@pytest.mark.parametrize(("factor", "verdict"), [(1.1, "worse"), (0.9, "better"), (1.0, "same")])
def test_several_pairs_of_processes_decide(factor: float, verdict: str) -> None:
    """They agree, so the first look, at four pairs, is enough."""
    finding = found_by(Sides(factor))
    assert finding.judged is not None
    assert finding.judged.verdict == verdict
    assert finding.judged.ratio == pytest.approx(factor, rel=0.01)
    assert finding.note == "4 pairs of processes"
    assert processes(finding) == [4, 4]


def test_processes_that_do_not_agree_decide_nothing() -> None:
    """Each pair of steps within a pair of processes says +10 % or −10 %, and all of it is how these processes lie."""
    finding = found_by(Sides(*[1.1, 0.9] * 8), budget=2.0)
    assert finding.judged is not None
    assert finding.judged.verdict == "cannot tell"
    assert finding.note is not None
    assert finding.note.startswith("16 pairs of processes; ")
    assert "more would decide it" in finding.note
    assert processes(finding) == [16, 16]


def test_the_looks_share_the_error_and_the_smallest_effects_wait_for_the_last() -> None:
    assert sum(ERROR_SHARES.values()) == pytest.approx(1)
    assert tuple(ERROR_SHARES) == PROCESS_PAIRS
    ratios = [0.04, 0.016] * 8  # mean 0.028, a standard error of 0.003
    judged = over_processes(ratios, PairRule(error=0.02))
    assert judged.error == pytest.approx(0.02 * 2 / 3)
    assert judged.verdict == "worse", "2.8 % is below the minimum effect of 3 %, but well above a third of it"
    assert over_processes([0.03, 0.02] * 2, PairRule(error=0.02)).error == pytest.approx(0.02 / 6)


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
            worker.of_ia3 = 1.0 if number % 2 else 1.1 if number % 4 else 0.9
            return worker

    setting = Apart(1.0)
    lora, ia3 = compare_cases(ENVIRONMENTS, cases, PairRule(2.0), setting)
    assert [each.records[0].id for each in (lora, ia3)] == [each.id for each in cases]
    assert [each.judged and each.judged.verdict for each in (lora, ia3)] == ["same", "cannot tell"]
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
        monkeypatch.setattr(options, "setting_of", lambda threads, device: setting)
        given = arguments or ("gaugeprobe==1", "gaugeprobe==2")
        return run_command("ab", *given, "--device", "cpu", "--results", str(tmp_path / "r"), "--budget", "3")

    return run


@pytest.mark.parametrize(
    ("factors", "code", "verdict"),
    [((1.2, 1.2), 1, "worse"), ((0.8, 0.8), 0, "better"), ((1.0,), 0, "same"), ((1.2, 0.8) * 8, 0, "cannot tell")],
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
    more = {"figures": {key: value for key, value in figures(3).items() if key in ("fingerprint", "flops_per_step")}}
    code, printed, _ = ab(Sides(1.2, 1.0, b=more))
    assert code == 1, "more FLOPs are worse, whatever time says"
    assert "CHANGED" in printed
    assert "  forward: +1 aten.mm.default in layer (2 → 3)" in printed.splitlines()
    same_flops = {"figures": {"fingerprint": figures(3)["fingerprint"]}}
    code, printed, _ = ab(Sides(1.0, b=same_flops))
    assert code == 0, "another shape alone is news, not a verdict"
    assert "  forward: +1 aten.mm.default in layer (2 → 3)" in printed.splitlines()


def test_settings_that_a_release_changed_do_not_forbid_the_comparison(ab: Callable[..., Any]) -> None:
    code, printed, _ = ab(Sides(1.2, 1.2, b={"figures": {"settings": {"batch": 1, "r": 8}}}))
    assert code == 1
    assert "note: lora-toy-llama-cpu: settings that the releases changed: r: absent → 8" in printed


def test_both_sides_are_saved_as_runs(ab: Callable[..., Any], tmp_path: Path) -> None:
    ab(Sides(1.2, 1.2))
    a, b = map(read_run, runs_in(tmp_path / "r"))
    assert a.options["ab"] == {"side": "A", "requirements": "gaugeprobe==1", "of": ["gaugeprobe==1", "gaugeprobe==2"]}
    assert b.options["ab"]["side"] == "B"
    assert a.libraries == b.libraries == {"gaugeprobe": "gaugeprobe here"}
    seconds = [[len(process) for process in run.cases[0].figures[SAMPLES]["step_seconds"]] for run in (a, b)]
    assert seconds[0] == seconds[1]
    assert len(seconds[0]) == 4


def test_several_methods_share_the_error(ab: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[float] = []
    real = compare_cases

    def spy(environments: Any, cases: Any, rule: PairRule, *rest: Any, **kept: Any) -> Iterator[Finding]:
        errors.append(rule.error)
        return real(environments, cases, rule, *rest, **kept)

    monkeypatch.setattr(measuring, "compare_cases", spy)
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
    assert complaint == "peft-gauge: nothing ran with A (gaugeprobe==1): bitsandbytes is too old\n"


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
    assert complaint == (
        f"peft-gauge: interrupted; what was measured of 2 parts is kept in {state}, "
        "and the same command goes on from there\n"
    )
    monkeypatch.setattr(Kept, "put", real)
    setting = Sides(1.0)
    code, printed, _ = ab(setting, *arguments)
    assert code == 0
    built = [worker.built for worker in setting.started[::2]]  # type: ignore[attr-defined]
    assert built == [["lora", "ia3"], ["lora", "ia3"], ["ia3"]]
    assert not any(worker.described for worker in setting.started)  # type: ignore[attr-defined]
    assert "lora-toy-llama-cpu" in printed
    assert not state.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("peft=0.2", "."), "'peft=0.2' is no requirement"),
        ((".", "torch==1.0"), "torch==1.0 is another torch than the installed"),
        ((".", ".", "--method", "loar"), "unknown method 'loar'; did you mean lora"),
        ((".", ".", "--method", "lora,lora"), "--method lora is given twice"),
        ((".", ".", "--model", "toy-lama"), "unknown model 'toy-lama'; did you mean toy-llama"),
        ((".", ".", "--device", "gpu"), "unknown device 'gpu'"),
        ((".", ".", "--dtype", "bf16"), "unknown dtype 'bf16'"),
        ((".", ".", "--threads", "0"), "--threads must be at least 1, not 0"),
        ((".", ".", "--batch", "0"), "--batch must be at least 1, not 0"),
        ((".", ".", "--seq", "1"), "--seq must be at least 2, not 1"),
        ((".", ".", "--seq", "999999"), "a sequence of 999999 tokens is beyond toy-llama's limit"),
        ((".", ".", "--budget", "0"), "a budget of 0 s is none"),
        ((".", ".", "--minimum-effect", "3"), "the minimum effect must lie between 0 and 1"),
        ((".", ".", "--rules", "none.toml"), "none.toml"),
    ],
)
def test_what_cannot_be_asked_is_one_line(arguments: tuple[str, ...], said: str, run_command: Command) -> None:
    code, _, complaint = run_command("ab", *arguments)
    assert code == 2
    assert said in complaint
    assert len(complaint.strip().splitlines()) == 1
