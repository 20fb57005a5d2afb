"""Fingerprints of all methods in two processes: the same records, to the last digit of the losses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from peft_gauge.fingerprint import fingerprint
from peft_gauge.history.fingerprints import differences, digest
from peft_gauge.training import methods
from tests.support.paths import ROOT
from tests.unit.fingerprint.test_fingerprint import build

# peft asks transformers 5 for a property that it has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


IN_ANOTHER_PROCESS = """
import json, sys
import torch
from peft_gauge.training import methods
from tests.unit.fingerprint.test_fingerprint import build, fingerprint

torch.set_num_threads(1)
records = {m.name: fingerprint(build(m)) for m in reversed(methods.DEFAULT_METHODS)}
open(sys.argv[1], "w").write(json.dumps(records))
"""


def test_all_methods_have_the_same_record_in_another_process(tmp_path: Path) -> None:
    here = {method.name: fingerprint(build(method)) for method in methods.DEFAULT_METHODS}
    target = tmp_path / "records.json"
    subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS, str(target)], cwd=ROOT, check=True)
    there = json.loads(target.read_text())
    assert there.keys() == here.keys()
    for name, record in here.items():
        assert differences(there[name], record, loss_tolerance=0.0) == []
        assert json.dumps(there[name]) == json.dumps(record), name
    assert len({digest(record) for record in here.values()}) == len(here)
