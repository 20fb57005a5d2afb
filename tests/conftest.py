"""What several calibration tests need."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator

import pytest

from peft_gauge import cli
from peft_gauge.isolation import child_environment
from peft_gauge.measure import PRELOAD
from peft_gauge.plan import worker
from peft_gauge.pytest_plugin import workers
from tests.support import chromium, suite
from tests.support.paths import TESTS

Run = Callable[..., tuple[int, str, str]]

# Workers of pytest-xdist share the cores, and so does what their tests start: threads that wait for each other's core
# take many times as long as one. As if the run had been started with the variable (`workers.process_environment`).
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    THREADS = max(1, (os.cpu_count() or 1) // WORKERS)
    for environment in (os.environ, workers._AT_START):
        environment.setdefault("OMP_NUM_THREADS", str(THREADS))
    if "torch" in sys.modules:  # it has read the variable
        sys.modules["torch"].set_num_threads(THREADS)
    from peft_gauge.training.quantization import import_peft

    import_peft()  # before a test module does, which would take a second longer


gc.disable()  # until the tests are collected: what is imported and collected makes no garbage


@pytest.hookimpl(trylast=True)  # after the plugin is there
def pytest_configure(config: pytest.Config) -> None:
    """Do without pytest's capture of logging, which takes 2 ms a test and which no test uses, unless an option asks for
    it."""
    asked = any(config.getoption(name, None) for name in ("log_level", "log_cli_level", "log_file", "log_file_level"))
    plugin = config.pluginmanager.get_plugin("logging-plugin")
    if plugin is not None and not asked:
        config.pluginmanager.unregister(plugin)


WAITING = {"test_fork_server.py": "unit/c", "test_isolation.py": "unit/m"}
"""Files that wait for processes most of their time, and the place in the order of paths at which they come: among unit
tests, which leave no core idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test is a unit test, or of integration, by where it stands; one of a unit that takes seconds says so itself."""
    if all(item.path.is_relative_to(TESTS) for item in items):
        items.sort(key=lambda item: WAITING.get(item.path.name, item.path.relative_to(TESTS).as_posix()))
    for item in items:
        if item.path.is_relative_to(TESTS / "integration"):
            item.add_marker(pytest.mark.integration)
        elif item.path.is_relative_to(TESTS / "unit") and item.get_closest_marker("integration") is None:
            item.add_marker(pytest.mark.unit)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    try:
        return (yield)
    finally:
        gc.enable()


MANY_MODULES = 100
frozen_modules = 0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Modules stay until the end, torch's and transformers' above all: the collector need not go through them again
    each time that memory is measured, which is most of the time of a test of a small model."""
    global frozen_modules
    if len(sys.modules) > frozen_modules + MANY_MODULES:
        frozen_modules = len(sys.modules)
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None:
    suite.SESSIONS.close()


@pytest.fixture(scope="session", autouse=True)
def no_worker() -> Iterator[None]:
    """A run that a test starts is no worker of ``pytest tests -n 4``, but would read in the environment that it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_calibration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Plans of tests are the same everywhere, also where the user has calibrated a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFT_GAUGE_CALIBRATIONS", str(tmp_path_factory.getbasetemp() / "no-calibrations"))
        yield


@pytest.fixture(autouse=True)
def levels_stay() -> Iterator[None]:
    """What plans and measures quietens the libraries, which is meant for a process of its own."""
    loggers = [logging.getLogger(name) for name in ("bitsandbytes", "transformers", "peft")]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        if logger.level != level:  # each call goes through all loggers
            logger.setLevel(level)


@pytest.fixture
def forked_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that plan are forked from this process's server; to spawn one takes 7 s of imports each time."""
    preloaded = worker.Preloaded(PRELOAD, child_environment(workers.process_environment()))
    monkeypatch.setattr(worker, "_spawn", lambda: worker._fork(preloaded))


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run_command("plan", …)`` runs ``peft-gauge plan …`` here: exit code, standard output, standard error."""

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["peft-gauge", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, captured.out, captured.err

    return command


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Chromium]:
    """A Chromium without a window."""
    path = chromium.find()
    if path is None:
        pytest.skip("no Chromium on the path; PEFT_GAUGE_CHROMIUM names one")
    opened = chromium.Chromium(path, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()
