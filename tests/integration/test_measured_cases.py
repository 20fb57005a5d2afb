"""The suite as a user runs it: a case that dies, hangs or is interrupted is an outcome, and the run goes on with."""

from __future__ import annotations

import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from fixtures import measured
from peft_gauge import isolation
from peft_gauge.isolation import fork_server
from peft_gauge.measure import PRELOAD
from peft_gauge.plan.planner import plan
from peft_gauge.plan.record import GpuFit, Plan, PlanRequest
from peft_gauge.pytest_plugin.workload import Asked, Job, Workload, start_imports, start_imports_of_all
from peft_gauge.report.terminal.digest import LINES
from peft_gauge.training import methods, models
from peft_gauge.training.cases import Case
from peft_gauge.training.settings import StepSettings
from tests.support.children import heed_ctrl_c
from tests.support.facts import lacking
from tests.support.paths import ROOT
from tests.support.planted_cases import LAST, PLANNED_PEAK_BYTES, TENSOR_PEAK_BYTES, plan_of
from tests.support.suite import Suite, by_benchmark, environment, outcomes

TOO_LARGE_BYTES = 10**15


# One case measured, one that runs out of memory ----------------------------------------------------------------------

BENCHMARKS = ("test_peak", "test_phase", "test_step")


@dataclass(frozen=True)
class Ended:
    """A run that is over: its exit code, what it printed, what it saved, and what it started."""

    code: int
    output: str
    saved: dict[str, Any]
    started: Counter[str]


@pytest.fixture(scope="module")
def measured_run(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """LoRA is measured, full fine-tuning has no memory for its first update; both are asked three benchmarks."""
    suite = Suite(tmp_path_factory.mktemp("measured"))
    done = suite.run(
        "benchmarks/test_memory.py",
        "benchmarks/test_speed.py",
        "--method=full,lora",
        "--rounds=3",
        "-k=peak or step or backward",
        planted={"full": "run_out_of_memory"},
    )
    return Ended(done.returncode, done.stdout + done.stderr, suite.saved(), suite.started())


def test_out_of_memory_is_an_outcome_and_the_other_case_is_measured(measured_run: Ended) -> None:
    assert measured_run.code == pytest.ExitCode.TESTS_FAILED, measured_run.output
    expected = {f"{benchmark} full": "out-of-memory" for benchmark in BENCHMARKS}
    assert outcomes(measured_run.saved) == {**expected, **{f"{benchmark} lora": "passed" for benchmark in BENCHMARKS}}
    assert measured_run.saved["peft_gauge"]["interrupted"] is False


def test_what_was_known_of_the_dead_stands_with_its_plan(measured_run: Ended) -> None:
    case = by_benchmark(measured_run.saved)["test_peak full"]
    assert case["reason"].startswith("out-of-memory: OutOfMemoryError: known by its class")
    assert case["metrics"]["last_known"]["phase"] == "warm-up"
    assert case["metrics"]["last_known"]["rss_peak_bytes"] > 50e6  # python and torch alone take more
    planned = case["metrics"]["planned_peak_bytes"]
    assert 1e6 < planned < 3e6  # parameters, gradients and AdamW's state of 106,816 float32 weights: 1.7 MB
    assert case["metrics"]["planned_device_bytes"] > planned
    assert "tensor_peak_bytes" not in case["metrics"]


def test_a_further_benchmark_costs_no_further_process(measured_run: Ended) -> None:
    assert measured_run.started == {"full": 1, "lora": 1}
    cases = by_benchmark(measured_run.saved)
    assert len({cases[f"{benchmark} lora"]["metrics"]["process_seconds"] for benchmark in BENCHMARKS}) == 1
    assert cases["test_peak lora"]["metrics"]["besides_seconds"] > 0


def test_a_case_says_how_its_process_came_to_be(measured_run: Ended) -> None:
    metrics = by_benchmark(measured_run.saved)["test_peak lora"]["metrics"]
    assert metrics["process"] == "forked", metrics["why_spawned"]


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The modules of each server that was asked to begin its imports."""
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(fork_server, "prepare", lambda preload, environment: asked.append(preload))
    return asked


@pytest.mark.parametrize(("times", "preload"), [(1, PRELOAD), (5, None)])
def test_processes_that_are_held_against_each_other_are_new_interpreters(
    times: int, preload: Any, monkeypatch: pytest.MonkeyPatch, prepared: list[tuple[str, ...]]
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(isolation, "run", lambda function, setup, **options: given.append(options["preload"]))
    options = {"--processes": times, "--time-limit": 9.0, "--budget": None}
    config: Any = SimpleNamespace(getoption=options.__getitem__)
    job = Job(case_on("cpu"))
    found = Workload({job: Asked(job, (), ())}, {}, (), frozenset())
    measured.Measurements(config, found, None)._in_process(None)  # type: ignore[arg-type]
    assert given == [preload]
    start_imports(config, found)
    assert prepared == ([preload] if preload else [])


def test_nothing_is_imported_for_a_session_that_measures_nothing(prepared: list[tuple[str, ...]]) -> None:
    options = {"--processes": 1, "--budget": None}
    start_imports(SimpleNamespace(getoption=options.__getitem__), Workload.of([]))  # type: ignore[arg-type]
    assert prepared == []


@pytest.mark.parametrize(
    ("changed", "starts"),
    [
        ({}, True),
        ({"args": ["/a/checkout/benchmarks/"]}, True),
        ({"args": ["benchmarks/test_speed.py"]}, False),
        ({"args": ["tests"]}, False),
        ({"keyword": "lora"}, False),
        ({"collectonly": True}, False),
        ({"numprocesses": 2}, False),
        ({"--processes": 5}, False),
    ],
)
def test_a_bare_run_imports_before_it_collects(
    changed: dict[str, Any], starts: bool, prepared: list[tuple[str, ...]]
) -> None:
    given = {"args": ["benchmarks"], "keyword": "", "collectonly": False, "--processes": 1, **changed}
    config = SimpleNamespace(
        args=given["args"],
        option=SimpleNamespace(**given),
        getoption=lambda name, default=None: given.get(name, default),
    )
    start_imports_of_all(config)  # type: ignore[arg-type]
    assert prepared == ([PRELOAD] if starts else [])


def test_the_rounds_of_the_process_are_those_of_the_benchmark(measured_run: Ended) -> None:
    step = by_benchmark(measured_run.saved)["test_step lora"]["metrics"]
    (timed,) = [entry for entry in measured_run.saved["benchmarks"] if entry["name"].startswith("test_step[lora")]
    assert step["sampled_seconds"]["step_seconds"] == [timed["stats"]["data"]]
    assert len(timed["stats"]["data"]) == 3
    assert step["step_seconds"] == timed["stats"]["median"]


def test_the_run_says_what_it_was_asked_for(measured_run: Ended) -> None:
    asked = measured_run.saved["peft_gauge"]["selection"]
    assert asked["args"] == ["benchmarks/test_memory.py", "benchmarks/test_speed.py"]
    assert (asked["markers"], asked["keywords"]) == ("", "peak or step or backward")
    left_out = set(asked["deselected"])
    assert "benchmarks/test_speed.py::test_phase[lora-toy-llama-cpu-forward]" in left_out  # by -k
    assert "benchmarks/test_memory.py::test_growth[lora-toy-llama-cpu]" in left_out  # slow
    assert "benchmarks/test_memory.py::test_peak[lora-toy-llama-cuda]" in left_out  # of another device
    assert not left_out & {case["id"] for case in measured_run.saved["peft_gauge"]["cases"]}


# All other ends, Ctrl-C, and going on --------------------------------------------------------------------------------

ENDS = {"lora": "give", "full": "be_killed", "ia3": "break_the_device", "bottleneck": "hang", "prefix": "give"}
METHODS = "--method=lora,full,ia3,prompt,bottleneck,prefix"
PEAKS = {"prompt": TOO_LARGE_BYTES}
MEMORY = "benchmarks/test_memory.py"


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return Suite(tmp_path_factory.mktemp("planted"))


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def interrupted(suite: Suite) -> Ended:
    """Ctrl-C while the fifth of six cases is measured."""
    process = subprocess.Popen(
        suite.command(MEMORY, METHODS, planted=ENDS, plans=PEAKS),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )
    with process:
        try:
            wait_until((suite.folder / "started" / "hanging").exists, process)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    return Ended(process.returncode, output, suite.saved(1), suite.started())


def test_an_interrupted_run_is_saved(interrupted: Ended, suite: Suite) -> None:
    assert interrupted.code == pytest.ExitCode.INTERRUPTED, interrupted.output
    assert interrupted.saved["peft_gauge"]["interrupted"] is True
    assert outcomes(interrupted.saved) == {
        "test_peak lora": "passed",
        "test_peak full": "crashed",
        "test_peak ia3": "crashed",
        "test_peak prompt": "skipped",
        "test_peak bottleneck": "interrupted",
    }
    assert interrupted.started == {"lora": 1, "full": 1, "ia3": 1, "bottleneck": 1}
    assert not psutil.pid_exists(int((suite.folder / "started" / "hanging").read_text()))


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("full", "crashed: killed by SIGKILL (not by its parent; usually the kernel's out-of-memory killer: "),
        ("ia3", "crashed: RuntimeError: CUDA error: an illegal memory access was encountered at planted_cases.py:"),
    ],
)
def test_a_crash_keeps_its_reason_and_the_last_known_figures(interrupted: Ended, method: str, reason: str) -> None:
    case = by_benchmark(interrupted.saved)[f"test_peak {method}"]
    assert case["reason"].startswith(reason)
    assert case["metrics"]["last_known"].items() >= LAST.items()
    assert case["metrics"]["planned_peak_bytes"] == PLANNED_PEAK_BYTES
    assert case["metrics"]["planned_device_bytes"] == 3 * PLANNED_PEAK_BYTES


def test_an_interrupted_run_ends_with_the_command_that_continues_it(interrupted: Ended) -> None:
    last = [line for line in interrupted.output.splitlines() if line.strip()][-1]
    assert last == "interrupted; to continue, repeat the command with --resume"  # the command itself is too long


def test_the_digest_has_failures_and_skips_with_their_reasons(interrupted: Ended) -> None:
    digest = " ".join(" ".join(interrupted.output.splitlines()[-LINES:]).split())
    assert lacking(digest, "crashed: test_memory.py::test_peak[full-toy-llama-cpu]: crashed: killed by SIGKILL") == []
    assert lacking(digest, "1 skipped: does not fit: planned 1000000.00 GB", "saved ") == []


def test_the_interrupted_case_keeps_what_was_known(interrupted: Ended) -> None:
    case = by_benchmark(interrupted.saved)["test_peak bottleneck"]
    assert case["reason"].startswith("interrupted after ")
    assert case["benchmark"] == "test_memory"
    assert case["metrics"]["last_known"] == LAST
    assert case["metrics"]["method"] == "bottleneck"


def test_a_case_that_cannot_fit_is_skipped_with_plan_and_room(interrupted: Ended) -> None:
    reason = by_benchmark(interrupted.saved)["test_peak prompt"]["reason"]
    assert reason.startswith("does not fit: planned 1000000.00 GB with ")
    assert "GB of host memory free (headroom -999" in reason
    assert "use a smaller model, --batch or --seq" in reason


@pytest.fixture(scope="module")
def resumed(interrupted: Ended, suite: Suite) -> Ended:
    """The same run gone on with: what had crashed goes well now, what hung hangs on, until its time is up."""
    ends = {**ENDS, "full": "give", "ia3": "give"}
    done = suite.run(MEMORY, METHODS, "--resume", "--compare", "--time-limit=5", planted=ends, plans=PEAKS)
    return Ended(done.returncode, done.stdout + done.stderr, suite.saved(2), suite.started() - interrupted.started)


def test_only_what_is_missing_runs_again(resumed: Ended) -> None:
    assert resumed.code == pytest.ExitCode.TESTS_FAILED, resumed.output
    assert resumed.started == {"full": 1, "ia3": 1, "bottleneck": 1, "prefix": 1}


def test_the_resumed_run_holds_every_case_once(resumed: Ended) -> None:
    assert outcomes(resumed.saved) == {
        "test_peak lora": "passed",
        "test_peak full": "passed",
        "test_peak ia3": "passed",
        "test_peak prompt": "skipped",
        "test_peak bottleneck": "timed-out",
        "test_peak prefix": "passed",
    }
    assert resumed.saved["peft_gauge"]["interrupted"] is False
    assert resumed.saved["peft_gauge"]["resumed_from"].startswith("0001_")
    digest = resumed.output.splitlines()[-LINES:]
    shown = [line.split()[0] for line in digest if line.startswith("  ") and line.endswith(" %")]
    assert sorted(shown) == ["full", "ia3", "lora", "prefix"]


def test_a_hang_is_ended_and_keeps_the_last_known_figures(resumed: Ended) -> None:
    case = by_benchmark(resumed.saved)["test_peak bottleneck"]
    assert case["reason"] == "timed-out: did not end within 5 s; last seen in phase step"
    assert case["metrics"]["last_known"] == LAST
    assert case["metrics"]["planned_peak_bytes"] == PLANNED_PEAK_BYTES


def test_it_is_compared_with_the_interrupted_run_and_says_so(resumed: Ended) -> None:
    """``--compare`` takes the newest run with cases in common: here the one that was gone on with."""
    told = " ".join(resumed.output.partition(" against ")[2].split())
    assert "0001_" in told
    assert "note: BASE was interrupted" in told
    assert "test_memory.py::test_peak[prefix-toy-llama-cpu] – → passed BASE was interrupted before it" in told
    assert "MISSING" not in told
    assert "settings" not in told
    assert "1 worse, 0 inconclusive, 2 better," in told  # what had crashed goes well now; the hang has timed out


def test_a_run_with_other_options_is_not_gone_on_with(resumed: Ended, suite: Suite) -> None:
    before = suite.started()
    done = suite.run(MEMORY, METHODS, "--resume", "--seed=1", planted=ENDS, plans=PEAKS)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("ERROR: nothing to resume: the last run (0002_")
    assert "had --seed 0, now 1; run without --resume" in line
    assert suite.started() == before


# Several workers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Two workers for three cases, each with a benchmark to its memory and one to its times."""
    pytest.importorskip("xdist")
    suite = Suite(tmp_path_factory.mktemp("shared"))
    ends = {"lora": "give", "full": "be_killed", "ia3": "give"}
    files = (MEMORY, "benchmarks/test_speed.py")
    done = suite.run(*files, "--method=lora,full,ia3", "-k=peak or step", "-n2", "--rounds=3", planted=ends, plans={})
    return Ended(done.returncode, done.stdout + done.stderr, suite.saved(), suite.started())


@pytest.mark.slow
def test_workers_share_the_cases_and_the_run_is_saved_once(shared_run: Ended) -> None:
    assert shared_run.code == pytest.ExitCode.TESTS_FAILED, shared_run.output
    assert shared_run.started == {"lora": 1, "full": 1, "ia3": 1}
    assert shared_run.saved["peft_gauge"]["selection"]["deselected"] is None  # it is the workers that collect
    cases = by_benchmark(shared_run.saved)
    assert {name: case["outcome"] for name, case in cases.items() if name.startswith("test_peak")} == {
        "test_peak lora": "passed",
        "test_peak full": "crashed",
        "test_peak ia3": "passed",
    }
    assert cases["test_peak ia3"]["metrics"]["tensor_peak_bytes"] == TENSOR_PEAK_BYTES
    assert cases["test_peak full"]["metrics"]["last_known"].items() >= LAST.items()


@pytest.mark.slow
def test_workers_do_not_time_on_a_cpu_that_they_share(shared_run: Ended) -> None:
    for method in ("lora", "full", "ia3"):
        case = by_benchmark(shared_run.saved)[f"test_step {method}"]
        assert case["outcome"] == "skipped"
        assert case["reason"] == "timing cases cannot share the CPU with other workers; run without -n"
    assert shared_run.saved["benchmarks"] == []


# What cannot fit -----------------------------------------------------------------------------------------------------


def case_on(device: str) -> Case:
    return Case(models.resolve("toy-llama"), methods.get("lora"), StepSettings(1, 8), device, "float32")


def request_of(case: Case) -> PlanRequest:
    return PlanRequest(case.model, case.method, case.settings, dtype=case.dtype)


def why_skipped(case: Case, plan: Plan) -> str | None:
    try:
        measured._skip_what_cannot_fit(case, plan)
    except pytest.skip.Exception as skipped:
        return str(skipped)
    return None


def test_the_hosts_free_memory_decides_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_on("cpu")
    plan = plan_of(request_of(case), 12_340_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=12_340_000_000))
    assert why_skipped(case, plan) is None
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=12_339_999_999))
    assert why_skipped(case, plan) is not None
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000_000_000))
    assert why_skipped(case, plan) == (
        "does not fit: planned 12.34 GB with 10.00 GB of host memory free (headroom -2.34 GB); "
        "use a smaller model, --batch or --seq"
    )


def test_the_card_decides_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    case = case_on("cuda")
    fit = GpuFit("10000000000", 9_500_000_000, 12_340_000_000, False, -2_840_000_000, 0)
    plan = replace(plan_of(request_of(case)), gpus=(fit,))
    assert why_skipped(case, plan) == (
        "does not fit: planned 12.34 GB on a GPU with 9.50 GB (headroom -2.84 GB); "
        "use a smaller model, --batch or --seq"
    )
    assert why_skipped(case, replace(plan, gpus=(replace(fit, fits=True, headroom_bytes=1),))) is None
    assert why_skipped(case, replace(plan, gpus=())) is None


def test_a_library_that_cannot_work_here_is_a_skip_and_a_case_that_does_not_fit_is_not(tmp_path: Path) -> None:
    suite = Suite(tmp_path)
    done = suite.run(
        "benchmarks/test_memory.py",
        "--method=full,lora,qlora",
        planted={"qlora": "lack_a_library", "lora": "fit_nothing", "full": "give"},
        plans={},
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    cases = by_benchmark(suite.saved())
    assert {name: case["outcome"] for name, case in cases.items()} == {
        "test_peak full": "passed",
        "test_peak lora": "failed",
        "test_peak qlora": "skipped",
    }
    assert cases["test_peak qlora"]["reason"] == "bitsandbytes has no kernels for this torch's CUDA"
    assert cases["test_peak lora"]["reason"] == "the adapter does not fit the model"


@pytest.mark.slow  # tests/unit/training/test_trainer_job.py measures such a step every time
def test_a_trainers_step_is_measured_and_planned(tmp_path: Path) -> None:
    suite = Suite(tmp_path)
    done = suite.run(
        MEMORY,
        "-k=peak",
        "--method=ia3,prefix",
        "--loop=sft",
        "--set=per_device_train_batch_size=2",
        "--set=gradient_checkpointing_kwargs={use_reentrant: true}",
        planted={},
    )
    assert done.returncode == 0, done.stdout
    cases = by_benchmark(suite.saved())
    metrics = cases["test_peak ia3-checkpointing"]["metrics"]
    settings = metrics["settings"]
    assert (settings["loop"], settings["batch"], settings["grad_checkpointing"]) == ("sft", 2, True)
    assert settings["trainer_arguments"] == {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    assert metrics["tensor_peak_bytes"] == pytest.approx(metrics["planned_peak_bytes"], rel=0.25)  # a CPU's kernels
    assert suite.saved()["peft_gauge"]["options"]["loop"] == "sft"
    skipped = cases["test_peak prefix-checkpointing"]
    assert skipped["outcome"] == "skipped"
    assert "gradient_checkpointing=false" in skipped["reason"]


@pytest.mark.slow
def test_the_attention_that_is_asked_for_is_measured_and_planned(tmp_path: Path) -> None:
    suite = Suite(tmp_path)
    done = suite.run(MEMORY, "-k=peak", "--method=ia3", "--attention=eager", "--dtype=bfloat16", planted={})
    assert done.returncode == 0, done.stdout
    metrics = by_benchmark(suite.saved())["test_peak ia3"]["metrics"]
    assert metrics["settings"]["attention"] == "eager"
    assert suite.saved()["peft_gauge"]["options"]["attention"] == "eager"
    # In float32 a GPU has no fused kernel for shared key-value heads, and both are written out.
    case = replace(case_on("cpu"), method=methods.IA3, settings=StepSettings(1, 64), dtype="bfloat16")
    sdpa, eager = (
        plan(replace(request_of(case), attention=name)).saved_activation_bytes_per_token for name in ("sdpa", "eager")
    )
    assert metrics["planned_saved_activation_bytes_per_token"] == eager > sdpa, "eager keeps the scores"
