"""The design's import directions, held by reading the imports of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "peft_gauge"
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "datasets"}

# The measured side knows methods and models; the measuring side takes a callable or a module.
MEASURED = {
    "models", "methods", "targets", "bottleneck", "bottleneck_layers", "step", "cases", "texts", "quality", "serving",
}  # fmt: skip
MEASURING = {
    "clock", "counting", "flops", "fork_server", "meters", "fingerprint", "identity", "isolation", "traces",
}  # fmt: skip
RECORDS = {"history", "report", "claims", "machine"}


def imports_of(path: Path) -> set[str]:
    """Absolute names of all modules that ``path`` imports, also inside functions; relative ones spelt out."""
    package = path.relative_to(ROOT).parent.parts
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            module = f"{start}{node.module or ''}".rstrip(".")
            found.add(module)
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def rooms_of(path: Path) -> set[str]:
    """The rooms of ``peft_gauge`` that ``path`` imports from."""
    return {name.split(".")[1] for name in imports_of(path) if name.startswith("peft_gauge.")}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = sorted(PACKAGE.rglob("*.py"))
# The two sides meet in `plan`, but the instruments in it stand on the measuring side.
INSTRUMENTS = [PACKAGE / "plan" / f"{name}.py" for name in ("tracker", "allocator", "gpus")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_package_never_imports_what_stands_on_it(path: Path) -> None:
    outside = {name.split(".")[0] for name in imports_of(path)}
    assert not outside & {"benchmarks", "tests", "conftest", "fixtures", "pytest"}


@pytest.mark.parametrize(
    "path", [*(p for p in MODULES if room(p) in MEASURING), *INSTRUMENTS], ids=lambda path: path.stem
)
def test_the_measuring_side_knows_no_method(path: Path) -> None:
    assert not rooms_of(path) & (MEASURED | RECORDS)


@pytest.mark.parametrize(
    "path", [p for p in MODULES if room(p) in RECORDS], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_history_and_report_see_plain_records(path: Path) -> None:
    assert not rooms_of(path) & (MEASURED | MEASURING)


@pytest.mark.parametrize("path", [p for p in MODULES if room(p) == "bundle"], ids=lambda path: path.stem)
def test_a_bundle_is_made_without_knowing_what_is_measured(path: Path) -> None:
    assert rooms_of(path) <= {"bundle", "_internals", "errors", "paths"}


def test_the_command_is_on_top() -> None:
    assert [p.name for p in MODULES if rooms_of(p) & {"cli", "commands"} and room(p) not in ("cli", "commands")] == []


def test_a_planted_import_is_seen(tmp_path: Path) -> None:
    tree = ast.parse("def f():\n    from peft_gauge.training.methods import get\n")
    assert isinstance(tree.body[0], ast.FunctionDef)
    planted = PACKAGE / "clock" / "__init__.py"
    assert "methods" not in rooms_of(planted)
    path = tmp_path / "x.py"
    path.write_text("def f():\n    from peft_gauge.training.methods import get\n")
    # `rooms_of` reads any file; only relative imports need its place in the package.
    assert {n.split(".")[1] for n in _absolute_imports(path) if n.startswith("peft_gauge.")} == {"methods"}


def _absolute_imports(path: Path) -> set[str]:
    return {
        node.module
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module is not None
    }


@pytest.mark.parametrize(
    "module",
    [
        "peft_gauge.cli",
        "peft_gauge.training.methods",
        "peft_gauge.training.models",
        "peft_gauge.history.writer",
        "peft_gauge.report.terminal.summary",
        "peft_gauge.claims",
        "peft_gauge.isolation",
        "peft_gauge.history.reader",
        "peft_gauge.history.resumption",
        "peft_gauge.bundle.collection",
    ],
)
def test_listing_needs_no_heavy_library(module: str) -> None:
    """Cases are listed and histories compared without the seconds that importing torch and transformers takes."""
    code = f"import sys, {module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
