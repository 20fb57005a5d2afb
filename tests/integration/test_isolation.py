"""A function in a process of its own: every way to end, each caused on purpose, of new interpreters and forked ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from peft_gauge import isolation
from peft_gauge.errors import GaugeError
from peft_gauge.isolation import Interrupted, ProcessOutcome, child, endings, fork_server, parent
from peft_gauge.pytest_plugin.workers import process_environment
from tests.support import children
from tests.support.paths import ROOT

LIMIT_SECONDS = 60.0  # of what ends by itself; far off, for a busy machine
METRICS = {"phase": "step", "allocated_peak_bytes": 123_456_789_012_345, "loss": 0.1, "device_bytes": None}


PRELOADS: dict[str, Sequence[str] | None] = {"spawned": None, "forked": ()}
_way = "spawned"


@pytest.fixture(params=PRELOADS, autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How this test's processes come to be. A fork server that imports nothing forks what a new interpreter is."""
    monkeypatch.setitem(globals(), "_way", request.param)
    if request.param == "forked":  # before the test changes the environment, which would be the server's
        fork_server.prepare((), isolation.child_environment(process_environment()))
    return str(request.param)


@pytest.fixture(autouse=True)
def no_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary folders are made; whatever a test does, none may be left at its end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    wait_until(lambda: list(folder.iterdir()) == [])  # a fork server removes what a dead parent left, a moment later


# Where a test waits for a limit or imports torch, the second way of starting a process is tried weekly.
LONG = pytest.mark.parametrize("way", [pytest.param("spawned", marks=pytest.mark.slow), "forked"], indirect=True)


def run(function: str, *arguments: Any, **options: Any) -> ProcessOutcome:
    if _way == "forked":  # whatever libraries have written into this process's environment in other tests
        options.setdefault("environment", process_environment())
    return isolation.run(function, *arguments, preload=PRELOADS[_way], **options)


def call(function: str, *arguments: Any, limit_seconds: float = LIMIT_SECONDS) -> ProcessOutcome:
    return run(f"tests.support.children:{function}", *arguments, limit_seconds=limit_seconds)


def is_dead(pid: int) -> bool:
    """Whether the process runs no more; one that nobody collects stays a zombie, which holds no memory and no GPU."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(happened: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


# Done ----------------------------------------------------------------------------------------------------------------


def test_it_is_told_how_the_process_came_to_be(way: str) -> None:
    outcome = call("give", 1)
    assert (outcome.value, outcome.process, outcome.why_spawned) == (1, way, None)
    assert outcome.origin == {"process": way}


def test_a_value_comes_back() -> None:
    value = {"a": [1, 2.5, None, "é"], "b": {"c": True}}
    outcome = call("give", value)
    assert (outcome.ended, outcome.value, outcome.reason, outcome.last) == ("done", value, None, {})


def test_arguments_keep_their_class() -> None:
    outcome = call("describe", ProcessOutcome("refused", None, "for this test", {}, 0.25, None))
    assert outcome.value == {"class": "ProcessOutcome", "ended": "refused", "seconds": 0.25}


def test_times_are_the_work_and_what_is_besides() -> None:
    start = time.perf_counter()
    outcome = call("sleep", 0.3)
    around_seconds = time.perf_counter() - start
    assert outcome.work_seconds is not None
    assert 0.3 <= outcome.work_seconds < outcome.seconds < around_seconds
    assert outcome.besides_seconds == outcome.seconds - outcome.work_seconds


def test_the_process_is_its_own_and_imports_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAUGE_KEPT", "kept")
    monkeypatch.setenv("GAUGE_CHANGED", "before")
    outcome = run(
        "tests.support.children:tell_about_the_process",
        limit_seconds=LIMIT_SECONDS,
        environment={"GAUGE_CHANGED": "after", "PYTHONPATH": "/nowhere"},
    )
    value = outcome.value
    assert value["pid"] != os.getpid()
    assert value["group"] == value["pid"]
    assert not {"torch", "numpy", "pytest", "psutil"} & set(value["modules"])
    assert value["environment"]["GAUGE_KEPT"] == "kept"
    assert value["environment"]["GAUGE_CHANGED"] == "after"
    assert value["environment"]["PYTHONPATH"] == os.pathsep.join([str(ROOT), "/nowhere"])


def test_an_installed_package_puts_no_other_library_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent, "PACKAGE_PARENT", Path("/env/lib/python3.11/site-packages"))
    assert isolation.child_environment({"PYTHONPATH": "/given"})["PYTHONPATH"] == "/given"


def test_another_checkout_in_the_working_directory_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impostor = tmp_path / "peft_gauge"
    impostor.mkdir()
    (impostor / "__init__.py").write_text("raise SystemExit('the wrong package')")
    monkeypatch.chdir(tmp_path)
    assert call("tell_about_the_process").value["package"] == str(ROOT / "peft_gauge" / "__init__.py")


def test_noise_is_no_hindrance() -> None:
    outcome = call("be_noisy", 20_000)
    assert (outcome.ended, outcome.value) == ("done", "done with it")


def test_a_grandchild_is_not_waited_for_and_does_not_live_on() -> None:
    outcome = call("leave_a_grandchild_behind")
    assert outcome.ended == "done"
    wait_until(lambda: is_dead(outcome.value["grandchild"]))


@LONG
def test_a_result_stands_though_the_interpreter_does_not_end() -> None:
    outcome = call("leave_a_thread_behind")
    assert (outcome.ended, outcome.value) == ("done", "returned")
    assert outcome.seconds >= child._END_SECONDS


# Metrics -------------------------------------------------------------------------------------------------------------


@LONG
def test_the_memory_of_a_known_tensor_is_watched() -> None:
    tensor_bytes = 64 * children.MIB
    outcome = call("allocate", tensor_bytes)
    assert outcome.value == {"held_bytes": tensor_bytes}
    peak_bytes = outcome.last["rss_peak_bytes"] - outcome.last["before_bytes"]
    assert tensor_bytes <= peak_bytes < tensor_bytes + 16 * children.MIB
    # The tensor is given back by then: the last reading, not the greatest.
    assert outcome.last["rss_bytes"] < outcome.last["rss_peak_bytes"] - tensor_bytes // 2


def test_later_figures_replace_earlier_ones_but_peaks_stay_the_greatest() -> None:
    outcome = call(
        "watch_these",
        {"a_bytes": 1, "a_peak_bytes": 5, "b_peak_bytes": None, "c_bytes": 4},
        {"a_bytes": 3, "a_peak_bytes": 9, "b_peak_bytes": 2, "c_bytes": None},
        {"a_bytes": 2, "a_peak_bytes": 7, "b_peak_bytes": None, "d_bytes": None},
        {"a_bytes": 1, "a_peak_bytes": 8},
    )
    assert outcome.last == {"a_bytes": 1, "a_peak_bytes": 9, "b_peak_bytes": 2, "c_bytes": 4, "d_bytes": None}


def test_a_failure_is_read_once_more_and_stays_the_reason() -> None:
    outcome = call("fail_while_watched")
    assert outcome.last == {"allocated_peak_bytes": 9}
    assert outcome.reason is not None
    assert outcome.reason.startswith("ValueError: not the reading's fault at children.py:")


def test_a_failing_last_reading_does_not_hide_the_failure() -> None:
    outcome = call("fail_with_the_last_reading")
    assert outcome.reason is not None
    assert outcome.reason.startswith("ValueError: not the reading's fault at children.py:")


def test_a_reading_that_failed_meanwhile_is_told() -> None:
    outcome = call("watch_what_cannot_be_read_for_a_while")
    assert (outcome.ended, outcome.last) == ("crashed", {"allocated_bytes": 3})
    assert outcome.reason is not None
    assert outcome.reason.startswith("OSError: no reading at children.py:")


def test_noting_outside_a_child_does_nothing() -> None:
    isolation.note(phase="step")
    with isolation.watch(lambda: {"a_bytes": 1}):
        pass


# Out of memory -------------------------------------------------------------------------------------------------------


@LONG
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("raise_out_of_memory", "OutOfMemoryError: known by its class, not by these words at children.py:"),
        ("allocate_the_impossible", f"you tried to allocate {children.HUGE_BYTES} bytes"),
        ("allocate_an_impossible_bytearray", "MemoryError at children.py:"),
        ("raise_from_out_of_memory", "MemoryError at children.py:"),
        ("raise_while_out_of_memory_is_handled", "MemoryError at children.py:"),
        ("exit_as_bitsandbytes_does", "last output: Error out of memory at line 380 in file ops.cu"),
    ],
)
def test_out_of_memory_is_told_apart(function: str, reason: str) -> None:
    outcome = call(function)
    assert outcome.ended == "out-of-memory"
    assert outcome.reason is not None
    assert reason in outcome.reason
    assert outcome.value is None


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RuntimeError", "CUDA out of memory. Tried to allocate 2.00 GiB."),
        ("AcceleratorError", "CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        ("RuntimeError", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        ("RuntimeError", "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        ("RuntimeError", "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        ("OSError", "[Errno 12] Cannot allocate memory"),
    ],
)
def test_out_of_memory_by_its_words(kind: str, message: str) -> None:
    first_line = message.splitlines()[0]
    assert endings.ending(children.KINDS[kind](message)) == ("out-of-memory", None, f"{kind}: {first_line}")


def test_out_of_memory_that_was_dealt_with_is_no_reason() -> None:
    outcome = call("raise_after_out_of_memory_was_handled")
    assert outcome.ended == "crashed"
    assert outcome.reason is not None
    assert outcome.reason.startswith("ValueError: something else at children.py:")


# Refused -------------------------------------------------------------------------------------------------------------


def test_what_the_suite_refuses_is_refused() -> None:
    outcome = call("raise_error", "GaugeError", "no such rank; take a positive one")
    assert (outcome.ended, outcome.reason) == ("refused", "no such rank; take a positive one")
    assert outcome.work_seconds is not None


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("tests.support.children:giv", "unknown function of tests.support.children 'giv'; did you mean give"),
        ("tests.no_such_module:f", "unknown function tests.no_such_module:f: there is no module tests.no_such_module"),
        ("tests.support.children:MIB", "unknown function of tests.support.children 'MIB'"),
    ],
)
def test_an_unknown_function_is_refused(function: str, reason: str) -> None:
    outcome = run(function, limit_seconds=LIMIT_SECONDS)
    assert outcome.ended == "refused"
    assert outcome.reason is not None
    assert outcome.reason.startswith(reason)
    assert (outcome.work_seconds, outcome.besides_seconds) == (None, None)


def test_a_missing_library_is_no_unknown_function(tmp_path: Path) -> None:
    (tmp_path / "needs_more.py").write_text("import a_library_that_is_not_there\ndef f(): pass\n")
    outcome = run("needs_more:f", limit_seconds=LIMIT_SECONDS, environment={"PYTHONPATH": str(tmp_path)})
    assert outcome.ended == "crashed"
    assert outcome.reason == "ModuleNotFoundError: No module named 'a_library_that_is_not_there' at needs_more.py:1"


def test_arguments_that_the_child_cannot_read_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Here:
        pass

    Here.__qualname__ = "Here"
    monkeypatch.setattr(children, "Here", Here, raising=False)
    monkeypatch.setattr(Here, "__module__", "tests.support.children")
    outcome = call("give", Here())
    assert outcome.ended == "refused"
    assert outcome.reason is not None
    assert outcome.reason.startswith("the arguments cannot be unpickled in the child process: ")


@pytest.mark.parametrize("limit_seconds", [0, -1, float("nan"), float("inf")])
def test_a_limit_is_a_positive_number(limit_seconds: float) -> None:
    with pytest.raises(GaugeError, match="time limit"):
        call("give", 1, limit_seconds=limit_seconds)


def test_what_cannot_be_started_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(GaugeError, match="write it as 'package.module:name'"):
        run("tests.support.children.give", limit_seconds=1)
    with pytest.raises(GaugeError, match=r"the arguments of tests.support.children:give cannot be pickled"):
        call("give", lambda: None)
    with pytest.raises(GaugeError, match="cannot start the interpreter .*nothing: No such file"):
        run("tests.support.children:give", 1, limit_seconds=1, python=str(tmp_path / "nothing"))


# Crashed -------------------------------------------------------------------------------------------------------------


def test_an_exception_is_told_with_its_place_and_without_folders() -> None:
    outcome = call("raise_error", "ValueError", "no file '/home/someone/models/a.gguf', see https://host/a/b\nmore")
    line = children.raise_error.__code__.co_firstlineno + 1
    assert outcome.ended == "crashed"
    assert outcome.reason == f"ValueError: no file 'a.gguf', see https://host/a/b at children.py:{line}"
    assert outcome.work_seconds is not None


def test_a_broken_device_is_not_called_again(tmp_path: Path) -> None:
    readings = tmp_path / "readings"
    outcome = call("break_the_device_while_watched", str(readings))
    assert outcome.ended == "crashed"
    assert outcome.reason is not None
    assert outcome.reason.startswith(
        "AcceleratorError: CUDA error: an illegal memory access was encountered at children.py:"
    )
    assert readings.read_text() == "r"
    assert outcome.last == {"allocated_bytes": 7}


@pytest.mark.parametrize("function", ["give_nan", "give_an_object"])
def test_what_json_cannot_hold_is_no_result(function: str) -> None:
    outcome = call(function)
    assert (outcome.ended, outcome.value) == ("crashed", None)
    assert outcome.reason is not None
    assert outcome.reason.startswith("ValueError: the returned value cannot be converted to JSON: ")
    assert outcome.work_seconds is not None


def test_what_json_cannot_hold_is_no_note() -> None:
    outcome = call("note_an_object")
    assert (outcome.ended, outcome.last) == ("crashed", {})
    assert outcome.reason is not None
    assert outcome.reason.startswith("ValueError: a note cannot be converted to JSON: ")


@pytest.mark.parametrize("code", [0, 3])
def test_an_end_without_a_result_is_a_crash(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # the words must arrive without it
    outcome = call("exit_at_once", code)
    assert outcome.ended == "crashed"
    assert outcome.reason == f"ended without a result, with exit code {code}; last output: last words"
    assert outcome.work_seconds is None


def test_sys_exit_is_a_crash() -> None:
    outcome = call("exit_politely", 0)
    assert outcome.ended == "crashed"
    assert outcome.reason is not None
    assert outcome.reason.startswith("SystemExit: 0 at children.py:")


def test_an_interpreter_that_is_none() -> None:
    outcome = run("tests.support.children:give", 1, limit_seconds=LIMIT_SECONDS, python="false")
    assert (outcome.ended, outcome.reason) == ("crashed", "ended without a result, with exit code 1")


@pytest.mark.parametrize(("by", "cause"), [("SIGKILL", "out-of-memory killer"), ("SIGABRT", "native code aborted")])
def test_what_was_told_before_a_kill_is_known_to_the_byte(by: str, cause: str) -> None:
    outcome = call("be_killed", int(signal.Signals[by]), METRICS)
    assert outcome.ended == "crashed"
    assert outcome.reason is not None
    assert outcome.reason.startswith(f"killed by {by} (")
    assert cause in outcome.reason
    assert outcome.last == {"step": 1, **METRICS}
    assert outcome.work_seconds is None


def test_a_segmentation_fault_is_told_with_its_place() -> None:
    outcome = call("read_address_zero")
    assert outcome.ended == "crashed"
    assert outcome.reason is not None
    assert outcome.reason.startswith("killed by SIGSEGV (")
    assert " in string_at at __init__.py:" in outcome.reason
    assert outcome.last == {"phase": "step"}


# Timed out -----------------------------------------------------------------------------------------------------------


@LONG
@pytest.mark.parametrize("function", ["hang_in_python", "hang_in_native_code"])
def test_a_hang_is_ended_at_the_limit(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int | None] = []
    told = parent._outcome

    def noted(folder: Path, code: int | None, limit_seconds: float, seconds: float) -> ProcessOutcome:
        codes.append(code)
        return told(folder, code, limit_seconds, seconds)

    monkeypatch.setattr(parent, "_outcome", noted)
    outcome = call(function, METRICS, limit_seconds=1.5)
    assert outcome.ended == "timed-out"
    assert outcome.reason == "did not end within 1.5 s; last seen in phase step"
    assert outcome.last == METRICS
    assert codes == [-signal.SIGKILL]  # by its parent: its own, later limit would have ended it with code 1
    assert outcome.seconds >= 1.5
    assert (outcome.work_seconds, outcome.besides_seconds) == (None, None)


def test_a_hang_that_told_no_phase() -> None:
    assert call("sleep", children.LONG_SECONDS, limit_seconds=0.5).reason == "did not end within 0.5 s"


# Interrupted, abandoned ----------------------------------------------------------------------------------------------

PARENT = """
import json, sys
from peft_gauge.isolation import Interrupted, run
preload, function, limit_seconds, *arguments = json.loads(sys.argv[1])
try:
    run(function, *arguments, limit_seconds=limit_seconds, preload=preload)
except Interrupted as error:
    print(json.dumps(vars(error.outcome)))
    raise
"""


@pytest.fixture
def start_parent(no_folder_stays: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process that itself runs a child, and is gone at the end of the test."""
    parents: list[subprocess.Popen[str]] = []

    def start(*task: Any) -> subprocess.Popen[str]:
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, json.dumps([PRELOADS[_way], *task])],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(no_folder_stays)},
            preexec_fn=children.heed_ctrl_c,
        )
        parents.append(parent)
        return parent

    yield start
    for each in parents:
        each.kill()
        each.communicate()


def test_ctrl_c_kills_the_child_and_tells_what_is_known(tmp_path: Path, start_parent: Callable[..., Any]) -> None:
    pid_file = tmp_path / "pid"
    parent = start_parent("tests.support.children:announce_and_hang", LIMIT_SECONDS, str(pid_file), METRICS)
    wait_until(pid_file.exists)
    # A forked child may be at work before its parent is told its pid; the thread of the limit is started after that.
    wait_until(lambda: psutil.Process(parent.pid).num_threads() > 1)
    parent.send_signal(signal.SIGINT)
    told, _ = parent.communicate(timeout=20)
    outcome = ProcessOutcome(**json.loads(told))
    assert outcome.ended == "interrupted"
    assert outcome.reason is not None
    assert outcome.reason.startswith("interrupted after ")
    assert outcome.last == METRICS
    assert outcome.work_seconds is None
    assert is_dead(int(pid_file.read_text()))
    assert parent.returncode != 0


def test_an_interrupt_is_a_keyboard_interrupt() -> None:
    outcome = call("raise_error", "KeyboardInterrupt", "of the child alone")
    assert outcome.ended == "interrupted"
    assert isinstance(Interrupted(outcome), KeyboardInterrupt)
    assert Interrupted(outcome).outcome is outcome


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_does_not_outlive_its_parent(tmp_path: Path, start_parent: Callable[..., Any], by: int) -> None:
    pid_file = tmp_path / "pid"
    parent = start_parent("tests.support.children:announce_and_hang", LIMIT_SECONDS, str(pid_file), METRICS)
    wait_until(pid_file.exists)
    parent.send_signal(by)
    parent.wait()
    wait_until(lambda: is_dead(int(pid_file.read_text())), seconds=LIMIT_SECONDS / 2)


@LONG
def test_an_orphan_that_lets_no_thread_run_ends_at_its_limit(
    tmp_path: Path, start_parent: Callable[..., Any], no_folder_stays: Path, way: str
) -> None:
    pid_file = tmp_path / "pid"
    parent = start_parent("tests.support.children:hang_in_native_code", 1.5, METRICS, str(pid_file))
    wait_until(pid_file.exists)
    parent.kill()
    parent.wait()
    wait_until(lambda: is_dead(int(pid_file.read_text())))
    if way == "forked":  # the server is left
        return
    for folder in no_folder_stays.iterdir():  # nobody is left who could
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
