"""Defaults of options in the user's file: found from below, checked in one line, and overridden by the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_gauge import config_file
from peft_gauge.cli import commands
from peft_gauge.commands.defaults import options_of, sections
from peft_gauge.commands.doctor import config_line
from peft_gauge.pytest_plugin.options import file_options
from tests.support.facts import lacking
from tests.support.suite import command

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``write(text)``: the working directory is two folders below a file with this text."""
    below = tmp_path / "one" / "two"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)

    def file(text: str, name: str = "peft-gauge.toml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return file


def test_the_nearest_file_counts_and_a_project_without_our_table_is_passed_over(tmp_path: Path) -> None:
    near, far = tmp_path / "a" / "b", tmp_path
    near.mkdir(parents=True)
    (far / "peft-gauge.toml").write_text("[plan]\nbatch = 1\n")
    (near / "pyproject.toml").write_text("[tool.other]\nx = 1\n")
    assert config_file.find(near) == config_file.ConfigFile(far / "peft-gauge.toml", {"plan": {"batch": 1}})
    (near / "pyproject.toml").write_text("[tool.peft-gauge.plan]\nbatch = 2\n")
    found = config_file.find(near)
    assert found is not None
    assert (found.path.parent, found.sections) == (near, {"plan": {"batch": 2}})
    (near / "peft-gauge.toml").write_text("[plan]\nbatch = 3\n")
    assert config_file.find(near) == config_file.ConfigFile(near / "peft-gauge.toml", {"plan": {"batch": 3}})


def test_a_plan_takes_its_defaults_from_the_file_and_the_command_line_wins(
    write: Callable[..., Path], run_command: Run, asked: list[Any]
) -> None:
    write('[plan]\nmodel = "toy-llama"\nmethod = ["lora", "ia3"]\nbatch = 3\nseq = 16\ngrad-checkpointing = true\n')
    code, _, err = run_command("plan")
    assert (code, err) == (0, "")
    (lora, ia3) = asked
    assert (lora.model.name, lora.method.name, ia3.method.name) == ("toy-llama", "lora", "ia3")
    assert (lora.settings.batch, lora.settings.seq, lora.settings.grad_checkpointing) == (3, 16, True)
    asked.clear()
    code, _, _ = run_command("plan", "--batch", "5", "--method", "prompt", "--no-grad-checkpointing")
    (prompt,) = asked
    assert (prompt.method.name, prompt.settings.batch, prompt.settings.grad_checkpointing) == ("prompt", 5, False)


def test_a_model_as_argument_wins_over_the_files(
    write: Callable[..., Path], run_command: Run, asked: list[Any]
) -> None:
    write('[plan]\nmodel = "llama-2-7b"\nmethod = "lora"\nseq = 16\n')
    assert run_command("plan", "toy-llama")[0] == 0
    assert asked[0].model.name == "toy-llama"


def test_a_recipe_wins_over_the_files_options(
    write: Callable[..., Path], run_command: Run, asked: list[Any], tmp_path: Path
) -> None:
    write('[plan]\nmodel = "toy-llama"\nbatch = 3\nmethod = "ia3"\nrank = 2\nseq = 16\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model_name_or_path: toy-llama\nstage: sft\nfinetuning_type: lora\nlora_rank: 4\ncutoff_len: 32\n"
        "per_device_train_batch_size: 2\n"
    )
    code, _, err = run_command("plan", "--recipe", str(recipe))
    assert code in (0, 2), err
    assert "is decided by" not in err
    assert (asked[0].settings.batch, asked[0].method.peft_config["r"]) == (2, 4)
    code, _, err = run_command("plan", "--recipe", str(recipe), "--batch", "7")
    assert lacking(err, "--batch", "is decided by") == []


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("[plan]\nbatsch = 1\n", ["batsch", "[plan]", "did you mean batch?"]),
        ('[plan]\nbatch = "four"\n', ["batch", "[plan]", "a whole number", "'four'"]),
        ("[plan]\nbatch = true\n", ["batch", "a whole number", "True"]),
        ("[plan]\npadded = 1\n", ["padded", "true or false", "1"]),
        ("[plan]\ngpu = [1]\n", ["gpu", "a text or a list", "1"]),
        ("[plam]\nbatch = 1\n", ["[plam]", "did you mean plan?"]),
        ("batch = 1\n", ["batch is not in a section", "[plan]"]),
        ("[plan\n", ["not valid TOML"]),
        ("[bench]\nrounds = 1\n", ["[bench]"]),
    ],
)
def test_an_error_is_one_line_with_file_and_key(
    text: str, facts: list[str], write: Callable[..., Path], run_command: Run
) -> None:
    file = write(text)
    code, out, err = run_command("plan", "toy-llama", "--method", "lora")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert lacking(err, str(file), *facts) == []


def test_in_a_project_file_the_section_has_its_full_name(write: Callable[..., Path], run_command: Run) -> None:
    write("[tool.peft-gauge.plan]\nbatsch = 1\n", "pyproject.toml")
    code, _, err = run_command("plan", "toy-llama")
    assert code == 2
    assert lacking(err, "pyproject.toml: batsch in [tool.peft-gauge.plan]") == []


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    file = config_file.ConfigFile(tmp_path / "peft-gauge.toml", {"pytest": {"results": "runs", "model": "./m"}})
    assert file.values("pytest", file_options()) == {"results": str(tmp_path / "runs"), "model": str(tmp_path / "m")}
    remote = config_file.ConfigFile(tmp_path / "peft-gauge.toml", {"pytest": {"results": "s3://b/runs"}})
    assert remote.values("pytest", file_options()) == {"results": "s3://b/runs"}


def test_a_key_with_underscores_is_the_option_with_dashes(tmp_path: Path) -> None:
    file = config_file.ConfigFile(tmp_path / "peft-gauge.toml", {"plan": {"grad_checkpointing": True, "loss-chunk": 8}})
    values = file.values("plan", options_of(commands()["plan"]))
    assert values == {"grad_checkpointing": True, "loss_chunk": 8}


def test_every_command_has_its_options_and_pytest_too() -> None:
    known = commands()
    assert set(sections(known)) == {*known, "pytest"} - {"bench"}
    plan = options_of(known["plan"])
    assert {name: (plan[name].kind, plan[name].many) for name in ("seq", "alpha", "gpu", "padded", "recipe")} == {
        "seq": (int, False),
        "alpha": (float, False),
        "gpu": (str, True),
        "padded": (bool, False),
        "recipe": (Path, False),
    }
    assert plan["set"].name == "changes"
    pytest_options = file_options()
    assert (pytest_options["rounds"].kind, pytest_options["method"].many, pytest_options["details"].kind) == (
        int,
        True,
        bool,
    )


def test_doctor_names_the_file_and_what_is_wrong(write: Callable[..., Path]) -> None:
    assert config_line(commands()).status == "ok"
    file = write("[plan]\nbatch = 1\n[pytest]\nrounds = 3\n")
    line = config_line(commands())
    assert (line.status, line.text) == ("ok", f"{file}: plan, pytest")
    write('[pytest]\nrounds = "x"\n')
    broken = config_line(commands())
    assert broken.status == "missing"
    assert lacking(broken.text, str(file), "rounds", "a whole number") == []


@pytest.mark.integration
def test_a_session_takes_its_defaults_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "peft-gauge.toml").write_text(
        '[pytest]\nmodel = "toy-llama"\nmethod = "lora,ia3"\nresults = "runs"\nno-save = true\n'
    )
    bench = ["bench", "--collect-only", "-q", "-k", "test_peak"]
    named = ["--method=prompt"]
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "peft-gauge.toml").write_text("[pytest]\nmodell = 'x'\n")
    first, second, wrong = (
        command(*arguments, folder=folder)
        for arguments, folder in ((bench, tmp_path), ([*bench, *named], tmp_path), (bench, tmp_path / "wrong"))
    )
    assert [name for name in ("lora-toy-llama", "ia3-toy-llama", "full-") if name in first.stdout] == [
        "lora-toy-llama",
        "ia3-toy-llama",
    ]
    assert "prompt-toy-llama" in second.stdout
    assert "lora-toy-llama" not in second.stdout
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert lacking(wrong.stderr, "peft-gauge.toml", "modell", "did you mean model?") == []
