"""Record the results of benchmarks, save the run, compare it for ``--compare``, and print the summary."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from peft_gauge import machine
from peft_gauge._internals.pytest import width_of
from peft_gauge.errors import GaugeError
from peft_gauge.history import schema, store
from peft_gauge.history.comparison import compare
from peft_gauge.history.reader import Run, read_run, runs_in
from peft_gauge.history.resumption import Resumption, merged
from peft_gauge.history.rules import read_rules
from peft_gauge.history.selection import newest_base
from peft_gauge.history.writer import write_run
from peft_gauge.pytest_plugin.options import run_options, selection
from peft_gauge.pytest_plugin.selection import CASES, unusable_adapters
from peft_gauge.pytest_plugin.shards import record_of
from peft_gauge.pytest_plugin.workers import is_worker
from peft_gauge.report.comparison import as_terminal, counts
from peft_gauge.report.terminal import memory_table, plan_table, published_table, ranks_table, summary, sweep_table

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

RESUMPTION = pytest.StashKey[Resumption | None]()
"""The earlier run that ``--resume`` continues."""
BASELINE = pytest.StashKey[Run | None]()
"""The run that ``--compare`` names; ``None``: chosen by the new run's cases."""
LAST_WORDS = pytest.StashKey[list[schema.CaseRecord]]()
"""Cases that were interrupted while they were measured; pytest itself does not report them."""

METRICS = "metrics"  # the user property with a case's metrics in its test report


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``record(name=value, …)`` adds metrics to the case, for the saved run and the summary."""

    def keep(**metrics: Any) -> None:
        request.node.user_properties.append((METRICS, metrics))

    return keep


class Recorder:
    """Collects the benchmarks' records, saves them, and prints the summary; calibration tests leave no record."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.cases: list[schema.CaseRecord] = []
        self.claims: list[dict[str, Any]] = []
        self.timings: list[Any] = []  # pytest-benchmark's own records, which its hook turns into JSON
        self.notes: list[str] = []
        self.comparison: str | None = None  # the whole one, as text
        self.saved: Path | None = None
        self.deselected: set[str] | None = None  # unknown if workers deselect

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
            benchmark.extra_info.update(_metrics(report))
            self.timings.append(benchmark.stats)
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        ended = report.when == "call" or not report.passed
        if not ended or not report.nodeid.startswith("benchmarks/"):
            return
        metrics = _metrics(report)
        claim = metrics.pop("claim", None)
        if claim is not None:
            self.claims.append(claim)
        benchmark = Path(report.nodeid.partition("::")[0]).stem
        # The outcome of the case's own process is more specific than the test's.
        outcome = metrics.pop("ended", report.outcome)
        self.cases.append(schema.CaseRecord(report.nodeid, benchmark, outcome, _reason(report), metrics))

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
            path = write_run(store.place(self.config.getoption("--results")), info["name"], run)
        except GaugeError as error:
            self.notes.append(f"NOT SAVED: {error}")
            self._fail()
        else:
            self.saved = path
            if self.config.getoption("--compare") is not None:
                self._compare(path)

    def _report_unusable_adapters(self) -> None:
        """Report adapters that could not be used: the other cases ran, but the exit code is an error."""
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
            self.comparison = as_terminal(comparison, width=shutil.get_terminal_size().columns)
            self.notes.append(f"compared with {base.path.name}: {counts(comparison)}")
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
            # pytest-benchmark stores parameter objects; save a case by its id.
            timed["params"] = {name: getattr(value, "id", value) for name, value in (timed["params"] or {}).items()}
        cases, claims = self.cases, self.claims
        resumption = self.config.stash.get(RESUMPTION, None)
        if resumption is not None:
            cases, claims, run["benchmarks"] = merged(resumption, cases, claims, run["benchmarks"])
            self.cases, self.claims = cases, claims  # the summary shows the whole run too
            self.notes += [f"passed over: {line}" for line in resumption.unreadable]
        run[schema.KEY] = schema.as_json(
            cases,
            claims,
            run_options(self.config),
            interrupted=interrupted,
            resumed_from=resumption.run.path.name if resumption is not None else None,
            selection=self._selection(),
        )
        return run

    def _selection(self) -> schema.Selection:
        shards = record_of(self.config)
        left_out = frozenset() if shards is None else shards.left_out or frozenset()
        return selection(self.config, None if self.deselected is None else self.deselected - left_out, shards)

    def _fail(self, code: pytest.ExitCode = pytest.ExitCode.INTERNAL_ERROR) -> None:
        session = self.config.pluginmanager.get_plugin("session")
        if session is not None and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = code

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """All tables, with ``--details``; the comparison of ``--compare``. The digest is the last of a session
        (`Digest`)."""
        details = self.config.getoption("--details")
        if self.cases and details:
            width = width_of(terminalreporter)
            terminalreporter.write(summary.summary(self.cases, self.claims, width))
            terminalreporter.write(memory_table.summary(self.cases, width))
            terminalreporter.write(ranks_table.summary(self.cases, width))
            terminalreporter.write(plan_table.summary(self.cases, width))
            terminalreporter.write(published_table.published_table(self.cases, width))
            terminalreporter.write(sweep_table.summary(self.cases, width))
        if self.comparison is not None:
            terminalreporter.write(self.comparison)
        if self.cases and not details and not any(arg.startswith("-r") for arg in self.config.invocation_params.args):
            # The digest has skips by reason.
            terminalreporter.reportchars = terminalreporter.reportchars.replace("s", "")


def _metrics(report: pytest.TestReport) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name, metrics in report.user_properties:
        if name == METRICS and isinstance(metrics, dict):
            merged |= metrics
    return merged


def _reason(report: pytest.TestReport) -> str | None:
    """The reason in one line why a case was skipped or failed."""
    if report.passed:
        return None
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).strip().splitlines()[0].removeprefix("Failed: ")
