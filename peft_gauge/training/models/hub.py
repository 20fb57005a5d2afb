"""Files of the hub: one request shows whether it can be reached, since its library repeats failed ones for minutes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from peft_gauge.errors import one_line

SECONDS = 10.0
"""The longest wait for the hub's first response."""
CONFIG = "config.json"
LOGGERS = ("huggingface_hub", "transformers")


def failure(spec: str) -> Exception | None:
    """The error of one request, without retries, for the config of ``spec``; ``None`` if the hub responds."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(spec, CONFIG), timeout=SECONDS)
    except Exception as error:  # no network, no such repository, gated: the classes depend on the library's version
        return error
    return None


def config_file(spec: str) -> Path:
    """The config of ``spec`` in the hub's cache, downloaded unless it is there and the hub cannot be reached.

    Raises the error of the hub's library.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    error = failure(spec)
    if error is None:
        with quiet():
            return Path(hf_hub_download(spec, CONFIG))
    kept = try_to_load_from_cache(spec, CONFIG)
    if isinstance(kept, str):
        return Path(kept)
    raise error


def described(error: Exception) -> str:
    """The class and the text of an error of the hub's library, in one line."""
    return f"{type(error).__name__}: {one_line(error, 160)}"


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Without requests, in the context: transformers looks for an adapter on the hub also for local files only."""
    from huggingface_hub import constants

    with patch.object(constants, "HF_HUB_OFFLINE", True):
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' lines about retries and caches, in the context; errors are raised as exceptions."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
