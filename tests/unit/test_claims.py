"""The ledger is complete, and a verdict that differs from the recorded one fails."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from benchmarks.test_facts import LEARNED, RANKED, RECOVERED, VARIANTS
from peft_gauge import claims
from peft_gauge.claims import Finding
from peft_gauge.commands import doctor
from peft_gauge.errors import GaugeError
from peft_gauge.report.terminal.summary import summary
from peft_gauge.training import models
from tests.support.paths import ROOT


def test_there_are_26_claims_of_teaching_material_and_6_of_later_work() -> None:
    assert len(claims.ledger()) == 26 + 6


def test_every_claim_is_asked_of_something_that_exists() -> None:
    known = {*models.record_names(), "any", "int4", "int4-minmax", "fp4", *RANKED, *LEARNED, *RECOVERED, *VARIANTS}
    for claim in claims.ledger().values():
        assert {model.removesuffix("-bf16-autocast") for model in claim.models} <= known


def entry(**changes: object) -> str:
    values = {"id": "x", "statement": "s", "decided_by": "d", **changes}
    lines = [f"{key} = {value!r}".replace("'", '"') for key, value in values.items()]
    return "\n".join(["[[claim]]", *lines, 'models = ["tinyllama"]'])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a valid ledger of claims"),
        ("[[claim]", "is not a valid ledger of claims"),
        (entry(), "the claim x lacks recorded"),
        (entry() + '\nrecorded = { tinyllama = "true" }', "unknown verdict of x 'true'"),
        (entry() + '\nrecorded = { tinyllama-2 = "holds" }', "unknown model in the verdicts of x"),
        ((entry() + "\nrecorded = {}\n") * 2, "the claim x is listed twice"),
    ],
)
def test_a_broken_ledger_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "claims.toml"
    path.write_text(text)
    with pytest.raises(GaugeError, match=said):
        claims.ledger(path)


def test_findings_have_three_verdicts() -> None:
    assert [Finding.of(holds, "f", "c").verdict for holds in (True, False, None)] == [
        "holds",
        "refuted",
        "inconclusive",
    ]


def test_a_verdict_that_differs_fails(pytester: pytest.Pytester) -> None:
    """The ledger's own test, with a planted decider that says the opposite of what is recorded."""
    source = (ROOT / "benchmarks" / "test_claims.py").read_text()
    planted = source + '\n\nDECIDERS["identity"] = lambda claim, model, plans: Finding.of(False, "planted", "none")\n'
    pytester.makepyfile(test_planted=planted)
    pytester.makeconftest(
        """
        import pytest
        from fixtures.verdicts import decide

        @pytest.fixture
        def record(request):
            return lambda **metrics: request.node.user_properties.append(("metrics", metrics))

        @pytest.fixture(scope="session")
        def plans():
            from fixtures.plans import Plans

            return Plans()  # neither claim needs one

        @pytest.fixture(scope="session")
        def workload(request):
            from peft_gauge.pytest_plugin.workload import Workload

            return Workload.of(request.session.items)
        """
    )
    result = pytester.runpytest_inprocess("-k", "identity or qlora-quality", "-p", "no:benchmark")
    result.assert_outcomes(failed=1, skipped=2)
    result.stdout.fnmatch_lines(["*recorded 'holds', but planted*"])


def test_claims_are_shown_with_their_verdicts() -> None:
    shown = summary(
        [], [{"id": "lora-ratio", "model": "tinyllama", "verdict": "holds", "metric": "0.4096 % of the base"}], 80
    )
    assert re.search(r"lora-ratio +│ tinyllama +│ holds +│ 0.4096 % of the base", shown)


def test_the_doctors_minimum_versions_are_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = dict(requirement.split(">=") for requirement in project["dependencies"])
    assert {name: required[name] for name in doctor.MINIMUM} == doctor.MINIMUM
