"""Where pytest meets the instruments: options, parametrisation, recording, saving, summary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fixtures import hypothesis_profiles
from fixtures.selection import add_options, run_options, selected_cases, selected_device
from peft_gauge import machine
from peft_gauge.cases import Case
from peft_gauge.errors import GaugeError
from peft_gauge.history import schema
from peft_gauge.history.writing import write_run
from peft_gauge.report import plan_table, published_table, terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

pytest_plugins = ["pytester", "fixtures.jobs", "fixtures.timing", "fixtures.plans"]

# When this file is imported, Hypothesis has not yet read --hypothesis-profile, which can name one of these.
hypothesis_profiles.register()

CASES = pytest.StashKey[list[Case]]()
DEVICE = pytest.StashKey[str]()

FIGURES = "figures"  # the name of the user property in which a case's figures travel on its report


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(config), "peft-gauge-recorder")


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Settle what is to be run before any file is looked at: a mistake in the options is one line, not a traceback."""
    try:
        session.config.stash[CASES] = selected_cases(session.config)
        session.config.stash[DEVICE] = selected_device(session.config)
    except GaugeError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One instance of a test for each selected method and device; ids come from the data."""
    if "case" not in metafunc.fixturenames:
        return
    cases = metafunc.config.stash[CASES]
    marked = [pytest.param(case, id=case.id, marks=pytest.mark.gpu if case.device == "cuda" else ()) for case in cases]
    # In session scope pytest puts the questions to one case next to each other, and one job serves them all.
    metafunc.parametrize("case", marked, scope="session")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the cases of this machine's device, unless the user chose by marker; say why GPU cases cannot run."""
    device = config.stash[DEVICE]
    if "gpu" not in config.getoption("markexpr"):
        elsewhere = [item for item in items if _device_of(item) not in (None, device)]
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in elsewhere]
    if "slow" not in config.getoption("markexpr"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    reason = machine.why_no_cuda() if gpu_items else None
    if reason is not None:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))


def _device_of(item: pytest.Item) -> str | None:
    case = item.callspec.params.get("case") if isinstance(item, pytest.Function) and hasattr(item, "callspec") else None
    return case.device if isinstance(case, Case) else None


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
        self.cases.append(schema.CaseRecord(report.nodeid, question, report.outcome, _reason(report), figures))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        if not any(case.outcome == "passed" for case in self.cases):
            return
        if self.config.getoption("--no-save"):
            self.notes.append("not saved (--no-save)")
            return
        info = machine.machine_info()
        hook = self.config.hook
        run = hook.pytest_benchmark_generate_json(
            config=self.config,
            benchmarks=self.timings,
            include_data=True,  # the raw rounds: without them a later comparison has no intervals
            machine_info=info,
            commit_info=hook.pytest_benchmark_generate_commit_info(config=self.config),
        )
        for timed in run["benchmarks"]:
            # pytest-benchmark keeps the parameters as they are; a case is known by its id.
            timed["params"] = {name: getattr(value, "id", value) for name, value in (timed["params"] or {}).items()}
        run[schema.KEY] = schema.as_json(self.cases, self.claims, run_options(self.config))
        try:
            path = write_run(Path(self.config.getoption("--results")), info["name"], run)
        except GaugeError as error:
            self.notes.append(f"NOT SAVED: {error}")
            self._fail()
        else:
            self.notes.append(f"saved {path}")

    def _fail(self) -> None:
        session = self.config.pluginmanager.get_plugin("session")
        if session is not None and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.INTERNAL_ERROR

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.cases:
            width = terminalreporter._tw.fullwidth
            terminalreporter.write(terminal.summary(self.cases, self.claims, width))
            terminalreporter.write(plan_table.summary(self.cases, width))
            terminalreporter.write(published_table.published_table(self.cases, width))
        for note in self.notes:
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
    return str(crash.message if crash else report.longrepr).strip().splitlines()[0]
