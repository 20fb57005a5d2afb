"""Run pytest on the suite from any folder: the suite of the checkout, or the copy in an installed wheel."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from peft_gauge import paths
from peft_gauge.errors import GaugeError
from peft_gauge.pytest_plugin.digest import TYPED

BENCHMARKS = "benchmarks"

INTERRUPTED = 128 + 2
"""The exit code after Ctrl-C, as from a shell: pytest's code for it, 2, means bad input here."""


def bench(arguments: Sequence[str]) -> int:
    """Run the suite with pytest's ``arguments``; paths in them are looked up in the suite first, then in the current
    folder.

    Options that name a file or folder (``--results``, ``--model``, …) are relative to the current folder.

    Returns: 0 if everything passed, 1 if a benchmark failed or regressed, 2 if an adapter could not be used, 3 for an
    error in collection or within pytest, `INTERRUPTED` after Ctrl-C.

    Raises: `GaugeError` for arguments that pytest or the suite rejects, or that select no benchmark.
    """
    suite = paths.suite()
    # The plugin comes before conftest.py, so that its options are known and none of their values is read as a path.
    fixed = ["-c", str(suite / "pytest.ini"), "--rootdir", str(suite), "-p", "peft_gauge.pytest_plugin.hooks"]
    in_suite = InSuite(suite, arguments)
    with tempfile.TemporaryDirectory(prefix="peft-gauge-bench-") as apart:
        # Keep the files of Hypothesis and pytest-benchmark out of the user's folder.
        os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", apart)
        kept = f"--benchmark-storage=file://{apart}"
        code = pytest.main([*fixed, kept, *arguments], plugins=[in_suite])
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise GaugeError("these arguments select no benchmark; `peft-gauge bench --collect-only -q` lists them")
    if code == pytest.ExitCode.INTERRUPTED:
        return INTERRUPTED if in_suite.by_hand else int(pytest.ExitCode.INTERNAL_ERROR)
    return 2 if code == pytest.ExitCode.USAGE_ERROR else int(code)


class InSuite:
    """Start pytest from another folder: locate its arguments in the suite, and report usage errors in one line."""

    def __init__(self, suite: Path, arguments: Sequence[str] = ()) -> None:
        self._suite = suite
        self._arguments = arguments
        self.by_hand = False

    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[TYPED] = ("peft-gauge", "bench", *self._arguments)

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Distinguish Ctrl-C from an error in collection, after which pytest ends with the same exit code."""
        self.by_hand = not isinstance(excinfo.value, pytest.Session.Interrupted)

    @pytest.hookimpl(wrapper=True)
    def pytest_cmdline_parse(self) -> Generator[None, Any, Any]:
        try:
            return (yield)
        except pytest.UsageError as error:
            raise GaugeError(_refusal(error)) from error

    @pytest.hookimpl(wrapper=True)
    def pytest_cmdline_main(self) -> Generator[None, Any, Any]:
        try:
            return (yield)
        except pytest.UsageError as error:
            raise GaugeError(_refusal(error)) from error

    @pytest.hookimpl(tryfirst=True)
    def pytest_load_initial_conftests(
        self, early_config: pytest.Config, parser: pytest.Parser, args: list[str]
    ) -> None:
        """Without a path, select all benchmarks; locate a path in the suite as in a checkout."""
        _, unknown = parser.parse_known_and_unknown_args(args)
        if unknown:  # pytest will reject them; the value after one looks like a path
            return
        given: list[str] = early_config.known_args_namespace.file_or_dir
        if not given:
            given.append(str(self._suite / BENCHMARKS))
            args.insert(0, given[0])  # first, so that no option with an optional value takes it
        for place, path in enumerate(given):
            found = self._found(path)
            if found != path:
                args[len(args) - 1 - args[::-1].index(path)] = found
                given[place] = found

    def _found(self, argument: str) -> str:
        path, mark, name = argument.partition("::")
        for folder in (self._suite, self._suite / BENCHMARKS):
            if (folder / path).exists():
                return f"{folder / path}{mark}{name}"
        if not Path(path).exists():
            known = ", ".join(sorted(each.stem for each in (self._suite / BENCHMARKS).glob("test_*.py")))
            raise GaugeError(f"{path} does not exist, neither here nor in the suite, which has {known}")
        return argument


def _refusal(error: pytest.UsageError) -> str:
    """pytest's usage error, without the usage that its parser prints around it."""
    text = "; ".join(map(str, error.args))
    found = re.search(r"^.*?: error: (.*)$", text, re.MULTILINE)
    return found[1] if found else text
