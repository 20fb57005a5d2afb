"""Do the examples for Slurm, Kubernetes and SkyPilot run commands that exist, with options that parse?

Each script runs in bash with the environment that its scheduler gives it, where `pytest`, `peft-gauge` and the
schedulers' own commands only record their arguments. No scheduler is here: their own keys are checked by reading only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from peft_gauge import cli
from peft_gauge.pytest_plugin.options import add_options
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "many-machines.md"
EXAMPLES = ROOT / "docs" / "many-machines"
RECORDED = ("pytest", "peft-gauge", "sbatch", "sky", "python3")
SHARDED = ("shards.sbatch", "kubernetes.yaml", "sky.yaml")

Call = tuple[str, list[str]]


class Options(argparse.ArgumentParser):
    """The suite's own options, and those of pytest that the examples use."""

    def __init__(self) -> None:
        super().__init__("pytest", exit_on_error=False, allow_abbrev=False)
        self.add_argument("-m")
        self.add_argument("-k")
        self.add_argument("paths", nargs="*")
        add_options(self)  # type: ignore[arg-type]

    def getgroup(self, *_: str) -> Options:
        return self

    def addoption(self, *names: str, **settings: Any) -> None:
        self.add_argument(*names, **settings)

    def error(self, message: str) -> Any:
        raise AssertionError(message)


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((EXAMPLES / name).read_text(encoding="utf-8")))


def scripts() -> dict[str, str]:
    """Everything that a shell is to run, by where it is."""
    texts = {
        path.name: path.read_text(encoding="utf-8") for path in sorted(EXAMPLES.iterdir()) if path.suffix != ".yaml"
    }
    for job in documents("kubernetes.yaml"):
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert container["command"] == ["bash", "-c"]
        (texts[f"kubernetes.yaml: {job['metadata']['name']}"],) = container["args"]
    (task,) = documents("sky.yaml")
    texts |= {f"sky.yaml: {part}": task[part] for part in ("setup", "run")}
    blocks = re.findall(r"^```\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return texts | {f"page[{place}]": block for place, block in enumerate(blocks)}


GIVEN = {
    "SLURM_ARRAY_JOB_ID": "700",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_ARRAY_TASK_COUNT": "8",
    "SLURM_GPUS_ON_NODE": "8",
    "JOB_COMPLETION_INDEX": "2",
    "SHARDS": "8",
    "SKYPILOT_NODE_RANK": "2",
    "SKYPILOT_NUM_NODES": "8",
}


def calls(where: str, folder: Path, *arguments: str) -> list[Call]:
    """The commands that the script ``where`` runs; it must end with 0."""
    home, programs, record = folder / "home", folder / "programs", folder / "calls"
    shards = folder / "results" / "shards" / "700" / "node"
    for made in (home / "peft-gauge" / ".venv" / "bin", home / "peft-gauge-env" / "bin", programs, shards):
        made.mkdir(parents=True)
    for number in (1, 2):
        (shards / f"000{number}_x_y.json").touch()
    for environment in home.glob("*/**/bin"):
        (environment / "activate").touch()
        (environment / "python").symlink_to("/bin/true")
    recording = f"import json, sys; open({str(record)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')"
    for name in RECORDED:
        answer = "echo '701;cluster'\n" if name == "sbatch" else ""
        script = f'#!/bin/bash\n{shlex.quote(sys.executable)} -c {shlex.quote(recording)} {name} "$@"\n{answer}'
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    (programs / "srun").write_text('#!/bin/bash\nwhile [[ $1 = --* ]]; do shift; done\nexec "$@"\n')
    (programs / "srun").chmod(0o755)
    script = scripts()[where]
    file = folder / "script"
    file.write_text(script)
    variables = {**GIVEN, "PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(home)}
    variables["PEFT_GAUGE_RESULTS"] = str(folder / "results")
    done = subprocess.run(["bash", str(file), *arguments], env=variables, cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    lines = record.read_text().splitlines() if record.exists() else []
    return [(name, rest) for name, *rest in map(json.loads, lines)]


def parsed(call: Call) -> dict[str, Any]:
    """The values of a command's options, parsed as the command itself does."""
    name, arguments = call
    if name == "peft-gauge":
        verb, *rest = arguments
        if verb != "bench":
            return dict(cli.commands()[verb].make_context(verb, rest).params)
        arguments = rest
    return vars(Options().parse_args(arguments))


@pytest.mark.parametrize("where", scripts())
def test_a_shell_can_read_every_script(where: str) -> None:
    done = subprocess.run(["bash", "-n"], input=scripts()[where], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("where", [where for where in scripts() if where.startswith(SHARDED) and "setup" not in where])
def test_every_shard_names_its_part(where: str, tmp_path: Path) -> None:
    """Numbers begin with 1, those of Kubernetes and SkyPilot with 0."""
    (call,) = calls(where, tmp_path)
    if "merge" in where:
        return
    options = parsed(call)
    assert options["shard"] == "3/8"
    assert (options["m"], options["device"]) == ("gpu", "cuda")
    assert "shards" in Path(options["results"]).parts


def test_slurm_joins_the_shards_of_its_array(tmp_path: Path) -> None:
    array, merge = calls("submit.sh", tmp_path / "a")
    assert array == ("sbatch", ["--parsable", "--export=ALL", "shards.sbatch"])
    assert merge == ("sbatch", ["--export=ALL", "--dependency=afterany:701", "merge.sbatch", "701"])
    joined, page = calls("merge.sbatch", tmp_path / "b", "700")
    options = parsed(joined)
    assert [file.name for file in options["files"]] == ["0001_x_y.json", "0002_x_y.json"]
    assert parsed(page)["runs"] == [options["results"]]


def test_one_task_of_slurm_has_all_gpus_of_its_node(tmp_path: Path) -> None:
    ((name, arguments),) = calls("multigpu.sbatch", tmp_path)
    options = parsed((name, arguments))
    assert (name, options["m"], options["gpus"], options["strategy"]) == ("pytest", "multigpu", 8, "fsdp2")
    requested = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", scripts()["multigpu.sbatch"], re.M))
    assert (requested["nodes"], requested["ntasks"], requested["gpus-per-node"]) == ("1", "1", "8")


def test_kubernetes_has_as_many_shards_as_pods() -> None:
    measure, merge = documents("kubernetes.yaml")
    spec = measure["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert (measure["apiVersion"], measure["kind"], spec["completionMode"]) == ("batch/v1", "Job", "Indexed")
    assert {"name": "SHARDS", "value": str(spec["completions"])} in container["env"]
    assert spec["parallelism"] <= spec["completions"]
    for job in (measure, merge):
        pod = job["spec"]["template"]["spec"]
        assert pod["restartPolicy"] == "Never"
        mounted = {mount["name"] for each in pod["containers"] for mount in each["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_every_command_of_the_page_parses(tmp_path: Path) -> None:
    found = [
        call
        for place, where in enumerate(each for each in scripts() if each.startswith("page"))
        for call in calls(where, tmp_path / str(place))
        if call[0] in ("pytest", "peft-gauge")
    ]
    assert {"merge", "compare", "report"} <= {arguments[0] for _, arguments in found}
    for call in found:
        parsed(call)


def test_every_example_is_in_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"\(many-machines/([\w.-]+)\)", page)) == {path.name for path in EXAMPLES.iterdir()}
