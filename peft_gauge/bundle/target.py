"""The Python and platform of the node that a bundle is for, as pip's tags and as environment markers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft_gauge.errors import GaugeError, unknown

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

OLDEST_GLIBC = {"x86_64": 5, "aarch64": 17}
"""Machine -> minor version of the oldest glibc 2.x that manylinux has a tag for (PEP 513, PEP 599)."""
LEGACY_TAGS = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}  # PEP 600, "Legacy manylinux tags"
DEFAULT_GLIBC = 28  # RHEL 8; the oldest with wheels of current torch, pyarrow and others
DEFAULT_PLATFORM = f"manylinux_2_{DEFAULT_GLIBC}_x86_64"


@dataclass(frozen=True)
class Target:
    """CPython ``python`` (major, minor, and the patch or ``None``) on Linux with glibc 2.``glibc`` on ``machine``."""

    python: tuple[int, int, int | None]
    glibc: int = DEFAULT_GLIBC
    machine: str = "x86_64"

    @property
    def series(self) -> str:
        """Such as "3.12", the version in wheel tags and environment markers."""
        return f"{self.python[0]}.{self.python[1]}"

    @property
    def full_version(self) -> str:
        """With the patch, or 0 if unknown, as in pip: backports are then included rather than missing."""
        return f"{self.series}.{self.python[2] or 0}"

    @property
    def platform(self) -> str:
        return f"manylinux_2_{self.glibc}_{self.machine}"

    def __str__(self) -> str:
        return f"Python {self.series} on {self.platform}"

    def markers(self) -> dict[str, str]:
        """The node's PEP 508 environment. Unknown values (the kernel's release) are empty."""
        return {
            "implementation_name": "cpython",
            "implementation_version": self.full_version,
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": self.full_version,
            "python_version": self.series,
            "sys_platform": "linux",
        }

    def platform_tags(self) -> list[str]:
        """Tags of wheels that run there, newest glibc first. pip does not add the older ones itself."""
        tags = []
        for minor in range(self.glibc, OLDEST_GLIBC[self.machine] - 1, -1):
            tags.append(f"manylinux_2_{minor}_{self.machine}")
            if minor in LEGACY_TAGS:
                tags.append(f"{LEGACY_TAGS[minor]}_{self.machine}")
        return [*tags, f"linux_{self.machine}"]

    def pip_options(self) -> list[str]:
        """Options of ``pip install`` and ``pip download`` that select wheels, and only wheels, for the node."""
        python = ["--python-version", self.full_version, "--implementation", "cp"]
        abi = ["--abi", f"cp{self.python[0]}{self.python[1]}"]  # pip adds abi3 and none
        platforms = [word for tag in self.platform_tags() for word in ("--platform", tag)]
        return [*python, *abi, *platforms, "--only-binary", ":all:"]


def parse_target(python: str, platform: str, supported: SpecifierSet) -> Target:
    """The node described by ``--python`` and ``--platform``; raises `GaugeError` for an invalid value, or for a Python
    that ``supported`` does not include.
    """
    version = re.fullmatch(r"(\d+)\.(\d+)(?:\.(\d+))?", python.strip())
    if version is None:
        raise GaugeError(f"--python {python!r} is not a valid Python version; write it as 3.12 or 3.12.4")
    major, minor, patch = int(version[1]), int(version[2]), None if version[3] is None else int(version[3])
    target = Target((major, minor, patch), *_parse_platform(platform.strip()))
    if target.full_version not in supported:
        raise GaugeError(f"peft-gauge does not run on Python {python}; it needs {supported}")
    return target


def _parse_platform(text: str) -> tuple[int, str]:
    """glibc's minor version and the machine."""
    machines = "|".join(OLDEST_GLIBC)
    found = re.fullmatch(rf"(?:manylinux_2_(\d+)_|(manylinux(?:1|2010|2014))_|linux_)?({machines})", text)
    if found is None:
        raise unknown("platform", text, [f"manylinux_2_{DEFAULT_GLIBC}_{machine}" for machine in OLDEST_GLIBC])
    legacy = {name: minor for minor, name in LEGACY_TAGS.items()}
    machine = found[3]
    glibc = int(found[1]) if found[1] else legacy.get(found[2], DEFAULT_GLIBC)
    if glibc < OLDEST_GLIBC[machine]:
        raise GaugeError(f"--platform {text}: there are no wheels for glibc 2.{glibc} on {machine}; give the node's")
    return glibc, machine
