"""README and docs: each command that needs no network, no GPU and no packages runs as it is written.

It runs in this process, in a folder with saved runs and the files that the pages name. Those that take more than some
seconds are marked `slow`. A command that is not run is in `NOT_RUN` with the reason.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_gauge.commands.compare import _this_machine
from peft_gauge.history.selection import newest_in_common
from peft_gauge.plan import worker
from peft_gauge.plan.record import PlanRequest
from peft_gauge.training import methods, models
from peft_gauge.training.settings import StepSettings
from tests.support.documents import commands, commands_in_text
from tests.support.paths import ROOT
from tests.support.planning import plan_here
from tests.support.planted_cases import plan_in_process

Run = Callable[..., tuple[int, str, str]]

ALONE = ("models", "methods", "gpus", "runs", "doctor", "claims")
"""Verbs without arguments, which running text names."""

COMMANDS = sorted(
    {shlex.join(words) for _, words in (*commands("peft-gauge"), *commands_in_text("peft-gauge"))} | {*ALONE}
)

INDEX, MINUTES, GPU = "installs packages from an index", "measures for minutes", "needs a GPU"
NEW = "needs the new record that the reader makes there"
EXAMPLE = "stands for options that the reader has to add"
NOT_RUN = {
    "COMMAND --help": "stands for each command; tests/unit/commands/test_help.py",
    "ab --self-check": MINUTES,
    "ab peft==0.20.0 peft==0.21.2 --method lora,qlora": INDEX,
    "ab trl==1.4.0 . --method lora --loop sft": INDEX,
    "bench -h": "prints pytest's help; tests/integration/test_bench.py",
    "bench -m gpu --budget 1800 --results=history": GPU,
    "bisect bitsandbytes 0.46.0..0.50.2 --metric qlora:step_seconds": INDEX,
    "bisect peft 0.18.0..0.21.2 --metric lora:fingerprint": INDEX,
    "bisect trl 1.10.0..1.16.0 --metric lora:fingerprint --loop sft": INDEX,
    "bundle --python 3.12 --have @node.txt --most-megabytes 60 -o bundle": INDEX,
    "calibrate": GPU,
    "ceilings --write": "plans all methods for minutes and rewrites this checkout; tests/unit/plan/test_ceilings.py",
    "compare --last 2 --results s3://bucket/runs": "needs a network; tests/integration/test_remote_results.py",
    "fetch smollm2": "needs a network",
    "merge SHARD... --results ADDRESS": "needs shards of one run; tests/integration/test_shards.py",
    "merge SHARD... --results s3://bucket/runs": "needs a network; tests/integration/test_remote_results.py",
    "merge 'shards/*/*.json' --results history": "needs shards of one run; tests/integration/test_shards.py",
    "plan --mixed-precision bf16 --float32-outputs": EXAMPLE,
    "plan --model NAME --method lora --batch 1 --seq 512": NEW,
    "plan --model llama-2-70b --method lora --batch 1 --seq 512 --find gpus --gpu 24GB": "plans sharded steps for "
    "minutes; tests/integration/test_sharded_plan.py",
    "plan --model tinyllama --method lora --gpu 'RTX 5070'": NEW,
    "plan --model toy-llama --method lora-rslora": NEW,
    "plan '…' --json": EXAMPLE,
    "trace 'results/<machine>/traces/lora-tinyllama-cuda_20261127_134301.json.gz'": "the trace is not in this checkout",
    "trace step.pickle --model tinyllama --method lora --batch 4 --seq 768": "needs a recording of a GPU's allocator",
}
SLOW = {
    command
    for command in COMMANDS
    if command.startswith(("memory-curve ", "plan "))
    or command in ("doctor", "report history -o report.html", "report results/ --format svg -o pictures")
} - {*NOT_RUN}
"""Those that take more than 5 s of a core, or repeat a quick one; a plan of a small step is run by many other tests."""
RAN = [command for command in COMMANDS if command not in NOT_RUN]

CPU, H200 = "amd-epyc-2c-cpu", "intel-xeon-16c-nvidia-h200"
AXOLOTL = """
base_model: NousResearch/Llama-2-7b-hf
adapter: qlora
load_in_4bit: true
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, v_proj]
sequence_len: 512
micro_batch_size: 1
gradient_accumulation_steps: 1
bf16: true
optimizer: adamw_torch
"""
ADAPTER = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj"]}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the commands run in: what the pages suppose to be there."""
    for folder in ("results", "history"):
        for machine in {CPU, _this_machine()}:
            shutil.copytree(ROOT / "results" / CPU, tmp_path / folder / machine)
    gpu_run = next((ROOT / "results" / H200).glob("*.json"))
    (tmp_path / "history" / H200).mkdir()
    for number in (1, 2):
        shutil.copy(gpu_run, tmp_path / "history" / H200 / f"{number:04}{gpu_run.name[4:]}")
    shutil.copytree(ROOT / "fixtures" / "models" / "tinyllama", tmp_path / "my-model")
    (tmp_path / "my-adapter").mkdir()
    (tmp_path / "my-adapter" / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (tmp_path / "qlora.yml").write_text(AXOLOTL)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "claims.md", tmp_path / "docs")
    toy = PlanRequest(models.resolve("toy-llama", weights="random"), methods.LORA, StepSettings(1, 32), gpus=("24GB",))
    (tmp_path / "plan.json").write_text(json.dumps([plan.as_json() for plan in plan_in_process([toy])]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def as_written(command: str) -> list[str]:
    """The words of ``command``, with a file or folder in place of each that stands for one."""
    base, new = (run.path for run in newest_in_common(sorted(Path("results", CPU).glob("*.json")), 2).runs)
    files = {
        "BASE": str(base),
        "NEW": str(new),
        "NEW...": str(new),
        "RUN": str(new),
        "ADDRESS": "history",
        "results/<machine>": f"results/{CPU}",
        "PLAN.json…": "plan.json",
    }
    return [files.get(word, word) for word in shlex.split(command)]


@pytest.mark.parametrize(
    "command",
    [pytest.param(each, marks=[pytest.mark.slow] if each in SLOW else [], id=ascii(each)) for each in RAN],
)
@pytest.mark.usefixtures("place")
def test_it_runs_as_it_is_written(command: str, run_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_here(monkeypatch)
    words = as_written(command)
    code, out, err = run_command(*words)
    # A plan ends with 1 if a step does not fit, a comparison if a run is worse, doctor if a part is missing.
    assert code in ((0, 1) if words[0] in ("plan", "compare", "doctor") else (0,)), err
    assert out.strip()
    for option in ("-o", "--out"):
        if option in words:
            assert Path(words[words.index(option) + 1]).exists()


@pytest.mark.parametrize(
    "command", [pytest.param(each, id=ascii(each)) for each in sorted(SLOW) if each.startswith("plan ")]
)
@pytest.mark.usefixtures("place")
def test_a_slow_plan_reads_its_options_and_prints(
    command: str, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With planted plans in place of the traced step; options that plan more steps are left out."""
    monkeypatch.setattr(worker, "plan_in_parallel", plan_in_process)
    words = as_written(command)
    if "--find" in words:
        place = words.index("--find")
        words[place : place + 2] = []
    code, out, err = run_command(*(word for word in words if word not in ("--advise", "--timeline")))
    assert code == 0, err
    assert out.strip()


def test_each_command_that_is_not_run_is_documented() -> None:
    assert sorted({*NOT_RUN} - {*COMMANDS}) == []
