"""Where pytest meets the instruments: options, parametrisation, recording, saving, summary."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fixtures import hypothesis_profiles
from fixtures.budget import BUDGET, Budget, budget_of, put_in_order
from fixtures.cards import automatic_workers, case_scheduling, check_workers, is_worker
from fixtures.measured import LAST_WORDS, TIMEKEEPERS, check_markers, passes_of, prepare_processes
from fixtures.selection import (
    LeftOut,
    add_options,
    case_of,
    check_runs_on,
    deselect,
    run_options,
    selected_cases,
    selected_device,
    selected_variations,
    selection,
    unusable_adapters,
)
from peft_gauge import machine
from peft_gauge._internals.pytest import width_of
from peft_gauge.errors import GaugeError
from peft_gauge.history import schema
from peft_gauge.history.comparison import compare
from peft_gauge.history.reader import Run, read_run, runs_in
from peft_gauge.history.resumption import Resumption, merged, resumable
from peft_gauge.history.rules import read_rules
from peft_gauge.history.selection import newest_base
from peft_gauge.history.writer import bundled_commit, write_run
from peft_gauge.report.comparison import as_terminal
from peft_gauge.report.terminal import memory_table, plan_table, published_table, summary, sweep_table
from peft_gauge.training.cases import Case

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

pytest_plugins = [
    "pytester",
    "fixtures.measured",
    "fixtures.plans",
    "fixtures.replay",
    "fixtures.sweeps",
    "fixtures.verdicts",
    "fixtures.weights",
]

# When this file is imported, Hypothesis has not yet read --hypothesis-profile, which can name one of these.
hypothesis_profiles.register()

CASES = pytest.StashKey[list[Case]]()
VARIATIONS = pytest.StashKey[list[Case]]()
DEVICE = pytest.StashKey[str]()
RESUMPTION = pytest.StashKey[Resumption | None]()
BASELINE = pytest.StashKey[Run | None]()
LEFT_OUT = pytest.StashKey[list[str]]()

FIGURES = "figures"  # the name of the user property in which a case's figures travel on its report


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(config), "peft-gauge-recorder")


def pytest_report_header(config: pytest.Config) -> str:
    """Which device a bare run takes and, where that is the CPU, why; a wrong option is told of at collection."""
    reason = machine.why_no_cuda()
    return "peft-gauge: a bare run measures on " + ("cuda" if reason is None else f"the CPU: {reason}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Settle what is to be run before any file is looked at: a mistake in the options is one line, not a traceback."""
    config = session.config
    try:
        config.stash[CASES] = selected_cases(config)
        config.stash[VARIATIONS] = selected_variations(config)
        config.stash[DEVICE] = selected_device(config)
        check_runs_on(config, config.stash[DEVICE])
        check_workers(config, config.stash[DEVICE])
        budget = budget_of(config)
        config.stash[RESUMPTION] = _resumption(config) if config.getoption("--resume") else None
        config.stash[BASELINE] = _baseline(config) if config.getoption("--compare") is not None else None
    except GaugeError as error:
        raise pytest.UsageError(str(error)) from error
    if budget is not None:
        config.stash[BUDGET] = budget
        config.stash[TIMEKEEPERS] = (budget.took,)


def _resumption(config: pytest.Config) -> Resumption:
    return resumable(Path(config.getoption("--results")), machine.machine_info(), run_options(config))


def _baseline(config: pytest.Config) -> Run | None:
    """The run that ``--compare`` names, read before hours are spent; ``None`` where the new run's cases will choose."""
    if config.getoption("--no-save"):
        raise GaugeError("--compare reads this run as it was saved; drop --no-save")
    named = config.getoption("--compare")
    return read_run(Path(named)) if named else None


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any] | None:
    """In a checkout that came to a node in a bundle, the commit it was made of; else pytest-benchmark asks git."""
    return bundled_commit()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n``, all questions to a case go to one worker, unless the user chose another way to share them out."""
    return case_scheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """What ``-n auto`` is; a device that cannot be had is told of at collection."""
    try:
        return automatic_workers(selected_device(config))
    except GaugeError:
        return 1


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One instance of a test for each selected method and device; ids come from the data."""
    if "case" not in metafunc.fixturenames:
        return
    varies = metafunc.definition.get_closest_marker("variations") is not None
    slow_on_cpu = metafunc.definition.get_closest_marker("slow_on_cpu") is not None
    cases = metafunc.config.stash[VARIATIONS if varies else CASES]
    marks = {"cuda": [pytest.mark.gpu], "cpu": [pytest.mark.slow] if slow_on_cpu else []}
    marked = [pytest.param(case, id=case.id, marks=marks[case.device]) for case in cases]
    # In session scope pytest puts the questions to one case next to each other, and one job serves them all.
    metafunc.parametrize("case", marked, scope="session")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of what -m and -k have left, leave out what nobody asked for (`LeftOut`); say why GPU cases cannot run."""
    check_markers(items)
    device = config.stash[DEVICE]
    left_out = LeftOut(config, device)
    elsewhere = deselect(config, items, left_out.is_of_another_device)
    slow = deselect(config, items, left_out.is_slow)
    how = "--device" if config.getoption("--device") else "-m gpu takes them" if device == "cpu" else "--device=cpu"
    config.stash[LEFT_OUT] = [
        *([f'{slow} slow cases (-m "slow or not slow" takes them in)'] if slow else []),
        *([f"{elsewhere} of {'cuda' if device == 'cpu' else 'the CPU'} ({how})"] if elsewhere else []),
    ]
    resumption = config.stash[RESUMPTION]
    if resumption is not None:
        deselect(config, items, lambda item: item.nodeid in resumption.done)
    if is_worker():  # other workers' cases would take the time that is measured
        alone = pytest.mark.skip(reason="timing cases do not share this CPU (-n); run without -n")
        for item in items:
            case = case_of(item)
            if case is not None and case.device == "cpu" and "speed" in passes_of(item):
                item.add_marker(alone)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    reason = machine.why_no_cuda() if gpu_items else None
    if reason is not None:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))
    budget = config.stash.get(BUDGET, None)
    if budget is not None:
        put_in_order(config, budget, items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    if not session.config.option.collectonly:
        prepare_processes(session)


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """What was left out although no expression says so (a run of nothing else would be a riddle), and how a budget is
    to be spent."""
    left_out = config.stash.get(LEFT_OUT, [])
    budget: Budget | None = config.stash.get(BUDGET, None)
    lines = [f"peft-gauge: left out {', '.join(left_out)}"] if left_out else []
    return lines if budget is None else [*lines, *budget.schedule()]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what a budget has no time for. One that skips of itself does so by its own reason, which comes later."""
    budget: Budget | None = item.config.stash.get(BUDGET, None)
    reason = None if budget is None or item.get_closest_marker("skip") is not None else budget.why_not(item)
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``record(name=value, …)`` keeps figures with the case: in the saved run and in the summary."""

    def keep(**figures: Any) -> None:
        request.node.user_properties.append((FIGURES, figures))

    return keep


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    return machine.machine_info()


class Recorder:
    """Keeps what the benchmarks recorded, saves it, and shows the summary; calibration tests leave no record."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.cases: list[schema.CaseRecord] = []
        self.claims: list[dict[str, Any]] = []
        self.timings: list[Any] = []  # pytest-benchmark's own records, which its hook turns into JSON
        self.notes: list[str] = []
        self.deselected: set[str] | None = None  # what workers deselect, the session that saves is not told

    def pytest_collection_modifyitems(self) -> None:
        self.deselected = self.deselected or set()

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.deselected = (self.deselected or set()) | {item.nodeid for item in items}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        benchmark = getattr(item, "funcargs", {}).get("benchmark")
        if call.when == "call" and report.passed and benchmark is not None and benchmark.stats:
            # pytest-benchmark holds extra_info by reference, so it is changed, never replaced (pytest-benchmark#256).
            benchmark.extra_info.update(_figures(report))
            self.timings.append(benchmark.stats)
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        ended = report.when == "call" or not report.passed
        if not ended or not report.nodeid.startswith("benchmarks/"):
            return
        figures = _figures(report)
        claim = figures.pop("claim", None)
        if claim is not None:
            self.claims.append(claim)
        question = Path(report.nodeid.partition("::")[0]).stem
        # How a process of the case's own ended says more than that the test failed.
        outcome = figures.pop("ended", report.outcome)
        self.cases.append(schema.CaseRecord(report.nodeid, question, outcome, _reason(report), figures))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        interrupted: list[schema.CaseRecord] | None = self.config.stash.get(LAST_WORDS, None)
        self.cases += interrupted or []
        if CASES in self.config.stash and not is_worker():
            self._report_unusable_adapters()
        if is_worker() or all(case.outcome in ("skipped", "failed") for case in self.cases):
            return
        if self.config.getoption("--no-save"):
            self.notes.append("not saved (--no-save)")
            return
        info = machine.machine_info()
        run = self._run(info, interrupted=exitstatus == pytest.ExitCode.INTERRUPTED)
        try:
            path = write_run(Path(self.config.getoption("--results")), info["name"], run)
        except GaugeError as error:
            self.notes.append(f"NOT SAVED: {error}")
            self._fail()
        else:
            self.notes.append(f"saved {path}")
            if self.config.getoption("--compare") is not None:
                self._compare(path)

    def _report_unusable_adapters(self) -> None:
        """The other cases ran without them; the run is not what was asked for, and its exit code says so."""
        errors = unusable_adapters(self.config)
        self.notes += [f"ERROR: {error}" for error in errors]
        if errors:
            self._fail(pytest.ExitCode.USAGE_ERROR)

    def _compare(self, saved: Path) -> None:
        base, new = self.config.stash[BASELINE], read_run(saved)
        if base is None:
            earlier = runs_in(saved.parent)
            chosen = newest_base(earlier[: [path.name for path in earlier].index(saved.name)], new.cases)
            self.notes += chosen.passed_over
            if not chosen.runs:
                self.notes.append("not compared: no earlier run of this machine has cases in common")
                return
            (base,) = chosen.runs
        comparison = compare(base, new, read_rules(None))
        if comparison.incomparable is not None:
            self.notes.append(f"NOT COMPARED with {base.path.name}: {comparison.incomparable}")
        else:
            self.notes.append(as_terminal(comparison, width=shutil.get_terminal_size().columns))
        if comparison.exit_code() != 0:
            self._fail(pytest.ExitCode.TESTS_FAILED)

    def _run(self, info: dict[str, Any], *, interrupted: bool) -> dict[str, Any]:
        """The run in pytest-benchmark's format, with everything else under `schema.KEY`."""
        hook = self.config.hook
        run: dict[str, Any] = hook.pytest_benchmark_generate_json(
            config=self.config,
            benchmarks=self.timings,
            include_data=True,  # the raw rounds: without them a later comparison has no intervals
            machine_info=info,
            commit_info=hook.pytest_benchmark_generate_commit_info(config=self.config),
        )
        for timed in run["benchmarks"]:
            # pytest-benchmark keeps the parameters as they are; a case is known by its id.
            timed["params"] = {name: getattr(value, "id", value) for name, value in (timed["params"] or {}).items()}
        cases, claims = self.cases, self.claims
        resumption = self.config.stash.get(RESUMPTION, None)
        if resumption is not None:
            cases, claims, run["benchmarks"] = merged(resumption, cases, claims, run["benchmarks"])
            self.cases, self.claims = cases, claims  # the summary, too, is of the whole run
            self.notes += [f"passed over: {line}" for line in resumption.unreadable]
        run[schema.KEY] = schema.as_json(
            cases,
            claims,
            run_options(self.config),
            interrupted=interrupted,
            resumed_from=resumption.run.path.name if resumption is not None else None,
            selection=selection(self.config, self.deselected),
        )
        return run

    def _fail(self, code: pytest.ExitCode = pytest.ExitCode.INTERNAL_ERROR) -> None:
        session = self.config.pluginmanager.get_plugin("session")
        if session is not None and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = code

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.cases:
            width = width_of(terminalreporter)
            terminalreporter.write(summary.summary(self.cases, self.claims, width))
            terminalreporter.write(memory_table.summary(self.cases, width))
            terminalreporter.write(plan_table.summary(self.cases, width))
            terminalreporter.write(published_table.published_table(self.cases, width))
            terminalreporter.write(sweep_table.summary(self.cases, width))
        budget: Budget | None = self.config.stash.get(BUDGET, None)
        for note in [*([] if budget is None else [budget.ending()]), *self.notes]:
            terminalreporter.write_line(note)


def _figures(report: pytest.TestReport) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name, figures in report.user_properties:
        if name == FIGURES and isinstance(figures, dict):
            merged |= figures
    return merged


def _reason(report: pytest.TestReport) -> str | None:
    """One line: why a case was skipped or how it failed."""
    if report.passed:
        return None
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).strip().splitlines()[0].removeprefix("Failed: ")
