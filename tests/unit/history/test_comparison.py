"""Two runs whose difference is known: which rows a comparison has, what they say, and which exit code follows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_gauge.history.comparison import Row, RunComparison, compare, outcome_verdict
from peft_gauge.history.reader import Run, read_run, runs_in
from peft_gauge.history.rules import read_rules
from peft_gauge.history.schema import CONTROL_SAMPLES, SAMPLES, VERSION
from tests.support.facts import lacking
from tests.support.paths import RESULTS

RULES = read_rules()
STEP = "benchmarks/test_speed.py::test_step[{}-toy-cpu]"
SETTINGS = {"dtype": "float32", "batch": 1, "seq": 64, "attention": "sdpa"}
MACHINE = {
    "name": "amd-epyc-2c-cpu",
    "python_version": "3.11.7",
    "cpu": {"brand_raw": "AMD EPYC", "count": 2},
    "threads": 2,
    "accelerator": {"name": None, "memory_bytes": None, "driver": None, "cuda": None},
    "libraries": {"torch": "2.13.0", "peft": "0.21.2"},
}

Record = dict[str, Any]
Made = Callable[..., Run]


def case(id_: str, outcome: str = "passed", reason: str | None = None, **metrics: Any) -> dict[str, Any]:
    benchmark = Path(id_.partition("::")[0]).stem
    return {"id": id_, "benchmark": benchmark, "outcome": outcome, "reason": reason, "metrics": metrics}


def timed(seconds: list[list[float]], control: list[list[float]] | None = None, metric: str = "step_seconds") -> Record:
    """Metrics of a case that was timed: samples, and the control's beside them."""
    return {SAMPLES: {metric: seconds}} | ({} if control is None else {CONTROL_SAMPLES: {metric: control}})


def noisy(ratio: float, seed: int, *, processes: int = 5, noise: float = 0.002) -> list[list[float]]:
    generator = np.random.default_rng(seed)
    factors = generator.normal(0, noise, (processes, 1)) + generator.normal(0, noise, (processes, 5))
    rounds: list[list[float]] = (ratio * np.exp(factors)).tolist()
    return rounds


def document(cases: list[dict[str, Any]], claims: list[dict[str, Any]], section: Record, machine: Record) -> Record:
    return {
        "machine_info": MACHINE | machine,
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "benchmarks": [],
        "datetime": "2026-11-24T20:00:00+00:00",
        "version": "5.0.0",
        "peft_gauge": {"schema": VERSION, "options": {}, "interrupted": False, "cases": cases, "claims": claims}
        | section,
    }


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """``made(case(…), …)`` is a run with these cases, read from a file."""
    numbers = iter(range(1, 100))

    def make(*cases: Record, claims: list[Record] | None = None, section: Record | None = None, **machine: Any) -> Run:
        path = tmp_path / f"{next(numbers):04d}_x.json"
        path.write_text(json.dumps(document(list(cases), claims or [], section or {}, machine)))
        return read_run(path)

    return make


def step_of(*, version: int = 1, loss: float = 2.0, **calls: int) -> Record:
    """A fingerprint of a step whose forward calls these operators as often."""
    return {
        "version": version,
        "operators": {"forward": {name: {"?": number} for name, number in calls.items()}},
        "trainable": {"by_dtype": {}, "total": 0},
        "losses": [loss],
        "flops_complete": True,
        **{name: {} for name in ("flops", "product_flops", "flops_unknown", "bytes", "peak_bytes", "resident_bytes")},
        **dict.fromkeys(("saved_activation_bytes", "adapter_bytes"), 0),
    }


def compared(runs: Iterable[Run]) -> RunComparison:
    base, new = runs
    return compare(base, new, RULES)


def only(comparison: RunComparison, metric: str) -> Row:
    (row,) = [row for row in comparison.rows if row.metric == metric]
    return row


def said(comparison: RunComparison) -> list[tuple[str, str]]:
    """What there is to see: rows that are not plainly the same, the worst first."""
    return [(row.says, row.metric) for row in comparison.rows if row.says != "same"]


# Metrics


@pytest.mark.parametrize(
    ("metric", "before", "after", "verdict"),
    [
        ("trainable_params", 100, 100, "same"),
        ("trainable_params", 100, 101, "worse"),
        ("trainable_params", 100, 99, "worse"),
        ("allocated_peak_bytes", 100_000, 100_512, "same"),
        ("allocated_peak_bytes", 100_000, 100_513, "worse"),
        ("allocated_peak_bytes", 100_000, 99_487, "better"),
        ("allocated_peak_bytes", 10**9, 10**9 + 10**6, "same"),
        ("allocated_peak_bytes", 10**9, 10**9 + 10**6 + 1, "worse"),
        ("device_peak_bytes", 10**9, 10**9 + 60_000_000, "same"),
        ("device_peak_bytes", 10**9, 10**9 + 70_000_000, "worse"),
        ("tokens_per_second", 1, 100, None),
        ("title", "LoRA", "LoRA, another text", None),
    ],
)
def test_a_figure_is_judged_by_its_rule(metric: str, before: Any, after: Any, verdict: str | None, made: Made) -> None:
    found = compared(made(case(STEP.format("lora"), **{metric: value})) for value in (before, after))
    rows = [row for row in found.rows if row.metric == metric]
    assert [row.verdict for row in rows] == ([] if verdict is None else [verdict])
    assert found.exit_code() == (1 if verdict == "worse" else 0)
    if rows:
        assert (rows[0].before, rows[0].after, rows[0].ratio) == (before, after, after / before)


def test_nested_figures_have_dotted_names_and_settings_are_none_of_them(made: Made) -> None:
    plans = [
        {
            "peak_bytes": peak,
            "peak_by_category": {"activations": acts, "inputs": 7},
            "settings": {"seq": 8},
            "seconds": peak,
        }
        for peak, acts in ((10_000, 4_000), (14_096, 8_096))
    ]
    found = compared(made(case(STEP.format("lora"), plan=plan)) for plan in plans)
    assert said(found) == [("worse", "plan.peak_bytes")]
    assert found.notes == ()  # nothing without a rule: settings were no metrics
    assert only(found, "plan.peak_bytes").cause == "activations +4,096 B"


def test_what_no_rule_knows_is_named_and_not_judged(made: Made) -> None:
    def run(factor: int) -> Run:
        metrics: Record = {f"odd_{n}": n * factor for n in range(1, 8)}
        return made(case(STEP.format("lora"), **metrics))

    found = compare(run(1), run(2), RULES)
    assert said(found) == []
    (note,) = found.notes
    assert lacking(note, "no rule", "odd_1, odd_2, odd_3, odd_4, odd_5 and 2 more", "not compared") == []


def test_a_list_of_records_is_compared_item_by_item(made: Made) -> None:
    def run(second: int) -> Run:
        return made(case(STEP.format("lora"), shapes=[{"seq": 1, "tensor_peak_bytes": n} for n in (5, second)]))

    assert said(compare(run(10**6), run(2 * 10**6), RULES)) == [("worse", "shapes.1.tensor_peak_bytes")]


@pytest.mark.parametrize(
    ("metric", "cause"),
    [("tensor_peak_bytes", "logits -5 B"), ("planned_peak_bytes", None), ("weights_read_bytes", None)],
)
def test_categories_explain_what_they_are_parts_of(metric: str, cause: str | None, made: Made) -> None:
    def run(size: int, logits: int) -> Run:
        metrics: Record = {"peak_by_category": {"logits": logits, "inputs": 7}, metric: size}
        return made(case(STEP.format("lora"), **metrics))

    assert only(compare(run(10**6, 10), run(2 * 10**6, 5), RULES), metric).cause == cause


def test_a_figure_that_appears_or_goes_has_a_row(made: Made) -> None:
    old = made(case(STEP.format("lora"), base_params=1, total_params=None))
    new = made(case(STEP.format("lora"), base_params=None, total_params=2))
    found = compare(old, new, RULES)
    assert said(found) == [("MISSING", "base_params"), ("NEW", "total_params")]
    assert [row.metric for row in compared([old, old]).rows] == ["outcome", "base_params"]
    assert (found.exit_code(), found.exit_code(strict=True)) == (0, 1)


def test_a_changed_fingerprint_is_worse_and_says_how(made: Made) -> None:
    prints = [step_of(mul=1, add=2, mm=3), step_of(mul=33, add=1, mm=4, view=9)]
    found = compared(made(case(STEP.format("lora"), fingerprint=each)) for each in prints)
    assert said(found) == [("worse", "fingerprint")]
    assert only(found, "fingerprint").cause == "forward: -1 add (2 → 1); forward: +1 mm (3 → 4); and 2 more"
    same = compared(made(case(STEP.format("lora"), fingerprint=prints[0])) for _ in range(2))
    assert said(same) == []
    assert only(same, "fingerprint").verdict == "same"


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ({"mul": 2, "mm": 3}, {"mul": 1, "mm": 3}, "better"),
        ({"mul": 2, "mm": 3}, {"mm": 3}, "better"),
        ({"mul": 2, "mm": 3}, {"mul": 1, "mm": 4}, "worse"),
        ({"mul": 2}, {"mul": 1, "loss": 2.5}, "worse"),
    ],
)
def test_a_step_that_does_the_same_with_less_is_better(before: Record, after: Record, verdict: str, made: Made) -> None:
    """With another loss it is not the same any more."""
    found = compared(made(case(STEP.format("lora"), fingerprint=step_of(**each))) for each in (before, after))
    assert said(found) == [(verdict, "fingerprint")]
    assert found.exit_code() == (verdict == "worse")


def test_fingerprints_of_two_versions_are_not_compared_and_explain_nothing(made: Made) -> None:
    def run(ratio: float, version: int) -> Run:
        metrics = timed(noisy(ratio, version)) | {"fingerprint": step_of(version=version, mul=1)}
        return made(case(STEP.format("lora"), **metrics))

    found = compare(run(1, 1), run(1.2, 2), RULES)
    assert said(found) == [("worse", "step_seconds"), ("NOT COMPARABLE", "fingerprint")]
    assert only(found, "step_seconds").cause is None
    assert "fingerprints of versions 1 and 2" in str(only(found, "fingerprint").note)


def test_a_changed_verdict_of_a_claim_has_a_row(made: Made) -> None:
    def claims(**verdicts: str) -> list[Record]:
        return [{"id": id_, "model": "m", "verdict": verdict, "metric": "1.5 GB"} for id_, verdict in verdicts.items()]

    passed = case("benchmarks/test_claims.py::x")
    old = made(
        passed, claims=claims(a="holds", b="inconclusive", c="not measured yet", d="holds", e="holds", f="refuted")
    )
    new = made(
        passed, claims=claims(a="refuted", b="holds", c="holds", d="not measured yet", e="holds", f="inconclusive")
    )
    found = {row.test: row for row in compare(old, new, RULES).rows if row.metric == "verdict"}
    assert {name: row.says for name, row in found.items()} == {
        "claim::a[m]": "worse",
        "claim::b[m]": "better",
        "claim::c[m]": "NEW",
        "claim::d[m]": "NOT REQUESTED",
        "claim::e[m]": "same",
        "claim::f[m]": "worse",
    }
    row = found["claim::a[m]"]
    assert (row.before, row.after, row.note) == ("holds", "refuted", "1.5 GB")


# Cases


@pytest.mark.parametrize(
    ("old", "new", "verdict", "says"),
    [
        ("passed", "passed", "same", "same"),
        ("skipped", "skipped", "same", "same"),
        ("out-of-memory", "out-of-memory", "same", "same"),
        ("passed", "out-of-memory", "worse", "worse"),
        ("out-of-memory", "passed", "better", "better"),
        ("passed", "crashed", "worse", "worse"),
        ("crashed", "passed", "better", "better"),
        ("passed", "timed-out", "worse", "worse"),
        ("passed", "failed", "worse", "worse"),
        ("skipped", "out-of-memory", "worse", "worse"),
        ("crashed", "timed-out", "inconclusive", "TIMED OUT"),
        ("passed", "skipped", "inconclusive", "SKIPPED"),
        ("crashed", "skipped", "inconclusive", "SKIPPED"),
        ("passed", "interrupted", "inconclusive", "INTERRUPTED"),
        ("skipped", "passed", "inconclusive", "NEW"),
    ],
)
def test_how_a_case_ended(old: str, new: str, verdict: str, says: str, made: Made) -> None:
    lora = STEP.format("lora")
    runs = [made(case(lora, each, None if each == "passed" else f"{each} because")) for each in (old, new)]
    found = compared(runs)
    row = only(found, "outcome")
    assert (row.verdict, row.says, row.before, row.after) == (verdict, says, old, new)
    assert row.note == (f"{new} because" if new != "passed" else f"{old} because" if old != "passed" else None)
    assert found.exit_code() == (1 if verdict == "worse" else 0)
    assert found.exit_code(strict=True) == (1 if verdict == "worse" or says in ("SKIPPED", "INTERRUPTED") else 0)


def test_outcomes_are_never_both_worse_or_both_better() -> None:
    outcomes = ("passed", "failed", "skipped", "out-of-memory", "crashed", "timed-out", "interrupted")
    for old, new in permutations(outcomes, 2):
        there, back = outcome_verdict(old, new), outcome_verdict(new, old)
        assert there == "inconclusive" or there != back


def test_a_case_that_died_has_no_rows_for_what_it_did_not_measure(made: Made) -> None:
    full = case(STEP.format("lora"), trainable_params=5, **timed(noisy(1, 0)))
    dead = case(STEP.format("lora"), "out-of-memory", "CUDA out of memory", trainable_params=6)
    found = compare(made(full), made(dead), RULES)
    assert said(found) == [("worse", "outcome"), ("worse", "trainable_params")]
    assert found.rows[0].label == "OUT OF MEMORY"


def test_new_and_missing_cases_have_rows(made: Made) -> None:
    kept = case(STEP.format("full"))
    found = compare(
        made(kept, case(STEP.format("lora"))), made(kept, case(STEP.format("ia3"), "skipped", "no GPU")), RULES
    )
    assert [(row.says, row.test, row.note) for row in found.rows if row.says != "same"] == [
        (
            "MISSING",
            STEP.format("lora"),
            "NEW ran the benchmark without it, and does not record which cases it deselected",
        ),
        ("NEW", STEP.format("ia3"), "no GPU"),
    ]
    assert (found.exit_code(), found.exit_code(strict=True)) == (0, 1)
    assert found.counts == {"worse": 0, "inconclusive": 0, "better": 0, "same": 1, "MISSING": 1, "NEW": 1}


def test_an_interrupted_run_says_so(made: Made) -> None:
    kept, lost = case(STEP.format("full")), case(STEP.format("lora"))
    found = compare(made(kept, lost), made(kept, section={"interrupted": True}), RULES)
    assert found.notes == ("NEW was interrupted",)
    (row,) = [row for row in found.rows if row.says != "same"]
    assert (row.says, row.note) == ("NOT REACHED", "NEW was interrupted before it")
    assert (found.exit_code(), found.exit_code(strict=True)) == (0, 1)
    other = compare(made(kept, section={"interrupted": True}), made(kept, lost), RULES)
    assert other.notes == ("BASE was interrupted",)
    (row,) = [row for row in other.rows if row.says != "same"]
    assert (row.says, row.note) == ("NEW", "BASE was interrupted before it")


ABOUT: Record = {"method": "lora", "model": "toy", "device": "cpu", "settings": SETTINGS}


def test_a_renamed_case_is_compared_under_its_new_name(made: Made) -> None:
    old = made(case(STEP.format("lora"), **ABOUT, trainable_params=5))
    new = made(case(STEP.format("lora-r16"), **ABOUT, trainable_params=6))
    found = compare(old, new, RULES)
    assert said(found) == [("worse", "trainable_params"), ("RENAMED", "id")]
    row = only(found, "id")
    assert (row.before, row.after, row.test) == (STEP.format("lora"), *[STEP.format("lora-r16")] * 2)
    assert only(found, "trainable_params").test == STEP.format("lora-r16")
    assert found.exit_code(strict=True) == 1


@pytest.mark.parametrize(
    "name", ["benchmarks/test_pace.py::test_step[lora-toy-cpu]", "benchmarks/test_pace.py::test_whole[lora-toy-cpu]"]
)
def test_a_benchmark_s_file_and_function_may_be_renamed(name: str, made: Made) -> None:
    """What is recorded is compared; that both names are new changes no verdict."""
    claims = "benchmarks/test_claims.py::test_claim[{}]"
    old = made(case(STEP.format("lora"), **ABOUT, trainable_params=5), case(claims.format("x")))
    new = made(case(name, **ABOUT, trainable_params=6), case(claims.format("x").replace("claims", "sayings")))
    found = compare(old, new, RULES)
    assert sorted(said(found)) == [("RENAMED", "id"), ("RENAMED", "id"), ("worse", "trainable_params")]


def test_a_fingerprint_also_tells_a_renamed_case(made: Made) -> None:
    prints = [step_of(mul=1), step_of(add=2)]
    names = [("a", "c"), ("b", "d")]
    runs = [made(*(case(STEP.format(n[i]), fingerprint=p) for n, p in zip(names, prints, strict=True))) for i in (0, 1)]
    found = compared(runs)
    assert said(found) == [("RENAMED", "id")] * 2
    assert {row.after: row.before for row in found.rows if row.metric == "id"} == {
        STEP.format("c"): STEP.format("a"),
        STEP.format("d"): STEP.format("b"),
    }


@pytest.mark.parametrize("why", ["settings", "benchmark", "ambiguous", "metrics"])
def test_what_is_not_surely_the_same_case_is_new_and_missing(why: str, made: Made) -> None:
    kept = case(STEP.format("full"))
    old, new = STEP.format("lora"), STEP.format("lora-r16")
    changed = {
        "settings": [case(new, **ABOUT | {"settings": SETTINGS | {"seq": 65}})],
        "benchmark": [case(new.replace("test_speed", "test_pace"), **ABOUT)],
        "ambiguous": [case(new, **ABOUT), case(STEP.format("lora-16"), **ABOUT)],
        "metrics": [case(new, **ABOUT, total_params=5)],
    }[why]
    found = compare(made(kept, case(old, **ABOUT)), made(kept, *changed), RULES)
    assert {says for says, _ in said(found)} == {"MISSING", "NEW"}


# What is not comparable


@pytest.mark.parametrize(
    ("machine", "differing"),
    [
        ({"name": "intel-xeon-8c-cpu"}, "machine: amd-epyc-2c-cpu → intel-xeon-8c-cpu"),
        ({"threads": 4}, "threads: 2 → 4"),
        ({"python_version": "3.12.1"}, "Python: 3.11 → 3.12"),
        ({"accelerator": {"name": "H100", "memory_bytes": 8}}, "accelerator: absent → H100"),
    ],
)
def test_other_machines_are_refused(machine: Record, differing: str, made: Made) -> None:
    sides = [
        case(STEP.format("lora"), trainable_params=n, rss_peak_bytes=n * 10**9, **timed(noisy(n, 0))) for n in (1, 2)
    ]
    base, new = made(sides[0]), made(sides[1], **machine)
    found = compare(base, new, RULES)
    assert found.incomparable is not None
    assert differing in found.incomparable
    assert (found.rows, found.exit_code()) == ((), 2)
    across = compare(base, new, RULES, across_machines=True)
    assert (across.incomparable, said(across), across.exit_code()) == (None, [("worse", "trainable_params")], 1)
    assert any(differing in note for note in across.notes)


def test_versions_and_the_patch_of_python_are_no_hindrance(made: Made) -> None:
    libraries = {"torch": "2.14.0", "peft": "0.21.2", "gguf": "0.17"}
    found = compare(
        made(case(STEP.format("lora"))),
        made(case(STEP.format("lora")), python_version="3.11.9", libraries=libraries),
        RULES,
    )
    assert found.incomparable is None
    assert found.environment == ("torch: 2.13.0 → 2.14.0", "Python: 3.11.7 → 3.11.9", "gguf: absent → 0.17")


@pytest.mark.parametrize("inside", ["settings", "plan"])
def test_other_settings_make_a_case_incomparable_and_no_other(inside: str, made: Made) -> None:
    def settings(attention: str) -> Record:
        values = SETTINGS | {"attention": attention}
        return {"settings": values} if inside == "settings" else {"plan": {"settings": values}}

    kept = case(STEP.format("full"), settings=SETTINGS)
    runs = [
        made(kept, case(STEP.format("lora"), trainable_params=number, **settings(attention)))
        for number, attention in ((1, "sdpa"), (2, "eager"))
    ]
    found = compared(runs)
    prefix = "" if inside == "settings" else "plan."
    assert said(found) == [("NOT COMPARABLE", "settings")]
    assert only(found, "settings").note == f"{prefix}attention: sdpa → eager"
    assert (found.exit_code(), found.exit_code(strict=True)) == (0, 1)


def test_nothing_that_can_be_compared_is_no_success(made: Made) -> None:
    settings = [case(STEP.format("lora"), settings=SETTINGS | {"seq": seq}) for seq in (1, 2)]
    assert compare(made(settings[0]), made(settings[1]), RULES).incomparable == (
        "the settings of every case in both differ (seq: 1 → 2)"
    )
    disjoint = compare(made(case(STEP.format("lora"))), made(case(STEP.format("full"))), RULES)
    assert disjoint.incomparable is not None
    assert disjoint.incomparable.startswith("no case in common, although both ran test_speed: NEW ran ")
    assert disjoint.exit_code() == 2


# Why a case is not there

PEAK = "benchmarks/test_memory.py::test_peak[{}-toy-cpu]"


def selection(*args: str, deselected: list[str] | None, markers: str = "", keywords: str = "") -> Record:
    told = {"args": args or ["benchmarks"], "markers": markers, "keywords": keywords, "deselected": deselected}
    return {"selection": told}


@pytest.mark.parametrize(
    ("section", "says", "why"),
    [
        ({}, "NOT REQUESTED", "did not run this benchmark"),
        ({"interrupted": True}, "NOT REACHED", "was interrupted before it"),
        (
            selection("benchmarks/test_speed.py", deselected=[]),
            "NOT REQUESTED",
            "was limited to benchmarks/test_speed.py",
        ),
        (selection(deselected=[]), "MISSING", "ran the benchmark without it"),
        (selection(deselected=[PEAK.format("lora")], keywords="not peak"), "DESELECTED", "left it out (-k 'not peak')"),
        (selection(deselected=[PEAK.format("lora")]), "DESELECTED", "left it out (slow, or of another device)"),
        (
            selection("benchmarks/test_memory.py::test_growth", deselected=[]),
            "NOT REQUESTED",
            "was limited to benchmarks/test_memory.py::test_growth",
        ),
        (selection("benchmarks/test_memory.py::test_peak", deselected=[]), "MISSING", "ran the benchmark without it"),
        (selection(deselected=None), "NOT REQUESTED", "did not run this benchmark"),
        (
            selection(deselected=[]) | {"options": {"method": ["full", "ia3"]}},
            "NOT REQUESTED",
            "had --method full,ia3",
        ),
        (selection(deselected=[]) | {"interrupted": True}, "NOT REACHED", "was interrupted before it"),
    ],
)
def test_why_a_case_is_not_there(section: Record, says: str, why: str, made: Made) -> None:
    """Of a benchmark that one run did not put at all; on either side."""
    kept, lost = case(STEP.format("full")), case(PEAK.format("lora"), **ABOUT)
    whole, part = made(kept, lost), made(kept, section=section)
    found = compare(whole, part, RULES)
    (row,) = [row for row in found.rows if row.says != "same"]
    assert (row.says, row.test, row.note) == (says, PEAK.format("lora"), f"NEW {why}")
    assert (found.exit_code(), found.exit_code(strict=True)) == (0, 1)
    (row,) = [row for row in compare(part, whole, RULES).rows if row.says != "same"]
    assert (row.says, row.note) == ("NEW", None if says == "MISSING" else f"BASE {why}")


def test_different_benchmarks_are_told_as_that(made: Made) -> None:
    speed = made(*(case(STEP.format(name)) for name in ("full", "lora")))
    memory = made(case(PEAK.format("full")), section={"interrupted": True})
    found = compare(speed, memory, RULES)
    facts = ("no case in common", "BASE test_speed (2 cases)", "NEW test_memory (1 case), interrupted")
    assert lacking(str(found.incomparable), *facts) == []
    assert [row.says for row in found.rows] == ["NOT REACHED", "NOT REACHED", "NEW"]


@pytest.mark.parametrize("outcome", ["skipped", "interrupted", "out-of-memory", "crashed"])
def test_a_case_that_did_not_run_has_no_settings_to_differ(outcome: str, made: Made) -> None:
    """What a skip or a death leaves behind holds no settings: its outcome says all, on either side."""
    ended = case(STEP.format("lora"), outcome, "why", method="lora", model="toy", device="cpu")
    whole = case(STEP.format("lora"), **ABOUT, trainable_params=5)
    for runs in ((made(ended), made(whole)), (made(whole), made(ended))):
        found = compared(runs)
        assert found.incomparable is None
        assert only(found, "outcome").verdict != "same"
        assert "settings" not in {row.metric for row in found.rows}


def test_what_did_not_run_before_is_not_missed(made: Made) -> None:
    kept = case(STEP.format("full"))
    found = compare(made(kept, case(STEP.format("lora"), "skipped", "no GPU")), made(kept), RULES)
    assert said(found) == []


# Times


def test_times_are_judged_with_a_cause(made: Made) -> None:
    def run(ratio: float, seed: int, mul: int) -> Run:
        return made(
            case(STEP.format("lora"), **timed(noisy(ratio, seed)), fingerprint=step_of(mul=mul)),
            case(STEP.format("full"), **timed(noisy(ratio, seed + 5)), fingerprint=step_of(mul=1)),
            case(STEP.format("ia3"), **timed(noisy(1, seed + 9)), fingerprint=step_of(mul=1)),
        )

    found = compare(run(1, 0, 1), run(1.1, 20, 33), RULES)
    rows = {row.test: row for row in found.rows if row.metric == "step_seconds"}
    assert [rows[STEP.format(name)].verdict for name in ("lora", "full", "ia3")] == ["worse", "worse", "same"]
    assert rows[STEP.format("lora")].cause == "forward: +32 mul (1 → 33)"
    assert rows[STEP.format("full")].cause == "no operator changed: machine or kernel"
    assert rows[STEP.format("ia3")].cause is None
    judged = rows[STEP.format("lora")].judged
    assert judged is not None
    assert judged.low < 1.1 < judged.high
    assert found.exit_code() == 1


def test_a_fingerprint_taken_by_another_benchmark_explains_too(made: Made) -> None:
    def run(ratio: float, mul: int) -> Run:
        shape = case("benchmarks/test_shape.py::test_shape[lora]", **ABOUT, fingerprint=step_of(mul=mul))
        return made(case(STEP.format("lora"), **ABOUT, **timed(noisy(ratio, round(10 * ratio)))), shape)

    assert only(compare(run(1, 1), run(1.2, 3), RULES), "step_seconds").cause == "forward: +2 mul (1 → 3)"


def test_holm_s_errors_are_those_of_the_whole_comparison(made: Made) -> None:
    names = [f"m{number}" for number in range(10)]

    def run(seed: int) -> Run:
        return made(*(case(STEP.format(name), **timed(noisy(1, seed + at))) for at, name in enumerate(names)))

    errors = [row.judged.error for row in compare(run(0), run(50), RULES).rows if row.judged is not None]
    assert errors == pytest.approx([RULES.family_error / 10] * 10)


def test_single_processes_cannot_tell_and_say_what_would(made: Made) -> None:
    found = compared(made(case(STEP.format("lora"), **timed([[ratio] * 5]))) for ratio in (1.0, 1.2))
    row = only(found, "step_seconds")
    assert row.verdict == "inconclusive"
    # log 1.62 / log 1.2 = 2.646, and 1 has to be left out: (1 + 1.646)² - 1 = 6.0 more than one process
    assert lacking(str(row.note), "one process", "about 7 more processes per side") == []
    assert found.exit_code() == 0


@pytest.mark.parametrize(
    ("seconds", "note"),
    [([[1.0, 1.0]], "2 rounds are too few; at least 3 are needed"), (None, "its rounds were not saved")],
)
def test_too_few_rounds_cannot_tell(seconds: list[list[float]] | None, note: str, made: Made) -> None:
    metrics: Record = {"step_seconds": 9.0} | ({} if seconds is None else timed(seconds))
    new = made(case(STEP.format("lora"), step_seconds=9.0, **timed(noisy(1, 0))))
    row = only(compare(made(case(STEP.format("lora"), **metrics)), new, RULES), "step_seconds")
    assert (row.verdict, row.note, row.judged, row.before) == ("inconclusive", note, None, 9.0)


def test_an_unsteady_machine_is_told_beside_its_times(made: Made) -> None:
    old = made(case(STEP.format("lora"), unsteady=[], **timed(noisy(1, 0))))
    new = made(case(STEP.format("lora"), unsteady=["throttled by heat"], **timed(noisy(1, 1))))
    assert only(compare(old, new, RULES), "step_seconds").note == "NEW unsteady: throttled by heat"


def test_the_control_is_divided_out_and_told(made: Made) -> None:
    """A machine twice as slow, the control with it: nothing got worse, and the note says what the control did."""

    def run(factor: float, seed: int) -> Run:
        control = noisy(factor, seed, noise=0.2)
        seconds = [[3 * one for one in rounds] for rounds in control]
        return made(case(STEP.format("lora"), **timed(seconds, control)))

    found = compare(run(1, 0), run(2, 1), RULES)
    row = only(found, "step_seconds")
    assert (row.verdict, row.relative_to) == ("same", "control")
    assert row.ratio == pytest.approx(2, rel=0.3)
    assert row.judged is not None
    assert row.judged.ratio == pytest.approx(1)
    assert "the control, divided out of 1 times, took" in found.notes[0]


def test_a_control_on_one_side_only_is_not_used(made: Made) -> None:
    old = made(case(STEP.format("lora"), **timed(noisy(1, 0), noisy(1, 1))))
    new = made(case(STEP.format("lora"), **timed(noisy(1, 2))))
    found = compare(old, new, RULES)
    assert (only(found, "step_seconds").relative_to, found.notes) == (None, ())


# Everything moved


def many(made: Made, ratios: list[float], seed: int, *, control: bool = False, params: int = 7) -> Run:
    cases = []
    for number, ratio in enumerate(ratios):
        beside = [[1.0] * 5] * 5 if control else None
        metrics = timed(noisy(ratio, seed + number), beside)
        cases.append(case(STEP.format(f"m{number}"), **metrics, trainable_params=params))
    return made(*cases)


def test_a_common_factor_is_one_line(made: Made) -> None:
    """Ten times 20 % slower, one of them another 10 %: the environment's 20 % once, and the one regression."""
    ratios = [1.2] * 9 + [1.32]
    found = compare(many(made, [1.0] * 10, 0), many(made, ratios, 100), RULES)
    assert [row.says for row in found.rows if row.metric == "step_seconds"] == ["worse"] + ["same"] * 9
    row = only(found, "seconds")
    assert (row.says, row.verdict, row.ratio) == ("ALL TIMES", "inconclusive", pytest.approx(1.2, rel=0.01))
    worst = found.rows[0]
    assert worst.ratio == pytest.approx(1.32, rel=0.01)  # as it was, and below as it was judged
    assert worst.judged is not None
    assert worst.judged.ratio == pytest.approx(1.1, rel=0.01)
    assert worst.relative_to is not None
    assert worst.relative_to.startswith("all times ×1.2")
    errors = [row.judged.error for row in found.rows if row.judged is not None]
    # Holm's, of what the factor left.
    assert errors == pytest.approx([RULES.family_error / 10] + [RULES.family_error / 9] * 9)
    assert found.exit_code() == 1


def test_the_environment_alone_is_no_regression(made: Made) -> None:
    found = compare(many(made, [1.0] * 8, 0), many(made, [1.2] * 8, 100), RULES)
    assert said(found) == [("ALL TIMES", "seconds")]
    assert found.exit_code() == 0


def test_what_moved_but_not_its_control_is_one_regression(made: Made) -> None:
    found = compare(many(made, [1.0] * 8, 0, control=True), many(made, [1.2] * 8, 100, control=True), RULES)
    assert (found.rows[0].label, found.rows[0].verdict) == ("ALL TIMES", "worse")
    assert [row.verdict for row in found.rows if row.metric == "step_seconds"] == ["same"] * 8
    assert found.rows[-1].relative_to != "control"
    faster = compare(many(made, [1.2] * 8, 0, control=True), many(made, [1.0] * 8, 100, control=True), RULES)
    assert [row.verdict for row in faster.rows if row.label == "ALL TIMES"] == ["better"]


def test_what_has_noise_itself_does_not_hide_a_common_factor(made: Made) -> None:
    """Neither the host's memory nor a claim, which can be about times, says that a step does something else."""

    def run(ratio: float, seed: int, rss: int, verdict: str) -> Run:
        host = case(STEP.format("host"), rss_peak_bytes=rss)
        times = (case(STEP.format(f"m{n}"), **timed(noisy(ratio, seed + n))) for n in range(8))
        return made(host, *times, claims=[{"id": "a", "model": "m", "verdict": verdict}])

    base = run(1, 0, 10**9, "holds")
    for changed in ((10**9, "holds"), (2 * 10**9, "holds"), (10**9, "refuted")):
        assert ("ALL TIMES", "seconds") in said(compare(base, run(1.2, 100, *changed), RULES))


def test_times_on_both_sides_of_1_have_no_common_factor_however_wide_their_intervals(made: Made) -> None:
    def run(*ratios: float) -> Run:
        rounds = (0.4, 0.7, 1.0, 1.4, 2.5)
        return made(*(case(STEP.format(f"m{n}"), **timed([[r * one for one in rounds]])) for n, r in enumerate(ratios)))

    base = run(*[1.0] * 8)
    assert "ALL TIMES" in {row.label for row in compare(base, run(*[1.1] * 8), RULES).rows}
    assert "ALL TIMES" not in {row.label for row in compare(base, run(*[1.1] * 6, 0.98, 0.98), RULES).rows}


@pytest.mark.parametrize("why", ["few", "apart", "small", "a count changed"])
def test_there_is_no_common_factor_where(why: str, made: Made) -> None:
    ratios = {
        "few": [1.2] * 4,
        "apart": [1.2] * 5 + [1.0, 0.9],
        "small": [1.02] * 8,
        "a count changed": [1.2] * 8,
    }[why]
    new = many(made, ratios, 100, params=8 if why == "a count changed" else 7)
    found = compare(many(made, [1.0] * len(ratios), 0), new, RULES)
    assert not [row for row in found.rows if row.label == "ALL TIMES"]
    assert sum(row.verdict == "worse" and row.metric == "step_seconds" for row in found.rows) == ratios.count(1.2)


# As a whole


def test_the_worst_stands_first(made: Made) -> None:
    old = [
        case(STEP.format("a"), trainable_params=1),
        case(STEP.format("b"), allocated_peak_bytes=10**6),
        case(STEP.format("c"), allocated_peak_bytes=10**6),
        case(STEP.format("d")),
        case(STEP.format("e"), allocated_peak_bytes=10**6),
        case(STEP.format("g"), seconds=1.0),
    ]
    new = [
        case(STEP.format("a"), "crashed", "signal 11", trainable_params=1),
        case(STEP.format("b"), allocated_peak_bytes=2 * 10**6),
        case(STEP.format("c"), allocated_peak_bytes=3 * 10**6),
        case(STEP.format("e"), allocated_peak_bytes=10**5),
        case(STEP.format("f")),
        case(STEP.format("g"), seconds=2.0),
    ]
    rows = [row for row in compare(made(*old), made(*new), RULES).rows if row.says != "same"]
    assert [(row.test[-len("a-toy-cpu]")], row.says) for row in rows] == [
        ("a", "worse"),
        ("c", "worse"),
        ("b", "worse"),
        ("d", "MISSING"),
        ("g", "inconclusive"),
        ("e", "better"),
        ("f", "NEW"),
    ]


@cache
def saved_runs() -> tuple[Run, ...]:
    return tuple(map(read_run, runs_in(RESULTS)))


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_against_itself_is_the_same_in_all_but_what_cannot_be_told(every: int) -> None:
    for run in saved_runs()[::-every]:
        found = compare(run, run, RULES)
        assert all(row.says == "same" or row.metric.endswith("_seconds") for row in found.rows)
        assert found.counts["same"] >= len(run.cases)  # the outcome of each, at the least
        assert found.exit_code(strict=True) == 0


@pytest.mark.parametrize("apart", [1, pytest.param(1000, marks=pytest.mark.slow)])
def test_saved_runs_of_the_same_code_raise_no_alarm(apart: int) -> None:
    """The machine was shared, and its times differed by a third. An outcome may change: a benchmark failed in run 0013,
    and passed in run 0014. So may a verdict: from run 0016 on, facts decide three claims."""
    runs = saved_runs()
    pairs = [(i, k) for i, k in permutations(range(len(runs)), 2) if abs(i - k) <= apart]
    assert len(pairs) >= 2 * (len(runs) - 1)
    for first, second in pairs:
        found = compare(runs[first], runs[second], RULES)
        alarms = {row.metric for row in found.rows if row.verdict in ("worse", "better")}
        assert alarms <= {"outcome", "verdict"}


def test_plain_pytest_benchmark_files_are_compared_by_their_times(tmp_path: Path) -> None:
    def run(name: str, seconds: float) -> Run:
        stats = {"median": seconds, "data": [seconds] * 5}
        entry = {"fullname": "b.py::test_x", "stats": stats}
        machine = {"node": "host", "python_version": "3.11.7", "cpu": {"brand_raw": "AMD EPYC", "count": 2}}
        whole = {"machine_info": machine, "benchmarks": [entry], "datetime": "2026-11-24T20:00:00", "version": "5.0.0"}
        (tmp_path / name).write_text(json.dumps(whole))
        return read_run(tmp_path / name)

    found = compare(run("1.json", 1.0), run("2.json", 2.0), RULES)
    assert said(found) == [("worse", "seconds")]  # a factor of 2 is beyond what hosts were seen to differ by
    assert said(compare(run("1.json", 1.0), run("2.json", 1.5), RULES)) == [("inconclusive", "seconds")]


def test_the_same_runs_give_the_same_comparison(made: Made) -> None:
    runs = many(made, [1.0] * 6, 0), many(made, [1.1] * 6, 50)
    assert compared(runs) == compared(runs)


def test_sixty_cases_take_less_than_three_seconds(made: Made) -> None:
    runs = [
        made(
            *(
                case(STEP.format(f"m{n}"), **timed(noisy(1, seed + n, processes=1), noisy(1, seed, processes=1)))
                for n in range(60)
            )
        )
        for seed in (0, 100)
    ]
    began = time.process_time()
    compared(runs)
    assert time.process_time() - began < 3
