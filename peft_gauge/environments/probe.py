"""One probe of a bisection: a metric of one case with a release, against the same metric with a reference release.

A time is judged in pairs of steps. A deterministic metric is equal or not; of a fingerprint, any part can be selected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

from peft_gauge.environments.bisection import Answer, Probe, expected_probes
from peft_gauge.environments.build import Environment, NoEnvironment, installed, prepare
from peft_gauge.environments.measurement import Say, Setting, compare_case, shape_of
from peft_gauge.environments.state import Kept
from peft_gauge.errors import GaugeError, one_line, unknown
from peft_gauge.history.fingerprints import differences
from peft_gauge.history.metrics import FINGERPRINT
from peft_gauge.history.schema import CaseRecord
from peft_gauge.training import methods

if TYPE_CHECKING:
    from peft_gauge.environments.pairs import PairRule
    from peft_gauge.environments.requirements import Side
    from peft_gauge.environments.worker import CaseSpec
    from peft_gauge.history.intervals import Judgement

STEP_SECONDS = "step_seconds"
METRICS = (STEP_SECONDS, FINGERPRINT, "trainable_params", "allocated_peak_bytes", "flops_per_step")
PARTS: Mapping[str, tuple[str, ...]] = {
    **{
        name: (name,)
        for name in (
            *("operators", "modules", "bytes", "peak_bytes", "resident_bytes", "saved_activation_bytes"),
            *("trainable", "losses"),
        )
    },
    "flops": ("flops", "product_flops", "flops_unknown"),
}
"""Selectable part of a fingerprint -> the `Difference.what` values that belong to it."""

SECOND_BUDGET = 3
"""Factor on the budget for a second try of an inconclusive release."""
TOLD = 2


@dataclass(frozen=True)
class Metric:
    """``method``: whose step; ``metric``: one of `METRICS`; ``part``: of the fingerprint, one of `PARTS`, or all."""

    method: str
    name: str
    part: str | None = None

    @property
    def is_time(self) -> bool:
        return self.name == STEP_SECONDS


def parse_metric(text: str) -> Metric:
    """Parse ``method:metric`` or ``method:fingerprint:part``; raises `GaugeError`, with the nearest valid names."""
    method, *rest = (part.strip().replace(" ", "_") for part in text.split(":"))
    if not 1 <= len(rest) <= 2:
        raise GaugeError(f"{text!r} is not a valid metric; write METHOD:METRIC, as in qlora:step_seconds")
    methods.get(method)
    if rest[0] not in METRICS:
        raise unknown("metric", rest[0], METRICS)
    if len(rest) == 1:
        return Metric(method, rest[0])
    if rest[0] != FINGERPRINT:
        raise GaugeError(f"{text!r} is not a valid metric: only a fingerprint has parts; write {method}:{rest[0]}")
    if rest[1] not in PARTS:
        raise unknown("part of a fingerprint", rest[1], PARTS)
    return Metric(method, FINGERPRINT, rest[1])


def difference(metric: Metric, before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """How a deterministic metric differs between two cases, as text; ``None`` if it is equal."""
    if metric.name != FINGERPRINT:
        old, new = before.get(metric.name), after.get(metric.name)
        return None if old == new else f"{metric.name}: {_told(old)} → {_told(new)}"
    kinds = None if metric.part is None else PARTS[metric.part]
    found = [
        each.text
        for each in differences(before[FINGERPRINT], after[FINGERPRINT])
        if kinds is None or each.what in kinds
    ]
    rest = f"; and {len(found) - TOLD} more" if len(found) > TOLD else ""
    return "; ".join(one_line(text, 160) for text in found[:TOLD]) + rest or None


def _told(value: object) -> str:
    return "unknown" if value is None else f"{value:,}"


def rule_for(releases: int, rule: PairRule) -> PairRule:
    """``rule`` with its error divided among all verdicts that bisecting ``releases`` needs, two per release."""
    return replace(rule, error=rule.error / (2 * (expected_probes(releases) - 1)))


@dataclass
class Prober:
    """Probes releases of ``library`` for ``metric``; results are ``kept`` and reused.

    ``beside``: further requirements of both sides; ``say`` receives progress messages; ``build`` makes an environment.
    """

    library: str
    beside: Side
    case: CaseSpec
    metric: Metric
    rule: PairRule
    setting: Setting
    kept: Kept
    say: Say = lambda text: None
    build: Callable[[Side], Environment] = prepare
    _reference: tuple[str, CaseRecord] | None = None

    def is_usable(self, release: str) -> Probe:
        """Whether ``release`` installs and runs the case: good, and then the reference, or unusable."""
        known = self.kept.get(f"reference {release}", _known_shape)
        if known is None:
            known = self._shape(release)
            record, why = known
            told = {"record": None if record is None else asdict(record), "why": why}
            self.kept.put(f"reference {release}", told)
        record, why = known
        if record is None:
            return Probe(release, "unusable", why)
        self._reference = release, record
        return Probe(release, "good", "the reference")

    def probe(self, release: str) -> Probe:
        """Judge ``release`` against the reference."""
        known = self.kept.get(release, _known_answer)
        if known is None:
            known = self._timed(release) if self.metric.is_time else self._shaped(release)
            answer, why = known
            self.kept.put(release, {"answer": answer, "why": why})
        return Probe(release, *known)

    def _environment(self, release: str) -> Environment:
        return self.build(self.beside.with_requirement(f"{self.library}=={release}"))

    def _shape(self, release: str) -> tuple[CaseRecord | None, str]:
        """The case's record, or ``None`` and the reason."""
        self.say(f"{self.library} {release}")
        try:
            record, _ = shape_of(self._environment(release), self.case, self.setting)
        except NoEnvironment as error:
            return None, str(error)
        return (record, "") if record.outcome == "passed" else (None, f"{record.outcome}: {record.reason}")

    def _shaped(self, release: str) -> tuple[Answer, str]:
        assert self._reference is not None, "a reference is found first"
        record, why = self._shape(release)
        if record is None:
            return "unusable", why
        found = difference(self.metric, self._reference[1].metrics, record.metrics)
        return ("good", "no difference") if found is None else ("bad", found)

    def _timed(self, release: str) -> tuple[Answer, str]:
        assert self._reference is not None, "a reference is found first"
        try:
            environment = self._environment(release)
        except NoEnvironment as error:
            return "unusable", str(error)
        sides = self._environment(self._reference[0]), environment
        answer: Answer = "inconclusive"
        why = ""
        for rule in self._rules():
            try:
                finding = compare_case(sides, self.case, rule, self.setting, self._say_of(release))
            except NoEnvironment as error:
                return "unusable", str(error)
            old, new = finding.records
            if old.outcome != "passed":
                raise GaugeError(f"the reference ran before but now {old.outcome}: {old.reason}")
            if finding.judged is None:
                return "unusable", f"{new.outcome}: {new.reason}"
            answer, why = _answer(finding.judged), _words(finding.judged, finding.note)
            if answer != "inconclusive":
                break
        return answer, why

    def _rules(self) -> Iterator[PairRule]:
        yield self.rule
        yield replace(self.rule, budget_seconds=SECOND_BUDGET * self.rule.budget_seconds)

    def _say_of(self, release: str) -> Say:
        return lambda text: self.say(f"{self.library} {release}: {text}")


def _known_shape(kept: Mapping[str, Any]) -> tuple[CaseRecord | None, str]:
    record = kept["record"]
    return None if record is None else CaseRecord(**record), kept["why"]


def _known_answer(kept: Mapping[str, Any]) -> tuple[Answer, str]:
    if kept["answer"] not in get_args(Answer):
        raise ValueError(f"not a valid result: {kept['answer']!r}")
    return kept["answer"], kept["why"]


def prober(
    library: str, beside: Side, case: CaseSpec, metric: Metric, rule: PairRule, setting: Setting, releases: list[str]
) -> Prober:
    """A `Prober` that reuses earlier results of the same bisection."""
    work = {
        "library": library,
        "releases": releases,
        "beside": beside.requirements,
        "case": asdict(case),
        "metric": asdict(metric),
        "rule": asdict(rule),
        "threads": setting.threads,
        "installed": installed(),
    }
    return Prober(library, beside, case, metric, rule, setting, Kept("bisect", work))


def _answer(judged: Judgement) -> Answer:
    if judged.verdict == "inconclusive":
        return "inconclusive"
    return "bad" if judged.verdict == "worse" else "good"


def _words(judged: Judgement, note: str | None) -> str:
    percent = [f"{100 * (ratio - 1):+.1f} %" for ratio in (judged.ratio, judged.low, judged.high)]
    return f"{judged.verdict}: {percent[0]} [{percent[1]}, {percent[2]}]" + (f", {note}" if note else "")
