"""Every use of `torch.cuda` and `pynvml` in source code, and what is wrong with it by the modules that are installed.

Code for a GPU is not run where there is none, so a misspelt name or a wrong argument would be found on the first GPU.
Here the source is read instead: names are looked up in the real modules, arguments are bound to real signatures, and
attributes of what a call returns are those of its class or of torch's stub. The reading is by name within a file and
knows imports, assignments, returns, comprehensions and loops; what it cannot follow it does not judge.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml
import torch

MODULES = {"torch": "torch", "pynvml": "pynvml"}
"""Names that stand for a module wherever they come from, `sys.modules` for one."""
WATCHED = ("torch.cuda", "pynvml")


@dataclass(frozen=True)
class Use:
    """One use: ``name`` is the whole one, as in ``torch.cuda.Event``; ``call`` the call of it, if it is called."""

    path: str
    line: int
    name: str
    call: ast.Call | None = None
    of_result: str | None = None
    """The function whose result's attribute ``name`` is."""

    def __str__(self) -> str:
        result = f"{self.of_result}()." if self.of_result else ""
        return f"{self.path}:{self.line} {result}{self.name}"


@dataclass(frozen=True)
class Result:
    """What a call of ``function`` gives; ``many``: a collection of such."""

    function: str
    many: bool = False


class _Reader:
    """The uses in one file."""

    def __init__(self, path: str, tree: ast.AST, first_line: int = 1) -> None:
        self.path = path
        self.first_line = first_line
        self.names: dict[str, str | Result] = dict(MODULES)
        self.own: dict[tuple[int, str], str | Result] = {}
        """What a name means in the function that binds it; any other function may be handed it by that name."""
        self.returns: dict[str, str | Result] = {}
        self.dynamic: list[Use] = []
        self.functions: dict[int, ast.AST] = {}
        self.bound: dict[int, set[str]] = {}
        self._find_functions(tree, None)
        self.nodes = list(ast.walk(tree))
        for _ in range(3):  # what is known of one name makes others known
            for node in self.nodes:
                self._learn(node)

    def uses(self) -> Iterator[Use]:
        calls = {id(node.func): node for node in self.nodes if isinstance(node, ast.Call)}
        for node in self.nodes:
            line = getattr(node, "lineno", 1) + self.first_line - 1
            if isinstance(node, ast.Attribute):
                name = self._whole(node)
                if name is not None and name.startswith(tuple(f"{module}." for module in WATCHED)):
                    yield Use(self.path, line, name, calls.get(id(node)))
                owner = self._meaning(node.value)
                if isinstance(owner, Result) and not owner.many:
                    yield Use(self.path, line, node.attr, calls.get(id(node)), owner.function)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                known = self._known(node)
                if isinstance(known, str) and known.startswith(tuple(f"{module}." for module in WATCHED)):
                    yield Use(self.path, line, known, calls.get(id(node)))
            elif isinstance(node, ast.ImportFrom) and node.module in WATCHED:
                yield from (Use(self.path, line, f"{node.module}.{alias.name}") for alias in node.names)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
                yield from self._by_getattr(node, line)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from self._in_text(node.value, line)

    def _by_getattr(self, node: ast.Call, line: int) -> Iterator[Use]:
        owner = self._meaning(node.args[0])
        wanted = node.args[1]
        if isinstance(owner, str) and owner in WATCHED:
            if isinstance(wanted, ast.Constant):
                yield Use(self.path, line, f"{owner}.{wanted.value!s}")
            else:
                self.dynamic.append(Use(self.path, line, f"{owner}.{ast.unparse(wanted)}"))
        elif isinstance(owner, Result) and isinstance(wanted, ast.Constant) and len(node.args) == 2:
            yield Use(self.path, line, str(wanted.value), None, owner.function)

    def _in_text(self, text: str, line: int) -> Iterator[Use]:
        """Code for another process; or prose, in which names are to be right as well."""
        if "torch.cuda" not in text and "pynvml." not in text:
            return
        if re.search(r"^import .*\btorch\b", text, re.MULTILINE):
            try:
                tree = ast.parse(text)
            except SyntaxError:
                pass
            else:
                yield from _Reader(self.path, tree, line).uses()
                return
        for found in re.finditer(r"\b(?:torch\.cuda|pynvml)(?:\.[A-Za-z_]\w*)+", text):
            yield Use(self.path, line, found[0])

    # What names mean

    def _find_functions(self, node: ast.AST, function: ast.AST | None) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node
            self.bound[id(node)] = {
                name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
            }
        if function is not None:
            self.functions[id(node)] = function
        for child in ast.iter_child_nodes(node):
            self._find_functions(child, function)

    def _known(self, node: ast.expr) -> str | Result | None:
        function, name = self.functions.get(id(node)), ast.unparse(node)
        if function is not None and name in self.bound[id(function)]:
            return self.own.get((id(function), name)) or MODULES.get(name)
        return self.names.get(name)

    def _learn(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    self.names[alias.asname] = alias.name
        elif isinstance(node, ast.ImportFrom) and node.module in ("torch", *WATCHED):
            for alias in node.names:
                self.names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
            meaning = None if node.value is None else self._meaning(node.value)
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                self._name(target, meaning)
        elif isinstance(node, (ast.For, ast.comprehension)):
            self._name(node.target, self._element(node.iter))
        elif isinstance(node, ast.FunctionDef):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return) and inner.value is not None:
                    meaning = self._meaning(inner.value)
                    if meaning is not None:
                        self.returns[node.name] = meaning

    def _name(self, target: ast.expr, meaning: str | Result | None) -> None:
        if meaning is None or not isinstance(target, (ast.Name, ast.Attribute)):
            return
        self.names[ast.unparse(target)] = meaning
        function = self.functions.get(id(target))
        if function is not None:
            self.own[id(function), ast.unparse(target)] = meaning

    def _element(self, iterable: ast.expr) -> Result | None:
        meaning = self._meaning(iterable)
        return Result(meaning.function) if isinstance(meaning, Result) and meaning.many else None

    def _meaning(self, node: ast.expr) -> str | Result | None:
        """The module, function or class that an expression is, or the result of a call."""
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self._known(node) or self._whole(node)
        if isinstance(node, ast.BoolOp):
            known = [self._meaning(value) for value in node.values]
            return next((each for each in known if each is not None), None)
        if isinstance(node, ast.Subscript):
            return self._element(node.value)
        if isinstance(node, (ast.ListComp, ast.GeneratorExp)):
            made = self._meaning(node.elt)
            return Result(made.function, many=True) if isinstance(made, Result) else None
        if isinstance(node, ast.Call):
            return self._returned(node)
        return None

    def _returned(self, call: ast.Call) -> str | Result | None:
        called = self._meaning(call.func)
        if isinstance(called, str):
            if called.startswith(tuple(f"{module}." for module in WATCHED)):
                return Result(called, many=called in LISTS)
            return None
        if isinstance(call.func, ast.Name) and call.func.id in self.returns:
            return self.returns[call.func.id]
        for argument in call.args:  # a function that calls the one that it is given
            if isinstance(argument, ast.Lambda):
                return self._meaning(argument.body)
            meaning = self._meaning(argument)
            if isinstance(meaning, str) and meaning.startswith("pynvml.nvml"):
                return Result(meaning, many=meaning in LISTS)
        return None

    def _whole(self, node: ast.expr) -> str | None:
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            known = self._known(node)
            if isinstance(known, str) and parts:
                return ".".join([known, *reversed(parts)])
            parts.append(node.attr)
            node = node.value
        known = self._known(node) if isinstance(node, ast.Name) else None
        return ".".join([known, *reversed(parts)]) if isinstance(known, str) else None


def read(paths: Iterable[Path], root: Path) -> tuple[list[Use], list[Use]]:
    """The uses in the files, in order; and those whose names are made while the code runs."""
    uses: list[Use] = []
    dynamic: list[Use] = []
    for path in paths:
        found, made = read_text(path.read_text(encoding="utf-8"), str(path.relative_to(root)))
        uses += found
        dynamic += made
    return uses, dynamic


def read_text(source: str, path: str) -> tuple[list[Use], list[Use]]:
    """Likewise, in one file's text; one that names neither module's last part has none, and is not parsed."""
    if "cuda" not in source and "pynvml" not in source:
        return [], []
    reader = _Reader(path, ast.parse(source))
    found = sorted(set(reader.uses()), key=lambda use: (use.line, str(use)))
    # `a.b.c` holds `a.b`, which is looked up on the way.
    longer = {(use.line, use.name.rpartition(".")[0]) for use in found if use.of_result is None}
    return [use for use in found if use.of_result or (use.line, use.name) not in longer], reader.dynamic


# What is right --------------------------------------------------------------------------------------------------------

LISTS = {"pynvml.nvmlDeviceGetComputeRunningProcesses"}
_STRUCTS = {
    "pynvml.nvmlDeviceGetMemoryInfo": "c_nvmlMemory_v2_t",
    "pynvml.nvmlDeviceGetComputeRunningProcesses": "c_nvmlProcessInfo_v3_t",
}


def problem(use: Use) -> str | None:
    """What is wrong with a use, in one line; ``None`` where nothing is, or nothing can be told."""
    if use.of_result is not None:
        return _problem_of_result(use)
    try:
        found = look_up(use.name)
    except AttributeError as error:
        return str(error)
    return None if use.call is None else mismatch(found, use.call)


def look_up(name: str) -> Any:
    """Raises `AttributeError` with the module that lacks it."""
    if name == "pynvml" or name.startswith("pynvml."):
        found: Any = pynvml
        parts = name.split(".")[1:]
    else:
        found, parts = torch.cuda, name.split(".")[2:]
    for number, part in enumerate(parts):
        if not hasattr(found, part) and inspect.ismodule(found):
            with contextlib.suppress(ImportError):
                importlib.import_module(f"{found.__name__}.{part}")
        if not hasattr(found, part):
            if inspect.isclass(found) and part in _stub_of(found):
                return None
            owner = ".".join(["pynvml" if name.startswith("pynvml") else "torch.cuda", *parts[:number]])
            raise AttributeError(f"{owner} of {_release(name)} has no {part!r}")
        found = getattr(found, part)
    return found


def _release(name: str) -> str:
    from importlib.metadata import version

    library = "nvidia-ml-py" if name.startswith("pynvml") else "torch"
    return f"{library} {version(library)}"


def mismatch(function: Any, call: ast.Call, *, bound: bool = False) -> str | None:
    """Why ``call`` does not fit ``function``; calls with ``*`` or ``**`` are not judged."""
    starred = any(isinstance(each, ast.Starred) for each in call.args) or any(
        each.arg is None for each in call.keywords
    )
    signature = _signature(function, bound=bound)
    if starred or signature is None:
        return None
    try:
        signature.bind(*call.args, **{str(each.arg): each.value for each in call.keywords})
    except TypeError as error:
        return f"{error}; the signature is {signature}"
    return None


def _signature(function: Any, *, bound: bool) -> inspect.Signature | None:
    if function is None:
        return None
    if inspect.isclass(function):
        made_by = function.__dict__.get("__new__") or function.__dict__.get("__init__")
        function, bound = getattr(made_by, "__func__", made_by), True
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin without one
        return None
    if bound:
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])
    return signature


def _problem_of_result(use: Use) -> str | None:
    function = use.of_result
    assert function is not None
    if function in _STRUCTS:
        fields = {name for name, *_ in getattr(pynvml, _STRUCTS[function])._fields_}
        return (
            None if use.name in fields else f"{_STRUCTS[function]} has no {use.name!r}, but {', '.join(sorted(fields))}"
        )
    if function == "torch.cuda.get_device_properties":
        names = stub("_CudaDeviceProperties")
        return (
            None if use.name in names else f"_CudaDeviceProperties has no {use.name!r}, but {', '.join(sorted(names))}"
        )
    try:
        made = look_up(function)
    except AttributeError:
        return None  # told where it is used
    if not inspect.isclass(made) or issubclass(made, ctypes.Structure):
        return None
    if not hasattr(made, use.name) and use.name not in _stub_of(made):
        return f"{function} has no {use.name!r}"
    member = getattr(made, use.name, None)
    return None if use.call is None or member is None else mismatch(member, use.call, bound=True)


def _stub_of(kind: type) -> set[str]:
    return {name for base in kind.__mro__ for name in stub(base.__name__)}


def stub(kind: str) -> set[str]:
    """The names of a class in torch's stub: what C++ gives a class is not there in a build for CPUs."""
    return _stubs().get(kind, set())


_STUBS: dict[str, set[str]] = {}


def _stubs() -> dict[str, set[str]]:
    if not _STUBS:
        source = (Path(torch.__file__).parent / "_C" / "__init__.pyi").read_text(encoding="utf-8")
        for body in re.finditer(r"^class (_Cuda\w+)\b.*\n((?:[ \t]+.*\n|\n)+)", source, re.MULTILINE):
            members = re.findall(r"^    (?:def )?([A-Za-z_]\w*)\s*[:(]", body[2], re.MULTILINE)
            _STUBS[body[1]] = set(members)
    return _STUBS
