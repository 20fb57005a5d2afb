"""Environments of two sides: what a requirement means, what pip builds of it here, and children that live in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from peft_gauge.environments import build, worker
from peft_gauge.environments.build import Environment, NoEnvironment, prepare
from peft_gauge.environments.requirements import Side, parse_library, parse_range, parse_side
from peft_gauge.environments.state import Kept
from peft_gauge.environments.worker import CaseSpec, Worker, WorkerFailed
from peft_gauge.errors import GaugeError
from tests.support.paths import ROOT
from tests.support.stepping_child import make_wheel

CHILD = "tests.support.stepping_child"
CASE = CaseSpec("toy-llama", "lora", 1, 8, "cpu", "float32")
INSTALLED = Environment(Side(()), None, {})


def know_only(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``folder`` all that pip knows, and ``cache`` the user's cache."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PEFT_GAUGE_CACHE", str(cache))
    monkeypatch.setattr(build, "MEASURED", ())  # resolving all libraries takes seconds


def make_wheels(folder: Path) -> Path:
    make_wheel(folder, "1.0")
    make_wheel(folder, "2.0", factor=1.2, requires="gaugehelper>=1")
    make_wheel(folder, "1.0", name="gaugehelper")
    make_wheel(folder, "3.0", requires="gaugemissing")
    make_wheel(folder, "2.5rc1")
    make_wheel(folder, "1.0", name="gaugetorch", requires="torch==1.0")
    make_wheel(folder, "1.0", name="torch")
    return folder


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all pip knows, and a cache of the test's own."""
    know_only(make_wheels(tmp_path / "wheels"), tmp_path / "cache", monkeypatch)
    return tmp_path / "wheels"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Environment]:
    """Version -> the environment of gaugeprobe that pip built."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as monkeypatch:
        know_only(make_wheels(folder / "wheels"), folder / "cache", monkeypatch)
        return {version: prepare(parse_side(f"gaugeprobe=={version}")) for version in ("1.0", "2.0")}


# Requirements


@pytest.mark.parametrize(
    ("text", "requirements"),
    [
        ("", ()),
        (" . ", ()),
        ("peft==0.20.0", ("peft==0.20.0",)),
        ("transformers<5 peft==0.20.0", ("peft==0.20.0", "transformers<5")),
        ("transformers<5,peft==0.20.0", ("peft==0.20.0", "transformers<5")),
        ("peft>=0.18,<0.20", ("peft<0.20,>=0.18",)),
        ("peft >= 0.18, < 0.20, accelerate", ("accelerate", "peft<0.20,>=0.18")),
        ("datasets[audio,vision]==5.0 peft", ("datasets[audio,vision]==5.0", "peft")),
        ("peft @ https://example.org/peft.whl accelerate", ("accelerate", "peft@ https://example.org/peft.whl")),
    ],
)
def test_requirements_are_read_as_pip_reads_them(text: str, requirements: tuple[str, ...]) -> None:
    side = parse_side(text)
    assert tuple(each.replace("peft @ ", "peft@ ") for each in side.requirements) == requirements
    assert parse_side(side.name if side.requirements else "") == side


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("peft=0.20", "'peft=0.20' is not a valid requirement"),
        ("==0.20", "'==0.20' is not a valid requirement"),
        ("peft==", "'peft==' is not a valid requirement"),
        ("peft==0.20 PEFT<1", "names PEFT twice"),
        ("peft; python_version<'4'", "markers after ';' are not supported"),
        ("peft-gauge==0.1", "peft-gauge measures both sides and cannot be compared itself"),
    ],
)
def test_what_is_no_requirement_is_one_line(text: str, said: str) -> None:
    with pytest.raises(GaugeError) as caught:
        parse_side(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "pinned"),
    [("", True), ("peft==0.20", True), ("peft==0.*", False), ("peft<1", False), ("peft==1 trl", False)],
)
def test_a_pinned_side_means_the_same_tomorrow(text: str, pinned: bool) -> None:
    assert parse_side(text).is_pinned is pinned


def test_ranges() -> None:
    low, high = parse_range("0.46.0..0.50.2")
    assert (str(low), str(high)) == ("0.46.0", "0.50.2")
    for text in ("0.46.0", "a..b", "0.46.0..", "0.46.0...0.50"):
        with pytest.raises(GaugeError, match="is not a valid range"):
            parse_range(text)
    with pytest.raises(GaugeError, match="must be older"):
        parse_range("2..1")


def test_a_library_is_a_name_alone() -> None:
    assert parse_library("Nvidia_ML.py") == "nvidia-ml-py"
    for text in ("peft==1", "a b", "peft[x]", ""):
        with pytest.raises(GaugeError, match="library name|library's name"):
            parse_library(text)


# What pip builds


def test_an_overlay_holds_what_differs_and_nothing_else(built: dict[str, Environment]) -> None:
    found = built["2.0"]
    assert found.packages == {"gaugeprobe": "2.0", "gaugehelper": "1.0"}
    assert found.folder is not None
    assert sorted(path.name for path in found.folder.iterdir()) == [
        "gaugehelper",
        "gaugehelper-1.0.dist-info",
        "gaugeprobe",
        "gaugeprobe-2.0.dist-info",
        "peft-gauge.json",
    ]
    assert json.loads((found.folder / "peft-gauge.json").read_text()) == found.packages
    assert [path.name for path in found.folder.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_an_overlay_is_built_once(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    side = parse_side("gaugeprobe==1.0")
    told: list[str] = []
    first = prepare(side, say=told.append)
    assert told == ["resolving gaugeprobe==1.0", "installing gaugeprobe 1.0"]
    monkeypatch.setattr(build, "_pip", lambda *arguments: pytest.fail("pip was asked again"))
    assert prepare(side) == first
    base = build.installed()
    monkeypatch.setattr(build, "installed", lambda: base | {"numpy": "0"})
    with pytest.raises(pytest.fail.Exception):
        prepare(side)  # another base may need another overlay


@pytest.mark.slow
def test_a_range_is_resolved_anew(wheels: Path) -> None:
    side = parse_side("gaugeprobe<3")
    assert prepare(side).packages["gaugeprobe"] == "2.0"
    make_wheel(wheels, "2.9")
    found = prepare(side)
    assert found.packages == {"gaugeprobe": "2.9"}
    assert found.folder is not None
    assert not (found.folder / "gaugehelper").exists()


def test_what_is_installed_needs_no_overlay(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_pip", lambda *arguments: pytest.fail("pip was asked"))
    version = build.installed()["peft"]
    for text in ("", ".", f"peft=={version}", "peft>=0.18 torch"):
        assert prepare(parse_side(text)).folder is None


def test_installed_libraries_stay_where_they_fit(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip is given what a case imports, and keeps what is installed of it."""
    monkeypatch.setattr(build, "MEASURED", ("pytest-benchmark",))
    assert prepare(parse_side("gaugeprobe==1.0")).packages == {"gaugeprobe": "1.0"}


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("gaugeprobe==9.0", NoEnvironment, "gaugeprobe==9.0 cannot be resolved: No matching distribution found"),
        ("gaugeprobe==3.0", NoEnvironment, "gaugemissing"),
        ("torch==1.0", GaugeError, "torch==1.0 differs from the installed torch"),
        ("gaugetorch==1.0", NoEnvironment, "gaugetorch==1.0 cannot be resolved: "),
    ],
)
def test_what_cannot_be_built_is_one_line(text: str, kind: type, said: str, wheels: Path) -> None:
    with pytest.raises(kind) as caught:
        prepare(parse_side(text))
    assert type(caught.value) is kind
    assert said in str(caught.value)
    assert "ERROR" not in str(caught.value)
    assert list(build.overlays().glob("*")) == []


def test_a_broken_wheel_leaves_nothing_behind(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = build.Package("gaugeprobe", "1.0", "gaugeprobe==1.0")
    monkeypatch.setattr(build, "_resolve", lambda *arguments: [package])
    (wheels / "gaugeprobe-1.0-py3-none-any.whl").write_bytes(b"no zip")
    with pytest.raises(NoEnvironment, match="gaugeprobe==1.0 does not install: "):
        prepare(parse_side("gaugeprobe==1.0"))
    assert list(build.overlays().iterdir()) == []


def test_without_a_network_the_releases_are_not_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setattr(build, "_RETRIES", "1")
    with pytest.raises(GaugeError, match="the package index does not respond; check the network") as caught:
        build.releases("peft")
    assert not isinstance(caught.value, NoEnvironment)


def test_without_pip_it_says_how_to_get_it(wheels: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    monkeypatch.setattr(sys, "executable", str(bare / "bin" / "python"))
    with pytest.raises(GaugeError, match="this Python has no pip; run: python -m ensurepip"):
        build.releases("peft")


def test_releases_are_sorted_and_without_pre_releases(wheels: Path) -> None:
    make_wheel(wheels, "10.0")
    assert [str(version) for version in build.releases("gaugeprobe")] == ["1.0", "2.0", "3.0", "10.0"]
    with pytest.raises(NoEnvironment, match="the releases of nosuchlibrary cannot be listed"):
        build.releases("nosuchlibrary")


def test_a_direct_reference_is_installed_from_where_it_points() -> None:
    entry: dict[str, Any] = {"metadata": {"name": "Peft", "version": "1.0.dev0"}, "is_direct": True}
    entry["download_info"] = {"url": "https://example.org/peft", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
    assert build._package(entry).source == "peft @ git+https://example.org/peft@abc"
    entry["download_info"] = {"url": "file:///peft.whl", "archive_info": {}}
    assert build._package(entry).source == "peft @ file:///peft.whl"
    assert build._package(entry | {"is_direct": False}).source == "Peft==1.0.dev0"


# Children


def test_a_child_imports_what_its_side_asks_for(built: dict[str, Environment]) -> None:
    with Worker(built["2.0"], program=CHILD) as child:
        assert child.start()["libraries"]["gaugeprobe"] == "2.0"
        assert child.describe(CASE)["trainable_params"] == 10
        assert 0.01 < child.step() < 0.015
    with Worker(INSTALLED, program=CHILD) as child:
        assert child.start()["libraries"]["gaugeprobe"] is None


def test_a_version_that_is_not_the_one_asked_for_is_an_error(built: dict[str, Environment]) -> None:
    one = built["1.0"]
    for side, packages, said in (
        ("gaugeprobe==2.0", {}, "gaugeprobe==2.0 is required, but gaugeprobe 1.0 is found"),
        ("gaugeprobe==1.0", {"gaugeprobe": "2.0"}, "installed gaugeprobe 2.0, but 1.0 comes first on the path"),
        ("gaugeabsent", {}, "gaugeabsent is required, but gaugeabsent is missing is found"),
    ):
        with (
            Worker(Environment(parse_side(side), one.folder, packages), program=CHILD) as child,
            pytest.raises(NoEnvironment) as caught,
        ):
            child.start()
        assert said in str(caught.value)


def test_modules_must_come_from_where_their_metadata_is(
    built: dict[str, Environment], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = built["1.0"]
    monkeypatch.syspath_prepend(str(found.folder))
    worker.check_imports({"gaugeprobe": "1.0"})  # not imported, so nothing is wrong
    module = type(sys)("gaugeprobe")
    monkeypatch.setitem(sys.modules, "gaugeprobe", module)
    module.__file__ = str(Path(str(found.folder)) / "gaugeprobe" / "__init__.py")
    worker.check_imports({"gaugeprobe": "1.0"})
    module.__file__ = "/elsewhere/gaugeprobe/__init__.py"
    with pytest.raises(GaugeError, match="gaugeprobe was imported from /elsewhere"):
        worker.check_imports({"gaugeprobe": "1.0"})


@pytest.mark.parametrize(
    ("fails", "outcome", "reason"),
    [
        ("build", "failed", "this release cannot build the case"),
        ("step", "crashed", "ValueError: no such kernel"),
        ("die", "crashed", "ended with exit code 7; last output: last words"),
        ("hang", "timed-out", "did not step within 0.5 s"),
    ],
)
def test_how_a_child_fails_is_told(
    fails: str, outcome: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gaugeprobe.py").write_text(f"FACTS = {{'fails': {fails!r}}}")
    monkeypatch.setattr(worker, "STEP_SECONDS", 0.5)
    with Worker(Environment(Side(()), tmp_path, {}), program=CHILD) as child:
        child.start()
        with pytest.raises(WorkerFailed) as caught:
            build_and_step(child)
    assert (caught.value.outcome, caught.value.reason) == (outcome, reason)


def build_and_step(child: Worker) -> None:
    child.build(CASE)
    child.step()


def test_a_child_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        Worker(INSTALLED, program="tests.nosuchprogram") as child,
        pytest.raises(NoEnvironment, match="as installed: ended with exit code 1; last output: .*nosuchprogram"),
    ):
        child.start()


def test_no_child_outlives_its_context() -> None:
    pids = []

    def work() -> None:
        with Worker(INSTALLED, program=CHILD) as child:
            pids.append(child.start()["pid"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert not is_alive(pids[0])


def test_no_child_outlives_a_killed_parent() -> None:
    code = (
        "import time\nfrom peft_gauge.environments.worker import Worker\n"
        "from tests.integration.test_environments import CHILD, INSTALLED\n"
        "child = Worker(INSTALLED, program=CHILD)\nprint(child.start()['pid'], flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text() if Path("/proc").exists() else True


def test_both_sides_can_share_a_core() -> None:
    cores = worker.quietest_cores(1)
    if cores is None:
        pytest.skip("one core, or no way to choose one")
    assert len(cores) == 1
    assert cores <= os.sched_getaffinity(0)
    assert worker.quietest_cores(len(os.sched_getaffinity(0))) is None


@pytest.mark.slow
def test_the_real_child_steps_on_one_thread() -> None:
    """The one test here with torch in it: a real job is built, its step fingerprinted and timed."""
    cores = worker.quietest_cores(1)
    with Worker(INSTALLED, threads=1, cores=cores) as child:
        machine = child.start(also=["tokenizers", "gaugeabsent"])
        metrics = child.describe(CASE)
        child.build(CASE)
        assert child.step() > 0
        status = Path(f"/proc/{child.pid}/status")
        allowed = status.read_text() if status.exists() else ""
    assert machine["threads"] == 1
    for name in ("peft", "tokenizers"):
        assert machine["libraries"][name] == build.installed()[name]
    assert machine["libraries"]["gaugeabsent"] is None
    assert metrics["settings"]["batch"] == 1
    record = metrics["fingerprint"]
    assert metrics["trainable_params"] == record["trainable"]["total"] > 0
    assert metrics["flops_per_step"] == sum(sum(each.values()) for each in record["flops"].values()) > 0
    assert metrics["allocated_peak_bytes"] == record["peak_bytes"]["total"] > 0
    if cores is not None and allowed:
        assert f"Cpus_allowed_list:\t{min(cores)}\n" in allowed


# What is kept


def test_finished_parts_are_kept_until_all_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_GAUGE_CACHE", str(tmp_path))
    kept = Kept("ab", {"a": 1})
    kept.put("lora", {"x": [1.5]})
    assert Kept("ab", {"a": 1}).get("lora") == {"x": [1.5]}
    assert Kept("ab", {"a": 2}).get("lora") is None
    kept.forget()
    assert Kept("ab", {"a": 1}).get("lora") is None
    assert list((tmp_path / "ab").iterdir()) == []


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_state_file_is_named(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_GAUGE_CACHE", str(tmp_path))
    kept = Kept("ab", 1)
    kept.put("x", 1)
    kept.path.write_text(text)
    with pytest.raises(GaugeError, match="remove it to start over"):
        Kept("ab", 1)
