"""A child for `peft_gauge.environments` without torch: its steps take the time that the library ``gaugeprobe`` says.

Also makes that library, as local wheels.
"""

from __future__ import annotations

import os
import random
import time
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from peft_gauge.environments.worker import check_imports, check_versions, serve
from peft_gauge.errors import GaugeError

STEP_SECONDS = 0.01


def make_wheel(
    folder: Path, version: str, *, requires: str | None = None, name: str = "gaugeprobe", **facts: Any
) -> Path:
    """A wheel of ``name``, whose module holds ``facts``, in ``folder``."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{name}/__init__.py": f"FACTS = {facts!r}\n",
        f"{info}/METADATA": metadata + (f"Requires-Dist: {requires}\n" if requires else ""),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for inside, text in [*files.items(), (f"{info}/RECORD", record)]:
            wheel.writestr(inside, text)
    return path


def shape(products: int = 2) -> dict[str, Any]:
    """A fingerprint of a step with so many matrix products forward."""
    nothing: dict[str, Any] = {"forward": {}, "backward": {}, "optimizer": {}}
    flops = 1000 * products
    return {
        "version": 1,
        "operators": nothing | {"forward": {"aten.mm.default": {"layer": products}}},
        "flops": nothing | {"forward": {"aten.mm.default": flops}},
        "product_flops": nothing | {"forward": {"float32": flops}},
        "flops_complete": True,
        "flops_unknown": {},
        "bytes": {phase: {"read": 8, "written": 8, "allocated": 8} for phase in nothing},
        "peak_bytes": {"total": 4096},
        "resident_bytes": {"total": 4096},
        "saved_activation_bytes": 0,
        "trainable": {"total": 10, "by_dtype": {"float32": 10}},
        "adapter_bytes": None,
        "losses": [3.0, 2.0, 1.0],
    }


def metrics(products: int = 2, **more: Any) -> dict[str, Any]:
    """What a built case tells, as `peft_gauge.environments.worker` gives it."""
    return {
        "method": "lora",
        "model": "toy-llama",
        "device": "cpu",
        "settings": {"batch": 1},
        "trainable_params": 10,
        "allocated_peak_bytes": 4096,
        "flops_per_step": 1000 * products,
        "fingerprint": shape(products),
        **more,
    }


MACHINE: dict[str, Any] = {
    "name": "a-2c-cpu",
    "python_version": "3.11.7",
    "threads": 1,
    "cpu": {"brand_raw": "a", "count": 2},
    "accelerator": {"name": None},
}


class Child:
    """Its facts: ``factor`` on the step's time, ``products``, ``settings``, and ``fails``: what goes wrong."""

    def __init__(self) -> None:
        self.random = random.Random(os.getpid())
        self.facts: Mapping[str, Any] = {}
        self.packages: Mapping[str, str] = {}

    def start(
        self,
        requirements: Iterable[str],
        packages: Mapping[str, str],
        cores: Collection[int] | None,
        also: Iterable[str],
    ) -> dict[str, Any]:
        check_versions(requirements, packages)
        self.packages = packages
        return {**MACHINE, "libraries": {"gaugeprobe": None, **packages}, "pid": os.getpid()}

    def describe(self, **case: Any) -> dict[str, Any]:
        self.build(**case)
        settings = self.facts.get("settings", {"batch": 1})
        return metrics(self.facts.get("products", 2), settings=settings, method=case["method"])

    def build(self, **case: Any) -> None:
        try:
            import gaugeprobe  # type: ignore[import-not-found]
        except ModuleNotFoundError:
            self.facts = {}
        else:
            check_imports(self.packages)
            self.facts = gaugeprobe.FACTS
        print("a library's chatter")
        if self.facts.get("fails") == "build":
            raise GaugeError("this release cannot build the case")

    def step(self) -> float:
        fails = self.facts.get("fails")
        if fails == "step":
            raise ValueError("no such kernel\nmore about it")
        if fails == "die":
            print("last words")
            os._exit(7)
        if fails == "hang":
            time.sleep(60)
        return STEP_SECONDS * self.facts.get("factor", 1.0) * self.random.lognormvariate(0, 0.02)


if __name__ == "__main__":
    serve(Child())
