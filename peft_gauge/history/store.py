"""Where runs are saved: a local folder, or an address of fsspec (``s3://``, ``gs://``, ``hf://``, …).

`place` turns the text of ``--results`` into a path. An address becomes a folder in the user's cache that stands for it
and for this process is known to do so: listing it lists the address, reading a file below it fetches the file first.
So the rest of the package knows paths only. Saved files never change, so a fetched file is valid as long as its size
is. ``file://`` is a local folder like any other. The network is used only for an address that the user gave.

How two writers get two numbers:

- Memory, S3 and Google Storage create an object only if it does not exist (fsspec's ``mode="create"``: the header
  If-None-Match on S3, ifGenerationMatch on Google Storage). A writer claims its number by such an object, as in a local
  folder by an exclusively created file, saves the run, also exclusively, and deletes the claim.
- Other stores, and servers that ignore the condition (each claim is created a second time, which must be refused),
  may give two writers the same number, but never the same name: it ends in eight random digits.

An object is stored whole or not at all. On a file system, the file is written under a hidden name and renamed. The
stored bytes are read back and compared.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from peft_gauge import paths
from peft_gauge.errors import GaugeError, one_line
from peft_gauge.files import slug, write_whole

EXCLUSIVE = frozenset({"memory", "s3", "s3a", "gs", "gcs"})
"""Protocols whose stores create an object only if there is none, in one request."""
OBJECT_STORES = frozenset({*EXCLUSIVE, "hf", "abfs", "abfss", "az", "oci", "oss"})
"""Protocols whose stores have no folders, and store an object whole or not at all."""
LOCAL = ("file", "local")

_ADDRESSES: dict[Path, str] = {}  # the folders that stand for an address
_SIZES: dict[Path, int] = {}  # of files that were listed
_TURN = threading.Lock()  # fsspec's memory checks and creates in two steps


class _Remote(NamedTuple):
    system: Any
    path: str
    address: str


def place(text: str | Path) -> Path:
    """The folder or file of the user's ``text``, which is a path or an address of fsspec; nothing is contacted."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", str(text)) if isinstance(text, str) else None
    if match is None:
        return Path(text)
    address = str(text)[: match.end()] + str(text)[match.end() :].rstrip("/")
    if match[1].lower() in LOCAL:
        return Path(_open(address).path)
    folder, slash, name = address.rpartition("/")
    if not name.endswith(".json") or folder.endswith("/"):
        folder, slash, name = address, "", ""
    digest = hashlib.sha256(folder.encode()).hexdigest()[:12]
    root = paths.cache().absolute() / "histories" / f"{slug(folder)[:60]}-{digest}"
    _ADDRESSES[root] = folder
    return root / name if slash else root


def address_of(path: Path) -> str | None:
    """The address that ``path`` stands for; ``None`` for a local path."""
    for root in (path, *path.parents):
        if root in _ADDRESSES:
            below = path.relative_to(root).as_posix()
            return _ADDRESSES[root] if below == "." else f"{_ADDRESSES[root].rstrip('/')}/{below}"
    return None


def shown(path: Path) -> str:
    """``path`` for a message: the address that it stands for, if it does."""
    return address_of(path) or str(path)


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a local folder, or stands for a remote one, which may be empty."""
    return path.is_dir() if address_of(path) is None else path.suffix != ".json"


def is_file(path: Path) -> bool:
    """Whether ``path`` is a local file, or stands for a remote one, which may not exist."""
    return path.is_file() if address_of(path) is None else path.suffix == ".json"


def check(folder: Path) -> None:
    """Raise `GaugeError` if the package for the address of ``folder`` is missing; the address is not contacted."""
    address = address_of(folder)
    if address is not None:
        _open(address)


def entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders and the regular files in ``folder``; an address without objects has none.

    Raises `OSError` for a local folder that cannot be listed, `GaugeError` for an address.
    """
    remote = _remote(folder)
    if remote is None:
        found = list(folder.iterdir())
        return [path for path in found if path.is_dir()], [path for path in found if path.is_file()]
    folders, files = [], []
    for entry in _listed(remote):
        path = folder / entry["name"].rstrip("/").rpartition("/")[2]
        if entry["type"] == "directory":
            folders.append(path)
        else:
            files.append(path)
            _SIZES[path] = entry["size"]
    return folders, files


def fetch(path: Path, most_bytes: int) -> None:
    """Make sure that ``path`` has the content of the remote file that it stands for; nothing for a local path.

    Raises `GaugeError` if the file does not exist, cannot be read or has more than ``most_bytes``.
    """
    remote = _remote(path)
    if remote is None:
        return
    with _errors(remote.address, "cannot be read"):
        size = _SIZES[path] if path in _SIZES else int(remote.system.info(remote.path)["size"])
        if path.is_file() and path.stat().st_size == size:
            return
        if size > most_bytes:
            limit = f"{size / 1e6:.0f} MB; the limit is {most_bytes / 1e6:.0f} MB"
            raise GaugeError(f"{remote.address} is too large for a run: {limit}")
        content = remote.system.cat_file(remote.path)
    if len(content) != size:
        raise GaugeError(f"{remote.address} cannot be read: {len(content)} of {size} bytes arrived")
    _keep(path, content)


def numbers(names: Iterable[str]) -> list[int]:
    """The numbers with which ``names`` of saved runs begin (``NNNN_``); other names have none."""
    return [int(match[0]) for name in names if (match := re.match(r"\d+(?=_)", name))]


def save(folder: Path, name: str, content: bytes) -> Path:
    """Store ``content`` as ``NNNN_<name>.json`` at the address of ``folder``, and return the path that stands for it.

    Nothing is overwritten, and no reader sees a part of it. Raises `GaugeError` for anything that the store refuses.
    """
    remote = _remote(folder)
    assert remote is not None, f"{folder} is a local folder"
    system = remote.system
    with _errors(remote.address, "refuses the run"):
        if not _is_of(system, OBJECT_STORES):
            system.makedirs(remote.path, exist_ok=True)
        with _number(remote) as (number, is_own):
            file = f"{number:04d}_{name}{'' if is_own else f'_{secrets.token_hex(4)}'}.json"
            target = f"{remote.path}/{file}"
            if is_own:
                _create(system, target, content)
            elif _is_of(system, OBJECT_STORES):
                system.pipe_file(target, content)
            else:
                hidden = f"{remote.path}/.{file}.part"
                system.pipe_file(hidden, content)
                system.mv(hidden, target)
            if system.cat_file(target) != content:
                raise GaugeError(f"{remote.address}/{file} is not what was sent; store it again")
    path = folder / file
    _SIZES[path] = len(content)
    with suppress(GaugeError):  # without room in the cache, a reader fetches it
        _keep(path, content)
    return path


@contextmanager
def _number(remote: _Remote) -> Iterator[tuple[int, bool]]:
    """The next free number at ``remote``, and whether no other writer can have it too."""
    system, number = remote.system, 1 + max(_numbers(remote), default=0)
    if not _is_of(system, EXCLUSIVE) or "mode" not in inspect.signature(system.pipe_file).parameters:
        yield number, False
        return
    while True:
        claim = f"{remote.path}/.{number:04d}.claim"
        try:
            _create(system, claim, b"claimed")
        except FileExistsError:
            number += 1
            continue
        # Another writer may have saved its run and deleted its claim since the numbers were listed.
        if number in _numbers(remote):
            system.rm_file(claim)
            number += 1
            continue
        break
    try:
        yield number, _is_refused(system, claim)
    finally:
        with suppress(Exception):  # the run is saved or its error is on its way; a claim left behind costs a number
            system.rm_file(claim)


def _is_refused(system: Any, claim: str) -> bool:
    try:
        _create(system, claim, b"claimed")
    except FileExistsError:
        return True
    return False


def _create(system: Any, path: str, content: bytes) -> None:
    """Store an object that does not exist yet. Raises `FileExistsError` if it does, or is being stored."""
    try:
        with _TURN:
            system.pipe_file(path, content, mode="create")
    except FileExistsError:
        raise
    except Exception as error:
        # s3fs's own error has only the sentence; its cause, botocore's, has the code.
        if re.search(r"PreconditionFailed|ConditionalRequestConflict|\b412\b", f"{error!r} {error.__cause__!r}"):
            raise FileExistsError(path) from error
        raise


def _numbers(remote: _Remote) -> list[int]:
    return numbers(entry["name"].rpartition("/")[2] for entry in _listed(remote))


def _listed(remote: _Remote) -> list[dict[str, Any]]:
    """The entries at ``remote`` now; fsspec's cache of listings is dropped first."""
    with _errors(remote.address, "cannot be listed"):
        remote.system.invalidate_cache()
        try:
            return list(remote.system.ls(remote.path, detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return []


def _keep(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content, durable=False)
    except OSError as error:
        raise GaugeError(
            f"{shown(path)} cannot be kept in {path.parent}: {error.strerror or error}; "
            "PEFT_GAUGE_CACHE names another cache"
        ) from error


def _remote(path: Path) -> _Remote | None:
    address = address_of(path)
    return None if address is None else _open(address)


def _open(address: str) -> _Remote:
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(address)
    except ImportError as error:
        raise GaugeError(f"{address}: {one_line(error, 120)}; pip install 'peft-gauge[remote]' has it") from error
    except Exception as error:  # each store has its own
        raise GaugeError(f"{address} cannot be opened: {_reason(error)}") from error
    return _Remote(system, path.rstrip("/"), address)


@contextmanager
def _errors(address: str, problem: str) -> Iterator[None]:
    """Raises `GaugeError` for any error of a store: each raises its own, and those of the network below it."""
    try:
        yield
    except GaugeError:
        raise
    except FileNotFoundError as error:
        raise GaugeError(f"{address} does not exist") from error
    except Exception as error:
        raise GaugeError(f"{address} {problem}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return one_line(text, 200) or type(error).__name__


def _is_of(system: Any, protocols: frozenset[str]) -> bool:
    own = system.protocol
    return bool({own} & protocols if isinstance(own, str) else {*own} & protocols)
