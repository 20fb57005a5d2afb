"""``peft-gauge doctor``: check this machine and print how to install missing parts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft_gauge import machine, paths
from peft_gauge.commands.tables import Form, print_csv, print_json, print_markdown
from peft_gauge.errors import GaugeError, one_line
from peft_gauge.files import check_folder
from peft_gauge.history import store
from peft_gauge.training import models

# The oldest supported releases; a test holds them against pyproject.toml.
MINIMUM = {
    "torch": "2.6",
    "transformers": "4.57",
    "peft": "0.18",
    "bitsandbytes": "0.46.1",
    "datasets": "3.0",
    "pytest-benchmark": "5.0",
}

Status = Literal["ok", "missing", "note"]


@dataclass(frozen=True)
class Line:
    """One line of the report: the part that was checked, its status, and how to fix it if it is missing."""

    subject: str
    status: Status
    text: str


def examine(results: Path) -> Iterator[Line]:
    """Check libraries, CPU, GPU, quantization, weights and disk; ``results`` is the folder to save runs to.

    "missing" prevents something that the suite does by default on this kind of machine; "note" prevents an extra only.
    """
    yield from (_library(name, minimum) for name, minimum in MINIMUM.items())
    yield _cpu()
    yield from _gpus()
    yield _tried("NF4 training", _train_nf4, "bitsandbytes quantizes and trains here", "upgrade bitsandbytes")
    yield _weights()
    yield _disk(results)


def print_lines(lines: Sequence[Line], form: Form | None) -> None:
    """Print ``lines`` in ``form``, by default as text."""
    rows = [{"status": line.status, "subject": line.subject, "text": line.text} for line in lines]
    if form == "json":
        print_json(rows)
    elif form == "csv":
        print_csv(rows, ("status", "subject", "text"))
    elif form == "markdown":
        print_markdown(("status", "subject", "text"), [list(row.values()) for row in rows])
    else:
        for line in lines:
            print(f"{line.status:9}{line.subject:18}{line.text}")


def config_line(commands: Mapping[str, Any]) -> Line:
    """Which file gives options their defaults, and whether it is valid; ``commands``: of Typer, by name."""
    from peft_gauge import config_file
    from peft_gauge.commands.defaults import check

    try:
        found = config_file.find()
        names = [] if found is None else check(found, commands)
    except GaugeError as error:
        return Line("config file", "missing", str(error))
    if found is None:
        return Line("config file", "ok", "none: neither peft-gauge.toml nor [tool.peft-gauge] in pyproject.toml")
    return Line("config file", "ok", f"{found.path}: {', '.join(names) or 'no section'}")


def _library(name: str, minimum: str) -> Line:
    from packaging.version import Version

    found = machine.installed_version(name)
    if found is None:
        return Line(name, "missing", f"not installed; pip install '{name}>={minimum}'")
    if Version(found) < Version(minimum):
        return Line(name, "missing", f"{found} is too old; pip install -U '{name}>={minimum}'")
    return Line(name, "ok", found)


def _cpu() -> Line:
    # Not `machine.machine_info()`: it fails where torch cannot use the GPU, which is a line of its own here.
    import cpuinfo
    import psutil

    brand = cpuinfo.get_cpu_info().get("brand_raw")
    return Line("cpu", "ok", f"{brand}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 1e9:.1f} GB")


def _gpus() -> Iterator[Line]:
    """A line for each CUDA device, or why there is none; then NVML, and bitsandbytes' CUDA library."""
    reason = machine.why_no_cuda()
    try:
        cards = machine.accelerators()
    except GaugeError as error:
        yield Line("gpu", "missing", str(error))
        cards = ()
    if reason is not None:
        yield Line("gpu", "note", f"{reason}; GPU cases will be skipped")
    yield from (_gpu(number, card) for number, card in enumerate(cards))
    driver = machine.nvidia_driver()
    hidden = machine.why_hidden(os.environ.get("CUDA_VISIBLE_DEVICES"), driver) if cards else None
    if hidden is not None:
        yield Line("gpu", "note", f"{hidden}; it and every device listed after it are hidden")
    if not driver.absent:
        yield _nvml(driver, cards)
    if cards:
        yield _tried("bitsandbytes CUDA", _load_cuda_kernels, "CUDA library loaded", "QLoRA on the GPU needs it")


def _gpu(number: int, card: machine.Accelerator) -> Line:
    import torch

    driver = machine.nvidia_driver().version or "unknown"
    capability = ".".join(map(str, card.compute_capability))
    text = f"{card.name}, {card.memory_bytes / 1e9:.1f} GB, compute capability {capability}, driver {driver}, "
    return Line(f"gpu {number}", "ok", f"{text}torch built for CUDA {torch.version.cuda}")


def _nvml(driver: machine.Driver, cards: Sequence[machine.Accelerator]) -> Line:
    from peft_gauge.meters.nvml import NvmlMeter

    reason = None if driver.error is None else f"NVML does not respond: {driver.error}"
    for number, card in enumerate(cards):
        reason = reason or NvmlMeter(number, uuid=card.uuid).why_unavailable()
    if reason is not None:
        return Line("nvml", "note", f"{reason}; whole-device memory, clocks and throttling will be unavailable")
    runs = "" if driver.cuda is None else f", runs CUDA up to {driver.cuda[0]}.{driver.cuda[1]}"
    return Line("nvml", "ok", f"driver {driver.version or 'unknown'}{runs}, {driver.cards} GPU(s)")


def _load_cuda_kernels() -> None:
    from peft_gauge.training.quantization import load_bitsandbytes

    load_bitsandbytes("cuda")


def _tried(subject: str, attempt: Callable[[], None], good: str, remedy: str) -> Line:
    try:
        attempt()
    except Exception as error:  # any failure becomes a line of the report
        return Line(subject, "missing", f"{one_line(error, 160)}; {remedy}")
    return Line(subject, "ok", good)


def _train_nf4() -> None:
    """One real QLoRA step of the toy model."""
    from peft_gauge.training import methods
    from peft_gauge.training.cases import Case, build_job
    from peft_gauge.training.settings import StepSettings

    case = Case(models.resolve("toy-llama"), methods.QLORA, StepSettings(batch=1, seq=8), "cpu", "float32")
    job = build_job(case)
    job.warm_up()
    if not job.learned():
        raise GaugeError("a QLoRA step ran but changed no trainable weight")


def _weights() -> Line:
    try:
        record = models.resolve("smollm2-135m", weights="real")
    except GaugeError as error:
        return Line("real weights", "note", f"{error} (without them the same model runs with random weights)")
    return Line("real weights", "ok", str(record.location))


def _disk(results: Path) -> Line:
    address = store.address_of(results)
    if address is not None:
        try:
            store.check(results)
        except GaugeError as error:
            return Line("results", "missing", str(error))
        return Line("results", "ok", f"{address}, not contacted; cache {paths.cache()}")
    try:
        folder = check_folder(results.resolve())
    except OSError as error:
        words = f"{one_line(results, 120)} cannot be written ({error.strerror}); use --results or fix its permissions"
        return Line("results", "missing", words)
    free = shutil.disk_usage(folder).free
    if free < 1e9:
        return Line("results", "missing", f"only {free / 1e6:.0f} MB free at {folder}; free space or use --results")
    return Line("results", "ok", f"{folder}, {free / 1e9:.0f} GB free; cache {paths.cache()}")
