"""What the children of test_isolation.py run: each function ends in a way that is known beforehand."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from peft_gauge.errors import GaugeError
from peft_gauge.isolation import ProcessOutcome, note, watch

MIB = 2**20
HUGE_BYTES = 2**62
LONG_SECONDS = 120.0  # longer than any limit in the tests


class AcceleratorError(RuntimeError):
    """Named as torch's error for a failed CUDA call is."""


KINDS: dict[str, type[BaseException]] = {
    cls.__name__: cls
    for cls in (AcceleratorError, GaugeError, KeyboardInterrupt, MemoryError, OSError, RuntimeError, ValueError)
}


def give(value: Any) -> Any:
    return value


def describe(outcome: ProcessOutcome) -> dict[str, Any]:
    return {"class": type(outcome).__qualname__, "ended": outcome.ended, "seconds": outcome.seconds}


def tell_about_the_process() -> dict[str, Any]:
    import peft_gauge

    return {
        "pid": os.getpid(),
        "group": os.getpgid(0),
        "session": os.getsid(0),
        "parent": os.getppid(),
        "modules": sorted(sys.modules),
        "package": peft_gauge.__file__,
        "environment": dict(os.environ),
        "working_directory": str(Path.cwd()),
        "files": _open_files(),
    }


def _open_files() -> dict[str, str]:
    files = {}
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own
            files[link.name] = str(link.readlink())
    return files


def leave_a_mark() -> dict[str, list[str]]:
    """Change what a fresh process does not have: an attribute of a library's module."""
    before = list(getattr(threading, "marks", []))
    threading.marks = [*before, "mark"]  # type: ignore[attr-defined]
    return {"before": before, "after": threading.marks}  # type: ignore[attr-defined]


def draw() -> dict[str, Any]:
    """Random numbers as they come, with no seed set."""
    import random

    import numpy as np
    import torch

    return {
        "python": random.random(),
        "numpy": float(np.random.rand()),
        "torch": torch.rand(3).tolist(),
        "torch's seed": torch.initial_seed(),
    }


def meet(folder: str, number: int, company: int) -> int:
    """Return ``number`` once ``company`` processes have come to ``folder``, so that all of them live at one time."""
    Path(folder, str(number)).touch()
    while len(list(Path(folder).iterdir())) < company:
        time.sleep(0.01)
    return number


def import_what_is_measured_with() -> None:
    import peft_gauge.measure.preloaded  # noqa: F401


def import_beside_a_card() -> dict[str, list[str]]:
    """What asked CUDA for the GPU while all was imported that a server imports on a machine that has one."""
    import torch

    from peft_gauge import machine

    asked: list[str] = []

    def told(name: str, function: Any) -> Any:
        def ask(*args: Any, **kwargs: Any) -> Any:
            if os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK") != "1":  # torch 2.11 asks NVML as inductor is imported
                asked.append(name)
            return function(*args, **kwargs)

        return ask

    for name in ("is_available", "device_count", "init", "_lazy_init"):
        setattr(torch.cuda, name, told(name, getattr(torch.cuda, name)))
    torch.backends.cuda.is_built = lambda: True
    machine.nvidia_driver = lambda: machine.Driver(cards=1)  # type: ignore[assignment]
    import_what_is_measured_with()
    asked += _variables_of_imports()
    return {"asked": asked, "imported": sorted({"peft", "bitsandbytes", "torch._dynamo"} & set(sys.modules))}


def _variables_of_imports() -> list[str]:
    """The modules that are imported without the variables that go with an import, and variables that are left."""
    from peft_gauge.measure import preloaded

    needed = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    wrong: list[str] = []

    def import_module(name: str) -> None:
        if not needed.items() <= os.environ.items():
            wrong.append(name)

    vars(preloaded)["importlib"] = SimpleNamespace(import_module=import_module)
    preloaded.import_ahead()
    return [*wrong, *(needed.keys() & os.environ.keys())]


def name_what_is_imported() -> list[str]:
    known = {"peft", "bitsandbytes", "torch._dynamo", "torch._inductor.compile_fx"}
    return sorted(known & set(sys.modules))


def tell_what_a_fork_would_not_survive() -> dict[str, bool]:
    import torch

    from peft_gauge._internals.torch import in_bad_fork

    return {"cuda_initialized": torch.cuda.is_initialized(), "in_bad_fork": in_bad_fork()}


def measure_and_train(setup: Any) -> dict[str, Any]:
    """A measured case, and the losses of a few steps of its own."""
    from peft_gauge.measure import passes
    from peft_gauge.training.cases import build_job

    metrics = passes.measure(setup)
    job = build_job(setup.case, stream=setup.stream)
    job.warm_up(4)
    return {"metrics": metrics, "losses": job.losses}


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def give_nan() -> dict[str, float]:
    return {"loss": float("nan")}


def give_an_object() -> object:
    return object()


def note_an_object() -> None:
    note(phase="build", what=object())


def allocate(tensor_bytes: int) -> dict[str, int]:
    """Hold a written tensor for a moment, then give it back, with this process's memory watched."""
    import psutil
    import torch

    process = psutil.Process()
    torch.ones(1)
    before_bytes = process.memory_info().rss
    note(before_bytes=before_bytes)
    with watch(lambda: {"rss_bytes": process.memory_info().rss, "rss_peak_bytes": process.memory_info().rss}, 0.01):
        tensor = torch.ones(tensor_bytes, dtype=torch.uint8)
        time.sleep(0.2)
        held_bytes = tensor.untyped_storage().nbytes()
        del tensor
    return {"held_bytes": held_bytes}


def raise_out_of_memory() -> NoReturn:
    import torch

    raise torch.OutOfMemoryError("known by its class, not by these words")


def allocate_the_impossible() -> None:
    import torch

    torch.empty(HUGE_BYTES, dtype=torch.uint8)


def allocate_an_impossible_bytearray() -> None:
    bytearray(HUGE_BYTES)


def raise_from_out_of_memory() -> None:
    try:
        bytearray(HUGE_BYTES)
    except MemoryError as error:
        cause = error
    raise GaugeError("the step failed; take a smaller one") from cause


def raise_while_out_of_memory_is_handled() -> None:
    try:
        bytearray(HUGE_BYTES)
    except MemoryError:
        raise_error("ValueError", "while cleaning up")


def raise_after_out_of_memory_was_handled() -> None:
    try:
        bytearray(HUGE_BYTES)
    except MemoryError:
        note(phase="fell back")
    raise ValueError("something else")


def raise_error(kind: str, message: str) -> NoReturn:
    raise KINDS[kind](message)


def break_the_device_while_watched(readings: str) -> None:
    """What is read is also kept in the file ``readings``, a letter a reading."""

    def read() -> dict[str, int | None]:
        with Path(readings).open("a") as file:
            file.write("r")
        return {"allocated_bytes": 7}

    with watch(read, LONG_SECONDS):
        raise AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")


def fail_while_watched() -> None:
    readings = iter([{"allocated_peak_bytes": 5}, {"allocated_peak_bytes": 9}])
    with watch(lambda: next(readings), LONG_SECONDS):
        raise ValueError("not the reading's fault")


def fail_with_the_last_reading() -> None:
    readings = iter([{"allocated_peak_bytes": 5}])
    with watch(lambda: next(readings), LONG_SECONDS):
        raise ValueError("not the reading's fault")


def watch_what_cannot_be_read_for_a_while() -> None:
    readings = 0

    def read() -> dict[str, int | None]:
        nonlocal readings
        readings += 1
        if readings == 2:  # the thread's
            raise OSError("no reading")
        return {"allocated_bytes": readings}

    with watch(read, 0.01):
        time.sleep(0.2)


def watch_these(*readings: dict[str, int | None]) -> None:
    """Watch for an instant between each two of ``readings``."""
    rest = iter(readings)
    for _ in range(len(readings) // 2):
        with watch(lambda: next(rest), LONG_SECONDS):
            pass


def exit_at_once(code: int) -> NoReturn:
    print("last", "words")
    os._exit(code)


def exit_politely(code: int) -> NoReturn:
    sys.exit(code)


def exit_as_bitsandbytes_does() -> NoReturn:
    print("Error out of memory at line 380 in file /src/csrc/ops.cu", file=sys.stderr)
    os._exit(1)


def be_killed(by: int, metrics: dict[str, Any]) -> None:
    note(phase="build", step=1)
    note(**metrics)
    os.kill(os.getpid(), by)
    time.sleep(LONG_SECONDS)


def read_address_zero() -> None:
    note(phase="step")
    ctypes.string_at(0)


def hang_in_python(metrics: dict[str, Any]) -> None:
    """`re` holds the interpreter lock while it backtracks."""
    note(**metrics)
    re.fullmatch(r"(a+)+b", "a" * 64)


def hang_in_native_code(metrics: dict[str, Any], pid_file: str | None = None) -> None:
    """A `PyDLL` call keeps the interpreter lock, so no other thread of this process runs."""
    note(**metrics)
    if pid_file is not None:
        write_pid(pid_file)
    ctypes.PyDLL(None).sleep(int(LONG_SECONDS))


def leave_a_thread_behind() -> str:
    threading.Thread(target=time.sleep, args=(LONG_SECONDS,)).start()
    return "returned"


def leave_a_grandchild_behind() -> dict[str, int]:
    """The grandchild keeps every file open that the child has open."""
    pid = os.fork()
    if pid == 0:
        time.sleep(LONG_SECONDS)
        os._exit(0)
    return {"grandchild": pid}


def announce_and_hang(pid_file: str, metrics: dict[str, Any]) -> None:
    note(**metrics)
    write_pid(pid_file)
    time.sleep(LONG_SECONDS)


def write_pid(pid_file: str) -> None:
    part = Path(f"{pid_file}.part")
    part.write_text(str(os.getpid()))
    part.replace(pid_file)


def be_noisy(lines: int) -> str:
    for _ in range(lines):
        print("x" * 99)
        print("y" * 99, file=sys.stderr)
    return "done with it"


def heed_ctrl_c() -> None:
    """For ``preexec_fn``: a shell's background job ignores SIGINT, and so would all that this process starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
