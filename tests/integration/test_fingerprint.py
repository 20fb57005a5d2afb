"""Fingerprints of methods in two processes: the same records, to the last digit of the losses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from peft_gauge.fingerprint import fingerprint
from peft_gauge.history.fingerprints import differences, digest
from peft_gauge.training import methods
from tests.support.forked import forked
from tests.unit.fingerprint.test_fingerprint import build

# peft asks transformers 5 for a property that it has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def records_in_another_process(names: list[str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    return {name: fingerprint(build(methods.get(name))) for name in reversed(names)}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["lora", "qlora"], id="lora-qlora"),
        pytest.param([method.name for method in methods.DEFAULT_METHODS], id="all", marks=pytest.mark.slow),
    ],
)
def test_methods_have_the_same_record_in_another_process(names: list[str]) -> None:
    here = {name: fingerprint(build(methods.get(name))) for name in names}
    records = f"{__name__}:{records_in_another_process.__name__}"
    outcome = forked(records, names)
    assert outcome.ended == "done", outcome.reason
    there = outcome.value
    assert there.keys() == here.keys()
    for name, record in here.items():
        assert differences(there[name], record, loss_tolerance=0.0) == []
        assert json.dumps(there[name]) == json.dumps(record), name
    assert len({digest(record) for record in here.values()}) == len(here)
