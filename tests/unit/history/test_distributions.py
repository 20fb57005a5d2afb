"""Every installed distribution is recorded with a run, and a comparison says which others than the libraries differ."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peft_gauge import machine
from peft_gauge.errors import GaugeError
from peft_gauge.history.metrics import environment_changes
from peft_gauge.history.reader import Run, read_run

LIBRARIES = {"torch": "2.13.0", "peft": "0.21.2", "pytest-benchmark": "5.3.1"}
INSTALLED = {"torch": "2.13.0", "peft": "0.21.2", "pytest-benchmark": "5.3.1", "numpy": "2.4.6", "rich": "15.0"}


def saved(folder: Path, **machine_info: Any) -> Run:
    path = folder / f"{len([*folder.iterdir()])}.json"
    run = {
        "machine_info": {"name": "m", "libraries": LIBRARIES} | machine_info,
        "benchmarks": [],
        "datetime": "2026-11-27T20:00:00+00:00",
        "peft_gauge": {"schema": 2, "options": {}, "interrupted": False, "cases": [], "claims": []},
    }
    path.write_text(json.dumps(run))
    return read_run(path)


def test_all_that_is_installed_is_recorded() -> None:
    found = machine.machine_info()["distributions"]
    assert {"torch", "numpy", "pytest", "pluggy", "nvidia-ml-py"} <= found.keys()
    assert found["numpy"] == importlib.metadata.version("numpy")
    assert [*found] == sorted(found)


def test_names_are_normalised_and_the_first_on_the_path_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        @property
        def metadata(self) -> Any:
            raise OSError("unreadable")

    def of(name: str, version: str) -> Any:
        return SimpleNamespace(metadata={"Name": name, "Version": version})

    there = [of("Some.Name", "2"), of("some_name", "1"), Broken(), SimpleNamespace(metadata={"Name": "no-version"})]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: iter(there))
    assert machine.distributions() == {"some-name": "2"}


def test_others_that_differ_are_one_line(tmp_path: Path) -> None:
    base = saved(tmp_path, distributions=INSTALLED | {f"p{number}": "1" for number in range(6)})
    new = saved(
        tmp_path,
        libraries=LIBRARIES | {"torch": "2.14.0"},
        distributions=INSTALLED | {"torch": "2.14.0", "numpy": "2.5.0", "gguf": "0.17"},
    )
    assert environment_changes(base, new) == [
        "torch: 2.13.0 → 2.14.0",
        "other distributions: numpy: 2.4.6 → 2.5.0, p0: 1 → absent, p1: 1 → absent, p2: 1 → absent, p3: 1 → absent "
        "and 3 more",
    ]
    assert environment_changes(base, base) == []


def test_an_older_run_is_read_and_says_nothing_of_others(tmp_path: Path) -> None:
    old, new = saved(tmp_path), saved(tmp_path, distributions=INSTALLED)
    assert (old.distributions, new.distributions) == ({}, INSTALLED)
    assert environment_changes(old, new) == environment_changes(new, old) == []


def test_distributions_of_a_wrong_type_are_named(tmp_path: Path) -> None:
    with pytest.raises(GaugeError, match=r"machine_info\.distributions\.rich is 15\.0, not a string"):
        saved(tmp_path, distributions={"rich": 15.0})
    with pytest.raises(GaugeError, match=r"machine_info\.distributions is \[\], not an object"):
        saved(tmp_path, distributions=[])
