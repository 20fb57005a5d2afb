"""The first worse release: bisection over planted verdicts, probes of planted releases, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from peft_gauge.commands import ab_options
from peft_gauge.environments import build, probe
from peft_gauge.environments.bisection import Answer, BisectionResult, Probe, bisect, expected_probes
from peft_gauge.environments.build import Environment, NoEnvironment
from peft_gauge.environments.measurement import MethodResult, Setting
from peft_gauge.environments.pairs import PairRule
from peft_gauge.environments.probe import Metric, difference, parse_metric, rule_for
from peft_gauge.environments.requirements import Side
from peft_gauge.errors import GaugeError
from peft_gauge.history.intervals import Judgement, Verdict
from peft_gauge.history.schema import CaseRecord
from tests.support.facts import lacking
from tests.support.stepping_child import MACHINE, make_wheel, metrics

if TYPE_CHECKING:
    from peft_gauge.environments.worker import CaseSpec

Command = Callable[..., tuple[int, str, str]]
LETTERS: Mapping[str, Answer] = {"g": "good", "b": "bad", "x": "unusable", "?": "inconclusive"}


def planted(answers: str) -> tuple[BisectionResult, list[str]]:
    """The outcome of a bisection of releases "0", "1", … with these answers, and which were asked for the reference."""
    tried: list[str] = []

    def is_usable(release: str) -> Probe:
        tried.append(release)
        return Probe(release, "unusable" if answers[int(release)] == "x" else "good", "")

    def probe(release: str) -> Probe:
        return Probe(release, LETTERS[answers[int(release)]], f"why {release}")

    return bisect([str(number) for number in range(len(answers))], is_usable, probe), tried


# Which release


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8, 20])
def test_each_first_bad_release_is_found(count: int) -> None:
    for first in range(1, count):
        outcome, _ = planted("g" * first + "b" * (count - first))
        assert outcome.first_bad is not None
        assert (outcome.first_bad.release, outcome.last_good) == (str(first), str(first - 1))
        assert outcome.between == ()
        assert len(outcome.probes) <= expected_probes(count)
        assert len({probe.release for probe in outcome.probes}) == len(outcome.probes), "none is asked twice"


def test_where_all_are_good_only_the_ends_are_asked() -> None:
    outcome, _ = planted("gggggggg")
    assert outcome.first_bad is None
    assert outcome.end == Probe("7", "good", "why 7")
    assert [probe.release for probe in outcome.probes] == ["0", "7"]


@pytest.mark.parametrize(
    ("answers", "reference", "last_good", "first_bad", "between"),
    [
        ("ggxxbb", "0", "1", "4", ("2", "3")),
        ("gg?bb", "0", "1", "3", ("2",)),
        ("ggx?bb", "0", "1", "4", ("2", "3")),
        ("gxgxbxb", "0", "2", "4", ("3",)),
        ("xxgbb", "2", "2", "3", ()),
        ("ggbbxx", "0", "1", "2", ()),
        ("g????b", "0", "0", "5", ("1", "2", "3", "4")),
        ("gxxxxgb", "0", "5", "6", ()),
        ("gbxxxxb", "0", "0", "1", ()),
    ],
)
def test_what_cannot_be_judged_is_neither_good_nor_bad(
    answers: str, reference: str, last_good: str, first_bad: str, between: tuple[str, ...]
) -> None:
    outcome, _ = planted(answers)
    assert outcome.reference == reference
    assert outcome.last_good == last_good
    assert outcome.first_bad is not None
    assert outcome.first_bad.release == first_bad
    assert outcome.between == between


def test_every_pattern_of_releases_is_answered_rightly() -> None:
    """All good, then all bad, with any of them impossible to judge: what is named lies where it must."""
    for first in range(2, 6):
        for holes in range(2**4):
            answers = list("g" * first + "b" * (7 - first))
            for place in range(4):
                if holes >> place & 1:
                    answers[place + 1] = "x?"[place % 2]
            outcome, _ = planted("".join(answers))
            assert outcome.first_bad is not None
            assert outcome.last_good is not None
            bad, good = int(outcome.first_bad.release), int(outcome.last_good)
            assert answers[bad] == "b"
            assert answers[good] == "g"
            assert all(answers[int(each)] in "x?" for each in outcome.between)
            assert list(map(int, outcome.between)) == list(range(good + 1, bad))


def test_an_end_that_cannot_be_told_ends_it() -> None:
    outcome, _ = planted("ggg?")
    assert outcome.first_bad is None
    assert outcome.end is not None
    assert outcome.end.answer == "inconclusive"


def test_without_two_usable_releases_there_is_no_answer() -> None:
    outcome, tried = planted("xxx")
    assert (outcome.reference, outcome.end, tried) == (None, None, ["0", "1", "2"])
    outcome, _ = planted("xgxx")
    assert (outcome.reference, outcome.end, outcome.first_bad) == ("1", None, None)


# What is asked


@pytest.mark.parametrize(
    ("text", "metric"),
    [
        ("qlora:step_seconds", Metric("qlora", "step_seconds")),
        ("lora:trainable_params", Metric("lora", "trainable_params")),
        ("lora:fingerprint", Metric("lora", "fingerprint")),
        ("lora:fingerprint:flops", Metric("lora", "fingerprint", "flops")),
        ("lora:fingerprint:peak bytes", Metric("lora", "fingerprint", "peak_bytes")),
    ],
)
def test_metrics(text: str, metric: Metric) -> None:
    assert parse_metric(text) == metric
    assert metric.is_time == (text == "qlora:step_seconds")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lora", "'lora' is not a valid metric; write METHOD:METRIC"),
        ("lora:a:b:c", "is not a valid metric"),
        ("loar:step_seconds", "unknown method 'loar'; did you mean lora"),
        ("lora:step_second", "unknown metric 'step_second'; did you mean step_seconds?"),
        ("lora:fingerprint:flop", "unknown part of a fingerprint 'flop'; did you mean flops?"),
        ("lora:step_seconds:flops", "only a fingerprint has parts; write lora:step_seconds"),
    ],
)
def test_what_is_no_metric_is_one_line(text: str, said: str) -> None:
    with pytest.raises(GaugeError) as caught:
        parse_metric(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        ("lora:fingerprint:operators", "forward: +1 aten.mm.default in layer (2 → 3)"),
        ("lora:fingerprint:flops", "forward: FLOPs of aten.mm.default: 2,000 → 3,000"),
        ("lora:fingerprint:peak_bytes", None),
        ("lora:fingerprint:losses", None),
        ("lora:fingerprint", "and 1 more"),
        ("lora:flops_per_step", "flops_per_step: 2,000 → 3,000"),
        ("lora:trainable_params", None),
    ],
)
def test_a_figure_without_noise_is_different_or_not(metric: str, text: str | None) -> None:
    asked = parse_metric(metric)
    assert difference(asked, metrics(2), metrics(2)) is None
    found = difference(asked, metrics(2), metrics(3))
    assert found is None if text is None else found is not None and text in found


def test_a_figure_that_is_unknown_is_not_zero() -> None:
    known, unknown = {"flops_per_step": 0}, dict[str, Any]()
    assert difference(parse_metric("lora:flops_per_step"), known, unknown) == "flops_per_step: 0 → unknown"


def test_every_part_of_a_fingerprint_can_be_asked_for() -> None:
    from peft_gauge.history.fingerprints import _TEXTS

    assert {what for kinds in probe.PARTS.values() for what in kinds} | {"adapter_bytes"} == {
        *_TEXTS,
        "modules",
        "losses",
    }


def test_all_verdicts_together_keep_the_error() -> None:
    for releases in (2, 3, 12, 50):
        verdicts = expected_probes(releases) - 1  # the first release is compared with none
        assert 2 * verdicts * rule_for(releases, PairRule(error=0.05)).error == pytest.approx(0.05)


# The command, with planted releases


class World:
    """Releases 1.0, 2.0, … of a library with planted facts; counts what is asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *facts: dict[str, Any]) -> None:
        self.facts = {f"{number}.0": each for number, each in enumerate(facts, start=1)}
        self.timed: list[tuple[str, float]] = []
        self.shaped: list[str] = []
        self.stop_at: str | None = None
        monkeypatch.setattr(build, "releases", self.releases)
        monkeypatch.setattr(probe.Prober, "_environment", lambda prober, release: self.environment(release))
        monkeypatch.setattr(probe, "shape_of", self.shape_of)
        monkeypatch.setattr(probe, "compare_case", self.compare_case)
        monkeypatch.setattr(ab_options, "setting_of", lambda threads, device: Setting())

    def releases(self, library: str) -> list[Any]:
        from packaging.version import Version

        return [Version(release) for release in self.facts]

    def environment(self, release: str) -> Environment:
        if self.stop_at == release:
            raise KeyboardInterrupt
        if "install" in self.facts[release]:
            raise NoEnvironment(self.facts[release]["install"])
        return Environment(Side((f"gaugeprobe=={release}",)), None, {})

    def record(self, environment: Environment) -> CaseRecord:
        facts = self.of(environment)
        if "build" in facts:
            return CaseRecord("lora", "ab", "failed", facts["build"], {})
        return CaseRecord("lora", "ab", "passed", None, metrics(facts.get("products", 2)))

    def of(self, environment: Environment) -> dict[str, Any]:
        return self.facts[environment.side.name.removeprefix("gaugeprobe==")]

    def shape_of(self, environment: Environment, *rest: Any) -> tuple[CaseRecord, Mapping[str, Any]]:
        self.shaped.append(environment.side.name.removeprefix("gaugeprobe=="))
        return self.record(environment), MACHINE

    def compare_case(
        self, environments: tuple[Environment, Environment], case: CaseSpec, rule: PairRule, *rest: Any
    ) -> MethodResult:
        facts = self.of(environments[1])
        self.timed.append((environments[1].side.name.removeprefix("gaugeprobe=="), rule.budget_seconds))
        verdicts: Sequence[Verdict] = facts.get("verdicts", ["same"])
        verdict = verdicts[min(len([each for each in self.timed if each[0] == self.timed[-1][0]]), len(verdicts)) - 1]
        records = (self.record(environments[0]), self.record(environments[1]))
        ratio = 1.1 if verdict == "worse" else 1.0
        judged = Judgement(verdict, ratio, ratio - 0.01, ratio + 0.01, rule.error, None)
        return MethodResult(records, (MACHINE, MACHINE), judged if "build" not in facts else None, "66 pairs")


SAME: dict[str, Any] = {}
WORSE = {"verdicts": ["worse"]}
TIME, SHAPE = "lora:step_seconds", "lora:fingerprint"


@pytest.fixture
def bisecting(
    run_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[World, Callable[[], tuple[int, str, str]]]]:
    """``bisecting(metric, *facts)``: a world, and the command that bisects it."""
    monkeypatch.setenv("PEFT_GAUGE_CACHE", str(tmp_path))

    def make(metric: str, *facts: dict[str, Any]) -> tuple[World, Callable[[], tuple[int, str, str]]]:
        world = World(monkeypatch, *facts)
        arguments = ("gaugeprobe", "1.0..99.0", "--metric", metric, "--device", "cpu", "--budget", "5")
        return world, lambda: run_command("bisect", *arguments)

    return make


def last_line(text: str) -> str:
    return text.splitlines()[-1]


Bisecting = Callable[..., tuple[World, Callable[[], tuple[int, str, str]]]]


@pytest.mark.parametrize(
    ("metric", "facts", "code", "last"),
    [
        (TIME, [SAME, SAME, WORSE, WORSE], 1, ["gaugeprobe 3.0 is the first that is worse", "2.0 is not", "+10.0 %"]),
        (TIME, [SAME, SAME], 0, ["gaugeprobe 2.0 is not worse", "1.0"]),
        (TIME, [SAME, {"verdicts": ["better"]}], 0, ["gaugeprobe 2.0 is not worse", "1.0"]),
        (SHAPE, [SAME, SAME, {"products": 3}], 1, ["gaugeprobe 3.0 is the first that is different", "2.0 is not"]),
        (SHAPE, [SAME, WORSE], 0, ["gaugeprobe 2.0 is not different", "1.0"]),
        (
            TIME,
            [SAME, {"install": "needs another torch"}, {"build": "no NF4"}, WORSE],
            1,
            ["gaugeprobe 4.0 is worse", "1.0 is not", "earlier, with 2.0, 3.0"],
        ),
        (
            TIME,
            [{"install": "no wheel"}, SAME, WORSE, {"build": "x"}],
            1,
            ["gaugeprobe 3.0 is the first that is worse"],
        ),
    ],
)
def test_the_command_finds_it(
    metric: str, facts: list[dict[str, Any]], code: int, last: list[str], bisecting: Bisecting
) -> None:
    _, run = bisecting(metric, *facts)
    found, printed, complaint = run()
    assert (found, complaint) == (code, "")
    assert lacking(last_line(printed), *last) == []
    for release, each in enumerate(facts, start=1):
        for why in (each.get("install"), each.get("build")):
            assert why is None or any(
                line.startswith(f"  {release}.0") and "left out" in line and why in line
                for line in printed.splitlines()
            )


@pytest.mark.parametrize(
    ("metric", "facts", "said"),
    [
        (
            TIME,
            [{"install": "no wheel"}] * 2,
            ["no release of gaugeprobe", "no wheel"],
        ),
        (SHAPE, [SAME, {"build": "x"}], ["only gaugeprobe 1.0 runs"]),
        (
            TIME,
            [SAME, SAME, {"verdicts": ["inconclusive"]}],
            ["inconclusive", "gaugeprobe 3.0", "1.0", "+0.0 % [-1.0 %, +1.0 %]", "66 pairs", "--budget"],
        ),
    ],
)
def test_what_cannot_be_answered_is_one_line(
    metric: str, facts: list[dict[str, Any]], said: list[str], bisecting: Bisecting
) -> None:
    _, run = bisecting(metric, *facts)
    code, _, complaint = run()
    assert (code, complaint.count("\n")) == (2, 1)
    assert lacking(complaint, "peft-gauge: ", *said) == []


def test_an_undecided_release_gets_more_once(bisecting: Bisecting) -> None:
    world, run = bisecting(TIME, SAME, {"verdicts": ["inconclusive", "worse"]}, WORSE)
    code, printed, _ = run()
    assert code == 1
    assert world.timed == [("3.0", 5.0), ("2.0", 5.0), ("2.0", 15.0)]
    assert "gaugeprobe 2.0 is the first that is worse; 1.0 is not" in printed
    world, run = bisecting(TIME, SAME, {"verdicts": ["inconclusive"]}, WORSE)
    code, printed, _ = run()
    assert code == 1
    assert world.timed == [("3.0", 5.0), ("2.0", 5.0), ("2.0", 15.0)]
    assert lacking(last_line(printed), "earlier", "2.0", "could not be judged") == []


def test_interrupted_work_goes_on(bisecting: Bisecting, tmp_path: Path) -> None:
    world, run = bisecting(SHAPE, SAME, SAME, SAME, {"products": 3}, {"products": 3})
    world.stop_at = "4.0"
    code, _, complaint = run()
    (state,) = (tmp_path / "bisect").iterdir()
    assert code == 130
    assert f"interrupted; 3 parts saved in {state}" in complaint
    assert world.shaped == ["1.0", "5.0", "3.0"]
    world.stop_at = None
    code, printed, _ = run()
    assert code == 1
    assert world.shaped == ["1.0", "5.0", "3.0", "4.0"], "only what was not finished is measured"
    assert lacking(printed, "gaugeprobe 4.0 is the first", "3.0 is not") == []
    assert not state.exists()
    run()
    assert len(world.shaped) == 8, "a finished bisection is done anew"


def test_what_another_version_kept_is_told_in_one_line(bisecting: Bisecting, tmp_path: Path) -> None:
    world, run = bisecting(TIME, SAME, SAME, WORSE)
    world.stop_at = "2.0"
    assert run()[0] == 130
    (state,) = (tmp_path / "bisect").iterdir()
    kept = json.loads(state.read_text())
    world.stop_at = None
    for name, part in (("3.0", {"answer": "perhaps", "why": ""}), ("3.0", {"judged": 1}), ("reference 1.0", [])):
        state.write_text(json.dumps({**kept, "parts": {**kept["parts"], name: part}}))
        code, _, complaint = run()
        assert code == 2
        assert lacking(complaint, f"peft-gauge: {state} contains no finished work", "remove it") == []
    state.write_text(json.dumps(kept["parts"]))
    code, _, complaint = run()
    assert code == 1
    assert lacking(complaint, f"peft-gauge: {state}", "another version", "remove it") == []
    assert world.shaped.count("1.0") == 2, "all is asked anew"


def test_a_reference_that_no_longer_runs_is_an_error(bisecting: Bisecting, monkeypatch: pytest.MonkeyPatch) -> None:
    world, run = bisecting(TIME, SAME, SAME)
    compare = world.compare_case

    def broken(*arguments: Any) -> MethodResult:
        finding = compare(*arguments)
        old, new = finding.records
        return replace(finding, records=(replace(old, outcome="crashed", reason="killed by SIGKILL"), new), judged=None)

    monkeypatch.setattr(probe, "compare_case", broken)
    code, _, complaint = run()
    assert code == 2
    assert lacking(complaint, "peft-gauge: the reference", "crashed: killed by SIGKILL") == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gaugeprobe", "1.0..2.0", "--metric", "lora"), "is not a valid metric"),
        (("gaugeprobe", "1.0", "--metric", SHAPE), "'1.0' is not a valid range"),
        (("gaugeprobe", "2.0..1.0", "--metric", SHAPE), "2.0..1.0: the first release must be older"),
        (("gaugeprobe", "7.0..9.0", "--metric", SHAPE), "7.0..9.0 matches 0 releases of gaugeprobe for this Python"),
        (("gaugeprobe==1", "1.0..2.0", "--metric", SHAPE), "give the library's name alone"),
        (("gaugeprobe", "1.0..2.0", "--metric", SHAPE, "--with", "peft=1"), "'peft=1' is not a valid requirement"),
        (("gaugeprobe", "1.0..2.0", "--metric", SHAPE, "--model", "gtp2"), "unknown model 'gtp2'"),
        (("gaugeprobe", "1.0..2.0", "--metric", TIME, "--budget", "-1"), "--budget must be positive, got -1"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    arguments: tuple[str, ...], said: str, run_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    World(monkeypatch, SAME, SAME)
    code, _, complaint = run_command("bisect", *arguments)
    assert code == 2
    assert said in complaint
    assert len(complaint.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.integration
def test_with_pip_and_children_and_all(run_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is planted but wheels: 2.0 needs what there is not, and from 3.0 on a step takes a fifth more."""
    folder = tmp_path / "wheels"
    make_wheel(folder, "1.0")
    make_wheel(folder, "2.0", requires="gaugemissing")
    make_wheel(folder, "3.0", factor=1.2)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PEFT_GAUGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "MEASURED", ())
    monkeypatch.setattr(ab_options, "setting_of", lambda *asked: Setting(program="tests.support.stepping_child"))
    code, printed, complaint = run_command("bisect", "gaugeprobe", "1.0..3.0", "--metric", TIME, "--device", "cpu")
    assert (code, complaint) == (1, "")
    lines = printed.splitlines()
    assert any("2.0" in line and "left out" in line and "gaugemissing" in line for line in lines)
    assert lacking(lines[-1], "gaugeprobe 3.0 is worse", "1.0 is not", "with 2.0,", "4 pairs of processes") == []
