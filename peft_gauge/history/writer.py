"""Save a run atomically."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peft_gauge import __version__, paths
from peft_gauge.errors import GaugeError, one_line
from peft_gauge.files import write_whole
from peft_gauge.history import store


def bundled_commit(file: Path = paths.COMMIT) -> dict[str, Any] | None:
    """The commit of a checkout that `peft-gauge bundle` copied to a node, in the form that pytest-benchmark saves.

    ``None`` in any other checkout: there git knows the commit.
    """
    try:
        commit = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return commit if isinstance(commit, dict) else None


def commit_info() -> dict[str, Any]:
    """The commit of the suite, in the form that pytest-benchmark saves, whatever the current folder is.

    A bundled checkout has its commit in a file (`bundled_commit`); an installed wheel has none and gives its version.
    """
    if paths.is_installed():
        return {"id": "unversioned", "dirty": False, "project": "peft-gauge", "version": __version__}
    bundled = bundled_commit()
    if bundled is not None:
        return bundled
    from pytest_benchmark.utils import get_commit_info

    with chdir(paths.PROJECT):  # it runs git in the current folder
        return dict(get_commit_info())


def write_run(results: Path, machine: str, run: Mapping[str, Any], *, now: datetime | None = None) -> Path:
    """Save ``run`` as ``results/<machine>/NNNN_<commit>_<time>.json`` and return the path.

    If ``results`` stands for an address (`peft_gauge.history.store`), the run is saved in the user's cache first. It
    stays there if the store refuses it, and the error names its path.

    The file is written under a temporary name, flushed to disk and renamed, so it is never incomplete. Two runs that
    end at the same time get two numbers. Raises `GaugeError` for a value that JSON cannot hold (such as NaN), a full
    disk or a folder that is not writable; no file is left behind then.
    """
    try:
        text = json.dumps(run, indent=2, allow_nan=False, default=_refuse)
    except (TypeError, ValueError) as error:
        raise GaugeError(f"this run cannot be saved as JSON: {one_line(error)}") from error
    name = f"{_commit(run)}_{(now or datetime.now(UTC)):%Y%m%d_%H%M%S}"
    folder = results / machine
    if store.address_of(folder) is None:
        return _written(folder, name, text)
    try:
        kept = _written(paths.cache().absolute() / "unsent" / machine, name, text)
    except GaugeError:  # a cache that is full or not writable
        kept = _written(Path("results").absolute() / machine, name, text)
    try:
        saved = store.save(folder, name, text.encode())
    except GaugeError as error:
        raise GaugeError(f"{error}; the run is kept in {kept}") from error
    kept.unlink(missing_ok=True)
    return saved


def _written(folder: Path, name: str, text: str) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _claimed_number(folder) as number:
            target = folder / f"{number:04d}_{name}.json"
            write_whole(target, text)
    except OSError as error:
        raise GaugeError(
            f"cannot save the run under {folder}: {error.strerror or error}; choose another folder with --results"
        ) from error
    return target


def _refuse(value: object) -> Any:
    raise TypeError(f"a {type(value).__name__} is not a JSON value")


def _commit(run: Mapping[str, Any]) -> str:
    info = run.get("commit_info") or {}
    commit = re.sub(r"[^0-9A-Za-z]", "", str(info.get("id") or "unversioned"))[:12]
    return f"{commit}-dirty" if info.get("dirty") else commit


@contextmanager
def _claimed_number(folder: Path) -> Iterator[int]:
    """The next free number in ``folder``, reserved against other processes by an exclusively created file."""
    number = 1 + max(store.numbers(path.name for path in folder.iterdir()), default=0)
    while True:
        claim = folder / f".{number:04d}.claim"
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            number += 1
            continue
        # Another process may have saved its run and released the number since the numbers were listed.
        if any(folder.glob(f"{number:04d}_*.json")):
            claim.unlink()
            number += 1
            continue
        break
    try:
        yield number
    finally:
        claim.unlink(missing_ok=True)
