"""Is every use of `torch.cuda` and `pynvml` right by the modules that are installed? No line for a GPU is run for it.

Needs torch (any build), nvidia-ml-py and pytest, and nothing else of the project: another environment is asked with
``python -m pytest tests/internals/test_cuda_calls.py --noconftest``.
"""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache

import pynvml
import pytest
import torch

from tests.support import cuda_calls, fake_pynvml
from tests.support.cuda_calls import Use, problem, read, read_text
from tests.support.paths import ROOT

FILES = [
    *sorted((ROOT / "peft_gauge").rglob("*.py")),
    *sorted((ROOT / "fixtures").glob("*.py")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
    ROOT / "conftest.py",
    *sorted((ROOT / "tests" / "gpu").glob("*.py")),
]


@cache
def everything() -> tuple[list[Use], list[Use]]:
    """The uses in all files, and those whose names are made while the code runs."""
    return read(FILES, ROOT)


def test_each_use_is_right_by_the_real_module() -> None:
    wrong = {f"{use.path}:{use.line}": problem(use) for use in everything()[0]}
    assert {place: what for place, what in wrong.items() if what is not None} == {}


def test_enough_is_read() -> None:
    """That the reading found nothing would pass as well."""
    uses, _ = everything()
    names = {use.name for use in uses}
    assert len(uses) > 80
    assert {"torch.cuda.Event", "torch.cuda.memory_stats", "pynvml.nvmlDeviceGetMemoryInfo"} <= names
    results = {(use.of_result, use.name) for use in uses}
    assert ("torch.cuda.Event", "elapsed_time") in results  # through a list, in another function
    assert ("torch.cuda.get_device_properties", "total_memory") in results  # in the code of another process
    assert ("pynvml.nvmlDeviceGetMemoryInfo", "reserved") in results
    assert ("pynvml.nvmlDeviceGetComputeRunningProcesses", "usedGpuMemory") in results


def test_names_that_are_made_while_the_code_runs() -> None:
    """Whatever is not in this list needs a test of its own."""
    source = ast.parse((ROOT / "peft_gauge" / "meters" / "nvml_device.py").read_text(encoding="utf-8"))
    (slowdowns,) = (
        ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_SLOWDOWNS"
    )
    assert [(use.path, use.name) for use in everything()[1]] == [
        ("peft_gauge/meters/nvml_device.py", "pynvml.f'nvmlClocksThrottleReason{name}'")
    ]
    assert all(isinstance(getattr(pynvml, f"nvmlClocksThrottleReason{name}"), int) for name in slowdowns)


def test_figures_of_the_allocator_are_those_that_torch_documents_or_shows() -> None:
    """Its summary reads one, "allocation", that its documentation calls "allocated"."""
    described = str(torch.cuda.memory_stats.__doc__)
    shown = re.findall(r'\("([a-z_]+)", "', inspect.getsource(torch.cuda.memory_summary))
    by_pool = {*re.findall(r'``"([a-z_]+)\.\{all', described), *shown}
    counters = set(re.findall(r'``"(num_\w+)"``', described))
    asked = {
        (path.relative_to(ROOT).as_posix(), node.value)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"[a-z_]+\.(all|small_pool|large_pool)\.\w+|num_(ooms|alloc_retries)", node.value)
    }
    assert len(asked) > 8
    for path, key in sorted(asked):
        metric, _, rest = key.partition(".")
        known = key in counters or (
            metric in by_pool and rest.split(".")[1] in ("current", "peak", "allocated", "freed")
        )
        assert known, f"{path}: torch.cuda.memory_stats has no {key!r}"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("torch.cuda.max_memory_alocated()", "has no 'max_memory_alocated'"),
        ("torch.cuda.memory_stats(0, 1)", "too many positional arguments"),
        ("torch.cuda.Event(timing=True)", "unexpected keyword argument 'timing'"),
        ("e = torch.cuda.Event(enable_timing=True)\ne.elapsed()", "torch.cuda.Event has no 'elapsed'"),
        ("es = [torch.cuda.Event() for _ in x]\nes[0].elapsed_time()", "missing a required argument"),
        ("class A:\n def f(self):\n  self.c = torch.cuda\n  self.c.Strem()", "has no 'Strem'"),
        ("def g():\n return torch.cuda\nc = x or g()\nc.synchronise()", "has no 'synchronise'"),
        ("from torch.cuda import memory_allocatd", "has no 'memory_allocatd'"),
        ("from torch import cuda as c\nc.memory._snapsot()", "torch.cuda.memory of torch"),
        ("torch.cuda.memory._record_memory_history(entries=5)", "unexpected keyword argument 'entries'"),
        ("p = torch.cuda.get_device_properties(0)\np.memory", "_CudaDeviceProperties has no 'memory'"),
        ("for p in [torch.cuda.get_device_properties(i) for i in x]:\n p.uid", "has no 'uid'"),
        ("'''import torch\ntorch.cuda.curent_device()'''", "has no 'curent_device'"),
        ("def f():\n '''As ``torch.cuda.memory_stat`` has it.'''", "has no 'memory_stat'"),
        ("pynvml.nvmlDeviceGetMemoryInfo()", "missing a required argument"),
        ("pynvml.nvmlDeviceGetMemoryInfo(h, vers=2)", "unexpected keyword argument 'vers'"),
        ("m = told(lambda: pynvml.nvmlDeviceGetMemoryInfo(h))\nm.frei", "c_nvmlMemory_v2_t has no 'frei'"),
        ("pynvml.NVMLError_NoSuchThing", "has no 'NVMLError_NoSuchThing'"),
        ("getattr(pynvml, 'nvmlClocksThrottleReasonNone2')", "has no 'nvmlClocksThrottleReasonNone2'"),
    ],
)
def test_a_wrong_use_is_told(source: str, said: str) -> None:
    uses, _ = read_text(f"import torch, pynvml\n{source}\n", "example.py")
    told = [problem(use) for use in uses]
    assert any(said in str(each) for each in told), told


def test_a_right_use_is_not_told() -> None:
    source = (
        "import torch.cuda as c\n"
        "e = [c.Event(enable_timing=True) for _ in range(2)]\n"
        "e[0].record()\ne[1].record(c.current_stream())\ne[0].elapsed_time(e[1])\n"
        "c.memory_stats(*x)\nc.memory._snapshot()\nc.memory._record_memory_history(max_entries=5)\n"
        "with c.stream(c.Stream(priority=-1)) as s:\n c.synchronize('cuda:0')\n"
        "str(c.get_device_properties(0).uuid)\n"
    )
    uses, dynamic = read_text(source, "example.py")
    assert [str(use) for use in uses if problem(use) is not None] == []
    assert {use.line for use in uses} == set(range(2, 12))
    assert dynamic == []


def test_a_name_that_is_made_is_told_apart() -> None:
    _, dynamic = read_text("import torch\ngetattr(torch.cuda, name)\n", "example.py")
    assert [str(use) for use in dynamic] == ["example.py:2 torch.cuda.name"]


def test_the_stand_in_for_nvml_has_all_that_is_used() -> None:
    lacking = {
        use.name.removeprefix("pynvml.")
        for use in everything()[0]
        if use.name.startswith("pynvml.") and use.of_result is None and not hasattr(fake_pynvml, _first(use.name))
    }
    # These three are in the stand-ins of whole machines (test_gpu_bad_input, fake_cuda_nvml).
    assert lacking <= {"nvmlShutdown", "nvmlSystemGetDriverVersion", "nvmlSystemGetCudaDriverVersion"}


def _first(name: str) -> str:
    return name.split(".")[1]


def test_the_stub_is_read() -> None:
    assert {"name", "total_memory", "uuid", "major"} <= cuda_calls.stub("_CudaDeviceProperties")
    assert {"record", "elapsed_time"} <= cuda_calls.stub("_CudaEventBase")
