"""Do the workflows and the nightly files name what exists, and does a night end as it should?

Their syntax, expressions and permissions are checked by actionlint, zizmor and the schema of workflows
(`.pre-commit-config.yaml`); here is what those cannot know.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from peft_gauge import cli
from tests.support.paths import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
NIGHTLY = ROOT / ".github" / "workflows" / "nightly-gpu.yml"
WEEKLY = ROOT / ".github" / "workflows" / "weekly-matrix.yml"
DOCS = ROOT / "docs" / "nightly"
SCRIPT = DOCS / "nightly.sh"
UNITS = sorted(path for path in DOCS.iterdir() if path.suffix in (".service", ".timer"))
CHECKOUT = "%h/peft-gauge/"  # where the units look for the project


def load(path: Path) -> dict[Any, Any]:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(workflow, dict)
    return workflow


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in load(path)["jobs"].values() for step in job["steps"]]


def run_blocks(path: Path) -> list[str]:
    return [step["run"] for step in steps(path) if "run" in step]


def step_of_the_night(name: str) -> dict[str, Any]:
    (step,) = (step for step in steps(NIGHTLY) if step.get("name") == name)
    return step


def read_unit(path: Path) -> configparser.ConfigParser:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]  # systemd's keys have capitals
    unit.read_string(path.read_text(encoding="utf-8"))
    return unit


def cron_line() -> tuple[list[str], str]:
    """The five fields of time, and the command."""
    *fields, command = (DOCS / "crontab").read_text(encoding="utf-8").strip().split(maxsplit=5)
    return fields, command


def shell_texts() -> dict[str, str]:
    """Everything here that a shell is to run, by where it stands."""
    texts = {f"{path.name}[{i}]": block for path in WORKFLOWS for i, block in enumerate(run_blocks(path))}
    texts["nightly.sh"] = SCRIPT.read_text(encoding="utf-8")
    texts["crontab"] = cron_line()[1]
    readme = (DOCS / "README.md").read_text(encoding="utf-8")
    texts |= {f"README.md[{i}]": block for i, block in enumerate(re.findall(r"^```\n(.*?)^```$", readme, re.M | re.S))}
    return texts


def named_commands() -> list[tuple[str, list[str]]]:
    """Each ``peft-gauge VERB --option …`` of the shell texts and of the README's code: the verb, and its options."""
    lines = [line for text in shell_texts().values() for line in text.splitlines() if not line.lstrip().startswith("#")]
    lines += re.findall(r"`([^`\n]+)`", (DOCS / "README.md").read_text(encoding="utf-8"))
    found = []
    for line in lines:
        for verb, rest in re.findall(r"(?:^|\s)peft-gauge\s+([a-z][\w-]*)([^|;&>]*)", line):
            found.append((verb, re.findall(r"(?<=\s)--[\w-]+", rest)))
    return found


# ---------------------------------------------------------------------------------------------- what the files say


def test_the_commands_to_check_are_found() -> None:
    assert {"doctor", "report", "compare"} <= {verb for verb, _ in named_commands()}
    assert ("compare", ["--markdown"]) in named_commands()


@pytest.mark.parametrize(
    ("verb", "options"), [pytest.param(*named, id=" ".join([named[0], *named[1]])) for named in named_commands()]
)
def test_every_command_exists(verb: str, options: list[str]) -> None:
    verbs = cli.commands()
    assert verb in verbs
    assert set(options) <= {option for parameter in verbs[verb].params for option in parameter.opts}


def test_a_shell_can_read_every_script() -> None:
    for where, text in shell_texts().items():
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), where


def test_a_runner_of_ones_own_never_runs_a_pull_request() -> None:
    own = [path for path in WORKFLOWS if any("self-hosted" in job["runs-on"] for job in load(path)["jobs"].values())]
    assert own == [NIGHTLY]
    # YAML 1.1 reads the key `on` as a truth value.
    assert set(load(NIGHTLY)[True]) == {"schedule", "workflow_dispatch"}


def test_every_input_becomes_a_variable() -> None:
    workflow = load(NIGHTLY)
    inputs = workflow[True]["workflow_dispatch"]["inputs"]
    assert set(workflow["jobs"]["nightly"]["env"].values()) == {f"${{{{ inputs.{name} }}}}" for name in inputs}


def test_steps_after_measuring_run_also_when_it_fails_and_hide_nothing() -> None:
    night = steps(NIGHTLY)
    after = night[night.index(step_of_the_night("Measure")) + 1 :]
    assert after
    assert all(re.search(r"!cancelled\(\)|always\(\)", step.get("if", "")) for step in after)
    assert [step for step in night if "continue-on-error" in step] == []


def test_the_weekly_run_has_every_torch_of_the_noxfile(tmp_path: Path) -> None:
    job = load(WEEKLY)["jobs"]["torch"]
    releases = job["strategy"]["matrix"]["release"]
    [script] = [step["run"] for step in job["steps"] if "nox -s" in step.get("run", "")]
    named = re.sub(r'^nox -s "(.*)"$', r"\1", script)
    found = subprocess.run(
        [sys.executable, "-m", "nox", "--list", "--json", "-s", "torch", "-f", str(ROOT / "noxfile.py")],
        capture_output=True, text=True, check=True, env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    sessions = {session["session"] for session in json.loads(found.stdout)}
    assert {named.replace("$RELEASE", str(release)) for release in releases} == sessions


# --------------------------------------------------------------------------------------------- systemd and cron


def test_the_service_starts_the_script() -> None:
    service = read_unit(DOCS / "peft-gauge-nightly.service")["Service"]
    _, *arguments = shlex.split(service["ExecStart"])
    assert [ROOT / a.removeprefix(CHECKOUT) for a in arguments if a.startswith(CHECKOUT)] == [SCRIPT]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", *map(str, UNITS)],
        capture_output=True,
        text=True,
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},  # a container's session has none
    )
    assert len(UNITS) == 2
    assert (done.returncode, done.stderr) == (0, "")


def test_the_line_for_cron_starts_the_script_at_a_time() -> None:
    fields, command = cron_line()
    assert [bool(re.fullmatch(r"[\d*]+", field)) for field in fields] == [True] * 5
    assert "%" not in command  # cron would end the command there
    assert SCRIPT.relative_to(ROOT).as_posix() in shlex.split(command)


# --------------------------------------------------------------------------------------------- how a night ends

needs_flock = pytest.mark.skipif(shutil.which("flock") is None, reason="no flock on this machine")

# Stands for every program that a night calls, by the name it is called with; what it is to do stands in variables.
PROGRAM = """#!/usr/bin/env bash
echo "${0##*/}$(printf ' <%s>' "$@")" >> "$CALLS"
case "${0##*/} ${1-}" in
  pytest*)
    for argument; do
      [[ $argument != --results=* ]] || results=${argument#--results=}
    done
    if [[ $SAVED == yes ]]; then
      mkdir -p "$results/machine"
      echo "{}" > "$results/machine/0009_commit_20260101_000000.json"
      touch -t 200001010000 "$results/machine/0009_commit_20260101_000000.json"
    fi
    exit "$MEASURED"
    ;;
  "peft-gauge compare") exit "$COMPARED" ;;
  "python3 -m") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;; # python3 -m venv
esac
"""


class Night:
    """A folder with stand-ins for the programs, and results of earlier nights."""

    def __init__(self, folder: Path, *, earlier: int) -> None:
        self.folder = folder
        self.results = folder / "results of nights"  # a space, as paths have
        for name in ("bin", "checkout/docs/nightly", "runner"):
            (folder / name).mkdir(parents=True)
        for name in ("python", "python3", "pytest", "peft-gauge"):
            (folder / "bin" / name).write_text(PROGRAM)
            (folder / "bin" / name).chmod(0o755)
        machine = self.results / "machine"
        machine.mkdir(parents=True)
        for number in range(1, earlier + 1):
            path = machine / f"{number:04d}_commit_20250101_000000.json"
            path.write_text("{}")
            os.utime(path, (2**31, 2**31))  # as a file server's clock may have it; the new run's is long ago

    def run(self, *command: str, saved: bool = True, measured: int = 0, compared: int = 0, **variables: str) -> int:
        done = subprocess.run(
            command,
            cwd=self.folder / "checkout",
            env=os.environ
            | {"PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "CALLS": str(self.folder / "calls")}
            | {"SAVED": "yes" if saved else "no", "MEASURED": str(measured), "COMPARED": str(compared)}
            | {"PEFT_GAUGE_RESULTS": str(self.results)}
            | variables,
            capture_output=True,
            text=True,
        )
        self.printed = done.stdout + done.stderr
        return done.returncode

    def step(self, name: str, **options: Any) -> int:
        """Run one of the workflow's scripts as GitHub does, with the variables of the job."""
        files = {name: str(self.folder / name) for name in ("GITHUB_ENV", "GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        inputs = dict.fromkeys(load(NIGHTLY)["jobs"]["nightly"]["env"], "")
        job = {"RESULTS": str(self.results), "RUNNER_TEMP": str(self.folder / "runner")}
        script = step_of_the_night(name)["run"]
        command = ("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script)
        return self.run(*command, **(files | inputs | job | options))

    def script(self, **options: Any) -> int:
        copy = self.folder / "checkout" / "docs" / "nightly" / SCRIPT.name
        shutil.copyfile(SCRIPT, copy)
        return self.run("bash", str(copy), **options)

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []

    def compared(self) -> bool:
        return any(call.startswith("peft-gauge <compare>") for call in self.calls())

    def told(self, name: str) -> str:
        return (self.folder / name).read_text()


@needs_flock
@pytest.mark.parametrize("compared", [0, 1, 2])
@pytest.mark.parametrize("measured", [0, 1])
def test_the_script_fails_as_pytest_or_the_comparison_does(tmp_path: Path, measured: int, compared: int) -> None:
    night = Night(tmp_path, earlier=1)
    assert night.script(measured=measured, compared=compared) == (measured or compared)
    assert night.compared()


@needs_flock
@pytest.mark.parametrize("measured", [0, 1])
def test_the_script_compares_no_first_night(tmp_path: Path, measured: int) -> None:
    night = Night(tmp_path, earlier=0)
    assert night.script(measured=measured, compared=2) == measured
    assert not night.compared()
    assert "first run of this machine" in night.printed


@needs_flock
@pytest.mark.parametrize("measured", [0, 4])
def test_the_script_fails_where_nothing_was_saved(tmp_path: Path, measured: int) -> None:
    """Two earlier runs must not be compared again in the place of a night that measured nothing."""
    night = Night(tmp_path, earlier=2)
    assert night.script(saved=False, measured=measured) == (measured or 1)
    assert not night.compared()
    assert "nothing was saved" in night.printed


@needs_flock
def test_the_script_leaves_the_card_to_a_night_that_still_runs(tmp_path: Path) -> None:
    night = Night(tmp_path, earlier=1)
    lock = night.results / ".nightly.lock"
    with subprocess.Popen(
        ["flock", str(lock), "sh", "-c", "echo held; read line"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert night.script() == 1
        other.communicate(b"\n")
    assert "another night" in night.printed
    assert night.calls() == []


@pytest.mark.parametrize("compared", [0, 1, 2])
def test_the_workflow_ends_as_the_comparison_does(tmp_path: Path, compared: int) -> None:
    night = Night(tmp_path, earlier=1)
    assert night.step("Measure", MODEL="") == 0
    assert night.step("Find the saved run") == 0
    run = night.told("GITHUB_OUTPUT").strip().removeprefix("run=")
    assert run.endswith("/0009_commit_20260101_000000.json")
    assert night.step("Compare with the run before", RUN=run, compared=compared) == compared
    assert night.compared()
    assert ("::error::" in night.printed) == (compared != 0)


def test_the_workflow_compares_no_first_night(tmp_path: Path) -> None:
    night = Night(tmp_path, earlier=1)
    run = str(night.results / "machine" / "0001_commit_20250101_000000.json")
    assert night.step("Compare with the run before", RUN=run, compared=2) == 0
    assert not night.compared()
    assert "::notice::" in night.printed


def test_the_workflow_fails_where_nothing_was_saved(tmp_path: Path) -> None:
    night = Night(tmp_path, earlier=2)
    assert night.step("Measure", saved=False) == 0
    assert night.step("Find the saved run") == 1
    assert "Nothing was saved" in night.printed


def test_the_workflow_keeps_the_exit_code_of_pytest(tmp_path: Path) -> None:
    assert Night(tmp_path, earlier=1).step("Measure", measured=1) == 1


def test_every_requirement_reaches_pip(tmp_path: Path) -> None:
    night = Night(tmp_path, earlier=0)
    asked = {"TORCH": "torch==2.9", "TRANSFORMERS": "transformers<6", "PEFT": "peft", "BITSANDBYTES": "bitsandbytes"}
    assert night.step("Install into a fresh environment", GITHUB_PATH=str(tmp_path / "path"), **asked) == 0
    assert " ".join(f"<{requirement}>" for requirement in asked.values()) in night.calls()[1]


def test_an_input_stays_one_argument_and_runs_nothing(tmp_path: Path) -> None:
    night = Night(tmp_path, earlier=0)
    hostile = "x $(touch ran) `touch ran`; touch ran"
    assert night.step("Measure", MODEL=hostile) == 0
    assert night.step("Install into a fresh environment", TORCH=hostile, GITHUB_PATH=str(tmp_path / "path")) == 0
    assert night.calls()[0].endswith(f" <--model={hostile}>")
    assert f"python <-m> <pip> <install> <-e> <.> <--> <{hostile}>" in night.calls()
    assert not (tmp_path / "checkout" / "ran").exists()


def test_a_run_with_inputs_has_a_history_of_its_own(tmp_path: Path) -> None:
    night = Night(tmp_path, earlier=0)
    for requests in ({}, {"MODEL": "tinyllama"}, {"MODEL": "tinyllama"}, {"TORCH": "tinyllama"}):
        assert night.step("Settle where the run is kept", **requests) == 0
    usual, model, again, torch = (line.removeprefix("RESULTS=") for line in night.told("GITHUB_ENV").splitlines())
    assert usual == str(night.results)
    assert model == again
    assert len({usual, model, torch}) == 3
    assert all(Path(folder).is_dir() and not Path(folder).is_relative_to(usual) for folder in (model, torch))
