"""What ``-m``, ``-k`` and node ids select from the real suite, and that no name of a file or a test matters to it.

Expected is what pytest's manual says of markers and expressions, with two defaults: no slow cases, and one device.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peft_gauge.pytest_plugin import workload
from peft_gauge.pytest_plugin.selection import names_in
from tests.support.paths import ROOT
from tests.support.suite import sessions

MEMORY = "benchmarks/test_memory.py"
CPU, CUDA = "toy-llama-cpu", "toy-llama-cuda"


def collected(*requests: list[str], folder: Path, root: Path = ROOT, with_cuda: bool = False) -> list[tuple[int, Any]]:
    """pytest's exit code and what it would run, for each list of arguments; ``None`` where nothing was collected."""
    every = []
    for number, each in enumerate(requests):
        noted = folder / f"{number}.json"
        plugin = ["-p", "tests.support.collecting", "--noted", str(noted), *(["--with-cuda"] if with_cuda else [])]
        (done,) = sessions([*plugin, "--collect-only", "-q", "--model=toy-llama", *each], folder=root)
        every.append((done.returncode, json.loads(noted.read_text()) if noted.exists() else None))
        noted.unlink(missing_ok=True)
    return every


SELECTIONS: dict[str, list[str]] = {
    "bare": [],
    **{
        expression: ["-m", expression]
        for expression in (
            *("not slow", "slow", "slow or not slow", "slow_on_cpu", "not slow_on_cpu", "quick"),
            *("gpu", "not gpu", "gpu and not slow", "gpu and slow", "gpu or not gpu", "gpu or slow"),
            "(gpu or not gpu) and (slow or not slow)",
        )
    },
    "-k slow": ["-k", "slow"],
    "-k growth": ["-k", "growth"],
    "-k growth -m slow": ["-k", "growth", "-m", "slow"],
    "-k lora and gpu": ["-k", "lora and gpu"],
    "file": [MEMORY],
    "function": [f"{MEMORY}::test_growth"],
    "function -m not slow": [f"{MEMORY}::test_growth", "-m", "not slow"],
    "peak": [f"{MEMORY}::test_peak"],
    "case": [f"{MEMORY}::test_growth[lora-{CPU}]"],
    "case of cuda": [f"{MEMORY}::test_growth[lora-{CUDA}]"],
    "case and file": [f"{MEMORY}::test_growth[lora-{CPU}]", "benchmarks/test_fingerprint.py"],
    "absolute": [f"{ROOT / MEMORY}::test_growth[lora-{CPU}]"],
    "-m gpu --device=cpu": ["-m", "gpu", "--device=cpu"],
    "wrong": ["-m", "slow and"],
}
Selected = dict[str, tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory) -> Selected:
    folder = tmp_path_factory.mktemp("collected")
    return dict(zip(SELECTIONS, collected(*SELECTIONS.values(), folder=folder), strict=True))


@pytest.fixture(scope="module")
def selected_with_cuda(tmp_path_factory: pytest.TempPathFactory) -> Selected:
    folder = tmp_path_factory.mktemp("collected")
    names = ("bare", "not slow", "gpu", "not gpu", "(gpu or not gpu) and (slow or not slow)", "peak", "case")
    found = collected(*(SELECTIONS[name] for name in names), folder=folder, with_cuda=True)
    return dict(zip(names, found, strict=True))


def ids(selected: Selected, name: str) -> set[str]:
    return set(selected[name][1]["ids"])


EVERYTHING = "(gpu or not gpu) and (slow or not slow)"


def marked(selected: Selected, marker: str) -> set[str]:
    return set(selected[EVERYTHING][1][marker])


def test_a_bare_run_and_what_it_leaves_out_make_the_whole(selected: Selected) -> None:
    everything, slow, gpu = ids(selected, EVERYTHING), marked(selected, "slow"), marked(selected, "gpu")
    assert ids(selected, "bare") == everything - slow - gpu
    assert ids(selected, "slow") == slow - gpu
    assert ids(selected, "slow or not slow") == everything - gpu
    assert ids(selected, "gpu") == gpu - slow
    assert ids(selected, "gpu or not gpu") == everything - slow
    assert len(everything) > len(slow) > 0 < len(gpu) < len(everything)
    assert all(case.endswith("cpu]") for case in ids(selected, "slow_on_cpu"))
    assert ids(selected, "slow_on_cpu") <= slow
    assert {f"{MEMORY}::test_growth[lora-{CPU}]", f"{MEMORY}::test_variation[lora-16bit-{CPU}]"} <= slow
    assert f"{MEMORY}::test_growth[lora-{CUDA}]" in gpu - slow


@pytest.mark.parametrize("expression", ["not slow", "not gpu", "not slow_on_cpu"])
def test_to_deny_what_is_left_out_anyhow_changes_nothing(expression: str, selected: Selected) -> None:
    assert ids(selected, expression) == ids(selected, "bare")


def test_combinations_say_what_their_parts_say(selected: Selected) -> None:
    slow, gpu = marked(selected, "slow"), marked(selected, "gpu")
    assert ids(selected, "gpu and not slow") == gpu - slow
    assert ids(selected, "gpu and slow") == gpu & slow
    assert ids(selected, "gpu or slow") == gpu | slow
    assert ids(selected, "-k growth -m slow") == {case for case in slow - gpu if "test_growth" in case}
    assert ids(selected, "-k slow") >= slow - gpu  # -k takes parts of any name, and markers among them
    assert ids(selected, "-k lora and gpu") == {case for case in gpu - slow if "lora" in case}


def test_a_node_id_runs_what_it_names(selected: Selected) -> None:
    everything = ids(selected, EVERYTHING)
    growth = {case for case in everything if "::test_growth[" in case}
    assert ids(selected, "file") == {case for case in ids(selected, "bare") if case.startswith(MEMORY)}
    assert ids(selected, "function") == {case for case in growth if case.endswith(f"{CPU}]")}
    assert ids(selected, "function -m not slow") == set()
    assert ids(selected, "case") == ids(selected, "absolute") == {f"{MEMORY}::test_growth[lora-{CPU}]"}
    assert ids(selected, "case of cuda") == {f"{MEMORY}::test_growth[lora-{CUDA}]"}
    assert ids(selected, "case and file") == ids(selected, "case") | {
        case for case in ids(selected, "bare") if case.startswith("benchmarks/test_fingerprint.py")
    }
    assert ids(selected, "-k growth") == set()  # -k is a search, and what it left out is said


def test_a_device_that_was_chosen_stays_chosen(selected: Selected) -> None:
    assert ids(selected, "-m gpu --device=cpu") == set()


def test_pytest_itself_says_what_is_wrong_with_an_expression(selected: Selected) -> None:
    assert selected["wrong"][0] == pytest.ExitCode.USAGE_ERROR


def test_where_there_is_a_gpu(selected: Selected, selected_with_cuda: Selected) -> None:
    """A bare run takes the GPU; what is slow on a CPU only is not slow there."""
    everything, slow = ids(selected_with_cuda, EVERYTHING), marked(selected_with_cuda, "slow")
    gpu = marked(selected_with_cuda, "gpu")
    of_cpu = {case for case in everything if case.endswith(f"{CPU}]") or f"{CPU}-" in case}
    assert everything == ids(selected, EVERYTHING)
    assert ids(selected_with_cuda, "bare") == ids(selected_with_cuda, "not slow") == everything - slow - of_cpu
    assert ids(selected_with_cuda, "gpu") == gpu - slow
    assert ids(selected_with_cuda, "not gpu") == everything - slow - gpu
    assert ids(selected_with_cuda, "peak") == {case for case in gpu if "::test_peak[" in case}
    assert ids(selected_with_cuda, "case") == {f"{MEMORY}::test_growth[lora-{CPU}]"}


def test_what_was_left_out_is_said(selected: Selected, selected_with_cuda: Selected) -> None:
    slow = '{} slow cases (-m "slow or not slow" includes them)'
    assert selected["file"][1]["said"] == f"peft-gauge: deselected {slow.format(12)}, 19 of cuda (-m gpu selects them)"
    assert (
        selected["-k growth"][1]["said"] == f"peft-gauge: deselected {slow.format(7)}, 7 of cuda (-m gpu selects them)"
    )
    assert selected["-m gpu --device=cpu"][1]["said"].endswith("of cuda (--device)")
    assert selected_with_cuda["peak"][1]["said"] == "peft-gauge: deselected 7 of the CPU (--device=cpu)"
    assert selected[EVERYTHING][1]["said"] is None


# No name matters


def test_renaming_files_and_functions_changes_nothing_that_is_measured(tmp_path: Path) -> None:
    """The memory, speed and fingerprint benchmarks under other names: the same cases, the same passes and shapes."""
    for name in ("conftest.py", "pytest.ini", "fixtures", "peft_gauge"):
        (tmp_path / name).symlink_to(ROOT / name)
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    renamed = {"test_memory": "test_a", "test_speed": "test_b", "test_fingerprint": "test_c"}
    functions = {"test_peak": "test_d", "test_growth": "test_e", "test_step": "test_f", "test_phase": "test_g"}
    for old, new in renamed.items():
        text = (ROOT / "benchmarks" / f"{old}.py").read_text()
        for function, other in functions.items():
            text = text.replace(f"def {function}(", f"def {other}(")
        (folder / f"{new}.py").write_text(text)
    everything = ["-m", EVERYTHING]
    files = [f"benchmarks/{name}.py" for name in renamed]
    before, before_alone = collected([*everything, *files], [*everything, MEMORY], folder=tmp_path)
    requests = (everything, [*everything, "benchmarks/test_a.py"])
    after, after_alone = collected(*requests, folder=tmp_path, root=tmp_path)
    assert after[1]["measured"] == before[1]["measured"]
    assert ["lora-toy-llama-cpu", "fingerprint", "memory", "speed", 3] in before[1]["measured"]
    assert after_alone[1]["measured"] == before_alone[1]["measured"]
    assert ["lora-toy-llama-cpu", "memory", 3] in before_alone[1]["measured"]


def item(*markers: pytest.MarkDecorator) -> Any:
    """What a collected test that asks for `measured` shows of itself."""
    marks = [each.mark for each in markers]
    return SimpleNamespace(
        nodeid="x.py::test_x",
        fixturenames=["measured"],
        iter_markers=lambda name: [mark for mark in marks if mark.name == name],
    )


@pytest.mark.parametrize(
    ("markers", "said"),
    [
        ([], "uses measured without naming its passes"),
        ([pytest.mark.slow], "uses measured without naming its passes"),
        ([pytest.mark.measures("memories")], "knows fingerprint, memory, speed, and shapes=True, not 'memories'"),
        ([pytest.mark.measures("memory", shape=True)], "not 'shape'"),
    ],
)
def test_a_test_says_what_is_measured_of_its_case(markers: list[pytest.MarkDecorator], said: str) -> None:
    with pytest.raises(pytest.UsageError, match=re.escape(said)):
        workload.check_markers(item(*markers))
    for allowed in (pytest.mark.measures, pytest.mark.measures("memory", shapes=True)):
        workload.check_markers(item(allowed))


def test_every_marker_counts() -> None:
    both = item(pytest.mark.measures("memory", shapes=True), pytest.mark.measures("speed"))
    assert workload.passes_of(both) == {"memory", "speed"}


# Expressions


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("", set()),
        ("   ", set()),
        ("slow", {"slow"}),
        ("not slow", {"slow"}),
        ("slow or not slow", {"slow"}),
        ("slow_on_cpu", {"slow_on_cpu"}),
        ("not (a or b) and (c or not d)", {"a", "b", "c", "d"}),
        ("(a and b) or (c and d)", {"a", "b", "c", "d"}),
        ("a and (b or (c and not d)) or e", {"a", "b", "c", "d", "e"}),
        ("test_x[lora-cpu]", {"test_x[lora-cpu]"}),
        ("slow and", set()),
        ("(", set()),
        ("a b", set()),
    ],
)
def test_the_names_of_an_expression(expression: str, names: set[str]) -> None:
    assert names_in(expression) == names
