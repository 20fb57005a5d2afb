"""A pytest plugin: what a session has collected goes to the file of ``--noted``, as JSON.

``--with-cuda`` invents a GPU, as far as the selection of cases sees one.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_gauge import machine
from peft_gauge.pytest_plugin.workload import WORKLOAD, Workload


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--noted", type=Path, required=True)
    parser.addoption("--with-cuda", action="store_true")


def pytest_configure(config: pytest.Config) -> None:
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    if config.getoption("--with-cuda"):
        patch.setattr(machine, "why_no_cuda", lambda: None)


def pytest_collection_finish(session: pytest.Session) -> None:
    reported = session.config.hook.pytest_report_collectionfinish(
        config=session.config, start_path=session.startpath, items=session.items
    )
    lines = [line for each in reported for line in ([each] if isinstance(each, str) else each)]
    processes = session.config.stash.get(WORKLOAD, Workload.of([])).processes
    found = {
        "ids": [item.nodeid for item in session.items],
        "slow": [item.nodeid for item in session.items if item.get_closest_marker("slow")],
        "gpu": [item.nodeid for item in session.items if item.get_closest_marker("gpu")],
        "said": next((line for line in lines if line.startswith("peft-gauge:")), None),
        "measured": sorted([asked.case.id, *asked.passes, len(asked.shapes)] for asked in processes.values()),
    }
    session.config.getoption("--noted").write_text(json.dumps(found))
