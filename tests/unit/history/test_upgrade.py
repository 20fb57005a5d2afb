"""Runs that were saved in the words of an older schema are read in those of the newest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from peft_gauge.history import schema
from peft_gauge.history.reader import read_run, runs_in
from peft_gauge.history.upgrade import CASE_KEYS, CLAIM_KEYS, METRIC_KEYS, VERDICTS, upgraded
from tests.support.paths import RESULTS

OLD = {
    "schema": 2,
    "options": {"figures": "an option keeps its name"},
    "cases": [
        {
            "id": "benchmarks/test_x.py::test_x[lora]",
            "question": "test_x",
            "outcome": "passed",
            "reason": None,
            "figures": {
                "share_of_product": 0.5,
                "comparisons_with_cannot_tell": 4,
                "settings": {"batch": 1, "grad_checkpointing": False},
                "sweep": {"settings": {"rank": 4}},
                "peak_by_category": {"quantisation_constants": 3, "base_weights": 4},
                "verdicts": {"cannot tell": 2, "same": 1},
                "shapes": [{"card": {"name": "x"}}],
                "sampled_seconds": {"step_seconds": [[0.1, 0.2]]},
            },
        }
    ],
    "claims": [
        {"id": "c", "model": "m", "verdict": "cannot tell", "figure": "3 of 4", "conditions": "cannot tell apart"}
    ],
}


def test_each_key_and_verdict_has_the_new_word() -> None:
    found = upgraded(OLD)
    (case,), (claim,) = found["cases"], found["claims"]
    assert case == {
        "id": "benchmarks/test_x.py::test_x[lora]",
        "benchmark": "test_x",
        "outcome": "passed",
        "reason": None,
        "metrics": {
            "mfu": 0.5,
            "comparisons_with_inconclusive": 4,
            "settings": {
                "batch": 1,
                "grad_checkpointing": False,
                "mixed_precision": "no",
                "float32_outputs": False,
            },
            "sweep": {"settings": {"rank": 4}},
            "peak_by_category": {"quantization_constants": 3, "base_weights": 4},
            "verdicts": {"inconclusive": 2, "same": 1},
            "shapes": [{"gpu": {"name": "x"}}],
            "sampled_seconds": {"step_seconds": [[0.1, 0.2]]},
        },
    }
    assert claim == {
        "id": "c", "model": "m", "verdict": "inconclusive", "metric": "3 of 4", "conditions": "cannot tell apart",
    }  # fmt: skip
    assert found["options"] == OLD["options"]


@pytest.mark.parametrize("version", [schema.VERSION, schema.VERSION + 1, 0, "2", None, True])
def test_only_older_schemas_are_translated(version: Any) -> None:
    given = {**OLD, "schema": version}
    assert upgraded(given) is given


@pytest.mark.parametrize("broken", [{"cases": 3}, {"cases": [3]}, {"cases": [{"figures": 3}]}, {"claims": [None]}, {}])
def test_what_is_broken_is_left_to_the_reader(broken: dict[str, Any]) -> None:
    found = upgraded({"schema": 1, **broken})
    assert found.keys() == {"schema", *broken}


def schema_of(path: Path) -> int:
    """The schema of a saved run; to parse all of them would take seconds of the collection."""
    (found,) = re.findall(rf'"{schema.KEY}":\s*{{\s*"schema":\s*(\d+)', path.read_text(encoding="utf-8"))
    return int(found)


OLDER = [path for path in runs_in(RESULTS) if schema_of(path) < schema.VERSION]


@pytest.mark.parametrize("path", OLDER, ids=lambda path: f"{path.parent.name}-{path.name[:4]}")
def test_saved_runs_lose_nothing_but_old_words(path: Path) -> None:
    before, run = json.loads(path.read_text(encoding="utf-8"))[schema.KEY], read_run(path)
    assert [case.id for case in run.cases] == [case["id"] for case in before["cases"]]
    text = json.dumps([[case.metrics for case in run.cases], run.claims])
    for old in (*METRIC_KEYS, *CASE_KEYS, *CLAIM_KEYS):
        assert f'"{old}":' not in text
    for verdict in VERDICTS:
        assert f'"{verdict}"' not in text
    for case, was in zip(run.cases, before["cases"], strict=True):
        # Rounds of schema 1 are added as samples; nothing goes.
        assert len(case.metrics) - len(was["figures"]) in (0, 1)


def test_there_are_older_runs() -> None:
    assert len(OLDER) >= 10
