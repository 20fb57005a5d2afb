"""A pytest plugin, and helpers of unit tests: file systems of fsspec that behave badly in a known way.

All of them hold their files in memory, shared with ``memory://``.
"""

from __future__ import annotations

import time
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem


class Denying(MemoryFileSystem):
    """``denying://``: may be read; every write is refused, as a bucket refuses a key without the permission."""

    protocol: tuple[str, ...] = ("denying",)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        raise PermissionError("Access Denied")


class Unreachable(MemoryFileSystem):
    """``unreachable://``: no network."""

    protocol: tuple[str, ...] = ("unreachable",)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        raise ConnectionError("Could not connect to the endpoint URL")


class Plain(MemoryFileSystem):
    """``plain://``: knows no exclusive creation, and has folders as a file system does."""

    protocol: tuple[str, ...] = ("plain",)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        super().pipe_file(path, value)


class Ignoring(Plain):
    """``ignoring://``: a kind of store with exclusive creation, at a server that ignores the condition."""

    protocol: tuple[str, ...] = ("ignoring", "s3")


class Tearing(MemoryFileSystem):
    """``tearing://``: stores half of a run, and reports no error."""

    protocol: tuple[str, ...] = ("tearing", "s3")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        super().pipe_file(path, value[: max(len(value) // 2, 1)], mode=mode)


class Racing(MemoryFileSystem):
    """``racing://``: memory checks whether an object exists and then creates it; here, other threads run in between."""

    protocol: tuple[str, ...] = ("racing", "memory")

    def exists(self, path: str, **kwargs: Any) -> bool:
        found = bool(super().exists(path, **kwargs))
        time.sleep(0.002)
        return found


class Counting(MemoryFileSystem):
    """``counting://``: the files that were read, in their order."""

    protocol: tuple[str, ...] = ("counting", "memory")
    read: list[str] = []  # noqa: RUF012

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        self.read.append(path.rpartition("/")[2])
        content: bytes = super().cat_file(path, *args, **kwargs)
        return content


def register() -> None:
    for kind in (Denying, Unreachable, Plain, Ignoring, Tearing, Racing, Counting):
        kind._strip_protocol = classmethod(_stripped)
        fsspec.register_implementation(kind.protocol[0], kind, clobber=True)


def _stripped(kind: type[MemoryFileSystem], path: str) -> str:
    """Memory's own knows its own protocol only."""
    own = f"{kind.protocol[0]}://"
    stripped: str = MemoryFileSystem._strip_protocol(path.removeprefix(own) if path.startswith(own) else path)
    return stripped


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gauge-cache")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    register()
    fsspec.register_implementation(
        "missing", "no_such_package.FileSystem", clobber=True, errtxt="Install no-such-package"
    )
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    patch.setenv("PEFT_GAUGE_CACHE", config.getoption("--gauge-cache"))
