"""The usable memory of GPUs: a table of common GPUs, each size with its source."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from dataclasses import dataclass, replace
from decimal import Decimal, DecimalException
from functools import cache
from typing import Any

from peft_gauge.errors import GaugeError
from peft_gauge.paths import calibrations, fixture

_UNITS = {"b": 1} | {
    f"{prefix}{kind}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for kind, base in (("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z]*)", re.ASCII)
_CAPABILITY = re.compile(r"(.*\S)\s+sm_(\d{1,2})(\d)[a-z]?", re.ASCII | re.IGNORECASE)
_ONE = re.compile(r"^\s*1\s*[x×]\s*(?=\S)", re.IGNORECASE)
_SOLD = re.compile(r"(\d{1,5})\s*gb", re.ASCII)
_LEAST_SHARE_REPORTED = 0.97  # of the advertised memory, for GPUs without ECC
_MAKER_WORDS = ("nvidia", "geforce", "tesla", "quadro")
_LEAST_BYTES = 2 << 20  # one allocator segment; a smaller size is probably a forgotten unit
_MOST_BYTES = 2**63 - 1


@dataclass(frozen=True)
class Gpu:
    """A GPU, or only a memory size.

    Attributes:
        usable_bytes: the total that the driver reports (`torch.cuda.get_device_properties().total_memory`), to two
            decimals of a GiB or a whole MiB, as its `source` printed it.
        nominal: the size is from the vendor's data sheet; the driver will report a few percent less.
    """

    name: str
    usable_bytes: int
    marketing_memory: str | None
    compute_capability: tuple[int, int] | None
    source: str
    url: str | None = None
    nominal: bool = False


def table() -> tuple[Gpu, ...]:
    """Every GPU of `fixtures/gpus.toml`, from the smallest to the largest."""
    return tuple(sorted(set(_by_key().values()), key=lambda gpu: (gpu.usable_bytes, gpu.name)))


def lookup(text: str) -> Gpu:
    """The GPU called ``text``, or an unnamed one of that size.

    Names ignore case, spaces, dashes and the vendor's words, so `torch.cuda.get_device_name()` can be passed unchanged.
    A GPU outside the table can be named after it was calibrated on this machine.

    A whole number of `GB`, such as `24GB`, is an advertised size: the median usable memory of the table's GPUs with
    that size. Any other size is exact: `24GiB` (2³⁰), `25300MB` (10⁶), or plain bytes: `80e9`, `17179869184`. A
    compute capability can follow, as in `24GB sm_90`; CUDA context and workspaces depend on it. `1x24GB` is `24GB`.

    Raises `GaugeError` for an unknown name (with the nearest names) and for an invalid size.
    """
    text = _ONE.sub("", text)
    key = _key(text)
    gpu = _by_key().get(key)
    if gpu is not None:
        return gpu
    with_capability = _CAPABILITY.fullmatch(text.strip())
    if with_capability is not None:
        size, major, minor = with_capability.groups()
        return replace(lookup(size), name=text.strip(), compute_capability=(int(major), int(minor)))
    sold = _SOLD.fullmatch(text.strip().lower())
    if sold is not None and parse_bytes(text):
        return _sold_as(text.strip(), int(sold[1]))
    match = _SIZE.fullmatch(text.strip().lower())
    if match is not None and (match[2] or "b") in _UNITS:
        return Gpu(text.strip(), parse_bytes(text), None, None, source="a size given by the user")
    calibrated = _calibrated(key)
    if calibrated is not None:
        return calibrated
    raise GaugeError(f"unknown GPU {text!r}; {_nearest(key)}, or specify a size such as 24GB")


def _calibrated(key: str) -> Gpu | None:
    """The GPU with this key that `peft-gauge calibrate` has measured on this machine.

    Unreadable files are skipped here: `overheads.read_calibration` reports them when their own GPU is requested.
    """
    for file in sorted(calibrations().glob("*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            name, usable_bytes = str(record["gpu"]), int(record["usable_bytes"])
            major, minor = record.get("allocator", {}).get("compute_capability", (None, None))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if key and _key(name) == key:
            capability = None if major is None else (major, minor)
            return Gpu(name, usable_bytes, None, capability, source=f"measured here: {file.name}")
    return None


def _sold_as(name: str, gigabytes: int) -> Gpu:
    """A GPU advertised with ``gigabytes``: vendors mean GiB, and the driver reserves a part."""
    same = [gpu for gpu in table() if gpu.marketing_memory == f"{gigabytes} GB" and not gpu.nominal]
    if not same:
        usable_bytes = int(gigabytes * 2**30 * _LEAST_SHARE_REPORTED)
        return Gpu(name, usable_bytes, None, None, source=f"a GPU sold with {gigabytes} GB: 97 % of {gigabytes} GiB")
    middle = same[(len(same) - 1) // 2]
    return Gpu(name, middle.usable_bytes, None, None, source=f"a GPU sold with {gigabytes} GB: as {middle.name}")


def parse_bytes(text: str) -> int:
    """A size such as `24GB`, `1.5 GiB` or `80e9` as a whole number of bytes, rounded down."""
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None:
        raise GaugeError(f"{text!r} is not a memory size; use 24GB, 24GiB or a number of bytes")
    unit = match[2] or "b"
    if unit not in _UNITS:
        raise GaugeError(f"{text!r} has an unknown unit; use GB (10^9 bytes) or GiB (2^30 bytes)")
    try:
        # Compare before converting to int: 1e999999999 would exhaust memory.
        size = Decimal(match[1]) * _UNITS[unit]
        too_much, too_little = size > _MOST_BYTES, size < _LEAST_BYTES
    except DecimalException:  # an exponent too large for Decimal
        too_much, too_little = "-" not in match[1], True
    if too_much:
        raise GaugeError(f"{text!r} is more than 2^63 bytes; specify the memory of one GPU, such as 24GB")
    if too_little:
        raise GaugeError(f"{text!r} is less than 2 MiB; specify the memory of one GPU with a unit, such as 24GB")
    return int(size)


def _key(name: str) -> str:
    key = re.sub(r"[^a-z0-9.]", "", name.lower())
    for word in _MAKER_WORDS:
        key = key.removeprefix(word)
    return key


def _nearest(key: str) -> str:
    by_key = _by_key()
    containing = [known for known in by_key if key and key in known]
    close = difflib.get_close_matches(key, by_key, n=3, cutoff=0.5)
    names = list(dict.fromkeys(by_key[known].name for known in [*containing, *close]))[:3]
    return f"nearest: {', '.join(names)}" if names else "use a name from fixtures/gpus.toml"


@cache
def _by_key() -> dict[str, Gpu]:
    path = fixture("gpus.toml")
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8"))["gpu"]
        found: dict[str, Gpu] = {}
        for row in rows:
            gpu = _from_row(row)
            for name in (gpu.name, *row.get("aliases", ())):
                if found.setdefault(_key(name), gpu) is not gpu:
                    raise ValueError(f"{name!r} is the name of two GPUs")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GaugeError(f"the GPU table {path} cannot be read ({error}); restore it") from error
    return found


def _from_row(row: dict[str, Any]) -> Gpu:
    major, minor = row["compute_capability"]
    return Gpu(
        name=row["name"],
        usable_bytes=parse_bytes(row["reported"]),
        marketing_memory=row["marketing_memory"],
        compute_capability=(major, minor),
        source=row["source"],
        url=row["url"],
        nominal=row.get("nominal", False),
    )
