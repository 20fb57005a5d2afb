"""Start pytest on the suite from any folder: the checkout's, or the copy that an installed wheel carries."""

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

BENCHMARKS = "benchmarks"

INTERRUPTED = 128 + 2
"""The exit code after Ctrl-C, as a shell gives it: 2, which is pytest's, is bad input here."""


def bench(arguments: Sequence[str]) -> int:
    """Run the suite with pytest's ``arguments``; paths in them are looked up in the suite first, then here.

    Options that name a file or folder (``--results``, ``--model``, …) mean it from the current folder, as ever.

    Returns: 0 where everything passed, 1 where a benchmark failed or something got worse, 2 where an adapter could not
    be used, 3 for an error in collection or within pytest, `INTERRUPTED` after Ctrl-C.

    Raises: `GaugeError` for arguments that pytest or the suite refuses, or that select no benchmark.
    """
    suite = paths.suite()
    # The plugin comes before conftest.py so that its options are known, and no value of theirs is read as a path.
    fixed = ["-c", str(suite / "pytest.ini"), "--rootdir", str(suite), "-p", "peft_gauge.pytest_plugin.hooks"]
    in_suite = InSuite(suite)
    with tempfile.TemporaryDirectory(prefix="peft-gauge-bench-") as apart:
        # What Hypothesis and pytest-benchmark keep for themselves is of no use in the user's folder.
        os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", apart)
        kept = f"--benchmark-storage=file://{apart}"
        code = pytest.main([*fixed, kept, *arguments], plugins=[in_suite])
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise GaugeError("these arguments select no benchmark; `peft-gauge bench --collect-only -q` lists them")
    if code == pytest.ExitCode.INTERRUPTED:
        return INTERRUPTED if in_suite.by_hand else int(pytest.ExitCode.INTERNAL_ERROR)
    return 2 if code == pytest.ExitCode.USAGE_ERROR else int(code)


class InSuite:
    """What pytest needs to be started elsewhere: where its arguments lie, and refusals that are one line."""

    def __init__(self, suite: Path) -> None:
        self._suite = suite
        self.by_hand = False

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """pytest ends in the same way after an error in collection."""
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
        """Without a path, all benchmarks; a path as a user of the checkout would give it, in the suite."""
        _, unknown = parser.parse_known_and_unknown_args(args)
        if unknown:  # pytest will refuse them; what follows one looks like a path
            return
        given: list[str] = early_config.known_args_namespace.file_or_dir
        if not given:
            given.append(str(self._suite / BENCHMARKS))
            args.insert(0, given[0])  # first, where no option with an optional value can take it
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
            raise GaugeError(f"there is no {path}, neither here nor in the suite, which has {known}")
        return argument


def _refusal(error: pytest.UsageError) -> str:
    """What pytest refuses, without the usage that its parser prints around it."""
    text = "; ".join(map(str, error.args))
    found = re.search(r"^.*?: error: (.*)$", text, re.MULTILINE)
    return found[1] if found else text
