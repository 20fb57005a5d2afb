"""A GPU that cannot be used, one way after another: the line that the user reads, and what still runs.

The GPUs are invented: `fake_pynvml` in NVML's place, and torch's answers replaced. What torch and bitsandbytes
say themselves is theirs, word for word.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pynvml as real_pynvml
import pytest
import torch

from fixtures import measured
from peft_gauge import machine
from peft_gauge.commands import doctor
from peft_gauge.errors import GaugeError
from peft_gauge.machine import Accelerator, Driver
from peft_gauge.plan.record import GpuFit, PlanRequest
from peft_gauge.pytest_plugin.selection import selected_device
from peft_gauge.training import methods, models
from peft_gauge.training.cases import Case
from peft_gauge.training.settings import StepSettings
from tests.support import fake_pynvml
from tests.support.facts import lacking
from tests.support.fake_pynvml import Card, Machine
from tests.support.paths import ROOT
from tests.support.suite import sessions

CARDS = [Card("GPU-aaaa-1111"), Card("GPU-bbbb-2222")]
H100 = Accelerator("NVIDIA H100 80GB HBM3", 85_029_158_912, (9, 0), "GPU-aaaa-1111")

# torch 2.13's own words, from c10/cuda/CUDAFunctions.cpp.
TOO_OLD = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx "
    "Alternatively, go to: https://pytorch.org to install a PyTorch version that has been compiled with your version "
    "of the CUDA driver. (Triggered internally at /pytorch/c10/cuda/CUDAFunctions.cpp:119.)"
)
UNKNOWN = (
    "CUDA initialization: CUDA unknown error - this may be due to an incorrectly set up environment, e.g. changing env "
    "variable CUDA_VISIBLE_DEVICES after program start. Setting the available devices to be zero. (Triggered "
    "internally at /pytorch/c10/cuda/CUDAFunctions.cpp:119.)"
)


def nvml_stand_in(cards: list[Card], *, broken: type[Exception] | None = None, cuda: int | None = 12040) -> ModuleType:
    """`fake_pynvml` over ``GPUs``, and what only this file needs of NVML; ``cuda`` ``None``: not told."""
    fake_pynvml.machine = Machine(cards, broken=broken)  # type: ignore[arg-type]
    module = ModuleType("pynvml")
    vars(module).update({name: value for name, value in vars(fake_pynvml).items() if not name.startswith("__")})

    def nvmlShutdown() -> None:
        fake_pynvml.machine.initialised -= 1

    def nvmlSystemGetDriverVersion() -> str:
        return "550.54.14"

    def nvmlSystemGetCudaDriverVersion() -> int:
        if cuda is None:
            raise fake_pynvml.NVMLError_FunctionNotFound
        return cuda

    for function in (nvmlShutdown, nvmlSystemGetDriverVersion, nvmlSystemGetCudaDriverVersion):
        setattr(module, function.__name__, function)
    return module


def answer(*, available: bool, says: str | None = None) -> Callable[[], bool]:
    """In place of `torch.cuda.is_available`, which says what is wrong as a warning."""

    def is_available() -> bool:
        if says is not None:
            warnings.warn(says, UserWarning, stacklevel=2)
        return available

    return is_available


def forget() -> None:
    for remembered in (machine.nvidia_driver, machine.why_no_cuda, machine.accelerators, machine.machine_info):
        remembered.cache_clear()


Invent = Callable[..., None]


@pytest.fixture
def invent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Invent]:
    """``invent(…)``: what driver, torch and environment say from now on; by default a GPU that works."""

    def describe(
        *,
        cards: list[Card] = CARDS,
        broken: type[Exception] | None = None,
        cuda: int | None = 12040,
        device_files: bool = True,
        built_for: str | None = "12.8",
        available: bool = True,
        says: str | None = None,
        visible: str | None = None,
    ) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", nvml_stand_in(cards, broken=broken, cuda=cuda))
        monkeypatch.setattr(machine, "_has_device_files", lambda: device_files)
        monkeypatch.setattr(torch.version, "cuda", built_for)
        monkeypatch.setattr(torch.cuda, "is_available", answer(available=available, says=says))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        forget()

    monkeypatch.setattr(fake_pynvml, "machine", fake_pynvml.machine)  # put back at the end
    yield describe
    forget()


def test_the_stand_in_has_the_signatures_of_the_real_modules() -> None:
    module = nvml_stand_in([])
    for name in ("nvmlShutdown", "nvmlSystemGetDriverVersion", "nvmlSystemGetCudaDriverVersion"):
        assert not inspect.signature(getattr(module, name)).parameters
        assert not inspect.signature(getattr(real_pynvml, name)).parameters
    assert not inspect.signature(torch.cuda.is_available).parameters


# Why there is no CUDA -------------------------------------------------------------------------------------------------


TOO_OLD_FACTS = ("is too old", "up to 11.4", "built for CUDA 12.8", "update the driver", "CUDA 11.4 or older")


@pytest.mark.parametrize(
    ("described", "facts"),
    [
        pytest.param(
            {"broken": fake_pynvml.NVMLError_LibraryNotFound, "device_files": False},
            ("no CUDA device:", "no NVIDIA driver", "NVML Shared Library Not Found"),
            id="no driver",
        ),
        pytest.param(
            {"built_for": None, "available": False},
            ("no CUDA device:", torch.__version__, "without CUDA", "install a CUDA build"),
            id="no CUDA build",
        ),
        pytest.param(
            {"available": False, "says": TOO_OLD, "cuda": 11040}, ("550.54.14", *TOO_OLD_FACTS), id="old driver"
        ),
        pytest.param(  # bitsandbytes asked torch before, which warns only once
            {"available": False, "cuda": 12040, "built_for": "13.0"},
            ("550.54.14 is too old", "up to 12.4", "built for CUDA 13.0", "CUDA 12.4 or older"),
            id="old driver, torch silent",
        ),
        pytest.param(
            {"available": False, "says": TOO_OLD, "broken": fake_pynvml.NVMLError_NoPermission},
            TOO_OLD_FACTS,
            id="old driver, NVML silent",
        ),
        pytest.param(
            {"available": False, "visible": ""}, ("CUDA_VISIBLE_DEVICES=''", "hides every GPU"), id="none visible"
        ),
        pytest.param(
            {"available": False, "visible": "-1"}, ("CUDA_VISIBLE_DEVICES='-1'", "hides every GPU"), id="-1 visible"
        ),
        pytest.param(
            {"available": False, "visible": "2"},
            ("CUDA_VISIBLE_DEVICES='2'", "names GPU 2,", "2 GPUs", "nvidia-smi -L"),
            id="a number too large",
        ),
        pytest.param(
            {"available": False, "visible": "GPU-cccc", "cards": CARDS[:1]},
            ("CUDA_VISIBLE_DEVICES='GPU-cccc'", "names GPU GPU-cccc,", "1 GPU ", "nvidia-smi -L"),
            id="an unknown UUID",
        ),
        pytest.param({"available": False, "cards": []}, ("550.54.14", "no GPU", "container"), id="no GPU"),
        pytest.param(
            {"available": False, "says": UNKNOWN},
            ("CUDA unknown error", "driver 550.54.14 does respond", "nvidia-smi"),
            id="unknown",
        ),
        pytest.param(
            {"available": False, "broken": fake_pynvml.NVMLError_LibraryNotFound},
            ("torch gives no reason", "NVML Shared Library Not Found", "nvidia-smi"),
            id="device files only",
        ),
    ],
)
def test_why_no_cuda_is_one_line(described: dict[str, Any], facts: tuple[str, ...], invent: Invent) -> None:
    invent(**described)
    line = machine.why_no_cuda()
    assert line is not None
    assert lacking(line, *facts) == []
    assert "\n" not in line
    assert "Triggered internally" not in line  # torch's words for its developers


@pytest.mark.parametrize(
    "error",
    [
        fake_pynvml.NVMLError_NoPermission,
        fake_pynvml.NVMLError_Uninitialized,
        fake_pynvml.NVMLError_LibraryNotFound,
        fake_pynvml.NVMLError_DriverNotLoaded,
    ],
)
def test_an_nvml_that_refuses_does_not_keep_cuda_from_being_used(error: type[Exception], invent: Invent) -> None:
    invent(broken=error)
    assert machine.why_no_cuda() is None
    assert machine.nvidia_driver() == Driver(error=str(error()))


def test_a_driver_that_tells_nothing_else_still_counts_its_cards(invent: Invent) -> None:
    card = Card("GPU-aaaa-1111", refuses={"nvmlDeviceGetUUID": fake_pynvml.NVMLError_NoPermission})
    invent(cards=[card], cuda=None, available=False, visible="GPU-cccc")
    assert machine.nvidia_driver() == Driver(version="550.54.14", cards=1)
    line = machine.why_no_cuda() or ""  # which of the GPUs it names cannot be told
    assert lacking(line, "torch gives no reason", "driver 550.54.14 does respond", "nvidia-smi") == []
    assert "GPU-cccc" not in line
    assert fake_pynvml.machine.initialised == 0


def test_torch_is_not_imported_where_there_is_no_card(tmp_path: Path) -> None:
    code = (
        "import sys, pynvml; from peft_gauge import machine\n"
        "def absent(): raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)\n"
        "pynvml.nvmlInit = absent; machine._has_device_files = lambda: False\n"
        "print(machine.why_no_cuda()); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    reason, imported = done.stdout.splitlines()
    assert reason.startswith("no CUDA device: no NVIDIA driver responds")
    assert imported == "False"


@pytest.mark.parametrize(
    ("names", "found"),
    [([], False), (["null", "nvme0"], False), (["nvidia0"], True), (["nvidiactl"], True), (["dxg"], True)],
)
def test_a_card_leaves_files(names: list[str], found: bool, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert machine._has_device_files(tmp_path) == found


# As the user meets it -------------------------------------------------------------------------------------------------


def test_gpu_cases_are_skipped_with_what_is_wrong_with_the_driver(tmp_path: Path) -> None:
    case = ["benchmarks/test_speed.py", "--model=toy-llama", "--method=prompt", "tests/gpu/test_gpu.py", "-m", "gpu"]
    (done,) = sessions(["-p", "tests.support.old_driver", "-q", "--details", "--results", str(tmp_path / "out"), *case])
    assert done.returncode == 0, done.stdout + done.stderr
    skips = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert len(skips) > 5
    assert [line for line in skips if lacking(line, "driver 550.54.14 is too old", "11.4", "12.8")] == []
    assert re.search(r"^\d+ skipped", done.stdout, re.MULTILINE)
    assert "Warning" not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def test_cuda_asked_for_and_hidden_cannot_be_had(invent: Invent) -> None:
    """`conftest` makes a usage error of it, exit code 4."""
    invent(available=False, visible="")
    config: Any = SimpleNamespace(getoption={"--device": "cuda"}.get)
    with pytest.raises(GaugeError) as caught:
        selected_device(config)
    assert "--device cuda" in str(caught.value)
    assert "CUDA_VISIBLE_DEVICES='' hides every GPU" in str(caught.value)


def test_a_card_that_is_too_small_is_said_with_plan_and_headroom(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_gauge.plan.planner import plan

    settings = StepSettings(batch=1, seq=8)
    toy = models.resolve("toy-llama", weights="random")
    fit = GpuFit("2GB", 2 * 10**9, 3_100_000_000, False, -1_100_000_000, 0)
    planned = replace(plan(PlanRequest(toy, methods.PROMPT, settings)), gpus=(fit,))
    with pytest.raises(pytest.skip.Exception) as caught:
        measured._skip_what_cannot_fit(Case(toy, methods.PROMPT, settings, "cuda", "bfloat16"), planned)
    assert lacking(str(caught.value), "does not fit", "3.10 GB", "2.00 GB", "-1.10 GB", "--batch", "--seq") == []


class CudaLibrary:
    """What bitsandbytes has in place of its library once that is loaded and is one for CUDA."""

    compiled_with_cuda = True


@pytest.fixture
def native() -> Any:
    """The module that holds bitsandbytes' native library; imported while torch still gives its own answers."""
    from peft_gauge.training.quantization import load_bitsandbytes

    load_bitsandbytes()
    import bitsandbytes.cextension

    return bitsandbytes.cextension


# The doctor -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sees one GPU; only a CUDA build could be asked for it."""

    def accelerators() -> tuple[Accelerator, ...]:
        return (H100,) if machine.why_no_cuda() is None else ()

    accelerators.cache_clear = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr(machine, "accelerators", accelerators)


def lines() -> list[tuple[str, str, str]]:
    return [(line.subject, line.status, line.text) for line in doctor._gpus()]


def test_the_doctor_shows_card_driver_and_bitsandbytes(
    native: Any, invent: Invent, with_h100: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    invent()
    monkeypatch.setattr(native, "lib", CudaLibrary())
    assert lines() == [
        (
            "gpu 0",
            "ok",
            "NVIDIA H100 80GB HBM3, 85.0 GB, compute capability 9.0, driver 550.54.14, torch built for CUDA 12.8",
        ),
        ("nvml", "ok", "driver 550.54.14, runs CUDA up to 12.4, 2 GPU(s)"),
        ("bitsandbytes CUDA", "ok", "CUDA library loaded"),
    ]


def test_the_doctor_says_that_nvml_is_not_readable(
    native: Any, invent: Invent, with_h100: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "lib", CudaLibrary())
    invent(broken=fake_pynvml.NVMLError_NoPermission)
    gpu, nvml, _ = lines()
    assert gpu[2].endswith("compute capability 9.0, driver unknown, torch built for CUDA 12.8")
    assert nvml[:2] == ("nvml", "note")
    assert lacking(nvml[2], "Insufficient Permissions", "memory", "clocks") == []
    refusing = Card("GPU-aaaa-1111", refuses={"nvmlDeviceGetMemoryInfo": fake_pynvml.NVMLError_NoPermission})
    invent(cards=[refusing])
    assert lines()[1][:2] == ("nvml", "note")
    assert lacking(lines()[1][2], "driver", "memory", "no permission") == []


def test_the_doctor_says_why_there_is_no_card(invent: Invent, with_h100: None) -> None:
    invent(available=False, visible="")
    gpu, nvml = lines()
    assert gpu[:2] == ("gpu", "note")
    assert lacking(gpu[2], machine.why_no_cuda() or "?", "GPU cases will be skipped") == []
    assert nvml == ("nvml", "ok", "driver 550.54.14, runs CUDA up to 12.4, 2 GPU(s)")
    invent(available=False, broken=fake_pynvml.NVMLError_NoPermission)
    _, (_, status, text) = lines()
    assert status == "note"
    assert "Insufficient Permissions" in text
    invent(broken=fake_pynvml.NVMLError_LibraryNotFound, device_files=False)
    assert [subject for subject, _, _ in lines()] == ["gpu"]


def test_the_doctor_sees_a_card_that_is_named_in_vain(
    native: Any, invent: Invent, with_h100: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "lib", CudaLibrary())
    invent(visible="0,7")
    (note,) = (text for subject, status, text in lines() if (subject, status) == ("gpu", "note"))
    assert lacking(note, "CUDA_VISIBLE_DEVICES='0,7'", "GPU 7", "2 GPUs", "hidden") == []


def test_the_doctor_lives_through_a_torch_that_fails_at_the_card(
    invent: Invent, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    invent()
    monkeypatch.setattr(machine, "_ASK_TORCH", "raise RuntimeError('CUDA error: all devices are busy or unavailable')")
    monkeypatch.setattr(doctor, "_train_nf4", lambda: None)
    found = {line.subject: line for line in doctor.examine(tmp_path)}
    assert found["gpu"].status == "missing"
    assert lacking(found["gpu"].text, "CUDA error: all devices are busy or unavailable", "nvidia-smi") == []
    assert found["cpu"].status == found["nvml"].status == "ok"
    assert "results" in found


# bitsandbytes without a binary for this CUDA --------------------------------------------------------------------------


def test_qlora_is_refused_in_one_line_where_bitsandbytes_has_no_binary(
    native: Any, invent: Invent, with_h100: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_gauge.training.quantization import load_bitsandbytes, quantize_

    invent(built_for="14.0")
    lost = native.ErrorHandlerMockBNBNativeLibrary(
        "No compatible CUDA binary found at /env/bitsandbytes/libbitsandbytes_cuda140.so"
    )
    monkeypatch.setattr(lost, "available_versions", ["12.8", "13.0"])
    monkeypatch.setattr(native, "lib", lost)
    release = f"bitsandbytes {machine.installed_version('bitsandbytes')}"
    facts = (release, "CUDA 14.0", "libbitsandbytes_cuda140.so", "12.8, 13.0", "python -m bitsandbytes")
    base = models.build(models.resolve("toy-llama", weights="random"))
    before = [type(module) for module in base.modules()]
    with pytest.raises(GaugeError) as caught:
        quantize_(base, device="cuda")
    assert lacking(str(caught.value), *facts) == []
    assert "/env/" not in str(caught.value)
    assert [type(module) for module in base.modules()] == before, "refused, and changed all the same"
    load_bitsandbytes()  # a CPU has kernels of its own
    subject, status, text = lines()[-1]
    assert (subject, status) == ("bitsandbytes CUDA", "missing")
    assert lacking(text, release, "CUDA 14.0", "QLoRA") == []


def test_weights_without_data_need_no_binary(native: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan has them on a GPU that need not be there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from peft_gauge.training.quantization import quantize_

    monkeypatch.setattr(
        native, "lib", native.ErrorHandlerMockBNBNativeLibrary("libcudart.so.12: cannot open shared object file")
    )
    with FakeTensorMode():
        base = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False, device="meta"))
        base[0].weight = torch.nn.Parameter(torch.empty(64, 64, device="cuda"))
        quantize_(base)
    assert base[0].weight.device.type == "cuda"
    assert getattr(base[0].weight, "bnb_quantized", False)


@pytest.mark.slow
def test_a_library_that_does_not_load_is_no_traceback() -> None:
    """The real import: torch says that there is a GPU, and the CUDA library finds no CUDA on this machine."""
    code = (
        "import torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "torch.cuda.device_count = lambda: 1\n"
        "torch.cuda.device = lambda number: number\n"
        "torch.cuda.get_device_capability = lambda device=None: (9, 0)\n"
        "torch._C._cuda_getCurrentRawStream = lambda number: 0\n"  # a CUDA build has it
        "torch.version.cuda = '99.0'\n"
        "from peft_gauge.errors import GaugeError\n"
        "from peft_gauge.training.quantization import load_bitsandbytes\n"
        "load_bitsandbytes()\n"
        "try:\n"
        "    load_bitsandbytes('cuda')\n"
        "except GaugeError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr
    assert "bitsandbytes" not in done.stderr
    assert lacking(done.stdout, "CUDA 99.0", "libbitsandbytes_cuda990.so") == []
    assert len(done.stdout.splitlines()) == 1
