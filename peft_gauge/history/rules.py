"""How each metric is compared: exactly, within a tolerance, statistically, or not at all.

The rules are in ``fixtures/rules.toml``: the first whose patterns match a test's id and a metric's name applies.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

from peft_gauge import paths
from peft_gauge.errors import GaugeError, unknown

Kind = Literal["exact", "number", "time", "ignore"]
Direction = Literal["lower", "higher", "none"]

_ONLY_FOR = {"absolute": "number", "relative": "number", "minimum_effect": "time"}


@dataclass(frozen=True)
class Rule:
    """How a metric is compared.

    ``test`` and ``metric``: shell patterns, case-sensitive. ``kind``: exact (any difference counts), number
    (differences up to ``absolute``, or ``relative`` times the base's value, do not count), time (a confidence interval
    decides; differences smaller than ``minimum_effect`` do not count), ignore. ``direction``: which way is better; with
    "none", every change is for the worse. ``noise_free``: the metric does not depend on the machine's state, so it can
    be compared across machines.
    """

    metric: str
    kind: Kind
    test: str = "*"
    direction: Direction = "none"
    absolute: float = 0.0
    relative: float = 0.0
    minimum_effect: float = 0.03
    noise_free: bool = True

    def matches(self, test: str, metric: str) -> bool:
        return fnmatchcase(metric, self.metric) and fnmatchcase(test, self.test)


@dataclass(frozen=True)
class HostSpread:
    """The measured factor by which medians of single processes with the same code differ; at least 1.

    ``seconds``: of the times; ``over_control``: of the times divided by a control that was timed with every round.
    """

    seconds: float
    over_control: float


@dataclass(frozen=True)
class Rules:
    """The whole file. ``family_error``: probability that any unchanged time of a comparison is reported as changed."""

    rules: tuple[Rule, ...]
    family_error: float
    host_spread: HostSpread

    def of(self, test: str, metric: str) -> Rule:
        """The rule for this metric; the last rule matches everything."""
        return next(rule for rule in self.rules if rule.matches(test, metric))

    def passes_over(self, test: str, metric: str) -> bool:
        """Whether this metric is ignored only because it matches no rule but the last."""
        return self.of(test, metric) is self.rules[-1] and self.rules[-1].kind == "ignore"


def read_rules(path: Path | None = None) -> Rules:
    """The rules in ``path``, by default those of the project; raises `GaugeError` for an invalid file."""
    source = path or paths.fixture("rules.toml")
    try:
        document = tomllib.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise GaugeError(f"the rules in {source} cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise GaugeError(f"{source} is not TOML: {error}") from error
    try:
        return _rules(document)
    except GaugeError as error:
        raise GaugeError(f"{source}: {error}") from error


def _rules(document: Mapping[str, Any]) -> Rules:
    _check_keys("key", document, {"rules", "family_error", "host_spread"})
    missing = {"rules", "family_error", "host_spread"} - document.keys()
    if missing:
        raise GaugeError(f"{', '.join(sorted(missing))} is missing")
    entries = document["rules"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise GaugeError("rules must be a list of tables, such as { metric = 'x', kind = 'exact' }")
    rules = tuple(_rule(entry, place) for place, entry in enumerate(entries, start=1))
    if not rules or (rules[-1].test, rules[-1].metric) != ("*", "*"):
        raise GaugeError('the last rule must match everything else: metric = "*", without test')
    family_error = _number("family_error", document["family_error"])
    if not 0 < family_error < 1:
        raise GaugeError(f"family_error must lie between 0 and 1, not {family_error:g}")
    return Rules(rules, family_error, _host_spread(document["host_spread"]))


def _host_spread(values: object) -> HostSpread:
    if not isinstance(values, dict) or values.keys() != {field.name for field in fields(HostSpread)}:
        raise GaugeError("host_spread must have the keys seconds and over_control, and no others")
    spread = HostSpread(**{name: _number(f"host_spread.{name}", value) for name, value in values.items()})
    if min(spread.seconds, spread.over_control) < 1:
        raise GaugeError("the factors in host_spread must be at least 1")
    return spread


def _rule(entry: Mapping[str, Any], place: int) -> Rule:
    where = f"rule {place}"
    _check_keys(f"key in {where}", entry, {field.name for field in fields(Rule)})
    for name in ("metric", "kind"):
        if name not in entry:
            raise GaugeError(f"{where} lacks {name}")
    for name in entry.keys() & {"metric", "kind", "test", "direction"}:
        if not isinstance(entry[name], str):
            raise GaugeError(f"{where}: {name} must be a string, not {entry[name]!r}")
    for name, known in (("kind", Kind), ("direction", Direction)):
        if name in entry and entry[name] not in get_args(known):
            raise unknown(f"{name} in {where}", entry[name], get_args(known))
    for name, kind in _ONLY_FOR.items():
        if name in entry and entry["kind"] != kind:
            raise GaugeError(f"{where}: {name} is for the kind {kind}, not {entry['kind']}")
    if not isinstance(entry.get("noise_free", False), bool):
        raise GaugeError(f"{where}: noise_free must be true or false")
    if entry["kind"] == "time" and (entry.get("noise_free") or entry.get("direction", "lower") != "lower"):
        raise GaugeError(f"{where}: a time has noise and is better when lower; remove noise_free and direction")
    defaults = {"noise_free": False, "direction": "lower"} if entry["kind"] == "time" else {}
    numbers = {name: _number(f"{where}: {name}", entry[name]) for name in entry.keys() & _ONLY_FOR.keys()}
    return Rule(**{**defaults, **entry, **numbers})


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise GaugeError(f"{name} must be a number of at least 0, not {value!r}")
    return float(value)


def _check_keys(what: str, table: Mapping[str, Any], known: set[str]) -> None:
    for name in table:
        if name not in known:
            raise unknown(what, name, known)
