"""Plans of earlier sessions, in the user's cache folder.

A plan depends on nothing but its request, the code that makes it, and the calibrations of GPUs. The cache's key holds
all of them: the code of this package and of every library that a plan runs through, by the size and the time of change
of each file. After an upgrade, an edit or a calibration, every step is planned anew.
"""

from __future__ import annotations

import hashlib
import pickle
import platform
import shutil
import sys
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from peft_gauge import paths
from peft_gauge.files import write_whole
from peft_gauge.plan.record import Plan

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from peft_gauge.plan.record import PlanRequest

LIBRARIES = (
    *("peft_gauge", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl"),
    *("liger_kernel", "cut_cross_entropy", "torchao"),
)
"""The code that a plan runs through, as far as it is installed."""

KEPT_VERSIONS = 4
"""Plans of so many states of the code are kept, so that two environments can share a cache."""


class PlanCache:
    """Plans in ``folder``, each under its request and the present code; unreadable or lost files are planned anew."""

    def __init__(self, folder: Path, code: str | None = None) -> None:
        self._folder = folder
        self._code = code

    def get(self, request: PlanRequest) -> Plan | None:
        """The plan of ``request`` from an earlier session, if there is one."""
        try:
            found = pickle.loads(self._file(request).read_bytes())
        except Exception:  # a damaged file can raise anything
            return None
        return found if isinstance(found, Plan) else None

    def put(self, request: PlanRequest, plan: Plan) -> None:
        """Keep ``plan``; a folder that cannot be written keeps nothing."""
        file = self._file(request)
        with suppress(OSError):
            if not file.parent.is_dir():
                file.parent.mkdir(parents=True)
                self._prune()
            write_whole(file, pickle.dumps(plan), durable=False)

    def _file(self, request: PlanRequest) -> Path:
        folder = Path(request.calibration_folder) if request.calibration_folder else paths.calibrations()
        asked = repr(request) + (code_of(folder, "*.json") if request.gpus else "")
        return self._folder / (self._code or present_code()) / f"{hashlib.sha256(asked.encode()).hexdigest()}.pickle"

    def _prune(self) -> None:
        versions = sorted(self._folder.iterdir(), key=lambda each: each.stat().st_mtime, reverse=True)
        for old in versions[KEPT_VERSIONS:]:
            shutil.rmtree(old, ignore_errors=True)


@cache
def present_code() -> str:
    """A digest of Python and of the code of `LIBRARIES`: paths, sizes and times of change."""
    parts = [sys.version, platform.machine(), *map(code_of, _folders())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _folders() -> Iterator[Path]:
    for name in LIBRARIES:
        spec = find_spec(name)
        if spec is not None:
            yield from map(Path, spec.submodule_search_locations or ())


def code_of(folder: Path, pattern: str = "*.py") -> str:
    """A digest of the files in ``folder`` that match ``pattern``; of nothing, if there is no such folder."""
    return hashlib.sha256("\n".join(_stats(folder.rglob(pattern))).encode()).hexdigest()


def _stats(files: Iterable[Path]) -> Iterator[str]:
    for file in sorted(files):
        stat = file.stat()
        yield f"{file} {stat.st_size} {stat.st_mtime_ns}"
