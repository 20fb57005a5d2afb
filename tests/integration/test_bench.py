"""`peft-gauge bench`: the suite from any folder, bad input as one line, and `peft-gauge --version`."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from peft_gauge import __version__, paths
from peft_gauge.errors import GaugeError
from peft_gauge.history import writer
from peft_gauge.pytest_plugin import bench
from tests.support.suite import command

if TYPE_CHECKING:
    from tests.conftest import Run

SUITE = paths.suite()


def lookup(*given: str) -> list[str]:
    """The arguments that pytest gets where a user gave ``given`` and an option with an optional value."""
    args = [*given, "--compare"]
    config: Any = SimpleNamespace(known_args_namespace=SimpleNamespace(file_or_dir=list(given)))
    parser: Any = SimpleNamespace(parse_known_and_unknown_args=lambda args: (None, []))
    bench.InSuite(SUITE).pytest_load_initial_conftests(config, parser, args)
    return args


def test_without_a_path_all_benchmarks_are_run() -> None:
    assert lookup() == [str(SUITE / "benchmarks"), "--compare"]


@pytest.mark.parametrize("given", ["benchmarks/test_speed.py::test_step", "test_speed.py::test_step"])
def test_paths_are_those_of_the_suite(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert lookup(given) == [f"{SUITE / 'benchmarks' / 'test_speed.py'}::test_step", "--compare"]


def test_a_file_of_the_users_own_stays_his(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_mine.py").touch()
    monkeypatch.chdir(tmp_path)
    assert lookup("test_mine.py") == ["test_mine.py", "--compare"]
    with pytest.raises(GaugeError, match=r"test_spede\.py does not exist, .* which has test_claims, .*test_verdicts"):
        lookup("test_spede.py")


def test_it_selects_in_any_folder_as_pytest_does_in_the_checkout(tmp_path: Path) -> None:
    selected = ("--model", "toy-llama", "--device", "cpu", "-k", "lora and step")
    done = command("bench", "test_speed.py", *selected, "--collect-only", "-q", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    ids = [line for line in done.stdout.splitlines() if "::" in line]
    assert ids == [f"benchmarks/test_speed.py::test_step[{name}-toy-llama-cpu]" for name in ("lora", "qlora")]
    assert [*tmp_path.iterdir()] == [], "something was left in the user's folder"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tinylama"], "unknown model 'tinylama'; did you mean tinyllama"),
        (["--modle", "toy-llama"], "unrecognized arguments: --modle"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = command("bench", "test_speed.py", "--collect-only", *arguments, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"peft-gauge: {message}")


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        (pytest.ExitCode.OK, 0),
        (pytest.ExitCode.TESTS_FAILED, 1),
        (pytest.ExitCode.USAGE_ERROR, 2),
        (pytest.ExitCode.INTERNAL_ERROR, 3),
        (pytest.ExitCode.INTERRUPTED, 3),  # an error in collection: no hand was in it
    ],
)
def test_exit_codes(ended: pytest.ExitCode, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest, "main", lambda arguments, plugins: ended)
    assert bench.bench([]) == code


def test_ctrl_c_is_no_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(arguments: list[str], plugins: list[bench.InSuite]) -> int:
        plugins[0].pytest_keyboard_interrupt(SimpleNamespace(value=KeyboardInterrupt()))  # type: ignore[arg-type]
        return int(pytest.ExitCode.INTERRUPTED)

    monkeypatch.setattr(pytest, "main", interrupted)
    assert bench.bench([]) == 130


def test_nothing_selected_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest, "main", lambda arguments, plugins: pytest.ExitCode.NO_TESTS_COLLECTED)
    with pytest.raises(GaugeError, match="select no benchmark"):
        bench.bench(["-k", "nothing"])


def test_the_version_and_what_changes_a_result(run_command: Run) -> None:
    code, out, err = run_command("--version")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"peft-gauge {__version__}"
    assert lines[1] == f"Python {sys.version.split()[0]}"
    assert f"torch {version('torch')}" in lines


def test_a_wheel_carries_the_suite_and_its_types() -> None:
    wheel = tomllib.loads((paths.PROJECT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["peft_gauge"]
    assert wheel["force-include"] == {
        name: f"peft_gauge/_suite/{name}" for name in ("conftest.py", "pytest.ini", "benchmarks", "fixtures")
    }
    assert (paths.PACKAGE / "py.typed").is_file()


def test_an_installed_package_has_its_suite_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "PACKAGE", tmp_path)
    assert (paths.is_installed(), paths.suite()) == (False, paths.PROJECT)
    (tmp_path / "_suite").mkdir()
    assert paths.fixture("claims.toml") == tmp_path / "_suite" / "fixtures" / "claims.toml"
    assert writer.commit_info() == {
        "id": "unversioned",
        "dirty": False,
        "project": "peft-gauge",
        "version": __version__,
    }


def test_the_commit_is_that_of_the_suite_wherever_the_user_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = writer.commit_info()
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    monkeypatch.chdir(tmp_path)
    assert writer.commit_info()["id"] == here["id"]
