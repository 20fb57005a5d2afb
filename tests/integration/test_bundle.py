"""Bundles for a node without network: what goes in, what stays out, and run.sh, which is run here by this Python.

Packages are wheels of a few hundred bytes in a folder that is all that pip knows, and the project is a toy of its own.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from peft_gauge import paths
from peft_gauge.bundle import collection, on_node, requirements, selection
from peft_gauge.bundle.checkout import find_checkout
from peft_gauge.bundle.collection import Bundle, Wanted, collect
from peft_gauge.bundle.installed import comes_with_torch, parse_having
from peft_gauge.bundle.requirements import OPTIONAL, Project, read_project
from peft_gauge.bundle.resolution import Pip, Release
from peft_gauge.bundle.target import Target, parse_target
from peft_gauge.errors import GaugeError
from peft_gauge.history.writer import bundled_commit
from tests.support.facts import lacking

if TYPE_CHECKING:
    from tests.conftest import Run

HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
PLATFORM_HERE = f"manylinux_2_17_{platform.machine()}"
PYTHON_312 = Target((3, 12, None))
NEEDS = (
    "torch>=2.6",
    "packaging>=23",
    "gaugeone>=1",
    "gaugenew; python_version >= '3.12'",
    "gaugeold; python_version < '3.12'",
    "gaugewin; sys_platform == 'win32'",
    "gaugextra; extra == 'test'",
    "gaugedraw>=2; extra == 'report'",
    "gaugebig; extra == 'report'",
    "gaugetool; extra == 'dev'",
)


def make_wheel(
    folder: Path, name: str, version: str, requires: Iterable[str] = (), *, tag: str = "py3-none-any", size: int = 0
) -> Path:
    """A wheel of ``name``, whose module knows its VERSION, in ``folder``; ``size``: bytes that do not compress."""
    info = f"{name}-{version}.dist-info"
    described = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    described += [f"Provides-Extra: {extra}" for each in requires for extra in re.findall(r"extra == '(\w+)'", each)]
    files = {
        f"{name}/__init__.py": f"VERSION = {version!r}\n",
        f"{name}/data": "x" * size,
        f"{info}/METADATA": "\n".join([*described, *(f"Requires-Dist: {each}" for each in requires), ""]),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as wheel:  # stored, not compressed
        for inside, text in [*files.items(), (f"{info}/RECORD", record)]:
            wheel.writestr(inside, text)
    return path


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that pip can find."""
    folder = tmp_path_factory.mktemp("index")
    one = ["gaugedeep; python_version >= '3.12'", "gaugeshallow; python_version < '3.12'", "torch", "gaugehub[fast]"]
    make_wheel(folder, "gaugeone", "1.0", ["gaugebase>=1", *one])
    make_wheel(folder, "gaugeone", "2.0", ["gaugebase>=2", *one])
    make_wheel(folder, "gaugeone", "3.0", ["gaugebase>=2", *one], tag="cp39-cp39-manylinux_2_17_x86_64")  # not for us
    for version in ("1.5", "2.5"):
        make_wheel(folder, "gaugebase", version, ["gaugeunder"])
    make_wheel(folder, "gaugehub", "1.0", ["gaugeunder", "gaugefast>=1; extra == 'fast'"])
    make_wheel(folder, "gaugebound", "1.0", ["gaugebase>=2"])
    make_wheel(folder, "gaugecuda", "1.0", ["nvidia-cublas-cu13"])
    for name in (
        "gaugedeep",
        "gaugeshallow",
        "gaugeunder",
        "gaugefast",
        "gaugenew",
        "gaugeold",
        "gaugewin",
        "gaugetool",
    ):
        make_wheel(folder, name, "1.0")
    make_wheel(folder, "gaugextra", "1.0", ["gaugeunder"], size=20_000)
    make_wheel(folder, "gaugedraw", "2.0", size=30_000)
    make_wheel(folder, "gaugebig", "1.0", size=40_000)
    return folder


def a_project(*requirements: str) -> Project:
    return Project("0.1", SpecifierSet(">=3.11"), tuple(map(Requirement, requirements or NEEDS)))


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, index: Path) -> Callable[..., None]:
    """The toy project in place of this one, ``index`` in place of PyPI; call it for other requirements."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(collection, "_torch_needs", list)

    def needing(*requirements: str) -> None:
        monkeypatch.setattr(collection, "read_project", lambda: a_project(*requirements))

    needing()
    return needing


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """What pip said before: it takes most of a second to say it again."""
    return {}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any], index: Path) -> None:
    """Ask pip each benchmark once in this module, and copy wheels instead of downloading them.

    For tests of what is made of pip's answers; others look at pip itself.
    """
    resolve = Pip.resolve

    def remember(self: Pip, requirements: Sequence[Requirement], known: dict[str, Version]) -> dict[str, Release]:
        key = repr((self.target, *map(str, requirements), *sorted(known.items())))
        if key not in answers:
            answers[key] = resolve(self, requirements, known)
        return dict(answers[key])

    def copy(self: Pip, releases: Sequence[Release], folder: Path) -> dict[str, Path]:
        files = {each.name: f"{each.name.replace('-', '_')}-{each.version}-py3-none-any.whl" for each in releases}
        return {name: Path(shutil.copy(index / file, folder)) for name, file in files.items()}

    monkeypatch.setattr(Pip, "resolve", remember)
    monkeypatch.setattr(Pip, "download", copy)


def bundle(tmp_path: Path, *have: str, python: str = "3.12", **more: Any) -> Bundle:
    """A bundle in ``tmp_path`` for a node that has torch, packaging and ``have``, by a file: that is all it has."""
    listed = tmp_path / "node.txt"
    listed.write_text("\n".join(["torch==2.11.0+cu130", "packaging==26.4", *have]))
    wanted = {"platform": "x86_64", "checkout": False, **more}
    return collect(Wanted(python=python, have=(f"@{listed}",), out=tmp_path / "bundle", **wanted))


def wheels(made: Bundle) -> dict[str, str]:
    """Name -> version, of the manifest, which agrees with the folder."""
    entries = made.manifest["wheels"]
    assert sorted(each["file"] for each in entries) == sorted(
        path.relative_to(made.folder).as_posix() for path in (made.folder / "wheels").iterdir()
    )
    return {each["name"]: each["version"] for each in entries}


CORE_312 = {
    "gaugeone": "2.0", "gaugebase": "2.5", "gaugeunder": "1.0", "gaugedeep": "1.0", "gaugehub": "1.0",
    "gaugefast": "1.0", "gaugenew": "1.0",
}  # fmt: skip
EXTRAS = {"gaugextra": "1.0", "gaugedraw": "2.0", "gaugebig": "1.0"}


# The node ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("python", "platform_", "target"),
    [
        ("3.12", "manylinux_2_28_x86_64", Target((3, 12, None), 28, "x86_64")),
        ("3.13.2", "aarch64", Target((3, 13, 2), 28, "aarch64")),
        ("3.11", "manylinux2014_x86_64", Target((3, 11, None), 17, "x86_64")),
        ("3.11", "linux_x86_64", Target((3, 11, None), 28, "x86_64")),
    ],
)
def test_a_target_is_read(python: str, platform_: str, target: Target) -> None:
    assert parse_target(python, platform_, SpecifierSet(">=3.11")) == target


def test_markers_and_tags_are_the_targets() -> None:
    target = Target((3, 12, 4), 17, "aarch64")
    assert target.markers()["python_full_version"] == "3.12.4"
    assert target.markers()["platform_machine"] == "aarch64"
    assert target.platform_tags() == ["manylinux_2_17_aarch64", "manylinux2014_aarch64", "linux_aarch64"]
    tags = PYTHON_312.platform_tags()
    assert (tags[0], tags[-2], tags[-1]) == ("manylinux_2_28_x86_64", "manylinux1_x86_64", "linux_x86_64")
    assert tags.index("manylinux_2_24_x86_64") < tags.index("manylinux2014_x86_64")


def test_a_marker_environment_says_everything() -> None:
    """What it did not say would be asked of this interpreter."""
    from packaging.markers import default_environment

    assert PYTHON_312.markers().keys() == default_environment().keys()


# What it has ---------------------------------------------------------------------------------------------------------


def test_names_come_with_or_without_versions() -> None:
    having = parse_having(["torch==2.11.0+cu130, Nvidia_ML.py", "peft,"])
    assert having.versions == {"torch": Version("2.11.0+cu130"), "nvidia-ml-py": None, "peft": None}
    assert having.named == {"torch", "nvidia-ml-py", "peft"}
    assert having.known() == {"torch": Version("2.11.0+cu130")}


def test_a_list_may_be_longer_than_a_file_name() -> None:
    names = [f"package{number:03}" for number in range(100)]
    assert parse_having([",".join(["torch==2.11.0", *names])]).versions.keys() == {"torch", *names}


def test_a_file_is_what_pip_prints(tmp_path: Path) -> None:
    file = tmp_path / "node.txt"
    file.write_text(
        "\ufeff# by hand\n"
        "torch @ file:///opt/torch-2.9.0a0%2B50eac81-cp312-cp312-linux_x86_64.whl#sha256=00\n"
        "numpy @ file:///croot/work\n"
        "-e git+https://example.org/x@abc#egg=mine\n"
        "-e /home/me/other\n"
        "--extra-index-url https://example.org\n"
        "PyYAML==6.0.4\n"
        "oddity===not.a.version\n"
        "bare\n"
        "peft-gauge==0.1.0\n"
    )
    for entry in (f"@{file}", str(file)):
        having = parse_having([entry])
        assert having.versions == {
            "torch": Version("2.9.0a0+50eac81"),
            "pyyaml": Version("6.0.4"),
            **dict.fromkeys(("numpy", "mine", "oddity", "bare")),
        }
        assert having.named == frozenset()


@pytest.mark.parametrize(
    ("name", "never"),
    [
        ("torch", True), ("torchvision", True), ("triton", True), ("nvidia-cublas-cu13", True), ("nvidia-cudnn", True),
        ("cuda-toolkit", True), ("nvidia-ml-py", False), ("torchmetrics", False), ("peft", False),
    ],
)  # fmt: skip
def test_cuda_comes_with_torch_and_its_management_library_does_not(name: str, never: bool) -> None:
    assert comes_with_torch(name) is never


# What the project needs ----------------------------------------------------------------------------------------------


def test_the_real_project_says_what_it_needs() -> None:
    project = read_project()
    core = {each.name for each in project.core(PYTHON_312.markers())}
    assert {"torch", "bitsandbytes", "datasets", "gguf", "platformdirs", "nvidia-ml-py", "pytest"} <= core
    optional = {name: {each.name for each in found} for name, found in project.optional(PYTHON_312.markers()).items()}
    assert optional == {"test": {"pytest-xdist"}, "report": {"altair", "vl-convert-python"}}
    assert optional.keys() == OPTIONAL.keys()
    assert {each.name for each in project.extra("dev", PYTHON_312.markers())} >= {"ruff", "altair", "pytest-xdist"}


def test_an_installed_package_says_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    in_checkout = read_project()
    monkeypatch.setattr(paths, "PROJECT", tmp_path)
    installed = read_project()
    environment = PYTHON_312.markers()
    assert {*map(str, installed.core(environment))} == {*map(str, in_checkout.core(environment))}
    assert {each.name for each in installed.extra("report", environment)} == {"altair", "vl-convert-python"}
    assert installed.requires_python == in_checkout.requires_python


# What goes in --------------------------------------------------------------------------------------------------------


def test_a_bundle_holds_what_the_node_lacks(tmp_path: Path) -> None:
    made = bundle(tmp_path)
    assert wheels(made) == CORE_312 | EXTRAS
    assert made.size == sum(path.stat().st_size for path in made.folder.rglob("*") if path.is_file())
    by = {each["name"]: each["needed_by"] for each in made.manifest["wheels"]}
    assert by["gaugeone"] == ["peft-gauge"]
    assert by["gaugedraw"] == ["peft-gauge[report]"]
    assert by["gaugeunder"] == ["gaugebase", "gaugehub", "gaugextra"]
    assert made.manifest["left_out"] == []
    assert json.loads((made.folder / "manifest.json").read_text()) == json.loads(json.dumps(made.manifest))


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_markers_are_evaluated_for_the_node_at_every_depth(tmp_path: Path) -> None:
    """Whatever Python this is, one of the two is another."""
    old = bundle(tmp_path, python="3.11")
    assert wheels(old).keys() >= {"gaugeold", "gaugeshallow"}
    assert not wheels(old).keys() & {"gaugenew", "gaugedeep", "gaugewin"}
    new = bundle(tmp_path, python="3.12")
    assert wheels(new).keys() >= {"gaugenew", "gaugedeep"}
    assert not wheels(new).keys() & {"gaugeold", "gaugeshallow", "gaugewin"}


@pytest.mark.usefixtures("quick")
def test_what_the_node_has_is_not_fetched_and_the_rest_fits_it(tmp_path: Path) -> None:
    made = bundle(tmp_path, "gaugebase==1.5", "gaugeunder==0.1", "gaugedraw", "gaugebig", "gaugextra")
    assert wheels(made) == {
        name: version for name, version in CORE_312.items() if name not in ("gaugebase", "gaugeunder")
    } | {"gaugeone": "1.0"}
    assert made.manifest["have"]["gaugebase"] == "1.5"


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_an_extra_of_what_the_node_has_is_looked_up(tmp_path: Path) -> None:
    """A node with gaugehub does not have to have what gaugehub[fast] needs besides."""
    made = bundle(tmp_path, "gaugehub==1.0")
    assert "gaugefast" in wheels(made)
    assert "gaugehub" not in wheels(made)
    (fast,) = [each for each in made.manifest["wheels"] if each["name"] == "gaugefast"]
    assert fast["needed_by"] == ["gaugehub[fast]"]


def named(tmp_path: Path, *have: str) -> Bundle:
    """A bundle for a node of which ``have`` is named, and packaging is in a file."""
    (tmp_path / "some.txt").write_text("packaging==26.4\n")
    return collect(Wanted("3.12", "x86_64", (*have, f"@{tmp_path / 'some.txt'}"), tmp_path / "bundle", checkout=False))


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "base", ["gaugebase", *(pytest.param(f"gaugebase=={v}", marks=pytest.mark.slow) for v in ("2.5", "2.7+node"))]
)
def test_a_named_package_stands_for_what_it_needs(base: str, tmp_path: Path) -> None:
    """In a version that no index has, too: then the newest one says. A file stands for itself alone."""
    made = named(tmp_path, "torch==2.11.0", base)
    assert not wheels(made).keys() & {"gaugebase", "gaugeunder"}
    assert "gaugeunder" in made.manifest["have"]
    assert made.notes == ()
    assert "gaugeunder" in wheels(bundle(tmp_path, base if "==" in base else "gaugebase @ file:///x"))


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_named_package_that_no_index_has_costs_the_others_nothing(tmp_path: Path) -> None:
    made = named(tmp_path, "torch==2.11.0", "ours==1.0,gaugebase")
    assert not wheels(made).keys() & {"gaugebase", "gaugeunder"}
    (note,) = made.notes
    assert note.startswith("the dependencies of ours==1.0 could not be resolved")


@pytest.mark.usefixtures("quick")
def test_what_torch_needs_is_there_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["gaugebase", "nvidia-cublas; sys_platform == 'linux'", "gaugenowhere; os_name == 'nt'"]
    monkeypatch.setattr(collection, "_torch_needs", lambda: list(map(Requirement, needed)))
    made = named(tmp_path, "torch==2.11.0")
    assert not wheels(made).keys() & {"gaugebase", "gaugeunder"}
    assert made.notes == ()


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_torch_without_a_version_is_taken_to_be_the_one_here(tmp_path: Path) -> None:
    made = named(tmp_path, "torch")
    assert made.manifest["have"]["torch"] == Version(metadata.version("torch")).public
    assert any("--have torch==VERSION" in note for note in made.notes)


@pytest.mark.usefixtures("quick")
def test_cuda_is_never_fetched(tmp_path: Path, toy: Callable[..., None], index: Path) -> None:
    make_wheel(index, "nvidia_cublas_cu13", "1.0")
    toy("torch>=2.6", "gaugecuda")
    made = bundle(tmp_path)
    assert wheels(made) == {"gaugecuda": "1.0"}
    (note,) = made.notes
    assert lacking(note, "gaugecuda needs nvidia-cublas-cu13", "install it on the node") == []


@pytest.mark.slow
def test_a_mirror_can_be_named(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch, run_command: Run) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    have = ["--have", "torch==2.11,packaging==26", "--have", "gaugeone==1,gaugenew==1"]
    out = tmp_path / "bundle"
    options = ["--python", "3.12", *have, "--out", str(out), "--no-checkout"]
    code, said, told = run_command("bundle", *options, "--find-links", str(index))
    assert code == 0, told
    assert "gaugextra 1.0 (for peft-gauge[test])" in said
    assert "sh bundle/run.sh" in said


@pytest.mark.usefixtures("quick")
def test_the_contents_have_the_same_values_in_every_form(tmp_path: Path, run_command: Run) -> None:
    whole = bundle(tmp_path)
    limit = f"{(whole.size - 1) / 1e6}"
    options = ["--python", "3.12", "--platform", "x86_64", "--have", f"@{tmp_path / 'node.txt'}", "--no-checkout"]

    def printed(*form: str) -> str:
        code, out, err = run_command("bundle", *options, "--most-megabytes", limit, "-o", str(whole.folder), *form)
        assert code == 0, err
        return out

    made = json.loads(printed("--json"))
    manifest = json.loads((whole.folder / "manifest.json").read_text())
    contents = made["contents"]
    by_size = sorted(manifest["wheels"], key=lambda each: -each["bytes"])
    wheels_of = [(each["name"], each["version"], each["bytes"]) for each in contents if each["content"] == "wheel"]
    assert wheels_of == [(each["name"], each["version"], each["bytes"]) for each in by_size]
    (left,) = [each for each in contents if each["content"] == "left out"]
    assert (left["name"], left["bytes"]) == ("extra report", manifest["left_out"][0]["bytes"])
    assert lacking(left["remark"], "gaugebig 1.0", "gaugedraw 2.0", OPTIONAL["report"]) == []
    assert made["bytes"] == sum(path.stat().st_size for path in whole.folder.rglob("*") if path.is_file())

    rows = list(csv.DictReader(io.StringIO(printed("--csv"))))
    as_text = [{name: "" if value is None else str(value) for name, value in each.items()} for each in contents]
    assert rows == as_text
    heading, _, *lines = printed("--markdown").splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert heading.strip("| ").split(" | ") == list(contents[0])
    assert [[row[0], row[1], row[3]] for row in cells] == [
        [each["content"], each["name"], f"{each['bytes']:,}"] for each in contents
    ]
    shown = printed()
    assert lacking(shown, *(f"{each['bytes'] / 1e6:.2f} MB" for each in contents), f"left out: {left['name']}") == []


# The limit -----------------------------------------------------------------------------------------------------------


def test_the_extra_that_saves_most_is_left_out_first() -> None:
    sizes = {"a": 10, "b": 5, "c": 3, "d": 4, "e": 4}
    optional = {"test": ["a", "b"], "report": ["a", "d", "e"]}
    assert selection.fit(["a"], optional, sizes, 23, lambda extras: 0) == ["test", "report"]
    assert selection.fit(["a"], optional, sizes, 22, lambda extras: 0) == ["test"]
    assert selection.fit(["a"], optional, sizes, 14, lambda extras: 0) == []
    assert selection.fit(["a"], optional, sizes, 22, lambda extras: 8) == []


@pytest.mark.usefixtures("quick")
def test_what_is_left_out_is_named_with_size_and_loss(tmp_path: Path) -> None:
    whole = bundle(tmp_path)
    made = bundle(tmp_path, most_megabytes=(whole.size - 1) / 1e6)
    assert wheels(made) == CORE_312 | {"gaugextra": "1.0"}
    (left,) = made.manifest["left_out"]
    assert left["extra"] == "report"
    assert left["wheels"] == ["gaugebig 1.0", "gaugedraw 2.0"]
    assert left["bytes"] == sum(
        each["bytes"] for each in whole.manifest["wheels"] if each["name"] in ("gaugebig", "gaugedraw")
    )
    assert left["without"] == OPTIONAL["report"]
    assert {extra for _, extra in made.manifest["requirements"]} == {"", "test"}
    least = bundle(tmp_path, most_megabytes=(made.size - 1) / 1e6)
    assert wheels(least) == CORE_312
    assert [each["extra"] for each in least.manifest["left_out"]] == ["test", "report"]


@pytest.mark.usefixtures("quick")
def test_a_limit_below_what_is_needed_names_the_smallest_that_works(tmp_path: Path) -> None:
    with pytest.raises(GaugeError, match="do not fit into 0.001 MB") as caught:
        bundle(tmp_path, most_megabytes=0.001)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["node.txt"]
    (named,) = re.findall(r"--most-megabytes ([\d.]+)", str(caught.value))
    made = bundle(tmp_path, most_megabytes=float(named))
    assert made.size <= float(named) * 1e6
    with pytest.raises(GaugeError, match="do not fit"):
        bundle(tmp_path, most_megabytes=float(named) - 0.1 or 0.001)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_an_extra_that_cannot_be_had_costs_nothing_else(tmp_path: Path, toy: Callable[..., None]) -> None:
    toy("torch>=2.6", "gaugeunder", "gaugextra; extra == 'test'", "gaugenowhere; extra == 'report'")
    made = bundle(tmp_path)
    assert wheels(made) == {"gaugeunder": "1.0", "gaugextra": "1.0"}
    (left,) = made.manifest["left_out"]
    assert (left["extra"], left["bytes"]) == ("report", None)
    assert "gaugenowhere" in left["why"]
    toy("torch>=2.6", "gaugeunder", "gaugedraw>=2; extra == 'report'")
    (left,) = bundle(tmp_path, "gaugedraw==1.0").manifest["left_out"]
    assert "the node has gaugedraw 1.0" in left["why"]


# Bad input -----------------------------------------------------------------------------------------------------------

FOR = ["--python", "3.12"]
HAVE = ["--have", "torch==2.11.0,packaging==26.4"]


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (["--python", "3.10", *HAVE], ["Python 3.10", ">=3.11"]),
        (["--python", "2.7", *HAVE], ["Python 2.7", ">=3.11"]),
        (["--python", "312", *HAVE], ["--python '312'", "3.12"]),
        (["--python", "py3", *HAVE], ["--python 'py3'", "3.12"]),
        ([*FOR, *HAVE, "--platform", "win_amd64"], ["unknown platform 'win_amd64'"]),
        ([*FOR, *HAVE, "--platform", "manylinux_2_28_ppc64"], ["unknown platform 'manylinux_2_28_ppc64'"]),
        ([*FOR, *HAVE, "--platform", "manylinux_2_5_aarch64"], ["glibc 2.5 on aarch64"]),
        ([*FOR], ["never includes torch"]),
        ([*FOR, "--have", "packaging"], ["never includes torch"]),
        ([*FOR, "--have", "torch>=2.6"], ["--have 'torch>=2.6'", "NAME==VERSION"]),
        ([*FOR, "--have", "torch=="], ["--have 'torch=='", "NAME==VERSION"]),
        ([*FOR, "--have", "torch==new"], ["--have 'torch==new'", "'new'"]),
        ([*FOR, "--have", "torch,-peft"], ["--have '-peft'", "NAME==VERSION"]),
        ([*FOR, "--have", ","], ["--have ','", "no package"]),
        ([*FOR, *HAVE, "--have", "torch==2.10"], ["--have", "torch", "2.11.0 and 2.10"]),
        ([*FOR, "--have", "@nowhere.txt"], ["--have nowhere.txt", "No such file"]),
        ([*FOR, "--have", "torch==2.5.1"], ["torch 2.5.1", "torch>=2.6"]),
        ([*FOR, *HAVE, "--have", "gaugeone==0.9"], ["gaugeone 0.9", "gaugeone>=1"]),
        ([*FOR, *HAVE, "--most-megabytes", "0"], ["--most-megabytes", "positive", "got 0"]),
        ([*FOR, *HAVE, "--most-megabytes", "nan"], ["--most-megabytes", "positive", "got nan"]),
        ([*FOR, *HAVE, "--no-checkout", "--out", "/proc/bundle"], ["cannot write /proc/bundle: "]),
        ([*FOR, *HAVE, "--out", "file"], ["file is a file", "--out"]),
        ([*FOR, *HAVE, "--no-checkout", "--out", "file/bundle"], ["cannot write "]),
        ([*FOR, *HAVE, "--out", "full"], ["contains notes"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(
    options: list[str], facts: list[str], run_command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run_command("bundle", *options)
    assert (code, out) == (2, "")
    assert err.startswith("peft-gauge: ")
    assert err.count("\n") == 1
    assert lacking(err, *facts) == []
    assert sorted(tmp_path.rglob("*")) == before


def last_line(text: str) -> str:
    return text.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        (
            "Package Version\n------- -------\ntorch 2.11.0\n",
            ["line 1: 'Package Version'", "python -m pip list"],
        ),
        (
            "torch==2.11\nnumpy=1.2=py312\n",
            ["line 2: 'numpy=1.2=py312'", "python -m pip list --format=freeze"],
        ),
        ("# nothing\n\n", ["no package", "python -m pip list --format=freeze > FILE"]),
    ],
)
def test_a_file_of_another_kind_is_told_by_its_line(text: str, facts: list[str], tmp_path: Path) -> None:
    (tmp_path / "node.txt").write_text(text)
    with pytest.raises(GaugeError) as caught:
        parse_having([f"@{tmp_path / 'node.txt'}"])
    assert lacking(str(caught.value), *facts) == []


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "node.txt").write_text("torch==2.11.0\n", encoding="utf-16")
    with pytest.raises(GaugeError, match="is not valid UTF-8"):
        parse_having([f"@{tmp_path / 'node.txt'}"])


def test_without_a_network_it_says_so(run_command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setattr("peft_gauge._internals.pip.RETRIES", "1")
    (tmp_path / "node.txt").write_text("torch==2.11.0\npackaging==26.4\n")
    options = ["--python", "3.12", "--have", f"@{tmp_path / 'node.txt'}", "--no-checkout", "--out", str(tmp_path / "b")]
    code, out, err = run_command("bundle", *options, "--index-url", "http://127.0.0.1:9/simple")
    assert (code, out) == (2, "")
    assert lacking(last_line(err), "index does not respond", "network") == []
    assert [path.name for path in tmp_path.iterdir()] == ["node.txt"]


def test_what_contradicts_the_node_is_told_with_its_causes(tmp_path: Path, toy: Callable[..., None]) -> None:
    toy("torch>=2.6", "gaugebound")
    with pytest.raises(GaugeError) as caught:
        bundle(tmp_path, "gaugebase==1.5")
    target = ("Python 3.12", "manylinux_2_28_x86_64")
    assert lacking(str(caught.value), *target, "node has gaugebase 1.5", "gaugebound 1.0", "gaugebase>=2") == []
    toy("torch>=2.6", "gaugenowhere")
    with pytest.raises(GaugeError, match="No matching distribution found for gaugenowhere"):
        bundle(tmp_path)


def test_without_pip_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    monkeypatch.setattr(sys, "executable", str(bare / "bin" / "python"))
    with pytest.raises(GaugeError, match="no pip.*python -m ensurepip"):
        bundle(tmp_path)


@pytest.mark.slow
def test_a_pip_that_asks_this_python_for_markers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_gauge._internals.pip._FOR_ANOTHER_ENVIRONMENT", "import runpy, sys; sys.argv.pop(1); "
                        "runpy.run_module('pip', run_name='__main__')")  # fmt: skip
    other = "3.12" if HERE != "3.12" else "3.13"
    with pytest.raises(GaugeError, match=f"markers.*not for Python {other}"):
        bundle(tmp_path, python=other)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_an_older_bundle_is_replaced_and_nothing_else_is(tmp_path: Path, toy: Callable[..., None]) -> None:
    older = bundle(tmp_path)
    toy("torch>=2.6", "gaugeunder")
    newer = bundle(tmp_path)
    assert wheels(newer) == {"gaugeunder": "1.0"}
    assert older.folder == newer.folder
    for foreign in ("notes.txt", "wheels/notes.txt"):
        (newer.folder / foreign).write_text("mine")
        with pytest.raises(GaugeError, match=f"contains {foreign}, not part of a bundle"):
            bundle(tmp_path)
        (newer.folder / foreign).unlink()
    before = {path: path.read_bytes() for path in newer.folder.rglob("*") if path.is_file()}
    toy("torch>=2.6", "gaugenowhere")
    with pytest.raises(GaugeError):
        bundle(tmp_path)
    assert {path: path.read_bytes() for path in newer.folder.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "node.txt"]


# The checkout --------------------------------------------------------------------------------------------------------


def git(root: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(root), *settings, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy project under git, whose benchmark needs what the node lacks."""
    root = tmp_path_factory.mktemp("project")
    files = {
        "peft_gauge/__init__.py": "",
        "peft_gauge/cli.py": "import sys\nprint('toy peft-gauge', *sys.argv[1:])\n",
        "benchmarks/test_toy.py": "import gaugeone\n\n\ndef test_it():\n    assert gaugeone.VERSION == '2.0'\n",
        "pytest.ini": "[pytest]\ntestpaths = benchmarks\naddopts = -p no:cacheprovider\n",
        "script.sh": '#!/bin/sh\necho "$0 ran in $PWD"\n',
        "ümlaut.txt": "committed\n",
        "gone.txt": "committed\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    (root / "script.sh").chmod(0o755)
    git(root, "init", "--quiet", "--initial-branch=main")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message=toy")
    (root / "ümlaut.txt").write_text("changed\n")
    (root / "gone.txt").unlink()
    (root / "untracked.txt").write_text("mine\n")
    return root


def test_a_checkout_is_what_git_tracks_as_it_is_on_the_disk(repository: Path, tmp_path: Path) -> None:
    checkout = find_checkout(repository)
    checkout.archive(tmp_path / "checkout.tar.gz")
    with tarfile.open(tmp_path / "checkout.tar.gz") as archive:
        members = {member.name: member for member in archive.getmembers()}
        file = archive.extractfile("ümlaut.txt")
        assert file is not None
        assert file.read() == b"changed\n"
    assert members.keys() >= {"peft_gauge/cli.py", "pytest.ini"}
    assert not members.keys() & {"untracked.txt", "gone.txt"}
    assert members["script.sh"].mode & 0o111
    assert {(member.uid, member.uname) for member in members.values()} == {(0, "")}
    assert checkout.commit["id"] == git(repository, "rev-parse", "HEAD")
    assert (checkout.commit["dirty"], checkout.commit["branch"]) == (True, "main")


def test_without_a_checkout_it_says_what_to_do(tmp_path: Path, repository: Path) -> None:
    with pytest.raises(GaugeError, match="is not a git checkout .* or use --no-checkout"):
        find_checkout(tmp_path)
    with pytest.raises(GaugeError, match="is a part of the checkout"):
        find_checkout(repository / "benchmarks")


def test_a_run_in_a_bundled_checkout_is_saved_with_its_commit(tmp_path: Path) -> None:
    assert bundled_commit(tmp_path / "absent.json") is None
    (tmp_path / "commit.json").write_text('{"id": "abc", "dirty": false}')
    assert bundled_commit(tmp_path / "commit.json") == {"id": "abc", "dirty": False}
    (tmp_path / "commit.json").write_text("{")
    assert bundled_commit(tmp_path / "commit.json") is None


def test_pytest_asks_the_bundle_for_the_commit(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.setattr("peft_gauge.history.writer.bundled_commit", lambda: {"id": "of the bundle"})
    assert pytestconfig.hook.pytest_benchmark_generate_commit_info(config=pytestconfig) == {"id": "of the bundle"}


# run.sh --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, index: Path, repository: Path) -> Path:
    """A bundle for this machine, made by the toy project."""
    folder = tmp_path_factory.mktemp("built")
    listed = folder / "node.txt"
    listed.write_text("".join(f"{name}=={metadata.version(name)}\n" for name in ("torch", "packaging")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(index))
        patch.setenv("PIP_CONFIG_FILE", os.devnull)
        patch.setattr(collection, "read_project", lambda: a_project("torch>=2.6", "packaging>=23", "gaugeone>=1"))
        patch.setattr(collection, "find_checkout", lambda: find_checkout(repository))
        collect(Wanted(HERE, PLATFORM_HERE, (f"@{listed}",), folder / "bundle"))
    return folder / "bundle"


@pytest.fixture
def node(built: Path, tmp_path: Path) -> Path:
    """The bundle, copied to a folder of its own."""
    shutil.copytree(built, tmp_path / "node" / "bundle")
    return tmp_path / "node" / "bundle"


@pytest.fixture(scope="module")
def installed_once(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``run.sh`` makes of the bundle: pip takes a second or two for each installation."""
    place = tmp_path_factory.mktemp("installed")
    done = run_on(built, "--to", str(place), "--", "true", TMPDIR=str(place))
    assert (done.returncode, done.stderr) == (0, "")
    return place


@pytest.fixture
def installed_node(node: Path, installed_once: Path) -> Path:
    """A bundle of its own that is installed already."""
    shutil.copytree(installed_once, node.with_name("bundle-installed"))
    return node


@pytest.fixture
def own_packages(installed_once: Path, tmp_path: Path) -> str:
    """A folder with all that the bundle has, as the node's own: on PYTHONPATH nothing is left to install."""
    (folder,) = installed_once.iterdir()
    shutil.copytree(folder / "site", tmp_path / "own" / "packages")
    return str(tmp_path / "own" / "packages")


def run_on(
    node: Path, *arguments: str, cwd: Path | None = None, shell: Sequence[str] = ("sh",), **environment: str
) -> subprocess.CompletedProcess[str]:
    """``run.sh`` with this Python as the node's."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PEFT_GAUGE", "PYTEST", "PIP"))}
    named = {"PEFT_GAUGE_PYTHON": sys.executable, "TMPDIR": str(node.parent), **environment}
    command = [*shell, str(node / "run.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd or node.parent, env=inherited | named)


def change_manifest(node: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((node / "manifest.json").read_text())
    change(manifest)
    (node / "manifest.json").write_text(json.dumps(manifest))


def refused(done: subprocess.CompletedProcess[str], *facts: str) -> None:
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("run.sh: ")
    assert done.stderr.count("\n") == 1
    assert lacking(done.stderr, *facts) == []


def installed(node: Path) -> Path:
    (folder,) = node.with_name("bundle-installed").iterdir()
    return folder


@pytest.mark.parametrize("shell", [("bash",), pytest.param((), marks=pytest.mark.slow)], ids=["bash", "itself"])
def test_it_installs_beside_and_runs_doctor(node: Path, tmp_path: Path, shell: Sequence[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in node.rglob("*")}
    done = run_on(node, shell=shell, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    folder = installed(node)
    assert f"The bundle is installed in {folder}." in done.stdout
    assert f"sh {node}/run.sh -- pytest -m gpu" in done.stdout
    assert done.stdout.endswith("toy peft-gauge doctor\n")
    assert (folder / "site" / "gaugeone" / "__init__.py").is_file()
    assert (folder / "checkout" / "ümlaut.txt").read_text() == "changed\n"
    assert not (folder / "scratch").exists()
    commit = bundled_commit(folder / "checkout" / ".bundled-commit.json")
    assert commit is not None
    assert commit["dirty"] is True
    assert {path: path.stat().st_mtime_ns for path in node.rglob("*")} == before  # a bundle can be read-only


def test_it_runs_a_command_in_the_checkout(node: Path, tmp_path: Path) -> None:
    done = run_on(node, "--to", "somewhere", "--", "pytest", "-q", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    (folder,) = (tmp_path / "somewhere").iterdir()
    done = run_on(node, "--to=somewhere", "--", "./script.sh", cwd=tmp_path)
    assert done.stdout == f"./script.sh ran in {folder / 'checkout'}\n"
    done = run_on(node, "--", "python", "-c", "raise SystemExit(7)", cwd=tmp_path, PEFT_GAUGE_TO="somewhere")
    assert done.returncode == 7
    assert not node.with_name("bundle-installed").exists()


@pytest.mark.slow
def test_a_second_call_does_nothing(installed_node: Path) -> None:
    node = installed_node
    before = {path: path.stat().st_mtime_ns for path in installed(node).rglob("*")}
    shutil.rmtree(node / "wheels")  # nor does it need anything
    (node / "checkout.tar.gz").unlink()
    done = run_on(node, "--", "true")
    assert (done.returncode, done.stderr) == (0, "")
    assert {path: path.stat().st_mtime_ns for path in installed(node).rglob("*")} == before


def test_its_own_packages_on_the_path_are_not_the_nodes(installed_node: Path) -> None:
    """A user may have put them there for good; they stay what the bundle brought."""
    node, folder = installed_node, installed(installed_node)
    done = run_on(node, "--", "true", PYTHONPATH=str(folder / "site"))
    assert (done.returncode, done.stderr) == (0, "")
    assert installed(node) == folder


@pytest.mark.slow
def test_what_the_node_has_is_left_as_it_is_and_comes_first(node: Path, tmp_path: Path, index: Path) -> None:
    own = tmp_path / "own"
    make_wheel(tmp_path / "other", "gaugeunder", "7.0")
    for wheel in ((tmp_path / "other" / "gaugeunder-7.0-py3-none-any.whl"),):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(own)
    script = (
        "import gaugeunder, gaugeone, sys; print(gaugeunder.VERSION, gaugeone.VERSION, sys.path.index(sys.argv[1]))"
    )
    done = run_on(node, "--", "python", "-P", "-c", script, str(own), PYTHONPATH=str(own))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "7.0 2.0 0\n"
    assert re.fullmatch(r"run.sh: .*gaugeunder 7\.0\n", done.stderr)
    assert not (installed(node) / "site" / "gaugeunder").exists()


@pytest.mark.slow
def test_another_version_than_is_needed_is_told(node: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(make_wheel(tmp_path / "other", "gaugebase", "1.0")) as archive:
        archive.extractall(tmp_path / "own")
    done = run_on(node, "--", "true", PYTHONPATH=str(tmp_path / "own"))
    assert done.returncode == 0
    assert lacking(done.stderr, "gaugeone needs gaugebase>=2", "gaugebase 1.0") == []


@pytest.mark.slow
def test_nodes_that_lack_other_packages_can_share_a_place(installed_node: Path, tmp_path: Path) -> None:
    node = installed_node
    with zipfile.ZipFile(make_wheel(tmp_path / "other", "gaugeunder", "7.0")) as archive:
        archive.extractall(tmp_path / "own")
    assert run_on(node, "--", "true", PYTHONPATH=str(tmp_path / "own")).returncode == 0
    folders = sorted(node.with_name("bundle-installed").iterdir())
    assert [(folder / "site" / "gaugeunder").exists() for folder in folders].count(True) == 1
    assert len(folders) == 2


@pytest.mark.slow
def test_where_nothing_can_be_written_beside_it_takes_tmpdir(node: Path, tmp_path: Path) -> None:
    node.with_name("bundle-installed").write_text("in the way, for root too")
    (tmp_path / "scratch").mkdir()
    done = run_on(node, "--", "true", TMPDIR=str(tmp_path / "scratch"))
    assert (done.returncode, done.stderr) == (0, "")
    (folder,) = (tmp_path / "scratch" / f"peft-gauge-{os.getuid()}").iterdir()
    assert (folder / "site" / "gaugeone").is_dir()


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere; the tests beside this one hold for root too")
def test_bundle_and_its_place_may_be_read_only(node: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    read_only = [node.parent, *(path for path in (node, *node.rglob("*")) if path.is_dir())]
    for path in read_only:
        path.chmod(0o555)
    try:
        done = run_on(node, "--", "true", TMPDIR=str(tmp_path / "scratch"))
    finally:
        for path in read_only:
            path.chmod(0o755)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in node.parent.iterdir()] == ["bundle"]
    assert len(list((tmp_path / "scratch").iterdir())) == 1


def test_a_wanted_folder_that_cannot_be_written_is_told(node: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(run_on(node, "--to", str(tmp_path / "file" / "x")), "the bundle cannot be installed: Not a directory")
    refused(run_on(node, "--to", "/proc/x"), "the bundle cannot be installed: ")


@pytest.mark.parametrize(
    ("target", "facts"),
    [
        ({"python": "3.9"}, [f"is Python {HERE}", "bundle is for Python 3.9", "activate an environment"]),
        ({"machine": "s390x"}, [f"node is Linux on {platform.machine()}", "bundle is for Linux on s390x"]),
        ({"glibc": 99}, ["glibc 2.99 or newer"]),
    ],
)  # fmt: skip
def test_a_node_of_another_kind_is_told(target: dict[str, Any], facts: list[str], node: Path) -> None:
    change_manifest(node, lambda manifest: manifest["target"].update(target))
    refused(run_on(node), *facts)
    assert sorted(path.name for path in node.parent.iterdir()) == ["bundle"]


def test_another_python_is_told_whatever_it_is(node: Path, tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    refused(run_on(node, "--python", str(other)), f"{other} does not start")
    refused(run_on(node, "--python", "nosuchpython"), "nosuchpython is not a program")
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    refused(run_on(node, "--python", f"{bare}/bin/python"), "has no pip, which installs the wheels")
    assert list(node.with_name("bundle-installed").iterdir()) == []


def test_the_python_on_the_path_is_the_nodes(node: Path, tmp_path: Path, own_packages: str) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sh", "readlink", "dirname", "true"):
        (programs / name).symlink_to(str(shutil.which(name)))
    done = run_on(node, "--", "true", PEFT_GAUGE_PYTHON="", PATH=str(programs))
    refused(done, "no python3 found", "--python")
    for name, code in (("python", f'exec {sys.executable} "$@"'), ("python3", "exit 1")):
        (programs / name).write_text(f"#!/bin/sh\n{code}\n")
        (programs / name).chmod(0o755)
        done = run_on(node, "--", "true", PEFT_GAUGE_PYTHON="", PATH=str(programs), PYTHONPATH=own_packages)
        assert (done.returncode, "python3 does not start" in done.stderr) == (
            (0, False) if name == "python" else (2, True)
        )


@pytest.mark.parametrize("name", ["wheels/gaugeone-2.0-py3-none-any.whl", "checkout.tar.gz"])
def test_a_damaged_file_is_told_and_nothing_is_installed(node: Path, name: str) -> None:
    content = bytearray((node / name).read_bytes())
    content[len(content) // 2] ^= 1
    (node / name).write_bytes(content)
    refused(run_on(node), f"{name} is damaged", "sha256", "copy the bundle again")
    assert list(node.with_name("bundle-installed").iterdir()) == []
    (node / name).unlink()
    refused(run_on(node), f"{name} is missing from the bundle")


def test_a_broken_manifest_is_told(node: Path) -> None:
    (node / "manifest.json").write_text("{")
    refused(run_on(node), "manifest.json", "copy the bundle again")
    (node / "manifest.json").unlink()
    refused(run_on(node), "manifest.json is missing or broken")


@pytest.mark.slow
def test_what_the_node_was_thought_to_have_is_told(node: Path) -> None:
    change_manifest(node, lambda manifest: manifest["requirements"].extend([["gaugelost>=1", ""], ["gaugelost", ""]]))
    refused(run_on(node), "lacks gaugelost", "for peft-gauge", "--have @FILE")
    assert list(node.with_name("bundle-installed").iterdir()) == []


def test_markers_are_the_nodes_own(node: Path, own_packages: str) -> None:
    """Its patch release, say, which the bundle's maker may not have known."""
    absent = ["gaugelost; python_full_version < '3.0'", ""]
    change_manifest(node, lambda manifest: manifest["requirements"].append(absent))
    assert run_on(node, "--", "true", PYTHONPATH=own_packages).returncode == 0
    absent[0] = "gaugelost; python_full_version > '3.0'"
    change_manifest(node, lambda manifest: manifest["requirements"].append(absent))
    refused(run_on(node, PYTHONPATH=own_packages), "this node lacks gaugelost")


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["pytest"], ["'pytest'", "run.sh -- "]),
        (["--to"], ["--to needs a value"]),
        (["--python", ""], ["--python needs a value"]),
    ],
)
def test_a_wrong_argument_is_told(arguments: list[str], facts: list[str], node: Path) -> None:
    refused(run_on(node, *arguments), *facts)
    assert sorted(path.name for path in node.parent.iterdir()) == ["bundle"]


def test_help_says_what_there_is(node: Path) -> None:
    done = run_on(node, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("--to FOLDER", "--python PYTHON", "PEFT_GAUGE_TO", "PEFT_GAUGE_PYTHON", "$TMPDIR"):
        assert word in done.stdout


def test_without_a_bundled_checkout_the_current_folder_is_taken(
    node: Path, repository: Path, own_packages: str
) -> None:
    change_manifest(node, lambda manifest: manifest.update(checkout=None))
    done = run_on(node, cwd=repository, PYTHONPATH=own_packages)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("toy peft-gauge doctor\n")


def test_what_runs_on_the_node_imports_nothing_of_the_package() -> None:
    found = set()
    for entry in ast.walk(ast.parse(Path(on_node.__file__).read_text(encoding="utf-8"))):
        if isinstance(entry, ast.Import):
            found |= {alias.name.split(".")[0] for alias in entry.names}
        elif isinstance(entry, ast.ImportFrom):
            assert entry.level == 0
            found.add(str(entry.module).split(".")[0])
    assert found - set(sys.stdlib_module_names) == {"packaging"}


def test_both_scripts_are_in_the_package() -> None:
    for script in collection.SCRIPTS:
        assert (Path(requirements.__file__).parent / script).is_file()
