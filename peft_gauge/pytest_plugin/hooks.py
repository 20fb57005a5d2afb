"""The pytest hooks of the suite; pytest loads this module as the plugin.

The options are checked before the session starts, so that an error in them is one line. Then cases become parameters of
tests, collection deselects slow cases and cases of another device and builds the session's `Workload`, and the
`Recorder` saves the results.
"""

from __future__ import annotations

import gc
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import pytest

from peft_gauge import machine
from peft_gauge.errors import GaugeError, file_errors, one_line
from peft_gauge.files import check_folder
from peft_gauge.history import store
from peft_gauge.history.reader import Run, read_run
from peft_gauge.history.resumption import Resumption, resumable
from peft_gauge.history.writer import commit_info
from peft_gauge.pytest_plugin.budget import BUDGET, Budget, budget_of, put_in_order
from peft_gauge.pytest_plugin.digest import Digest
from peft_gauge.pytest_plugin.options import FileDefaults, add_options, fill_in, run_options
from peft_gauge.pytest_plugin.progress import ProgressLine
from peft_gauge.pytest_plugin.recorder import BASELINE, RESUMPTION, Recorder
from peft_gauge.pytest_plugin.selection import (
    CASES,
    LeftOut,
    case_of,
    check_runs_on,
    deselect,
    selected_cases,
    selected_device,
    selected_variations,
)
from peft_gauge.pytest_plugin.shards import LEFT_TO_OTHERS, Shard, parts, shard_of
from peft_gauge.pytest_plugin.workers import automatic_workers, case_scheduling, check_workers, is_worker
from peft_gauge.pytest_plugin.workload import (
    TIMEKEEPERS,
    WORKLOAD,
    Workload,
    check_markers,
    is_split,
    is_untimed,
    passes_of,
    rank_beside_plans,
    start_imports,
    start_imports_of_all,
)
from peft_gauge.training import methods
from peft_gauge.training.cases import Case

# Their fixtures: `record` and `workload`.
pytest_plugins = ["peft_gauge.pytest_plugin.recorder", "peft_gauge.pytest_plugin.workload"]

VARIED_CASES = pytest.StashKey[list[Case]]()
DEVICE = pytest.StashKey[str]()
LEFT_OUT = pytest.StashKey[list[str]]()
EMPTY_SHARD = pytest.StashKey[str]()
FILE_DEFAULTS = "peft-gauge-file-defaults"
"""The name under which pytest keeps `FileDefaults` from before there is a config."""


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    defaults = FileDefaults.read()
    pluginmanager.register(defaults, FILE_DEFAULTS)
    add_options(parser, defaults.values)


def pytest_configure(config: pytest.Config) -> None:
    fill_in(config, _file_defaults(config).values)
    recorder = Recorder(config)
    config.pluginmanager.register(recorder, "peft-gauge-recorder")
    config.pluginmanager.register(Digest(config, recorder), "peft-gauge-digest")
    config.pluginmanager.register(ProgressLine(config), "peft-gauge-progress")
    if not config.getoption("--details"):
        config.option.benchmark_quiet = True  # of pytest-benchmark, which reads it after this


def _file_defaults(config: pytest.Config) -> FileDefaults:
    found = config.pluginmanager.get_plugin(FILE_DEFAULTS)
    assert isinstance(found, FileDefaults)
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Check the options before pytest prints or collects anything, so that an error in them is one line."""
    config = session.config
    try:
        with file_errors():
            if (invalid := _file_defaults(config).invalid) is not None:
                raise invalid
            config.stash[CASES] = selected_cases(config)
            config.stash[VARIED_CASES] = selected_variations(config)
            config.stash[DEVICE] = selected_device(config)
            check_runs_on(config, config.stash[DEVICE])
            check_workers(config, config.stash[DEVICE])
            shard_of(config)
            budget = budget_of(config)
            config.stash[RESUMPTION] = _resumption(config) if config.getoption("--resume") else None
            config.stash[BASELINE] = _baseline(config) if config.getoption("--compare") is not None else None
    except GaugeError as error:
        raise pytest.UsageError(str(error)) from error
    start_imports_of_all(config)
    if budget is not None:
        config.stash[BUDGET] = budget
        config.stash[TIMEKEEPERS] = (budget.took,)


def _resumption(config: pytest.Config) -> Resumption:
    return resumable(store.place(config.getoption("--results")), machine.machine_info(), run_options(config))


def _baseline(config: pytest.Config) -> Run | None:
    """The run that ``--compare`` names, read before the long measurement; ``None``: chosen by the new run's cases."""
    if config.getoption("--no-save"):
        raise GaugeError("--compare needs the saved run; drop --no-save")
    named = config.getoption("--compare")
    return read_run(store.place(named)) if named else None


def pytest_report_header(config: pytest.Config) -> str:
    """The device of a default run and, if that is the CPU, the reason."""
    reason = machine.why_no_cuda()
    return "peft-gauge: the default device is " + ("cuda" if reason is None else f"the CPU: {reason}")


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    return machine.machine_info()


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    """The suite's own commit; pytest-benchmark would run git in the current folder."""
    return commit_info()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n``, send all benchmarks of a case to one worker, unless the user chose another distribution."""
    return case_scheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """The number of workers for ``-n auto``; collection reports a device that is unavailable."""
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
    cases = metafunc.config.stash[VARIED_CASES if varies else CASES]
    marks = {"cuda": [pytest.mark.gpu], "cpu": [pytest.mark.slow] if slow_on_cpu else []}
    marked = [pytest.param(case, id=case.id, marks=marks[case.device]) for case in cases]
    # In session scope, pytest groups the benchmarks by case, and one job serves them all.
    metafunc.parametrize("case", marked, scope="session")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect cases by `LeftOut` in addition to -m and -k, and skip GPU cases with a reason without a GPU. The
    remaining tests are the session's workload."""
    for item in items:
        check_markers(item)
    device = config.stash[DEVICE]
    left_out = LeftOut(config, device)
    elsewhere = deselect(config, items, left_out.is_of_another_device)
    slow = deselect(config, items, left_out.is_slow)
    how = "--device" if config.getoption("--device") else "-m gpu selects them" if device == "cpu" else "--device=cpu"
    config.stash[LEFT_OUT] = [
        *([f'{slow} slow cases (-m "slow or not slow" includes them)'] if slow else []),
        *([f"{elsewhere} of {'cuda' if device == 'cpu' else 'the CPU'} ({how})"] if elsewhere else []),
    ]
    claims = Workload.of(items).claims  # those that other shards decide are not open here
    shard = shard_of(config)
    if shard is not None:
        _keep_shard(config, items, shard)
    resumption = config.stash[RESUMPTION]
    if resumption is not None:
        deselect(config, items, lambda item: item.nodeid in resumption.done)
    if is_worker():  # other workers' cases would disturb the timing
        alone = pytest.mark.skip(reason="timing cases cannot share the CPU with other workers; run without -n")
        for item in items:
            case = case_of(item)
            if case is not None and case.device == "cpu" and "speed" in passes_of(item):
                item.add_marker(alone)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    reason = machine.why_no_cuda() if gpu_items else None
    if reason is not None:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))
    for item in items:
        case = case_of(item)
        if case is not None and case.settings.grad_checkpointing:
            _skip_unless_checkpointed(item, case)
    items.sort(key=rank_beside_plans)
    workload = config.stash[WORKLOAD] = replace(Workload.of(items, split=is_split(config)), claims=claims)
    budget = config.stash.get(BUDGET, None)
    if budget is not None:
        put_in_order(config, budget, items, workload)


def _keep_shard(config: pytest.Config, items: list[pytest.Item], shard: Shard) -> None:
    """Deselect the tests of other shards. All selected tests are split, also those that ``--resume`` need
    not run again: a resumed shard is the same shard."""
    number = len(items)
    own = set(map(id, parts(items, shard.of)[shard.number - 1]))
    config.stash[LEFT_TO_OTHERS] = frozenset(item.nodeid for item in items if id(item) not in own)
    left = deselect(config, items, lambda item: id(item) not in own)
    if left and not items:
        config.stash[EMPTY_SHARD] = f"shard {shard} has no test: the {number} selected ones fill fewer shards than that"
    elif left:
        config.stash[LEFT_OUT].append(f"{left} of other shards (this is {shard})")


def _skip_unless_checkpointed(item: pytest.Item, case: Case) -> None:
    """Skip a method that cannot be trained with checkpointing, which a trainer may do by default."""
    try:
        methods.check_checkpointing(case.method)
    except GaugeError as error:
        item.add_marker(pytest.mark.skip(reason=f"{error} (--set gradient_checkpointing=false)"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    gc.freeze()  # modules and tests stay until the end; a collection need not go through them, which takes 0.3 s
    workload = session.config.stash.get(WORKLOAD, None)  # missing if pytest-xdist's workers collect
    if workload is not None and not session.config.option.collectonly:
        _check_results(session.config, workload)
        start_imports(session.config, workload)


def _check_results(config: pytest.Config, workload: Workload) -> None:
    """Refuse a folder in which the measured cases could not be saved, before they take their minutes."""
    if not workload.processes or config.getoption("--no-save") or is_worker():
        return
    folder = config.getoption("--results")
    try:
        if store.address_of(store.place(folder)) is None:
            check_folder(store.place(folder))
        else:
            store.check(store.place(folder))
    except GaugeError as error:
        raise pytest.UsageError(f"runs cannot be saved in {error}") from error
    except OSError as error:
        reason = f"runs cannot be saved in {one_line(folder, 120)}: {error.strerror}"
        raise pytest.UsageError(f"{reason}; choose another folder with --results, or add --no-save") from error


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """Lines on the cases deselected without an expression on the command line, and on the schedule of a
    budget."""
    left_out = config.stash.get(LEFT_OUT, [])
    budget: Budget | None = config.stash.get(BUDGET, None)
    lines = [f"peft-gauge: deselected {', '.join(left_out)}"] if left_out else []
    if EMPTY_SHARD in config.stash:
        return [*lines, f"peft-gauge: {config.stash[EMPTY_SHARD]}"]
    return lines if budget is None else [*lines, *budget.schedule()]


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure() -> None:
    """pytest now collects garbage five times, and Python as it ends, for three seconds with torch's modules."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that the budget has no time for. A test that is skipped anyway keeps its own reason."""
    budget: Budget | None = item.config.stash.get(BUDGET, None)
    reason = None if budget is None or item.get_closest_marker("skip") is not None else budget.why_not(item)
    if reason is not None:
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Run untimed tests on one thread: threads that wait for each other's turn on busy cores take many times as long.
    They do so even if nothing is planned, since the order of sums depends on the number of threads."""
    if not is_untimed(item):
        return (yield)
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return (yield)
    finally:
        torch.set_num_threads(threads)
