"""Forked processes against spawned ones: as fresh, the same to the byte, sooner; and spawned where a fork is not safe.

How a forked process can end is asked in test_isolation.py, of both kinds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from peft_gauge import isolation
from peft_gauge.isolation import fork_server
from peft_gauge.measure import PRELOAD
from peft_gauge.pytest_plugin import workers
from peft_gauge.pytest_plugin.workers import process_environment
from peft_gauge.training import methods, models
from peft_gauge.training.cases import BATCHES, Case
from peft_gauge.training.settings import StepSettings
from tests.support import children
from tests.support.paths import ROOT

if TYPE_CHECKING:
    from peft_gauge.isolation import ProcessOutcome

LIMIT_SECONDS = 120.0


@pytest.fixture(autouse=True)
def server_in_the_usual_environment() -> None:
    """Before a test changes the environment: a server keeps the one that it was started with."""
    fork_server.prepare((), usual_environment())


def usual_environment() -> dict[str, str]:
    """Without what libraries have written into this process's in other tests."""
    return isolation.child_environment(process_environment())


def fork(function: str, *arguments: Any, preload: Sequence[str] = (), **options: Any) -> ProcessOutcome:
    options = {"limit_seconds": LIMIT_SECONDS, "environment": process_environment(), **options}
    return isolation.run(f"tests.support.children:{function}", *arguments, preload=preload, **options)


def spawn(function: str, *arguments: Any) -> ProcessOutcome:
    return isolation.run(f"tests.support.children:{function}", *arguments, limit_seconds=LIMIT_SECONDS)


def is_dead(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(happened: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def server_pid(preload: Sequence[str] = ()) -> int:
    pid = fork_server.pid_of(preload)
    assert pid is not None
    return pid


# A process like a new one --------------------------------------------------------------------------------------------


def test_it_has_imported_what_was_asked_for_and_nothing_else_of_weight() -> None:
    with_it = fork("tell_about_the_process", preload=("fractions",)).value
    without = fork("tell_about_the_process").value
    assert "fractions" in with_it["modules"]
    assert not {"fractions", "torch", "numpy", "pytest", "psutil"} & set(without["modules"])


def test_it_leads_a_session_of_its_own_and_is_no_child_of_this_process() -> None:
    value = fork("tell_about_the_process").value
    assert value["group"] == value["session"] == value["pid"]
    assert value["parent"] == server_pid()
    assert value["parent"] != os.getpid()


def test_it_works_where_this_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork("give", 1)  # the server is older than the change
    monkeypatch.chdir(tmp_path)
    outcome = fork("tell_about_the_process")
    assert (outcome.process, outcome.value["working_directory"]) == ("forked", str(tmp_path))


def test_it_has_no_file_of_the_servers_but_its_own_streams() -> None:
    """A connection kept open by a child, or by what it leaves behind, would hide that its requester is gone."""
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(fork, "sleep", 1.0)
        value = fork("tell_about_the_process").value
        other.result()
    assert not [name for name in value["files"].values() if name.startswith("socket:")]
    assert value["files"]["0"] == os.devnull
    assert value["files"]["1"] == value["files"]["2"]


def test_what_one_child_does_the_next_does_not_find() -> None:
    assert fork("leave_a_mark").value == {"before": [], "after": ["mark"]}
    assert fork("leave_a_mark").value == {"before": [], "after": ["mark"]}


@pytest.mark.slow
def test_random_numbers_begin_anew() -> None:
    """Where nobody seeds them, they differ from process to process, as of new interpreters."""
    first, second = (fork("draw", preload=PRELOAD) for _ in range(2))
    assert (first.process, second.process) == ("forked", "forked"), first.why_spawned
    assert {name for name in first.value if first.value[name] == second.value[name]} == set()


def test_several_at_once_are_told_apart(tmp_path: Path) -> None:
    """Each child waits until all eight are there: one after the other none of them would end."""
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda number: fork("meet", str(tmp_path), number, 8), range(8)))
    assert [outcome.value for outcome in outcomes] == list(range(8)), outcomes[0].reason
    assert {outcome.process for outcome in outcomes} == {"forked"}


# The same, to the byte -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_case_has_the_same_figures_in_either() -> None:
    """Bytes of tensors, counts, the fingerprint and the losses of training are equal; resident memory is about so.

    Of QLoRA, which is LoRA and what bitsandbytes does.
    """
    import torch

    from peft_gauge.measure.passes import CaseSetup

    model, settings = models.resolve("toy-llama"), StepSettings(1, 8)
    case = Case(model, methods.QLORA, settings, "cpu", "float32")
    stream = torch.arange(BATCHES * settings.tokens) % model.vocab_size
    setup = CaseSetup(case, model, stream, ("memory", "fingerprint"), ((2, 8),))
    forked, spawned = fork("measure_and_train", setup, preload=PRELOAD), spawn("measure_and_train", setup)
    assert (forked.ended, forked.process) == ("done", "forked"), (forked.reason, forked.why_spawned)
    assert (spawned.ended, spawned.process) == ("done", "spawned"), spawned.reason
    assert forked.value["losses"] == spawned.value["losses"]
    ours, theirs = forked.value["metrics"], spawned.value["metrics"]
    for name in ("described", "counted", "gradients", "learned", "fingerprint"):
        assert ours[name] == theirs[name], name
    for name in ("naive_after_loading_bytes", "tensor_peak_bytes", "resident_bytes", "peak_by_category",
                 "resident_by_category", "phase_of_peak", "saved_activation_bytes_per_token", "shapes"):  # fmt: skip
        assert ours["memory"][name] == theirs["memory"][name], name
    # Pages of libraries are faulted in anew after a fork: without that it would lack 70 MB of them.
    rss, rss_of_new = ours["memory"]["rss_peak_bytes"], theirs["memory"]["rss_peak_bytes"]
    assert abs(rss - rss_of_new) < 16 * children.MIB


@pytest.mark.slow
@pytest.mark.timing
def test_it_costs_less_than_half_of_a_new_interpreter_with_the_same_imports() -> None:
    forked = [fork("import_what_is_measured_with", preload=PRELOAD) for _ in range(3)]
    assert {each.process for each in forked} == {"forked"}, forked[0].why_spawned
    spawned = spawn("import_what_is_measured_with")
    assert min(each.seconds for each in forked) < spawned.seconds / 2


# Where it is not safe ------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[[str], str]:
    """``module(source)``: the name of a module with that source, for a server to import."""

    def write(source: str) -> str:
        name = f"ahead_{abs(hash(request.node.nodeid))}"
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setitem(workers._AT_START, "PYTHONPATH", str(tmp_path))
        return name

    return write


THREAD = "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
PLANTED_TORCH = """
import sys
from types import SimpleNamespace
sys.modules["torch"] = SimpleNamespace(
    default_generator=SimpleNamespace(seed=int),
    cuda=SimpleNamespace(is_initialized=lambda: {initialized}, is_available=lambda: {available}))
sys.modules["peft_gauge._internals.torch"] = SimpleNamespace(in_bad_fork=lambda: {spoilt})
"""


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (THREAD, "2 threads run after importing the modules (python"),
        # pyarrow's allocator; the modules of measured cases are imported without its threads.
        ("import pyarrow", "(jemalloc_bg_thd), but a forked process keeps only one"),
        ("raise ValueError('not\\nhere')", "cannot be preloaded: ValueError: not here"),
        ("import a_library_that_is_not_there", "cannot be preloaded: ModuleNotFoundError: No module named"),
        ("print('a word'); import os; os._exit(7)", "exit code 7 while it imported its modules; last output: a word"),
        ("import os; os.kill(os.getpid(), 9)", "the fork server was killed by SIGKILL while it imported its modules"),
        (PLANTED_TORCH.format(initialized=True, available=True, spoilt=False), "the modules initialized CUDA"),
        (PLANTED_TORCH.format(initialized=False, available=True, spoilt=True), "the modules initialized CUDA"),
    ],
)  # fmt: skip
def test_a_process_is_spawned_that_cannot_be_forked(source: str, reason: str, module: Callable[[str], str]) -> None:
    preload = (module(source),)
    outcomes = [fork("give", number, preload=preload) for number in range(2)]
    assert [outcome.value for outcome in outcomes] == [0, 1]
    assert [outcome.process for outcome in outcomes] == ["spawned", "spawned"]
    assert reason in str(outcomes[0].why_spawned)
    assert outcomes[0].origin == {"process": "spawned", "why_spawned": outcomes[1].why_spawned}
    assert fork_server.pid_of(preload) is None


@pytest.mark.parametrize(
    "source",
    [
        PLANTED_TORCH.format(initialized=False, available=True, spoilt=False),
        # A look at a GPU that is not there, as any process takes that has a CUDA build of torch and no driver.
        PLANTED_TORCH.format(initialized=False, available=False, spoilt=True),
        # OpenBLAS starts threads when it is loaded, and ends them by itself before a fork.
        "import numpy",
        "import os; os.environ |= {'JE_ARROW_MALLOC_CONF': 'background_thread:false'}; import pyarrow",
    ],
)
def test_what_spoils_nothing_is_forked(source: str, module: Callable[[str], str]) -> None:
    outcome = fork("give", 1, preload=(module(source),))
    assert (outcome.value, outcome.process) == (1, "forked"), outcome.why_spawned


def test_imports_without_an_end_hold_nobody_up(module: Callable[[str], str]) -> None:
    preload = (module("import time; time.sleep(600)"),)
    outcome = fork("give", 1, preload=preload, limit_seconds=3.0)
    assert (outcome.value, outcome.process) == (1, "spawned")
    assert "had not imported its modules after 3 s" in str(outcome.why_spawned)
    assert outcome.seconds < 3.0, "its limit is its own"
    assert fork_server.pid_of(preload) is None


def test_other_variables_than_the_servers_are_for_a_new_interpreter() -> None:
    fork("give", 1)
    other = {**process_environment(), "OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": ""}
    outcome = fork("tell_about_the_process", environment=other)
    assert outcome.process == "spawned"
    assert outcome.why_spawned is not None
    assert outcome.why_spawned.endswith(": CUDA_VISIBLE_DEVICES, OMP_NUM_THREADS")
    assert outcome.value["environment"]["OMP_NUM_THREADS"] == "3"
    assert fork("give", 1).process == "forked"


def test_a_variable_that_is_gone_counts_too(module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    preload = (module(""),)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    assert fork("give", 1, preload=preload, environment={}).process == "forked"
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    outcome = fork("give", 1, preload=preload, environment={})
    assert str(outcome.why_spawned).endswith(": MALLOC_ARENA_MAX")


def test_which_test_runs_is_no_other_environment() -> None:
    outcome = fork("tell_about_the_process")
    assert outcome.process == "forked", outcome.why_spawned
    assert outcome.value["environment"]["PYTEST_CURRENT_TEST"] == os.environ["PYTEST_CURRENT_TEST"]


def test_other_cores_than_the_servers_are_for_a_new_interpreter() -> None:
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("there is one core")
    fork("give", 1)
    try:
        os.sched_setaffinity(0, {min(cores)})
        outcome = fork("give", 2)
    finally:
        os.sched_setaffinity(0, cores)
    assert (outcome.value, outcome.process) == (2, "spawned")
    assert "CPU cores" in str(outcome.why_spawned)


def test_another_interpreter_is_not_the_servers(tmp_path: Path) -> None:
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    outcome = isolation.run("os:getpid", limit_seconds=LIMIT_SECONDS, python=str(link), preload=())
    assert outcome.process == "spawned"
    assert "interpreter" in str(outcome.why_spawned)


def test_other_systems_spawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    outcome = fork("give", 1)
    assert (outcome.value, outcome.process) == (1, "spawned")
    assert "darwin" in str(outcome.why_spawned)


def test_where_it_works_nothing_of_cuda_is_there_before_and_one_thread_forks() -> None:
    """What is imported to measure leaves nothing behind that a fork would not survive."""
    value = fork("tell_what_a_fork_would_not_survive", preload=PRELOAD)
    assert value.process == "forked", value.why_spawned
    import torch

    # A CUDA build that has looked for a GPU calls the fork a bad one also where there is none to be spoilt.
    looked_in_vain = torch.version.cuda is not None and not torch.cuda.is_available()
    assert value.value == {"cuda_initialized": False, "in_bad_fork": value.value["in_bad_fork"] and looked_in_vain}
    assert len(list(Path(f"/proc/{server_pid(PRELOAD)}/task").iterdir())) == 1


def test_what_is_measured_with_is_imported_ahead_and_torchs_compiler_is_not() -> None:
    """bitsandbytes and PEFT import the compiler, which takes a second, unless they are imported by their helpers."""
    assert fork("name_what_is_imported", preload=PRELOAD).value == ["bitsandbytes", "peft", "torch._dynamo"]


@pytest.mark.slow
def test_beside_a_card_nothing_is_imported_that_looks_at_it() -> None:
    """bitsandbytes does when it is imported, and PEFT imports bitsandbytes."""
    assert spawn("import_beside_a_card").value == {"asked": [], "imported": ["torch._dynamo"]}


# Servers that end ----------------------------------------------------------------------------------------------------


def test_after_a_server_was_killed_there_is_a_new_one() -> None:
    fork("give", 1)
    before = server_pid()
    os.kill(before, signal.SIGKILL)
    outcome = fork("give", 2)
    assert (outcome.value, outcome.process) == (2, "forked"), outcome.why_spawned
    assert server_pid() != before


def test_a_child_goes_with_its_server(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(fork, "announce_and_hang", str(pid_file), {"phase": "step"})
        wait_until(pid_file.exists)
        os.kill(server_pid(), signal.SIGKILL)
        outcome = running.result(timeout=30)
    assert (outcome.ended, outcome.last) == ("crashed", {"phase": "step"})
    assert outcome.reason == "killed, because its fork server was killed"
    wait_until(lambda: is_dead(int(pid_file.read_text())))
    assert fork("give", 2).process == "forked"


PARENT = """
import json, os, sys
from peft_gauge.isolation import fork_server
from peft_gauge.isolation import Interrupted, run
preload, function, *arguments = json.loads(sys.argv[1])
run("tests.support.children:give", 1, limit_seconds=60, preload=[])
print(fork_server.pid_of(()), flush=True)
try:
    print(json.dumps(run(function, *arguments, limit_seconds=60, preload=preload).value))
except Interrupted as error:
    print(json.dumps(vars(error.outcome)))
"""


def start_parent(*task: Any) -> subprocess.Popen[str]:
    import json

    return subprocess.Popen(
        [sys.executable, "-c", PARENT, json.dumps(task)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
        preexec_fn=children.heed_ctrl_c,
    )


def line_of(parent: subprocess.Popen[str]) -> str:
    assert parent.stdout is not None
    return parent.stdout.readline()


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_server_and_child_go_with_their_parent(tmp_path: Path, by: signal.Signals) -> None:
    """Even a child that lets no thread of its own run, which could notice."""
    pid_file = tmp_path / "pid"
    with start_parent([], "tests.support.children:hang_in_native_code", {}, str(pid_file)) as parent:
        server = int(line_of(parent))
        wait_until(pid_file.exists)
        parent.send_signal(by)
    wait_until(lambda: is_dead(server) and is_dead(int(pid_file.read_text())))


def test_a_server_ends_with_its_parent() -> None:
    with start_parent([], "tests.support.children:give", 5) as parent:
        server = int(line_of(parent))
        assert line_of(parent) == "5\n"
        assert parent.wait(timeout=30) == 0
    wait_until(lambda: is_dead(server))


def test_ctrl_c_while_a_server_imports_is_an_interruption(module: Callable[[str], str], tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    name = module(
        f"from tests.support import children; children.write_pid({str(pid_file)!r}); children.time.sleep(600)"
    )
    with start_parent([name], "tests.support.children:give", 5) as parent:
        line_of(parent)
        wait_until(pid_file.exists)
        parent.send_signal(signal.SIGINT)
        assert '"reason": "interrupted before it began"' in line_of(parent)
    wait_until(lambda: is_dead(int(pid_file.read_text())))


def test_a_process_that_was_forked_itself_has_servers_of_its_own() -> None:
    code = """
import os, sys
from peft_gauge.isolation import fork_server
from peft_gauge.isolation import run
def parent_of():
    outcome = run("os:getppid", limit_seconds=60, preload=[])
    assert outcome.process == "forked", outcome.why_spawned
    return outcome.value
first = parent_of()
pid = os.fork()
if pid == 0:
    os._exit(0 if parent_of() != first else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert parent_of() == first
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
