"""What this machine can run and what is missing, line by line, with how to get it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peft_gauge import machine, models, paths
from peft_gauge.errors import GaugeError, one_line

# The oldest releases that the suite is written for; pyproject.toml has the same, and a test compares the two.
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
    """One line of the doctor's report: what was looked at, how it stands, and what to do where something is missing."""

    subject: str
    status: Status
    text: str


def examine(results: Path) -> Iterator[Line]:
    """Look at libraries, CPU, GPU, quantisation, weights and disk; ``results`` is where runs are to be saved.

    "missing" stops something that the suite does by default on this kind of machine; "note" stops an extra only.
    """
    yield from (_library(name, minimum) for name, minimum in MINIMUM.items())
    info = machine.machine_info()
    yield Line(
        "cpu", "ok", f"{info['cpu']['brand_raw']}, {info['cpu']['count']} cores, {info['ram_bytes'] / 1e9:.1f} GB"
    )
    yield _gpu()
    yield _tried("NF4 training", _train_nf4, "bitsandbytes quantises and trains here", "upgrade bitsandbytes")
    yield _weights()
    yield _disk(results)


def _library(name: str, minimum: str) -> Line:
    from packaging.version import Version

    found = machine.installed_version(name)
    if found is None:
        return Line(name, "missing", f"not installed; pip install '{name}>={minimum}'")
    if Version(found) < Version(minimum):
        return Line(name, "missing", f"{found} is too old; pip install -U '{name}>={minimum}'")
    return Line(name, "ok", found)


def _gpu() -> Line:
    reason = machine.why_no_cuda()
    if reason is not None:
        return Line("gpu", "note", f"{reason}; GPU cases will be skipped")
    accelerator = machine.machine_info()["accelerator"]
    text = f"{accelerator['name']}, {accelerator['memory_bytes'] / 1e9:.1f} GB, driver {accelerator['driver']}"
    return Line("gpu", "ok", text)


def _tried(subject: str, attempt: Callable[[], None], good: str, remedy: str) -> Line:
    try:
        attempt()
    except Exception as error:  # whatever stops it is what the reader wants to know
        return Line(subject, "missing", f"{one_line(error, 160)}; {remedy}")
    return Line(subject, "ok", good)


def _train_nf4() -> None:
    """One real QLoRA step of the toy model."""
    from peft_gauge import methods
    from peft_gauge.cases import Case, build_job
    from peft_gauge.step import StepSettings

    case = Case(models.resolve("toy-llama"), methods.QLORA, StepSettings(batch=1, seq=8), "cpu", "float32")
    job = build_job(case)
    job.warm_up()
    if not job.learned():
        raise GaugeError("a QLoRA step ran and nothing moved")


def _weights() -> Line:
    try:
        record = models.resolve("smollm2-135m", weights="real")
    except GaugeError as error:
        return Line("real weights", "note", f"{error} (without them the same model runs with random weights)")
    return Line("real weights", "ok", str(record.location))


def _disk(results: Path) -> Line:
    folder = next(parent for parent in (results.resolve(), *results.resolve().parents) if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Line("results", "missing", f"{folder} cannot be written; use --results or mend its permissions")
    free = shutil.disk_usage(folder).free
    if free < 1e9:
        return Line("results", "missing", f"only {free / 1e6:.0f} MB free at {folder}; free some or use --results")
    return Line("results", "ok", f"{folder}, {free / 1e9:.0f} GB free; cache {paths.cache()}")
